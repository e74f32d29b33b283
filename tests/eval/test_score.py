"""Back-ends, enrolment maps and models of two kinds, through the real command line."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spkd.cache import Cache
from spkd.corpus.augment import Augmentation
from spkd.corpus.manifest import Manifest, Utterance
from spkd.eval.cohort import in_both, normalised
from spkd.eval.pairs import score_pairs
from spkd.eval.plda import PLDA
from spkd.files.vectors import read_vectors
from tests.conftest import CommandLine
from tests.eval.conftest import COHORT_SPEAKERS, COHORT_UTTERANCES
from tests.eval.students import save_untrained

DIM = 4


@pytest.fixture
def student(tmp_path: Path, corpus: Path) -> Path:
    return save_untrained(tmp_path / "student", corpus, embedding=DIM)


@pytest.fixture
def halves(corpus: Path, cohort: Path, tmp_path: Path) -> tuple[Manifest, Manifest]:
    """Three speakers to test, and twelve others as cohort; trials.txt, test.csv and cohort.csv."""
    test, others = Manifest(Manifest.load(corpus / "manifest.csv").utterances[:9]), Manifest.load(cohort)
    test.save(tmp_path / "test.csv")
    others.save(tmp_path / "cohort.csv")
    lines = [f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in itertools.combinations(test, 2)]
    (tmp_path / "trials.txt").write_text("".join(lines))
    return test, others


@pytest.fixture
def embedded(spkd: CommandLine, student: Path, corpus: Path, cohort: Path) -> dict[str, np.ndarray]:
    """The student's embedding of every utterance, in float64."""
    found = {}
    for manifest in (corpus / "manifest.csv", cohort):
        out = f"{manifest.stem}.ark"
        spkd.once(out, "embed", manifest, "model=student", f"out={out}")
        found |= {name: vector.astype(np.float64) for name, vector in read_vectors(Path(out))}
    return found


def scores_of(folder: str) -> dict[tuple[str, str], float]:
    lines = (line.split() for line in Path(folder, "scores.txt").read_text().splitlines())
    return {(a, b): float(score) for a, b, score, *_ in lines}


def report_of(folder: str) -> dict:
    return json.loads(Path(folder, "report.json").read_text())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_cohorts_mean_is_subtracted(spkd: Callable, halves: tuple, embedded: dict) -> None:
    spkd("eval", "trials.txt", "manifest=test.csv", "subtract_mean=true", "cohort=cohort.csv").ok()
    mean = np.mean([embedded[u.id] for u in halves[1]], 0)
    for (a, b), score in scores_of("eval").items():
        assert abs(score - cosine(embedded[a] - mean, embedded[b] - mean)) < 1e-4
    assert "mean of the 24 embeddings of the cohort" in report_of("eval")["backend"][0]
    assert report_of("eval")["how"][-1].endswith(" is cohort.csv.")


@pytest.mark.parametrize(("average", "top"), [("true", 10), ("false", 15), ("false", 300)])
def test_as_norm_is_the_formula(spkd: Callable, halves: tuple, embedded: dict, average: str, top: int) -> None:
    given = ["norm=as-norm", "cohort=cohort.csv", f"cohort.average={average}", f"cohort.top={top}"]
    spkd("eval", "trials.txt", "manifest=test.csv", *given).ok()
    vectors = normalised(np.stack([embedded[u.id] for u in halves[1]]))
    if average == "true":
        vectors = normalised(vectors.reshape(COHORT_SPEAKERS, COHORT_UTTERANCES, DIM).sum(1))

    def statistics(name: str) -> tuple[float, float]:
        highest = np.sort(vectors @ normalised(embedded[name][None])[0])[-top:]
        return highest.mean(), highest.std()

    for (a, b), score in scores_of("eval").items():
        raw = cosine(embedded[a], embedded[b])
        sides = [(raw - mean) / deviation for mean, deviation in (statistics(a), statistics(b))]
        assert score == pytest.approx(np.mean(sides), rel=1e-3, abs=1e-3)


