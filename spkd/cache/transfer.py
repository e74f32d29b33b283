"""What export and import have in common: a cache's units as stored arrays, and a cache built from such."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spkd.cache import card as cards
from spkd.cache import codebook as codebooks
from spkd.cache import head as heads
from spkd.cache.codec import AsStored
from spkd.cache.layout import row
from spkd.cache.plan import Plan
from spkd.cache.plan import file as plan_file
from spkd.cache.read import Cache
from spkd.cache.target import Target
from spkd.cache.write import UnitWriter, claim_units, finalize, initialise
from spkd.errors import SpkdError
from spkd.files import write_bytes


@dataclass(frozen=True)
class Small:
    """The small files of a cache that an export carries: card, plans, head and codebook, by name."""

    card: dict[str, Any]
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, cache: Cache) -> Small:
        names = [str(plan_file(part)) for part in range(len(cache.card["parts"]))]
        names += [name for name in (heads.FILE, codebooks.FILE) if (cache.root / name).is_file()]
        return cls(cache.card, {name: (cache.root / name).read_bytes() for name in names})

    def names(self) -> set[str]:
        """Names that may occur."""
        return {str(plan_file(part)) for part in range(len(self.card["parts"]))} | {heads.FILE, codebooks.FILE}

    def plans(self, folder: Path) -> list[Plan]:
        """The plans of the parts, checked against the card, with all files written to `folder`."""
        for name, data in self.files.items():
            if name not in self.names():
                raise SpkdError(f"{name}: no file of a cache")
            write_bytes(folder / name, data)
        names = [str(plan_file(part)) for part in range(len(self.card["parts"]))]
        if missing := [name for name in names if name not in self.files]:
            raise SpkdError(f"{missing[0]}: missing")
        plans = [Plan.read(self.files[name], name) for name in names]
        for part, plan in zip(self.card["parts"], plans, strict=True):
            told = (part["utterances"], part["views"], part["units"])
            if told != (len(plan.utterances), len(plan.views), plan.units):
                raise SpkdError("the plan does not fit the card")
        return plans


@dataclass(frozen=True)
class Sink:
    """A cache being built from stored rows."""

    root: Path
    card: dict[str, Any]
    plan: Plan
    targets: list[Target]

    def write(self, unit: int, rejected: Mapping[int, str], views: Iterator[tuple[int, dict[str, np.ndarray]]]) -> None:
        """Write a unit from its served views: row and (rows, columns) of every target, as stored.

        Raises:
            SpkdError: a row of another unit, or arrays of another shape or type than the card says.
        """
        fitted = {t.name: AsStored(*row(t)) for t in self.targets}
        key = cards.part_key(self.card, self.plan.part(unit)[0])
        writer = UnitWriter(self.root, self.plan, self.targets, unit, key, fitted)
        mine = self.plan.unit(unit)
        try:
            for view, arrays in views:
                if view not in mine or view in rejected:
                    raise SpkdError(f"view {view} does not belong here")
                for target in self.targets:
                    values, (columns, dtype) = arrays[target.name], row(target)
                    count = target.count(int(self.plan.views.samples[view]))
                    if values.shape != (count, columns) or values.dtype != dtype:
                        raise SpkdError(
                            f"{target.name} of view {view}: {values.dtype} {values.shape} where the card says "
                            f"{dtype} {(count, columns)}"
                        )
                    writer.put(target.name, [view], values[None])
            for view, reason in rejected.items():
                if view in mine:
                    writer.reject(view, reason)
            writer.commit()
        except BaseException:
            writer.abandon()
            raise


@contextmanager
def building(root: Path, small: Small) -> Iterator[Sink]:
    """Build a cache beside `root` and move it there when the block ends well; else leave nothing.

    Raises:
        SpkdError: `root` is there already, or what was built is not complete.
    """
    if root.exists():
        raise SpkdError(f"{root}: is there already; choose another folder")
    work = root.with_name(f"{root.name}.importing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        plans = small.plans(work)
        targets = [Target.from_card(target) for target in small.card["targets"]]
        initialise(work, small.card, plans, targets, small.files.get(heads.FILE))
        sink = Sink(work, small.card, Plan.join(plans), targets)
        yield sink
        if not finalize(work, small.card, sink.plan):
            raise SpkdError("units are missing")
        Cache.open(work).codebook  # noqa: B018  (raises where it does not fit)
        (work / "claims").rmdir()
        work.rename(root)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def all_units(sink: Sink) -> Iterator[int]:
    """Every unit, claimed."""
    return claim_units(sink.root, sink.plan.units)


def rejections(listed: Mapping[str, str]) -> dict[int, str]:
    return {int(row): str(reason) for row, reason in listed.items()}


def read_card(text: str | bytes, where: str) -> dict[str, Any]:
    """A card from its JSON. Raises SpkdError where it is damaged or of a newer format."""
    try:
        return cards.check(json.loads(text), where)
    except ValueError as error:
        raise SpkdError(f"{where}: not valid JSON ({error})") from error
