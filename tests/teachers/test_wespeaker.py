"""WeSpeaker and 3D-Speaker are on no package index: what their own code gives is in oracles.json (see record.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from spkd.errors import UsageError
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.hyperpyyaml import _TaggedLoader
from spkd.teachers.settings import FrontEndSettings, ModelConfig
from spkd.teachers.toolkit import _UntaggedLoader, read_settings

from .fixed import fixed_wave, fixed_weights

ORACLES = json.loads(Path(__file__).with_name("oracles.json").read_text())
CPU = torch.device("cpu")


def weights_of(toolkit: str, name: str) -> dict[str, Tensor]:
    """Its state dictionary, under the names of its own library."""
    return fixed_weights((n, tuple(shape)) for n, shape in ORACLES[toolkit][name]["weights"].items())


def save_wespeaker(folder: Path, name: str, extra: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """A folder as WeSpeaker leaves it, trained on several GPUs."""
    folder.mkdir(exist_ok=True)
    arguments = ORACLES["wespeaker"][name]["model_args"]
    mels = arguments.get("feat_dim", 80)
    bank = {"resample_rate": 16000, "fbank_args": {"num_mel_bins": mels, "frame_length": 25}}
    config: dict[str, Any] = {
        "model": name.split()[0],
        "model_args": arguments,
        "dataset_args": ORACLES["wespeaker"][name].get("dataset_args", bank),
        "projection_args": {"project_type": "arc_margin", "scale": 32.0},
    }
    config |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    state = weights_of("wespeaker", name) | (extra or {})
    torch.save({f"module.{n}": values for n, values in state.items()}, folder / "avg_model.pt")
    return folder


def load(family: str, weights: Path, **settings: Any) -> Teacher:
    return load_teacher(ModelConfig(family, str(weights), settings=FrontEndSettings(**settings)), CPU)


def check(teacher: Teacher, expected: dict[str, Any]) -> None:
    """The embedding is the library's, every level has its declared shape, and padding changes nothing."""
    wave = torch.from_numpy(fixed_wave())[None]
    outputs = teacher.extract(wave, list(teacher.targets))
    embedding = outputs["embedding"][0].astype(np.float64)
    largest = np.abs(expected["embedding"]).max()
    assert np.allclose(embedding[: len(expected["embedding"])], expected["embedding"], rtol=0, atol=2e-4 * largest)
    assert abs(np.linalg.norm(embedding) / expected["norm"] - 1) < 1e-4
    for name, target in teacher.targets.items():
        rows = () if target.hop is None else (target.num_frames(wave.shape[1]),)
        assert outputs[name].shape == (1, *rows, target.dim), name
    short = wave[:, : 16_000 - 37]
    both = torch.cat([wave, torch.nn.functional.pad(short, (0, wave.shape[1] - short.shape[1]))])
    lengths = torch.tensor([wave.shape[1], short.shape[1]])
    together = teacher.extract(both, list(teacher.targets), lengths=lengths)
    alone = teacher.extract(short, list(teacher.targets))
    for name, values in alone.items():
        padded = together[name][1, : values.shape[1]] if values.ndim == 3 else together[name][1]
        assert np.allclose(padded, values[0], rtol=1e-3, atol=1e-4 * np.abs(values).max()), name


@pytest.mark.parametrize("name", ORACLES["wespeaker"])
def test_wespeakers_models_give_what_its_own_code_gives(tmp_path: Path, name: str) -> None:
    check(load("wespeaker", save_wespeaker(tmp_path, name)), ORACLES["wespeaker"][name])


@pytest.mark.parametrize("name", ORACLES["3d-speaker"])
def test_3d_speakers_models_give_what_its_own_code_gives(tmp_path: Path, name: str) -> None:
    torch.save(weights_of("3d-speaker", name), tmp_path / "model.ckpt")
    check(load("3d-speaker", tmp_path), ORACLES["3d-speaker"][name])


