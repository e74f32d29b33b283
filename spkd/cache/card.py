"""The card: what a cache holds, for people and for checks. Two caches with one fingerprint are interchangeable."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spkd import __version__
from spkd.cache.plan import Plan
from spkd.cache.target import Target
from spkd.errors import SpkdError
from spkd.files import read_json
from spkd.manifest import Manifest

FILE = "card.json"
FORMAT = 1
CONTENT = ("teacher", "targets", "views", "manifest", "layout", "head")  # what the fingerprint covers


def make(
    teacher: dict[str, Any],
    targets: list[Target],
    views: dict[str, Any],
    manifest: Manifest,
    plan: Plan,
    head: dict[str, Any] | None,
) -> dict[str, Any]:
    """A card over the content of a cache. `head` describes the classifier in head.safetensors, if there is one."""
    content = {
        "teacher": teacher,
        "targets": [t.card() for t in targets],
        "views": views,
        "manifest": {
            "digest": manifest.digest,
            "utterances": len(manifest),
            "speakers": len(manifest.speakers),
            "hours": round(manifest.seconds / 3600, 3),
        },
        "layout": {"unit_views": plan.unit_views, "unit_seconds": plan.unit_seconds},
        "head": head,
    }
    versions = {"spkd": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
    return {
        "spkd_cache": FORMAT,
        "fingerprint": fingerprint(content),
        **content,
        "views_total": len(plan.views),
        "made": {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "versions": versions,
        },
    }


def fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 over the card's content, whatever its layout in the file."""
    covered = {name: content[name] for name in CONTENT}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def load(root: Path) -> dict[str, Any]:
    """Raises SpkdError: no cache here, a newer format, or a card that does not fit its own fingerprint."""
    path = root / FILE
    if not path.is_file():
        raise SpkdError(f"{root}: no teacher cache; make one with `spkd extract cache={root}`")
    card = read_json(path)
    if not isinstance(card, dict) or "spkd_cache" not in card:
        raise SpkdError(f"{path}: not a card of a teacher cache")
    if card["spkd_cache"] != FORMAT:
        raise SpkdError(f"{path}: format {card['spkd_cache']}, this spkd reads format {FORMAT}; update spkd")
    if any(name not in card for name in CONTENT) or fingerprint(card) != card.get("fingerprint"):
        raise SpkdError(f"{path}: damaged (it does not fit its fingerprint)")
    return card


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Which parts of two cards differ, as a phrase for an error."""
    parts = [name for name in CONTENT if mine[name] != theirs[name]]
    named = {
        "manifest": "manifest",
        "teacher": "teacher",
        "views": "view plan",
        "targets": "set of targets",
        "layout": "unit size",
        "head": "classifier",
    }
    return " and ".join(f"another {named[p]}" for p in parts)
