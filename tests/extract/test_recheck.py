"""`spkd cache verify --live`, and `spkd cache plan`, through the real commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.cache import Cache
from spkd.corpus.manifest import Manifest, Utterance

VIEWS = {
    "full": ["view=full", "view.speeds=[0.9,1.0]"],
    "windows": ["view=windows:0.8/0.4"],
    "augmented crops": ["view=crops:2,0.7", "view.speeds=[0.9,1.1]", "view.noise=noise", "view.rir=rir"],
}


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spkd.extract.estimate.CALIBRATION", 0.1)


@pytest.fixture
def arguments(corpus: Path, tiny_wavlm: Path) -> list[str]:
    random = np.random.RandomState(0)
    for folder, length in (("noise", 20_000), ("rir", 2000)):
        Path(folder).mkdir(exist_ok=True)
        wave = random.randn(length) * np.exp(-np.arange(length) / 300) if folder == "rir" else random.randn(length)
        soundfile.write(f"{folder}/x.wav", 0.1 * wave, 16_000)
    return [
        "teacher=wavlm",
        f"teacher.weights={tiny_wavlm}",
        "teacher.targets=[embedding,frames.layer2]",
        f"manifest={corpus / 'manifest.csv'}",
        "fbank=true",
    ]


def replayed(arguments: list[str]) -> list[str]:
    """Those of the settings of an extraction that `verify --live` takes."""
    return [a for a in arguments if a.startswith(("teacher=", "teacher.weights=", "manifest="))]


@pytest.mark.parametrize("view", list(VIEWS))
def test_the_live_teacher_agrees(spkd: Callable, tmp_path: Path, arguments: list[str], view: str) -> None:
    spkd("extract", *arguments, *VIEWS[view]).ok()
    folders = [key for key in VIEWS[view] if key.startswith(("view.noise=", "view.rir="))]
    done = spkd("cache", "verify", "cache", "--live", "9", *replayed(arguments), *folders).ok()
    least = [float(found) for found in re.findall(r"cosine at least ([\d.]+)", done.out)]
    assert len(least) == 3
    assert min(least) >= 0.9999


def test_folders_that_no_view_used(spkd: Callable, arguments: list[str]) -> None:
    """Refused where they are typed, left out with a note where a file gives them."""
    spkd("extract", *arguments).ok()
    verify = ["cache", "verify", "cache", "--live", "1"]
    export = ["cache", "export", "cache", "tars", "--audio", arguments[3]]
    for command in ([*verify, *replayed(arguments)], export):
        for key in ("view.noise=noise", "view.rir=rir"):
            done = spkd(*command, key)
            assert (done.code, f"error: {key} has no effect: the cache's views have no " in done.err) == (2, True), (
                done.err
            )
    Path("spkd.yaml").write_text("extract: {view: {noise: noise}}")
    for command in ([*verify, *replayed(arguments)], export):
        done = spkd(*command)
        assert (done.code, "left out view.noise: the cache's views have no noise of a folder" in done.out) == (0, True)


@pytest.mark.parametrize("frames", ["int8", "rq8x4", "lsq8x4", "pq4x8"])
def test_a_lossy_codec_is_held_to_what_it_loses(
    spkd: Callable, tmp_path: Path, arguments: list[str], frames: str
) -> None:
    codecs = f"storage.codecs={{embedding: sq4, frames.layer2: {frames}}}"
    spkd("extract", *arguments, *VIEWS["augmented crops"], codecs).ok()
    card = Cache.open("cache").card
    assert 0.9 < card.errors["embedding"]["cosine_mean"] < 0.99999
    done = spkd(
        "cache", "verify", "cache", "--live", "20", *replayed(arguments), "view.noise=noise", "view.rir=rir"
    ).ok()
    assert "embedding (sq4)" in done.out
    info = spkd("cache", "info", "cache").out
    assert re.search(r"embedding: 32 x sq4 per view, .* 1 - cosine \d", info)


@pytest.mark.parametrize("codec", ["float32", "rq8x4"])
def test_another_teacher_or_other_audio_is_noticed(
    spkd: Callable, tmp_path: Path, arguments: list[str], corpus: Path, codec: str
) -> None:
    spkd("extract", *arguments, f"storage.codecs={{frames.layer2: {codec}}}").ok()
    done = spkd("cache", "verify", "cache", "--live", "3", "teacher=none", arguments[3])
    assert (done.code, "made by another teacher" in done.err) == (1, True)
    # The same weights with other settings.
    for own, differing in (
        ("teacher.wavlm.layer=1", "of layer 3 there, mean and standard deviation of layer 1 now"),
        ("teacher.precision=bf16", "precision: none there, bfloat16 now"),
    ):
        done = spkd("cache", "verify", "cache", "--live", "1", *replayed(arguments), own)
        assert (done.code, "with other settings of it (" in done.err and f"{differing})" in done.err) == (1, True), (
            done.err
        )
    # The same names and lengths, other sound.
    random, changed = np.random.RandomState(1), []
    Path("other").mkdir()
    for i, u in enumerate(Manifest.load(corpus / "manifest.csv")):
        soundfile.write(f"other/{i}.wav", 0.1 * random.randn(round((u.duration or 0) * 16_000)), 16_000)
        changed.append(Utterance(u.id, f"other/{i}.wav", u.speaker, u.duration, u.start))
    Manifest(tuple(changed)).save("other.csv")
    done = spkd("cache", "verify", "cache", "--live", "3", *replayed(arguments), "manifest=other.csv")
    for target in ("embedding", "frames.layer2"):
        assert (done.code, f"{target} differs from the teacher's output in " in done.err) == (1, True), done.err


def test_an_estimate_gives_the_bytes(spkd: Callable, tmp_path: Path, arguments: list[str]) -> None:
    settings = [*arguments, "view=crops:3,0.7", "storage.unit_views=7", "storage.codecs={frames.layer2: int8}"]
    done = spkd("cache", "estimate", *settings, "--hour", "3", "--terabyte", "5").ok()
    assert "54 views, 0.0 hours of audio, 8 units" in done.out
    assert re.search(r"frames.layer2 +int8 [\d.]+ kB +float32 [\d.]+ kB +float16", done.out)
    assert "at 3 an hour" in done.out
    assert not Path("cache").exists()
    spkd("extract", *settings).ok()
    outputs = re.search(r"cache as set +([\d.]+) kB", done.out)
    written = sum(p.stat().st_size for p in Path("cache").glob("*/c/*/0"))
    assert outputs is not None
    assert float(outputs[1]) == pytest.approx(written / 1000, abs=0.06)


def test_an_estimate_needs_no_audio_where_the_durations_are_known(
    spkd: Callable, tmp_path: Path, arguments: list[str]
) -> None:
    rows = [Utterance(f"u{i}", f"nowhere/{i}.wav", f"s{i % 50}", 3.0 + i % 7) for i in range(5000)]
    Manifest(tuple(rows)).save("large.csv")
    done = spkd("cache", "estimate", *arguments[:3], "manifest=large.csv", "view=crops:8,2.0").ok()
    assert "40,000 views, 22.2 hours of audio" in done.out


def test_an_utterance_that_extraction_rejects_does_not_end_an_estimate(spkd: Callable, arguments: list[str]) -> None:
    rows = [Utterance("long", "nowhere/long.wav", "s", 5000.0), Utterance("short", "nowhere/short.wav", "s", 3.0)]
    Manifest(tuple(rows)).save("m.csv")
    done = spkd("cache", "estimate", *arguments[:3], "manifest=m.csv", "view=full").ok()
    assert "1 view," in done.out
    assert "note: m.csv: 1 utterance left out (long: 5000 s in one view" in done.out
