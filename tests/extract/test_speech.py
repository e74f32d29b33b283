"""Silence left out: the same speech in extraction, training, evaluation, calibration and Python, by real commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import spkd as package
from spkd.cache import Cache
from spkd.cache.plan import Plan, with_speech
from spkd.config import load
from spkd.corpus.audio import AudioError
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.utterance import Utterance
from spkd.corpus.vad.base import Stretches
from spkd.corpus.vad.energy import Energy
from spkd.errors import SpkdError, UsageError
from spkd.extract.estimate import estimate
from spkd.extract.ranks import Rank
from spkd.extract.settings import EstimateConfig
from spkd.extract.speech import forget, found_speech
from tests.conftest import Paused, save_teacher

TEACHER = ["teacher=checkpoint", "teacher.weights=teacher", "fbank=true"]
VIEWS = ["view=crops:3,0.6", "view.speeds=[0.9,1.0]"]


def segments(paused: Paused) -> str:
    return f"view.vad={paused.segments}"


def stored(path: str) -> dict[str, np.ndarray]:
    """Every target of a cache, in the order of its views."""
    cache = Cache.open(path)
    views = cache.usable_views[:]
    return {
        name: np.concatenate(
            [cache.batch(views[i : i + 1], [name])[name].numpy().reshape(-1) for i in range(len(views))]
        )
        for name in cache.targets
    }


@pytest.fixture
def caches(spkd: Callable, paused: Paused) -> None:
    """`spoken` of the utterances' speech, and `cut` of the same audio cut by hand."""
    save_teacher(Path("teacher"))
    spkd.once("spoken", "extract", *TEACHER, *VIEWS, paused.whole, segments(paused), "cache=spoken")
    spkd.once("cut", "extract", *TEACHER, *VIEWS, paused.cut, "cache=cut")


@pytest.mark.usefixtures("caches")
def test_a_cache_of_speech_is_that_of_the_audio_cut_by_hand(spkd: Callable, paused: Paused) -> None:
    ours, theirs = stored("spoken"), stored("cut")
    assert list(ours) == ["embedding", "fbank"]
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])
    info = spkd("cache", "info", "spoken").ok().out
    assert "of speech alone (segments)" in info
    assert Path("spoken/rejected.csv").read_text().splitlines()[1] == f"{paused.last},not in the file of segments"
    assert not Path("spoken/speech").exists()
    assert Cache.open("spoken").card.identity != Cache.open("cut").card.identity


@pytest.mark.slow
@pytest.mark.usefixtures("caches")
def test_the_plan_keeps_the_speech(spkd: Callable, paused: Paused) -> None:
    """In its file, mapped, merged, and in the tars of an export with audio."""
    expected = [line.split() for line in paused.segments.read_text().splitlines()]
    cache = Cache.open("spoken")
    for plan in (cache.plan, Plan.load(Path("spoken"), cache.card)):
        assert plan.speech is not None
        found = [pair for number in range(len(plan.utterances)) for pair in plan.speech.stretches(number)]
        assert found == [(round(16_000 * float(a)), round(16_000 * float(b))) for _, _, a, b in expected]
    spkd("cache", "verify", "spoken").ok()
    spkd(
        "cache", "verify", "spoken", "--live", "20", "teacher=checkpoint", "teacher.weights=teacher", paused.whole
    ).ok()
    halves = paused.segments.read_text().splitlines(keepends=True)
    for number, share in enumerate((halves[:12], halves[12:])):
        Path(f"segments{number}").write_text("".join(share))
        spkd("extract", *TEACHER, *VIEWS, paused.whole, f"view.vad=segments{number}", f"cache=half{number}").ok()
    spkd("cache", "merge", "half0", "half1", "merged").ok()
    merged = Cache.open("merged")
    assert merged.plan.speech is not None
    assert [merged.plan.speech.stretches(n) for n in range(12)] == [cache.plan.speech.stretches(n) for n in range(12)]
    whole = measure(Manifest.load(paused.root / "whole.csv"))[0]
    ours, theirs = (each.view_loader(whole, None, None) for each in (merged, cache))
    for view in range(len(cache.plan.views)):
        np.testing.assert_array_equal(ours(view), theirs(view))
    spkd("cache", "export", "spoken", "tars", "--audio", paused.whole).ok()
    spkd("cache", "import", "tars", "back").ok()
    assert Cache.open("back").fingerprint == cache.fingerprint


