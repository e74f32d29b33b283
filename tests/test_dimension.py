"""One size of a nested embedding: embeddings, exports, calibrations, voices, evaluations and caches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import spkd as interface
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.outputs.features import FBANKS
from spkd.registry import STUDENTS
from spkd.students import Checkpoint, build, load_student, save_student
from tests.eval.students import save_untrained
from tests.students.test_checkpoint import sealed

SIZES = (2, 4, 8)
PART = "model.dimension=4"


@pytest.fixture
def student(tmp_path: Path, corpus: Path, spkd: Callable) -> Path:
    """A nested student, whose weights are random, and recordings in the current folder."""
    utterances = list(Manifest.load(corpus / "manifest.csv"))
    # No speech is found in the breathy voice of the first speaker: it comes last.
    for number, utterance in enumerate([*utterances[3:], *utterances[:3]]):
        shutil.copy(utterance.path, f"{number}.wav")
    return save_untrained(tmp_path / "student", corpus, nested=SIZES)


def embedded(spkd: Callable, corpus: Path, *model: str, out: str = "e.npy") -> np.ndarray:
    spkd("embed", corpus / "manifest.csv", *model, f"out={out}").ok()
    return np.load(out)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_part_of_every_student_is_its_first_numbers(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = build(name, channels=16, embedding=8).eval()
    network.nested = SIZES
    save_student(tmp_path, Checkpoint(network, torch.randn(3, 8), ["a", "b", "c"], 30.0))
    features = torch.randn(2, 60, network.input_kind.dim)
    with torch.no_grad():
        whole = network(features)
        for size in SIZES:
            part = load_student(tmp_path, size)
            levels = part.network(features)
            assert part.network.levels["embedding"].dim == size
            assert torch.equal(levels["embedding"], whole["embedding"][:, :size])
            assert all(torch.equal(levels[key], whole[key]) for key in whole if key != "embedding")
            assert (part.head is None) == (size < 8)


def test_commands_and_python_give_the_first_numbers(spkd: Callable, student: Path, corpus: Path) -> None:
    whole = embedded(spkd, corpus)
    for size in SIZES:
        assert np.array_equal(embedded(spkd, corpus, f"model.dimension={size}"), whole[:, :size])
    model = interface.load(student, dimension=4)
    assert (model.dim, repr(model)) == (4, f"SpeakerModel('{student}', dim=4, no calibration)")
    first, second = (model.embed(f"{n}.wav").astype(np.float64) for n in (0, 1))
    both = np.linalg.norm(first) * np.linalg.norm(second)
    assert model.score("0.wav", "1.wav") == pytest.approx(first @ second / both, abs=1e-6)
    assert interface.load(student, dimension=8).digest == interface.load(student).digest != model.digest


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (["model.dimension=3"], "error: dimension=3: the embedding of student has 2, 4 and 8 numbers\n"),
        (["model=plain", PART], "dimension=4: the embedding of plain has 8 numbers; it was trained without"),
        (["model=bundled", PART], "dimension=4: the embedding of bundled has 256 numbers; it was trained without"),
        (["model=dvector", PART], "dimension=4: dvector has embeddings of one size; only a student that was trained"),
        (["model=onnx", "model.weights=student/model.json", PART], "export the student at the dimension"),
    ],
)
def test_other_dimensions_are_refused(
    spkd: Callable, student: Path, corpus: Path, tmp_path: Path, model: list[str], message: str
) -> None:
    save_untrained(tmp_path / "plain", corpus)
    manifest = f"manifest={corpus / 'manifest.csv'}"
    commands: list[list] = [
        ["embed", corpus / "manifest.csv"],
        ["eval", corpus / "trials.txt", manifest],
        ["calibrate", corpus / "trials.txt", manifest, "out=c.json"],
        *(["verify", "0.wav", "1.wav"], ["enrol", "ann", "0.wav"]),
    ]
    before = sorted(Path().rglob("*"))
    for command in commands if model[0].startswith("model=") else commands[:3]:
        done = spkd(*command, *model)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert message in done.err
    assert sorted(Path().rglob("*")) == before


def test_python_refuses_other_dimensions(student: Path) -> None:
    with pytest.raises(UsageError, match="dimension=3: the embedding of .* has 2, 4 and 8 numbers"):
        interface.load(student, dimension=3)
    for given in (4.0, "4", True):
        with pytest.raises(UsageError, match=f"dimension={given!r}: expected a whole number"):
            interface.load(student, dimension=given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="dimension=4: the embedding of bundled has 256 numbers"):
        interface.load(dimension=4)


def test_an_export_gives_the_first_numbers(spkd: Callable, student: Path, corpus: Path) -> None:
    """By onnxruntime, which computes all of it in its own way."""
    runtime = pytest.importorskip("onnxruntime")
    spkd("calibrate", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true", PART).ok()
    done = spkd("export", "student", PART).ok()
    assert done.out.splitlines()[-1] == "student/model.4.onnx: written"
    session = runtime.InferenceSession("student/model.4.onnx", providers=["CPUExecutionProvider"])
    features = torch.randn(2, 90, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_student(student).network(features)["embedding"][:, :4].numpy()
    assert np.abs(session.run(None, {"feats": features.numpy()})[0] - expected).max() < 1e-5
    metadata = session.get_modelmeta().custom_metadata_map
    about = json.loads(Path("student/model.4.onnx.json").read_text())
    assert (metadata["output_dim"], about["output"]["shape"], about["model"]["dimension"]) == ("4", ["batch", 4], 4)
    assert about["calibration"]["weight"] == json.loads(Path("student/calibration.4.json").read_text())["weights"][0]
    # The calibration of the part goes along, and no other.
    model = ["model=onnx", "model.weights=student/model.4.onnx"]
    of_graph, of_student = (
        spkd("verify", "0.wav", "1.wav", *given).ok().out for given in (model, ["model=student", PART])
    )
    assert of_graph.splitlines()[:3] == of_student.splitlines()[:3]
    assert spkd("export", "student", "dimension=4").code == 2
    done = spkd("export", "student", "model.dimension=3")
    assert (done.code, done.err) == (2, "error: dimension=3: the embedding of student has 2, 4 and 8 numbers\n")


@pytest.mark.parametrize("name", ["resnet34", pytest.param("campplus", marks=pytest.mark.slow)])
def test_wespeakers_network_gives_the_first_numbers(spkd: Callable, corpus: Path, name: str) -> None:
    torch.manual_seed(0)
    network = build(name, channels={"resnet34": 32, "campplus": 128}[name], embedding=8).eval()
    network.take(FBANKS["wespeaker"])
    network.nested = SIZES
    save_student("s", Checkpoint(network))
    spkd("export", "s", "to=wespeaker", PART, "out=w").ok()
    assert "embed_dim: 4" in Path("w/config.yaml").read_text()
    rows = (corpus / "manifest.csv").read_text().splitlines()[:3]
    Path("m.csv").write_text("\n".join(rows).replace("audio/", f"{corpus}/audio/"))
    spkd("embed", "m.csv", "model=s", PART, "out=a.npy").ok()
    spkd("embed", "m.csv", "model=wespeaker", "model.weights=w", "out=b.npy").ok()
    assert np.abs(np.load("a.npy") - np.load("b.npy")).max() < 1e-5


def test_each_dimension_has_a_calibration_of_its_own(spkd: Callable, student: Path, corpus: Path) -> None:
    given = [corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true"]
    spkd("calibrate", *given).ok()
    assert interface.load(student).calibration is not None
    part = interface.load(student, dimension=4)
    assert part.calibration is None
    with pytest.raises(UsageError, match=r"spkd calibrate TRIALS model=\S+ model\.dimension=4 manifest=FILE"):
        part.verify("0.wav", "1.wav")
    before = Path("student/calibration.json").read_bytes()
    spkd("calibrate", *given, PART).ok()
    assert Path("student/calibration.json").read_bytes() == before
    assert Path("student/calibration.4.json").is_file()
    loaded = interface.load(student, dimension=4).calibration
    assert loaded is not None
    # A file of one dimension is refused at another, wherever it is named.
    for file, model in (("calibration.4.json", []), ("calibration.json", [PART])):
        others = ["calibration=student/" + file, "bootstrap=0", f"out=eval-{file}"]
        done = spkd("eval", *given[:2], *others, *model)
        assert (done.code, "trained on the scores of another system (models: " in done.err) == (1, True), done.err
        done = spkd("export", "student", f"calibration=student/{file}", *model)
        assert (done.code, "of other weights than the student's, or another dimension" in done.err) == (1, True)
    shutil.copy("student/calibration.json", "student/calibration.4.json")
    with pytest.raises(SpkdError, match="or another dimension; its own is made by .*model.dimension=4"):
        interface.load(student, dimension=4)


def test_voices_belong_to_a_dimension(spkd: Callable, student: Path, corpus: Path) -> None:
    spkd("calibrate", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true", PART).ok()
    given = ["model=student", PART]
    spkd("enrol", "ann", "0.wav", "1.wav", *given).ok()
    assert spkd("verify", "ann", "2.wav", *given).ok().out.endswith("model: student, dimension=4\n")
    assert "ann" in spkd("identify", "2.wav", "threshold=-1e6", *given).ok().out
    for model in ([], ["model=student", "model.dimension=2"]):
        done = spkd("verify", "ann", "2.wav", *model)
        assert (done.code, "a voiceprint of another model" in done.err) == (2, True), done.err
        done = spkd("enrol", "bob", "3.wav", *model)
        assert (done.code, "its voices are of another model" in done.err) == (2, True), done.err
    done = spkd("verify", "ann", "2.wav", PART)
    assert (done.code, "no model is set" in done.err) == (2, True)


def test_an_evaluation_says_its_dimension(spkd: Callable, student: Path, corpus: Path) -> None:
    given = ["eval", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "bootstrap=10"]
    spkd(*given, "out=whole").ok()
    spkd(*given, "out=part", PART).ok()
    model = json.loads(Path("part/report.json").read_text())["models"][0]
    assert (model["name"], model["embedding_size"], model["dimension"]) == ("student, dimension=4", 4, 4)
    assert "student, dimension=4" in Path("part/report.html").read_text()
    done = spkd(*given, "out=part")
    assert done.code == 2
    assert "part: holds the evaluation of student, dimension=4, not of student; choose another folder" in done.err
    # Scores are the cosines of the first numbers, in float64.
    vectors = embedded(spkd, corpus)[:, :4].astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row = {utterance.id: n for n, utterance in enumerate(Manifest.load(corpus / "manifest.csv"))}
    for line in Path("part/scores.txt").read_text().splitlines():
        first, second, score, _ = line.split()
        assert float(score) == pytest.approx(vectors[row[first]] @ vectors[row[second]], abs=1e-5)
    spkd("report", "whole", "part", "--out", "page").ok()
    header, _, *rows = (line.split(" | ") for line in Path("page/comparison.md").read_text().splitlines())
    assert [row[header.index("embedding")] for row in rows] == ["8", "4"]


def test_a_cache_belongs_to_a_dimension(spkd: Callable, student: Path, corpus: Path) -> None:
    """As a teacher, as a cohort, and for the scores of PLDA."""
    every = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(every[:9]).save("cohort.csv")
    Manifest(every[9:]).save("test.csv")
    pairs = [(a, b) for i, a in enumerate(every[9:]) for b in every[10 + i :]]
    Path("t.txt").write_text("".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs))
    extract = ["extract", "teacher=checkpoint", "teacher.weights=student", "manifest=cohort.csv"]
    spkd(*extract, "teacher.dimension=4", "cache=part").ok()
    spkd(*extract, "cache=whole").ok()
    done = spkd(*extract, "cache=part")
    assert done.code != 0
    given = ["eval", "t.txt", "manifest=test.csv", "bootstrap=0", "subtract_mean=true"]
    spkd(*given, PART, "cohort.source=part", "out=a").ok()
    spkd(*given, PART, "cohort.source=cohort.csv", "out=b").ok()
    a, b = (
        np.array([float(line.split()[2]) for line in Path(f"{n}/scores.txt").read_text().splitlines()]) for n in "ab"
    )
    assert np.abs(a - b).max() < 2e-3  # the cache is of float16
    for model, cache in (([PART], "whole"), ([], "part")):
        done = spkd(*given, *model, f"cohort.source={cache}", "out=c")
        assert (done.code, "other weights or settings than the model that is scored" in done.err) == (1, True)
    done = spkd(*given[:-1], PART, "enrol.model=student", "out=d")
    assert (done.code, "embeddings of 8 dimensions, those of model=student have 4" in done.err) == (2, True), done.err
    done = spkd(*extract, "teacher.dimension=3", "cache=none")
    assert (done.code, "dimension=3: the embedding of student has 2, 4 and 8 numbers" in done.err) == (2, True)
    assert not Path("none").exists()


def test_a_description_with_other_sizes_is_damaged(student: Path) -> None:
    path = student / "model.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()), nested=[2, 4])))
    with pytest.raises(SpkdError, match="damaged"):
        load_student(student)