def test_a_cache_of_this_model_is_a_cohort_and_another_is_not(
    spkd: Callable, halves: tuple, student: Path, corpus: Path
) -> None:
    extract = ["teacher=checkpoint", "teacher.weights=student", "manifest=cohort.csv", "storage.codec=float32"]
    spkd("extract", *extract, "cache=c").ok()
    both = ["norm=as-norm", "cohort.top=11"]
    spkd("eval", "trials.txt", "manifest=test.csv", "cohort=c", "out=a", *both).ok()
    spkd("eval", "trials.txt", "manifest=test.csv", "cohort=cohort.csv", "out=b", *both).ok()
    one, other = scores_of("a"), scores_of("b")
    assert max(abs(one[pair] - other[pair]) for pair in one) < 5e-3
    save_untrained(student, corpus, seed=1, embedding=DIM)
    done = spkd("eval", "trials.txt", "manifest=test.csv", "cohort=c", *both)
    assert done.code == 1
    assert "with other weights or settings than the model" in done.err


def test_views_of_a_cache_that_are_no_recordings_are_no_cohort(spkd: Callable, halves: tuple, student: Path) -> None:
    extract = ["extract", "teacher=checkpoint", "teacher.weights=student", "manifest=cohort.csv"]
    extract += ["storage.codec=float32", "view=crops:3,0.5", "view.coders=[g711]"]
    spkd(*extract, "cache=all", "view.coder_prob=1").ok()
    score = ["eval", "trials.txt", "manifest=test.csv", "norm=as-norm", "cohort.top=11", "cohort.average=false"]
    done = spkd(*score, "cohort=all")
    assert (done.code, "no view as it was recorded" in done.err) == (1, True)
    spkd(*extract, "cache=some", "view.coder_prob=0.4", "view.noise=synthetic", "view.noise_prob=0.3").ok()
    done = spkd(*score, "cohort=some").ok()
    views = Cache.open("some").plan.views
    augmentation = Augmentation(noise="synthetic", noise_prob=0.3, coders=["g711"], coder_prob=0.4)
    wave = np.random.RandomState(0).uniform(-0.5, 0.5, 400).astype(np.float32)
    clean = [seed for seed in views.seed if np.array_equal(augmentation(wave, int(seed)), wave)]
    assert 11 < len(clean) < len(views)
    dropped = f"Of the cohort some, {len(views) - len(clean)} of {len(views)} views are left out"
    assert dropped in done.out
    assert "not of whole utterances: its views are crops:3,0.5" in done.out
    assert dropped in " ".join(report_of("eval")["notes"])
    known_as = f"the cohort {Cache.open('some').fingerprint[:12]}"
    assert f"with {len(clean)} embeddings of {known_as}" in " ".join(report_of("eval")["backend"])


def test_plda_is_trained_on_the_cohort(spkd: Callable, halves: tuple, embedded: dict) -> None:
    spkd("eval", "trials.txt", "manifest=test.csv", "backend=plda", "cohort=cohort.csv").ok()
    matrix = np.stack([embedded[u.id] for u in halves[1]])
    mean = matrix.mean(0)
    plda = PLDA.train(normalised(matrix - mean), np.repeat(np.arange(COHORT_SPEAKERS), COHORT_UTTERANCES))
    for (a, b), score in scores_of("eval").items():
        sides = (normalised(embedded[name][None] - mean) for name in (a, b))
        expected = score_pairs(*plda.sides(*sides), np.array([0]), np.array([0]))[0]
        assert score == pytest.approx(expected, rel=0.02, abs=0.02)
    report = report_of("eval")
    assert "two-covariance PLDA" in " ".join(report["backend"])
    assert {"cllr", "act_dcf_0.01"} <= set(report["results"])  # its scores are log-likelihood ratios


