"""Enrolments by an old model that are mapped to a new one: evaluated, calibrated, kept as voices and verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import spkd as interface
from spkd.corpus.manifest import Manifest
from spkd.errors import UsageError
from spkd.eval.calibration import Calibration
from spkd.files.vectors import read_vectors
from tests.eval.students import save_untrained
from tests.mapping.spaces import make_spaces

ASYMMETRIC = ("model=new", "enrol.model=other", "enrol.map_by=wide-map")


@pytest.fixture
def spaces(spkd: Callable, corpus: Path, cohort: Path) -> Path:
    """Students, caches and maps of `make_spaces`; test.csv and trials.txt, dev.csv and dev.txt of other speakers, and
    cohort.csv of still others; and recordings by number."""
    make_spaces(spkd, corpus)
    every = Manifest.load(corpus / "manifest.csv").utterances
    for name, trials, part in (("test", "trials", every[:9]), ("dev", "dev", every[9:])):
        Manifest(part).save(Path(f"{name}.csv"))
        pairs = [(a, b) for a in part for b in part if a.id != b.id]
        Path(f"{trials}.txt").write_text("".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs))
    Manifest(Manifest.load(cohort).utterances).save(Path("cohort.csv"))
    # No speech is found in the breathy voice of the first speaker: it comes last.
    for number, utterance in enumerate([*every[3:], *every[:3]]):
        shutil.copy(utterance.path, f"{number}.wav")
    return corpus


def units(vectors: np.ndarray) -> np.ndarray:
    values = vectors.astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def embedded(spkd: Callable, manifest: str, model: str) -> tuple[list[str], np.ndarray]:
    """Names and embeddings of a manifest's utterances, by `spkd embed`."""
    spkd("embed", manifest, f"model={model}", f"out=e-{model}.npy").ok()
    found = list(read_vectors(Path(f"e-{model}.npy")))
    return [name for name, _ in found], np.stack([vector for _, vector in found])


def scores_of(folder: str) -> dict[tuple[str, str], float]:
    lines = Path(folder, "scores.txt").read_text().splitlines()
    return {(a, b): float(score) for a, b, score, _ in map(str.split, lines)}


def test_enrolments_are_mapped_and_recorded(spkd: Callable, spaces: Path) -> None:
    done = spkd("eval", "trials.txt", "manifest=test.csv", *ASYMMETRIC, "bootstrap=0").ok()
    (names, new), (_, other) = embedded(spkd, "test.csv", "new"), embedded(spkd, "test.csv", "other")
    the_map = interface.load_map("wide-map")
    place, expected = {name: i for i, name in enumerate(names)}, units(the_map.map(other)) @ units(new).T
    for (a, b), score in scores_of("eval").items():
        assert abs(score - expected[place[a], place[b]]) < 1e-5
    report = json.loads(Path("eval/report.json").read_text())
    assert report["backend"][:2] == [
        "Enrolment utterances are embedded by another model than test utterances.",
        f"Enrolment embeddings are mapped into the space of test embeddings by the map {the_map.fingerprint[:12]}.",
    ]
    assert f"The map {the_map.fingerprint[:12]} is wide-map." in report["how"]
    note = "The map was trained on 3 of the 3 speakers of trials.txt (spk0, spk1, spk2): its error rates are too low."
    assert note in report["notes"]
    assert f"note: {note}" in done.out


def test_as_norm_has_each_side_of_the_cohort_in_the_space_of_its_own(spkd: Callable, spaces: Path) -> None:
    given = ("norm=as-norm", "cohort=cohort.csv", "cohort.top=10", "cohort.average=false", "subtract_mean=true")
    spkd("eval", "trials.txt", "manifest=test.csv", *ASYMMETRIC, *given, "bootstrap=0").ok()
    the_map, sides = interface.load_map("wide-map"), {}
    for model in ("new", "other"):
        sides[model] = (*embedded(spkd, "test.csv", model), embedded(spkd, "cohort.csv", model)[1])
    names, new, cohort_new = sides["new"]
    enrolled, cohort_enrolled = (the_map.map(part).astype(np.float64) for part in sides["other"][1:])
    left, right = units(enrolled - cohort_enrolled.mean(0)), units(new - cohort_new.astype(np.float64).mean(0))
    cohort_left = units(cohort_enrolled - cohort_enrolled.mean(0))
    cohort_right = units(cohort_new - cohort_new.astype(np.float64).mean(0))

    def top(scores: np.ndarray) -> tuple[float, float]:
        highest = np.sort(scores)[-10:]
        return highest.mean(), highest.std()

    place = {name: i for i, name in enumerate(names)}
    for (a, b), score in scores_of("eval").items():
        e, t = left[place[a]], right[place[b]]
        raw, (m1, s1), (m2, s2) = e @ t, top(cohort_right @ e), top(cohort_left @ t)
        assert abs(score - 0.5 * ((raw - m1) / s1 + (raw - m2) / s2)) < 1e-3


