from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from spkd.errors import UsageError
from spkd.networks.ssl import from_teacher
from spkd.outputs.features import FBANK
from spkd.teachers.ssl import Data2Vec, HuBERT, SSLTeacher, W2VBert, Wav2Vec2, WavLM, receptive_field

from ..conftest import TINY_SSL

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def test_hidden_states_and_pooling_are_those_of_transformers(tiny_wavlm: Path) -> None:
    teacher = WavLM(str(tiny_wavlm), 2, CPU)
    waves = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    outputs = teacher.extract(waves, list(teacher.targets))
    model = transformers.WavLMModel.from_pretrained(tiny_wavlm).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    inputs = extractor([w.numpy() for w in waves], sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        hidden = model(inputs, output_hidden_states=True).hidden_states
    for i in range(4):
        assert np.allclose(outputs[f"frames.layer{i}"], hidden[i], atol=1e-4)
    pooled = torch.cat([hidden[2].mean(1), hidden[2].std(1, correction=0)], 1)
    assert np.allclose(outputs["embedding"], pooled, atol=1e-3)


@pytest.mark.parametrize("samples", [400, 719, 720, 16_000, 16_333])
def test_the_declared_number_of_rows_is_given(tiny_wavlm: Path, samples: int) -> None:
    teacher = WavLM(str(tiny_wavlm), None, CPU)
    outputs = teacher.extract(torch.randn(1, samples), ["frames.layer3"])
    assert outputs["frames.layer3"].shape == (1, int(teacher.targets["frames.layer3"].num_frames(samples)), 16)


@pytest.mark.parametrize("family", ["hubert", "wav2vec2"])
def test_the_other_families_load(tmp_path: Path, family: str) -> None:
    kind = {"hubert": transformers.HubertConfig, "wav2vec2": transformers.Wav2Vec2Config}[family]
    transformers.AutoModel.from_config(kind(**TINY_SSL)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False})
    )
    teacher = {"hubert": HuBERT, "wav2vec2": Wav2Vec2}[family](str(tmp_path), None, CPU)
    assert teacher.card().preprocessing == "waveform as it is"
    assert teacher.extract(torch.randn(1, 4000), ["embedding"])["embedding"].shape == (1, 32)


LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
HEAD = {"tdnn_dim": (8, 8, 12), "tdnn_kernel": (5, 3, 1), "tdnn_dilation": (1, 2, 1), "xvector_output_dim": 6,
        "num_labels": 4}  # fmt: skip
PLAIN = {k: v for k, v in TINY_SSL.items() if not k.startswith(("conv", "num_conv"))} | {
    "feature_projection_input_dim": 160
}
# family, transformers' model, its configuration
MODELS: dict[str, tuple[type[SSLTeacher], Callable]] = {
    "wavlm": (WavLM, lambda t: t.WavLMModel(t.WavLMConfig(**TINY_SSL))),
    "wavlm-layer-norm": (WavLM, lambda t: t.WavLMModel(t.WavLMConfig(**TINY_SSL, **LAYER_NORM))),
    "wavlm-xvector": (WavLM, lambda t: t.WavLMForXVector(t.WavLMConfig(**TINY_SSL, **HEAD))),
    "wavlm-xvector-weighted": (
        WavLM,
        lambda t: t.WavLMForXVector(t.WavLMConfig(**TINY_SSL, **HEAD, **LAYER_NORM, use_weighted_layer_sum=True)),
    ),
    "hubert": (HuBERT, lambda t: t.HubertModel(t.HubertConfig(**TINY_SSL))),
    "wav2vec2-xvector": (
        Wav2Vec2,
        lambda t: t.Wav2Vec2ForXVector(t.Wav2Vec2Config(**TINY_SSL, **HEAD, use_weighted_layer_sum=True)),
    ),
    "data2vec": (
        Data2Vec,
        lambda t: t.Data2VecAudioModel(t.Data2VecAudioConfig(**TINY_SSL, conv_pos_kernel_size=5)),
    ),
    "w2v-bert": (W2VBert, lambda t: t.Wav2Vec2BertModel(t.Wav2Vec2BertConfig(**PLAIN))),
    "w2v-bert-xvector": (W2VBert, lambda t: t.Wav2Vec2BertForXVector(t.Wav2Vec2BertConfig(**PLAIN, **HEAD))),
}


