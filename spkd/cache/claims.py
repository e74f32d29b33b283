"""Claims of workers on units and on the growth of a cache, by which any number of workers on any machines fill it.

A claim on a unit is a file that names its owner, who keeps it alive (see owner.py). Card, plan and completion record
are changed by one process at a time, which locks the claim on the growth.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from spkd.cache.folder import CARD, FOLDERS, claim_path, commit_path, growth_path, withdrawn_path
from spkd.cache.lock import exclusive, made_exclusive
from spkd.cache.owner import in_words, is_gone, is_owned, owner_of, this_process
from spkd.files.atomic import check_no_links, create_json, rename, without_links
from spkd.progress import log


def claim_units(root: Path, units: int) -> Iterator[int]:
    """Units that are not committed. Each is claimed for this process before it is yielded, until `release`."""
    for unit in range(units):
        if claim(root, unit):
            yield unit


def claim(root: Path, unit: int) -> bool:
    """Claim a unit for this process, until `release`. Returns whether this process is to fill the unit."""
    if commit_path(root, unit).is_file() or not _claim(claim_path(root, unit)):
        return False
    if commit_path(root, unit).is_file():
        release(root, unit)
        return False
    return True


def reopen(root: Path, unit: int, is_due: Callable[[int], bool]) -> bool:
    """Withdraw the commit record of a unit, so that the unit is filled again. The caller holds `changing`.

    The record is kept aside until then, so that what the unit had is known, and can be put back.

    Args:
        is_due: function of the unit, asked while no other process can fill it, whether it is to be filled again.
    Returns:
        Whether the record was withdrawn by this call.
    """
    if not _claim(claim_path(root, unit)):
        return False
    try:
        if due := is_due(unit):
            with contextlib.suppress(FileNotFoundError):
                rename(commit_path(root, unit), withdrawn_path(root, unit))
        return due
    finally:
        release(root, unit)


def put_back(root: Path) -> None:
    """Put the commit records back that were withdrawn for units which were not filled again, since a kill ended it.

    Units that a living process fills are left to it.
    """
    for path in sorted((root / "commits").glob("*.withdrawn")):
        if path.stem.isdecimal() and claim(root, unit := int(path.stem)):
            try:
                put_back_of(root, unit)
            finally:
                release(root, unit)


def put_back_of(root: Path, unit: int) -> None:
    """Put the withdrawn commit record of a unit back, if there is one. The caller holds the claim on the unit."""
    if withdrawn_path(root, unit).is_file():
        rename(withdrawn_path(root, unit), commit_path(root, unit))


def is_filled(root: Path) -> bool:
    """Whether a living process fills a unit of a cache."""
    return any(path.name.isdecimal() and not is_gone(path) for path in (root / "claims").iterdir())


def release(root: Path, unit: int) -> None:
    """Remove a claim, if this process holds it."""
    if is_owned(claim_path(root, unit)):
        claim_path(root, unit).unlink(missing_ok=True)


def _claim(path: Path) -> bool:
    for _ in range(2):
        if create_json(path, this_process()):
            return True
        if not remove_gone(path):
            return False
    return False


def remove_gone(path: Path) -> bool:
    """Remove a claim whose owner is gone. Returns whether it can be claimed now."""
    if not is_gone(path):
        return False
    try:
        with exclusive(path, wait=False) as locked:
            # Where it is not locked, its owner is committing, or another worker is removing the claim. Under the lock,
            # the claim may be a new one that another worker has made meanwhile.
            if not locked or not is_gone(path):
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    except PermissionError:  # of another user; it cannot be locked
        return False
    return True


@contextlib.contextmanager
def committing(root: Path, unit: int) -> Iterator[bool]:
    """Hold the claim while its unit is committed, so that nobody takes it over in between.

    Yields:
        Whether this process still holds it. A process that was stopped for long may have lost it, and must write
        nothing.
    """
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(exclusive(claim_path(root, unit)))
            is_held = is_owned(claim_path(root, unit))
        except FileNotFoundError:
            is_held = False
        yield is_held


@contextlib.contextmanager
def changing(*roots: Path, wait: bool = True) -> Iterator[bool]:
    """Hold caches alone while card, plan or completion record change. Another process that holds one is waited for.

    Args:
        roots: folders of the caches; they are made if they do not exist.
    Yields:
        Whether all are held; always, where `wait` is asked for.
    Raises:
        SpkdError: a folder within one is a symbolic link.
    """
    with contextlib.ExitStack() as held:
        ordered = sorted(roots, key=os.path.realpath)  # in one order, so that no two processes wait for each other
        yield all(held.enter_context(_changing(root, wait)) for root in ordered)


@contextlib.contextmanager
def _changing(root: Path, wait: bool) -> Iterator[bool]:
    path = growth_path(root)
    check_no_links(root, FOLDERS)

    def on_wait(owner: str) -> None:
        log(f"{root}: waiting for {owner}, which is changing it")

    with made_exclusive(path, wait, on_wait) as held:
        before = _version(root)
        try:
            yield held
        finally:
            if held and _version(root) not in (before, None):
                # It is still the same file, which is locked. On a full disk, the error of the block is the one to read.
                with contextlib.suppress(OSError), open(path, "w", opener=without_links) as file:
                    file.write(json.dumps(this_process()))


def _version(root: Path) -> tuple[int, int] | None:
    """Identity of the card's file; None where there is none, or no longer."""
    try:
        status = (root / CARD).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def last_change(root: Path) -> str:
    """Phrase that names the process that made the cache or let it grow last; "" where it is not known."""
    owner = owner_of(growth_path(root))
    return f", made or extended last by {in_words(owner)}" if owner else ""
