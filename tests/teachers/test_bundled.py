"""The student that comes with spkd: its files, and every command that takes it by its name."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import spkd as interface
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.teachers.bundled import CARD, FOLDER
from tests.conftest import SHARED
from tests.eval.students import save_untrained

LISTS = SHARED / "data" / "librispeech-mini"
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "bundled.json"


def test_what_ships_is_small_and_names_no_place_of_its_making() -> None:
    files = sorted(FOLDER.iterdir())
    assert [path.name for path in files] == ["calibration.json", CARD, "model.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    described = json.loads((FOLDER / "model.json").read_text())
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == described["weights_sha256"]
    assert json.loads(RESULT.read_text())["weights_sha256"] == described["weights_sha256"]
    tensors = load_file(FOLDER / "model.safetensors")
    assert {values.dtype.name for name, values in tensors.items() if "num_batches" not in name} == {"float16"}
    assert all(np.isfinite(values).all() for values in tensors.values())
    for path in files[:3]:
        text = re.sub(r'"digests": "[^"]*"', "", path.read_text())
        assert re.findall(r"""["'\s=]/\w+""", text) == [], path


@pytest.mark.parametrize("name", [(), ("bundled",)])
def test_python_loads_it_with_its_calibration_and_card(name: tuple[str, ...], corpus: Path) -> None:
    model = interface.load(*name)
    assert repr(model) == "SpeakerModel('bundled', dim=256, calibrated)"
    assert model.card.startswith("# The model that comes with spkd\n\nA demonstration: ")
    one, other = (
        utterance.path for utterance in Manifest.load(corpus / "manifest.csv").utterances[3:5]
    )  # no speech is found in the first voice
    a, b = model.embed([one, other]).astype(np.float64)
    assert model.verify(one, other).score == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-5)
    assert model.verify(one, one).same
    # It is the student of its folder.
    assert interface.load(FOLDER).score(one, other) == model.score(one, other)
    with pytest.raises(UsageError, match="weights='w': bundled has weights of its own"):
        interface.load("bundled", weights="w")
    with pytest.raises(UsageError, match="bundled: comes with spkd, and is not yours to push"):
        model.push_to_hub("lab/student")


def test_voices_take_it_where_there_is_no_student(spkd: Callable, corpus: Path) -> None:
    files = [str(utterance.path) for utterance in Manifest.load(corpus / "manifest.csv")][3:]
    line = "model: bundled, a small demonstration that comes with spkd (model=FOLDER: a student of yours)\n"
    assert spkd("enrol", "ann", files[0], files[1]).ok().out.endswith(f"\n{line}")
    assert spkd("verify", "ann", files[0]).ok().out.endswith(f"\n  {line}")
    assert spkd("identify", files[0]).ok().out.endswith(f"\n{line}")
    # A student here comes first, and the voices are of another model then.
    save_untrained(Path("student"), corpus)
    assert (
        spkd("verify", files[0], files[1])
        .ok()
        .out.startswith(f"{files[0]}, {files[1]}: no decision, as student has no calibration")
    )
    done = spkd("verify", "ann", files[0])
    assert (done.code, "a voiceprint of another model than student" in done.err) == (2, True)
    assert spkd("enrol", "bob", files[0], "voices=bob.json").ok().out.endswith("\nmodel: student\n")
    assert spkd("verify", "ann", files[0], "model=bundled").ok().out.endswith(f"\n  {line}")
    # What is no finished student is no reason to take another model.
    shutil.rmtree("student")
    Path("student").mkdir()
    done = spkd("verify", files[0], files[1])
    assert (done.code, "student: no spkd checkpoint" in done.err) == (2, True)


def test_every_command_takes_its_name(spkd: Callable, corpus: Path) -> None:
    given = f"manifest={corpus / 'manifest.csv'}"
    shutil.copytree(FOLDER, "copy")
    # A folder of that name is another model, which is written ./bundled.
    save_untrained(Path("bundled"), corpus)
    for name in ("bundled", "copy", "./bundled"):
        spkd("embed", corpus / "manifest.csv", f"model={name}", f"out={Path(name).name}-{len(name)}.npy").ok()
    own, copied, other = (np.load(f"{name}.npy") for name in ("bundled-7", "copy-4", "bundled-9"))
    assert (own == copied).all()
    assert own.shape != other.shape
    spkd("eval", corpus / "trials.txt", given, "model=bundled", "bootstrap=0", "out=e").ok()
    assert json.loads(Path("e/report.json").read_text())["models"][0]["licence"] == "apache-2.0"
    spkd("extract", "teacher=bundled", given, "cache=c").ok()
    done = spkd("cache", "verify", "c", "--live", "5", "teacher=bundled", given).ok()
    assert "live: embedding (float16): cosine at least 1.000000" in done.out
    # What would write into the package is refused.
    done = spkd("calibrate", corpus / "trials.txt", given, "model=bundled", "force=true")
    assert (done.code, "name the file to write (out=FILE)" in done.err) == (2, True)
    done = spkd("export", "bundled")
    assert (done.code, "bundled: is no folder of yours; name the file to write (out=FILE)" in done.err) == (2, True)
    done = spkd("eval", corpus / "trials.txt", given, "model=bundled", "model.weights=w")
    assert (done.code, "model=bundled has weights of its own" in done.err) == (2, True)
    spkd("calibrate", corpus / "trials.txt", given, "model=bundled", "force=true", "out=c.json").ok()


@pytest.mark.slow
def test_it_is_exported_with_its_calibration(spkd: Callable, corpus: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    spkd("export", "bundled", "waveform=true", "out=m.onnx").ok()
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["spkd_calibration"])["features"] == ["score"]
    assert [path.name for path in FOLDER.iterdir() if path.suffix == ".onnx"] == []


def test_a_flipped_bit_is_found(spkd: Callable) -> None:
    shutil.copytree(FOLDER, "copy")
    for name in ("model.safetensors", "model.json", "calibration.json"):
        data = bytearray((FOLDER / name).read_bytes())
        data[-200] ^= 1
        Path("copy", name).write_bytes(data)
        with pytest.raises(SpkdError, match="damaged"):
            interface.load("copy")
        shutil.copy(FOLDER / name, f"copy/{name}")
    assert interface.load("copy").digest == interface.load().digest


@pytest.mark.slow
@pytest.mark.skipif(not LISTS.is_dir(), reason="needs the corpora")
def test_its_error_rate_is_the_one_that_is_written() -> None:
    """EER by brute force: the threshold at which misses and false alarms are nearest."""
    model = interface.load()
    with open(LISTS / "test-short.csv", newline="") as file:
        paths = {row["utt"]: str(LISTS / row["path"]) for row in csv.DictReader(file)}
    vectors = dict(zip(paths, model.embed(list(paths.values())).astype(np.float64), strict=True))
    lines = [line.split() for line in (LISTS / "trials-test-short.txt").read_text().splitlines()]
    cosines = np.array([
        vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]) for _, a, b in lines
    ])  # fmt: skip
    labels = np.array([line[0] == "1" for line in lines])
    rates = [
        ((cosines[labels] < t).mean(), (cosines[~labels] >= t).mean()) for t in np.sort(cosines[labels])
    ]  # fmt: skip
    miss, false_alarm = min(rates, key=lambda pair: abs(pair[0] - pair[1]))
    written = json.loads(RESULT.read_text())["lists"]["test_short"]["eer_percent"]
    assert 50 * (miss + false_alarm) == pytest.approx(written, abs=0.3)
    assert f"| {written:.2f} |" in model.card
