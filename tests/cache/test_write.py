from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spkd.cache import Background, Cache, claim_units, finalize, initialise, verify
from spkd.cache.claims import release, reopen
from spkd.cache.folder import commit_path, load_card
from spkd.cache.layout import HEADER
from spkd.cache.owner import _started, this_process
from spkd.cache.write import ViewsAway
from spkd.errors import SpkdError
from spkd.outputs.target import Target
from tests import processes

from .test_layout import FRAMES, make_card, make_plan, start, write, writer_of

EMBEDDING = Target("embedding", 4)


def begin(root: Path, lengths: list[int], **units: float):  # type: ignore[no-untyped-def]
    manifest, plan = make_plan(lengths, **units)  # type: ignore[arg-type]
    return manifest, plan, start(root, [EMBEDDING], manifest, plan)


def fill(root: Path, plan, unit: int) -> None:  # type: ignore[no-untyped-def]
    writer = writer_of(root, plan, unit)
    for row in plan.unit(unit):
        writer.put("embedding", [row], np.full((1, 4), row + 1))
    writer.commit()


def test_units_are_claimed_once_and_only_while_open(tmp_path: Path) -> None:
    _, plan, made = begin(tmp_path / "c", [4000] * 6, unit_views=2)
    taken = []
    for unit in claim_units(tmp_path / "c", plan.units):
        taken.append(unit)
        if unit != 1:
            fill(tmp_path / "c", plan, unit)
    assert taken == [0, 1, 2]
    assert not finalize(tmp_path / "c", made, plan)
    with pytest.raises(SpkdError, match="2 of 3 units"):
        Cache.open(tmp_path / "c")
    assert list(claim_units(tmp_path / "c", plan.units)) == [1]
    fill(tmp_path / "c", plan, 1)
    assert list((tmp_path / "c" / "claims").iterdir()) == []


def test_a_living_owner_keeps_its_claim_and_a_dead_one_loses_it(tmp_path: Path) -> None:
    _, plan, _ = begin(tmp_path / "c", [4000] * 2, unit_views=1)
    claims = tmp_path / "c" / "claims"
    claims.mkdir()
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        another = {"pid": living.pid, "started": _started(living.pid), "worker": "another"}
        (claims / "0").write_text(json.dumps(this_process() | another))
        (claims / "1").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
        assert list(claim_units(tmp_path / "c", plan.units)) == []
        old = time.time() - 3600
        os.utime(claims / "1", (old, old))
        assert list(claim_units(tmp_path / "c", plan.units)) == [1]
    finally:
        living.kill()
        living.wait()
    assert list(claim_units(tmp_path / "c", plan.units)) == [0, 1]


def claim_under_kills(root: Path) -> None:
    """Kill a worker at every call on its way to a claim, one after another, until one is quick enough to get there."""
    for last in range(300):
        child = os.fork()
        if child == 0:
            sys.setprofile(kill_after(last))
            next(claim_units(root, 1))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert list(claim_units(root, 1)) == [0], f"killed at call {last}: the unit is held"
        release(root, 0)
        if os.WIFEXITED(status):
            break
    assert os.WIFEXITED(status), status
    assert last > 10


def kill_after(last: int) -> Callable:
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "c_call"
        if calls > last:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


@pytest.mark.slow
def test_a_kill_while_claiming_holds_no_unit(tmp_path: Path) -> None:
    """Killed at any call on the way to the claim, a worker leaves either no claim or one with its owner."""
    begin(tmp_path / "c", [4000])
    claiming = processes.Running(claim_under_kills, tmp_path / "c")
    _, error = claiming.communicate()
    assert claiming.returncode == 0, error


def test_a_shard_without_its_commit_record_is_done_again(tmp_path: Path) -> None:
    _, plan, _ = begin(tmp_path / "c", [4000] * 2, unit_views=1)
    for unit in claim_units(tmp_path / "c", plan.units):
        fill(tmp_path / "c", plan, unit)
    commit_path(tmp_path / "c", 0).unlink()
    assert list(claim_units(tmp_path / "c", plan.units)) == [0]