def test_a_projection_in_the_file_gives_logits(tmp_path: Path) -> None:
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
    wave = torch.from_numpy(fixed_wave())[None]
    for kind, parts in (("arc_margin", 1), ("arc_margin_intertopk_subcenter", 3)):
        arguments = {"project_type": kind, "scale": 20.0, "K": 3}
        extra = {"projection.weight": weight}
        teacher = load("wespeaker", save_wespeaker(tmp_path, "ResNet18", extra, projection_args=arguments))
        outputs = teacher.extract(wave, ["embedding", "logits"])
        rows = weight.double() / weight.double().norm(dim=1, keepdim=True)
        vector = torch.from_numpy(outputs["embedding"][0]).double()
        cosines = (rows @ vector / vector.norm()).reshape(-1, parts).amax(1)
        assert np.allclose(outputs["logits"][0], 20 * cosines, atol=1e-3)
    extra = {"projection.trans.weight": weight, "projection.trans.bias": torch.arange(6.0)}
    folder = save_wespeaker(tmp_path, "ResNet18", extra, projection_args={"project_type": "softmax"})
    outputs = load("wespeaker", folder).extract(wave, ["embedding", "logits"])
    expected = weight.double() @ torch.from_numpy(outputs["embedding"][0]).double() + torch.arange(6.0)
    assert np.allclose(outputs["logits"][0], expected, rtol=1e-3, atol=1e-2)


def test_pooling_and_the_classifier_are_part_of_the_card(tmp_path: Path) -> None:
    """What no weight of the network tells: two poolings without weights, two classifiers of one network."""
    tap, tsdp = (
        save_wespeaker(tmp_path / name, "XVEC", model_args={"feat_dim": 40, "embed_dim": 192, "pooling_func": name})
        for name in ("TAP", "TSDP")
    )
    for folder in (tap, tsdp):  # both halve the input of the first layer after pooling
        state = torch.load(folder / "avg_model.pt", weights_only=True)
        state["module.seg_1.weight"] = state["module.seg_1.weight"][:, :1500].clone()
        torch.save(state, folder / "avg_model.pt")
    one, other = (load("wespeaker", folder).card() for folder in (tap, tsdp))
    assert one.weights_sha256 == other.weights_sha256
    assert one.details != other.details
    heads = [
        load(
            "wespeaker",
            save_wespeaker(tmp_path / str(i), "ResNet18", {"projection.weight": torch.full((6, 192), 1.0 + i)}),
        )
        for i in range(2)
    ]
    assert heads[0].card().weights_sha256 != heads[1].card().weights_sha256


def test_3d_speakers_classifier_beside_the_weights_gives_logits(tmp_path: Path) -> None:
    torch.save(weights_of("3d-speaker", "ResNet"), tmp_path / "embedding_model.ckpt")
    torch.save({"weight": torch.randn(5, 256)}, tmp_path / "classifier.ckpt")
    teacher = load("3d-speaker", tmp_path)
    assert teacher.targets["logits"].dim == 5
    assert teacher.extract(torch.from_numpy(fixed_wave())[None], ["logits"])["logits"].shape == (1, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_args": {"frontend": "s3prl"}}, "its front end is s3prl"),
        ({"dataset_args": {"frontend": "tfmel", "tfmel_args": {"n_mels": 80}}}, "ResNet18 on the front end tfmel"),
        ({"dataset_args": {"resample_rate": 8000}}, "trained on audio of 8000 Hz"),
        ({"dataset_args": {"cmvn_args": {"norm_var": True}}}, "not mean-normalised"),
        ({"dataset_args": {"cmvn_args": {"norm_mean": False}}}, "not mean-normalised"),
        ({"dataset_args": {"cmvn": False}}, "not mean-normalised"),
        ({"dataset_args": {"cmvn_args": {"window": 300}}}, "cmvn_args.window is not known"),
        ({"dataset_args": {"fbank_args": {"frame_shift": 5}}}, "frame_shift is 5 ms"),
        ({"dataset_args": {"fbank_args": {"frame_length": 32}}}, "frame_length is 32 ms"),
        ({"dataset_args": {"fbank_args": {"num_mel_bins": 40}}}, "has the shape"),
        ({"dataset_args": {"fbank_args": {"num_mel_bins": "80"}}}, "num_mel_bins: expected 8 to 256"),
        ({"dataset_args": {"fbank_args": {"low_freq": 60}}}, "fbank_args.low_freq is not known"),
        ({"dataset_args": {"feature_norm": "global"}}, "dataset_args.feature_norm is not known"),
        ({"dataset_args": {}, "feature_args": {"num_mel_bins": 40}}, "has the shape"),
        ({"dataset_args": 7, "model_args": {"pooling_func": "TAP"}}, "seg_1.weight has the shape"),
        ({"model_args": {"pooling_func": "MHASTP"}}, "no weights 'pool.heads_att_trans.0.att_0.weight'"),
        ({"model_args": {"pooling_func": "MASTP"}}, "pooling_func is MASTP; taken: TSTP, ASTP, TAP"),
        ({"model": "SimAM_ResNet34_ASP", "model_args": {"pooling_func": "TAP"}}, "pooling_func is TAP; taken: ASP"),
        ({"model_args": {"config_str": "relu-batchnorm"}}, "model_args.config_str is not known"),
        ({"model": "REPVGG_TINY_A9"}, "model is REPVGG_TINY_A9, which spkd does not have; taken: ResNet18"),
        ({"model": "ReDimNet2B9"}, "model is ReDimNet2B9"),
        ({"model": ["ResNet18"]}, "model is a list"),
        ({"projection_args": {"project_type": "arc_margin", "scale": "big"}}, "scale or K is no number"),
    ],
)
def test_settings_that_spkd_does_not_have_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("wespeaker", save_wespeaker(tmp_path, "ResNet18", **settings))


