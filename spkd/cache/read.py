"""Reading a cache at the speed of a memory map."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from spkd.cache import card as cards
from spkd.cache.layout import Shard, chunk_bytes, expect_shards, header_bytes, map_shard, shard_path
from spkd.cache.plan import UNLABELLED, Plan
from spkd.cache.target import DTYPES, EMBEDDING, LOGITS, Target
from spkd.cache.write import COMPLETE, HEAD_FILE, manifest_path, record_check
from spkd.errors import SpkdError, did_you_mean
from spkd.files import read_json

WARM_RATE = 3e9  # bytes/s: memory gives 10e9 and more, disks less than this
JUDGED_BYTES = 1 << 20  # batches smaller than this say too little of the rate
TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Crop:
    """A stretch of each view of a batch: first sample (B,) and one length for all, both at 16 kHz."""

    start: np.ndarray
    samples: int


@dataclass(frozen=True)
class Head:
    """The teacher's own classifier: logits = scale * cosine(embedding, weight), weight (classes, D)."""

    weight: Tensor
    classes: list[str]
    scale: float

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, D) -> (B, classes), float32, on the embedding's device. No margin."""
        cosine = (
            torch.nn.functional.normalize(embedding.float(), dim=-1)
            @ torch.nn.functional.normalize(self.weight.to(embedding.device, torch.float32), dim=-1).mT
        )
        return self.scale * cosine