def test_several_utterances_enrol_a_model(spkd: Callable, halves: tuple, embedded: dict) -> None:
    test = halves[0]
    by_speaker = {name: [u.id for u in test if u.speaker == name] for name in test.speakers}
    Path("map").write_text("".join(f"{name}-model {' '.join(used[:2])}\n" for name, used in by_speaker.items()))
    lines = [
        f"{int(name == other)} {name}-model {used[2]}\n" for name in by_speaker for other, used in by_speaker.items()
    ]
    Path("m.txt").write_text("".join(lines))
    spkd("eval", "m.txt", "manifest=test.csv", "enrol.map=map").ok()
    for (model, utterance), score in scores_of("eval").items():
        used = by_speaker[model.removesuffix("-model")][:2]
        average = normalised(np.stack([embedded[name] for name in used])).sum(0)
        assert abs(score - cosine(average, embedded[utterance])) < 1e-4
    assert dict(line.split() for line in Path("eval/utt2spk").read_text().splitlines())["spk0-model"] == "spk0"
    head, *rows = Path("test.csv").read_text().splitlines()
    takes = [f"{row},take{int('u1' in row)}\n" for row in rows]
    Path("takes.csv").write_text("".join([f"{head},take\n", *takes]))
    done = spkd("eval", "m.txt", "manifest=takes.csv", "enrol.map=map", "by=[duration,take]").ok()
    assert "note: by=take: models whose enrolment utterances differ in it count as unknown: 3 of 3\n" in done.out
    assert [group["name"] for group in report_of("eval")["breakdown"]["take"]] == ["take0 / unknown"]
    assert [group["name"] for group in report_of("eval")["breakdown"]["duration"]] == ["2.0 / 2.8"]  # 1.2 s + 1.6 s
    Path("map").write_text("somebody spk0/u0.flac\n")
    done = spkd("eval", "m.txt", "manifest=test.csv", "enrol.map=map")
    assert "m.txt:1: 'spk0-model' is not in map" in done.err
    Path("map").write_text("".join(f"{name}-model gone\n" for name in by_speaker))
    assert (
        "m.txt:1: utterance 'gone' is not in test.csv"
        in spkd("eval", "m.txt", "manifest=test.csv", "enrol.map=map").err
    )


@pytest.mark.slow
def test_models_may_have_the_names_of_utterances_of_others(
    spkd: Callable, halves: tuple, corpus: Path, student: Path
) -> None:
    """Numbers for both, as in some corpora: no number changes where the models have names of their own."""
    speakers = [[replace(u, id=f"e{k}-{u.id[-6]}") for u in halves[0] if u.speaker == f"spk{k}"] for k in range(3)]
    tested = [replace(used[2], id=str(k)) for k, used in enumerate(speakers)]
    Manifest(tuple([u for used in speakers for u in used[:2]] + tested)).save("m.csv")
    save_untrained(Path("other"), corpus, seed=5, embedding=DIM)
    for folder, name in (("numbers", "{}"), ("words", "model-{}")):
        Path(folder).mkdir()
        # Model k is of speaker k + 1, whose utterance has the number k + 1.
        models = {name.format(k): (k + 1) % 3 for k in range(3)}
        Path(folder, "map").write_text(
            "".join(f"{model} {' '.join(u.id for u in speakers[who][:2])}\n" for model, who in models.items())
        )
        rows = [f"{int(who == k)} {model} {k}\n" for model, who in models.items() for k in range(3)]
        Path(folder, "t.txt").write_text("".join(rows))
        for model in (student.name, "other"):
            given = [f"model={model}", "manifest=m.csv", f"enrol.map={folder}/map", f"out={folder}/{model}"]
            done = spkd("eval", f"{folder}/t.txt", *given, "bootstrap=20").ok()
            assert "with itself" not in done.out
            assert "repeat" not in done.out
        table = dict(line.split() for line in Path(folder, "student/model2spk").read_text().splitlines())
        assert table == {model: f"spk{who}" for model, who in models.items()}
        spkd("report", f"{folder}/student", f"{folder}/other", "--out", f"{folder}/c", "--bootstrap", "50").ok()
    found = [json.loads(Path(f, "c/comparison.json").read_text())["differences"]["t.txt"] for f in ("numbers", "words")]
    assert found[0] == found[1]


def test_the_enrolment_side_can_have_a_model_of_its_own(
    spkd: Callable, halves: tuple, embedded: dict, corpus: Path
) -> None:
    save_untrained(Path("large"), corpus, seed=5, embedding=DIM, channels=24)
    spkd("embed", "test.csv", "model=large", "out=large.npy").ok()
    theirs = dict(read_vectors(Path("large.npy")))
    spkd("eval", "trials.txt", "manifest=test.csv", "enrol.model=large").ok()
    for (a, b), score in scores_of("eval").items():
        assert abs(score - cosine(theirs[a].astype(np.float64), embedded[b])) < 1e-4
    assert [model["name"] for model in report_of("eval")["models"]] == ["large", "student"]
    assert "embedded by another model" in report_of("eval")["backend"][0]
    save_untrained(Path("wide"), corpus, embedding=8)
    done = spkd("eval", "trials.txt", "manifest=test.csv", "enrol.model=wide", "out=other")
    assert (done.code, "embeddings of 8 dimensions, those of model=student have 4" in done.err) == (2, True)