def test_a_map_that_does_not_fit_is_refused_before_the_work(spkd: Callable, spaces: Path) -> None:
    given = ("trials.txt", "manifest=test.csv", "bootstrap=0")
    for more, message in (
        (("model=new", "enrol.model=other"), "be mapped (enrol.map_by=FOLDER, by `spkd map`)"),
        (("model=new", "enrol.map_by=map"), "enrol.map_by=map has no effect: no enrol.model is set"),
        (("model=new", "enrol.model=old", "enrol.map_by=nosuch"), "nosuch: no map (map.json, map.safetensors)"),
        (("model=new", "enrol.model=old", "enrol.map_by=wide-map"), "maps from checkpoint other ("),
        (("model=old", "enrol.model=new", "enrol.map_by=map"), "and enrol.model is checkpoint new ("),
        (("model=other", "enrol.model=old", "enrol.map_by=map"), "and model is checkpoint other ("),
        (
            ("model=new", "enrol.model=old", "enrol.model.precision=bf16", "enrol.map_by=map"),
            "maps from checkpoint old",
        ),
        ((*ASYMMETRIC, "out=map"), "map: holds a map (map.json); choose another folder for an evaluation"),
    ):
        done = spkd("eval", *given, *more)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), (more, done.err)
        assert not Path("eval/report.json").exists()
    Path("s.txt").write_text("a b 0.5 target\na c 0.1 nontarget\n")
    done = spkd("eval", "--scores", "s.txt", "enrol.map_by=map")
    assert (done.code, "enrol.map_by=map has no effect" in done.err) == (2, True)
    # The same student elsewhere is the same model.
    shutil.copytree("new", "moved")
    spkd("eval", *given, "model=moved", "enrol.model=old", "enrol.map_by=map").ok()


def test_a_calibration_of_mapped_enrolments_is_kept_with_the_map(spkd: Callable, spaces: Path) -> None:
    given = ("dev.txt", "manifest=dev.csv", "force=true")
    assert spkd("calibrate", *given, *ASYMMETRIC).ok().out.splitlines()[-2].startswith("wide-map/calibration.json: ")
    found = Calibration.of_map(Path("wide-map/calibration.json"), interface.load_map("wide-map"))
    assert found.names_speakers
    test = ("trials.txt", "manifest=test.csv", "bootstrap=0", "calibration=wide-map/calibration.json")
    spkd("eval", *test, *ASYMMETRIC, "out=calibrated").ok()
    spkd("eval", *test[:3], *ASYMMETRIC, "out=plain").ok()
    plain = scores_of("plain")
    for pair, ratio in scores_of("calibrated").items():
        assert abs(ratio - (found.weights[0] * plain[pair] + found.offset)) < 1e-4
    # It is not for the scores of one model, nor for those of another map.
    for more in (("model=new",), ("model=new", "enrol.model=old", "enrol.map_by=map")):
        done = spkd("eval", *test, *more, "out=refused")
        assert (done.code, "calibration.json: " in done.err) == (1, True), done.err
    # With more than plain cosines, a file is named.
    done = spkd("calibrate", *given, *ASYMMETRIC, "norm=as-norm", "cohort=cohort.csv")
    assert (done.code, "name the file to write (out=FILE)" in done.err) == (2, True)
    # A map that was made anew has no calibration yet.
    spkd("map", "other-cache", "new-cache", "out=wide-map", "hidden=0", "seed=1").ok()
    spkd("enrol", "ann", "0.wav", "model=other").ok()
    spkd("voices", "--map", "wide-map", "--out", "mapped.json").ok()
    done = spkd("verify", "ann", "1.wav", "model=new", "voices=mapped.json", "map_by=wide-map")
    assert (done.code, "of another map than the one beside it; run `spkd calibrate` with it again" in done.err) == (
        1,
        True,
    )


