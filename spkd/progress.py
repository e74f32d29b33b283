"""Progress of operations that take more than two seconds: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from spkd.errors import printable

LINE_EVERY = 10.0  # s between two plain lines


def log(text: str) -> None:
    """Print lines of a command's report on stdout, each as `printable`: without the credentials of an address."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


class Ticker:
    """Base class of displays of progress.

    Args:
        done: number of items that were done before.
    Attributes:
        done: number of items done.
        note: text that follows the rate, such as values of losses.
    """

    def __init__(self, total: int, unit: str, done: int) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._start_done, self._start = done, time.monotonic()
        self.note = ""

    def advance(self, count: int, note: str | None = None) -> None:
        """Add items done.

        Args:
            note: new note; None keeps the old one.
        """
        self.done += count
        if note is not None:
            self.note = note
        self._show()

    def rate(self) -> float:
        """Items per second since the start."""
        return (self.done - self._start_done) / max(time.monotonic() - self._start, 1e-9)

    def pace(self) -> str:
        """Rate and remaining time, or the whole time at the end, as text."""
        rate = self.rate()
        if self.done >= self.total:
            return f"{rate:.1f} {self.unit}/s, {time.monotonic() - self._start:.0f} s in all"
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        return f"{rate:.1f} {self.unit}/s, {left:.0f} s left"

    def text(self) -> str:
        """Rate, remaining time and note, as text."""
        return self.pace() + (f"  {self.note}" if self.note else "")

    def _show(self) -> None:
        raise NotImplementedError


class _Lines(Ticker):
    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        super().__init__(total, unit, done)
        self._label, self._last, self._shown = label, time.monotonic(), -1

    def _show(self) -> None:
        now = time.monotonic()
        finished = self.done >= self.total and now - self._start > 2.0 and self._shown < self.done
        if now - self._last >= LINE_EVERY or finished:
            self._last, self._shown = now, self.done
            print(f"{self._label}: {self.done}/{self.total} {self.unit}, {self.text()}", flush=True)


@contextmanager
def track(label: str, total: int, unit: str = "views", done: int = 0) -> Iterator[Ticker]:
    """Show progress while the block runs.

    Args:
        done: number of items that were done before.
    """
    label = printable(label)
    if not sys.stdout.isatty():
        yield _Lines(label, total, unit, done)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        refresh_per_second=4,
    )
    task = bar.add_task(label, total=total, completed=done, text="")

    class _Bar(Ticker):
        def _show(self) -> None:
            bar.update(task, completed=self.done, total=self.total, text=self.text())

    with bar:
        yield _Bar(total, unit, done)
