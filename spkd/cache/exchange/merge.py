"""Merging of caches, for example of shares of one extraction on different machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spkd.cache.card import SERIES, Card
from spkd.cache.claims import changing, claim, committing, release
from spkd.cache.folder import (
    CARD,
    CODEC,
    HEAD,
    CommitRecord,
    commit_path,
    load_card,
    most_bytes,
    remedy,
    shard_path,
    withdrawn_path,
)
from spkd.cache.plan import Plan
from spkd.cache.verify import damage_that_stays, reopen_damaged, unit_problem, write_derived_again
from spkd.cache.write import check_folder, finalize, initialise
from spkd.errors import SpkdError, UsageError
from spkd.files.atomic import check_no_links, remove, remove_abandoned, write_bytes, write_copy, write_json
from spkd.files.reading import read_bytes
from spkd.files.sealed import open_tensors
from spkd.progress import track


def merge(sources: Sequence[Path], root: Path) -> bool:
    """Merge caches of one teacher, view plan and set of targets into a new cache.

    Sources with the same card are shares of one extraction, and complete each other. Other sources must have
    been extracted from manifests without a common utterance; they follow one another in the order given. Shards are
    linked where the file system allows it, and copied otherwise. The same call continues an interrupted merge.

    Returns:
        Whether the merged cache is complete.
    Raises:
        UsageError: a single source.
        SpkdError: sources that do not go together, damaged units, or a `root` that holds something else.
    """
    if len(sources) < 2:
        raise UsageError("name at least two caches and the new folder")
    # Group shares of one extraction, and check that all caches belong together.
    loaded = {source: load_card(source) for source in sources}
    groups: dict[str, list[Path]] = {}
    for source, card in loaded.items():
        groups.setdefault(card.identity, []).append(source)
    first = loaded[sources[0]]
    for source, card in loaded.items():
        if difference := first.difference(card, SERIES):
            raise SpkdError(f"{source}: {difference} than {sources[0]}")
    # Join the plans; no utterance may be in two of them.
    parts, plans, owner = [], [], dict[str, Path]()
    for members in groups.values():
        card = loaded[members[0]]
        for part, plan in zip(card.parts, Plan.load_parts(members[0], card), strict=True):
            for utterance in plan.utterances:
                if owner.setdefault(utterance, members[0]) is not members[0]:
                    raise SpkdError(f"{members[0]}: holds the utterance {utterance!r}, as {owner[utterance]} does")
            parts.append(part)
            plans.append(plan)
    # Make the new cache, or continue it.
    card = first.with_parts(parts)
    write_derived_again(root)
    check_folder(root, card)
    with changing(root):
        codec, head = (_intact(sources[0] / name, most_bytes(first)) for name in (CODEC, HEAD))
        if codec is not None and not (root / CARD).is_file():
            write_bytes(root / CODEC, codec)
        card = initialise(root, card, plans, head)
    # The units of each group follow those of the groups before.
    units = [(members, loaded[members[0]], n) for members in groups.values() for n in range(loaded[members[0]].units)]

    def is_in_source(number: int) -> bool:
        members, theirs, unit = units[number]
        return any(commit_path(s, unit).is_file() and unit_problem(s, theirs, unit) is None for s in members)

    damaged = reopen_damaged(root, card, is_in_source)
    with track("merging", card.units, "units") as bar:
        for number, (members, theirs, unit) in enumerate(units):
            _bring(members, theirs, unit, root, number)
            bar.advance(1)
    if problem := damage_that_stays(root, card, damaged, "a whole unit in a source"):
        raise SpkdError(problem)
    return finalize(root, card, Plan.join(plans))


def _intact(path: Path, most: int) -> bytes | None:
    """Content of a file of tensors of at most so many bytes; None where there is none. Raises SpkdError: damaged."""
    if not path.is_file():
        return None
    data = read_bytes(path, most)
    open_tensors(data, str(path))
    return data


def _bring(sources: Sequence[Path], card: Card, unit: int, root: Path, number: int) -> None:
    """Copy a unit into the merged cache, unless it is there, or another worker fills it.

    Args:
        sources: shares of one extraction; of those that have the unit undamaged, the one with the fewest rejected views
            gives it.
        number: number of the unit in the merged cache.
    """
    problems = {s: unit_problem(s, card, unit) for s in sources if commit_path(s, unit).is_file()}
    intact = [s for s, problem in problems.items() if problem is None]
    source = min(intact, key=lambda s: len(CommitRecord.load(s, card, unit).rejected), default=None)
    if problems and source is None:
        damaged, problem = next(iter(problems.items()))
        raise SpkdError(f"{problem}; {remedy(damaged)}")
    if source is None or not claim(root, number):
        return
    try:
        with committing(root, number) as is_held:
            if is_held:
                _copy_unit(source, unit, root, number, card)
    finally:
        release(root, number)


def _copy_unit(source: Path, unit: int, root: Path, number: int, card: Card) -> None:
    """Copy a committed unit, its commit record last."""
    commit = CommitRecord.load(source, card, unit)
    for target in card.targets:
        check_no_links(root, [shard_path(Path(), target, number).parent])
        remove_abandoned(shard_path(root, target, number).parent)
        write_copy(shard_path(source, target, unit), shard_path(root, target, number))
    write_json(commit_path(root, number), commit.to_json())
    remove(withdrawn_path(root, number))
