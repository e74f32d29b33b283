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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
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


class Machine(NamedTuple):
    """A pretended machine.

    Attributes:
        address: its address among the others.
        prefix: words before a command that runs there.
        variables: of the environment of such a command.
    """

    address: str
    prefix: tuple[str, ...] = ()
    variables: Mapping[str, str] = MappingProxyType({})

    def start(self, *words: str) -> subprocess.Popen:
        """Start a command there."""
        root = Path(__file__).parents[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **self.variables}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*self.prefix, *words], env=environment, text=True, **pipes)


ON_LOOPBACK = (Machine("127.0.0.2"), Machine("127.0.0.3"))


@contextlib.contextmanager
def apart() -> Iterator[tuple[Machine, Machine]]:
    """Two machines with networks of their own, which one cable joins: neither has the other's loopback.

    The test is skipped where the system lets nobody make them.
    """
    names = [f"spkd-{os.getpid()}-{number}" for number in range(2)]
    addresses = [f"10.213.77.{1 + number}" for number in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                for link in ("cable", "lo"):
                    ip("-n", name, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no network namespaces here")
        variables = {"GLOO_SOCKET_IFNAME": "cable"}  # the name of this machine has another address
        first, second = (
            Machine(address, ("ip", "netns", "exec", name), variables)
            for name, address in zip(names, addresses, strict=True)
        )
        yield first, second


def machines(joined: Sequence[Machine], *arguments: str) -> list[subprocess.Popen]:
    """The command line as one rank on each of several machines, whose torchruns meet at the first."""
    main = Path(__file__).parents[1] / "benchmarks" / "spkd_main.py"
    count, first = str(len(joined)), joined[0].address
    meeting = ["--nnodes", count, "--master-addr", first, "--master-port", str(free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting]
    return [
        machine.start(*torchrun, f"--node-rank={number}", f"--local-addr={machine.address}", str(main), *arguments)
        for number, machine in enumerate(joined)
    ]


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
