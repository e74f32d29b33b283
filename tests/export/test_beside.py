"""The files beside an exported model, used as somebody does who has neither spkd nor the student."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import spkd as package
from spkd.outputs.features import FBANKS
from spkd.students import Checkpoint, build, load_student, save_student
from tests.conftest import CommandLine
from tests.export.test_run import student  # noqa: F401  a fixture

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def recording(path: str, samples: int, seed: int) -> str:
    """A WAV file of coloured noise, written by the standard library."""
    noise = np.convolve(np.random.default_rng(seed).standard_normal(samples), [1, 0.3 * seed, -0.2], "same")
    return write_wav(path, (3000 * noise).astype("<i2").tobytes())


def write_wav(path: str, data: bytes, rate: int = 16_000, channels: int = 1) -> str:
    with wave.open(path, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data)
    return path


def untrained(kit: str) -> None:
    torch.manual_seed(0)
    network = build("tiny", channels=8, embedding=4).eval()
    network.take(FBANKS[kit])
    save_student("s", Checkpoint(network))


def run_example(model: str, *given: str) -> subprocess.CompletedProcess:
    """The example beside a model, in a process without the folders of this one."""
    command = [sys.executable, "-I", f"{model}.example.py", *given]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def printed(model: str, *given: str) -> tuple[float, float, str]:
    """Cosine, ratio and decision that the example prints."""
    done = run_example(model, *given)
    assert done.returncode == 0, done.stderr
    cosine, ratio, decision = done.stdout.splitlines()
    return float(cosine.removeprefix("cosine ")), float(ratio.removeprefix("ratio ")), decision


RUNTIMES = {  # format and settings -> file, package, whether the process takes seconds
    "onnx": ("model.onnx", "onnxruntime", False),
    "onnx waveform=true": ("model.wave.onnx", "onnxruntime", True),
    "onnx onnx.lengths=true": ("model.lengths.onnx", "onnxruntime", True),
    "ort": ("model.ort", "onnxruntime", False),
    "pt2": ("model.pt2", "torch", True),
    "pte": ("model.pte", "executorch", True),
    "pte waveform=true pte.seconds=2": ("model.wave.pte", "executorch", True),
    "litert litert.seconds=2": ("model.tflite", "ai_edge_litert", True),
}


@pytest.mark.parametrize(
    "given", [pytest.param(given, marks=[pytest.mark.slow] * is_slow) for given, (*_, is_slow) in RUNTIMES.items()]
)
def test_the_example_gives_what_spkd_gives(spkd: CommandLine, student: Path, given: str) -> None:  # noqa: F811
    file, runtime, _ = RUNTIMES[given]
    pytest.importorskip(runtime)
    if runtime == "ai_edge_litert":
        pytest.importorskip("litert_torch", exc_type=ImportError)
    spkd("export", "student", *f"to={given}".split(), "calibration=student/calibration.json").ok()
    # Of two seconds, so that graphs of one length take them as they are.
    one, other = recording("a.wav", 32_000, 1), recording("b.wav", 32_000, 5)
    code = ast.parse(Path(f"student/{file}.example.py").read_text())
    imported = {alias.name for node in ast.walk(code) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {
        node.module.split(".")[0] for node in ast.walk(code) if isinstance(node, ast.ImportFrom) and node.module
    }
    outside = imported - set(sys.stdlib_module_names) - {"numpy", runtime}
    assert outside <= ({"torch"} if runtime == "executorch" else set())  # which executorch needs by itself
    model = package.load("student")
    for second in (other, one):
        cosine, ratio, decision = printed(f"student/{file}", one, second)
        expected = model.verify(one, second)
        assert cosine == pytest.approx(expected.score, abs=2e-5)
        assert ratio == pytest.approx(expected.ratio, abs=1e-2)
        # The example takes what it is given as speech, while spkd decides nothing on noise.
        assert decision == ("same speaker" if expected.ratio >= expected.threshold else "different speakers")


@pytest.mark.parametrize("kit", ["kaldi", "sherpa"])
def test_its_features_are_those_of_kaldi_native_fbank(spkd: CommandLine, kit: str) -> None:
    knf = pytest.importorskip("kaldi_native_fbank")
    untrained(kit)
    spkd("export", "s").ok()
    scope = parts_of("s/model.onnx")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    if kit == "sherpa":
        options.frame_opts.snip_edges, options.mel_opts.low_freq, options.mel_opts.high_freq = False, 20, -400
    for count in (400, 16_000, 16_079, 16_080, 23_457):
        samples = (0.1 * np.random.default_rng(count).standard_normal(count)).astype(np.float32)
        theirs = knf.OnlineFbank(options)
        theirs.accept_waveform(16_000, (32768 * samples).tolist())
        theirs.input_finished()
        expected = np.stack([theirs.get_frame(i) for i in range(theirs.num_frames_ready)])
        found = scope["features"](samples)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 5e-3


@pytest.mark.parametrize("kit", ["wespeaker", "3d-speaker"])
def test_its_features_are_those_of_torchaudio(spkd: CommandLine, kit: str) -> None:
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    untrained(kit)
    spkd("export", "s").ok()
    scope = parts_of("s/model.onnx")
    samples = (0.1 * np.random.default_rng(0).standard_normal(20_001)).astype(np.float32)
    given = torch.from_numpy(samples)[None] * (1 if kit == "3d-speaker" else 32768)
    window = "povey" if kit == "3d-speaker" else "hamming"
    expected = kaldi.fbank(given, num_mel_bins=80, window_type=window, dither=0.0).numpy()
    found = scope["features"](samples)
    assert np.abs(found - expected).max() < 5e-3


def parts_of(model: str) -> dict:
    """Functions of an example, with what it loads."""
    code = ast.parse(Path(f"{model}.example.py").read_text())
    kept = [node for node in code.body if isinstance(node, ast.FunctionDef)]
    scope = {"np": np, "ABOUT": json.loads(Path(f"{model}.json").read_text())}
    exec(compile(ast.Module(kept, []), model, "exec"), scope)
    return scope


def test_what_describes_a_model_has_thresholds_and_digest(spkd: CommandLine, student: Path) -> None:  # noqa: F811
    spkd("export", "student", "url=https://lab.example/m", "licence=apache-2.0").ok()
    about = json.loads(Path("student/model.onnx.json").read_text())
    kept = json.loads((student / "calibration.json").read_text())
    assert about["calibration"]["thresholds"] == kept["thresholds"]
    assert (about["calibration"]["weight"], about["calibration"]["offset"]) == (kept["weights"][0], kept["offset"])
    assert about["sha256"] == {"model.onnx": hashlib.sha256(Path("student/model.onnx").read_bytes()).hexdigest()}
    assert about["student"] == hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()
    assert (about["url"], about["licence"]) == ("https://lab.example/m", "apache-2.0")
    assert (about["input"]["name"], about["output"]["name"]) == ("feats", "embs")
    readme = Path("student/model.onnx.README.md").read_text()
    assert "Unlike `spkd verify`, it looks neither for speech nor for clipping" in readme
    assert "pip install numpy onnxruntime\n    python model.onnx.example.py a.wav b.wav" in readme
    assert "Licence: apache-2.0. Source: https://lab.example/m." in readme


def test_two_exports_of_a_student_keep_their_files(spkd: CommandLine, student: Path) -> None:  # noqa: F811
    spkd("export", "student", "to=onnx").ok()
    before = {path: path.read_bytes() for path in student.iterdir()}
    spkd("export", "student", "to=ort").ok()
    assert {path: path.read_bytes() for path in before} == before
    spkd("export", "student", "to=ort").ok()  # its own files are replaced
    assert load_student(student).network is not None


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize("name", ["model.onnx.json", "model.onnx.README.md", "model.onnx.example.py"])
def test_a_file_of_others_beside_the_model_is_not_replaced(spkd: CommandLine, name: str) -> None:
    path = Path("student", name)
    path.write_text("mine")
    done = spkd("export", "student")
    assert (done.code, f"{path}: would be replaced (spkd did not write it)" in done.err) == (2, True)
    assert path.read_text() == "mine"
    assert not Path("student/model.onnx").exists()


def test_a_model_that_is_not_the_one_described_is_not_run(spkd: CommandLine, student: Path) -> None:  # noqa: F811
    spkd("export", "student", "to=ort").ok()
    data = bytearray(Path("student/model.ort").read_bytes())
    data[len(data) // 2] ^= 1
    Path("student/model.ort").write_bytes(bytes(data))
    done = run_example("student/model.ort", recording("a.wav", 16_000, 1), "a.wav")
    assert (done.returncode, done.stderr) == (1, "model.ort: not the file that model.ort.json describes\n")


@pytest.fixture
def exported(spkd: CommandLine, student: Path) -> str:  # noqa: F811
    """A model in onnxruntime's format, which is fast to export and to load."""
    spkd.once("student/model.ort", "export", "student", "to=ort")
    if not Path("student/model.ort.json").exists():
        spkd("export", "student", "to=ort").ok()
    return "student/model.ort"


