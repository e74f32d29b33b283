"""Moving a cache of format 1 (spkd before 0.2) to the present format, in place: no shard is read or written.

Format 1 named the folder of the commit records `manifest`, and had `1` in its records; everything else is the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spkd.cache.card import FORMAT, Card
from spkd.cache.folder import CARD, COMPLETE, GROUP, commit_path, self_digest
from spkd.cache.layout import GROUP_METADATA
from spkd.cache.plan import Plan
from spkd.cache.write import finalize
from spkd.errors import SpkdError
from spkd.files.atomic import read_json, sync_folder, write_json

OLD_COMMITS = "manifest"


def upgrade(root: Path) -> bool:
    """Move a cache to the present format; the same call continues an interrupted one.

    Returns:
        Whether the cache is complete, as it was.
    Raises:
        SpkdError: no cache of format 1 there, or a damaged one.
    """
    if not (root / CARD).is_file():
        raise SpkdError(f"{root}: no teacher cache")
    tree = read_json(root / CARD)
    version = tree.get("spkd_cache") if isinstance(tree, dict) else None
    if version not in (1, FORMAT) or (version == FORMAT and not (root / OLD_COMMITS).is_dir()):
        raise SpkdError(f"{root}: not a cache of format 1")
    completed = (root / COMPLETE).is_file()
    if completed:
        record = read_json(root / COMPLETE)
        if not isinstance(record, dict) or record.get("check") != self_digest(record):
            raise SpkdError(f"{root / COMPLETE}: damaged (it does not match its own digest)")
        # A cache that grows is upgraded as far as it was complete; the same `spkd extract` goes on from there.
        tree = record.get("card")
    card = Card.from_json({**_object(tree, root), "spkd_cache": FORMAT}, str(root / CARD))
    plan = Plan.load(root, card)
    commits, old = commit_path(root, 0).parent, root / OLD_COMMITS
    (root / COMPLETE).unlink(missing_ok=True)
    write_json(root / CARD, card.to_json())
    write_json(root / GROUP, GROUP_METADATA)
    for path in sorted(old.glob("*.json")) if old.is_dir() else []:
        commit = _object(read_json(path), root)
        writer = _object(commit.get("writer"), root)
        write_json(commits / path.name, commit | {"writer": {"host": str(writer.get("host")), "worker": "format 1"}})
        path.unlink()
    if old.is_dir():
        os.rmdir(old)
        sync_folder(root)
    return finalize(root, card, plan)


def _object(tree: Any, root: Path) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise SpkdError(f"{root}: damaged (a record is not an object)")
    return tree