@pytest.mark.usefixtures("student", "halves")
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["norm=as-norm"], "norm=as-norm needs cohort=FILE"),
        (["backend=plda"], "backend=plda needs cohort=FILE"),
        (["cohort=cohort.csv"], "nothing uses a cohort"),
        (["norm=as-norm", "cohort=none.csv"], "no manifest none.csv"),
        (["by=[colour]"], "no column 'colour'"),
        (["points=[2]"], "points: '2' is not"),
        (["calibration=none.json"], "no calibration none.json"),
        (["llr=true"], "llr=true has no effect: only for --scores"),
    ],
)
def test_settings_that_cannot_be_are_a_line(spkd: Callable, given: list[str], error: str) -> None:
    done = spkd("eval", "trials.txt", "manifest=test.csv", *given)
    assert done.code == 2
    assert error in done.err
    assert len(done.err.splitlines()) == 1


def test_a_cohort_without_labels_cannot_train_plda(spkd: Callable, halves: tuple, student: Path) -> None:
    Path("paths.txt").write_text("".join(f"{u.path}\n" for u in halves[1]))
    done = spkd("eval", "trials.txt", "manifest=test.csv", "backend=plda", "cohort=paths.txt")
    assert "PLDA is trained on speaker labels" in done.err
    done = spkd("eval", "trials.txt", "manifest=test.csv", "norm=as-norm", "cohort=paths.txt")
    assert "cohort embeddings are not averaged" in done.out


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize("given", [["norm=as-norm"], ["backend=plda"], ["subtract_mean=true"]])
def test_a_cohort_of_what_is_tested_is_refused_before_the_work(
    spkd: Callable, halves: tuple, corpus: Path, given: list[str]
) -> None:
    """By speakers, by ids, and by the recordings where neither agrees; from a manifest and from a cache."""
    test, others = halves
    common = ["eval", "trials.txt", "manifest=test.csv", *given]
    done = spkd(*common, f"cohort={corpus / 'manifest.csv'}")
    assert (done.code, "holds 3 of the speakers that are tested (spk0, spk1, spk2)" in done.err) == (1, True)
    Manifest((*others, replace(test[0], speaker=None))).save("ids.csv")
    assert "holds 1 of the utterances that are tested (spk0/u0.flac)" in spkd(*common, "cohort=ids.csv").err
    Manifest((*others, replace(test[0], id="new", speaker=None))).save("audio.csv")
    done = spkd(*common, "cohort=audio.csv")
    assert "holds 1 of the recordings that are tested" in done.err
    # Another spelling of the path, a link of either kind, and another stretch of the file.
    recording = Path(test[0].path)
    Path("soft.flac").symlink_to(recording)
    Path("hard.flac").hardlink_to(recording)
    spellings = [os.path.relpath(recording), f"{recording.parent}/../{recording.parent.name}/{recording.name}"]
    for path in (*spellings, "soft.flac", "hard.flac"):
        for start in (0.0, 0.4):
            Manifest((*others, replace(test[0], id="new", speaker=None, path=path, start=start, duration=0.5))).save(
                "a.csv"
            )
            assert "holds 1 of the recordings that are tested" in spkd(*common, "cohort=a.csv").err, (path, start)
    assert not Path("eval").exists()
    extract = ["teacher=checkpoint", "teacher.weights=student", "cache=c"]
    spkd("extract", *extract, f"manifest={corpus / 'manifest.csv'}").ok()
    assert "cohort=c: holds 3 of the speakers" in spkd(*common, "cohort=c").err