@pytest.mark.usefixtures("caches")
def test_another_manifest_or_other_speech_is_another_cache(spkd: Callable, paused: Paused) -> None:
    done = spkd("extract", *TEACHER, *VIEWS, paused.whole, "view.vad=energy", "cache=spoken")
    assert (done.code, "another view plan (vad.detector" in done.err) == (2, True), done.err
    done = spkd("extract", *TEACHER, *VIEWS, paused.whole, "cache=spoken")
    assert (done.code, "another view plan" in done.err) == (2, True), done.err
    Path("other").write_text(paused.segments.read_text().replace("s1-u1-0 s1-u1 0.", "s1-u1-0 s1-u1 0.0"))
    done = spkd("extract", *TEACHER, *VIEWS, paused.whole, "view.vad=other", "cache=spoken")
    assert (done.code, "holds a cache of another manifest" in done.err) == (2, True), done.err
    # The audio of a cache: a file that is now longer is not the one whose speech is known.
    for path in paused.root.glob("*-whole.flac"):
        samples = soundfile.read(path, dtype="int16")[0]
        soundfile.write(
            path.name,
            np.append(samples, samples[:800] if path.name.startswith("s2-u0") else []).astype("int16"),
            16_000,
        )
    Path("m.csv").write_text((paused.root / "whole.csv").read_text().replace("silent,silent.flac,s0", ""))
    done = spkd(
        "cache", "verify", "spoken", "--live", "3", "teacher=checkpoint", "teacher.weights=teacher", "manifest=m.csv"
    )
    assert (done.code, "extracted from another manifest" in done.err) == (1, True), done.err


@pytest.mark.slow
def test_a_cache_of_speech_grows(spkd: Callable, paused: Paused) -> None:
    save_teacher(Path("teacher"))
    whole = Manifest.load(paused.root / "whole.csv")
    Manifest(whole.utterances[:5]).save("few.csv")
    for manifest, cache in (
        ("few.csv", "grown"),
        (paused.root / "whole.csv", "grown"),
        (paused.root / "whole.csv", "new"),
    ):
        spkd("extract", *TEACHER, *VIEWS, f"manifest={manifest}", "view.vad=energy", f"cache={cache}").ok()
    assert len(Cache.open("grown").card.parts) == 2
    for name, values in stored("grown").items():
        np.testing.assert_array_equal(values, stored("new")[name])
    loaders = [Cache.open(name).view_loader(whole, None, None) for name in ("grown", "new")]
    for view in range(len(Cache.open("new").plan.views)):
        np.testing.assert_array_equal(loaders[0](view), loaders[1](view))


class Counting(Energy):
    """The detector, which keeps the names of the utterances that it was asked for, and may be killed.

    Args:
        most: utterances after which it is interrupted.
    """

    def __init__(self, most: int = 1000, shift: int = 0) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._most, self._shift = most, shift

    def stretches(self, utterance: Utterance) -> Stretches:
        if len(self.asked) == self._most:
            raise KeyboardInterrupt
        self.asked.append(utterance.id)
        return [(first + self._shift, last) for first, last in super().stretches(utterance)]


