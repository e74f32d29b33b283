"""Reading a cache by memory maps."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from spkd.cache.card import Card
from spkd.cache.crop import Crop
from spkd.cache.folder import CompletionRecord, remedy, shard_path
from spkd.cache.layout import Shard, expect_shards, map_shard, row_format, unit_header
from spkd.cache.lock import hold
from spkd.cache.mapped_plan import open_plan
from spkd.cache.plan import Plan
from spkd.cache.source import SingleCache
from spkd.errors import SpkdError
from spkd.outputs.target import Target

WARM_RATE = 3e9  # bytes/s: memory gives 10e9 and more, disks less than this
JUDGED_BYTES = 1 << 20  # smaller batches say too little of the rate, and gain nothing from a second thread
MOST_MAPPED = 16_384  # shards mapped at once: the kernel allows a process 65,530 maps
TORCH_TYPES = {"<f2": torch.float16, "<f4": torch.float32, "|i1": torch.int8, "|u1": torch.uint8}


class Ragged(NamedTuple):
    """Frames of views of different lengths, one view after the other.

    Attributes:
        values: (sum of lengths, D) the frames.
        lengths: (B,) number of frames of each view.
    """

    values: Tensor
    lengths: np.ndarray

    def pieces(self) -> list[np.ndarray]:
        """The frames of each view: (length, D)."""
        return np.split(self.values.numpy(), np.cumsum(self.lengths)[:-1])


class Helper:
    """A second thread that copies half of a batch.

    A batch is copied in a fifth of a millisecond: an executor's bookkeeping takes a third of what the thread gains.

    Attributes:
        process: id of the process in which it runs.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self._work: SimpleQueue[Half | None] = SimpleQueue()
        threading.Thread(target=_copy_halves, args=(self._work,), name="cache reader", daemon=True).start()
        weakref.finalize(self, self._work.put, None)

    def halve(self, copy: Callable[[int, int], None], count: int) -> None:
        """Call `copy` for numbers 0 to count - 1, in two threads at once. Raises what one of them raises."""
        half = Half(copy, count // 2, count, SimpleQueue())
        self._work.put(half)
        try:
            copy(0, half.start)
        finally:
            error = half.done.get()
        if error is not None:
            raise error


class Half(NamedTuple):
    """Numbers for which the second thread calls a function, and where it reports that it did."""

    copy: Callable[[int, int], None]
    start: int
    stop: int
    done: SimpleQueue[BaseException | None]


def _copy_halves(work: SimpleQueue[Half | None]) -> None:
    """What the thread runs. It holds no reference to its `Helper`, so that it ends with it."""
    while (half := work.get()) is not None:
        try:
            half.copy(half.start, half.stop)
        except BaseException as error:
            half.done.put(error)
        else:
            half.done.put(None)
        del half  # it refers to the batch


class Cache(SingleCache):
    """Reader of a cache as `spkd extract` writes it.

    It is safe in forked and spawned workers: each process opens its maps on first use, read-only.

    Attributes:
        bytes: size of all shards together, by the completion record.
    """

    def __init__(self, root: Path, card: Card, plan: Plan, rejected: dict[int, str]) -> None:
        super().__init__(root, str(root), card, plan, rejected)
        self.bytes = 0
        self._shards: dict[str, dict[int, Shard]] = {}
        self._cold = True  # whether the last large batch came from the disk
        self._second: Helper | None = None
        self._held: IO[bytes] | None = None

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """Open a complete cache. Of a cache that is growing, the parts that were complete before are opened.

        Raises:
            SpkdError: no cache there, not complete, of a newer format, or its card, plan or record is damaged.
        """
        root = Path(path)
        record = CompletionRecord.load(root)
        cache = cls(root, record.card, open_plan(root, record), record.rejected)
        cache.bytes, cache._held = record.bytes, hold(root)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker opens its own maps: pickling one would copy the shard.
        return {**self.__dict__, "_shards": {}, "_second": None, "_held": None}

    def batch(
        self,
        views: np.ndarray,
        names: Sequence[str],
        crop: Crop | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The targets of a batch of views, decoded. Arguments and errors as of `stored`.

        Returns:
            (B, D) at utterance level, (B, T, D) at frame level; float16 or float32 where stored so, else float32.
        """
        return self.decode(self.stored(views, names, crop, out), names)

    def stored(
        self,
        views: np.ndarray,
        names: Sequence[str],
        crop: Crop | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The targets of a batch of views as they are on disk. `decode` makes numbers of them, on any device.

        Args:
            views: (B,) numbers of the views.
            names: names of the targets. For logits that follow from the head, the embedding is read.
            crop: the stretch of every frame-level target to read; needed where the views differ in length. A crop that
                reaches beyond a view's end continues at its beginning.
            out: tensors to fill, by name, of the shapes and types returned. The others are allocated.
        Returns:
            (B, columns) at utterance level, (B, T, columns) at frame level.
        Raises:
            SpkdError: a target that the cache lacks, a rejected view, or a missing or damaged shard.
        """
        self.check(views := np.asarray(views))
        out = out or {}
        return {name: self._gather(name, views, crop, out.get(name)) for name in self.sources(names)}

    def ragged(self, views: np.ndarray, name: str) -> Ragged:
        """A target of whole views of any lengths, as stored, in one tensor.

        Args:
            views: (B,) numbers of the views.
        Raises:
            SpkdError: as of `stored`.
        """
        self.check(views := np.asarray(views))
        (source,) = self.sources([name])
        target = self.targets[source]
        first, counts = self.plan.places(target, views)
        values = self._empty(target, (int(counts.sum()),))
        ends = np.cumsum(counts)
        array, begins, heights = values.numpy(), first.tolist(), counts.tolist()
        shards = self._mapped(target, self.plan.units_of(views).tolist())

        def copy(a: int, b: int) -> None:
            windows = zip(ends[a:b].tolist(), shards[a:b], begins[a:b], heights[a:b], strict=True)
            for end, shard, begin, height in windows:
                array[end - height : end] = shard.rows[begin : begin + height]

        self._copy(array, shards, begins, heights, copy)
        return Ragged(values, counts)

    def _gather(self, name: str, views: np.ndarray, crop: Crop | None, out: Tensor | None) -> Tensor:
        target = self.targets[name]
        first, rows = self.plan.begins(target, views), self.rows(target, views, crop)
        height = rows.height
        if out is None:
            out = self._empty(target, (len(views),) if target.hop is None else (len(views), height))
        array = out.numpy().reshape(len(views), height, -1)
        shards = self._mapped(target, self.plan.units_of(views).tolist())
        begins = (first + rows.skip).tolist()
        if rows.follow:

            def copy(a: int, b: int) -> None:
                for i in range(a, b):
                    begin = begins[i]
                    array[i] = shards[i].rows[begin : begin + height]

        else:
            wrapped = first[:, None] + rows.numbers

            def copy(a: int, b: int) -> None:
                for i in range(a, b):
                    array[i] = shards[i].rows[wrapped[i]]

        self._copy(array, shards, begins, [height] * len(views), copy)
        return out

    def _copy(
        self,
        array: np.ndarray,
        shards: list[Shard],
        begins: list[int],
        heights: list[int],
        copy: Callable[[int, int], None],
    ) -> None:
        """Copy the rows of all views of a batch.

        Rows are read ahead where the last batch came from the disk. A large batch is copied by two threads where torch
        may use two.

        Args:
            begins: first row of each view in its shard.
            heights: number of rows of each view.
            copy: function that copies the views from number a to number b.
        """
        started = time.perf_counter()
        if self._cold:
            for shard, begin, height in zip(shards, begins, heights, strict=True):
                shard.read_ahead(begin, min(begin + height, len(shard.rows)))
        count, big = len(shards), array.nbytes >= JUDGED_BYTES
        if big and count > 1 and torch.get_num_threads() > 1:
            self._helper().halve(copy, count)
        else:
            copy(0, count)
        if big:
            # Read-ahead costs a fifth of the speed of pages in memory, and gains an order of magnitude for other pages.
            self._cold = array.nbytes < WARM_RATE * (time.perf_counter() - started)

    def _helper(self) -> Helper:
        if self._second is None or self._second.process != os.getpid():  # threads do not outlive a fork
            self._second = Helper()
        return self._second

    def _empty(self, target: Target, shape: tuple[int, ...]) -> Tensor:
        columns, dtype = row_format(target)
        shape = (*shape, columns)
        is_worker = get_worker_info() is not None
        if not is_worker or not self.shared:
            return torch.empty(shape, dtype=TORCH_TYPES[dtype.str], pin_memory=self.pinned and not is_worker)
        # A loader's worker sends its batches through shared memory. A batch that is filled there needs no second copy
        # (torch's own collate does the same). The loader pins it.
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
        return torch.empty(0, dtype=TORCH_TYPES[dtype.str]).set_(storage).reshape(shape)

    def _mapped(self, target: Target, units: list[int]) -> list[Shard]:
        known = self._shards.setdefault(target.name, {})
        needed, now = set(units), time.monotonic()
        if needed <= known.keys():
            for unit in needed:
                known[unit].check_size(now)
        else:
            new = sorted(needed - known.keys())
            rows = self.plan.shard_rows(target)
            paths = [shard_path(self.root, target, unit) for unit in new]
            expect_shards(paths, target, rows)
            for unit, path in zip(new, paths, strict=True):
                try:
                    known[unit] = map_shard(path, target, rows, unit_header(self.card, unit))
                    if len(known[unit].rows) < int(self.plan.unit_places(target, unit)[1].sum()):
                        raise SpkdError(f"{path}: damaged shard (fewer rows than its plan has)")
                except SpkdError as error:
                    raise SpkdError(f"{error}; {remedy(self.root)}") from error
            while len(known) > max(MOST_MAPPED // len(self.targets), len(needed)):
                del known[next(unit for unit in known if unit not in needed)]
        return [known[unit] for unit in units]

    def shard_path(self, unit: int, target: Target) -> Path:
        return shard_path(self.root, target, unit)