def test_a_unit_that_is_filled_again_keeps_the_views_that_it_had(tmp_path: Path) -> None:
    root = tmp_path / "c"
    _, plan, made = begin(root, [4000] * 4, unit_views=2)
    for unit in claim_units(root, plan.units):
        fill(root, plan, unit)
    assert finalize(root, made, plan)
    record = commit_path(root, 0).read_bytes()
    assert reopen(root, 0, lambda _: True)
    # Its audio goes away meanwhile: the record of before is put back, and its shards are untouched.
    assert list(claim_units(root, plan.units)) == [0]
    writer = writer_of(root, plan, 0)
    writer.put("embedding", [0], np.ones((1, 4)))
    writer.reject(1, "no such file")
    with pytest.raises(ViewsAway, match="unit 0: 1 of the views that it had"):
        writer.commit()
    writer.abandon()
    assert commit_path(root, 0).read_bytes() == record
    assert verify(root) == []
    assert list((root / "claims").glob("[0-9]*")) == []
    # It is filled.
    assert reopen(root, 0, lambda _: True)
    assert not commit_path(root, 0).exists()
    for unit in claim_units(root, plan.units):
        fill(root, plan, unit)
    assert sorted(path.name for path in (root / "commits").iterdir()) == ["0.json", "1.json"]


def test_what_the_teacher_gives_is_checked(tmp_path: Path) -> None:
    manifest, plan = make_plan([4000])
    start(tmp_path / "c", [FRAMES], manifest, plan)
    writer = writer_of(tmp_path / "c", plan, 0)
    rows = int(FRAMES.num_frames(4000))
    with pytest.raises(SpkdError, match=f"gave 3 frames where it declares {rows}"):
        writer.put("frames", [0], np.zeros((1, 3, 5)))
    with pytest.raises(SpkdError, match="not finite as float16"):
        writer.put("frames", [0], np.full((1, rows, 5), 1e6))
    with pytest.raises(SpkdError, match="view 0 was never written"):
        writer.commit()
    writer.abandon()
    assert not list((tmp_path / "c").glob("**/*.part"))


def test_another_cache_or_other_files_are_not_overwritten(tmp_path: Path) -> None:
    manifest, plan, made = begin(tmp_path / "c", [4000] * 2)
    initialise(tmp_path / "c", made, [plan])
    other = dataclasses.replace(manifest[0], id="other")
    theirs = make_card([EMBEDDING], type(manifest)((other, manifest[1])), plan)
    with pytest.raises(
        SpkdError, match="holds a cache of another manifest; give a manifest that also has .* or choose another folder"
    ):
        initialise(tmp_path / "c", theirs, [plan])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").touch()
    with pytest.raises(SpkdError, match="not empty and holds no teacher cache"):
        initialise(tmp_path / "d", made, [plan])


def work(root: Path) -> None:
    """Fill a cache of eighty views, slowly; prints the units that it has committed."""
    _, plan = make_plan([4000] * 80, 2)
    for unit in claim_units(root, plan.units):
        writer = writer_of(root, plan, unit)
        for row in plan.unit(unit):
            writer.put("embedding", [row], np.full((1, 4), row + 1))
            time.sleep(0.004)
        writer.commit()
        print(unit, flush=True)
    finalize(root, load_card(root), plan)


