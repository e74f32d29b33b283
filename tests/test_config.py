from __future__ import annotations

from pathlib import Path

import pytest

from spkd import config
from spkd.errors import UsageError
from spkd.eval.settings import EvalConfig
from spkd.extract.settings import ExtractConfig
from spkd.train.settings import TrainConfig


def test_a_section_given_a_plain_value_sets_its_first_key() -> None:
    loaded = config.load(ExtractConfig, ["teacher=wavlm", "view=crops:2,1.5"], environ={})
    assert loaded.teacher.name == "wavlm"
    assert loaded.view.plan == "crops:2,1.5"


def test_precedence_is_default_file_environment_command_line(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("batch_size: 7\nextract:\n  teacher: wavlm\n  workers: 5\ntrain:\n  steps: 3\n")
    environ = {"SPKD_WORKERS": "6", "SPKD_TEACHER__WEIGHTS": "w"}
    loaded = config.load(ExtractConfig, ["workers=9"], file, environ)
    assert (loaded.batch_size, loaded.teacher.name, loaded.workers, loaded.teacher.weights) == (7, "wavlm", 9, "w")
    assert config.load(TrainConfig, [], file, {}).steps == 3


def test_values_are_typed() -> None:
    loaded = config.load(
        TrainConfig, ["optim.lr=1e-3", "loss.weights.aam=0.5", "student=ecapa", "manifest=null"], environ={}
    )
    assert (loaded.optim.lr, loaded.loss.weights, loaded.student.name, loaded.manifest) == (
        1e-3,
        {"aam": 0.5},
        "ecapa",
        None,
    )
    assert config.load(ExtractConfig, ["view.speeds=[0.9,1.1]"], environ={}).view.speeds == [0.9, 1.1]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("techer=wavlm", "did you mean 'teacher"),
        ("teacher.wieghts=x", "did you mean 'teacher.weights'"),
        ("teacher=wavml", "did you mean 'wavlm'"),
        ("batch_size=many", "must be a whole number"),
        ("device=gpu", "did you mean 'cpu'"),
        ("fbank", "not key=value"),
        ("view.speeds=[fast]", "must be a number"),
    ],
)
def test_a_wrong_key_or_value_names_the_nearest_valid_one(override: str, expected: str) -> None:
    with pytest.raises(UsageError, match="^.*" + expected.replace("[", r"\[")):
        config.load(ExtractConfig, [override], environ={})


def test_a_wrong_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("extract:\n  techer: wavlm\n")
    with pytest.raises(UsageError, match=r"s\.yaml: unknown key 'techer'"):
        config.load(ExtractConfig, [], file, {})
    file.write_text("manifets: x\n")
    with pytest.raises(UsageError, match="did you mean 'manifest'"):
        config.load(ExtractConfig, [], file, {})
    file.write_text("a: [\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        config.load(ExtractConfig, [], file, {})


@pytest.mark.parametrize("schema", [ExtractConfig, TrainConfig, EvalConfig])
def test_every_key_has_a_meaning_and_a_valid_default(schema: type) -> None:
    for key in config.keys(schema):
        assert key.meaning
        defaults = key.default if isinstance(key.default, list) else [key.default]
        assert not key.choices or set(defaults) <= set(key.choices)


@pytest.mark.parametrize(
    "value",
    [
        *("010", "no", "run #3", "a: b", "@x", "${oc.env:HOME}", "${x}", "???", "2024-13-45", "1_000", "12:30:45"),
        *("0x1F", "'a'", "[a", "{a", "*a", "&a", "!!python/object:os.system", "a,b", "1e3", "-", "%"),
    ],
)
def test_text_is_the_text_it_looks_like(value: str) -> None:
    """On the command line and in the environment."""
    assert config.load(ExtractConfig, [f"cache={value}"], environ={}).cache == value
    assert config.load(ExtractConfig, [], environ={"SPKD_CACHE": value}).cache == value
    assert config.load(TrainConfig, [f"out={value}"], environ={}).out == value


def test_files_keep_the_text_of_values_too(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    for written, text in (("010", "010"), ("no", "no"), ("2024-13-45", "2024-13-45"), ("'${oc.env:HOME}'",) * 2):
        file.write_text(f"cache: {written}\n")
        assert config.load(ExtractConfig, [], file, {}).cache == text.strip("'")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"[" * 5000,
        b"extract: x\n",
        b"- a\n",
        b"cache: !!python/object/apply:os.system [ls]\n",
        b"a: &a [*a]\n",
        b"\x00",
        b"teacher: [a, b]\n",
        b"? [a]\n: b\n",
    ],
)
def test_a_settings_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"s\.yaml"):
        config.load(ExtractConfig, [], file, {})


SCHEMAS = {"extract": ExtractConfig, "train": TrainConfig, "eval": EvalConfig}
NUMBERS = [(c, k.name) for c, s in SCHEMAS.items() for k in config.keys(s) if k.kind in ("int", "float")]


@pytest.mark.parametrize(("command", "name"), NUMBERS)
def test_every_number_has_bounds(command: str, name: str) -> None:
    """NaN, infinite and absurd values are refused before any work starts."""
    for value in ("nan", "inf", "-inf", "1e300", "-1e300", "-1000000000000000000", "1e400", "x", ""):
        with pytest.raises(UsageError, match=name.split(".")[-1]):
            config.load(SCHEMAS[command], [f"{name}={value}"], environ={})
