"""Inputs and outputs of an ONNX model, examined in a separate process.

A graph may loop without end or ask for more memory than there is. Limits of processor time and memory then end that
process and not this one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spkd.errors import SpkdError, first_line

CHILD = Path(__file__).with_name("onnx_child.py")
SECONDS = 60  # processor time (s) for loading a small model and running it on some seconds of noise
BYTES_A_SECOND = 20_000_000  # bytes of weights for each further second of processor time
MEMORY = 2 << 30  # bytes in addition to several copies of the weights
COPIES = 4
MOST_LINE = 1 << 22  # largest number of characters of an answer
OUT_OF_MEMORY = ("alloc", "memory")  # words in the messages of a runtime that could not allocate memory


class Feed(NamedTuple):
    """Content of an input.

    Attributes:
        type: onnxruntime's name of the type.
        value: value of all elements; None: noise, the same in every run.
        axis: axis in the middle of which the content changes.
        halves: values before and after the middle; of noise, their seeds. None: the same content throughout.
        levels: factors of the noise in each row of a batch; None: 1.
    """

    type: str
    shape: list[int]
    value: int | None = None
    axis: int = -1
    halves: tuple[int, int] | None = None
    levels: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Node:
    """Input of a graph.

    Attributes:
        shape: dimensions: numbers, names of free dimensions, or None.
    """

    name: str
    type: str
    shape: list[int | str | None]


@dataclass(frozen=True)
class Output:
    """Output of one run."""

    shape: list[int]
    type: str


class Probe:
    """Model that is loaded in a separate process."""

    def __init__(self, path: Path, process: subprocess.Popen[str], errors: Path, seconds: int) -> None:
        self._path, self._process, self._errors, self._seconds = path, process, errors, seconds
        tree = self._answer()
        if "error" in tree:
            self._refuse_memory(tree["error"])
            raise SpkdError(f"{path}: cannot be loaded as an ONNX model ({first_line(ValueError(tree['error']))})")
        self.inputs = [Node(*node) for node in tree["inputs"]]
        self.outputs: list[str] = tree["outputs"]
        self.metadata: dict[str, str] = tree["metadata"]

    def run(self, feeds: dict[str, Feed], outputs: Sequence[str]) -> dict[str, Output] | str:
        """Outputs of a run by name, or the reason for which it failed.

        Raises:
            SpkdError: the run takes too long or asks for too much memory.
        """
        tree = self._asked(feeds, outputs, "shapes")
        if "error" in tree:
            return first_line(ValueError(tree["error"]))
        return {n: Output(s, t) for n, s, t in zip(outputs, tree["shapes"], tree["types"], strict=True)}

    def values(self, feeds: dict[str, Feed], output: str) -> list[float]:
        """Numbers of an output. Raises SpkdError: the run fails, takes too long or asks for too much memory."""
        tree = self._asked(feeds, [output], "values")
        if "error" in tree:
            raise SpkdError(f"{self._path}: fails on noise ({first_line(ValueError(tree['error']))})")
        return [float(value) for value in tree["values"]]

    def difference(self, feeds: dict[str, Feed], outputs: Sequence[str]) -> float:
        """Largest difference between the rows of a batch and the same rows each in a run of its own, as a share of the
        largest number of the row. Of one row, it is that of two runs.

        Raises:
            SpkdError: as of `values`.
        """
        tree = self._asked(feeds, outputs, "difference")
        if "error" in tree:
            raise SpkdError(f"{self._path}: fails on noise ({first_line(ValueError(tree['error']))})")
        return float(tree["difference"])

    def _asked(self, feeds: dict[str, Feed], outputs: Sequence[str], answer: str) -> dict[str, Any]:
        asked = {"feeds": feeds, "outputs": list(outputs), "answer": answer}
        with suppress(OSError):  # where the process has ended, its answer tells why
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        tree = self._answer()
        if "error" in tree:
            self._refuse_memory(tree["error"])
        return tree

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline(MOST_LINE)
        try:
            tree = json.loads(line)
        except ValueError:
            tree = None
        if isinstance(tree, dict):
            return tree
        # The process has ended or is about to: by the limit of time, or by itself where memory could not be allocated.
        code = self._process.wait()
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            raise SpkdError(
                f"{self._path}: cannot be used as a teacher: it runs for more than {self._seconds} s of processor "
                "time on 2 s of noise"
            )
        message = self._errors.read_text(errors="replace")[:MOST_LINE]
        self._refuse_memory(message)
        last = message.strip().splitlines()[-1:] or [f"exit code {code}"]
        raise SpkdError(f"{self._path}: cannot be used as a teacher: onnxruntime ends with it ({last[0][:200]})")

    def _refuse_memory(self, message: str) -> None:
        if any(word in message.lower() for word in OUT_OF_MEMORY):
            raise SpkdError(
                f"{self._path}: cannot be used as a teacher: it asks for more memory than {MEMORY >> 30} GiB and "
                f"{COPIES} times its weights for 2 s of noise"
            )


def seconds_for(size: int) -> int:
    """Processor time (s) for loading a model of so many bytes and running it on two seconds of noise."""
    return SECONDS + size // BYTES_A_SECOND


@contextmanager
def probed(path: Path, size: int) -> Iterator[Probe]:
    """Model in a separate process, which ends with the block.

    Args:
        size: size of all files of the model (bytes).
    Raises:
        SpkdError: the model cannot be loaded, takes too long, or asks for too much memory.
    """
    seconds, memory = seconds_for(size), MEMORY + COPIES * size
    # -P and the empty folder ensure that no module in the user's current folder is imported.
    command = [sys.executable, "-P", str(CHILD), str(path.absolute()), str(seconds), str(memory)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory(prefix="spkd-probe-") as folder, open(Path(folder) / "errors", "wb") as errors:
        (Path(folder) / "empty").mkdir()
        process = subprocess.Popen(
            command,
            cwd=Path(folder) / "empty",
            env=environment,
            text=True,
            errors="replace",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            yield Probe(path, process, Path(folder) / "errors", seconds)
        finally:
            process.kill()
            process.communicate()
