"""Verification of a cache by its checksums, which find every flipped bit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from spkd.cache import mapped_plan
from spkd.cache.card import Card
from spkd.cache.claims import changing, put_back, reopen
from spkd.cache.folder import (
    CARD,
    COMPLETE,
    VERIFIED,
    CommitRecord,
    CompletionRecord,
    ShardRecord,
    commit_name,
    commit_path,
    load_card,
    metadata_digest,
    only_from_copy,
    remedy,
    shard_path,
)
from spkd.cache.layout import chunk_lengths, chunk_rows, index_length, shard_rows, unit_header, zarr_files
from spkd.cache.notes import Notes, file_state
from spkd.cache.read import Cache
from spkd.errors import SpkdError, listed
from spkd.files.atomic import check_no_links, write_json
from spkd.files.reading import read_json
from spkd.files.text import counted, utc
from spkd.outputs.target import EMBEDDING, Target
from spkd.progress import log, track
from spkd.version import __version__

THREADS = 8  # threads that look at files, which wait for the file system most of the time


class ExpectedShard(NamedTuple):
    """A shard of a cache, with the content that it must have.

    Attributes:
        rows: rows of the array that one shard takes.
    """

    path: Path
    unit: int
    target: Target
    rows: int
    header: bytes
    record: ShardRecord

    def problem(self, path: Path | None = None, rows: bool = True) -> str | None:
        """Phrase that says what is wrong with the shard; None where nothing is.

        Args:
            path: a copy to look at instead.
            rows: whether to read the rows too, and not size, header and index alone. The header names the part of the
                cache and the unit, so that a shard of another cache is recognised without its rows.
        """
        path = path or self.path
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        if size != self.record.bytes:
            return f"{size} bytes instead of {self.record.bytes}"
        length = index_length(self.target, self.rows)
        with open(path, "rb") as file:
            if file.read(len(self.header)) != self.header:
                return "of another cache or unit, or changed in its header"
            file.seek(max(size - length, 0))
            index = file.read()
            if google_crc32c.value(index) != self.record.index_crc32c:
                return "changed in its index"
            file.seek(len(self.header))
            lengths = chunk_lengths(index)
            if len(lengths) != len(self.record.chunk_crc32c) or len(self.header) + sum(lengths) != size - length:
                return "its index does not match its size"
            for i, (count, check) in enumerate(zip(lengths, self.record.chunk_crc32c, strict=True) if rows else ()):
                if google_crc32c.value(file.read(count)) != check:
                    height = chunk_rows(self.target)
                    return f"changed in rows {i * height} to {(i + 1) * height - 1}"
        return None


def unit_shards(root: Path, card: Card, unit: int) -> Iterator[ExpectedShard]:
    """The shards of a committed unit. Raises SpkdError: its commit record is missing or damaged."""
    header, commit = unit_header(card, unit), CommitRecord.load(root, card, unit)
    for target in card.targets:
        rows = shard_rows(target, card.unit_views, card.unit_seconds)
        yield ExpectedShard(shard_path(root, target, unit), unit, target, rows, header, commit.targets[target.name])


def expected_shards(root: Path, card: Card) -> Iterator[ExpectedShard]:
    """The shards of all units, as `unit_shards`."""
    for unit in range(card.units):
        yield from unit_shards(root, card, unit)


def unit_problem(root: Path, card: Card, unit: int, notes: Notes | None = None) -> str | None:
    """Phrase that says what is wrong with a committed unit; None where nothing is.

    The unit is as it was committed where its record is valid, and the size, header and index of each of its shards are
    those of the record.

    Args:
        unit: number of the unit. Nothing is wrong with one that is not committed.
        notes: notes of the cache, to read the rows too of the shards that were found damaged. Other rows are not read.
    """
    if not _is_committed(root, unit):
        return None
    try:
        shards = list(unit_shards(root, card, unit))
    except SpkdError as error:
        return str(error)
    problems = ((shard, shard.problem(rows=notes is not None and notes.is_damaged(shard.path))) for shard in shards)
    return next((f"{shard.path}: {wrong}" for shard, wrong in problems if wrong), None)


def damaged_units(root: Path, card: Card, notes: Notes | None = None) -> dict[int, str]:
    """Number of each committed unit that is damaged -> what is wrong with it, as `unit_problem` finds it."""
    with track("checking units", card.units, "units") as bar, ThreadPoolExecutor(THREADS) as pool:
        found = {}
        for unit, problem in enumerate(pool.map(partial(unit_problem, root, card, notes=notes), range(card.units))):
            if problem is not None:
                found[unit] = problem
            bar.advance(1)
    return found


def reopen_damaged(root: Path, card: Card, can_fill: Callable[[int], bool]) -> list[int]:
    """Reopen the units whose record or shards are not as they were committed, to be filled again, and say how many.

    A damaged unit may have whole shards and rows, or may be repaired from a copy: where it cannot be filled, it stays.

    Args:
        can_fill: function of the number of a unit that returns whether everything that it had can be written again.
    Returns:
        Numbers of the damaged units that stay.
    """
    put_back(root)
    notes = Notes(root)

    def is_damaged(unit: int) -> bool:
        return unit_problem(root, card, unit, notes) is not None

    damaged = damaged_units(root, card, notes)
    due = {unit: problem for unit, problem in damaged.items() if can_fill(unit)}
    stay = [unit for unit in damaged if unit not in due]
    if due:
        with changing(root):
            due = {unit: problem for unit, problem in due.items() if reopen(root, unit, is_damaged)}
    if due:
        log(f"{root}: {counted(len(due), 'unit')} damaged and filled again ({next(iter(due.values()))})")
    return stay


def damage_that_stays(
    root: Path, card: Card, units: Collection[int], lacking: str, not_filled: Collection[int] = ()
) -> str:
    """Lines that name damaged units which cannot be filled; "" where nothing is wrong with them by now.

    Args:
        units: their numbers, as of `reopen_damaged`.
        not_filled: numbers of those that were to be filled, and lack views that they had.
        lacking: what they cannot be filled without.
    """
    notes = Notes(root)
    problems = {unit: f"{commit_path(root, unit)}: missing" for unit in not_filled if not _is_committed(root, unit)}
    for unit in sorted({*units, *not_filled}):
        if (problem := unit_problem(root, card, unit, notes)) is not None:
            problems[unit] = problem
    if not problems:
        return ""
    what = f"damaged, and not filled again without {lacking}: {counted(len(problems), 'unit')}"
    return "\n".join([f"{root}: {what}; {only_from_copy(root)}", *problems.values()])


def _is_committed(root: Path, unit: int) -> bool:
    return commit_path(root, unit).is_file()


def write_derived_again(root: Path) -> None:
    """Write files again that follow from the completion record of a cache, where they are missing or damaged."""

    def changed() -> dict[str, Any]:
        record = CompletionRecord.there(root)
        if record is None:
            return {}
        files = {CARD: record.card.to_json()} | zarr_files(record.card)
        names = set(_derived_that_changed(root, record.card))
        with contextlib.suppress(SpkdError):  # a missing or damaged card, which is written too
            present = load_card(root)
            if not (present.identity == record.card.identity or record.card.grows_to(present)):
                return {}
        return {name: files[name] for name in names}

    if not changed():
        return
    with changing(root):
        again = changed()  # it may have grown meanwhile
        check_no_links(root, {Path(name).parent for name in again})
        for name, tree in again.items():
            write_json(root / name, tree)
    log(f"{root}: written again, as {COMPLETE} has it: {listed(sorted(again))}")


def check_usable(cache: Cache) -> None:
    """Check that all shards of a cache are there, by their size alone, and that none is noted as damaged.

    Raises:
        SpkdError: a shard is missing, has another size than at its commit, or was found damaged and not mended since.
    """

    def size(target: Target) -> int:
        return sum(_size(shard_path(cache.root, target, unit)) for unit in range(cache.card.units))

    with ThreadPoolExecutor(THREADS) as pool:
        is_there = sum(pool.map(size, cache.card.targets)) == cache.bytes
    notes = Notes(cache.root)
    damaged = noted_units(cache, notes) if is_there else damaged_units(cache.root, cache.card, notes)
    if is_there and not damaged:
        return
    first = next(iter(damaged.values()), "the sizes of its shards are not those of its record")
    raise SpkdError(
        f"{cache.root}: damaged in {len(damaged)} of {counted(cache.card.units, 'unit')} ({first}); "
        f"{remedy(cache.root)}"
    )


def noted_units(cache: Cache, notes: Notes) -> dict[int, str]:
    """Number of each unit with a shard that is noted as damaged, and still is -> what is wrong with it."""
    noted, root, card = set(notes.damaged()), cache.root, cache.card
    units = [unit for unit in range(card.units) if noted & {shard_path(root, target, unit) for target in card.targets}]
    problems = {unit: unit_problem(root, card, unit, notes) or _odd_unit(cache, unit) for unit in units if noted}
    return {unit: problem for unit, problem in problems.items() if problem is not None}


def _odd_unit(cache: Cache, unit: int) -> str | None:
    """What `_odd_values` finds in the shards of a whole unit."""
    found = ((shard, _odd_values(cache, shard)) for shard in unit_shards(cache.root, cache.card, unit))
    return next((f"{shard.path}: {wrong}" for shard, wrong in found if wrong), None)


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def metadata_problems(root: Path, record: CompletionRecord) -> list[str]:
    """One line for each metadata file that is missing or changed."""
    return _lines(root, changed_metadata(root, record))


def _lines(root: Path, changed: Collection[str]) -> list[str]:
    return [f"{root / name}: missing or changed" for name in sorted(changed)]


def changed_metadata(root: Path, record: CompletionRecord) -> set[str]:
    """Name of each metadata file that is missing or changed."""
    changed = {name for name, expected in record.sha256.items() if metadata_digest(root, record.card, name) != expected}
    return changed | set(_derived_that_changed(root, record.card))


def _derived_that_changed(root: Path, card: Card) -> Iterator[str]:
    """Names of files that do not follow from the card of a completion record as they should.

    Where the cache grows, they may be those of the card with further parts.
    """
    found = {name: _json_of(root / name) for name in zarr_files(card)}
    try:
        present = load_card(root)  # after the files above, which are written after it
    except SpkdError:
        present = None
    if present is None or present.with_parts(present.parts[: len(card.parts)]) != card:
        yield CARD
        present = card
    every = [present.with_parts(present.parts[:n]) for n in range(len(card.parts), len(present.parts) + 1)]
    allowed = [zarr_files(each) for each in every]
    yield from (name for name, tree in found.items() if tree not in [files[name] for files in allowed])


def _json_of(path: Path) -> Any:
    """Content of a JSON file; None where it is missing or damaged."""
    try:
        return read_json(path)
    except SpkdError:
        return None


def check(root: str | Path, older_than: float | None = None) -> None:
    """Verify a cache; arguments as of `verify`. Raises SpkdError: as `verify`, or damaged files, a line for each."""
    if damaged := verify(root, older_than):
        raise SpkdError("\n".join([f"{root}: {len(damaged)} damaged", *damaged, remedy(Path(root))]))


def verify(root: str | Path, older_than: float | None = None) -> list[str]:
    """Read all files of a cache and compare them with the recorded checksums.

    A verification that was interrupted, or that found damage, is gone on with: shards that it found whole, and that
    have not changed since, are not read again.

    Args:
        older_than: time (s) after which a shard is read again that any verification found whole; None goes on with the
            last verification or, where that was finished, reads all shards.
    Returns:
        One line for each damaged file.
    Raises:
        SpkdError: no complete cache there, or a damaged completion record.
    """
    root = Path(root)
    record = CompletionRecord.load(root)
    commits = {commit_name(unit): unit for unit in range(record.card.units)}
    changed = changed_metadata(root, record)
    damaged = _lines(root, changed)
    # What follows from the record, and the records of other units, are not needed to read a shard.
    if changed - commits.keys() - {CARD, *zarr_files(record.card)}:
        return damaged
    if found := [*mapped_plan.problems(root, record)]:
        return damaged + found
    try:
        cache = Cache.open(root)

        def problem(shard: ExpectedShard) -> str | None:
            return shard.problem() or _odd_values(cache, shard)  # while the values are in memory

        units = [unit for name, unit in commits.items() if name not in changed]
        shards = [shard for unit in units for shard in unit_shards(root, record.card, unit)]
        found = [f"{shard.path}: {wrong}" for shard, wrong in damaged_shards(root, record, shards, problem, older_than)]
    except SpkdError as error:
        found = [str(error)]
    return damaged + found


def check_shard(root: Path, shard: ExpectedShard) -> None:
    """Read a shard of a cache. Raises SpkdError: it is damaged, which is noted."""
    at, state = time.time(), file_state(shard.path)
    if (wrong := shard.problem()) is not None:
        Notes(root).add(shard.path, state, -at)
        raise SpkdError(f"{shard.path}: {wrong}; {remedy(root)}")


def damaged_shards(
    root: Path,
    record: CompletionRecord,
    shards: Sequence[ExpectedShard],
    problem: Callable[[ExpectedShard], str | None] = ExpectedShard.problem,
    older_than: float | None = None,
) -> Iterator[tuple[ExpectedShard, str]]:
    """Read the shards of a cache, and note which are whole and which are damaged.

    Args:
        problem: function that returns what is wrong with a shard; None where nothing is.
        older_than: as of `verify`.
    Yields:
        Each damaged shard, and what is wrong with it.
    """
    notes = Notes(root)
    # Leave out the shards that are known to be whole.
    since = notes.begin() if older_than is None else time.time() - older_than
    times = {shard.path: at for shard in shards if (at := notes.whole_at(shard.path)) is not None and at >= since}
    if times:
        oldest = utc(min(times.values()))
        log(f"{root}: {len(times)} of {len(shards)} shards were found whole since {oldest}, and have not changed")
    due, read, is_whole = [shard for shard in shards if shard.path not in times], 0, True
    # Read the others.
    with track("verifying", sum(shard.record.bytes for shard in due) >> 20, "MiB") as bar:
        for shard in due:
            times[shard.path], state = time.time(), file_state(shard.path)
            if (wrong := problem(shard)) is None:
                notes.add(shard.path, state, times[shard.path])
            else:
                is_whole = False
                notes.add(shard.path, state, -times[shard.path])
                yield shard, wrong
            read += shard.record.bytes
            bar.advance((read >> 20) - bar.done)
    if is_whole and len(shards) == record.card.units * len(record.card.targets):
        notes.finish()
        verified = {"at": utc(min(times.values())), "fingerprint": record.fingerprint, "version": __version__}
        with contextlib.suppress(OSError):  # a cache that cannot be written
            write_json(root / VERIFIED, verified)


def _odd_values(cache: Cache, shard: ExpectedShard) -> str | None:
    """Phrase that names values of usable views that no teacher gives: not finite, or an embedding of zeros.

    A cache that another program wrote may hold such values and still match its checksums.
    """
    views = np.array(cache.plan.unit(shard.unit))
    stored = cache.ragged(views[cache.are_usable(views)], shard.target.name).values
    values = cache.codebook.codecs[shard.target.name].decode(stored)
    if not bool(values.isfinite().all()):
        return "values that are not finite, as they were written"
    if shard.target.name == EMBEDDING and len(values) and not bool(values.any(-1).all()):
        return "embeddings of zeros, as they were written"
    return None