def test_voices_move_to_a_new_model(spkd: Callable, spaces: Path) -> None:
    spkd("enrol", "ann", "0.wav", "1.wav", "model=other").ok()
    spkd("enrol", "bob", "6.wav", "model=other").ok()
    # The new model refuses them, and names the way.
    done = spkd("enrol", "eve", "12.wav", "model=new")
    way = "`spkd map OLD_CACHE NEW_CACHE`, then `spkd voices voices.json --map map --out FILE`"
    assert (done.code, way in done.err) == (2, True)
    before = Path("voices.json").read_bytes()
    shown = spkd("voices", "--map", "wide-map", "--out", "new.json").ok().out.splitlines()
    assert shown[0].startswith("new.json: 2 voices, mapped from checkpoint other (")
    assert "no decision on them without a calibration of the map: make one with `spkd calibrate" in shown[1]
    assert Path("voices.json").read_bytes() == before
    spkd("voices", "--map", "wide-map", "--out", "new.json").ok()  # again, as after a power cut
    listed = spkd("voices", "new.json").ok().out.splitlines()
    assert [line.rpartition(", ")[2] for line in listed] == [
        f"mapped by {interface.load_map('wide-map').fingerprint[:12]}"
    ] * 2
    # Scores: the mean direction of the old embeddings, mapped, against the new embedding of the test.
    old, new, the_map = interface.load("other"), interface.load("new"), interface.load_map("wide-map")
    mean = units(old.embed(["0.wav", "1.wav"])).mean(0)
    test = units(new.embed(["2.wav"]))[0]
    expected = np.linalg.norm(mean) * (the_map.map(mean).astype(np.float64) @ test)
    voices = interface.Voices.load("new.json")
    assert new.score(voices["ann"], "2.wav") == pytest.approx(expected, abs=1e-5)
    assert (voices["ann"].mapped_by, voices["ann"].recordings) == (the_map.fingerprint, 2)
    # The calibration of the new model is not for them: no decision without that of the map.
    spkd("calibrate", "dev.txt", "manifest=dev.csv", "model=new", "force=true").ok()
    shown = spkd("verify", "ann", "2.wav", "model=new", "voices=new.json").ok().out
    assert shown.startswith(
        f"ann, 2.wav: no decision, as no calibration of the map {the_map.fingerprint[:12]} is given"
    )
    assert f"cosine {expected:.4f}"[:-1] in shown
    assert "no decision, as no calibration of the map" in spkd("identify", "2.wav", "model=new", "voices=new.json").out
    with pytest.raises(
        UsageError, match="new: no calibration of the map .* is given; give it .map_by=MAP., or make one"
    ):
        interface.load("new").verify(voices["ann"], "2.wav")
    done = spkd("verify", "ann", "2.wav", "model=new", "voices=new.json", "map_by=wide-map")
    assert (done.code, "map_by=wide-map: has no calibration; make one with `spkd calibrate" in done.err) == (2, True)
    # With it.
    spkd("calibrate", "dev.txt", "manifest=dev.csv", "force=true", *ASYMMETRIC).ok()
    of_map, own = Calibration.load("wide-map/calibration.json"), Calibration.load("new/calibration.json")
    model = interface.load("new", map_by="wide-map")
    found = model.verify(voices["ann"], "2.wav")
    assert found.ratio == pytest.approx(of_map.weights[0] * expected + of_map.offset, abs=1e-3)
    assert (found.threshold, found.same) == (of_map.thresholds["eer"], found.ratio >= of_map.thresholds["eer"])
    shown = spkd("verify", "ann", "2.wav", "model=new", "voices=new.json", "map_by=wide-map").ok().out
    assert f"log-likelihood ratio {found.ratio:.2f}: " in shown
    # Somebody who is enrolled by the new model stands beside them, by its own calibration.
    spkd("enrol", "eve", "12.wav", "model=new", "voices=new.json").ok()
    voices = interface.Voices.load("new.json")
    results = model.identify("2.wav", voices, -1e6).results
    cosine = units(new.embed(["12.wav"]))[0] @ test
    assert results["eve"].ratio == pytest.approx(own.weights[0] * cosine + own.offset, abs=1e-3)
    assert results["ann"].ratio == pytest.approx(found.ratio, abs=1e-6)
    assert [each.ratio for each in results.values()] == sorted((each.ratio for each in results.values()), reverse=True)
    with pytest.raises(UsageError, match="both were mapped from another model; compare a voice with a recording"):
        model.verify(voices["ann"], voices["bob"])