SILENCE = "0.00 s are louder than -55 dB, fewer than 0.5 s"


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(48_000), SILENCE),
        (np.zeros(0), SILENCE),
        (8000 * np.sin(np.arange(1_600)), "0.10 s are louder than -55 dB, fewer than 0.5 s"),
        (16_000 + 300 * np.sin(np.arange(32_000)), "mostly a constant offset"),
    ],
)
def test_of_what_holds_no_sound_the_example_makes_no_decision(exported: str, samples: np.ndarray, reason: str) -> None:
    write_wav("poor.wav", samples.astype("<i2").tobytes())
    recording("a.wav", 32_000, 1)
    for given in (("poor.wav", "poor.wav"), ("a.wav", "poor.wav"), ("poor.wav", "a.wav")):
        done = run_example(exported, *given)
        assert done.returncode == 1
        assert done.stdout.startswith("cosine ")
        assert len(done.stdout.splitlines()) == 1
        reasons = "; ".join(f"{path}: {reason}" for path in given if path == "poor.wav")
        assert done.stderr == f"no decision: {reasons}\n"


def test_what_the_example_cannot_read_is_a_line(exported: str) -> None:
    recording("a.wav", 32_000, 1)
    soundfile.write("float.wav", np.zeros(8_000), 16_000, subtype="FLOAT")
    write_wav("stereo.wav", bytes(64_000), 8_000, 2)
    Path("empty.wav").touch()
    Path("text.wav").write_text("hello, this is no sound")
    convert = "convert it: ffmpeg -i IN -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav"
    expected = {
        "missing.wav": "No such file or directory",
        "empty.wav": f"no WAV file of integers (cut off); {convert}",
        "text.wav": f"no WAV file of integers (file does not start with RIFF id); {convert}",
        "float.wav": f"no WAV file of integers (unknown format: 3); {convert}",
        "stereo.wav": f"of 8000 Hz, 16 bits and 2 channels; {convert}",
    }
    for name, reason in expected.items():
        done = run_example(exported, "a.wav", name)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{name}: {reason}\n")