def made(folder: Path, name: str) -> tuple[SSLTeacher, object, Callable]:
    """The teacher, transformers' model, and its feature extractor."""
    torch.manual_seed(1)
    kind, make = MODELS[name]
    model = make(transformers).eval()
    if hasattr(model, "layer_weights"):
        torch.nn.init.normal_(model.layer_weights)
    model.save_pretrained(folder)
    if kind is W2VBert:
        extractor = transformers.SeamlessM4TFeatureExtractor()
    else:
        norm = getattr(model.config, "feat_extract_norm", "layer") == "layer"
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=norm)
    extractor.save_pretrained(folder)
    return kind(str(folder), None, CPU), model, extractor


@pytest.mark.parametrize("name", MODELS)
def test_every_level_is_transformers_own(tmp_path: Path, name: str) -> None:
    teacher, model, extractor = made(tmp_path, name)
    wave = 0.1 * torch.randn(9_000, generator=torch.Generator().manual_seed(0))
    outputs = teacher.extract(wave[None], list(teacher.targets))
    inputs = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
    if "input_features" not in inputs:
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    for i, hidden in enumerate(out.hidden_states):
        rows = outputs[f"frames.layer{i}"]
        assert rows.shape[1] == teacher.targets[f"frames.layer{i}"].num_frames(len(wave))
        assert np.allclose(rows, hidden[:, : rows.shape[1]], atol=2e-4)
    if "xvector" in name:
        assert np.allclose(outputs["embedding"], out.embeddings, atol=2e-4)
        assert np.allclose(outputs["segment.b"], out.logits, atol=2e-4)
        assert outputs["frames.tdnn3"].shape[1] == teacher.targets["frames.tdnn3"].num_frames(len(wave))
        rows = model.objective.weight.double() / model.objective.weight.double().norm(dim=0)
        vector = out.logits[0].double()
        assert np.allclose(outputs["logits"][0], 30 * (vector / vector.norm() @ rows).detach(), atol=2e-3)
        assert teacher.head is not None
        assert teacher.head.classes == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "data2vec"])
def test_views_of_different_length_in_one_batch_have_the_outputs_they_have_alone(tmp_path: Path, name: str) -> None:
    teacher, _, _ = made(tmp_path, name)
    assert teacher.takes_lengths
    lengths = torch.tensor([9_000, 5_555, 16_000])
    waves = torch.zeros(3, 16_000)
    for i, length in enumerate(lengths):
        waves[i, :length] = 0.1 * torch.randn(int(length), generator=torch.Generator().manual_seed(i)) + 0.01
    together = teacher.extract(waves, list(teacher.targets), lengths=lengths)
    for i, length in enumerate(lengths):
        alone = teacher.extract(waves[i : i + 1, :length], list(teacher.targets))
        for level, values in alone.items():
            padded = together[level][i, : values.shape[1]] if values.ndim == 3 else together[level][i]
            assert np.allclose(padded, values[0], atol=2e-5 * max(1.0, float(np.abs(values).max()))), level


def test_a_layer_can_be_pooled_in_the_place_of_the_speaker_head(tmp_path: Path) -> None:
    made(tmp_path, "wavlm-xvector")
    teacher = WavLM(str(tmp_path), 1, CPU)
    assert teacher.targets["embedding"].dim == 32
    assert "logits" not in teacher.targets


