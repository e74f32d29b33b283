"""Finding the utterances of a trial list in a manifest whose ids are written a little differently."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

from spkd.progress import log


def match(names: Sequence[str], known: Mapping[str, int]) -> dict[str, str]:
    """Trial name -> id in the manifest, for all names that can be found.

    Ids match as they are. Where some do not, one rule is tried that makes every name match: the other Unicode normal
    form, a common folder in front, or a suffix that only one side has. A rule that leaves any name out, or gives two
    names one id, is not used. The rule that was used is printed.
    """
    exact = {name: name for name in names if name in known}
    if len(exact) == len(names):
        return exact
    for rule, key in _rules(names, known):
        by_key: dict[str, str] = {}
        for identity in known:
            by_key.setdefault(key(identity, False), identity)
        found = {name: by_key[key(name, True)] for name in names if key(name, True) in by_key}
        if len(found) == len(names) == len(set(found.values())) and len(by_key) == len(known):
            log(f"note: the trials' utterances are matched with the manifest's {rule}")
            return found
    return exact


Key = Callable[[str, bool], str]  # (name, whether it is of the trial list) -> what must be equal


def _rules(names: Sequence[str], known: Mapping[str, int]) -> list[tuple[str, Key]]:
    def normal(name: str, _: bool) -> str:
        return unicodedata.normalize("NFC", name)

    def stem(name: str, _: bool) -> str:
        return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name

    rules: list[tuple[str, Key]] = [("in Unicode normal form C", normal), ("without their suffixes", stem)]
    for rule, in_trials in (
        ("without the folder `{}` in front of the trials'", True),
        ("without the folder `{}`", False),
    ):
        side = names if in_trials else list(known)
        folder = _common_folder(side)
        if folder:

            def strip(name: str, of_trials: bool, folder: str = folder, in_trials: bool = in_trials) -> str:
                return name.removeprefix(folder) if of_trials == in_trials else name

            rules.append((rule.format(folder), strip))
    return rules


def _common_folder(names: Sequence[str]) -> str:
    """`wav/` where every name begins so; "" where there is no such folder."""
    first = names[0].partition("/")[0] + "/"
    return first if "/" in names[0] and all(name.startswith(first) for name in names) else ""