def test_a_model_may_be_renamed_with_the_files_beside_it(exported: str) -> None:
    Path("app").mkdir()
    for suffix in ("", ".json", ".example.py"):
        shutil.copy(f"{exported}{suffix}", f"app/voice.ort{suffix}")
    one, other = recording("a.wav", 32_000, 1), recording("b.wav", 32_000, 5)
    assert printed("app/voice.ort", one, other) == printed(exported, one, other)


def test_a_recording_that_is_cut_gets_no_decision(exported: str) -> None:
    """Graphs of phones take recordings up to a length, and the calibration is of whole ones."""
    path = Path(f"{exported}.json")
    about = json.loads(path.read_text())
    about["input"]["samples"] = [2_560, 40_000]
    path.write_text(json.dumps(about))
    short, long = recording("short.wav", 40_000, 1), recording("long.wav", 48_000, 5)
    assert printed(exported, short, short)[2] == "same speaker"
    done = run_example(exported, short, long)
    assert (done.returncode, done.stderr) == (1, "no decision: long.wav: longer than 2.5 s, to which it was cut\n")


def test_a_missing_runtime_is_a_line(exported: str) -> None:
    path = Path(f"{exported}.example.py")
    path.write_text(path.read_text().replace("import onnxruntime", "import onnxruntime_that_is_not_there"))
    done = run_example(exported, recording("a.wav", 32_000, 1), "a.wav")
    reason = "No module named 'onnxruntime_that_is_not_there': pip install numpy onnxruntime"
    assert (done.returncode, done.stderr) == (1, f"{reason}\n")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pte waveform=true pte.seconds=2", "litert litert.seconds=2"])
