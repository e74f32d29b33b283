"""Atomic and durable writing of files and folders.

Everything that spkd writes appears whole, and what was written stays after a power cut: a file is written under a
temporary name, synced and renamed, and its folder is synced. The temporary file is locked while its process lives, so
that files left by killed processes can be distinguished from those being written. Some file systems keep locks to one
machine, so that the name of a temporary file tells its machine, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, BinaryIO

from spkd.errors import SpkdError, UsageError, public_address
from spkd.files.reading import is_irregular
from spkd.progress import track

PART = ".part"  # suffix of files that are being written
ELSEWHERE = 86_400.0  # s without a change after which what another machine was writing is taken for abandoned
UNUSED = 90 * 86_400.0  # s without use after which a file of the user's cache folder is removed
PROBE = "probe"  # name of files that show whether a folder can be written
# File of a folder that a command wrote -> what the folder holds.
HOLDS = {
    "card.json": "a teacher cache",
    "COMPLETE.json": "a teacher cache",
    "model.json": "a student",
    "run.json": "a student",
    "report.json": "an evaluation",
    "comparison.json": "a comparison",
    "map.json": "a map",
}
_UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EACCES, errno.EXDEV)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # as typed, or as a path has it, whose slashes are one
_PART_NAME = re.compile(rf"(.+)\.([0-9a-f]{{6}})[0-9a-f]{{10}}{re.escape(PART)}", re.DOTALL)


@cache
def machine_id() -> str:
    """Name of this machine since it was started, which all its containers share: six hexadecimal digits."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        name = socket.gethostname().encode()
    return hashlib.sha256(name).hexdigest()[:6]


class _Identity:
    """Random name of this process, since host names and process numbers repeat among containers."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Draw a new name, for a forked process."""
        self.name = secrets.token_hex(8)


_identity = _Identity()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_identity.renew)


def worker_id() -> str:
    """The name of this process in claims and commit records."""
    return _identity.name


def part_path(path: Path) -> Path:
    """New path next to `path` for a file that is being written, under which nobody can have put a link before."""
    return path.with_name(f"{path.name}.{machine_id()}{secrets.token_hex(5)}{PART}")


def check_is_path(path: str | Path) -> None:
    """Check that an output has no address. Raises UsageError: it has one, which would become folders here."""
    if ADDRESS.match(str(path)):
        raise UsageError(f"{public_address(str(path))}: an address; write to a folder of this machine")


def make_folder(folder: Path) -> None:
    """Make a folder durably, with those above it, unless it exists. Raises UsageError: it is an address."""
    if folder.is_dir():
        return
    check_is_path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable, where the file system supports it."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PartFile:
    """File that is being written under a temporary name, locked as long as this process writes it.

    A file in the place of another gets its permissions, and its owner and group where this process may give them.

    Args:
        path: path of the finished file. Its folder is made if it does not exist.
        mode: permissions of a file where there was none; None: those of any new file.
    """

    def __init__(self, path: Path, mode: int | None = None) -> None:
        make_folder(path.parent)
        self.path, self._temporary = path, part_path(path)
        self.file: BinaryIO = open(self._temporary, "x+b")
        while not _hold(self.file.fileno(), self._temporary):
            self.file.close()
            self.file = open(self._temporary, "x+b")
        _permit(self.file.fileno(), path, mode)

    def sync(self) -> None:
        """Make the content durable, still under the temporary name. Raises OSError, which names the finished file."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def publish(self) -> None:
        """Give the file its name, durably. Another file of that name is replaced.

        Raises:
            OSError: the file cannot be written, or a folder has its name; the error names it.
        """
        self.sync()
        try:
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.file.close()
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Remove the file, unless it was published."""
        with contextlib.suppress(OSError):  # what is buffered may not fit on the disk
            self.file.close()
        self._temporary.unlink(missing_ok=True)


def _permit(descriptor: int, path: Path, mode: int | None) -> None:
    """Give a new file the owner, group and permissions of the one that it will replace; `mode` where there is none."""
    with contextlib.suppress(OSError):  # a file system without permissions
        if path.is_file():
            earlier = path.stat()
            with contextlib.suppress(PermissionError):  # another's file
                os.fchown(descriptor, earlier.st_uid, earlier.st_gid)
            mode = stat.S_IMODE(earlier.st_mode)
        if mode is not None:
            os.fchmod(descriptor, mode)


