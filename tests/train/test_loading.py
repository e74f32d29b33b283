"""Loaders in processes that are forked (Linux), spawned (macOS), or forked from a server (Linux from Python 3.14)."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spkd.train import trainer
from spkd.train.stopping import SIGNALS
from tests.conftest import save_teacher
from tests.processes import Running, command

METHODS = ["fork", pytest.param("forkserver", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.slow)]
RUNS = {
    "positives": ["loss=ntxent", "mining.positives=2", "mining.floor=-1", "sampler=speakers"],
    "negatives": ["loss=contrastive", "mining.negatives=2", "sampler=hard", "sampler.hard.group=2"],
    "two paths": ["loss=one-step", "loss.one_step.targets=[frames]", "student=ssl", "student.ssl.adapters=4"],
}
SMALL = ["student.embedding=8", "batch_size=6", "crop=0.6", "steps=4", "augment.noise=synthetic"]
XVECTOR = "student.channels=16"


@contextlib.contextmanager
def starting_by(method: str) -> Iterator[None]:
    """Processes are started by a method, also those of torch's loaders."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    ("method", "run"),
    [
        *(("fork", run) for run in RUNS),
        *(pytest.param("spawn", run, marks=pytest.mark.slow) for run in RUNS),
        pytest.param("forkserver", "positives", marks=pytest.mark.slow),
    ],
)
def test_weights_are_those_of_one_process_however_loaders_start(
    spkd: Callable, extraction: list[str], corpus: Path, method: str, run: str
) -> None:
    save_teacher(Path("teacher"), 12)
    spkd(*extraction, "teacher.targets=[embedding,frames]").ok()
    sizes = ["student.ssl.layers=1"] if run == "two paths" else [XVECTOR]
    given = [*SMALL, *sizes, *RUNS[run], f"manifest={corpus / 'manifest.csv'}"]
    spkd("train", *given, "workers=0", "out=one").ok()
    with starting_by(method):
        spkd("train", *given, "workers=2", "out=three").ok()
    assert Path("three/model.safetensors").read_bytes() == Path("one/model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_loaders_outlive_signals_that_ask_for_an_end(
    spkd: Callable, extraction: list[str], corpus: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A terminal sends them to every process of the command; the run itself decides when it ends."""
    save_teacher(Path("teacher"), 12)
    spkd(*extraction).ok()
    after, seen = trainer._after_step, []

    def signalled(*arguments: object) -> bool:
        loaders = multiprocessing.active_children()
        seen.extend(loaders)
        for loader in loaders:
            for number in SIGNALS:
                os.kill(loader.pid, number)  # type: ignore[arg-type]
        return after(*arguments)

    monkeypatch.setattr(trainer, "_after_step", signalled)
    given = [*SMALL, XVECTOR, "loss=cosine", f"manifest={corpus / 'manifest.csv'}", "workers=1"]
    with starting_by(method):
        done = spkd("train", *given).ok()
    assert seen
    assert done.err == ""


def with_shared_memory(left: int, *arguments: str) -> None:
    """The command line where /dev/shm has so many pages left; without a word where nobody can make such a place."""
    try:
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # mounts of its own
        subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True, capture_output=True)
    except (OSError, AttributeError, AssertionError, subprocess.CalledProcessError):
        return
    pages = os.statvfs("/dev/shm").f_bavail - left
    Path("/dev/shm/others").write_bytes(bytes(pages * os.statvfs("/dev/shm").f_bsize))
    print("made")
    command(*arguments)


@pytest.mark.parametrize(("left", "is_noted"), [(16, False), (0, True)])
def test_full_shared_memory_stops_no_training(
    spkd: Callable, extraction: list[str], corpus: Path, left: int, is_noted: bool
) -> None:
    save_teacher(Path("teacher"), 12)
    spkd(*extraction, "teacher.targets=[embedding,frames]").ok()
    losses = ["loss=multilevel", "loss.multilevel.levels={frames: frames, embedding: embedding}"]
    given = [*SMALL, XVECTOR, *losses, f"manifest={corpus / 'manifest.csv'}", "steps=12", "batch_size=12"]
    running = Running(with_shared_memory, left, "train", *given, "workers=2")
    out, error = running.communicate()
    if "made" not in out:
        pytest.skip("no mounts here")
    assert (running.returncode, error) == (0, "")
    note = "note: no processes could be started to load audio (No space left on device; they need descriptors, "
    assert (note in out) == is_noted
    spkd("train", *given, "workers=0", "out=one").ok()
    assert Path("student/model.safetensors").read_bytes() == Path("one/model.safetensors").read_bytes()


def stopped_loader(*arguments: str) -> None:
    """The command line, whose loader stops with the first step."""
    after = trainer._after_step

    def stop(*given: Any) -> bool:
        (loader,) = multiprocessing.active_children()
        os.kill(loader.pid, signal.SIGSTOP)  # type: ignore[arg-type]
        print("stopped", loader.pid, flush=True)
        return after(*given)

    trainer._after_step = stop
    command(*arguments)


def test_a_run_whose_loader_is_stopped_can_be_interrupted(spkd: Callable, extraction: list[str], corpus: Path) -> None:
    save_teacher(Path("teacher"), 12)
    spkd(*extraction).ok()
    given = [*SMALL, XVECTOR, "loss=cosine", f"manifest={corpus / 'manifest.csv'}", "steps=500", "workers=1"]
    running = Running(stopped_loader, "train", *given)
    deadline = time.monotonic() + 60
    while "stopped" not in running.printed():
        assert running.returncode is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while running.returncode is None and time.monotonic() < deadline:
        running.send_signal(signal.SIGTERM)  # the first asks for an end after the step, for which there is no batch
        time.sleep(0.5)
    _, error = running.communicate(1)
    assert (running.returncode, len(error.splitlines())) == (130, 1)
    assert error.startswith("error: interrupted")  # twice, unless a batch was there for the step at the first


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_caches_and_scores_are_the_same_however_processes_start(
    spkd: Callable, extraction: list[str], corpus: Path, method: str
) -> None:
    save_teacher(Path("teacher"), 12)
    manifest = f"manifest={corpus / 'manifest.csv'}"
    evaluation = ["eval", corpus / "trials.txt", manifest, "model=checkpoint", "model.weights=teacher", "workers=2"]
    for way in ("fork", method):
        with starting_by(way):
            spkd(*extraction, f"cache={way}/cache", "view.speeds=[0.9,1.0]", "workers=2").ok()
            spkd(*evaluation, f"out={way}/eval").ok()
    for file in ("cache/embedding/c/0/0", "eval/scores.txt"):
        assert Path(method, file).read_bytes() == Path("fork", file).read_bytes()