def test_killed_workers_lose_nothing_committed(tmp_path: Path) -> None:
    root = tmp_path / "c"
    _, _plan, _ = begin(root, [4000] * 80, unit_views=2)
    committed: set[int] = set()
    for _ in range(2):
        workers = [processes.Running(work, root) for _ in range(2)]
        for worker in workers:  # let each commit at least one unit, then kill it in the middle of the next
            while not worker.printed():
                assert worker.returncode is None, worker.communicate()
                time.sleep(0.001)
            worker.kill()
            committed |= {int(number) for number in worker.printed().split()}
    assert committed
    assert all(commit_path(root, unit).is_file() for unit in committed)
    last = processes.Running(work, root)
    last.communicate()
    assert last.returncode == 0
    cache = Cache.open(root)
    outputs = cache.batch(cache.usable_views, ["embedding"])["embedding"].numpy()
    assert np.array_equal(outputs, np.repeat(np.arange(1, 81)[:, None], 4, 1))
    assert not list(root.glob("*/**/*.part"))
    assert verify(root) == []


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 8, [FRAMES, EMBEDDING], unit_views=4)
    files = [p for p in (tmp_path / "c").rglob("*") if p.is_file() and p.parent.name != "claims"]
    random = np.random.RandomState(0)
    for file in files:
        good = file.read_bytes()
        for _ in range(3):
            bad = bytearray(good)
            bad[random.randint(len(bad))] ^= 1 << random.randint(8)
            file.write_bytes(bytes(bad))
            try:
                damaged = verify(tmp_path / "c")
            except SpkdError as error:
                damaged = [str(error)]
            assert len(damaged) == 1, file
            assert file.name in damaged[0]
        file.write_bytes(good[: len(good) // 2])
        with pytest.raises(SpkdError, match=file.name) if file.suffix != "" else pytest.raises(SpkdError):
            lines = verify(tmp_path / "c")
            raise SpkdError(" ".join(lines) or "nothing found")
        file.write_bytes(good)
    assert verify(tmp_path / "c") == []


def test_a_damaged_shard_is_never_served(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 4, [EMBEDDING])
    shard = tmp_path / "c" / "embedding" / "c" / "0" / "0"
    good = shard.read_bytes()
    for bad in (good[:-1], good[:10], b"", good[:-6] + b"\0" * 6):
        shard.write_bytes(bad)
        with pytest.raises(SpkdError, match="shard"):
            Cache.open(tmp_path / "c").batch(np.array([0]), ["embedding"])
    write(tmp_path / "other", [4000] * 5, [EMBEDDING])
    shard.write_bytes((tmp_path / "other" / "embedding" / "c" / "0" / "0").read_bytes())
    with pytest.raises(SpkdError, match="of another cache"):
        Cache.open(tmp_path / "c").batch(np.array([0]), ["embedding"])
    shard.unlink()
    with pytest.raises(SpkdError, match="missing shard"):
        Cache.open(tmp_path / "c").batch(np.array([0]), ["embedding"])


def test_calls_in_the_background_keep_their_order_and_raise_here() -> None:
    done: list[int] = []
    held = threading.Event()
    with Background(ahead=3) as background:
        background(held.wait)
        background(done.append, 1)
        background.commit(done.append, 2)
        assert done == []
        held.set()
    assert done == [1, 2]

    def fail() -> None:
        raise SpkdError("no room")

    def run(start_with: str, more: int) -> None:
        with Background() as background:
            getattr(background, start_with)(fail)
            for _ in range(more):
                background(time.sleep, 0.001)

    for start_with in ("__call__", "commit"):
        for more in (0, 200):  # noticed at the end, or by a later call
            with pytest.raises(SpkdError, match="no room"):
                run(start_with, more)


def test_a_commit_does_not_hold_up_the_rows_behind_it() -> None:
    held, passed = threading.Event(), threading.Event()
    with Background() as background:
        background.commit(held.wait)
        background(passed.set)
        assert passed.wait(10)
        held.set()


def test_rows_that_change_before_the_commit_are_found(tmp_path: Path) -> None:
    """Checksums are of what was written, not of what lies in the file by then."""
    root = tmp_path / "c"
    _, plan, _ = begin(root, [4000] * 4, unit_views=4)
    assert next(claim_units(root, 1)) == 0
    writer = writer_of(root, plan, 0)
    for view in range(4):
        writer.put("embedding", [view], np.full((1, 4), view + 1.0))
    part = next(root.glob("embedding/c/0/*.part"))
    data = bytearray(part.read_bytes())
    data[HEADER + 8 : HEADER + 16] = bytes(8)
    part.write_bytes(data)
    with pytest.raises(SpkdError, match="rows of view 1 are not those written"):
        writer.commit()
    assert not commit_path(root, 0).is_file()
