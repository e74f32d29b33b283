"""`spkd export` through the real command line, and the files in the runtimes that they are for."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import spkd as package
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.people import Names, People
from spkd.errors import SpkdError, UsageError
from spkd.export.int8 import divided
from spkd.outputs.features import FBANKS, input_features
from spkd.registry import STUDENTS
from spkd.students import Checkpoint, Training, build, load_student, save_student
from spkd.teachers.onnx_file import digest_of, files_of, with_calibration
from tests.conftest import CommandLine
from tests.eval.students import save_untrained

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
SMALL = {"resnet34": 8, "campplus": 16, "ssl": 16, "ecapa": 16}


def session(path: str) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def features(batch: int, frames: int, width: int) -> torch.Tensor:
    return torch.randn(batch, frames, width, generator=torch.Generator().manual_seed(frames))


QUICK = ("tiny",)  # seconds less to export than the others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in STUDENTS.ours]
)
def test_every_student_in_onnx_with_padded_batches(spkd: Callable, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("spkd.networks.campplus.DENSE", ((2, 1), (2, 2), (1, 2)))  # 52 layers take a minute
    torch.manual_seed(0)
    network = build(name, channels=SMALL.get(name, 16), embedding=8).eval()
    save_student("s", Checkpoint(network))
    spkd("export", "s", "--to", "onnx", "onnx.lengths=true", "out=m.onnx").ok()
    graph, waveform = session("m.onnx"), name == "ssl"
    assert [i.name for i in graph.get_inputs()] == ["wave" if waveform else "feats", "lengths"]
    assert graph.get_inputs()[0].shape[:2] == ["batch", "samples" if waveform else "frames"]
    unit = 160 if waveform else 1
    for lengths in ([300], [250, 120, 101], [64]):
        x = features(len(lengths), max(lengths), network.input_kind.dim)
        given = x.flatten(1) if waveform else x
        feed = {graph.get_inputs()[0].name: given.numpy(), "lengths": unit * np.array(lengths)}
        with torch.no_grad():
            expected = network(x, lengths=torch.tensor(lengths))["embedding"].numpy()
        assert np.abs(graph.run(None, feed)[0] - expected).max() < 1e-4


@pytest.fixture
def student(tmp_path: Path, corpus: Path, spkd: CommandLine) -> Path:
    """A student of sherpa's features with a calibration."""
    folder = save_untrained(tmp_path / "student", corpus)
    network = load_student(folder).network
    network.take(FBANKS["sherpa"])
    save_student(folder, Checkpoint(network))
    given = [corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true"]
    spkd.once("student/calibration.json", "calibrate", *given)
    return folder


@pytest.mark.parametrize(
    ("kit", "settings", "file"),
    [
        ("kaldi", [], "model.onnx"),
        pytest.param("sherpa", ["waveform=true"], "model.wave.onnx", marks=pytest.mark.slow),
        pytest.param("sherpa", ["onnx.lengths=true"], "model.lengths.onnx", marks=pytest.mark.slow),
    ],
)
def test_only_what_sherpa_onnx_computes_rightly_is_marked_as_its_own(
    spkd: Callable, kit: str, settings: list[str], file: str
) -> None:
    """It loads no model without `framework` (speaker-embedding-extractor.cc)."""
    network = build("tiny", channels=8, embedding=4).eval()
    network.take(FBANKS[kit])
    save_student("s", Checkpoint(network))
    done = spkd("export", "s", "--to", "onnx", *settings).ok()
    assert done.out.splitlines()[-1] == f"s/{file}: written"
    assert "not for sherpa-onnx" in done.out + done.err
    found = session(f"s/{file}").get_modelmeta().custom_metadata_map
    assert not {"framework", "language", "normalize_samples", "feature_normalize_type"} & set(found)
    assert found["spkd_features"] == ("waveform" if "waveform=true" in settings else kit)


def test_the_cosine_in_eight_bits_is_of_speakers_that_fixed_no_range(corpus: Path) -> None:
    speech = measure(Manifest.load(corpus / "manifest.csv"))[0].utterances
    others, ranges = divided(speech)
    assert len(others) + len(ranges) == sum((u.duration or 0) >= 1.0 for u in speech)
    assert others
    assert ranges
    assert not {u.speaker for u in others} & {u.speaker for u in ranges}
    one = [replace(u, speaker="one") for u in speech]
    others, ranges = divided(one)
    assert not {u.id for u in others} & {u.id for u in ranges}
    assert others
    assert ranges


def wave_of(corpus: Path, index: int = 2) -> np.ndarray:
    return soundfile.read(Manifest.load(corpus / "manifest.csv")[index].path, dtype="float32")[0]


def test_what_goes_with_the_model_is_in_the_file(spkd: Callable, student: Path, corpus: Path) -> None:
    done = spkd("export", "student", "to=onnx", "url=https://lab.example/m", "licence=apache-2.0").ok()
    assert done.out.splitlines()[-1] == "student/model.onnx: written"
    assert "cosine with the student 1.000000" in done.out
    found = session("student/model.onnx").get_modelmeta().custom_metadata_map
    assert found["output_dim"] == "8"
    assert (found["sample_rate"], found["normalize_samples"], found["spkd_features"]) == ("16000", "0", "sherpa")
    assert json.loads(found["spkd_card"])["licence"] == "apache-2.0"
    calibration = json.loads(found["spkd_calibration"])
    assert calibration["thresholds"] == json.loads((student / "calibration.json").read_text())["thresholds"]
    assert calibration["trained_on"]["speakers"] == []  # who they are does not leave the laboratory
    assert str(corpus) not in json.dumps(found)  # nor where its list lies


def test_the_calibration_of_a_file_is_not_for_other_features(
    spkd: Callable, student: Path, capsys: pytest.CaptureFixture
) -> None:
    """Cosines of embeddings of other features have other error rates at its thresholds."""
    spkd("export", "student", "to=onnx").ok()
    assert package.load("student/model.onnx").calibration is not None
    assert package.load("student/model.onnx", input="auto").calibration is not None
    other = package.load("student/model.onnx", input="wespeaker")
    assert other.calibration is None
    assert "its calibration is not of the scores with input=wespeaker" in capsys.readouterr().out
    with pytest.raises(SpkdError, match="has no calibration"):
        other.verify(*([0.1, -0.1] * 8000 for _ in range(2)))


def test_an_address_with_credentials_is_not_written_into_a_model(spkd: Callable, student: Path) -> None:
    for key in ("url=https://bob:hunter2@lab.example/m", "licence=see https://lab.example/m?sig=hunter2"):
        done = spkd("export", "student", "to=pt2", key)
        assert (done.code, "hunter2" in done.err, "what stands for ***" in done.err) == (2, False, True)
    assert not (student / "model.pt2").exists()


def export_of_known_people(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """s/model.onnx, of a student that was trained on spk0, spk1 and someone."""
    folder = save_untrained(tmp_path / "s", corpus)
    people = People(Names.of(["spk0", "spk1", "someone"]))
    save_student(folder, Checkpoint(load_student(folder).network, training=Training(people=people)))
    spkd("export", "s").ok()


def test_an_export_knows_beside_its_student_on_whom_it_was_trained(
    spkd: Callable, corpus: Path, tmp_path: Path
) -> None:
    export_of_known_people(spkd, corpus, tmp_path)
    Path("elsewhere").mkdir()
    shutil.copy("s/model.onnx", "elsewhere/model.onnx")
    audio, trained = f"manifest={corpus / 'manifest.csv'}", "trained on 2 of the 6 speakers of"
    expected = {"s": (True, False), "elsewhere": (False, True)}
    for place, (is_known, is_lost) in expected.items():
        given = ["model=onnx", f"model.weights={place}/model.onnx", audio, "bootstrap=0", f"out={place}/eval"]
        done = spkd("eval", corpus / "trials.txt", *given).ok()
        notes = " ".join(json.loads(Path(place, "eval/report.json").read_text())["notes"])
        for where in (done.out, notes):
            assert (trained in where, "is not known, without the model.json" in where) == (is_known, is_lost)


@pytest.mark.slow
def test_on_whom_a_teacher_was_trained_is_not_known_away_from_its_folder(
    spkd: Callable, corpus: Path, tmp_path: Path
) -> None:
    export_of_known_people(spkd, corpus, tmp_path)
    Path("away").mkdir()
    shutil.copy("s/model.onnx", "away/model.onnx")
    every = Manifest.load(corpus / "manifest.csv").utterances
    Manifest([u for u in every if u.speaker not in ("spk0", "spk1")]).save("train.csv")
    tested = [u.id for u in every if u.speaker in ("spk0", "spk1")]
    Path("trials.txt").write_text("".join(f"{a} {b}\n" for a, b in itertools.combinations(tested, 2)))
    known, lost = (
        "A teacher of the student was trained on 2 of the 2",
        "Whether a teacher of the student was trained on",
    )
    for place, expected in (("s", [known]), ("away", [lost])):
        given = ["teacher=onnx", f"teacher.weights={place}/model.onnx", "manifest=train.csv", "fbank=true"]
        spkd("extract", *given, f"cache={place}.cache").ok()
        learnt = [f"cache={place}.cache", "student=tiny", "loss=cosine", "steps=1", "batch_size=4"]
        spkd("train", *learnt, f"out={place}.student").ok()
        audio = f"manifest={corpus / 'manifest.csv'}"
        done = spkd("eval", "trials.txt", f"model={place}.student", audio, f"out={place}.eval").ok()
        assert [note for note in (known, lost) if note in done.out] == expected


@pytest.mark.slow
def test_a_calibration_in_the_file_does_not_make_another_model(spkd: CommandLine, student: Path, corpus: Path) -> None:
    kept = (student / "calibration.json").rename("kept.json").read_text()
    spkd("export", "student").ok()
    plain = hashlib.sha256(Path("student/model.onnx").read_bytes()).hexdigest()
    shutil.copy("kept.json", student / "calibration.json")
    spkd("export", "student", "out=with.onnx").ok()
    Path("again.onnx").write_bytes(with_calibration(Path("with.onnx"), kept))
    for path in ("student/model.onnx", "with.onnx", "again.onnx"):
        assert digest_of(files_of(Path(path))) == plain, path
    listed = (f"{corpus / 'trials.txt'}", f"manifest={corpus / 'manifest.csv'}", "model=onnx")
    spkd("calibrate", *listed, "model.weights=student/model.onnx", "force=true", "out=c.json").ok()
    assert json.loads(Path("c.json").read_text())["system"]["models"] == [plain]
    done = spkd("eval", *listed, "model.weights=again.onnx", "calibration=c.json")
    assert "tested here" in done.err, done.err  # not: trained on the scores of another system


def test_a_changed_byte_in_an_exported_graph_is_found(spkd: CommandLine, student: Path) -> None:
    spkd.once("student/model.onnx", "export", "student")
    Path("student/model.onnx").rename("m.onnx")
    good = Path("m.onnx").read_bytes()
    assert package.load("m.onnx").dim == 8
    for place in (good.index(b"spkd_digest") + 20, *range(100, len(good), len(good) // 20)):
        Path("m.onnx").write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(SpkdError, match="m.onnx: damaged, or changed since"):
            package.load("m.onnx")
    # Another tool may change a graph that it gives no digest.
    model = onnx.load_from_string(good)
    del model.metadata_props[:]
    onnx.save(model, "m.onnx")
    assert package.load("m.onnx", input="sherpa").dim == 8


def test_sherpa_onnx_gives_the_students_embeddings(spkd: CommandLine, student: Path, corpus: Path) -> None:
    sherpa = pytest.importorskip("sherpa_onnx")
    spkd.once("student/model.onnx", "export", "student")
    extractor = sherpa.SpeakerEmbeddingExtractor(sherpa.SpeakerEmbeddingExtractorConfig(model="student/model.onnx"))
    for index in range(3):
        wave = wave_of(corpus, index)
        stream = extractor.create_stream()
        stream.accept_waveform(16_000, wave)
        stream.input_finished()
        theirs, ours = np.array(extractor.compute(stream)), package.load("student").embed(wave)
        assert theirs @ ours / np.linalg.norm(theirs) / np.linalg.norm(ours) > 0.999


def test_the_waveform_goes_in_and_the_model_can_be_scored(spkd: Callable, student: Path, corpus: Path) -> None:
    done = spkd(
        "export", "student", "waveform=true", "out=w.onnx", f"trials={corpus / 'trials.txt'}",
        f"trials_manifest={corpus / 'manifest.csv'}",
    ).ok()  # fmt: skip
    rates = [line.split("EER ")[1] for line in done.out.splitlines() if "EER " in line]
    assert len(rates) == 2
    assert rates[0] == rates[1]
    one, other = package.load("student"), package.load("w.onnx")
    assert np.abs(one.embed(wave_of(corpus)) - other.embed(wave_of(corpus))).max() < 1e-3
    assert other.calibration is not None
    assert other.verify(wave_of(corpus), wave_of(corpus)).same


def test_eight_bit_integers_stay_near_and_are_smaller(spkd: Callable, student: Path, corpus: Path) -> None:
    Path("speech.csv").write_text((corpus / "manifest.csv").read_text().replace("audio/", f"{corpus}/audio/"))
    with open("speech.csv", "a") as manifest:
        manifest.write("lost,nowhere.wav,spk0,,0\n")
    audio = "manifest=speech.csv"
    done = spkd("export", "student", "--to", "onnx-int8", f"onnx_int8.{audio}", "onnx_int8.speech=20").ok()
    assert "note: speech.csv: 1 utterance left out (lost: no such file)" in done.out
    rows = [line.split()[0] for line in done.out.splitlines() if not line.startswith("note:")]
    assert rows[:3] == ["student", "onnx", "onnx-int8"]
    whole, small = package.load("student"), package.load("student/model.int8.onnx")
    waves = [wave_of(corpus, i) for i in range(6)]
    a, b = whole.embed(waves), small.embed(waves)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.mean() > 0.7  # of an untrained network, whose embeddings differ by little
    assert {node.op_type for node in _nodes("student/model.int8.onnx")} >= {"QuantizeLinear", "DequantizeLinear"}
    # Integer kernels give what the graph means, on every processor: weights of 8 bits overflow without VNNI.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    meant = ort.InferenceSession("student/model.int8.onnx", options, providers=["CPUExecutionProvider"])
    x = features(2, 300, 80).numpy()
    found = session("student/model.int8.onnx").run(None, {"feats": x})[0]
    assert np.allclose(found, meant.run(None, {"feats": x})[0], atol=2e-2 * np.abs(found).max())
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load("student/model.int8.onnx").graph.initializer]
    assert max(np.abs(w.astype(int)).max() for w in weights if w.dtype == np.int8) == 64
    # Its scores are its own, and so is its calibration.
    assert small.calibration is None
    with pytest.raises(UsageError, match=r"spkd calibrate TRIALS model=onnx model.weights=student/model.int8"):
        small.verify(waves[0], waves[1])
    listed = (f"{corpus / 'trials.txt'}", f"manifest={corpus / 'manifest.csv'}", "force=true")
    spkd("calibrate", *listed, "model=onnx", "model.weights=student/model.int8.onnx").ok()
    own = package.load("student/model.int8.onnx")
    spkd("calibrate", *listed, "model=onnx", "model.weights=student/model.int8.onnx", "out=own.json").ok()
    written = json.loads(Path("own.json").read_text())
    assert own.calibration.weights == tuple(written["weights"])
    assert own.calibration.trained_on.speakers == ()
    assert np.array_equal(own.embed(waves), b)
    assert own.verify(waves[3], waves[3]).same  # no speech is found in the voice before
    assert not list(student.glob("*.fp32.*"))
    assert "onnx_int8.manifest=FILE" in spkd("export", "student", "to=onnx-int8").err


def test_only_a_calibration_of_what_verify_computes_goes_into_a_file(
    spkd: CommandLine, student: Path, corpus: Path
) -> None:
    spkd.once("student/model.onnx", "export", "student")
    before = Path("student/model.onnx").read_bytes()
    names = [u.id for u in Manifest.load(corpus / "manifest.csv")]
    Path("map").write_text("".join(f"{name} {name}\n" for name in names))
    listed = (f"{corpus / 'trials.txt'}", f"manifest={corpus / 'manifest.csv'}", "force=true")
    exported = ("model=onnx", "model.weights=student/model.onnx")
    for given in ((*exported, "enrol.map=map"), (*exported, "model.onnx.input=kaldi"), ("enrol.map=map",)):
        done = spkd("calibrate", *listed, *given)
        assert (done.code, "name the file to write (out=FILE)" in done.err) == (2, True), done.err
    assert Path("student/model.onnx").read_bytes() == before
    # A file in which another version put one.
    spkd("calibrate", *listed, *exported, "enrol.map=map", "out=c.json").ok()
    Path("m.onnx").write_bytes(with_calibration(Path("student/model.onnx"), Path("c.json").read_text()))
    with pytest.raises(UsageError, match="its calibration: takes more than the cosine"):
        package.load("m.onnx")


def _nodes(path: str) -> list:
    import onnx

    return list(onnx.load(path).graph.node)


def test_pt2_of_any_length(spkd: Callable, student: Path) -> None:
    spkd("export", "student", "--to", "pt2", "url=https://lab.example/m", "licence=apache-2.0").ok()
    extra = {"metadata.json": ""}
    graph = torch.export.load("student/model.pt2", extra_files=extra).module()
    found = json.loads(extra["metadata.json"])
    assert (found["spkd_features"], found["url"]) == ("sherpa", "https://lab.example/m")
    assert json.loads(found["spkd_card"])["licence"] == "apache-2.0"
    assert json.loads(found["spkd_calibration"])["features"] == ["score"]
    network = load_student(student).network
    for batch, frames in ((1, 400), (3, 133)):
        x = features(batch, frames, 80)
        with torch.no_grad():
            assert (graph(x) - network(x)["embedding"]).abs().max() < 1e-5


def test_litert_of_one_length(spkd: Callable, student: Path) -> None:
    pytest.importorskip("litert_torch", exc_type=ImportError)
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    spkd("export", "student", "--to", "litert", "litert.seconds=2", "out=m.tflite").ok()
    graph = interpreter.Interpreter("m.tflite")
    graph.allocate_tensors()
    assert graph.get_input_details()[0]["shape"].tolist() == [1, 200, 80]
    x = input_features(FBANKS["sherpa"], 0.1 * torch.randn(1, 32_000))
    graph.set_tensor(graph.get_input_details()[0]["index"], x.numpy())
    graph.invoke()
    with torch.no_grad():
        expected = load_student(student).network(x)["embedding"].numpy()
    assert np.abs(graph.get_tensor(graph.get_output_details()[0]["index"]) - expected).max() < 1e-4


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["to=onx"], "did you mean 'onnx'"),
        (["to=wespeaker"], "WeSpeaker does not have this network"),
        (["to=pt2", "onnx.lengths=true"], "onnx.lengths=true has no effect: to=onnx is not in use"),
        (["to=pt2", "trials=x"], "to=pt2: spkd scores ONNX models alone"),
        (["to=pt2", "out=m.onnx"], "out=m.onnx: to=pt2 writes .pt2 files"),
        (["out=m.pt2"], "out=m.pt2: to=onnx writes .onnx files"),
        (["calibration=none.json"], "no calibration none.json"),
        (["trials=none.txt", "trials_manifest=none.csv"], "no manifest none.csv"),
    ],
)
def test_what_a_format_does_not_have_is_a_line(spkd: Callable, given: list[str], error: str) -> None:
    done = spkd("export", "student", *given)
    assert done.code in (1, 2)
    assert error in done.err
    assert len(done.err.splitlines()) == 1