@pytest.mark.parametrize("loader", [_UntaggedLoader, _TaggedLoader])
def test_aliases_make_no_file_endless(tmp_path: Path, loader: type) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\n")
    assert read_settings(path, loader) == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
    for begin, level in (("[x]", "[{}]"), ("{x: 1}", "{{<<: [{}]}}")):
        lines = [f"a{i}: &a{i} {level.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 10)]
        path.write_text(f"a0: &a0 {begin}\n{''.join(lines)}")
        with pytest.raises(UsageError, match="aliases make it endless"):
            read_settings(path, loader)
    path.write_text("a: &a [*a]\n")
    with pytest.raises(UsageError, match="aliases make it endless"):
        read_settings(path, loader)


def test_settings_without_effect_on_an_embedding_are_taken(tmp_path: Path) -> None:
    """All of WeSpeaker's recipe for ResNet (examples/voxceleb/v2/conf/resnet.yaml)."""
    data = {
        "sample_num_per_epoch": 0, "shuffle": True, "shuffle_args": {"shuffle_size": 2500}, "filter": True,
        "filter_args": {"min_num_frames": 100, "max_num_frames": 800}, "resample_rate": 16000, "speed_perturb": True,
        "num_frms": 200, "aug_prob": 0.6, "spec_aug": False, "spec_aug_args": {"num_t_mask": 1}, "frontend": "fbank",
        "fbank_args": {"num_mel_bins": 80, "frame_shift": 10, "frame_length": 25, "dither": 1.0},
        "cmvn": True, "cmvn_args": {"norm_mean": True, "norm_var": False},
    }  # fmt: skip
    folder = save_wespeaker(tmp_path, "ResNet18", dataset_args=data, optimizer="SGD", do_lm=True, seed=42)
    check(load("wespeaker", folder), ORACLES["wespeaker"]["ResNet18"])


def exp_folder(root: Path, feature: dict[str, Any], network: dict[str, Any]) -> Path:
    """What a recipe of 3D-Speaker leaves, after three epochs."""
    for i, scale in ((1, 0.5), (2, 0.5), (10, 1.0)):
        folder = root / "models" / f"CKPT-EPOCH-{i}-00"
        folder.mkdir(parents=True)
        torch.save(
            {n: scale * v for n, v in weights_of("3d-speaker", "ResNet").items()}, folder / "embedding_model.ckpt"
        )
        torch.save({"weight": torch.randn(5, 256)}, folder / "classifier.ckpt")
    settings = {
        "fbank_dim": 80, "sample_rate": 16000, "data": None,
        "feature_extractor": {"obj": "speakerlab.process.processor.FBank", "args": feature},
        "embedding_model": {"obj": "speakerlab.models.resnet.ResNet.ResNet", "args": network},
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return root


FEATURE = {"n_mels": "<fbank_dim>", "sample_rate": "<sample_rate>", "mean_nor": True}


def test_the_folder_of_a_recipe_of_3d_speaker_has_its_last_checkpoint(tmp_path: Path) -> None:
    folder = exp_folder(tmp_path / "exp", FEATURE, {"feat_dim": "<fbank_dim>", "embedding_size": 256})
    for place in (folder, folder / "models"):
        teacher = load("3d-speaker", place)
        check(teacher, ORACLES["3d-speaker"]["ResNet"])
        assert teacher.targets["logits"].dim == 5
    other = (folder / "config.yaml").read_text().replace("processor.FBank", "processor.MFCC")
    (folder / "config.yaml").write_text(other)
    with pytest.raises(UsageError, match=r"feature_extractor.obj is speakerlab.process.processor.MFCC; spkd has"):
        load("3d-speaker", folder)


@pytest.mark.parametrize(
    ("feature", "network", "message"),
    [
        (FEATURE | {"mean_nor": False}, {}, "feature_extractor.mean_nor"),
        ({"n_mels": 80, "sample_rate": 16000}, {}, "feature_extractor.mean_nor"),
        (FEATURE | {"sample_rate": 8000}, {}, "feature_extractor.sample_rate"),
        (FEATURE | {"n_mels": 40}, {}, "has the shape"),
        (FEATURE | {"n_mels": "<none>"}, {}, "n_mels: expected 8 to 256"),
        (FEATURE | {"low_freq": 60}, {}, "feature_extractor.low_freq is not known"),
        (FEATURE, {"pooling_func": "TAP"}, "pooling_func: spkd has TSTP"),
        (FEATURE, {"activation": "torch.nn.GELU"}, "embedding_model.activation is not known"),
    ],
)
def test_settings_of_3d_speaker_are_refused_by_name(tmp_path: Path, feature: dict, network: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("3d-speaker", exp_folder(tmp_path / "exp", feature, network))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["torch_spec.0.filter", "conv1.weight"], "a speaker encoder of Coqui TTS"),
        (["resnet.conv1.weight"], "a model of pyannote.audio"),
        (["something.weight"], "architecture that spkd does not have .*'something.weight'"),
    ],
)
def test_weights_of_others_are_said_to_be_theirs(tmp_path: Path, names: list[str], message: str) -> None:
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=message):
        load("3d-speaker", tmp_path / "model.pt")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = save_wespeaker(tmp_path, "ResNet18")
    state = torch.load(folder / "avg_model.pt", weights_only=True)
    name = "module.layer1.0.conv2.weight"
    for change, message in (
        ({name: None}, "no weights 'layer1.0.conv2.weight'"),
        ({name: torch.zeros(3, 3)}, "layer1.0.conv2.weight has the shape"),
        ({name: torch.full_like(state[name], torch.nan)}, "are not finite"),
        ({"module.more": torch.zeros(1)}, "weights 'more' are not known here"),
    ):
        changed = {n: v for n, v in (state | change).items() if v is not None}
        torch.save(changed, folder / "avg_model.pt")
        with pytest.raises(UsageError, match=message):
            load("wespeaker", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no avg_model.pt"):
        load("wespeaker", tmp_path / "empty")
    (folder / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"no config.yaml next to"):
        load("wespeaker", folder)


def test_nothing_that_the_settings_name_is_run(tmp_path: Path) -> None:
    folder = save_wespeaker(tmp_path, "ResNet18")
    with open(folder / "config.yaml", "a") as file:
        file.write(f"evil: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    load("wespeaker", folder)
    assert not (tmp_path / "ran").exists()


def test_the_fbank_can_be_another_toolkits(tmp_path: Path) -> None:
    """WeSpeaker's hub has models of 3D-Speaker, which take 3D-Speaker's fbank."""
    folder = save_wespeaker(tmp_path, "CAMPPlus")
    wave = torch.from_numpy(fixed_wave())[None]
    one = load("wespeaker", folder).extract(wave, ["embedding"])["embedding"]
    other = load("wespeaker", folder, input="3d-speaker").extract(wave, ["embedding"])["embedding"]
    torch.save(weights_of("wespeaker", "CAMPPlus"), tmp_path / "campplus.bin")
    theirs = load("3d-speaker", tmp_path / "campplus.bin").extract(wave, ["embedding"])["embedding"]
    assert np.allclose(other, theirs, atol=1e-3)  # but for a floor of 1e-7 under the variances
    assert not np.allclose(one, other, atol=2e-3)


@pytest.mark.slow
def test_through_the_command_line(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    save_wespeaker(tmp_path / "model", "ResNet18", {"projection.weight": torch.randn(6, 192)})
    given = ["teacher=wespeaker", "teacher.weights=model", f"manifest={corpus / 'manifest.csv'}"]
    done = spkd("extract", *given, "teacher.targets=[embedding,stats,logits]", "fbank=true").ok()
    assert "18 views extracted, 0 rejected; complete" in done.out
    spkd("cache", "verify", "cache", "--live", "4", *given).ok()
    spkd("train", "--loss", "kld", "student=tiny", "student.channels=16", "steps=2", "batch_size=4").ok()
    spkd("eval", corpus / "trials.txt", "model=wespeaker", "model.weights=model", given[2]).ok()
