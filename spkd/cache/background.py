"""Writing in the background, so that the teacher never waits for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

AHEAD = 8  # calls that may wait for the writing thread; each keeps one teacher batch in memory


class Background:
    """Runner of calls, in order, on a thread of its own.

    Commits wait for the disk. They run on a second thread, so that the rows of the next unit do not wait for them.

    An exception of a call is raised by the next call made here, or at the end of the block.

    Args:
        ahead: largest number of calls that wait; it bounds the memory that they hold.
    """

    def __init__(self, ahead: int = AHEAD) -> None:
        self._rows, self._commits = ThreadPoolExecutor(1, "cache rows"), ThreadPoolExecutor(1, "cache commits")
        self._ahead = ahead
        self._waiting: deque[Future] = deque()
        self._committing: deque[Future] = deque()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._waiting.append(self._rows.submit(function, *arguments))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > self._ahead):
            self._waiting.popleft().result()
        while self._committing and self._committing[0].done():
            self._committing.popleft().result()

    def commit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a call after all calls before it; calls made later may finish before it."""
        self(lambda: self._committing.append(self._commits.submit(function, *arguments)))

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        for pool in (self._rows, self._commits):
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for call in (*self._waiting, *self._committing):
                call.result()