class Cache:
    """What one teacher said of one manifest under one view plan.

    Safe in forked and spawned workers: maps are opened read-only on first use in each process.

    Attributes:
        card: the description. targets: stored targets by name. plan: views, utterances and speakers.
    """

    def __init__(self, root: Path, card: dict[str, Any], plan: Plan, rejected: dict[int, str]) -> None:
        self.root, self.card, self.plan, self.rejected = root, card, plan, rejected
        self.targets = {t["name"]: Target.from_card(t) for t in card["targets"]}
        self._shards: dict[str, dict[int, Shard]] = {}
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._cold = True  # until a batch comes at the speed of memory
        self._served = np.ones(len(plan.views), bool)
        self._served[list(rejected)] = False

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """Open a complete cache.

        Raises:
            SpkdError: none there, not complete, of a newer format, or its card, plan or record is damaged.
        """
        root = Path(path)
        card = cards.load(root)
        plan = Plan.load(root)
        if not (root / COMPLETE).is_file():
            done = sum(manifest_path(root, unit).is_file() for unit in range(plan.units))
            raise SpkdError(
                f"{root}: extraction is not finished ({done} of {plan.units} units); run the same `spkd extract` again"
            )
        record = read_json(root / COMPLETE)
        if not isinstance(record, dict) or record.get("check") != record_check(record):
            raise SpkdError(f"{root / COMPLETE}: damaged (it does not fit its own digest)")
        for name in (cards.FILE, "plan/0.npz"):
            if hashlib.sha256((root / name).read_bytes()).hexdigest() != record["sha256"].get(name):
                raise SpkdError(f"{root / name}: damaged, or of another cache (digest differs from {COMPLETE})")
        return cls(root, card, plan, {int(row): reason for row, reason in record["rejected"].items()})

    def __len__(self) -> int:
        return len(self.plan.views)

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker opens its own maps: pickling one would copy the shard.
        return {**self.__dict__, "_shards": {}}

    @cached_property
    def rows(self) -> np.ndarray:
        """The views that can be served (all but the rejected)."""
        return np.flatnonzero(self._served)

    @property
    def names(self) -> list[str]:
        """Targets that `batch` serves, logits recomputed from embedding and head among them."""
        return [*self.targets, *([LOGITS] if self.card["head"] and LOGITS not in self.targets else [])]

    def dim(self, name: str) -> int:
        """Width of a target."""
        if name == LOGITS and LOGITS not in self.targets and self.head is not None:
            return len(self.head.classes)
        return self.targets[name].dim

    @cached_property
    def head(self) -> Head | None:
        """The teacher's classifier, where it has one."""
        described = self.card["head"]
        if described is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            weight = load((self.root / HEAD_FILE).read_bytes())["weight"]
        except (OSError, SafetensorError, KeyError) as error:
            raise SpkdError(f"{self.root / HEAD_FILE}: missing or damaged ({error})") from error
        return Head(weight, described["classes"], described["scale"])

    def speaker(self, rows: np.ndarray) -> np.ndarray:
        """(B,): speaker of each view, as a row in plan.speakers; -1 where it has no label."""
        return self.plan.speaker[self.plan.views.utterance[rows]]

    @property
    def labelled(self) -> bool:
        """Whether every view has a speaker label."""
        return bool((self.plan.speaker != UNLABELLED).all())

    def batch(
        self,
        rows: np.ndarray,
        names: Sequence[str],
        crop: Crop | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What the teacher said of a batch of views.

        Args:
            rows: (B,) views. names: targets. crop: the same stretch of every frame-level target; needed where the
                views differ in length. A crop that runs over a view's end goes on at its beginning. out: tensors to
                fill (pinned ones, say), by name, of the shapes and dtypes returned; the rest is allocated.
        Returns:
            (B, D) at utterance level, (B, T, D) at frame level, in the stored dtype (logits: float32).
        Raises:
            SpkdError: a target the cache lacks, a rejected view, or a missing or damaged shard.
        """
        if self.rejected and not self._served[rows].all():
            row = int(rows[~self._served[rows]][0])
            raise SpkdError(f"{self.root}: view {row} was rejected ({self.rejected[row]})")
        return {name: self._gather(name, rows, crop, (out or {}).get(name)) for name in names}

    def _gather(self, name: str, rows: np.ndarray, crop: Crop | None, out: Tensor | None) -> Tensor:
        if name not in self.targets:
            if name == LOGITS and self.head is not None:
                return self.head.logits(self._gather(EMBEDDING, rows, None, None))
            raise SpkdError(f"{self.root}: no target {name!r} in this cache{did_you_mean(name, self.names)}")
        target = self.targets[name]
        place, count = self._place(name)
        first, counts, units = place[rows], count[rows], self.plan.unit_of[rows].tolist()
        height, skip = self._stretch(target, counts, crop)
        shape = (len(rows), target.dim) if target.hop is None else (len(rows), height, target.dim)
        if out is None:
            out = torch.empty(shape, dtype=TORCH_DTYPES[target.dtype])
        array = out.numpy().reshape(len(rows), height, target.dim)
        known = self._shards.setdefault(name, {})
        try:
            shards = [known[unit] for unit in units]
        except KeyError:
            self._map(target, sorted(set(units) - known.keys()))
            shards = [known[unit] for unit in units]
        starts = first + skip
        begin = starts.tolist()
        started = time.perf_counter()
        if self._cold:
            for shard, at in zip(shards, begin, strict=True):
                shard.read_ahead(at, min(at + height, len(shard.rows)))
        if (starts + height <= first + counts).all():
            for i, (shard, at) in enumerate(zip(shards, begin, strict=True)):
                array[i] = shard.rows[at : at + height]
        else:
            wrapped = first[:, None] + (skip[:, None] + np.arange(height)) % counts[:, None]
            for row, shard, index in zip(array, shards, wrapped, strict=True):
                row[...] = shard.rows[index]
        if array.nbytes >= JUDGED_BYTES:
            # Read-ahead costs a fifth of the speed of warm pages and gains an order of magnitude on cold ones.
            self._cold = array.nbytes < WARM_RATE * (time.perf_counter() - started)
        return out

    def _stretch(self, target: Target, counts: np.ndarray, crop: Crop | None) -> tuple[int, np.ndarray]:
        """How many rows of a target each view gives, and the first of them within the view (B,)."""
        if target.hop is None:
            return 1, np.zeros_like(counts)
        if crop is not None:
            # A crop may start beyond the last row of a target whose windows are longer than the crop.
            return target.count(crop.samples), crop.start // target.hop % counts
        if (counts != counts[0]).any():
            raise SpkdError(f"target {target.name}: views of different lengths need a crop")
        return int(counts[0]), np.zeros_like(counts)

    def _place(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._places:
            self._places[name] = self.plan.local_rows(self.targets[name])
        return self._places[name]

    def _map(self, target: Target, units: list[int]) -> None:
        rows = self.plan.shard_rows(target)
        paths = [shard_path(self.root, target, unit) for unit in units]
        expect_shards(paths, target, rows)
        for unit, path in zip(units, paths, strict=True):
            header = header_bytes(self.card["fingerprint"], unit)
            self._shards[target.name][unit] = map_shard(path, target, rows, header)


def verify(root: str | Path) -> list[str]:
    """Read everything and compare it with the recorded digests. Returns one line per damaged file."""
    root = Path(root)
    cache = Cache.open(root)
    record = read_json(root / COMPLETE)
    damaged = []
    for name, digest in record["sha256"].items():
        path = root / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            damaged.append(f"{path}: missing or changed")
    if damaged:
        return damaged
    for unit in range(cache.plan.units):
        files = read_json(manifest_path(root, unit))["files"]
        for target in cache.targets.values():
            path = shard_path(root, target, unit)
            header = header_bytes(cache.card["fingerprint"], unit)
            problem = _shard_problem(path, target, header, files[str(path.relative_to(root))])
            if problem:
                damaged.append(f"{path}: {problem}")
    return damaged


def _shard_problem(path: Path, target: Target, header: bytes, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.stat().st_size} bytes instead of {expected['bytes']}"
    step = chunk_bytes(target)
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            return "of another cache or unit, or changed in its header"
        for i, check in enumerate(expected["chunk_crc32c"]):
            if google_crc32c.value(file.read(step)) != check:
                rows = step // (target.dim * DTYPES[target.dtype].itemsize)
                return f"changed in rows {i * rows} to {(i + 1) * rows - 1}"
        return None if google_crc32c.value(file.read()) == expected["index_crc32c"] else "changed in its index"