def test_weights_that_are_lacking_are_not_made_up(tmp_path: Path) -> None:
    made(tmp_path, "wavlm-xvector")
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(
        {n: v for n, v in weights.items() if "objective" not in n}, tmp_path / "model.safetensors"
    )
    assert "logits" not in WavLM(str(tmp_path), None, CPU).targets
    safetensors.torch.save_file({n: v for n, v in weights.items() if "tdnn.1" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"lacks 2 weights \(tdnn.1.kernel.bias"):
        WavLM(str(tmp_path), None, CPU)


def test_w2v_bert_takes_pairs_of_fbank_frames(tmp_path: Path) -> None:
    teacher, _, _ = made(tmp_path, "w2v-bert")
    for samples in (teacher.min_samples, 4_000, 4_160):
        rows = teacher.extract(torch.randn(1, samples), ["frames.layer0"])["frames.layer0"].shape[1]
        assert rows == FBANK.num_frames(samples) // 2 == teacher.targets["frames.layer0"].num_frames(samples)


def test_wrong_weights_are_named(tiny_wavlm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a wavlm model, not hubert"):
        HuBERT(str(tiny_wavlm), None, CPU)
    with pytest.raises(UsageError, match="neither a local model folder nor a reachable hub id"):
        WavLM(str(tmp_path), None, CPU)
    with pytest.raises(UsageError, match="layers 0 to 3"):
        WavLM(str(tiny_wavlm), 7, CPU)


def test_a_torchaudio_of_another_torch_is_named(tiny_wavlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports it where it is installed."""

    def fails(*_: object, **__: object) -> None:
        raise OSError("Could not load this library: /x/torchaudio/lib/_torchaudio.abi3.so")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fails)
    with pytest.raises(UsageError, match="pip uninstall torchaudio"):
        WavLM(str(tiny_wavlm), None, CPU)


def test_the_digest_follows_the_weights_not_the_folder(tiny_wavlm: Path, tmp_path: Path) -> None:
    model = transformers.WavLMModel.from_pretrained(tiny_wavlm)
    model.save_pretrained(tmp_path / "a")
    one = WavLM(str(tiny_wavlm), None, CPU).card().weights_sha256
    assert WavLM(str(tmp_path / "a"), None, CPU).card().weights_sha256 == one
    next(model.parameters()).data += 1
    model.save_pretrained(tmp_path / "b")
    assert WavLM(str(tmp_path / "b"), None, CPU).card().weights_sha256 != one


def test_settings_that_change_an_output_are_part_of_the_card(tiny_wavlm: Path, tmp_path: Path) -> None:
    """The same weights under another activation are another teacher; a dropout of training is not."""

    def described(**changed: Any) -> dict[str, Any]:
        folder = tmp_path / "-".join(changed)
        shutil.copytree(tiny_wavlm, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))
        return WavLM(str(folder), None, CPU).card().details

    one = WavLM(str(tiny_wavlm), None, CPU).card().details
    assert described(hidden_dropout=0.3, layerdrop=0.5, mask_time_prob=0.1) == one
    assert described(hidden_act="relu") != one
    assert described(layer_norm_eps=1e-3) != one


def test_receptive_field_of_the_usual_encoder() -> None:
    assert receptive_field([10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]) == (400, 320)


def test_the_licence_is_that_of_the_models_card(tiny_wavlm: Path, tmp_path: Path) -> None:
    assert WavLM(str(tiny_wavlm), None, CPU).card().licence == "see the model's own card"
    assert WavLM(str(tiny_wavlm), None, CPU).card().library == f"transformers {transformers.__version__}"
    shutil.copytree(tiny_wavlm, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-sa-3.0\n---\n# A model\n")
    assert WavLM(str(tmp_path / "m"), None, CPU).card().licence == "cc-by-sa-3.0"
    aliases = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    rows = "- [x]\n" * 200_000  # which the YAML reader would take half a minute for
    for head in (f"a0: &a0 [x]\n{aliases}license: *a9\n", f"license: mit\nrows:\n{rows}"):
        (tmp_path / "m" / "README.md").write_text(f"---\n{head}---\n")
        assert WavLM(str(tmp_path / "m"), None, CPU).card().licence == "see the model's own card"


def test_files_that_a_folder_cannot_have_are_refused(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd("extract", "teacher=none", manifest, "wave=true", "cache=plain").ok()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "README.md"):
        shutil.copytree(tiny_wavlm, name)
        (Path(name) / name).unlink(missing_ok=True)
        os.mkfifo(Path(name) / name)
        for command in (
            ("extract", "teacher=wavlm", f"teacher.weights={name}", manifest, "cache=x"),
            ("train", "--loss", "aam", "student=ssl", f"student.init={name}", "cache=plain", "batch_size=4"),
        ):
            done = spkd(*command)
            assert (done.code, f"{name}: not a regular file" in done.err) == (1, True), done.err
    shutil.copytree(tiny_wavlm, "code")
    settings = json.loads(Path("code/config.json").read_text())
    Path("code/config.json").write_text(json.dumps(settings | {"attn_implementation": "somebody/code"}))
    done = spkd("extract", "teacher=wavlm", "teacher.weights=code", manifest, "cache=x")
    assert (done.code, "names code of the hub" in done.err) == (2, True), done.err


EVIL = 'open("ran.txt", "w").write("x")\nclass Model: ...\nclass Config: ...\n'


@pytest.mark.parametrize("where", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("kind", ["wavlm", "mine"])
def test_code_beside_the_weights_is_never_run(
    spkd: Callable, corpus: Path, tiny_wavlm: Path, where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the teacher and for a student that begins from the folder; a `y` waits on standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    shutil.copytree(tiny_wavlm, "weights")
    Path("weights/evil.py").write_text(EVIL)
    described = json.loads(Path("weights/config.json").read_text()) if where == "config.json" else {}
    kinds = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoFeatureExtractor": "evil.Model"}
    described |= {"auto_map": kinds} | ({"model_type": kind} if where == "config.json" else {})
    Path("weights", where).write_text(json.dumps(described))
    done = spkd("extract", "teacher=wavlm", "teacher.weights=weights", f"manifest={corpus / 'manifest.csv'}")
    assert done.code in (0, 2)
    assert "y/N" not in done.out
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "wave=true", "cache=plain")
    more = ["student=ssl", "student.init=weights", "cache=plain", "steps=1", "batch_size=2", "crop=0.5"]
    done = spkd("train", "--loss", "aam", *more)
    assert done.code in (0, 1, 2)
    assert "Traceback" not in done.err
    assert "unexpected failure" not in done.err
    assert not list(Path().rglob("ran.txt"))


def test_pickled_weights_are_refused_and_not_run(
    spkd: Callable, corpus: Path, tiny_wavlm: Path, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.copytree(tiny_wavlm, "weights")
    Path("weights/model.safetensors").unlink()
    Path("weights/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    audio = f"manifest={corpus / 'manifest.csv'}"
    done = spkd("extract", "teacher=wavlm", "teacher.weights=weights", audio)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    spkd("extract", "teacher=none", audio, "wave=true", "cache=plain")
    done = spkd("train", "--loss", "aam", "student=ssl", "student.init=weights", "cache=plain", "steps=1")
    assert done.code in (1, 2)
    assert "unexpected failure" not in done.err
    assert not (tmp_path / "ran").exists()


def test_a_readme_in_another_encoding_does_no_harm(tiny_wavlm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_wavlm, tmp_path / "w")
    (tmp_path / "w" / "README.md").write_bytes("---\nlicense: mit\n---\nfür\n".encode("latin-1"))
    assert WavLM(str(tmp_path / "w"), None, CPU).card().licence


def test_a_view_too_long_for_attention_is_rejected_with_the_remedy(spkd: Callable, tiny_wavlm: Path) -> None:
    """Attention over twenty minutes needs tens of gigabytes."""
    soundfile.write("long.wav", 0.1 * np.random.RandomState(0).randn(16_000 * 1200), 16_000)
    soundfile.write("short.wav", 0.1 * np.random.RandomState(0).randn(16_000), 16_000)
    Path("m.csv").write_text("id,path,duration\nl,long.wav,1200\ns,short.wav,1\n")
    done = spkd("extract", "teacher=wavlm", f"teacher.weights={tiny_wavlm}", "manifest=m.csv", "cache=c")
    assert (done.code, "1 rejected" in done.out) == (0, True), done.err
    assert "view=windows:" in done.err


def test_a_student_begins_only_from_the_usual_convolutions(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    shutil.copytree(tiny_wavlm, "w")
    config = json.loads(Path("w/config.json").read_text())
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "wave=true", "cache=plain")
    for strides in ([5, 2, 2, 2, 2, 10**18, 2], [5, 2, 2, 2, 2, 2, 1], [5, 2, 2, 2, 2, 2]):
        Path("w/config.json").write_text(json.dumps(config | {"conv_stride": strides}))
        done = spkd("train", "--loss", "aam", "student=ssl", "student.init=w", "cache=plain", "steps=1", "batch_size=2")
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err


@pytest.mark.parametrize("family", ["WavLM", "Wav2Vec2", "Hubert"])
def test_a_student_honours_or_refuses_every_setting_of_the_model_it_begins_from(tmp_path: Path, family: str) -> None:
    kind, make = getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}Model")
    waves = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    normalised = (waves - waves.mean()) / (waves.var(unbiased=False) + 1e-5).sqrt()

    def hidden(**changed: Any) -> tuple[Any, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = make(kind(**TINY_SSL | changed)).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
        with torch.no_grad():
            return model, list(model(normalised, output_hidden_states=True, return_dict=True).hidden_states)

    base, acting, refused = hidden()[1], [], []
    for key, value in kind(**TINY_SSL).to_dict().items():
        changes = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.1, type(None): lambda _: 8}
        words = {"gelu": "relu", "group": "layer"}
        changed = words.get(value) if isinstance(value, str) else changes.get(type(value), lambda _: None)(value)
        if changed is None:
            continue
        try:
            model, expected = hidden(**{key: changed})
        except Exception:
            continue  # no such model
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(base, expected, strict=False)):
            continue
        acting.append(key)
        model.save_pretrained(tmp_path / key)
        try:
            student = from_teacher(str(tmp_path / key), 8, 2, 0).eval()
        except UsageError:
            refused.append(key)
            continue
        with torch.no_grad():
            given = student.hidden(waves)
        # The student has the layer-norm behind the last layer that transformers leaves out of its hidden states.
        compared = 2 if model.config.do_stable_layer_norm or len(expected) < 3 else 3
        for ours, theirs in zip(given[:compared], expected[:compared], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-3), key
    assert {"hidden_act", "feat_extract_activation", "layer_norm_eps"} <= set(refused)
    assert {"do_stable_layer_norm", "feat_extract_norm", "intermediate_size"} <= set(acting) - set(refused)


def test_models_for_audio_at_other_rates_are_refused(tiny_wavlm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_wavlm, tmp_path / "model")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    for load in (lambda: WavLM(str(folder), None, CPU), lambda: from_teacher(str(folder), 8, 2, 0)):
        with pytest.raises(UsageError, match=r"sampling_rate of its preprocessor_config.json is 8000; spkd has 16000"):
            load()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_computed_in_float32(
    tiny_wavlm: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    transformers.WavLMModel.from_pretrained(tiny_wavlm).to(dtype).save_pretrained(tmp_path)
    waves = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    found = WavLM(str(tmp_path), None, CPU).extract(waves, ["frames.layer3"])["frames.layer3"]
    model = transformers.WavLMModel.from_pretrained(tmp_path).float().eval()
    normalised = (waves - waves.mean()) / (waves.var(unbiased=False) + 1e-7).sqrt()
    with torch.no_grad():
        assert np.allclose(found, model(normalised, output_hidden_states=True).hidden_states[3], atol=1e-4)


@pytest.mark.parametrize("change", [{"max_bucket_distance": -1}, {"num_buckets": 1}, {"conv_stride": [10**9] * 7}])
def test_a_config_that_cannot_be_run_is_a_line(
    spkd: Callable, corpus: Path, tiny_wavlm: Path, change: dict[str, object]
) -> None:
    shutil.copytree(tiny_wavlm, "w")
    config = json.loads(Path("w/config.json").read_text())
    Path("w/config.json").write_text(json.dumps(config | change))
    audio = f"manifest={corpus / 'manifest.csv'}"
    done = spkd("extract", "teacher=wavlm", "teacher.weights=w", audio, "cache=c")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    spkd("extract", "teacher=none", audio, "wave=true", "cache=plain")
    done = spkd("train", "--loss", "aam", "student=ssl", "student.init=w", "cache=plain", "steps=1", "batch_size=2")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
