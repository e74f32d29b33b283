"""Merging: units that different machines extracted become one cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spkd.cache import card as cards
from spkd.cache import codebook as codebooks
from spkd.cache import head as heads
from spkd.cache.layout import shard_path
from spkd.cache.plan import Plan
from spkd.cache.plan import file as plan_file
from spkd.cache.target import Target
from spkd.cache.write import check_folder, finalize, initialise, manifest_path, units_of
from spkd.errors import SpkdError
from spkd.files import create_bytes, read_json, write_json
from spkd.progress import track


def merge(sources: Sequence[Path], root: Path) -> bool:
    """Put caches of one teacher, view plan and set of targets into a new one at `root`.

    Sources with the same fingerprint are shares of one extraction and complete each other; others must have been
    extracted from manifests without a common utterance, and stand one behind the other in the order given. Shards
    are linked where the file system allows, copied elsewhere. The same call continues an interrupted merge.

    Returns:
        Whether the merged cache is complete.
    Raises:
        SpkdError: sources that do not go together, or a `root` that holds something else.
    """
    groups: dict[str, list[Path]] = {}
    loaded = {source: cards.load(source) for source in sources}
    for source, card in loaded.items():
        groups.setdefault(card["fingerprint"], []).append(source)
    first = loaded[sources[0]]
    for source, card in loaded.items():
        if difference := cards.difference(first, card, cards.SERIES):
            raise SpkdError(f"{source}: {difference} than {sources[0]}")
    parts, plans, owner = [], [], dict[str, Path]()
    for members in groups.values():
        for number, part in enumerate(loaded[members[0]]["parts"]):
            plan = Plan.load_part(members[0] / plan_file(number))
            for utterance in plan.utterances:
                if owner.setdefault(utterance, members[0]) is not members[0]:
                    raise SpkdError(f"{members[0]}: holds the utterance {utterance!r}, as {owner[utterance]} does")
            parts.append(part)
            plans.append(plan)
    card = _card(first, parts)
    targets = [Target.from_card(target) for target in card["targets"]]
    head = sources[0] / heads.FILE
    check_folder(root, targets)
    if (sources[0] / codebooks.FILE).is_file():
        root.mkdir(parents=True, exist_ok=True)
        create_bytes(root / codebooks.FILE, (sources[0] / codebooks.FILE).read_bytes())
    initialise(root, card, plans, targets, head.read_bytes() if head.is_file() else None)
    shift = 0
    with track("merging", units_of(card), "units") as bar:
        for members in groups.values():
            units = units_of(loaded[members[0]])
            for unit in range(units):
                _bring(members, unit, root, shift + unit, targets)
                bar.advance(1)
            shift += units
    return finalize(root, cards.load(root), Plan.join(plans))


def _card(first: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    card = {**first, "parts": parts}
    return card | {"fingerprint": cards.fingerprint(card)}


def _bring(sources: Sequence[Path], unit: int, root: Path, number: int, targets: Sequence[Target]) -> None:
    """Unit `unit` of whichever source has it becomes unit `number`."""
    source = next((s for s in sources if manifest_path(s, unit).is_file()), None)
    if source is None or manifest_path(root, number).is_file():
        return
    for target in targets:
        theirs, ours = shard_path(source, target, unit), shard_path(root, target, number)
        ours.parent.mkdir(parents=True, exist_ok=True)
        temporary = ours.with_name(f"0.{os.getpid()}.part")
        temporary.unlink(missing_ok=True)
        try:
            os.link(theirs, temporary)
        except FileNotFoundError as error:
            raise SpkdError(f"{theirs}: missing shard") from error
        except OSError:  # another file system, or one without links
            shutil.copyfile(theirs, temporary)
        os.replace(temporary, ours)
    write_json(manifest_path(root, number), read_json(manifest_path(source, unit)))
