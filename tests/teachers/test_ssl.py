from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from spkd.errors import UsageError
from spkd.teachers.ssl import HuBERT, Wav2Vec2, WavLM, receptive_field

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


def test_wrong_weights_are_named(tiny_wavlm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a wavlm model, not teacher=hubert"):
        HuBERT(str(tiny_wavlm), None, CPU)
    with pytest.raises(UsageError, match="neither a local model folder nor a reachable hub id"):
        WavLM(str(tmp_path), None, CPU)
    with pytest.raises(UsageError, match="layers 0 to 3"):
        WavLM(str(tiny_wavlm), 7, CPU)


def test_the_digest_follows_the_weights_not_the_folder(tiny_wavlm: Path, tmp_path: Path) -> None:
    model = transformers.WavLMModel.from_pretrained(tiny_wavlm)
    model.save_pretrained(tmp_path / "a")
    one = WavLM(str(tiny_wavlm), None, CPU).card().weights_sha256
    assert WavLM(str(tmp_path / "a"), None, CPU).card().weights_sha256 == one
    next(model.parameters()).data += 1
    model.save_pretrained(tmp_path / "b")
    assert WavLM(str(tmp_path / "b"), None, CPU).card().weights_sha256 != one


def test_receptive_field_of_the_usual_encoder() -> None:
    assert receptive_field([10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]) == (400, 320)


def test_the_licence_is_that_of_the_models_card(tiny_wavlm: Path, tmp_path: Path) -> None:
    assert WavLM(str(tiny_wavlm), None, CPU).card().licence == "see the model's own card"
    shutil.copytree(tiny_wavlm, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-sa-3.0\n---\n# A model\n")
    assert WavLM(str(tmp_path / "m"), None, CPU).card().licence == "cc-by-sa-3.0"


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