def _hold(descriptor: int, temporary: Path) -> bool:
    """Lock a file or folder that is being written.

    Returns:
        Whether it is still there: another process may have taken it for abandoned before it was locked.
    """
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(temporary))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def writing(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """File that appears durably, whole, where the block ends without an error, and not at all otherwise.

    Args:
        path: path of the file. Its folder is made if it does not exist.
        mode: as of `PartFile`.
    Yields:
        The open file. Libraries that open files themselves write to its `name`.
    Raises:
        OSError: the file cannot be written, for example since the disk is full; the error names it.
    """
    part = PartFile(path, mode)
    try:
        yield part.file
        part.publish()
    except OSError as error:
        if error.errno is None or str(error.filename or part.file.name) != part.file.name:  # of another file
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.abandon()


@contextlib.contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Folder that appears durably, whole, where the block ends without an error, and not at all otherwise.

    What kills left of it is removed.

    Args:
        path: path of the folder, which does not exist or is empty.
    Yields:
        Path of the folder under its temporary name.
    Raises:
        FileExistsError: the folder was made by another process meanwhile.
    """
    remove_abandoned(path.parent, [path.name])
    temporary = part_path(path)
    make_folder(path.parent)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    while not _hold(descriptor, temporary):
        os.close(descriptor)
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            sync_folder(Path(folder))
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        sync_folder(path.parent)
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(path: Path, name: str) -> Path:
    """Give a folder that is to be removed a temporary name, durably, by which what a kill leaves of it is known.

    Args:
        name: name beside it for which `remove_abandoned` finds it.
    Returns:
        Its new path.
    """
    aside = part_path(path.with_name(name))
    os.rename(path, aside)
    sync_folder(path.parent)
    return aside


def remove_abandoned(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove files and folders that processes were writing when they were killed.

    Those of another machine, whose locks may not be seen here, are removed when they have not changed for a day.

    Args:
        folder: folder that is searched; folders within it are not.
        names: names of the files and folders that were being written; None: any.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _PART_NAME.fullmatch(entry.name)
            if match is None or (names is not None and match[1] not in names) or entry.is_symlink():
                continue
            with contextlib.suppress(OSError), _opened_alone(entry.path):
                if match[2] != machine_id() and _silence(Path(entry.path)) < ELSEWHERE:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _silence(part: Path) -> float:
    """Time since the last change of a file, or of anything in a folder (s), by the clock of its file system."""
    changed = max(path.lstat().st_mtime for path in (part, *part.rglob("*")))
    probe = part_path(part.with_name(PROBE))
    with open(probe, "xb") as file:
        probe.unlink()
        return os.fstat(file.fileno()).st_mtime - changed


@contextlib.contextmanager
def _opened_alone(path: str) -> Iterator[None]:
    """Lock of a file or folder against the process that writes it. Raises OSError where it is held, or impossible."""
    # A lock on a file needs it open for writing on network file systems; folders cannot be opened so.
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def without_links(path: str, flags: int) -> int:
    """Opener of a file that follows no symbolic link, and does not wait where the path names a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def without_waiting(path: str, flags: int) -> int:
    """Opener of a file that does not wait where the path names a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def appending(path: Path) -> IO[str]:
    """Open a file to add lines to it, or to lock it. A symbolic link is not followed, and a pipe not waited for.

    Raises:
        SpkdError: a symbolic link, or not a regular file.
    """
    if is_irregular(path):
        raise SpkdError(f"{path}: not a regular file")
    try:
        return open(path, "a", opener=without_links)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SpkdError(f"{path}: a symbolic link, which is not written through; remove it") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably. Its folder is made if it does not exist."""
    with writing(path) as file:
        file.write(data)


def write_json(path: Path, tree: Any, mode: int | None = None) -> None:
    """Write a JSON file atomically and durably. Its folder is made if it does not exist; `mode` as of `PartFile`."""
    with writing(path, mode) as file:
        file.write(_json(tree))


def rename(path: Path, name: Path) -> None:
    """Give a file another name in its folder, durably. Another file of that name is replaced.

    Raises:
        FileNotFoundError: there is no such file.
    """
    os.replace(path, name)
    sync_folder(name.parent)


def remove(path: Path) -> None:
    """Remove a file durably, if it is there."""
    if path.is_symlink() or path.exists():
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_copy(source: Path, path: Path) -> None:
    """Copy a file atomically and durably: by a hard link where the file system allows it, else byte by byte.

    Where `source` is a symbolic link, the file to which it leads is copied.

    Raises:
        FileNotFoundError: there is no `source`.
    """
    make_folder(path.parent)
    temporary = part_path(path)
    try:
        _sync(source)  # it may be a copy that was made a moment ago
        os.link(os.path.realpath(source), temporary)  # a link to a symbolic link is one too
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        with writing(path) as file, open(source, "rb") as content:
            shutil.copyfileobj(content, file, 1 << 22)
    finally:
        temporary.unlink(missing_ok=True)  # still there where both names were links to one file


def create_json(path: Path, tree: Any) -> bool:
    """Write a JSON file unless it exists; of several processes exactly one succeeds. Its folder is made if need be.

    It is for claims and locks: atomic, but not durable, as after a power cut nobody holds any. Folders that it makes
    are durable, since who finds them later takes them for such.

    Returns:
        Whether this process wrote it.
    """
    make_folder(path.parent)
    temporary = part_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(_json(tree))
        os.link(temporary, path)
    except FileExistsError:
        return False
    except FileNotFoundError:  # another process took the temporary file for one that a kill left
        return create_json(path, tree)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return _create_without_links(path, _json(tree))
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_without_links(path: Path, data: bytes) -> bool:
    """`create_json` on file systems without hard links. A kill may leave the file incomplete."""
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def find_files(root: Path, suffixes: Collection[str]) -> tuple[list[Path], list[Path]]:
    """Every regular file below a folder with one of the suffixes, sorted.

    Symbolic links are followed, but each real folder and file is listed only once, so that circular links end. Of hard
    links, every name is listed.

    Args:
        suffixes: suffixes in lower case, each with its dot.
    Returns:
        The files, and the symbolic links to files and folders that are listed under another name.
    """
    # Real folders are searched before linked ones, so that a file is listed under its name without links.
    real, linked = deque([root]), deque[Path]()
    files, repeated, seen = dict[str, Path](), list[Path](), set[str]()
    with track("searching", 1, "folders") as bar:
        while real or linked:
            folder = real.popleft() if real else linked.popleft()
            bar.total = bar.done + len(real) + len(linked) + 1
            bar.advance(1)
            try:
                place = os.path.realpath(folder)
                entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
            except OSError:
                continue
            if place in seen:
                repeated.append(folder)
                continue
            seen.add(place)
            for entry in entries:
                path = Path(entry.path)
                try:
                    if entry.is_dir():
                        (linked if entry.is_symlink() else real).append(path)
                    elif entry.is_file() and path.suffix.lower() in suffixes:
                        where = os.path.realpath(path) if entry.is_symlink() else os.path.join(place, entry.name)
                        repeated += [path] * (files.setdefault(where, path) != path)
                except OSError:  # a broken link, or a folder without permission
                    continue
    return sorted(files.values()), sorted(repeated)


def writable_folder(folder: str | Path) -> Path:
    """Make a folder, and check that it can be written, before a long computation. What kills left there is removed.

    Raises:
        UsageError: it is an address.
        SpkdError: it cannot be made or written.
    """
    path = Path(folder)
    try:
        make_folder(path)
        probe = part_path(path / PROBE)
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise SpkdError(f"{folder}: cannot be written ({error.strerror})") from error
    remove_abandoned(path)
    return path


def users_files(kind: str, name: str) -> list[Path]:
    """Path of a file that is kept in the user's cache folder; none where the user has no home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a container's user, without HOME and without a name
        return []
    return [base / "spkd" / kind / name]


def remove_unused(folder: Path) -> None:
    """Remove files of a folder of `users_files` that were neither read nor written for UNUSED seconds.

    They follow from other files, and are made again where they are needed.
    """
    before = time.time() - UNUSED
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and max(status.st_atime, status.st_mtime) < before:
                os.unlink(entry)


def check_no_links(root: Path, folders: Iterable[str | Path]) -> None:
    """Check that folders within an output folder are no symbolic links, by which files elsewhere would be replaced.

    Args:
        root: the output folder, which may be a link itself.
        folders: paths within it, which need not exist.
    Raises:
        SpkdError: one of them, or a folder above it within the output folder, is a symbolic link.
    """
    for folder in map(Path, folders):
        for part in (folder, *folder.parents):
            if part.name and (root / part).is_symlink():
                raise SpkdError(f"{root / part}: a symbolic link, which is not written through; remove it")


def check_holds_no_other(folder: str | Path, what: str) -> None:
    """Check that a folder for output does not hold what another command wrote: their files would be mixed.

    Args:
        what: what it may hold, as `HOLDS` names it.
    Raises:
        UsageError: it holds something else.
    """
    for name, held in HOLDS.items():
        if held != what and (Path(folder) / name).is_file():
            raise UsageError(f"{folder}: holds {held} ({name}); choose another folder for {what}")


def check_replaces_none(folder: str | Path, names: Iterable[str], records: Mapping[str, str]) -> None:
    """Check that a command replaces no files of others in its folder for output.

    Args:
        names: names of the files that it writes.
        records: name of each file by which it knows a folder of its own, which it writes before the others -> key that
            is near the beginning of such a file.
    Raises:
        UsageError: one of the files is there, and none of the records.
    """
    for name, key in records.items():
        with contextlib.suppress(OSError), open(Path(folder) / name, "rb", opener=without_waiting) as file:
            if f'"{key}"'.encode() in file.read(4096):
                return
    for path in (Path(folder) / name for name in names):
        if os.path.lexists(path):
            reason = f"no {' or '.join(records)} of spkd is beside it"
            raise UsageError(f"{path}: would be replaced ({reason}); choose another folder, or remove it")


def check_is_own(path: Path, mark: bytes, other: str) -> None:
    """Check that a command replaces no file of others under a name that nobody gave.

    Args:
        path: file that it writes.
        mark: bytes that are in each such file.
        other: how another name is given.
    Raises:
        UsageError: there is a file without them.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        end = b""
        while block := file.read(1 << 20):
            if mark in (end := end + block):
                return
            end = end[-len(mark) :]
    raise UsageError(f"{path}: would be replaced (spkd did not write it); choose {other}, or remove it")


def check_not_among(out: Iterable[str | Path], inputs: Iterable[str | Path | None]) -> None:
    """Check that a command replaces none of its own inputs.

    Args:
        out: files that it writes.
        inputs: files that it reads, which may be missing, or no names of files.
    Raises:
        UsageError: a file is both.
    """
    read = [path for path in inputs if path is not None and os.path.exists(path)]
    for path in out:
        if os.path.exists(path) and (same := next((one for one in read if os.path.samefile(one, path)), None)):
            raise UsageError(f"{path}: would replace {same}, which is read; choose another name")


def check_writable(path: str | Path) -> None:
    """Check that a file can be written, before a long computation. Neither the file nor its folder is made.

    What kills left of the file is removed.

    Raises:
        UsageError: it is an address.
        SpkdError: it is a folder, a device or another thing that is no regular file, its name is too long to be written
            under a temporary one, or its folder cannot be made or written.
    """
    check_is_path(path)
    target = Path(path)
    if os.path.lexists(target) and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise SpkdError(f"{path}: cannot be written (it is {kind})")
    folder = next(parent for parent in target.absolute().parents if parent.exists() or parent.is_symlink())
    try:
        for name in target.absolute().parent.relative_to(folder).parts:  # folders that would be made
            with contextlib.suppress(FileNotFoundError):
                (folder / name).lstat()
        probe = part_path(folder / target.name)
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise SpkdError(f"{path}: cannot be written ({error.strerror})") from error
    for place in {folder, target.absolute().parent}:
        remove_abandoned(place, [target.name])
