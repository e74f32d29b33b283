from __future__ import annotations

import gc
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from spkd import config
from spkd.errors import UsageError
from spkd.eval.settings import CalibrateConfig, EmbedConfig, EvalConfig
from spkd.export.settings import ExportConfig
from spkd.extract.settings import ExtractConfig
from spkd.registry import COMMANDS
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


@pytest.mark.parametrize(
    ("address", "is_taken"),
    [
        ("folder/a:b", True),
        ("s3://lab/x", True),
        ("https://host/x", True),
        ("reference::file://refs.json", False),
        ("simplecache::s3://lab/x", False),
        ("s3://lab/x::file://y", False),
        ("reference://refs.json", False),
        ("ssh://host/x", False),
        (" s3://lab/x", False),
    ],
)
def test_a_file_names_addresses_of_known_protocols_alone(tmp_path: Path, address: str, is_taken: bool) -> None:
    file, given = tmp_path / "s.yaml", [f"cache={address}"]
    file.write_text(f"train: {{cache: ['{address}']}}\n")
    typed = config.load(TrainConfig, given, environ={}).cache
    assert typed == config.load(TrainConfig, [], environ={"SPKD_CACHE": address}).cache == [address]
    if is_taken:
        assert config.load(TrainConfig, [], file, {}).cache == typed
        return
    with pytest.raises(UsageError, match=r"s.yaml: cache=.* others are typed, as cache=ADDRESS"):
        config.load(TrainConfig, [], file, {})
    assert config.load(TrainConfig, ["cache=mine"], file, {}).cache == ["mine"]