@pytest.fixture
def measured(paused: Paused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spkd.extract.speech.CHUNK", 2)
    return measure(Manifest.load(paused.root / "whole.csv"))[0]


def test_what_was_found_before_a_kill_is_not_found_again(measured: Manifest) -> None:
    root = Path("cache")
    with pytest.raises(KeyboardInterrupt):
        found_speech(root, measured, Counting(7), 1)
    rest = Counting()
    found, left_out = found_speech(root, measured, rest, 1)
    assert rest.asked == [u.id for u in measured][6:]
    assert left_out == {"silent": "no speech in it (energy 1)"}
    expected, _ = found_speech(Path("other"), measured, Energy(), 2)
    assert found.utterances == expected.utterances
    # A damaged file is found again, and what is there of another detector is not taken.
    path = sorted(Path("cache/speech").iterdir())[0]
    path.write_text(path.read_text().replace("160", "320"))
    again = Counting()
    assert found_speech(root, measured, again, 1)[0].utterances == expected.utterances
    assert len(again.asked) in (1, 2)
    tree = json.loads(path.read_text())
    assert tree["spkd_speech"] == 1
    forget(root)
    assert not Path("cache/speech").exists()


def test_a_chunk_is_no_longer_than_some_hours(measured: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spkd.extract.speech.CHUNK", 100)
    monkeypatch.setattr("spkd.extract.speech.SECONDS", 6.0)
    with pytest.raises(KeyboardInterrupt):
        found_speech(Path("cache"), measured, Counting(8), 1)
    rest = Counting()
    found_speech(Path("cache"), measured, rest, 1)
    ends, seconds = [0], 0.0
    for number, one in enumerate(measured, 1):
        seconds += one.duration or 0.0
        if seconds >= 6.0:
            ends, seconds = [*ends, number], 0.0
    kept = max(end for end in ends if end <= 8)
    assert 0 < kept < 13
    assert rest.asked == [u.id for u in measured][kept:]


def test_nothing_is_listened_to_for_a_folder_that_is_refused(spkd: Callable, paused: Paused) -> None:
    save_teacher(Path("teacher"))
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(b"x")
    done = spkd("extract", *TEACHER, paused.whole, "view.vad=energy", "cache=photos")
    assert (done.code, "photos: is not empty and holds no teacher cache" in done.err) == (2, True), done.err
    assert [path.name for path in Path("photos").iterdir()] == ["a.jpg"]
    spkd("extract", *TEACHER, paused.cut, "cache=c").ok()
    done = spkd("extract", *TEACHER, paused.whole, "view.vad=energy", "cache=c")
    assert (done.code, "holds a cache of another view plan (vad" in done.err) == (2, True), done.err
    assert not Path("c/speech").exists()
    # What was found is in the plan, and not beside it.
    spkd("extract", *TEACHER, paused.whole, "view.vad=energy", "cache=d").ok()
    assert not Path("d/speech").exists()
    whole, plan = measure(Manifest.load(paused.root / "whole.csv"))[0], Cache.open("d").plan
    assert [u.speech is None for u in with_speech(whole, plan)] == [False] * 12 + [True]
    other = Manifest(tuple(replace(u, duration=(u.duration or 0) + 0.002) for u in whole))
    assert all(u.speech is None for u in with_speech(other, plan))


def test_ranks_share_the_work_and_agree(measured: Manifest) -> None:
    """Each begins at another chunk; where another was first, its result counts."""
    first, second = Counting(), Counting(shift=16)
    begun = found_speech(Path("cache"), Manifest(measured.utterances[4:8], "m"), second, 1, Rank(1, 2, "x"))[0]
    found, _ = found_speech(Path("cache"), measured, first, 1, Rank(0, 2, "x"))
    assert sorted([*first.asked, *second.asked]) == sorted(u.id for u in measured)
    assert found.utterances[4:8] == begun.utterances


def test_a_rank_leaves_out_what_another_found_meanwhile(measured: Manifest) -> None:
    class Slow(Counting):
        def stretches(self, utterance: Utterance) -> Stretches:
            if not self.asked:
                found_speech(Path("cache"), measured, other, 1, Rank(1, 2, "x"))
            return super().stretches(utterance)

    slow, other = Slow(), Counting()
    found_speech(Path("cache"), measured, slow, 1, Rank(0, 2, "x"))
    names = [u.id for u in measured]
    assert slow.asked == names[:2]  # the chunk that it had begun
    assert other.asked == [*names[6:], *names[:6]]


@pytest.mark.parametrize("failing", [["s1-u0"], ["s0-u0", "s0-u1"], "all"])
def test_audio_that_cannot_be_used_is_tried_again(measured: Manifest, failing: list[str] | str) -> None:
    class Failing(Counting):
        def stretches(self, utterance: Utterance) -> Stretches:
            if failing == "all" or utterance.id in failing:
                self.asked.append(utterance.id)
                raise AudioError(utterance.path, "cannot be decoded")
            return super().stretches(utterance)

    for _ in range(2):
        tried = Failing()
        found, left_out = found_speech(Path("cache"), measured, tried, 1)
        bad = [u.id for u in measured if failing == "all" or u.id in failing]
        assert [name for name in left_out if left_out[name] == "cannot be decoded"] == bad
        assert set(bad) <= set(tried.asked)
    again = Counting()
    assert len(found_speech(Path("cache"), measured, again, 1)[0]) == 12
    assert again.asked == bad
    assert len(found) == len([name for name in (u.id for u in measured) if name not in {*bad, "silent"}])


def losses(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{folder}/model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("caches")
def test_training_on_fresh_audio_takes_the_speech(spkd: Callable, paused: Paused) -> None:
    """A student of the cache's speech is that of the audio cut by hand, and its card says what it was trained on."""
    keys = ["--loss", "cosine", "student=tiny", "steps=2", "batch_size=4", "crop=0.4", "augment.noise=synthetic"]
    keys += ["augment.noise_prob=1", "loggers=[]", "workers=0", "device=cpu"]
    done = spkd("train", *keys, "cache=spoken", paused.whole, "out=a").ok()
    spkd("train", *keys, "cache=cut", paused.cut, "out=b").ok()
    assert all(torch.equal(value, losses("b")[name]) for name, value in losses("a").items())
    described = json.loads(Path("a/model.json").read_text())["training"]["settings"]
    assert described["vad"] == ["segments"]
    assert "vad" not in json.loads(Path("b/model.json").read_text())["training"]["settings"]
    # Who runs an exported file is reminded.
    done = spkd("export", "a", "--to", "pt2").ok()
    note = "the student was trained with vad=segments: what runs the file has to leave silence out as well"
    assert f"note: {note}" in done.out
    # Evaluation with anything else is noted, in the report too.
    trials, note = str(paused.root / "trials.txt"), "The student was trained with vad="
    done = spkd("eval", trials, "model=a", paused.whole, "out=e1", "bootstrap=0").ok()
    assert f"note: {note}segments, and is used with vad=none." in done.out
    assert any(note in text for text in json.loads(Path("e1/report.json").read_text())["notes"])
    done = spkd("eval", trials, "model=a", paused.whole, f"vad={paused.segments}", "out=e2", "bootstrap=0").ok()
    assert note not in done.out
    done = spkd("embed", paused.root / "cut.csv", "model=b", "vad=energy", "out=x.npy").ok()
    assert f"note: {note}none, and is used with vad=energy 1." in done.out


def scores(folder: str) -> list[str]:
    return Path(folder, "scores.txt").read_text().splitlines()


@pytest.mark.slow
def test_eval_embed_calibrate_and_python_take_the_same_speech(spkd: Callable, paused: Paused) -> None:
    save_teacher(Path("teacher"))
    model, trials = "model=teacher", str(paused.root / "trials.txt")
    vad = f"vad={paused.segments}"
    # Embeddings and scores are those of the audio cut by hand.
    done = spkd("embed", paused.root / "whole.csv", model, vad, "out=spoken.npy").ok()
    assert f"{paused.last}: not in the file of segments" in done.err
    spkd("embed", paused.root / "cut.csv", model, "out=cut.npy").ok()
    np.testing.assert_array_equal(np.load("spoken.npy"), np.load("cut.npy"))
    by = "by=[duration,speech]"
    spkd("eval", trials, model, paused.whole, vad, by, "out=spoken", "bootstrap=0").ok()
    spkd("eval", trials, model, paused.cut, "out=cut", "bootstrap=0").ok()
    assert scores("spoken") == scores("cut")
    broken = json.loads(Path("spoken/report.json").read_text())["breakdown"]
    lengths = {name: [float(g["name"].split(" to ")[0].split(" / ")[0]) for g in broken[name]] for name in broken}
    assert max(lengths["speech"]) < min(lengths["duration"])
    # A calibration with its quality measures holds for this detector alone.
    calibrate = ["calibrate", trials, model, paused.whole, "force=true"]
    done = spkd(*calibrate, vad, "quality=[speech,duration]", "out=c.json").ok()
    assert "speech.low" in done.out
    done = spkd("eval", trials, model, paused.whole, "calibration=c.json", "out=e")
    assert (done.code, "trained on the scores of another system (vad: segments; here )" in done.err) == (1, True), (
        done.err
    )
    done = spkd(*calibrate, "quality=[speech]", "out=d.json")
    assert (done.code, "quality=speech: not known here" in done.err) == (2, True), done.err
    # Python takes a detector, and refuses a calibration with another.
    spkd("embed", paused.root / "whole.csv", model, "vad=energy", "out=energy.npy").ok()
    loaded = package.load("teacher", vad="energy", device="cpu")
    names = Path("energy.txt").read_text().split()
    paths = [str(paused.root / f"{name}-whole.flac") for name in names]
    np.testing.assert_array_equal(loaded.embed(paths), np.load("energy.npy"))
    wave = soundfile.read(paths[0], dtype="float32")[0]
    np.testing.assert_array_equal(loaded.embed(wave), loaded.embed(paths[0]))
    with pytest.raises(SpkdError, match=r"no speech in a recording of 2.00 s \(energy 1\)"):
        loaded.embed(str(paused.root / "silent.flac"))
    spkd(*calibrate, "vad=energy").ok()
    assert package.load("teacher", vad="energy", device="cpu").verify(paths[0], paths[1]).same is not None
    with pytest.raises(UsageError, match="calibrated with vad=energy 1, and loaded with vad=none; load it with"):
        package.load("teacher", device="cpu").verify(paths[0], paths[1])
    with pytest.raises(UsageError, match="vad=silerro: none, silero, energy"):
        package.load("teacher", vad="silerro")


@pytest.mark.slow
def test_validation_takes_its_speech_once(spkd: Callable, paused: Paused) -> None:
    save_teacher(Path("teacher"))
    whole = Manifest.load(paused.root / "whole.csv")
    Manifest(tuple(u for u in whole if u.speaker in ("s0", "s1"))).save("m.csv")
    spkd("extract", *TEACHER, *VIEWS, "manifest=m.csv", "view.vad=energy", "cache=c").ok()
    lines = (paused.root / "trials.txt").read_text().splitlines(keepends=True)
    Path("t.txt").write_text("".join(line for line in lines if "s0" not in line and "s1" not in line))
    valid = ["valid.trials=t.txt", f"valid.{paused.whole}", "valid.every=1"]
    keys = ["--loss", "cosine", "student=tiny", "batch_size=4", "crop=0.4", "loggers=[]", "device=cpu", "cache=c"]
    keys += ["steps=2"]
    done = spkd("train", *keys, *valid, "valid.vad=energy", "out=a").ok()
    assert "note: the cache's views are with" not in done.out
    rates = re.findall(r"EER ([\d.]+) %", done.out)
    spkd("eval", "t.txt", "model=a", paused.whole, "vad=energy", "out=e", "bootstrap=0").ok()
    results = json.loads(Path("e/report.json").read_text())["results"]
    assert float(rates[1]) == pytest.approx(results["eer_percent"], abs=1e-3)
    # Rates with other speech are not compared: a run that goes on begins anew with its best.
    done = spkd("train", *keys[:-1], "steps=3", "optim.schedule=constant", *valid, "valid.vad=energy", "out=g").ok()
    done = spkd("train", *keys[:-1], "steps=4", "optim.schedule=constant", *valid, "out=g").ok()
    assert re.search(
        r"or they had another valid.vad: their lowest EER, [\d.]+ % after \d steps?, does not count", done.out
    )
    done = spkd("train", *keys, *valid, "out=b").ok()
    assert "note: the cache's views are with view.vad=energy, validation is with valid.vad=none" in done.out
    done = spkd("train", *keys, "valid.vad=energy", "out=d")
    assert (done.code, "valid.vad=energy has no effect: no valid.trials are set" in done.err) == (2, True), done.err


@pytest.mark.slow
def test_silero_is_one_of_them(spkd: Callable, paused: Paused) -> None:
    pytest.importorskip("silero_vad")
    save_teacher(Path("teacher"))
    spkd("extract", *TEACHER, paused.whole, "view.vad=silero", "cache=c").ok()
    card = Cache.open("c").card.views.vad
    assert card is not None
    assert (card.detector, len(card.weights_sha256)) == ("silero", 64)
    spkd("embed", paused.root / "whole.csv", "model=teacher", "vad=silero", "out=x.npy").ok()
    cache, names = Cache.open("c"), Path("x.txt").read_text().split()
    assert list(cache.plan.utterances) == names
    embeddings = cache.batch(np.arange(len(names)), ["embedding"])["embedding"].float().numpy()
    np.testing.assert_allclose(np.load("x.npy"), embeddings, atol=1e-3)
    assert 0 < len(names) <= 12


@pytest.mark.slow
def test_an_estimate_counts_the_segments_and_notes_a_detector(
    paused: Paused, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spkd.extract.estimate.CALIBRATION", 0.01)
    given = ["teacher=none", "fbank=true", paused.whole]
    whole, spoken, detected = (
        estimate(load(EstimateConfig, [*given, *keys], environ={})).hours
        for keys in ([], [segments(paused)], ["view.vad=energy"])
    )
    assert spoken * 3600 == pytest.approx(
        sum(u.duration or 0 for u in measure(Manifest.load(paused.root / "cut.csv"))[0])
    )
    assert whole == detected > spoken
    printed = capsys.readouterr().out
    assert "note: view.vad=energy leaves silence out: with it, the cache is smaller than estimated here" in printed


def test_without_any_speech_nothing_is_extracted(spkd: Callable, paused: Paused) -> None:
    save_teacher(Path("teacher"))
    Path("none.csv").write_text(f"utt,path,speaker\nsilent,{paused.root / 'silent.flac'},a\n")
    done = spkd("extract", *TEACHER, "manifest=none.csv", "view.vad=energy")
    assert (done.code, "silent.flac: no speech in it (energy 1)" in done.err) == (1, True), done.err
    done = spkd("embed", "none.csv", "model=teacher", "vad=energy")
    assert (done.code, "silent: no speech in it (energy 1)" in done.err) == (1, True), done.err
