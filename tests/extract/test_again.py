"""Rejections through the real command line: what is tried again, what is covered by fingerprint and digest."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.cache import Cache
from spkd.cache.claims import reopen

COMMAND = ["extract", "teacher=none", "manifest=m.csv", "storage.unit_views=4"]


@pytest.fixture
def audio(spkd: Callable) -> list[str]:
    """Eight utterances of 0.5 s, and the manifest m.csv with their durations."""
    random = np.random.RandomState(0)
    names = [f"u{i}" for i in range(8)]
    for name in names:
        soundfile.write(f"{name}.wav", 0.1 * random.randn(8000), 16_000)
    Path("m.csv").write_text("utt,path,speaker,duration\n" + "".join(f"{n},{n}.wav,{n},0.5\n" for n in names))
    return names


def listed(root: str) -> dict[str, str]:
    with open(f"{root}/rejected.csv") as file:
        return {row["utt"]: row["reason"] for row in csv.DictReader(file)}


def shards(root: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(root).glob("fbank/c/*/0"))]


def test_audio_that_was_away_is_extracted_by_the_same_command(spkd: Callable, audio: list[str]) -> None:
    Path("u1.wav").rename("away1")
    Path("u5.wav").rename("away5")
    done = spkd(*COMMAND, "cache=c")
    assert "6 views extracted, 2 rejected; complete" in done.out, done.err
    assert listed("c") == {"u1": "no such file", "u5": "no such file"}
    assert "2: no such file (2)" in spkd("cache", "info", "c").out
    lacking = Cache.open("c").fingerprint
    assert lacking in Path("c/COMPLETE.json").read_text()
    assert "0 views extracted, 2 rejected; complete" in spkd(*COMMAND, "cache=c").out  # still away
    # One comes back: its unit alone is extracted again.
    Path("away5").rename("u5.wav")
    done = spkd(*COMMAND, "cache=c")
    assert "c: 1 rejected view can be loaded now; 1 unit extracted again" in done.out, done.err
    assert "4 views extracted, 1 rejected; complete" in done.out
    assert listed("c") == {"u1": "no such file"}
    Path("away1").rename("u1.wav")
    assert "4 views extracted, 0 rejected; complete" in spkd(*COMMAND, "cache=c").out
    # It is the cache of an extraction that lacked nothing.
    spkd(*COMMAND, "cache=whole").ok()
    assert shards("c") == shards("whole")
    assert Cache.open("c").fingerprint == Cache.open("whole").fingerprint != lacking
    assert not Path("c/rejected.csv").exists()
    assert "rejected     none" in spkd("cache", "info", "c").out
    assert "all checksums match" in spkd("cache", "verify", "c").out


def test_a_unit_whose_other_audio_is_away_stays_as_it_is(spkd: Callable, audio: list[str]) -> None:
    Path("u1.wav").rename("away1")
    spkd(*COMMAND, "cache=c").ok()
    before = shards("c")
    Path("u2.wav").rename("away2")
    Path("away1").rename("u1.wav")
    done = spkd(*COMMAND, "cache=c")
    assert "c: not extracted again, since audio of other views is away: 1 unit" in done.out, done.err
    assert "0 views extracted, 1 rejected; complete" in done.out
    assert shards("c") == before
    Path("away2").rename("u2.wav")
    assert "4 views extracted, 0 rejected; complete" in spkd(*COMMAND, "cache=c").out


@pytest.mark.parametrize("kind", ["shard", "record"])
@pytest.mark.parametrize("away", [["u6"], ["u5", "u6", "u7"]])
def test_a_damaged_unit_whose_audio_is_away_stays_as_it_is(
    spkd: Callable, audio: list[str], kind: str, away: list[str]
) -> None:
    Path("u4.wav").write_bytes(b"no audio")  # it was never in the unit, and is not waited for
    assert "7 views extracted, 1 rejected; complete" in spkd(*COMMAND, "cache=c").out
    spkd(*COMMAND, "cache=whole").ok()
    damaged = Path({"shard": "c/fbank/c/1/0", "record": "c/commits/1.json"}[kind])
    os.truncate(damaged, 100)
    before, complete = shards("c"), Path("c/COMPLETE.json").read_bytes()
    for name in away:
        Path(f"{name}.wav").rename(f"{name}.away")
    done = spkd(*COMMAND, "cache=c")
    assert "c: 0 views extracted, 0 rejected; damaged" in done.out, done.err
    assert done.code == 1
    assert "damaged, and not filled again without the audio of all their views: 1 unit" in done.err
    assert "`spkd cache repair c --from COPY`" in done.err
    assert str(damaged) in done.err
    assert (shards("c"), Path("c/COMPLETE.json").read_bytes()) == (before, complete)
    # Either a copy or the audio makes it whole.
    if kind == "shard":
        spkd("cache", "repair", "c", "--from", "whole").ok()
    else:
        for name in away:
            Path(f"{name}.away").rename(f"{name}.wav")
    done = spkd(*COMMAND, "cache=c")
    assert "1 rejected; complete" in done.out, done.err
    assert shards("c") == shards("whole")
    assert Cache.open("c").fingerprint == Cache.open("whole").fingerprint
    assert "all checksums match" in spkd("cache", "verify", "c").out


def test_a_kill_before_a_unit_is_filled_again_loses_none_of_its_views(spkd: Callable, audio: list[str]) -> None:
    Path("u1.wav").rename("away1")
    spkd(*COMMAND, "cache=c").ok()
    before, record = shards("c"), Path("c/commits/0.json")
    # Killed behind the withdrawal of the unit, whose rejected view can be loaded now; then all audio is away.
    Path("away1").rename("u1.wav")
    assert reopen(Path("c"), 0, lambda _: True)
    assert not record.exists()
    Path("audio").mkdir()
    for name in audio:
        Path(f"{name}.wav").rename(f"audio/{name}.wav")
    done = spkd(*COMMAND, "cache=c").ok()
    assert "0 views extracted, 1 rejected; complete" in done.out, done.out
    assert shards("c") == before
    assert listed("c") == {"u1": "no such file"}
    spkd("cache", "verify", "c").ok()
    # The audio is back.
    for name in audio:
        Path(f"audio/{name}.wav").rename(f"{name}.wav")
    assert "4 views extracted, 0 rejected; complete" in spkd(*COMMAND, "cache=c").ok().out
    assert sorted(path.name for path in Path("c/commits").iterdir()) == ["0.json", "1.json"]


def test_a_unit_without_its_record_whose_audio_is_away_stays_as_it_is(spkd: Callable, audio: list[str]) -> None:
    spkd(*COMMAND, "cache=c").ok()
    before = shards("c")
    Path("c/commits/0.json").unlink()
    Path("u2.wav").rename("away2")
    done = spkd(*COMMAND, "cache=c")
    assert done.code == 1, done.out
    assert "unit 0: 1 of the views that it had cannot be loaded now" in done.out
    assert "c/commits/0.json: missing" in done.err
    assert shards("c") == before
    assert len(Cache.open("c").usable_views) == 8
    Path("away2").rename("u2.wav")
    assert "4 views extracted, 0 rejected; complete" in spkd(*COMMAND, "cache=c").ok().out
    assert shards("c") == before
    spkd("cache", "verify", "c").ok()


def test_units_beside_a_damaged_one_are_extracted(spkd: Callable, audio: list[str]) -> None:
    spkd(*COMMAND, "cache=whole").ok()
    spkd(*COMMAND, "cache=c").ok()
    for gone in ("COMPLETE.json", "commits/0.json"):  # an extraction that was killed
        Path("c", gone).unlink()
    os.truncate("c/fbank/c/1/0", 100)
    Path("u6.wav").rename("away")
    done = spkd(*COMMAND, "cache=c")
    assert (done.code, "4 views extracted, 0 rejected; damaged" in done.out) == (1, True), done.err
    assert not Path("c/COMPLETE.json").exists()
    assert shards("c")[0] == shards("whole")[0]
    Path("away").rename("u6.wav")
    assert "4 views extracted, 0 rejected; complete" in spkd(*COMMAND, "cache=c").out
    assert shards("c") == shards("whole")


def test_an_utterance_without_duration_joins_as_a_further_part(spkd: Callable, audio: list[str]) -> None:
    Path("m.csv").write_text("utt,path\n" + "".join(f"{n},{n}.wav\n" for n in audio))
    Path("u3.wav").rename("away")
    assert "7 views extracted, 1 rejected; complete" in spkd(*COMMAND, "cache=c").out
    assert listed("c") == {"u3": "no such file"}
    assert "1: no such file (1)" in spkd("cache", "info", "c").out
    Path("away").rename("u3.wav")
    assert "1 view extracted, 0 rejected; complete" in spkd(*COMMAND, "cache=c").out
    assert not Path("c/rejected.csv").exists()
    assert "all checksums match" in spkd("cache", "verify", "c").out


def test_audio_that_was_decoded_is_tried_again_only_when_its_file_changes(spkd: Callable, audio: list[str]) -> None:
    good = soundfile.read("u2.wav")[0]
    soundfile.write("u2.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    before = os.stat("u2.wav")
    assert "7 views extracted, 1 rejected; complete" in spkd(*COMMAND, "cache=c").out
    assert "not finite" in listed("c")["u2"]
    soundfile.write("u2.wav", good, 16_000, subtype="FLOAT")
    assert os.stat("u2.wav").st_size == before.st_size
    os.utime("u2.wav", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "0 views extracted, 1 rejected; complete" in spkd(*COMMAND, "cache=c").out
    os.utime("u2.wav", ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    assert "4 views extracted, 0 rejected; complete" in spkd(*COMMAND, "cache=c").out


def test_a_unit_may_lack_views_of_one_digit_and_of_two(spkd: Callable) -> None:
    """As text, the numbers of its views are in another order: the digest of its record once depended on that."""
    random = np.random.RandomState(0)
    for i in range(12):
        soundfile.write(f"u{i}.wav", 0.1 * random.randn(4000 if i in (2, 9, 10, 11) else 8000), 16_000)
    Path("m.csv").write_text("utt,path,duration\n" + "".join(f"u{i},u{i}.wav,0.5\n" for i in range(12)))
    command = ["extract", "teacher=none", "manifest=m.csv", "storage.unit_views=16", "cache=c"]
    done = spkd(*command)
    assert "8 views extracted, 4 rejected; complete" in done.out, done.err
    assert set(listed("c")) == {"u2", "u9", "u10", "u11"}
    assert "0 views extracted, 4 rejected; complete" in spkd(*command).out
    spkd("cache", "verify", "c").ok()


def test_another_least_duration_is_another_cache(spkd: Callable, audio: list[str]) -> None:
    assert "0 rejected" in spkd(*COMMAND, "cache=c").out
    done = spkd(*COMMAND, "cache=c", "min_seconds=0.4")
    assert (done.code, "holds a cache of another min_seconds" in done.err) == (2, True), done.err
    soundfile.write("long.wav", 0.1 * np.random.RandomState(1).randn(16_000), 16_000)
    with open("m.csv", "a") as file:
        file.write("long,long.wav,long,1.0\n")
    done = spkd(*COMMAND, "cache=d", "min_seconds=0.6")
    assert "1 view extracted, 8 rejected; complete" in done.out, done.err
    assert "8: too short (8)" in spkd("cache", "info", "d").out
    assert "0 views extracted, 8 rejected; complete" in spkd(*COMMAND, "cache=d", "min_seconds=0.6").out


def test_the_list_of_rejections_has_a_digest_and_travels(spkd: Callable, audio: list[str]) -> None:
    Path("u1.wav").unlink()
    spkd(*COMMAND, "cache=c").ok()
    spkd("cache", "push", "c", "there").ok()
    spkd("cache", "pull", "there", "copy").ok()
    assert listed("copy") == listed("c")
    path = Path("copy/rejected.csv")
    path.write_text(path.read_text().replace("u1", "u2"))
    done = spkd("cache", "verify", "copy")
    assert (done.code, "copy/rejected.csv: missing or changed" in done.err) == (1, True), done.err


def test_a_training_does_not_go_on_over_a_cache_that_changed(spkd: Callable, audio: list[str]) -> None:
    Path("u1.wav").rename("away")
    spkd(*COMMAND, "cache=c").ok()
    train = ["train", "--loss", "ntxent", "cache=c", "steps=2", "batch_size=4", "crop=0.3", "student=tiny"]
    spkd(*train).ok()
    Path("away").rename("u1.wav")
    spkd(*COMMAND, "cache=c").ok()
    done = spkd(*train)
    assert (done.code, "fingerprints of cache" in done.err) == (2, True), done.err
