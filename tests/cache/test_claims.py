"""Who fills a unit: identities, dead and torn claims, owners that were stopped and wake."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spkd.cache import Cache, claims, finalize, verify
from spkd.cache.claims import claim_units, release
from spkd.cache.folder import claim_path, commit_path, load_card
from spkd.files import atomic
from spkd.outputs.target import Target

from .test_layout import make_plan, start, writer_of

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
    monkeypatch.setattr(claims, "_namespace", lambda: namespace)


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
    old = time.time() - claims.STALE - 1
    os.utime(claim_path(root, 0), (old, old))
    assert list(claim_units(root, 2)) == [0, 1]


def test_an_empty_claim_is_given_a_moment_and_then_taken(root: Path) -> None:
    claim_path(root, 0).parent.mkdir()
    claim_path(root, 0).write_bytes(b"")
    assert next(claim_units(root, 1), None) is None
    old = time.time() - 10
    os.utime(claim_path(root, 0), (old, old))
    assert next(claim_units(root, 1), None) == 0


def test_a_claim_dated_ahead_of_the_clock_is_taken_over(root: Path) -> None:
    claim_path(root, 0).parent.mkdir()
    claim_path(root, 0).write_text(json.dumps({"host": "elsewhere", "pid": 1, "worker": "x"}))
    ahead = time.time() + 86_400
    os.utime(claim_path(root, 0), (ahead, ahead))
    assert list(claim_units(root, 2)) == [0, 1]


def test_a_process_number_that_another_process_has_now_is_no_owner(root: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        owner = {"host": socket.gethostname(), "pid": living.pid, "namespace": claims._namespace(), "worker": "x"}
        claim_path(root, 0).parent.mkdir()
        claim_path(root, 0).write_text(json.dumps(owner | {"started": "1"}))
        assert next(claim_units(root, 1), None) == 0
        release(root, 0)
        claim_path(root, 0).write_text(json.dumps(owner | {"started": claims._started(living.pid)}))
        assert next(claim_units(root, 1), None) is None
    finally:
        living.kill()
        living.wait()


def test_an_owner_that_wakes_after_a_takeover_touches_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = make_plan([4000] * 4, unit_views=2)
    as_worker(monkeypatch, "stopped")
    assert next(claim_units(root, 2)) == 0
    stopped = writer_of(root, plan, 0)
    for view in plan.unit(0):
        stopped.put("embedding", [view], np.full((1, 4), 99.0))
    old = time.time() - claims.STALE - 1
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


def test_a_unit_is_not_taken_over_in_the_middle_of_its_commit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_worker(monkeypatch, "a")
    assert next(claim_units(root, 1)) == 0
    old = time.time() - claims.STALE - 1
    os.utime(claim_path(root, 0), (old, old))
    with claims.committing(root, 0) as mine:
        assert mine
        as_worker(monkeypatch, "b")
        assert next(claim_units(root, 1), None) is None
    assert next(claim_units(root, 1), None) == 0


def test_releasing_leaves_the_claim_of_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_worker(monkeypatch, "a")
    assert next(claim_units(root, 1)) == 0
    as_worker(monkeypatch, "b", namespace="other")
    release(root, 0)
    assert claim_path(root, 0).is_file()