def test_a_graph_of_one_length_has_no_calibration_of_whole_recordings(
    spkd: CommandLine,
    student: Path,  # noqa: F811
    to: str,
) -> None:
    file, runtime, _ = RUNTIMES[to]
    pytest.importorskip(runtime)
    if runtime == "ai_edge_litert":
        pytest.importorskip("litert_torch", exc_type=ImportError)
    done = spkd("export", "student", *f"to={to}".split()).ok()
    note = (
        "note: student/calibration.json does not go with the model: it is of whole recordings, and the model takes 2 s"
    )
    assert note in done.out
    about = json.loads(Path(f"student/{file}.json").read_text())
    assert (about["calibration"], about["calibration_of"]) == (None, "other")
    done = run_example(f"student/{file}", recording("a.wav", 32_000, 1), "a.wav")
    assert done.returncode == 1
    assert "on recordings repeated or cut to 2 s, and `spkd export` with calibration=OTHER.json" in done.stderr
    spkd("export", "student", *f"to={to}".split(), "calibration=student/calibration.json").ok()
    assert printed(f"student/{file}", "a.wav", "a.wav")[2] == "same speaker"


def test_without_a_calibration_the_example_makes_no_decision(spkd: CommandLine) -> None:
    untrained("kaldi")
    spkd("export", "s", "to=ort").ok()
    done = run_example("s/model.ort", recording("a.wav", 16_000, 1), "a.wav")
    assert done.stdout == "cosine 1.000000\n"
    way = "run `spkd calibrate TRIALS model=STUDENT manifest=FILE`, then `spkd export` again"
    assert (done.returncode, done.stderr) == (1, f"no decision: the model has no calibration; {way}\n")
    assert f"Without a calibration there is no decision: {way}." in Path("s/model.ort.README.md").read_text()


def test_a_calibration_that_is_put_into_the_file_is_beside_it_too(
    spkd: CommandLine,
    student: Path,  # noqa: F811
    corpus: Path,
) -> None:
    (student / "calibration.json").unlink()
    spkd("export", "student").ok()
    assert json.loads(Path("student/model.onnx.json").read_text())["calibration"] is None
    given = [corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true"]
    spkd("calibrate", *given, "model=onnx", "model.weights=student/model.onnx").ok()
    one, other = recording("a.wav", 20_000, 1), recording("b.wav", 20_000, 5)
    _, ratio, _ = printed("student/model.onnx", one, other)
    assert ratio == pytest.approx(package.load("student/model.onnx").verify(one, other).ratio, abs=1e-2)


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize(
    ("to", "module", "extra"), [("pte", "executorch", "executorch"), ("coreml", "coremltools", "coreml")]
)
def test_a_missing_converter_is_a_line_with_its_extra(
    spkd: Callable, monkeypatch: pytest.MonkeyPatch, to: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    done = spkd("export", "student", f"to={to}")
    assert (done.code, done.err) == (2, f"error: to={to} needs {module}: pip install 'spkd[{extra}]'\n")
    assert not list(Path("student").glob("model.*.json"))


@pytest.mark.slow
def test_core_ml_gets_what_the_student_has(spkd: Callable, student: Path) -> None:  # noqa: F811
    coremltools = pytest.importorskip("coremltools")
    done = spkd("export", "student", "to=coreml", "coreml.seconds=5").ok()
    assert sys.platform == "darwin" or "is not run here" in done.out
    path = student / "model.mlpackage"
    described = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description
    (given,), (made,) = described.input, described.output
    limits = given.type.multiArrayType.shapeRange.sizeRanges
    assert (given.name, made.name) == ("feats", "embs")
    assert [(r.lowerBound, r.upperBound) for r in limits] == [(1, 1), (16, 500), (80, 80)]
    assert list(made.type.multiArrayType.shape) == [1, 8]
    # Every matrix of the student is among the weights, bit by bit.
    stored = next(path.rglob("weight.bin")).read_bytes()
    matrices = [values for values in load_student(student).network.parameters() if values.numel() >= 1000]
    assert matrices
    assert all(values.detach().numpy().tobytes() in stored for values in matrices)
    about = json.loads((student / "model.mlpackage.json").read_text())
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((student / name).read_bytes()).hexdigest() == digest
    spkd("export", "student", "to=coreml").ok()  # its own package is replaced
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"mine")
    assert spkd("export", "student", "to=coreml").code == 2
