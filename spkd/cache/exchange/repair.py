"""Repair of a damaged cache from another copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spkd.cache.claims import changing
from spkd.cache.exchange.remote import (
    completion_at,
    derived_files,
    fetch_metadata,
    fetch_shard,
    local_folder,
    lost_views,
    pulled_note,
    remove_left,
)
from spkd.cache.folder import COMPLETE, PULLED, CompletionRecord, commit_path, load_card
from spkd.cache.mapped_plan import mend
from spkd.cache.verify import changed_metadata, damaged_shards, unit_shards
from spkd.errors import SpkdError
from spkd.files.atomic import check_no_links, write_bytes, write_json
from spkd.files.remote_folder import RemoteFolder, in_parallel
from spkd.files.text import counted
from spkd.progress import track


@dataclass(frozen=True)
class Repaired:
    """What was fetched for a cache that is whole again.

    Attributes:
        shards: number of shards.
        bytes: size of these shards.
        files: number of other files.
    """

    shards: int
    bytes: int
    files: int


def repair(root: Path, url: str) -> Repaired:
    """Fetch the files of a cache that are missing or damaged from another copy of it.

    Every file is read, as by `verify`. What is fetched is compared with the digests and checksums of this cache before
    it replaces anything. The same call continues after an interruption.

    Raises:
        SpkdError: another cache is there, or it has not everything that is damaged here; the rest is repaired.
    """
    place = RemoteFolder.of(url)
    url = place.url
    theirs, data = completion_at(place)
    own = CompletionRecord.there(root)
    if not _is_copy(root, own, theirs):
        raise SpkdError(f"{url}: not a copy of {root} (its fingerprint is another)")
    if own is None and (fewer := lost_views(local_folder(root), place, theirs)):
        raise SpkdError(f"{url}: lacks {counted(fewer, 'view')} of {root}, as they were rejected; name another copy")
    record = own or theirs
    card, lacking = record.card, dict[str, str]()  # name of each file that the copy does not have -> why

    def fetch(names: Sequence[str], call: Callable[[str], int], size: int) -> int:
        """Fetch files, of `size` bytes together. Returns the bytes of the shards that were fetched."""
        done = dict[str, int]()

        def attempt(name: str) -> int:
            try:
                done[name] = call(name)
            except SpkdError as error:
                lacking[name] = str(error)
            return done.get(name, 0)

        with track(f"fetching from {url}", size >> 20, "MiB") as bar:
            in_parallel([partial(attempt, name) for name in names], bar)
        return sum(done.values())

    remove_left(root, record)
    # Metadata first: the commit records say how the shards must be.
    changed, derived = changed_metadata(root, record), derived_files(card)
    if changed:
        with changing(root):
            check_no_links(root, {Path(name).parent for name in changed})
            for name in changed & derived.keys():
                write_json(root / name, derived[name])
            fetch(sorted(changed - derived.keys()), partial(fetch_metadata, place, root, record), 0)
    lost = {unit for unit in range(card.units) if str(commit_path(Path(), unit)) in lacking}
    shards = [shard for unit in range(card.units) if unit not in lost for shard in unit_shards(root, card, unit)]
    damaged = {str(shard.path.relative_to(root)): shard for shard, _ in damaged_shards(root, record, shards)}
    size = sum(shard.record.bytes for shard in damaged.values())
    fetched = fetch(list(damaged), lambda name: fetch_shard(place, root, damaged[name]), size)
    if lacking:
        lost |= {damaged[name].unit for name in lacking if name in damaged}
        what = f"units that remain damaged: {', '.join(map(str, sorted(lost)))}" if lost else "it remains damaged"
        raise SpkdError("\n".join([f"{root}: {what}; {url} lacks", *lacking.values()]))
    if own is None:
        with changing(root):
            write_bytes(root / COMPLETE, data)
    mend(root, record)
    return Repaired(len(damaged), fetched, len(changed) + (own is None))


def _is_copy(root: Path, own: CompletionRecord | None, theirs: CompletionRecord) -> bool:
    """Whether a copy is one of the cache in a folder, perhaps with further parts.

    Args:
        own: its completion record; None where that is damaged or missing.
    """
    if own is not None:
        return own.fingerprint == theirs.fingerprint or own.card.grows_to(theirs.card)
    if (root / PULLED).is_file() and pulled_note(root).get("fingerprint") == theirs.fingerprint:
        return True
    return load_card(root).identity == theirs.card.identity
