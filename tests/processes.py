"""Processes of spkd for tests that kill, interrupt or compare them. They are forked from a server that has imported
spkd, so that each starts in a few milliseconds where a fresh one takes seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["spkd.cli", "spkd.cache.exchange.remote", "spkd.extract.run", "spkd.teachers", "spkd.train.trainer", __name__]
)


class Running:
    """A function in a process of its own.

    Attributes:
        pid: of the process. returncode: None while it runs, minus the signal that ended it, else its exit code.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: Any,
        cwd: Path | str = ".",
        env: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            function: of a module, not nested. cwd: the folder it runs in. env: variables beyond those of this process.
        """
        self._folder = tempfile.TemporaryDirectory()
        streams = [os.path.join(self._folder.name, name) for name in ("out", "err")]
        environment, threads = {**os.environ, **(env or {})}, torch.get_num_threads()  # sums depend on the threads
        whole = (function, arguments, os.path.abspath(cwd), environment, threads, streams)
        self._process = SERVER.Process(target=_run, args=whole)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.communicate()

    def printed(self) -> str:
        """What it has printed by now."""
        path = Path(self._folder.name, "out")
        return path.read_text() if path.is_file() else ""

    def communicate(self, timeout: float = 120.0) -> tuple[str, str]:
        """What it printed, and its errors, once it has ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        return self.printed(), Path(self._folder.name, "err").read_text()


def spkd(*arguments: object, cwd: Path | str = ".", env: Mapping[str, str] | None = None) -> Running:
    """The command line."""
    return Running(command, *map(str, arguments), cwd=cwd, env=env)


def command(*arguments: str) -> None:
    """The command line in this process."""
    from spkd.cli import main

    sys.argv = ["spkd", *arguments]
    main()


def _run(
    function: Callable[..., object],
    arguments: tuple,
    cwd: str,
    environment: dict[str, str],
    threads: int,
    streams: list[str],
) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    function(*arguments)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def machines(count: int, *arguments: str) -> list[subprocess.Popen]:
    """The command line as one rank on each of several machines, whose torchruns meet at an address of the loopback."""
    main = Path(__file__).parents[1] / "benchmarks" / "spkd_main.py"
    meeting = ["--nnodes", str(count), "--master-addr", "127.0.0.2", "--master-port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(main.parents[1])}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *meeting, f"--node-rank={number}",
             f"--local-addr=127.0.0.{2 + number}", str(main), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


def lose(machine: subprocess.Popen) -> None:
    """Kill torchrun and its rank, which is in a session of its own, as a power cut does."""
    ranks = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
    for process in (*map(int, ranks), machine.pid):
        os.kill(process, signal.SIGKILL)
    machine.communicate()


@contextlib.contextmanager
def half_a_core() -> Iterator[Path | None]:
    """A control group of this machine that has half a core; None where it cannot be made."""
    root, name, quota = Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", "50000"
    if not (root / "cgroup.procs").is_file():
        root, name, quota = root.parent, "cpu.max", "50000 100000"
    folder = root / f"spkd-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        (folder / name).write_text(quota)
        is_made = True
    except OSError:
        is_made = False
    try:
        yield folder if is_made else None
    finally:
        folder.rmdir()