def test_voices_that_cannot_be_mapped_are_a_line(spkd: Callable, spaces: Path) -> None:
    spkd("enrol", "ann", "0.wav", "model=other").ok()
    Path("mine.json").write_text("{}")
    spkd("enrol", "bob", "1.wav", "model=new", "voices=taken.json").ok()
    for words, message in (
        (("--map", "wide-map"), "voices are mapped by --map MAP and --out FILE together"),
        (("--out", "x.json"), "voices are mapped by --map MAP and --out FILE together"),
        (("--map", "wide-map", "--out", "x.json", "--remove", "ann"), "together, and without --remove"),
        (("--map", "nosuch", "--out", "x.json"), "nosuch: no map"),
        (("--map", "map", "--out", "x.json"), "voices.json: the map"),
        (("--map", "wide-map", "--out", "taken.json"), "taken.json: holds other voices"),
        (("--map", "wide-map", "--out", "voices.json"), "voices.json: holds other voices"),
        (("none.json", "--map", "wide-map", "--out", "x.json"), "no voices none.json"),
    ):
        done = spkd("voices", *words)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), (words, done.err)
    assert spkd("voices", "--map", "wide-map", "--out", "mine.json").code == 1
    assert Path("mine.json").read_text() == "{}"
    assert not list(Path().glob("x.json*"))
    # The setting is for mapped voices, and the map for this model.
    done = spkd("verify", "ann", "1.wav", "model=other", "map_by=wide-map")
    assert (done.code, "map_by=wide-map has no effect: no voice here was mapped" in done.err) == (2, True)
    spkd("voices", "--map", "wide-map", "--out", "new.json").ok()
    done = spkd("verify", "ann", "1.wav", "model=other", "voices=new.json", "map_by=wide-map")
    assert (done.code, "map_by=wide-map: maps to checkpoint new (" in done.err) == (2, True)
    done = spkd("verify", "ann", "1.wav", "model=other", "voices=new.json")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err


def test_a_map_is_to_one_dimension_of_a_nested_student(spkd: Callable, spaces: Path) -> None:
    save_untrained(Path("nested"), spaces, seed=2, embedding=8, nested=(4, 8))
    given = ("teacher=checkpoint", "teacher.weights=nested", "teacher.dimension=4", f"manifest={spaces}/manifest.csv")
    spkd("extract", *given, "cache=nested-cache").ok()
    spkd("map", "old-cache", "nested-cache", "out=to-nested", "steps=1").ok()
    sides = ("model=nested", "enrol.model=old", "enrol.map_by=to-nested")
    test = ("trials.txt", "manifest=test.csv", "bootstrap=0")
    spkd("eval", *test, *sides, "model.dimension=4").ok()
    done = spkd("eval", *test, *sides, "out=whole")
    assert (done.code, "to-nested: maps from checkpoint old (" in done.err) == (2, True)
    names, old = embedded(spkd, "test.csv", "old")
    new = embedded(spkd, "test.csv", "nested")[1][:, :4]
    expected = units(interface.load_map("to-nested").map(old)) @ units(new).T
    for (a, b), score in scores_of("eval").items():
        assert abs(score - expected[names.index(a), names.index(b)]) < 1e-5
    spkd("calibrate", "dev.txt", "manifest=dev.csv", "force=true", *sides, "model.dimension=4").ok()
    spkd("enrol", "ann", "0.wav", "model=old").ok()
    spkd("voices", "--map", "to-nested", "--out", "new.json").ok()
    verify = ("verify", "ann", "1.wav", "model=nested", "voices=new.json", "map_by=to-nested")
    assert "log-likelihood ratio" in spkd(*verify, "model.dimension=4").ok().out
    assert spkd(*verify).code == 2
