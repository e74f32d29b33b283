"""Speech of the utterances of an extraction, kept in the folder of its cache, so that each is searched once.

Before there is a plan, each chunk of utterances is a file of `speech/`; the plan has it afterwards. Of several
processes, each begins at another chunk, and leaves out those that are there. A chunk is what its first writer found:
on other machines, a network may give other last bits, and so another stretch now and then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spkd.cache.folder import CARD, SPEECH, load_card
from spkd.cache.plan import Plan, with_speech
from spkd.corpus.audio import AudioError
from spkd.corpus.manifest import Manifest, Utterance, identity
from spkd.corpus.vad.base import SpeechFinder, Stretches
from spkd.corpus.vad.find import find_each, speech_alone, with_stretches
from spkd.errors import SpkdError
from spkd.extract.ranks import Rank
from spkd.files import digest
from spkd.files.atomic import check_no_links, create_json, remove, remove_abandoned
from spkd.files.reading import read_json
from spkd.files.sealed import Format
from spkd.progress import track

FORMAT = Format("spkd_speech", 1, "a file of speech that was found", "remove it")
# Most of one chunk: some seconds of the work of a core, which are lost where a run is killed.
CHUNK, SECONDS = 512, 3600.0  # utterances, s of audio


def found_speech(
    root: Path, manifest: Manifest, finder: SpeechFinder, workers: int, rank: Rank | None = None
) -> tuple[Manifest, dict[str, str]]:
    """The utterances of a measured manifest with their speech, from the cache as far as that has it.

    Args:
        root: folder of the cache, which need not exist.
        workers: number of threads.
        rank: rank of this process among several that extract this cache; None where it works alone.
    Returns:
        The utterances with speech, and the id of each other -> the reason.
    Raises:
        SpkdError: the folder cannot be written, or a file of segments is not clear.
    """
    if not finder.is_costly:
        return speech_alone(manifest, finder, workers)
    unusable: dict[str, str] = {}
    while True:
        known = _with_planned(root, manifest, finder)
        found = _kept(root, finder)
        keys = {u.id: _key(u) for u in known if u.speech is None}
        missing = [u for u in known if u.speech is None and keys[u.id] not in found and u.id not in unusable]
        if not missing:
            break
        unusable |= _find(root, missing, finder, workers, rank)
    cut, silent = with_stretches(known, {name: found[key] for name, key in keys.items() if key in found}, finder)
    return cut, unusable | silent


def forget(root: Path) -> None:
    """Remove the files of speech of a cache whose plan has it."""
    remove_abandoned(root / SPEECH)
    for path in (root / SPEECH).glob("*.json"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or it holds files of others
        (root / SPEECH).rmdir()


def _with_planned(root: Path, manifest: Manifest, finder: SpeechFinder) -> Manifest:
    """The utterances, those of the cache with the speech that its plan has."""
    if not (root / CARD).is_file():
        return manifest
    card = load_card(root)
    if card.views.vad != finder.card:
        return manifest
    try:
        return with_speech(manifest, Plan.load(root, card))
    except SpkdError:  # damaged: it is made again from what is found again
        return manifest


def _find(
    root: Path, utterances: Sequence[Utterance], finder: SpeechFinder, workers: int, rank: Rank | None
) -> dict[str, str]:
    """Find the speech of utterances, and keep it. Returns the reason of each whose audio cannot be used."""
    check_no_links(root, [SPEECH])
    chunks = list(_chunks(utterances))
    begin = 0 if rank is None else rank.number * len(chunks) // rank.world
    unusable: dict[str, str] = {}
    with track("finding speech", len(utterances), "utterances") as bar:
        for chunk in [*chunks[begin:], *chunks[:begin]]:
            path = root / SPEECH / f"{digest.of_tree([_card(finder), *map(_key, chunk)])[:32]}.json"
            if not path.exists():
                results = {}
                for utterance, result in find_each(chunk, finder, workers):
                    if isinstance(result, AudioError):
                        unusable[utterance.id] = result.reason
                    else:
                        results[_key(utterance)] = result
                if results:  # a chunk without any is tried again
                    create_json(path, FORMAT.seal({"vad": _card(finder), "stretches": results}))
            bar.advance(len(chunk))
    return unusable


def _chunks(utterances: Sequence[Utterance]) -> Iterator[list[Utterance]]:
    """Chunks in order. Where whole ones are left out, the others stay the same."""
    chunk, seconds = list[Utterance](), 0.0
    for utterance in utterances:
        chunk.append(utterance)
        seconds += utterance.duration or 0.0
        if len(chunk) == CHUNK or seconds >= SECONDS:
            yield chunk
            chunk, seconds = [], 0.0
    if chunk:
        yield chunk


def _kept(root: Path, finder: SpeechFinder) -> dict[str, Stretches]:
    """Key of each utterance whose speech is kept -> its stretches; files that are damaged are removed."""
    found: dict[str, Stretches] = {}
    for path in sorted((root / SPEECH).glob("*.json")):
        try:
            of_file = FORMAT.open(read_json(path), str(path), lambda content, where: _read(content, where, finder))
        except FileNotFoundError:  # the plan of another process has it
            continue
        except SpkdError:
            remove(path)
            continue
        for key, stretches in of_file:
            found.setdefault(key, stretches)
    return found


def _read(content: dict[str, Any], where: str, finder: SpeechFinder) -> list[tuple[str, Stretches]]:
    """Keys and stretches of a file; none where they are of another detector."""
    if content.get("vad") != _card(finder):
        return []
    try:
        return [(key, [(int(a), int(b)) for a, b in pairs]) for key, pairs in content["stretches"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpkdError(f"{where}: damaged ({error})") from error


def _key(utterance: Utterance) -> str:
    """Key of an utterance and its whole stretch of a file."""
    return digest.of_bytes(identity(utterance))[:32]


def _card(finder: SpeechFinder) -> dict[str, Any]:
    return finder.card.to_json()
