"""Remote copies of caches: push, pull, find.

A shard never changes once it is committed: a shard with the right checksums is kept, a missing one is copied. The
completion record is copied last, so that an incomplete copy is never taken for a cache.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from spkd.cache.card import Card
from spkd.cache.claims import changing, is_filled
from spkd.cache.folder import (
    CARD,
    COMPLETE,
    NOTES,
    PULLED,
    REJECTED,
    VERIFIED,
    CommitRecord,
    CompletionRecord,
    commit_path,
    load_card,
    mapped_path,
    metadata_digest,
    most_bytes,
    parse_card,
    parse_completion,
    remedy,
    shard_path,
)
from spkd.cache.layout import zarr_files
from spkd.cache.lock import hold
from spkd.cache.mapped_plan import mend
from spkd.cache.notes import Notes, noted_damaged
from spkd.cache.verify import ExpectedShard, check_shard, expected_shards, unit_shards
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.files.atomic import (
    PART,
    check_no_links,
    create_json,
    remove_abandoned,
    set_aside,
    write_bytes,
    write_json,
    writing,
)
from spkd.files.reading import PROTOCOLS, is_foreign, parse_json, read_json, state_of
from spkd.files.remote_folder import (
    LARGEST_RECORD,
    PARALLEL,
    RemoteFolder,
    in_parallel,
    patiently,
    send,
)
from spkd.files.text import counted
from spkd.progress import log, track

EVICTED = "evicted"  # name before the suffix of a copy that is being removed
DEPTH = 3  # folders below a root in which `find` looks for caches
MOST_FOLDERS = 10_000  # folders that are looked at on another machine, which may make up any number


def push(root: Path, url: str) -> int:
    """Copy a complete cache to a place, and read the copy back. The same call continues after an interruption.

    Returns:
        Bytes of the shards.
    Raises:
        UsageError: the place cannot be written.
        SpkdError: the cache is damaged, or the place holds another cache, files of others, or views that were rejected
            here.
    """
    record, place = CompletionRecord.load(root), RemoteFolder.of(url)
    shards = {str(s.path.relative_to(root)): s for s in expected_shards(root, record.card)}
    names = [*record.sha256, *shards, *([VERIFIED] if metadata_digest(root, record.card, VERIFIED) else [])]

    def expected(name: str) -> str:
        if name in record.sha256:
            if metadata_digest(root, record.card, name) != record.sha256[name]:
                raise SpkdError(f"{root / name}: missing or changed; {remedy(root)}")
            return record.sha256[name]
        if name in shards:
            check_shard(root, shards[name])
        return digest.of_file(files[name])

    with (
        changing(Path(place.path)) if place.is_local else contextlib.nullcontext(),
        tempfile.TemporaryDirectory() as folder,
    ):
        there = _card_at(place)
        if there is not None and not _same_or_less(there, record.card):
            raise UsageError(f"{url}: holds another cache")
        if lost := lost_views(place, local_folder(root), record):
            advice = f"run the `spkd extract` that made {root} again where all audio is there, or choose another place"
            raise SpkdError(f"{url}: holds {counted(lost, 'view')} that {root} lacks, as they were rejected; {advice}")
        # Files that a growth of this cache may replace meanwhile are sent as they belong to its record.
        derived = derived_files(record.card) | {COMPLETE: record.to_json()}
        for name, tree in derived.items():
            write_json(Path(folder, name), tree)
        files = {name: root / name for name in names} | {name: Path(folder, name) for name in derived}
        # A commit record follows the shards that it promises, and the completion record everything.
        commits = {str(commit_path(Path(), unit)) for unit in range(record.card.units)}
        others = files.keys() - commits - {CARD, COMPLETE}
        # The card comes first: by it, a further push knows the files of an interrupted one.
        send(files, url, expected, ([CARD], sorted(others), sorted(commits), [COMPLETE]), there is not None)
    return record.bytes


def _card_at(place: RemoteFolder) -> Card | None:
    """The card of a cache elsewhere, from its completion record where its own file is not whole; None without both.

    Raises:
        SpkdError: neither can be read, or the place does not answer.
    """
    data = place.read(CARD, LARGEST_RECORD)
    if data is None:
        return completion_at(place)[0].card if place.read(COMPLETE, LARGEST_RECORD) is not None else None
    try:
        return parse_card(data, f"{place.url}/{CARD}")
    except SpkdError as error:
        try:
            return completion_at(place)[0].card
        except SpkdError:
            raise SpkdError(f"{error}; remove that copy, or choose another place") from error


def lost_views(old: RemoteFolder, new: RemoteFolder, record: CompletionRecord) -> int:
    """Number of views that a cache would lose, complete or not, since they are rejected in one that is copied over it.

    Args:
        old: the folder that is copied over.
        record: completion record of the cache in `new`.
    Raises:
        SpkdError: a commit record in `new` is missing or damaged.
    """

    def rejected(place: RemoteFolder, data: bytes | None, name: str) -> set[int]:
        where = f"{place.url}/{name}"
        if data is None:
            raise SpkdError(f"{where}: missing")
        return set(CommitRecord.from_json(parse_json(data, where), record.card, where).rejected)

    def lost(unit: int) -> int:
        name = str(commit_path(Path(), unit))
        data = old.read(name, LARGEST_RECORD)
        if data is None or digest.of_bytes(data) == record.sha256[name]:
            return 0
        try:
            lacking = rejected(old, data, name)
        except SpkdError:  # a damaged record, whose views cannot be read
            return 0
        return len(rejected(new, new.read(name, LARGEST_RECORD), name) - lacking)

    if not record.rejected:
        return 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        return sum(pool.map(lost, range(record.card.units)))


def local_folder(root: Path) -> RemoteFolder:
    return RemoteFolder(str(root), fsspec.filesystem("file"), str(root))


def derived_files(card: Card) -> dict[str, Any]:
    """Name -> content of the files of a cache that follow from its card, and change where it grows."""
    return {CARD: card.to_json()} | zarr_files(card)


def pull(url: str, root: Path, limit: int | None = None) -> int:
    """Copy a cache from a place, and check every file on arrival. The same call continues after an interruption.

    Args:
        limit: most bytes that pulled copies may take in the parent folder of `root`. Copies that were not used for the
            longest time are removed to make room. Copies that are being read, copies with files that their source does
            not have, and caches that were not pulled are never removed. None sets no limit.
    Returns:
        Bytes of the shards.
    Raises:
        UsageError: no complete cache there.
        SpkdError: a damaged file, another content of `root`, or no room.
    """
    # Read the completion record, and make the folder.
    place = RemoteFolder.of(url)
    url = place.url
    record, data = completion_at(place)
    card = record.card
    _check_destination(root, place, record)
    if limit is not None:  # before anything is written
        shards_there = (shard_path(root, target, unit) for target in card.targets for unit in range(card.units))
        make_room(root, record.bytes - sum(map(_bytes_of, shards_there)), limit)
    note = {"from": place.path if place.is_local else url, "fingerprint": record.fingerprint}
    with (
        changing(root),
        contextlib.ExitStack() as locks,
        track(f"pulling from {url}", record.bytes >> 20, "MiB") as bar,
    ):
        _check_destination(root, place, record)
        remove_abandoned(root.parent, [EVICTED])
        check_no_links(root, {Path(name).parent for name in derived_files(card)})
        remove_left(root, record)
        create_json(root / PULLED, note)
        if (lock := hold(root)) is not None:  # so that no other pull evicts this copy
            locks.enter_context(lock)
        # Copy the metadata files, then the shards, then the completion record.
        for name, tree in derived_files(card).items():
            write_json(root / name, tree)
        in_parallel([partial(fetch_metadata, place, root, record, name) for name in record.sha256], bar)
        in_parallel([partial(fetch_shard, place, root, shard) for shard in expected_shards(root, card)], bar)
        mend(root, record)
        write_bytes(root / COMPLETE, data)
        if pulled_note(root) != note:
            write_json(root / PULLED, note)
    return record.bytes


def remove_left(root: Path, record: CompletionRecord) -> None:
    """Remove files that killed processes were writing beside those of a copy that are no shards."""
    for folder in {
        root,
        root / "claims",
        *((root / name).parent for name in (*record.sha256, *derived_files(record.card))),
    }:
        remove_abandoned(folder)


def completion_at(place: RemoteFolder) -> tuple[CompletionRecord, bytes]:
    """The completion record of a cache elsewhere, and the content of its file.

    Raises:
        UsageError: no complete cache there.
        SpkdError: a damaged record.
    """
    data = place.read(COMPLETE, LARGEST_RECORD)
    if data is None:
        raise UsageError(f"{place.url}: no complete teacher cache there ({COMPLETE} is missing)")
    return parse_completion(data, f"{place.url}/{COMPLETE}"), data


def fetch_metadata(place: RemoteFolder, root: Path, record: CompletionRecord, name: str) -> int:
    """Copy a metadata file from a place, unless it is there.

    Returns:
        0, the bytes of shards.
    Raises:
        SpkdError: the place does not have the file of the record.
    """
    path, expected = root / name, record.sha256[name]
    if metadata_digest(root, record.card, name) != expected:
        content = place.read(name, most_bytes(record.card))
        if content is None or digest.of_bytes(content) != expected:
            raise SpkdError(f"{place.url}/{name}: {'missing' if content is None else 'damaged'}")
        write_bytes(path, content)
    return 0


def fetch_shard(place: RemoteFolder, root: Path, shard: ExpectedShard) -> int:
    """Copy a shard from a place, unless it is there, and check it before it replaces another file.

    Returns:
        Its bytes.
    Raises:
        SpkdError: the place does not have the shard of the commit record, or its folder here is a symbolic link.
    """
    if shard.problem() is None:
        return shard.record.bytes
    name = str(shard.path.relative_to(root))
    check_no_links(root, [Path(name).parent])
    remove_abandoned(shard.path.parent)

    def fetch() -> None:
        with writing(shard.path) as file:
            for block in place.blocks(name, shard.record.bytes):
                file.write(block)
            file.flush()
            if (wrong := shard.problem(Path(file.name))) is not None:
                raise SpkdError(f"{place.url}/{name}: {wrong}")

    patiently(fetch, f"{place.url}/{name}")
    return shard.record.bytes


def _check_destination(root: Path, place: RemoteFolder, record: CompletionRecord) -> None:
    """Check that a folder is empty, or holds an earlier copy of the cache: an incomplete one, or one before it grew.

    Args:
        record: completion record of the cache at `place`.
    """
    if not root.is_dir() or all(path.name == "claims" for path in root.iterdir()):
        return
    if not (root / PULLED).is_file():
        raise UsageError(f"{root}: is not empty and was not pulled; choose another folder")
    pulled, own = pulled_note(root).get("fingerprint"), CompletionRecord.there(root)
    card = None if own is None else own.card
    with contextlib.suppress(SpkdError):  # a missing or damaged file, which is written anew
        card = load_card(root)
    if (card and record.card.grows_to(card)) or (own and own.fingerprint not in (pulled, record.fingerprint)):
        raise SpkdError(f"{root}: was extended here, which a pull would undo; push it, or choose another folder")
    if not (_same_or_less(card, record.card) if card else pulled == record.fingerprint):
        raise UsageError(f"{root}: holds a copy of another cache; choose another folder, or remove it")
    if lost := lost_views(local_folder(root), place, record):
        lacks = f"holds {counted(lost, 'view')} that {place.url} lacks, as they were rejected"
        raise SpkdError(f"{root}: {lacks}; push it, or choose another folder")


def pulled_note(root: Path) -> dict[str, Any]:
    """The note of a pulled copy: whence it comes, and its fingerprint when it was pulled. {} where it is damaged."""
    try:
        note = read_json(root / PULLED)
    except SpkdError:
        note = None
    return note if isinstance(note, dict) else {}


def _same_or_less(old: Card, new: Card) -> bool:
    """Whether the old card describes the same cache as the new one, or that cache before it grew."""
    return old.identity == new.identity or old.grows_to(new)


def make_room(root: Path, needed: int, limit: int) -> None:
    """Remove pulled copies next to `root`, those used longest ago first, until there is room; or none.

    Args:
        root: folder of the copy that needs the room; it is not removed.
        needed: further bytes that it will take.
        limit: most bytes that all pulled copies may take.
    Raises:
        SpkdError: not enough can be removed.
    """
    # Which copies are there, and how much must go.
    remove_abandoned(root.parent, [EVICTED])
    there = (path.parent for path in root.parent.glob(f"*/{PULLED}") if not path.parent.name.endswith(PART))
    copies = {copy: _bytes_under(copy) for copy in there if not copy.is_symlink()}  # a link leads to somewhere else
    used = sum(copies.values())
    excess, freed, going = used + needed - limit, 0, list[Path]()
    others = [copy for copy in sorted(copies, key=_last_used) if copy.resolve() != root.resolve()]
    with contextlib.ExitStack() as held:
        # No copy goes before it is certain that those which can go suffice.
        for copy in others if sum(copies[copy] for copy in others) >= excess else ():
            if freed < excess and _may_go(copy, held):
                going.append(copy)
                freed += copies[copy]
        if freed < excess:
            raise SpkdError(
                f"{root}: {needed / 1e9:.3g} GB more would exceed the limit of {limit / 1e9:.3g} GB "
                f"({(used - freed) / 1e9:.3g} GB are in copies that stay)"
            )
        for copy in going:
            # No process opens a copy that is being removed, and what a kill leaves of it the next pull removes.
            shutil.rmtree(set_aside(copy, EVICTED), ignore_errors=True)
            log(f"{copy}: removed to make room ({copies[copy] / 1e6:,.0f} MB, used longest ago)")


def _may_go(copy: Path, held: contextlib.ExitStack) -> bool:
    """Whether no other process reads or changes a pulled copy, and its source has all of it.

    Args:
        held: takes the locks by which it stays so.
    """
    with contextlib.ExitStack() as locks:
        if (lock := hold(copy, alone=True)) is None:
            return False
        locks.enter_context(lock)
        try:
            if not locks.enter_context(changing(copy, wait=False)) or is_filled(copy):
                return False
            missing = _missing_at_source(copy, locks)
        except (SpkdError, OSError) as error:
            missing = str(error)
        if missing is None:
            held.enter_context(locks.pop_all())
            return True
    log(f"{copy}: stays, since it may be the only copy ({missing})")
    return False


def _kept(place: RemoteFolder, copy: Path, held: contextlib.ExitStack) -> bool:
    """Keep a source on this machine from being evicted or changed, while its copy is removed.

    Two pulls would otherwise remove two copies that were pulled from one another, each as the other is still there.

    Args:
        held: takes the locks.
    Returns:
        Whether it is kept; also where it was not pulled, so that no pull removes it.
    """
    root = Path(place.path)
    if not place.is_local or not (root / PULLED).is_file() or root.samefile(copy):
        return True
    if (lock := hold(root, wait=False)) is None:
        return False
    held.enter_context(lock)
    try:
        return held.enter_context(changing(root, wait=False))
    except OSError:  # it is somebody else's, and flock alone holds it
        return True


def _missing_at_source(copy: Path, held: contextlib.ExitStack) -> str | None:
    """Phrase that names a file of a pulled copy that its source does not have; None where it has all of them.

    Plans, commit records, head and codebook must have the digests of the source's completion record, and the shards
    there the sizes of these commit records and no known damage. No link may lead from there to the copy.

    Args:
        held: takes locks that keep the source as it is.
    Raises:
        SpkdError: the source does not answer, or a record is damaged.
    """
    url = pulled_note(copy).get("from")
    if not isinstance(url, str) or not (Path(url).is_absolute() or "://" in url):
        return f"{PULLED} does not say whence it comes"
    if is_foreign(url):  # whoever puts a folder beside the copies would choose what is opened
        return f"{PULLED} names an address of another protocol than {', '.join(PROTOCOLS)}"
    place = RemoteFolder.of(url)
    if not _kept(place, copy, held):
        return f"{url} is being removed or changed"
    record, _ = completion_at(place)
    card = load_card(copy) if (copy / CARD).is_file() else record.card
    if not _same_or_less(card, record.card):
        return f"it was extended here, or {url} holds another cache by now"
    committed = [unit for unit in range(card.units) if commit_path(copy, unit).is_file()]
    shards = {_name(copy, shard.path): shard for unit in committed for shard in unit_shards(copy, card, unit)}
    # Files that follow from the others or are of this copy alone, and shards without a record, which nobody uses.
    aside = {COMPLETE, REJECTED, PULLED, VERIFIED, NOTES, *derived_files(card)}
    aside |= {str(mapped_path(part)) for part in range(len(card.parts))}
    aside |= {str(shard_path(Path(), target, unit)) for target in card.targets for unit in range(card.units)}
    for path in copy.rglob("*"):
        name = _name(copy, path)
        if (
            (path.is_dir() and not path.is_symlink())
            or name in aside
            or name.startswith("claims/")
            or path.suffix == PART
        ):
            continue
        if name not in record.sha256 or metadata_digest(copy, record.card, name) != record.sha256[name]:
            return f"{name} is not at {url}"

    own = (name for name in (COMPLETE, *record.sha256, *shards) if place.is_local and _is_own(copy, place, name))
    if (itself := next(own, None)) is not None:
        return f"{itself} at {url} is its own"

    with ThreadPoolExecutor(PARALLEL) as pool:
        problems = pool.map(_problem_at(place), shards.items())
        return next(filter(None, problems), None)


def _problem_at(place: RemoteFolder) -> Callable[[tuple[str, ExpectedShard]], str | None]:
    """Function of the name of a shard and of the shard in a copy, that looks for it at the source of the copy.

    It reads little: the header, here the index too, and the notes that a verification has left at the source.

    Returns:
        Function that returns a phrase which says what is wrong; None where the shard is there and not known as damaged.
    """
    url = place.url
    notes = Notes(Path(place.path)) if place.is_local else None
    noted = set[str]()
    with contextlib.suppress(SpkdError):  # some buckets refuse what is not there, instead of saying so
        if notes is None:
            noted = noted_damaged((place.read(NOTES, LARGEST_RECORD) or b"").decode(errors="replace"))

    def problem(named: tuple[str, ExpectedShard]) -> str | None:
        name, shard = named
        size = patiently(lambda: place.size(name), f"{url}/{name}")
        if size != shard.record.bytes:
            return f"{name} is not at {url}"
        if notes is not None:
            there = Path(place.at(name))
            wrong = "noted as damaged" if notes.is_damaged(there) else shard.problem(there, rows=False)
        else:
            begin = patiently(lambda: place.beginning(name, len(shard.header)), f"{url}/{name}")
            wrong = "changed in its header" if begin != shard.header else None
            wrong = "noted as damaged" if name in noted else wrong
        return wrong and f"{name} at {url}: {wrong}"

    return problem


def _is_own(copy: Path, place: RemoteFolder, name: str) -> bool:
    """Whether a file of a local source is that of the copy, under another path; a hard link is another file."""
    theirs, ours = Path(os.path.realpath(place.at(name))).parent, (copy / name).parent
    return theirs.is_dir() and ours.is_dir() and theirs.samefile(ours)


def _name(root: Path, path: Path) -> str:
    return str(path.relative_to(root))


def _bytes_under(folder: Path) -> int:
    """Size of the files in a folder, without those that another process removes meanwhile."""
    return sum(_bytes_of(Path(where, name)) for where, _, names in os.walk(folder) for name in names)


def _bytes_of(path: Path) -> int:
    """Size of a regular file; 0 where there is none."""
    state = state_of(path)
    return 0 if state is None or not path.is_file() else state[0]


def _last_used(copy: Path) -> float:
    """Time of the last use of a pulled copy (s); 0 where another process removes it meanwhile."""
    try:
        return (copy / PULLED).stat().st_mtime
    except FileNotFoundError:
        return 0.0


@dataclass(frozen=True)
class ListedCache:
    """A cache that `find` lists.

    Attributes:
        card: its card; None where it is damaged.
        fingerprint: its fingerprint, or the identity of its card where it is not complete.
        bytes: size of its shards; None where it is not complete.
        error: the reason why it cannot be read; None where it can.
    """

    place: RemoteFolder
    card: Card | None
    fingerprint: str
    bytes: int | None
    error: str | None

    @property
    def url(self) -> str:
        """Its folder or URL, without credentials."""
        return self.place.url


def find(url: str) -> Iterator[ListedCache]:
    """Every cache below a folder or bucket, complete or not.

    Raises:
        UsageError: no such folder on this machine.
        SpkdError: the place does not answer, or has too many folders.
    """
    if "://" not in url and not Path(url).is_dir():
        raise UsageError(f"{url}: no such folder")
    place, count = RemoteFolder.of(url), itertools.count(1)

    def look(here: RemoteFolder, depth: int) -> Iterator[ListedCache]:
        shown = here.url
        _check_count(place, next(count))
        try:
            card, complete = here.read(CARD, LARGEST_RECORD), here.read(COMPLETE, LARGEST_RECORD)
            if complete is not None:
                record = parse_completion(complete, f"{shown}/{COMPLETE}")
                yield ListedCache(here, record.card, record.fingerprint, record.bytes, None)
                return
            if card is not None:
                parsed = parse_card(card, f"{shown}/{CARD}")
                yield ListedCache(here, parsed, parsed.identity, None, None)
                return
            folders = here.entries()[0] if depth else []
        except SpkdError as error:
            if depth == DEPTH:
                raise
            yield ListedCache(here, None, "", None, str(error))
            return
        for folder in folders:
            yield from look(folder, depth - 1)

    yield from look(replace(place, url=place.shown), DEPTH)


def _check_count(place: RemoteFolder, count: int) -> None:
    """Check the number of folders that were looked at. Raises SpkdError where another machine has too many."""
    if not place.is_local and count > MOST_FOLDERS:
        raise SpkdError(f"{place.url}: more than {MOST_FOLDERS:,} folders; name one of them")


def folders_with(url: str, names: Collection[str]) -> Iterator[tuple[RemoteFolder, set[str]]]:
    """Every folder below a folder or bucket that holds some of the named files. Caches are not searched.

    Yields:
        The folder, and the names of those files that it holds.
    Raises:
        SpkdError: the place does not answer, or has too many folders. A folder within it that cannot be read is noted.
    """
    place, count = RemoteFolder.of(url), itertools.count(1)

    def look(here: RemoteFolder, depth: int) -> Iterator[tuple[RemoteFolder, set[str]]]:
        _check_count(place, next(count))
        try:
            folders, files = here.entries()
        except SpkdError as error:
            if depth == DEPTH:
                raise
            log(f"note: {error}")
            return
        if files & {CARD, COMPLETE}:
            return
        if files & set(names):
            yield here, files & set(names)
        for folder in folders if depth else ():
            yield from look(folder, depth - 1)

    yield from look(place, DEPTH)