def test_a_file_starts_no_engine(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("extract: {engine: ray}\n")
    with pytest.raises(UsageError, match=r"s.yaml: engine=ray is not taken from a file; type engine=ray"):
        config.load(ExtractConfig, [], file, {})
    assert config.load(ExtractConfig, [], environ={"SPKD_ENGINE": "ray"}).engine == "ray"
    assert config.load(ExtractConfig, ["engine=auto"], file, {}).engine == "auto"


@pytest.mark.parametrize("schema", [EvalConfig, EmbedConfig, CalibrateConfig, ExportConfig])
def test_a_file_names_nothing_elsewhere_that_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: type
) -> None:
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    checkout.mkdir()
    home.mkdir()
    monkeypatch.chdir(checkout)
    (home / "mine").write_text("precious")
    Path("link").symlink_to(home / "mine")
    Path("there").write_text("of the checkout")
    for name in (str(home / "mine"), "../home/mine", "link"):
        Path("spkd.yaml").write_text(f"{schema.COMMAND}: {{out: {name}}}\n")
        with pytest.raises(UsageError, match="outside of the current folder.*type out="):
            config.load(schema)
        assert config.load(schema, [f"out={name}"]).out == name
        assert config.load(schema, environ={"SPKD_OUT": name}).out == name
    for name in (str(home / "new"), "there", "new"):
        Path("spkd.yaml").write_text(f"{schema.COMMAND}: {{out: {name}}}\n")
        assert config.load(schema).out == name


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("text", ["[{}]", "{}", "[tensorboard,{}]"])
def test_a_file_sends_nothing_to_a_server(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / "s.yaml"
    text = text.format(name)
    file.write_text(f"train: {{loggers: {text}}}\n")
    typed = text if text.startswith("[") else f"[{text}]"
    with pytest.raises(UsageError) as refused:
        config.load(TrainConfig, [], file, {})
    assert str(refused.value).endswith(f"s.yaml: loggers={name} is not taken from a file; type loggers={typed}")
    assert config.load(TrainConfig, [f"loggers={typed}"], file, {}).loggers == typed.strip("[]").split(",")
    assert name in config.load(TrainConfig, [], environ={"SPKD_LOGGERS": typed}).loggers
    file.write_text("train: {loggers: [tensorboard]}\n")
    assert config.load(TrainConfig, [], file, {}).loggers == ["tensorboard"]


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
        ("device=gpu", "did you mean 'cuda'"),
        ("storage.codecs={fbnk:int8}", "write a space after the colon: {fbnk: int8}"),
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


def test_a_pipe_in_the_place_of_the_settings_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("spkd.yaml")
    with pytest.raises(UsageError, match="settings file spkd.yaml: not a regular file"):
        config.load(ExtractConfig, [], environ={})


NO_NUMBERS = (
    *("nan", "inf", "-inf", "1e300", "-1e300", "-1000000000000000000", "1e400", "9" * 50, "x", "0x1F", "true", "None"),
    *("\u0663", "1_0", " 1", "1 ", "1\n", "1,5", "1e", "--1", "\uff11"),
)
NO_VALUES = {
    "int": NO_NUMBERS,
    "float": NO_NUMBERS,
    "bool": ("", "2", "nan", " true", "\u0663"),
    "str": ("", "a\0b", "\udce9"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_type_reads_values_alike(command: str) -> None:
    """Absurd values are refused before any work starts, and an empty one where it has no meaning."""

    def read(text: Any) -> Any:
        return key.read(config.Given(f"{key.name}={text}", text, True))

    for key in (*config.keys(COMMANDS[command]), *config.component_keys(COMMANDS[command])):
        kinds = re.findall("int|float|bool|str", key.kind)
        for value in NO_VALUES[kinds[-1]]:
            # What the type may hold: nothing, items of a list, or those of a mapping.
            nothing = not value and (key.default == "" or "None" in key.kind)
            written = [value] if key.kind.startswith("list") else {"a": value} if key.kind.startswith("dict") else value
            if nothing or (value == "None" and "None" in key.kind):
                assert read(written) in (None, "")
                continue
            with pytest.raises(UsageError, match=re.escape(key.name)):
                read(written)
        if key.kind in ("int", "float") and not key.limits["positive"] and (key.limits["low"] or 0) <= 0:
            assert math.copysign(1, read("-0")) == 1
        if key.kind.startswith("list"):
            assert read("") == []


def test_an_empty_mapping_is_one_without_items() -> None:
    assert config.load(TrainConfig, ["loss.weights="], environ={}).loss.weights == {}


@pytest.mark.parametrize(
    ("schema", "given", "expected"),
    [
        (TrainConfig, ["student=xvector", "student.ssl.layers=9"], "student=ssl is not in use"),
        (TrainConfig, ["sampler.speakers.views=4"], "sampler=speakers is not in use"),
        (TrainConfig, ["sampler.shares.shares=[0.5]"], "sampler=shares is not in use"),
        (TrainConfig, ["mining.neighbours=3"], "nothing is mined"),
        (TrainConfig, ["optim.sgd.nesterov=false"], "optim=sgd is not in use"),
        (TrainConfig, ["valid.every=7"], "no valid.trials are set"),
        (TrainConfig, ["augment.noise_prob=0.1"], "no noise is set"),
        (TrainConfig, ["noise=/nowhere"], "no manifest is given"),
        (ExtractConfig, ["teacher=checkpoint", "teacher.wavlm.layer=5"], "teacher=wavlm is not in use"),
        (ExtractConfig, ["teacher=checkpoint", "teacher.onnx.outputs={a: b}"], "teacher=onnx is not in use"),
        (ExtractConfig, ["view.snr=[0,5]"], "no noise is set"),
        (ExportConfig, ["to=pt2", "litert.seconds=9"], "to=litert is not in use"),
        (ExportConfig, ["to=pt2", "onnx_int8.speech=100"], "to=onnx-int8 is not in use"),
        (EvalConfig, ["cohort.top=50"], "no norm=as-norm"),
        (EvalConfig, ["model=student", "model.wavlm.layer=3"], "model=wavlm is not in use"),
        (EvalConfig, ["model=student", "model.weights=x"], "student is the folder of a student"),
    ],
)
def test_a_setting_without_effect_is_refused_where_typed_and_left_out_elsewhere(
    schema: type, given: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UsageError, match=expected):
        config.load(schema, given, environ={})
    *choice, inert = given
    variable = "SPKD_" + inert.partition("=")[0].replace(".", "__").upper()
    loaded = config.load(schema, choice, environ={variable: inert.partition("=")[2]})
    assert loaded == config.load(schema, choice, environ={})
    assert config.dump(loaded) == config.dump(config.load(schema, choice, environ={}))
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("schema", "given", "expected"),
    [
        (TrainConfig, "student.layers=9", "did you mean 'student.ssl.layers'"),
        (TrainConfig, "optim.nesterov=false", "did you mean 'optim.sgd.nesterov'"),
        (EvalConfig, "teacher.weights=a.onnx", "did you mean 'model.weights'"),
        (EvalConfig, "teacher=wavlm", "did you mean 'model'"),
        (ExtractConfig, "onnx.input=kaldi", "did you mean 'teacher.onnx.input'[?]$"),
        (EmbedConfig, "onnx.input=kaldi", "did you mean 'model.onnx.input'[?]$"),
        (EvalConfig, "onnx.input=kaldi", "did you mean 'model.onnx.input' or 'enrol.model.onnx.input'[?]$"),
        (EvalConfig, "weights=a", "did you mean 'model.weights' or 'enrol.model.weights'"),
        (ExtractConfig, "model=wavlm", "did you mean 'teacher'"),
        (TrainConfig, "loss.aam.margn=1", "did you mean 'loss.aam.margin'"),
        (TrainConfig, "student.tiny.width=1", "tiny has no settings of its own"),
        (TrainConfig, "student.ssl=1", "student.ssl.layers, student.ssl.adapters"),
        (TrainConfig, "student=TINY", "did you mean 'tiny'"),
        (TrainConfig, "margin=1", "'large_margin.margin', 'loss.aam.margin', 'loss.kld.margin' or [0-9] more"),
        (TrainConfig, "optim.learning_rate=1", "did you mean 'optim.lr'"),
        (CalibrateConfig, "quality=duration,cohort", r"write quality=\[duration,cohort\]$"),
        (TrainConfig, "view=full", "it is a setting of spkd extract"),
        (TrainConfig, "view.noise=a", "did you mean 'augment.noise'"),
        (TrainConfig, "teacher.weights=x", "it is a setting of spkd extract"),
        (CalibrateConfig, "save_every=1", "it is a setting of spkd train$"),
        (ExtractConfig, "enrol.map=m", "it is a setting of spkd eval and calibrate$"),
    ],
)
def test_an_unknown_key_names_the_component_that_owns_the_nearest_one(schema: type, given: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        config.load(schema, [given], environ={})


def test_a_large_settings_file_is_read_in_linear_time(tmp_path: Path) -> None:
    """Eight times as many names take eight times as long; of a quadratic search for those given twice, 64 times."""
    seconds = []
    gc.disable()  # a collection goes over what thousands of other tests left, in the larger file alone
    try:
        for names in (1500, 12_000):
            (tmp_path / "s.yaml").write_text("".join(f"a{i:x}: \n" for i in range(names)))
            start = time.process_time()
            with pytest.raises(UsageError, match="unknown key 'a0'"):
                config.load(TrainConfig, [], tmp_path / "s.yaml", {})
            seconds.append(time.process_time() - start)
    finally:
        gc.enable()
    assert seconds[1] < 24 * seconds[0]


def test_a_key_in_two_spellings_is_refused(tmp_path: Path) -> None:
    for given in (["student=tiny", "student.name=ecapa"], ["loss.one_step.weight=1", "loss.one-step.weight=2"]):
        with pytest.raises(UsageError, match="is given twice"):
            config.load(TrainConfig, ["loss=one-step", *given], environ={})
    assert config.load(TrainConfig, ["steps=5", "steps=6"], environ={}).steps == 6
    (tmp_path / "s.yaml").write_text("train: {steps: 5, steps: 6}\n")
    with pytest.raises(UsageError, match="steps is given twice"):
        config.load(TrainConfig, [], tmp_path / "s.yaml", {})


@pytest.mark.parametrize(
    ("given", "way"),
    [
        (["steps=5", "student", "=", "tiny"], "; write student=tiny"),
        (["steps=5", "student=", "tiny"], "; write student=tiny"),
        (["steps=5", "student", "=tiny"], "; write student=tiny"),
        (
            ["loss.weights=0.5"],
            r"; write loss\.weights\.NAME=VALUE for one item, or 'loss\.weights={NAME: VALUE}' for all",
        ),
    ],
)
def test_a_wrong_form_is_answered_with_the_right_one(given: list[str], way: str) -> None:
    with pytest.raises(UsageError, match=f"{way}$"):
        config.load(TrainConfig, given, environ={})


def test_items_of_a_mapping_are_added_to_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("train: {loss: {names: [aam, mse], weights: {aam: 0.5, mse: 2}}}\n")
    loaded = config.load(TrainConfig, ["loss.weights.aam=0.1"], tmp_path / "s.yaml", {})
    assert loaded.loss.weights == {"aam": 0.1, "mse": 2.0}
    loaded = config.load(TrainConfig, ["loss.weights={aam: 0.1}"], tmp_path / "s.yaml", {})
    assert loaded.loss.weights == {"aam": 0.1}


def test_a_recipes_settings_of_what_was_replaced_fall_away(capsys: pytest.CaptureFixture) -> None:
    loaded = config.load(TrainConfig, ["loss=[contrastive,ntxent]"], environ={}, base="best-mini")
    assert (loaded.loss.weights, list(loaded.loss.settings)) == ({}, ["contrastive", "ntxent"])
    assert loaded.loss.settings["ntxent"].temperature == 0.07
    assert "left out loss.weights.aam" in capsys.readouterr().out
    assert config.load(TrainConfig, ["student=tiny"], environ={}, base="os-kdft").student.name == "tiny"


def test_the_last_whole_mapping_replaces_the_items_before_it() -> None:
    given = ["loss=[aam,cosine]", "loss.weights={aam: 3}", "loss.weights={cosine: 2}"]
    assert config.load(TrainConfig, given, environ={}).loss.weights == {"cosine": 2.0}


def test_a_repeated_key_of_a_file_or_of_the_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("train: {loss: {names: aam}, loss.names: [cosine]}\n")
    with pytest.raises(UsageError, match=r"loss\.names is given twice"):
        config.load(TrainConfig, [], tmp_path / "s.yaml", {})
    for environ in ({"SPKD_STUDENT": "tiny", "SPKD_STUDENT__NAME": "xvector"},):
        with pytest.raises(UsageError, match=r"student\.name is given twice"):
            config.load(TrainConfig, [], environ=environ)


def test_settings_that_came_with_a_replaced_choice_fall_away(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "s.yaml").write_text("train: {student: {name: ecapa, channels: 512}, optim: {name: sgd, lr: 1.2}}\n")
    loaded = config.load(TrainConfig, ["student=tiny", "optim=adamw"], tmp_path / "s.yaml", {})
    assert (loaded.student.channels, loaded.optim.lr) == (None, TrainConfig().optim.lr)
    assert "left out student.channels, which came with student.name=ecapa" in capsys.readouterr().out
    loaded = config.load(TrainConfig, ["student=tiny"], None, {"SPKD_STUDENT__CHANNELS": "8"})
    assert loaded.student.channels == 8


def test_of_steps_and_epochs_the_later_source_counts(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("train: {epochs: 2}\n")
    loaded = config.load(TrainConfig, ["steps=5"], tmp_path / "s.yaml", {})
    assert (loaded.steps, loaded.epochs) == (5, None)


def test_an_empty_list_leaves_the_choice_to_the_command() -> None:
    loaded = config.load(TrainConfig, ["loss=[]"], environ={})
    assert config.chosen(loaded, {"loss.names": ["cosine"]}).loss.names == ["cosine"]


@pytest.mark.parametrize(
    ("variable", "right"),
    [("SPKD_OPTIM_LR", "SPKD_OPTIM__LR"), ("SPKD_STUDENT__CHANELS", "SPKD_STUDENT__CHANNELS")],
)
def test_a_variable_that_no_command_has_names_the_right_one(
    capsys: pytest.CaptureFixture, variable: str, right: str
) -> None:
    config.load(TrainConfig, [], environ={variable: "1"})
    assert f"note: {variable}: no command has a setting " in (found := capsys.readouterr().out)
    assert f"; did you mean {right!r}?" in found


def test_a_wrong_section_of_a_file_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("trian: {steps: 5}\n")
    with pytest.raises(UsageError, match="unknown key 'trian'; did you mean 'train'"):
        config.load(TrainConfig, [], tmp_path / "s.yaml", environ={})


def test_a_setting_of_another_command_says_so() -> None:
    with pytest.raises(UsageError, match="it is a setting of spkd train"):
        config.load(ExtractConfig, ["optim.lr=3"], environ={})


def test_settings_of_a_model_that_is_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="not in use"):
        config.load(EvalConfig, ["enrol.model.onnx.input=kaldi"], environ={})
