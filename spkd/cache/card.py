"""The card: what a cache holds, for people and for checks. Two caches with one fingerprint are interchangeable."""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spkd import __version__
from spkd.cache.head import Head
from spkd.cache.plan import Plan
from spkd.cache.target import Target
from spkd.errors import SpkdError
from spkd.files import read_json
from spkd.manifest import Manifest

FILE = "card.json"
FORMAT = 1
SERIES = ("teacher", "targets", "views", "layout", "head", "codecs")  # what all parts of a cache have in common
CONTENT = (*SERIES, "parts")  # what the fingerprint covers ...
TOLD = ("source", "licence", "cite")  # ... but for these of the teacher: weights are the same wherever they came from


def make(
    teacher: dict[str, Any],
    targets: list[Target],
    views: dict[str, Any],
    parts: Sequence[dict[str, Any]],
    plan: Plan,
    head: Head | None = None,
    codecs: str | None = None,
    errors: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """A card over the content of a cache.

    Args:
        parts: of each part what `part` says. head: the teacher's classifier, kept beside. codecs: digest of the codecs'
            learnt parameters, where there are any. errors: what each target lost in its codec, as measured.
    """
    content = {
        "teacher": teacher,
        "targets": [t.card() for t in targets],
        "views": views,
        "layout": {"unit_views": plan.unit_views, "unit_seconds": plan.unit_seconds},
        "head": None if head is None else head.card(),
        "codecs": codecs,
        "parts": list(parts),
    }
    return {
        "spkd_cache": FORMAT,
        "fingerprint": fingerprint(content),
        **content,
        "errors": errors or {},
        "made": {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "by": _user(),
            "host": platform.node(),
            "versions": {"spkd": __version__, "torch": str(torch.__version__), "numpy": np.__version__},
        },
    }


def part(manifest: Manifest, plan: Plan) -> dict[str, Any]:
    """What the card says of one part: its manifest, and the plan made of it."""
    return {
        "manifest": manifest.digest,
        "utterances": len(manifest),
        "hours": round(manifest.seconds / 3600, 3),
        "views": len(plan.views),
        "units": plan.units,
    }


def pick_parts(card: dict[str, Any], utterances: Sequence[str], manifest: Manifest) -> list[Manifest] | None:
    """The manifest of each part of a cache, picked from one that may hold more and in another order.

    Args:
        utterances: those of the cache, in its order.
    Returns:
        None where an utterance is missing or is another than at extraction.
    """
    picked, first = [], 0
    for part in card["parts"]:
        mine = manifest.pick(utterances[first : first + part["utterances"]])
        if mine is None or mine.digest != part["manifest"]:
            return None
        picked.append(mine)
        first += part["utterances"]
    return picked


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 over the card's content, whatever its layout in the file."""
    return _digest({name: covered(content, name) for name in CONTENT})


def covered(content: dict[str, Any], name: str) -> Any:
    """One part of a card as the fingerprint covers it."""
    if name != "teacher":
        return content[name]
    return {key: value for key, value in content["teacher"].items() if key not in TOLD}


def series(content: dict[str, Any]) -> str:
    """SHA-256 over what does not change when a cache grows, without the learnt parameters of codecs."""
    return _digest({name: covered(content, name) for name in SERIES if name != "codecs"})


def part_key(content: dict[str, Any], number: int) -> str:
    """SHA-256 over what one part was extracted from and how: the name its shards carry."""
    extracted_from = content["parts"][number]["manifest"]
    return _digest({name: covered(content, name) for name in SERIES} | {"manifest": extracted_from})


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def load(root: Path) -> dict[str, Any]:
    """Raises SpkdError: no cache here, a newer format, or a card that does not fit its own fingerprint."""
    path = root / FILE
    if not path.is_file():
        raise SpkdError(f"{root}: no teacher cache; make one with `spkd extract cache={root}`")
    return check(read_json(path), str(path))


def check(card: Any, where: str) -> dict[str, Any]:
    """The card itself, if it is one this spkd can read and fits its fingerprint. Raises SpkdError otherwise."""
    if not isinstance(card, dict) or "spkd_cache" not in card:
        raise SpkdError(f"{where}: not a card of a teacher cache")
    check_format(card, where)
    try:
        names = [str(target["name"]) for target in card["targets"]]
        fits = fingerprint(card) == card["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise SpkdError(f"{where}: damaged (not a card: {error})") from error
    if not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
        raise SpkdError(f"{where}: a target with a name that is no file name")
    if not fits:
        raise SpkdError(f"{where}: damaged (it does not fit its fingerprint)")
    return card


def check_format(card: dict[str, Any], where: str) -> None:
    """Raises SpkdError for a card written by a newer spkd."""
    if card["spkd_cache"] != FORMAT:
        raise SpkdError(f"{where}: format {card['spkd_cache']}, this spkd reads format {FORMAT}; update spkd")


def grows(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether `new` is `old` with further parts behind."""
    count = len(old["parts"])
    same = all(covered(old, name) == covered(new, name) for name in SERIES)
    return same and len(new["parts"]) > count and new["parts"][:count] == old["parts"]


def difference(mine: dict[str, Any], theirs: dict[str, Any], parts: Sequence[str] = CONTENT) -> str:
    """Which parts of two cards differ, as a phrase for an error."""
    named = {
        "teacher": "teacher",
        "targets": "set of targets",
        "views": "view plan",
        "layout": "unit size",
        "head": "classifier",
        "codecs": "codebook",
        "parts": "manifest",
    }
    return " and ".join(f"another {named[name]}" for name in parts if covered(mine, name) != covered(theirs, name))