def test_a_calibration_of_other_weights_does_not_leave(spkd: Callable, student: Path, corpus: Path) -> None:
    kept = (student / "calibration.json").read_bytes()
    save_untrained(student, corpus, seed=3)
    (student / "calibration.json").write_bytes(kept)
    done = spkd("export", "student")
    assert (done.code, "of other weights than the student's" in done.err) == (1, True)


def test_exports_of_the_bundled_model_state_what_its_card_does(spkd: Callable) -> None:
    spkd("export", "bundled", "to=ort", "out=m.ort").ok()
    rows = [line.split("|")[1:] for line in package.load().card.split("## Error rates")[0].splitlines() if "|" in line]
    licences = [f"{row[0].strip()} ({row[4].strip()})" for row in rows[2:]]
    assert len(licences) == 2
    about = json.loads(Path("m.ort.json").read_text())
    assert about["licence"] == f"Apache-2.0; trained on {' and '.join(licences)}"
    assert (
        f"Licence: {about['licence']}. Source: the model that comes with spkd." in Path("m.ort.README.md").read_text()
    )
    spkd("export", "bundled", "to=ort", "out=m.ort", "licence=mine").ok()
    assert json.loads(Path("m.ort.json").read_text())["licence"] == "mine"


def test_a_calibration_of_another_student_is_answered_with_how_to_make_its_own(
    spkd: Callable,
    student: Path,
    corpus: Path,
) -> None:
    save_untrained(Path("other"), corpus, seed=1)
    done = spkd("export", "other", f"calibration={student / 'calibration.json'}")
    assert (done.code, "its own is made by `spkd calibrate TRIALS model=other manifest=FILE`" in done.err) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "module"), [("pte", "executorch"), ("coreml", "coremltools")])