def test_members_of_one_container_are_other_audio(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / "link.tar").symlink_to("a.tar")
    first, second = (Utterance(str(at), f"{tmp_path}/a.tar#{at}+9.wav", None, 5.0) for at in (512, 9216))
    assert not in_both([first], [second])
    assert in_both([first], [Utterance("c", f"{tmp_path}/link.tar#512+9.wav", None, 5.0)]) == [first.path]


def test_stretches_and_channels_that_do_not_overlap_are_other_audio(tmp_path: Path) -> None:
    whole = Utterance("a", str(tmp_path / "a.wav"), start=1.0, duration=1.0)
    later, other = replace(whole, start=2.0), replace(whole, start=1.5)
    assert not in_both([whole], [later])
    assert in_both([whole], [other]) == [whole.path]
    left, right = replace(whole, channel=0), replace(whole, channel=1)
    assert not in_both([left], [right])
    assert in_both([left], [whole])


@pytest.mark.usefixtures("student")
def test_labels_and_models_that_contradict_the_manifest_are_counted(spkd: Callable, halves: tuple) -> None:
    """Target trials of two speakers, non-target trials of one, a model of two; with scores from files too."""
    a, b, _, c, d = (u.id for u in halves[0].utterances[:5])  # speakers 0, 0, 0, 1, 1
    Path("t.txt").write_text(f"1 {a} {b}\n1 {a} {c}\n0 {a} {d}\n0 {c} {d}\n0 {b} {d}\n")
    spkd("eval", "t.txt", "manifest=test.csv", "bootstrap=0").ok()
    expected = [
        "t.txt: target trials of two speakers, by the manifest: 1 (first: line 2)",
        "t.txt: non-target trials of one speaker, by the manifest: 1 (first: line 4)",
    ]
    assert [note for note in report_of("eval")["notes"] if "by the manifest" in note] == expected
    done = spkd("eval", "t.txt", "--scores", "eval/scores.txt", "manifest=test.csv", "bootstrap=0", "out=theirs")
    assert all(f"note: {note}" in done.out for note in expected), done.err
    Path("map").write_text(f"m {a} {c}\nn {a} {b}\n")
    Path("m.txt").write_text(f"1 m {b}\n0 n {d}\n")
    done = spkd("eval", "m.txt", "enrol.map=map", "manifest=test.csv", "bootstrap=0")
    assert "note: m.txt: models enrolled by utterances of several speakers: 1 (m)" in done.out


@pytest.mark.usefixtures("student")
def test_as_norm_by_few_speakers_is_refused_and_by_some_noted(spkd: Callable, halves: tuple) -> None:
    others, common = halves[1], ["eval", "trials.txt", "manifest=test.csv", "norm=as-norm"]
    for kept, average in ((2, "true"), (9, "true"), (4, "false")):
        Manifest(others.utterances[: COHORT_UTTERANCES * kept]).save("few.csv")
        done = spkd(*common, "cohort=few.csv", f"cohort.average={average}")
        assert (done.code, "it takes at least 10" in done.err) == (2, True)
    done = spkd(*common, "cohort=cohort.csv").ok()
    note = report_of("eval")["notes"][0]
    assert note.startswith("AS-norm takes mean and deviation of 12 cohort scores only")
    assert "standard error of 21 %" in note  # 1 / sqrt(2 (12 - 1))
    assert f"note: {note}" in done.out
    assert "of 12 cohort scores only" in Path("eval/report.html").read_text()
    copies = [replace(others[0], id=f"copy{i}", speaker=f"x{i}") for i in range(12)]
    Manifest(tuple(copies)).save("copies.csv")
    done = spkd(*common, "cohort=copies.csv")
    assert (done.code, "copies of one another" in done.err) == (1, True)


def test_views_of_moved_formants_are_no_cohort(spkd: Callable, halves: tuple, student: Path) -> None:
    """Nor those at another speed: the cohort has as many embeddings as utterances."""
    extract = ["teacher=checkpoint", "teacher.weights=student", "manifest=cohort.csv"]
    spkd("extract", *extract, "cache=c", "view.formants=[0.85,1.0]", "view.speeds=[0.9,1.0]").ok()
    spkd("eval", "trials.txt", "manifest=test.csv", "subtract_mean=true", "cohort=c").ok()
    assert "mean of the 24 embeddings of the cohort" in report_of("eval")["backend"][0]
