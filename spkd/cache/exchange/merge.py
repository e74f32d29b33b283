"""Merging of caches, for example of shares of one extraction on different machines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from spkd.cache.card import SERIES, Card
from spkd.cache.folder import CODEC, HEAD, CommitRecord, commit_path, load_card, shard_path
from spkd.cache.plan import Plan
from spkd.cache.write import check_folder, finalize, initialise
from spkd.errors import SpkdError
from spkd.files.atomic import create_bytes, part_path, read_bytes, write_json
from spkd.progress import track


def merge(sources: Sequence[Path], root: Path) -> bool:
    """Merge caches of one teacher, view plan and set of targets into a new cache.

    Sources with the same fingerprint are shares of one extraction, and complete each other. Other sources must have
    been extracted from manifests without a common utterance; they follow one another in the order given. Shards are
    linked where the file system allows it, and copied otherwise. The same call continues an interrupted merge.

    Args:
        sources: folders of the caches.
        root: folder of the merged cache.
    Returns:
        Whether the merged cache is complete.
    Raises:
        SpkdError: sources that do not go together, or a `root` that holds something else.
    """
    # Group shares of one extraction, and check that all caches belong together.
    loaded = {source: load_card(source) for source in sources}
    groups: dict[str, list[Path]] = {}
    for source, card in loaded.items():
        groups.setdefault(card.fingerprint, []).append(source)
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
    check_folder(root, card.targets)
    if (sources[0] / CODEC).is_file():
        root.mkdir(parents=True, exist_ok=True)
        create_bytes(root / CODEC, read_bytes(sources[0] / CODEC))
    head = sources[0] / HEAD
    initialise(root, card, plans, read_bytes(head) if head.is_file() else None)
    # Bring in the units; those of each group follow the `shift` units of the groups before.
    shift = 0
    with track("merging", card.units, "units") as bar:
        for members in groups.values():
            units = loaded[members[0]].units
            for unit in range(units):
                _bring(members, unit, root, shift + unit, card)
                bar.advance(1)
            shift += units
    return finalize(root, load_card(root), Plan.join(plans))


def _bring(sources: Sequence[Path], unit: int, root: Path, number: int, card: Card) -> None:
    """Copy a unit into the merged cache, unless it is there.

    Args:
        sources: shares of one extraction; the first that has the unit gives it.
        unit: number of the unit in the sources.
        root: folder of the merged cache.
        number: number of the unit in the merged cache.
        card: card of the merged cache.
    """
    source = next((s for s in sources if commit_path(s, unit).is_file()), None)
    if source is None or commit_path(root, number).is_file():
        return
    commit = CommitRecord.load(source, card, unit)
    for target in card.targets:
        shard, copy = shard_path(source, target, unit), shard_path(root, target, number)
        copy.parent.mkdir(parents=True, exist_ok=True)
        temporary = part_path(copy)
        temporary.unlink(missing_ok=True)
        try:
            os.link(shard, temporary)
        except FileNotFoundError as error:
            raise SpkdError(f"{shard}: missing shard") from error
        except OSError:  # another file system, or one without links
            shutil.copyfile(shard, temporary)
        os.replace(temporary, copy)
    write_json(commit_path(root, number), commit.to_json())
