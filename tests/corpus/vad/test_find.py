"""Utterances of speech alone: their stretches joined are the utterance, whatever takes views of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import ViewConfig
from spkd.corpus.utterance import Speech, Utterance
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.base import VADCard, joined
from spkd.corpus.vad.energy import Energy
from spkd.corpus.vad.find import speech_alone
from spkd.corpus.view import ViewPlan

PLANS = {
    "full": ViewConfig(),
    "speeds": ViewConfig(speeds=[0.9, 1.0, 1.1], formants=[1.0, 1.1]),
    "drawn": ViewConfig(plan="full:3", speeds=[0.9, 1.1]),
    "windows": ViewConfig(plan="windows:0.5/0.2", speeds=[1.0, 1.1]),
    "crops": ViewConfig(plan="crops:5,0.7", speeds=[0.9, 1.1], noise="synthetic", noise_prob=1.0),
    "longer than the utterance": ViewConfig(plan="crops:2,9"),
}
STRETCHES = {
    "one": [(160, 20_000)],
    "two": [(100, 9000), (30_001, 47_999)],
    "many": [(n, n + 999) for n in range(0, 48_000, 3000)],
}


@pytest.fixture
def both(tmp_path: Path) -> tuple[Manifest, Manifest]:
    """Recordings with their speech, some of them within longer files; and the same cut and joined by hand."""
    random, whole, cut = np.random.RandomState(0), list[Utterance](), list[Utterance]()
    segments = []
    for number, (name, stretches) in enumerate(STRETCHES.items()):
        samples = random.randint(-9000, 9000, 48_000 + 8000 * number).astype(np.int16)
        start = 8000 * number  # of the utterance within its file
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
        pieces = [samples[start + first : start + last] for first, last in stretches]
        soundfile.write(tmp_path / f"{name}-cut.flac", np.concatenate(pieces), 16_000)
        whole.append(Utterance(name, str(tmp_path / f"{name}.wav"), "a", 3.0, start / 16_000))
        cut.append(Utterance(name, str(tmp_path / f"{name}-cut.flac"), "a", sum(map(len, pieces)) / 16_000))
        segments += [f"{name} {(start + first) / 16_000} {(start + last) / 16_000}\n" for first, last in stretches]
    (tmp_path / "segments").write_text("".join(segments))
    found, left_out = speech_alone(Manifest(tuple(whole)), finder_of(str(tmp_path / "segments")))
    assert left_out == {}
    return found, Manifest(tuple(cut))


@pytest.mark.parametrize("name", list(PLANS))
def test_views_are_those_of_the_audio_cut_and_joined_by_hand(both: tuple[Manifest, Manifest], name: str) -> None:
    plan = ViewPlan.parse(PLANS[name])
    loaders = [ViewLoader(manifest, plan.views(manifest), plan) for manifest in both]
    for column, values in loaders[1].views.columns().items():
        np.testing.assert_array_equal(getattr(loaders[0].views, column), values)
    for view in range(len(loaders[0].views)):
        np.testing.assert_array_equal(loaders[0](view), loaders[1](view))


def test_a_stretch_lies_where_its_samples_are() -> None:
    utterance = Utterance("a", "a.wav", duration=5.0).of_speech([(10, 20), (50, 55), (90, 100)], 16_000)
    samples = np.concatenate([np.arange(10, 20), np.arange(50, 55), np.arange(90, 100)])
    for start in range(25):
        for stop in range(start + 1, 26):
            places = [np.arange(first, last) for first, last in utterance.places(start, stop)]
            np.testing.assert_array_equal(np.concatenate(places), samples[start:stop])
    assert (utterance.duration, utterance.whole) == (25 / 16_000, 5.0)
    assert (utterance.attribute("duration"), utterance.attribute("speech")) == ("5.0", str(25 / 16_000))
    assert Utterance("a", "a.wav", attributes=(("speech", "clear"),)).attribute("speech") == "clear"


def test_audio_at_another_rate_is_cut_after_it_is_resampled(tmp_path: Path) -> None:
    """Within the filter's reach of a cut, neighbours are missing that the whole file has."""
    wave = (0.1 * np.random.RandomState(0).randn(24_000)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    whole = Utterance("a", str(tmp_path / "a.wav"), duration=3.0)
    plan, stretches = ViewPlan.parse(ViewConfig()), [(8000, 12_000), (20_000, 40_000)]
    manifests = [Manifest((u,)) for u in (whole, whole.of_speech(stretches, 16_000))]
    loaded, cut = (ViewLoader(manifest, plan.views(manifest), plan)(0) for manifest in manifests)
    np.testing.assert_allclose(cut[100:-100], joined(loaded, stretches)[100:-100], atol=1e-6)
    assert len(cut) == 24_000


def test_the_digest_covers_the_speech(both: tuple[Manifest, Manifest]) -> None:
    first, *others = both[0].utterances
    assert first.speech is not None
    changes = [
        replace(first, speech=None),
        replace(first, speech=Speech(((160, 10_000), (10_000, 20_000)), 3.0)),
        replace(first, speech=Speech(((161, 20_001),), 3.0)),
        replace(first, speech=replace(first.speech, whole=3.001)),
    ]
    digests = {Manifest((one, *others)).digest for one in (first, *changes)}
    assert len(digests) == 5


def test_utterances_without_speech_or_audio_are_listed(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    waves = {"silent": np.zeros(16_000), "speech": np.append(1e-4 * random.randn(8000), 0.1 * random.randn(8000))}
    for name, wave in waves.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
    names = ["silent", "speech", "missing"]
    manifest = Manifest(tuple(Utterance(name, str(tmp_path / f"{name}.wav"), "a", 1.0) for name in names))
    cut, left_out = speech_alone(manifest, Energy(), workers=2)
    assert [u.id for u in cut] == ["speech"]
    assert left_out == {"missing": "no such file", "silent": "no speech in it (energy 1)"}
    # What is known already is not found again, and nothing is where nothing is asked for.
    assert speech_alone(cut, Energy())[0].utterances == cut.utterances
    assert speech_alone(manifest, None) == (manifest, {})


def test_too_little_speech_is_refused_as_such(both: tuple[Manifest, Manifest]) -> None:
    plan = ViewPlan.parse(ViewConfig())
    loader = ViewLoader(both[0], plan.views(both[0]), plan, min_seconds=1.5)
    assert loader.refusal(0, 1.5, None) == "too short (1.24 s of speech < 1.5 s)"
    assert loader.refusal(1, 1.5, None) is None


def test_a_card_gives_the_arguments_that_extract_its_views_again() -> None:
    card = ViewPlan.parse(ViewConfig(plan="crops:3,0.6")).card()
    assert card.arguments == "view.plan=crops:3,0.6"
    assert replace(card, vad=Energy().card).arguments == "view.plan=crops:3,0.6 view.vad=energy"
    assert replace(card, vad=VADCard("segments")).arguments == "view.plan=crops:3,0.6 view.vad=FILE"
