"""Who fills a unit: identities, dead and torn claims, owners that were stopped and wake."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spkd.cache import Cache, claims, finalize, owner, verify
from spkd.cache.claims import claim_units, release
from spkd.cache.folder import claim_path, commit_path, growth_path, load_card
from spkd.errors import SpkdError
from spkd.files import atomic
from spkd.outputs.target import Target

from .test_layout import make_plan, start, writer_of
from .test_lock import FLOCK

EMBEDDING = Target("embedding", 4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    manifest, plan = make_plan([4000] * 4, unit_views=2)
    start(tmp_path / "c", [EMBEDDING], manifest, plan)
    return tmp_path / "c"


def as_worker(monkeypatch: pytest.MonkeyPatch, name: str, pid: int = 1, namespace: str = "container") -> None:
    """Be a worker in a container: every one has the same host name and process number."""
    monkeypatch.setattr(atomic._identity, "name", name)
    monkeypatch.setattr(socket, "gethostname", lambda: "worker")
    monkeypatch.setattr(os, "getpid", lambda: pid)
    monkeypatch.setattr(owner, "_namespace", lambda: namespace)


def test_two_containers_of_one_name_and_number_take_other_units(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_worker(monkeypatch, "a", namespace="first")
    first = next(claim_units(root, 2))
    as_worker(monkeypatch, "b", namespace="second")
    assert list(claim_units(root, 2)) == [1]
    assert first == 0


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"pid": "x"}', b"9" * 5000, b"\xff", b"[" * 10**5])
def test_a_torn_or_odd_claim_is_taken_over(root: Path, content: bytes) -> None:
    claim_path(root, 0).parent.mkdir()
    claim_path(root, 0).write_bytes(content)
    old = time.time() - owner.STALE - 1
    os.utime(claim_path(root, 0), (old, old))
    assert list(claim_units(root, 2)) == [0, 1]


def test_an_empty_claim_is_given_a_moment_and_then_taken(root: Path) -> None:
    claim_path(root, 0).parent.mkdir()
    claim_path(root, 0).write_bytes(b"")
    assert next(claim_units(root, 1), None) is None
    old = time.time() - 10
    os.utime(claim_path(root, 0), (old, old))
    assert next(claim_units(root, 1), None) == 0


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be a user whom others keep from their files, as root is not."""
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_claim_that_cannot_be_read_is_not_torn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a user of the group with umask 077, whose locks on another machine are not seen here."""
    monkeypatch.chdir(root)  # the folders above are closed to others
    claim = claim_path(Path(), 0)
    claim.parent.mkdir()
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "worker": "x"}))
    claim.chmod(0o000)
    claim.parent.chmod(0o777)
    os.utime(claim, (time.time() - 60,) * 2)  # of its last heartbeat
    with as_nobody():
        assert not owner.is_gone(claim)
        assert not claims.remove_gone(claim)
    os.utime(claim, (time.time() - owner.STALE - 1,) * 2)
    with as_nobody():
        assert owner.is_gone(claim)
        assert not claims.remove_gone(claim)  # it cannot be locked
    claim.chmod(0o600)
    assert list(claim_units(root, 2)) == [0, 1]


def test_a_claim_dated_ahead_of_the_clock_is_taken_over(root: Path) -> None:
    claim_path(root, 0).parent.mkdir()
    claim_path(root, 0).write_text(json.dumps({"host": "elsewhere", "pid": 1, "worker": "x"}))
    ahead = time.time() + 86_400
    os.utime(claim_path(root, 0), (ahead, ahead))
    assert list(claim_units(root, 2)) == [0, 1]


def test_a_process_number_that_another_process_has_now_is_no_owner(root: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        living_owner = owner.this_process() | {"pid": living.pid, "worker": "x"}
        claim_path(root, 0).parent.mkdir()
        claim_path(root, 0).write_text(json.dumps(living_owner | {"started": "1"}))
        assert next(claim_units(root, 1), None) == 0
        release(root, 0)
        claim_path(root, 0).write_text(json.dumps(living_owner | {"started": owner._started(living.pid)}))
        assert next(claim_units(root, 1), None) is None
    finally:
        living.kill()
        living.wait()


def test_the_owner_may_be_a_process_that_the_system_hides(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's on a machine with hidepid=2: whether it lives is known, but not since when."""
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        claim_path(root, 0).parent.mkdir()
        others = owner.this_process() | {"pid": living.pid, "worker": "x", "started": owner._started(living.pid)}
        monkeypatch.setattr(owner, "PROCESSES", tmp_path / "hidden")
        claim_path(root, 0).write_text(json.dumps(others))
        assert next(claim_units(root, 1), None) is None
        old = time.time() - owner.STALE - 1
        os.utime(claim_path(root, 0), (old, old))
        assert next(claim_units(root, 1), None) == 0
        claim_path(root, 0).write_text(json.dumps(others))
        assert next(claim_units(root, 1), None) is None
    finally:
        living.kill()
        living.wait()
    assert next(claim_units(root, 1), None) == 0


