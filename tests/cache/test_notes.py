"""Verification that goes on where it stopped, by the real command line."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest

from spkd.cache.notes import RESUMED, Notes, file_state
from tests import processes

from ..conftest import Outcome

DAY = 86_400.0


@pytest.fixture
def cache(spkd: Callable, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of six shards that were written an hour ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd("extract", "teacher=none", manifest, "cache=c", "storage.unit_views=3").ok()
    for path in Path("c").glob("fbank/c/*/0"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    return Path("c")


def flip(path: Path) -> None:
    """Change a bit of the rows, as a disk may do it: without a new time, so that the notes go on to hold for it."""
    before, notes = path.stat(), path.parents[3] / "verified.log"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    if notes.is_file():
        notes.write_text(notes.read_text().replace(str(before.st_ctime_ns), str(path.stat().st_ctime_ns)))


def moved_back(notes: Path, seconds: float) -> None:
    """Make the notes older."""
    lines = [line.split("\t") for line in notes.read_text().splitlines()]
    notes.write_text("".join("\t".join([*rest, str(float(at) - seconds)]) + "\n" for *rest, at in lines))


def intact(done: Outcome) -> bool:
    return done.code == 0 and "all checksums match" in done.out


def test_a_user_without_a_home_and_a_name(spkd: Callable, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "plan" / "0.bin").unlink()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a KeyError, as for a user of a container
    assert intact(spkd("cache", "verify", "c"))
    assert (cache / "plan" / "0.bin").is_file()


def test_what_was_found_whole_lately_is_not_read_again(spkd: Callable, cache: Path) -> None:
    shards = sorted(cache.glob("fbank/c/*/0"))
    assert intact(done := spkd("cache", "verify", "c"))
    assert "found whole since" not in done.out
    done = spkd("cache", "verify", "c", "--older-than", "30d")
    assert "c: 6 of 6 shards were found whole since" in done.out
    assert intact(done)
    # Silent damage within the time is seen by a verification of everything, and by a later one of what is older.
    flip(shards[0])
    assert intact(spkd("cache", "verify", "c", "--older-than", "30d"))
    moved_back(cache / "verified.log", 31 * DAY)
    done = spkd("cache", "verify", "c", "--older-than", "30d")
    assert (done.code, "fbank/c/0/0: changed in rows" in done.err) == (1, True), done.err
    done = spkd("cache", "verify", "c", "--older-than", "30d")  # the others were found whole by now
    assert ("5 of 6 shards" in done.out, done.code) == (True, 1)
    flip(shards[0])
    assert intact(spkd("cache", "verify", "c", "--older-than", "30d"))
    # A shard whose size or time has changed is read in any case.
    flip(shards[1])
    os.utime(shards[1], (time.time() - 60, time.time() - 60))
    assert "fbank/c/1/0: changed in rows" in spkd("cache", "verify", "c", "--older-than", "30d").err


def test_a_verification_of_everything_reads_everything(spkd: Callable, cache: Path) -> None:
    assert intact(spkd("cache", "verify", "c"))
    flip(cache / "fbank/c/3/0")
    done = spkd("cache", "verify", "c")
    assert (done.code, "fbank/c/3/0: changed in rows" in done.err) == (1, True)
    # After damage it is gone on with, for a week.
    flip(cache / "fbank/c/3/0")
    assert "5 of 6 shards" in (done := spkd("cache", "verify", "c")).out
    assert intact(done)
    assert "shards were" not in spkd("cache", "verify", "c").out
    flip(cache / "fbank/c/3/0")
    assert spkd("cache", "verify", "c").code == 1
    moved_back(cache / "verified.log", RESUMED)
    assert "shards were" not in spkd("cache", "verify", "c").out


def test_notes_that_came_with_a_copy_say_nothing_of_it(spkd: Callable, cache: Path) -> None:
    """As of `cp -a` or `rsync -a`, which keep the times, also of a verification that goes on."""
    assert intact(spkd("cache", "verify", "c"))
    shutil.copytree(cache, "copy")
    assert intact(done := spkd("cache", "verify", "copy", "--older-than", "30d"))
    assert "found whole" not in done.out
    # A copy that is damaged on the way.
    flip(Path("copy/fbank/c/4/0"))
    lines = [line for line in Path("c/verified.log").read_text().splitlines() if not line.startswith("finished")]
    Path("copy/verified.log").write_text("\n".join([*lines, f"begun\t{time.time() - 60}", ""]))
    for more in ([], ["--older-than", "30d"]):
        assert "copy/fbank/c/4/0: changed in rows" in spkd("cache", "verify", "copy", *more).err
    assert intact(done := spkd("cache", "verify", "c", "--older-than", "30d"))
    assert "6 of 6 shards" in done.out


def test_damage_counts_though_a_clock_was_ahead(spkd: Callable, corpus: Path, cache: Path) -> None:
    """The machine that found the shards whole was an hour ahead of the one that found the damage."""
    assert intact(spkd("cache", "verify", "c"))
    moved_back(cache / "verified.log", -3600)
    flip(cache / "fbank/c/0/0")
    assert spkd("cache", "verify", "c").code == 1
    moved_back(cache / "verified.log", 7200)  # two hours later
    shutil.copytree(cache, "copy")  # with the times of the contents, as `cp -a` does
    for root in ("c", "copy"):
        done = spkd("cache", "verify", root, "--older-than", "30d")
        assert (done.code, f"{root}/fbank/c/0/0: changed in rows" in done.err) == (1, True), done.err
        command = ["extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", f"cache={root}"]
        done = spkd(*command, "storage.unit_views=3")
        assert f"{root}: 1 unit damaged and filled again" in done.out, done.err
        assert intact(spkd("cache", "verify", root, "--older-than", "30d"))


def test_damage_that_another_process_finds_is_kept(cache: Path) -> None:
    shard = cache / "fbank/c/0/0"
    first, second = Notes(cache), Notes(cache)
    first.begin()
    second.begin()
    first.add(shard, file_state(shard), time.time())
    second.add(shard, file_state(shard), -time.time() + 60)  # by a clock that is behind
    first.finish()
    assert Notes(cache).is_damaged(shard)
    Notes(cache).add(shard, file_state(shard), time.time())
    assert not Notes(cache).is_damaged(shard)
    second.add(shard, file_state(shard), -time.time())  # after its file was replaced
    assert Notes(cache).is_damaged(shard)
    assert Notes(cache).whole_at(shard) is None


def test_damage_in_the_notes_of_a_user_ends_with_the_next_look(cache: Path, tmp_path: Path) -> None:
    shard, log = cache / "fbank/c/0/0", cache / "verified.log"
    log.mkdir()  # it cannot be written
    Notes(cache).add(shard, file_state(shard), -time.time())
    log.rmdir()
    assert Notes(cache).is_damaged(shard)
    found = time.time() - 5
    Notes(cache).add(shard, file_state(shard), found)
    assert not Notes(cache).is_damaged(shard)
    assert Notes(cache).whole_at(shard) == found


def test_lines_that_are_no_notes_are_left_out(spkd: Callable, cache: Path) -> None:
    lines = ["", "begun", "begun\tinf", "finished\tnan", "fbank/c/0/0\t1.e999\t1\t1\t1\t1", "x\t1\t1\t1\t1\t1e999"]
    (cache / "verified.log").write_text("\n".join(lines) + "\n")
    assert intact(spkd("cache", "verify", "c"))


def slow_verify(*arguments: str) -> None:
    """The command line on a slow machine."""
    checksum = google_crc32c.value

    def slow(data: bytes) -> int:
        time.sleep(0.02)
        return int(checksum(data))

    google_crc32c.value = slow
    processes.command(*arguments)


def test_a_killed_verification_goes_on_where_it_stopped(spkd: Callable, cache: Path, tmp_path: Path) -> None:
    process = processes.Running(slow_verify, "cache", "verify", "c", cwd=tmp_path)
    notes, deadline = cache / "verified.log", time.monotonic() + 60
    while (not notes.exists() or notes.read_text().count("fbank") < 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    found = notes.read_text().count("fbank")
    assert 3 <= found < 6
    with notes.open("a") as file:
        file.write("fbank/c/5/0\t12")  # torn
    done = spkd("cache", "verify", "c")
    assert f"c: {found} of 6 shards were found whole since" in done.out
    assert intact(done)


@pytest.mark.parametrize(
    "line",
    [
        "fbank/c/0/0\t1.e999\t1\t1\t1\t1",
        "fbank/c/0/0\tnan\t1\t1\t1\t1",
        "fbank/c/0/0\t{state}\t-1e18",
        "fbank/c/0/0\t{state}\tnan",
        "begun\tnan",
        "begun\tinf",
        "finished\t1e.5",
    ],
)
def test_notes_with_odd_numbers_change_nothing(spkd: Callable, cache: Path, line: str) -> None:
    flip(cache / "fbank/c/0/0")
    state = "\t".join(map(str, file_state(cache / "fbank/c/0/0") or ()))
    for more in ([], ["--older-than", "99999999999w"]):
        (cache / "verified.log").write_text(f"begun\t1.0\n{line.format(state=state)}\n")
        done = spkd("cache", "verify", "c", *more)
        assert (done.code, "fbank/c/0/0: changed in rows" in done.err) == (1, True), done.err


def test_where_the_cache_cannot_be_written_the_user_has_the_notes(spkd: Callable, cache: Path, tmp_path: Path) -> None:
    (cache / "verified.log").mkdir()
    assert intact(spkd("cache", "verify", "c"))
    assert len(list((tmp_path / "home" / "spkd" / "verified").glob("*.log"))) == 1
    assert "6 of 6 shards" in spkd("cache", "verify", "c", "--older-than", "1h").out
    # A link in the cache's folder is not followed.
    shutil.rmtree(cache / "verified.log")
    Path("precious").write_text("precious")
    (cache / "verified.log").symlink_to(tmp_path / "precious")
    flip(cache / "fbank/c/0/0")
    assert spkd("cache", "verify", "c").code == 1
    assert Path("precious").read_text() == "precious"


def test_notes_are_no_part_of_the_cache(spkd: Callable, cache: Path) -> None:
    before = (cache / "COMPLETE.json").read_bytes()
    assert intact(spkd("cache", "verify", "c"))
    spkd("cache", "push", "c", "there").ok()
    spkd("cache", "pull", "there", "copy").ok()
    assert not Path("there/verified.log").exists()
    assert (cache / "COMPLETE.json").read_bytes() == before == Path("copy/COMPLETE.json").read_bytes()
    done = spkd("cache", "verify", "c", "--older-than", "30x")
    assert (done.code, "such as 30d" in done.err) == (2, True)
