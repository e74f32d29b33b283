"""Several `spkd extract` that make or extend one cache at once, each a process of its own, on a slow disk."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from spkd.cache import Cache
from spkd.cache.claims import changing
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan
from spkd.files.atomic import machine_id
from tests import processes

from ..cache.test_lock import FLOCK

KEYS = ["teacher=none", "fbank=true", "storage.unit_views=2"]
CLOCKS = (0.0, -60.0, 300.0, 86_400.0, -3600.0)  # s by which the clocks of machines are ahead of the file server's


@pytest.fixture
def names(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the corpus; the test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return [utterance.id for utterance in Manifest.load(corpus / "manifest.csv")]


@pytest.fixture
def listing(corpus: Path) -> Callable[[Sequence[str]], list[str]]:
    """Writes a manifest of some utterances; returns the keys of an extraction of it."""
    known, numbers = {u.id: u for u in Manifest.load(corpus / "manifest.csv")}, itertools.count()

    def write(ids: Sequence[str]) -> list[str]:
        name = f"m{next(numbers)}.csv"
        Manifest(tuple(known[i] for i in ids)).save(Path(name))
        return [*KEYS, f"manifest={name}"]

    return write


def slow(fsync: float, ahead: float, file_system: str, *arguments: str) -> None:
    """The command line on a machine whose disk takes `fsync` s to sync a file, and whose clock is `ahead` s ahead."""
    sync, clock = os.fsync, time.time

    def wait_and_sync(descriptor: int) -> None:
        time.sleep(fsync)
        sync(descriptor)

    os.fsync, time.time, fcntl.flock = wait_and_sync, lambda: clock() + ahead, FLOCK[file_system]
    processes.command(*arguments)


def said(process: processes.Running) -> tuple[int | None, str]:
    """Exit code of a process, and all that it printed, which is shown by `pytest -s`."""
    text = "".join(process.communicate())
    line = f"[process {process.pid}, exit code {process.returncode}]"
    print(line, text, sep="\n", end="", file=sys.__stdout__, flush=True)  # capsys takes sys.stdout, even with -s
    return process.returncode, text


def check(spkd: Callable, cache: str = "c") -> set[str]:
    """Ids of the utterances of a cache, of which everything is intact and nothing is left half done."""
    done = spkd("cache", "verify", cache)
    assert (done.code, "all checksums match" in done.out) == (0, True), done.err
    assert not list(Path(cache).rglob("*.part"))
    opened = Cache.open(cache)
    assert len(opened.usable_views) == len(opened)
    return set(opened.plan.utterances)


def check_growers(spkd: Callable, ended: list[tuple[processes.Running, list[str]]]) -> None:
    """The utterances of all who were told that the cache is complete are in it, and no others; who was refused knows
    who was faster."""
    outcomes = [(process, ids, *said(process)) for process, ids in ended]
    accepted, there = set[str](), check(spkd)
    pids = {str(process.pid) for process, *_ in outcomes}
    assert any("; complete" in text for *_, text in outcomes)
    for _, ids, code, text in outcomes:
        if code == 0:
            assert "; complete" in text or "other workers are still busy" in text, text
            accepted |= set(ids)
        else:
            assert code == 2
            winner = re.search(rf"made or extended last by process (\d+) on {socket.gethostname()} \(\S+Z\)", text)
            assert winner, text
            assert winner[1] in pids
    assert there == accepted


@pytest.mark.parametrize(
    ("growers", "fsync", "file_system"),
    [
        (2, 0.05, "local"),
        (2, 0.05, "missing"),
        *(
            pytest.param(count, 0.4, kind, marks=pytest.mark.slow)
            for count, kind in ((2, "local"), (3, "nfs"), (5, "local"), (5, "missing"), (5, "on_one_machine"))
        ),
    ],
)
def test_growths_by_other_utterances(
    spkd: Callable, names: list[str], listing: Callable, growers: int, fsync: float, file_system: str
) -> None:
    """One wins. The others are refused, with its name, and nothing of theirs is in the cache."""
    spkd("extract", *listing(names[:3]), "cache=c").ok()
    lists = [names[:3] + names[i : i + 3] for i in range(3, 3 + 3 * growers, 3)]
    ended = [
        (processes.Running(slow, fsync, CLOCKS[i], file_system, "extract", *listing(ids), "cache=c"), ids)
        for i, ids in enumerate(lists)
    ]
    check_growers(spkd, ended)


def test_the_manifest_before_a_growth_is_complete(spkd: Callable, names: list[str], listing: Callable) -> None:
    """Who repeats the command of then is told so, also within a growth; other parts of the manifest are refused."""
    lists = [listing(names[:count]) for count in (3, 6, 8)]
    for keys in lists:
        spkd("extract", *keys, "cache=c").ok()

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path("c").rglob("*") if path.is_file()}

    before = files()
    for keys, more in ((lists[0], 5), (lists[1], 2), (listing(names[5::-1]), 2)):
        done = spkd("extract", *keys, "cache=c")
        assert "0 views extracted, 0 rejected; complete" in done.out, done.err
        assert f"c: has grown since by {more} utterances, which stay" in done.out
    assert files() == before
    for ids in (names[3:6], names[:5]):
        done = spkd("extract", *listing(ids), "cache=c")
        assert (done.code, "c: holds a cache of another " in done.err) == (2, True), done.err
    assert files() == before
    Path("c/COMPLETE.json").unlink()
    for path in ("c/commits/0.json", "c/commits/4.json"):  # of the first part and of the last
        Path(path).unlink()
    assert "2 views extracted, 0 rejected; complete" in spkd("extract", *lists[1], "cache=c").out
    assert len(Cache.open("c")) == 6
    assert "2 views extracted" in spkd("extract", *lists[2], "cache=c").out
    assert check(spkd) == set(names[:8])


def test_a_cache_of_earlier_formulas_grows_by_them(
    spkd: Callable, names: list[str], listing: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, parse = ["view.formants=[0.9]", "view.noise=synthetic"], ViewPlan.parse

    def earlier(config: ViewConfig) -> ViewPlan:
        plan = parse(config)
        return replace(plan, formants_version=2, augmentation=replace(plan.augmentation, version=1))

    with monkeypatch.context() as before:
        before.setattr(ViewPlan, "parse", earlier)
        spkd("extract", *listing(names[:4]), *keys, "cache=c").ok()
    spkd("extract", *listing(names[:6]), *keys, "cache=c").ok()
    spkd("extract", *listing(names[:6]), *keys, "cache=new").ok()
    cards = [Cache.open(cache).card for cache in ("c", "new")]
    assert [len(card.parts) for card in cards] == [2, 1]
    assert [(c.views.formants_version, c.views.augmentation.version) for c in cards] == [(2, 1), (3, 2)]
    for cache in ("c", "new"):
        spkd("cache", "verify", cache, "--live", "6", "teacher=none", "manifest=m1.csv").ok()


def test_growths_by_a_merge_and_by_an_extraction(spkd: Callable, names: list[str], listing: Callable) -> None:
    base, more, lists = names[:3], names[3:6], (names[:6], names[:3] + names[6:9])
    for cache, ids in (("base", base), ("more", more), ("c", base)):
        spkd("extract", *listing(ids), f"cache={cache}").ok()
    commands = [["cache", "merge", "base", "more", "c"], ["extract", *listing(lists[1]), "cache=c"]]
    running = [processes.Running(slow, 0.05, 0.0, "local", *command) for command in commands]
    check_growers(spkd, list(zip(running, lists, strict=True)))


def test_a_copy_that_grows_is_not_pulled_over(spkd: Callable, names: list[str], listing: Callable) -> None:
    spkd("extract", *listing(names[:3]), "cache=lab").ok()
    spkd("cache", "pull", "lab", "c").ok()
    growing = processes.Running(slow, 0.05, 0.0, "local", "extract", *listing(names[:6]), "cache=c")
    pulls = [processes.Running(slow, 0.05, 0.0, "local", "cache", "pull", "lab", "c") for _ in range(3)]
    for pull in pulls:
        code, text = said(pull)
        assert code == 0 or "c: was extended here, which a pull would undo" in text, text
    check_growers(spkd, [(growing, names[:6])])
    assert "was extended here" in spkd("cache", "pull", "lab", "c").err
    assert check(spkd) == set(names[:6])


@pytest.mark.slow
@pytest.mark.parametrize("file_system", ["local", "nfs", "missing"])
@pytest.mark.parametrize("new", [False, True])
def test_five_growers_beside_readers_and_merges(
    spkd: Callable, names: list[str], listing: Callable, file_system: str, new: bool
) -> None:
    """The same manifest twice, longer ones, and another one, while the cache is verified, pulled, pushed and merged."""
    if not new:
        spkd("extract", *listing(names[:3]), "cache=c").ok()
    spkd("extract", *listing(names[15:]), "cache=other").ok()
    lists = [names[:7], names[:7], names[:9], names[:12], names[:3] + names[12:15]]
    ended = [
        (processes.Running(slow, 0.4, CLOCKS[i], file_system, "extract", *listing(ids), "cache=c"), ids)
        for i, ids in enumerate(lists)
    ]
    rounds = itertools.count()
    while any(process.returncode is None for process, _ in ended):
        number = next(rounds)
        commands = [["verify", "c"], ["pull", "c", f"copy{number}"], ["push", "c", "pushed"]]
        beside = [processes.spkd("cache", *command) for command in commands]
        merging = processes.spkd("cache", "merge", "c", "other", f"merged{number}")
        for process in beside:
            code, text = said(process)
            assert code == 0 or (new and ("is not finished" in text or "no complete" in text or "no teacher" in text))
        code, text = said(merging)
        assert code == 0 or (new and "no teacher cache" in text)
    check_growers(spkd, ended)
    for copy in Path().glob("copy*"):
        check(spkd, str(copy))
    # A merge that found some units only is completed by the same command, unless the cache has grown meanwhile.
    for merged in sorted(Path().glob("merged*")):
        done = spkd("cache", "merge", "c", "other", merged)
        assert "complete" in done.out or "another manifest" in done.err, done
    spkd("cache", "merge", "c", "other", "whole").ok()
    assert check(spkd, "whole") == set(Cache.open("c").plan.utterances) | set(names[15:])


def kill_at(last: int, *arguments: str) -> None:
    """The command line, killed before its call number `last` that changes a folder, counted from 0."""
    calls = itertools.count()

    def counted(call: Callable) -> Callable:
        def run(*given: object, **more: object) -> object:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **more)

        return run

    for name in ("replace", "rename", "link", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    processes.command(*arguments)


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("new", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_growth_that_is_killed_continues(
    spkd: Callable, names: list[str], listing: Callable, every: int, new: bool
) -> None:
    """Killed between any two changes of the folder, it leaves a cache that verifies, and the same command ends."""
    base, longer = listing(names[:3]), listing(names[:7])
    spkd("extract", *base, "cache=base").ok()
    for last in itertools.count(0, every):
        shutil.rmtree("c", ignore_errors=True)
        if not new:
            shutil.copytree("base", "c")
        killed = processes.Running(kill_at, last, "extract", *longer, "cache=c")
        killed.communicate()
        if not new:
            assert set(names[:3]) <= check_readable(spkd), last
        done = spkd("extract", *longer, "cache=c")
        assert "; complete" in done.out, (last, done)
        assert check(spkd) == set(names[:7]), last
        if killed.returncode == 0:
            break
    assert last > 20


def check_readable(spkd: Callable) -> set[str]:
    """Ids of the utterances of a cache that verifies."""
    spkd("cache", "verify", "c").ok()
    return set(Cache.open("c").plan.utterances)


def hold(root: Path) -> None:
    """Hold a cache alone until the process is killed."""
    with changing(root):
        print("held", flush=True)
        time.sleep(60)


def test_who_waits_says_for_whom(names: list[str], listing: Callable) -> None:
    holding = processes.Running(hold, Path("c"))
    while not holding.printed():
        time.sleep(0.001)
    waiting = processes.spkd("extract", *listing(names[:2]), "cache=c")
    while "\n" not in waiting.printed():
        assert waiting.returncode is None, waiting.communicate()
        time.sleep(0.001)
    assert f"c: waiting for process {holding.pid} on {socket.gethostname()} (" in waiting.printed()
    holding.kill()
    assert "2 views extracted, 0 rejected; complete" in waiting.communicate()[0]


def test_a_cache_that_goes_while_it_is_waited_for_is_made_anew(
    spkd: Callable, names: list[str], listing: Callable
) -> None:
    spkd("extract", *listing(names[:2]), "cache=c").ok()
    with changing(Path("c")):
        waiting = processes.spkd("extract", *listing(names[:4]), "cache=c")
        while "waiting for process" not in waiting.printed():
            assert waiting.returncode is None, waiting.communicate()
            time.sleep(0.001)
        shutil.rmtree("c")
    assert "4 views extracted, 0 rejected; complete" in waiting.communicate()[0]
    assert check(spkd) == set(names[:4])


def test_completing_a_cache_removes_its_own_leftovers_alone(
    spkd: Callable, names: list[str], listing: Callable, tmp_path: Path
) -> None:
    keys = listing(names[:4])
    spkd("extract", *keys, "cache=c").ok()
    Path("c/COMPLETE.json").unlink()
    dead = f"{machine_id()}0123456789.part"
    ours = ["COMPLETE.json", "plan/0.npz", "commits/1.json", "claims/0", "fbank/c/1/0", "fbank/zarr.json"]
    left = [Path("c", f"{name}.{dead}") for name in ours]
    foreign = [
        *("precious/a.part", f"precious/0.{dead}", f"precious/1.json.{dead}", "c/notes.part", "c/fbank/draft.part"),
        *(f"c/thesis/0.{dead}", f"c/fbank/c/7/0.{dead}", f"c/fbank/thesis.{dead}"),
    ]
    for path in (*left, *map(Path, foreign)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("c/x").symlink_to(tmp_path / "precious")
    shutil.rmtree("c/fbank/c/0")
    Path("c/commits/0.json").unlink()
    Path("c/claims/1").write_text("{}")
    done = spkd("extract", *keys, "cache=c")
    assert "2 views extracted, 0 rejected; complete" in done.out, done.err
    assert not [path for path in left if path.exists()]
    assert [path for path in foreign if not Path(path).exists()] == []
    assert sorted(path.name for path in Path("c/claims").iterdir()) == ["growth"]


@pytest.mark.parametrize("folder", ["fbank", "fbank/c", "fbank/c/0", "commits", "plan", "claims"])
def test_folders_that_are_links_are_not_cleaned(
    spkd: Callable, names: list[str], listing: Callable, tmp_path: Path, folder: str
) -> None:
    keys = listing(names[:2])
    spkd("extract", *keys, "cache=c").ok()
    Path("c/COMPLETE.json").unlink()
    shutil.move(f"c/{folder}", "elsewhere")
    Path("c", folder).symlink_to(tmp_path / "elsewhere")
    dead = {"fbank": "zarr.json", "fbank/c/0": "0", "commits": "0.json", "plan": "0.npz", "claims": "0"}
    paths = [Path("elsewhere", f"{dead.get(folder, '0/0')}.{machine_id()}0123456789.part")]
    if folder == "fbank":
        paths.append(Path(f"elsewhere/c/0/0.{machine_id()}0123456789.part"))
    for path in paths:
        path.touch()
    done = spkd("extract", *keys, "cache=c")
    assert ("; complete" if "/" in folder else f"c/{folder}: a symbolic link") in done.out + done.err
    assert all(path.exists() for path in paths)