def test_an_owner_that_wakes_after_a_takeover_touches_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = make_plan([4000] * 4, unit_views=2)
    as_worker(monkeypatch, "stopped")
    assert next(claim_units(root, 2)) == 0
    stopped = writer_of(root, plan, 0)
    for view in plan.unit(0):
        stopped.put("embedding", [view], np.full((1, 4), 99.0))
    old = time.time() - owner.STALE - 1
    os.utime(claim_path(root, 0), (old, old))

    as_worker(monkeypatch, "second")
    for unit in claim_units(root, 2):
        writer = writer_of(root, plan, unit)
        for view in plan.unit(unit):
            writer.put("embedding", [view], np.full((1, 4), view + 1.0))
        assert writer.commit() == {}
    before = commit_path(root, 0).read_bytes()

    as_worker(monkeypatch, "stopped")
    assert stopped.commit() is None
    assert commit_path(root, 0).read_bytes() == before
    assert finalize(root, load_card(root), plan)
    assert verify(root) == []
    values = Cache.open(root).batch(np.arange(4), ["embedding"])["embedding"].numpy()
    assert np.array_equal(values, np.repeat(np.arange(1.0, 5.0)[:, None], 4, 1))
    assert not list(root.glob("**/*.part"))


@pytest.mark.parametrize("file_system", FLOCK)
def test_a_unit_is_not_taken_over_in_the_middle_of_its_commit(
    root: Path, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", FLOCK[file_system])
    as_worker(monkeypatch, "a")
    assert next(claim_units(root, 1)) == 0
    old = time.time() - owner.STALE - 1
    os.utime(claim_path(root, 0), (old, old))
    with claims.committing(root, 0) as mine:
        assert mine
        as_worker(monkeypatch, "b")
        assert next(claim_units(root, 1), None) is None
        as_worker(monkeypatch, "a")
    as_worker(monkeypatch, "b")
    assert next(claim_units(root, 1), None) == 0


@pytest.mark.parametrize("ahead", [-3600.0, -60.0, 300.0, 3600.0])
def test_a_machine_whose_clock_is_wrong_takes_over_dead_units_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    as_worker(monkeypatch, "a", namespace="first")
    assert list(claim_units(root, 2)) == [0, 1]
    clock, utime = time.time, os.utime
    monkeypatch.setattr(time, "time", lambda: clock() + ahead)
    # As over SMB, the time that utime sets is this machine's.
    monkeypatch.setattr(os, "utime", lambda path, times=None: utime(path, times or (time.time(), time.time())))
    as_worker(monkeypatch, "b", namespace="second")
    assert list(claim_units(root, 2)) == []
    silent_since = clock() - owner.STALE - 1
    for unit in (0, 1):
        os.utime(claim_path(root, unit), (silent_since, silent_since))
    as_worker(monkeypatch, "a", namespace="first")
    owner.heartbeat(claim_path(root, 0))
    as_worker(monkeypatch, "b", namespace="second")
    assert list(claim_units(root, 2)) == [1]


def test_a_claim_is_kept_alive_while_its_owner_makes_progress(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(asked) * 0 + now[0])
    monkeypatch.setattr(owner, "HEARTBEAT", 0.001)
    assert next(claim_units(root, 2)) == 0
    path = claim_path(root, 0)

    def has_beaten() -> bool:
        """Whether the claim is given another time at one of the next heartbeats, of which some are waited for."""
        os.utime(path, (1, 1))
        last = next(asked) + 20
        while next(asked) < last + 20 and path.stat().st_mtime == 1:
            time.sleep(0.001)
        return path.stat().st_mtime != 1

    with owner.kept_alive(lambda: [path], longest=3600.0) as progress:
        assert has_beaten()
        now[0] = 3599.0
        assert has_beaten()
        progress()
        now[0] = 7000.0
        assert has_beaten()
        now[0] = 7200.0
        has_beaten()  # perhaps by one that had begun
        assert not has_beaten()
        progress()
        assert has_beaten()
        path.write_text(json.dumps(owner.this_process() | {"worker": "another"}))
        has_beaten()
        assert not has_beaten()


def test_a_link_or_pipe_in_the_place_of_the_claim_on_growth_is_refused(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    growth = growth_path(tmp_path)
    growth.symlink_to(tmp_path / "made")
    with pytest.raises(SpkdError, match="growth: a symbolic link"), claims.changing(tmp_path):
        pass
    assert not (tmp_path / "made").exists()
    growth.unlink()
    os.mkfifo(growth)
    with pytest.raises(SpkdError, match="growth: not a regular file"), claims.changing(tmp_path):
        pass


def test_releasing_leaves_the_claim_of_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_worker(monkeypatch, "a")
    assert next(claim_units(root, 1)) == 0
    as_worker(monkeypatch, "b", namespace="other")
    release(root, 0)
    assert claim_path(root, 0).is_file()
