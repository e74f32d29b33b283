"""Matching of the utterances of a trial list with a manifest whose ids are written slightly differently."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from spkd.corpus.audio import AUDIO_SUFFIXES
from spkd.progress import log

MOST_FOLDERS = 2  # that are left out in front of some names: of enrolment and of test
SIDE = re.compile(r"(?P<segment>.+?)(?:\.sph)?[:_-](?P<side>[ab])", re.IGNORECASE)


def match(names: Sequence[str], known: Mapping[str, int]) -> dict[str, str]:
    """Ids in the manifest by trial names, for all names that match.

    Equal ids match. Where some names have no equal id, rules are tried one after the other: the other Unicode normal
    form, a suffix or a common folder that only one side has, another audio suffix, or the side of a recording as NIST
    writes it; then each name by itself without its suffix of audio and without folders, of which there may be two, as
    the lists of CN-Celeb have `enroll/a.wav`, `test/b.wav` and `c/d.wav`. A rule is used only where every name matches
    and no two names get the same id; it is printed.
    """
    exact = {name: name for name in names if name in known}
    if len(exact) == len(names):
        return exact
    for rule, of_trials, of_manifest in _rules(names, known):
        by_key: dict[str, str] = {}
        for identity in known:
            by_key.setdefault(of_manifest(identity), identity)
        ids = {name: by_key[of_trials(name)] for name in names if of_trials(name) in by_key}
        if len(ids) == len(names) == len(set(ids.values())) and len(by_key) == len(known):
            log(f"note: the trials' utterances are matched with the manifest's {rule}")
            return ids
    return _each_by_itself(names, known) or exact


def _each_by_itself(names: Sequence[str], known: Mapping[str, int]) -> dict[str, str]:
    """Ids by trial names, without suffixes of audio and folders that some names have; {} where one is unsure."""
    by_key = {_without_audio_suffix(identity): identity for identity in known}
    if len(by_key) < len(known):
        return {}
    ids, folders = dict[str, str](), set[str]()
    for name in names:
        key = _without_audio_suffix(name)
        places = [0, *(match.end() for match in re.finditer("/", key))]
        if (place := next((at for at in places if key[at:] in by_key), None)) is None:
            return {}
        ids[name] = by_key[key[place:]]
        folders |= {key[:place]} - {""}
    if len(folders) > MOST_FOLDERS or len(set(ids.values())) < len(ids):
        return {}
    without = ["its suffix of audio", *sorted(folders)]
    log(f"note: the trials' utterances are matched with the manifest's, each without {', '.join(without)}")
    return ids


def _without_audio_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in AUDIO_SUFFIXES else name


Key = Callable[[str], str]  # name -> the text that must be equal on both sides


def _rules(names: Sequence[str], known: Mapping[str, int]) -> list[tuple[str, Key, Key]]:
    """Rules, each with its key of a trial's name and its key of an id in the manifest."""

    def as_it_is(name: str) -> str:
        return name

    def normal(name: str) -> str:
        return unicodedata.normalize("NFC", name)

    rules: list[tuple[str, Key, Key]] = [("in Unicode normal form C", normal, normal)]
    trials, manifest = _common_suffix(names), _common_suffix(known)
    if trials and not _have_suffix(known):
        rules.append((f"without the suffix {trials} of the trials'", _without(trials), as_it_is))
    if manifest and not _have_suffix(names):
        rules.append((f"without the suffix {manifest}", as_it_is, _without(manifest)))
    # Different suffixes may stand for different recordings (.ch1, .ch2), unless they are those of audio formats.
    if {trials.lower(), manifest.lower()} <= AUDIO_SUFFIXES:
        rules.append((f"as {manifest} instead of {trials}", _without(trials), _without(manifest)))
    if folder := _common_folder(names):
        rules.append((f"without the folder `{folder}` in front of the trials'", _without_folder(folder), as_it_is))
    if folder := _common_folder(known):
        rules.append((f"without the folder `{folder}`", as_it_is, _without_folder(folder)))
    if any(":" in name for name in names):
        rules.append(("with the side after the segment", _with_side, _with_side))
        rules.append(("without the side of the trials' segments", _without_side, as_it_is))
    return rules


def _common_suffix(names: Iterable[str]) -> str:
    """Suffix common to all names, such as `.wav`; "" where there is none."""
    suffixes = {PurePosixPath(name).suffix for name in names}
    return suffixes.pop() if len(suffixes) == 1 else ""


def _have_suffix(names: Iterable[str]) -> bool:
    """Whether a name has an audio suffix, or all names have the same suffix."""
    return bool(_common_suffix(names)) or any(PurePosixPath(name).suffix.lower() in AUDIO_SUFFIXES for name in names)


def _common_folder(names: Iterable[str]) -> str:
    """Folder common to all names, such as `wav/`; "" where there is none."""
    folders = {name.partition("/")[0] if "/" in name else "" for name in names}
    return f"{folder}/" if len(folders) == 1 and (folder := folders.pop()) else ""


def _without(suffix: str) -> Key:
    return lambda name: name.removesuffix(suffix)


def _without_folder(folder: str) -> Key:
    return lambda name: name.removeprefix(folder)


def _with_side(name: str) -> str:
    """Name with its side as `taaaa:a`, for `taaaa.sph:a`, `taaaa_A` and `taaaa-a`; other names are unchanged."""
    match = SIDE.fullmatch(name)
    return f"{match['segment']}:{match['side'].lower()}" if match else name


def _without_side(name: str) -> str:
    return re.sub(r":[abx]$", "", name)