@pytest.mark.parametrize(("name", "channels"), [("redimnet2", 8), ("resnet34", 4), ("campplus", 8)])
def test_networks_with_strides_go_to_phones_with_features_of_any_length(
    spkd: Callable, to: str, module: str, name: str, channels: int
) -> None:
    pytest.importorskip(module)
    save_student("s", Checkpoint(build(name, channels=channels, embedding=8).eval()))
    spkd("export", "s", f"to={to}", "out=m." + {"pte": "pte", "coreml": "mlpackage"}[to]).ok()


@pytest.mark.slow
def test_redimnet2_goes_to_litert(spkd: Callable) -> None:
    pytest.importorskip("litert_torch", exc_type=ImportError)
    save_student("s", Checkpoint(build("redimnet2", channels=8, embedding=8).eval()))
    spkd("export", "s", "to=litert", "litert.seconds=2", "out=m.tflite").ok()


@pytest.mark.slow
def test_redimnet2_is_exported_with_the_features_in_the_graph(spkd: Callable) -> None:
    torch.manual_seed(0)
    network = build("redimnet2", channels=8, embedding=8).eval()
    save_student("s", Checkpoint(network))
    spkd("export", "s", "to=onnx", "waveform=true", "out=m.onnx").ok()
    # Every remainder of the frames in the steps of four that the network takes.
    for samples in (16_000, 16_160, 16_320, 16_480, 16_679):
        wave = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))
        with torch.no_grad():
            expected = network(network.features(wave))["embedding"].numpy()
        assert np.abs(session("m.onnx").run(None, {"wave": wave.numpy()})[0] - expected).max() < 1e-4
