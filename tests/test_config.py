from __future__ import annotations

from pathlib import Path

import pytest

from spkd import config
from spkd.config import EvalConfig, ExtractConfig, TrainConfig
from spkd.errors import UsageError


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
        assert not key.choices or key.default in key.choices
