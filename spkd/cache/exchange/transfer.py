"""Common parts of export and import: metadata files, checks before an export, and building a cache from stored rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from spkd.cache.card import Card
from spkd.cache.claims import claim_units
from spkd.cache.codec import AsStored
from spkd.cache.folder import CODEC, HEAD, CompletionRecord, most_bytes, plan_path
from spkd.cache.layout import row_format
from spkd.cache.plan import Plan
from spkd.cache.read import Cache
from spkd.cache.verify import check_shard, expected_shards, metadata_problems
from spkd.cache.write import UnitWriter, finalize, initialise
from spkd.errors import SpkdError, UsageError
from spkd.files.atomic import write_bytes, writing_folder
from spkd.files.reading import read_bytes
from spkd.outputs.target import Target


@dataclass(frozen=True)
class Metadata:
    """Metadata of a cache that an export includes.

    Attributes:
        files: content of plans, head and codebook, by name.
    """

    card: Card
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, cache: Cache) -> Metadata:
        """The metadata of a complete cache.

        Raises:
            SpkdError: a file is missing, or changed since the cache was completed.
        """
        if problems := metadata_problems(cache.root, CompletionRecord.load(cache.root)):
            raise SpkdError(problems[0])
        names = [name for name in _names(cache.card) if (cache.root / name).is_file()]
        most = most_bytes(cache.card)
        return cls(cache.card, {name: read_bytes(cache.root / name, most) for name in names})

    def plans(self, folder: Path) -> list[Plan]:
        """Check the plans of all parts, and write all files to a folder.

        Returns:
            The plan of each part.
        Raises:
            SpkdError: a plan is missing or damaged, or there is a file that no cache has.
        """
        check_names(self.files, self.card)
        names = [str(plan_path(part)) for part in range(len(self.card.parts))]
        if missing := [name for name in names if name not in self.files]:
            raise SpkdError(f"{missing[0]}: missing")
        plans = [Plan.read(self.files[name], self.card, number, name) for number, name in enumerate(names)]
        for name, data in self.files.items():
            write_bytes(folder / name, data)
        return plans


def check_names(names: Collection[str], card: Card) -> None:
    """Check the names of metadata files, before they are read. Raises SpkdError for one that no cache has."""
    if extra := set(names) - set(_names(card)):
        raise SpkdError(f"{min(extra)}: no file of a cache")


def _names(card: Card) -> list[str]:
    return [*(str(plan_path(part)) for part in range(len(card.parts))), HEAD, CODEC]


def checked(cache: Cache) -> Callable[[int, Target], None]:
    """Function that checks a shard before its export, so that damaged data get no new checksum.

    Returns:
        Function of the number of a unit and a target, which raises SpkdError where the shard has changed since its
        commit.
    """
    shards = {shard.path: shard for shard in expected_shards(cache.root, cache.card)}

    def check(unit: int, target: Target) -> None:
        check_shard(cache.root, shards[cache.shard_path(unit, target)])

    return check


@dataclass(frozen=True)
class CacheBuilder:
    """Builder of a cache from stored rows."""

    root: Path
    card: Card
    plan: Plan

    def units(self) -> Iterator[int]:
        """Numbers of all units, each claimed before it is yielded."""
        return claim_units(self.root, self.plan.units)

    def write(self, unit: int, rejected: Mapping[int, str], views: Iterator[tuple[int, dict[str, np.ndarray]]]) -> None:
        """Write a unit from its usable views.

        Args:
            rejected: number of each rejected view of the cache -> the reason.
            views: number of each usable view, and its stored rows (rows, columns) by target.
        Raises:
            SpkdError: a view of another unit, or arrays of another shape or type than in the card.
        """
        fitted = {t.name: AsStored(*row_format(t)) for t in self.card.targets}
        writer = UnitWriter(self.root, self.card, self.plan, unit, fitted)
        numbers = self.plan.unit(unit)
        try:
            for view, arrays in views:
                if view not in numbers or view in rejected:
                    raise SpkdError(f"view {view} does not belong here")
                for target in self.card.targets:
                    values, (columns, dtype) = arrays[target.name], row_format(target)
                    count = target.num_frames(int(self.plan.views.samples[view]))
                    if values.shape != (count, columns) or values.dtype != dtype:
                        raise SpkdError(
                            f"{target.name} of view {view}: {values.dtype} {values.shape}, but {dtype} "
                            f"{(count, columns)} in the card"
                        )
                    writer.put(target.name, [view], values[None])
            for view, reason in rejected.items():
                if view in numbers:
                    writer.reject(view, reason)
            writer.commit()
        except BaseException:
            writer.abandon()
            raise


@contextmanager
def building(
    root: Path, metadata: Metadata, left_out: Mapping[str, str] = MappingProxyType({})
) -> Iterator[CacheBuilder]:
    """Build a cache next to `root`. It is moved there when the block ends without an error, and removed otherwise.

    Args:
        left_out: as for `finalize`.
    Raises:
        SpkdError: `root` exists already, or the new cache is not complete.
    """
    if root.exists():
        raise UsageError(f"{root}: is there already; choose another folder")
    try:
        with writing_folder(root) as work:
            plans = metadata.plans(work)
            initialise(work, metadata.card, plans, metadata.files.get(HEAD))
            builder = CacheBuilder(work, metadata.card, Plan.join(plans))
            yield builder
            if not finalize(work, metadata.card, builder.plan, left_out):
                raise SpkdError("units are missing")
            Cache.open(work).codebook  # noqa: B018  (raises where it does not match)
            shutil.rmtree(work / "claims", ignore_errors=True)
    except FileExistsError as error:
        raise SpkdError(f"{root}: is there already; another import was faster") from error


def rejections(listed: object) -> dict[int, str]:
    """The rejected views of an export: number of each view -> the reason.

    Raises:
        SpkdError: it is not an object of numbers and reasons.
    """
    try:
        return {int(view): str(reason) for view, reason in dict(listed).items()}  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise SpkdError(f"damaged (rejected views: {str(error)[:80]})") from error
