"""Processes that apply one function to jobs, where threads of one process would wait for Python's lock."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from spkd.errors import SpkdError, UsageError, first_line
from spkd.memory import keep_large_buffers
from spkd.progress import log

OF_SYSTEM = re.compile(r"^OSError: \[Errno (\d+)\]", re.MULTILINE)  # in a traceback

Job = TypeVar("Job")
Result = TypeVar("Result")


class Processes(Generic[Job, Result]):
    """Processes that apply one function to jobs. They start in the background.

    None is a fork of this process, whose threads and GPU it would have in the middle of their work: where processes are
    forked by default, they are forked from a server that has imported what they need. They work on one core each,
    ignore an interruption from the terminal, which this process answers, and end with this process, however it ends.

    Args:
        count: number of processes.
        function: of a job; pickled once for each process.
    """

    def __init__(self, count: int, function: Callable[[Job], Result]) -> None:
        method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
        context = multiprocessing.get_context("forkserver" if method == "fork" else method)
        context.set_forkserver_preload([type(function).__module__])
        given = (function, dict(os.environ), os.getcwd())
        self._pool = ProcessPoolExecutor(count, context, _begin, given)
        self._count, self._is_noted = count, False
        # A thread starts them, since it waits until the server has imported what they need.
        self._starter = ThreadPoolExecutor(1, "start of processes")
        self._started = self._starter.submit(self._start)

    def _start(self) -> None:
        for there in [self._pool.submit(os.getpid) for _ in range(self._count)]:
            there.result()

    @property
    def are_ready(self) -> bool:
        """Whether they have started. Where that fails, a note gives the reason."""
        if not self._started.done():
            return False
        if (error := self._started.exception()) is None:
            return True
        if not self._is_noted:
            self._is_noted = True
            note_threads(error)
        return False

    def submit(self, job: Job) -> Future[Result]:
        """Begin a job. What it raises is raised by the future; `concurrent.futures.BrokenExecutor` where a process was
        killed."""
        return self._pool.submit(_apply, job)

    def kill(self) -> None:
        """End them at once, also one that is stopped: nobody wants what they do."""
        for process in self._all():
            process.kill()

    def close(self) -> list[int]:
        """End them, once those that work have finished their jobs. Returns the exit codes, minus a signal."""
        self._starter.shutdown(wait=True)
        processes = self._all()  # which the pool forgets
        self._pool.shutdown(wait=True, cancel_futures=True)
        return [process.exitcode for process in processes if process.exitcode is not None]

    def _all(self) -> list[BaseProcess]:
        return list((self._pool._processes or {}).values())


def note_threads(error: BaseException) -> None:
    """Log why no processes could be started."""
    log(f"note: no processes could be started to load audio ({first_line(error)}); threads load it")


def check_is_guarded() -> None:
    """Check that this process does its own work.

    Raises:
        UsageError: it is another process that still starts, and for this imports the script of the first one.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing finds it
        raise UsageError(
            "each process that loads audio imports this script, and would do the same again; put what the script does "
            'under `if __name__ == "__main__":`'
        )


_function: Callable[[Any], Any]  # of this process, where it is one of `Processes`


def _begin(function: Callable[[Any], Any], environment: dict[str, str], folder: str) -> None:
    """Begin as one of `Processes`, in the environment that the parent has now: the server has that of its start."""
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    keep_large_buffers()
    torch.set_num_threads(1)
    _function = function


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)


def _apply(job: Any) -> Any:
    return _function(job)


def failure(error: BrokenExecutor, codes: Sequence[int], workers: int, batch_size: int) -> Exception:
    """The error where a process has ended, or what it gave could not be received; see `lost`."""
    if of_system := OF_SYSTEM.search(str(error.__cause__)):
        number = int(of_system[1])
        return OSError(number, os.strerror(number))
    return SpkdError(lost(codes, workers, batch_size))


def lost(codes: Sequence[int], workers: int, batch_size: int) -> str:
    """Line about a process that loads audio and ended before its work.

    Args:
        codes: exit codes of such processes, as far as they are known, minus a signal. Where one ends, others may be
            ended by SIGTERM.
    """
    of_itself = [code for code in codes if code not in (0, -signal.SIGTERM)]
    code = next(iter(of_itself or codes), None)
    if code == -signal.SIGKILL:
        return (
            "a process that loads audio was killed: most likely memory ran out and the system ended it; lower "
            f"workers={workers} or batch_size={batch_size}, and start the same command again"
        )
    how = (
        " unexpectedly"
        if code is None
        else f" with exit code {code}"
        if code >= 0
        else f" by {signal.Signals(-code).name}"
    )
    return f"a process that loads audio was ended{how}; start the same command again"


@dataclass(frozen=True)
class Passed:
    """Array that is pickled for another process as memory which that one maps.

    Unlike a file in /dev/shm, which has 64 MB in many containers, it has any size.
    """

    array: np.ndarray

    def __reduce__(self) -> tuple[Any, ...]:
        if not hasattr(os, "memfd_create") or not self.array.nbytes:  # macOS; and memory of no size cannot be mapped
            return np.asarray, (self.array,)
        descriptor = os.memfd_create("batch", os.MFD_CLOEXEC)
        try:
            # To write is faster than to fill a map, whose pages the system would zero first.
            data, place = np.ascontiguousarray(self.array).data.cast("B"), 0
            while place < len(data):
                place += os.pwrite(descriptor, data[place:], place)
            return _mapped, (DupFd(descriptor), self.array.shape, self.array.dtype)
        finally:
            os.close(descriptor)  # of which DupFd has a copy


def _mapped(duplicate: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    descriptor = duplicate.detach()
    try:
        return np.frombuffer(mmap.mmap(descriptor, 0), dtype).reshape(shape)
    finally:
        os.close(descriptor)
