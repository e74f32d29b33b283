"""Folders in other places: fsspec URLs (s3://, file://, memory:// ..., http:// to read)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.files.atomic import PART, worker_id
from spkd.progress import Ticker, track

Result = TypeVar("Result")

PARALLEL = 8
TRIES = 3
BLOCK = 1 << 22  # bytes
SILENCE = 60.0  # s without a byte after which a server is given up; one that is slow but steady never is
LARGEST_RECORD = 1 << 28  # bytes of a completion record or an index


@dataclass(frozen=True)
class RemoteFolder:
    """A folder somewhere.

    Attributes:
        url: as the user wrote it.
        files: the file system.
        path: within it.
    """

    url: str
    files: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, url: str) -> RemoteFolder:
        """Raises UsageError where the package for this kind of place is not installed."""
        try:
            files, path = fsspec.core.url_to_fs(url, **_options(url))
        except (ImportError, ValueError) as error:
            raise UsageError(f'{url}: {error}; pip install "spkd[remote]" brings s3:// and http://') from error
        return cls(url, files, path.rstrip("/"))

    @property
    def shown(self) -> str:
        """The whole address, for people."""
        return self.path if self.is_local else self.files.unstrip_protocol(self.path)

    @property
    def is_http(self) -> bool:
        return "http" in self._protocols()

    @property
    def is_local(self) -> bool:
        return "file" in self._protocols()

    @property
    def is_object_store(self) -> bool:
        return bool({"s3", "gs", "az"} & set(self._protocols()))

    def _protocols(self) -> tuple[str, ...]:
        protocol = self.files.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str, limit: int) -> bytes | None:
        """A file of at most `limit` bytes; None where there is none.

        Raises:
            SpkdError: the place does not answer, or the file is larger.
        """

        def once() -> bytes | None:
            try:
                return b"".join(self.blocks(name, limit))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

        return patiently(once, f"{self.url}/{name}")

    def blocks(self, name: str, limit: int) -> Iterator[bytes]:
        """A file in blocks. Raises SpkdError once it turns out larger than `limit` bytes."""
        total = 0
        if self.is_local and Path(self.at(name)).exists() and not Path(self.at(name)).is_file():
            raise SpkdError(f"{self.url}/{name}: not a regular file")
        options = {"block_size": 0} if self.is_http else {"cache_type": "none"}
        with self.files.open(self.at(name), "rb", **options) as file:
            while block := file.read(min(BLOCK, limit + 1 - total)):
                total += len(block)
                if total > limit:
                    raise SpkdError(f"{self.url}/{name}: larger than the {limit:,} bytes that it may have")
                yield block

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(self.files.info(self.at(name))["size"])
        except FileNotFoundError:
            return None

    def entries(self) -> tuple[list[RemoteFolder], set[str]]:
        """The folders in it, in order, and the names of its files.

        Raises:
            SpkdError: the place does not answer.
        """
        folders, files, own = [], set(), self.path.rstrip("/")
        found = patiently(lambda: self.files.ls(self.path, detail=True), self.url)
        for entry in sorted(found, key=lambda entry: entry["name"]):
            path = entry["name"].rstrip("/")
            if entry["type"] != "directory":
                files.add(path.rsplit("/", 1)[-1])
            elif path != own and len(path) > len(own):
                shown = path if self.is_local else self.files.unstrip_protocol(path)
                folders.append(RemoteFolder(shown, self.files, path))
        return folders, files


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    with contextlib.suppress(ImportError):
        from aiohttp import ClientTimeout

        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}
    return {}


def patiently(call: Callable[[], Result], what: str) -> Result:
    """Call, and again after a pause where the network failed. Raises SpkdError, naming `what`, in the end."""
    for attempt in range(TRIES):
        try:
            return call()
        except SpkdError:
            raise
        except Exception as error:  # every file system has errors of its own
            if isinstance(error, FileNotFoundError | PermissionError) or attempt == TRIES - 1:
                text = " ".join(str(error).split()) or type(error).__name__
                raise SpkdError(f"{what}: {text[:200]}") from error
            time.sleep(0.5 * 4**attempt)
    raise AssertionError("unreachable")


def send(root: Path, url: str, names: Sequence[str], expected: Callable[[str], str], last: str) -> None:
    """Copy files of a folder to a place, those that are not there already, and read back every one.

    Args:
        expected: the SHA-256 of a file here, once it was found to be what it ought to be.
        last: the file that makes the copy whole, sent after the others.
    Raises:
        UsageError: a place that cannot be written. SpkdError: a file here that is not what it ought to be.
    """
    place = RemoteFolder.of(url)
    if place.is_http:
        raise UsageError(f"{url}: http can be pulled from, not pushed to")

    def arrived(name: str, size: int, check: str) -> bool:
        try:
            return place.size(name) == size and digest.of_blocks(place.blocks(name, size)) == check
        except SpkdError:
            return False

    def one(name: str, check: str) -> None:
        size = (root / name).stat().st_size
        if arrived(name, size, check):
            return
        if not place.is_object_store:  # there, making a folder would make a bucket that does not exist
            place.files.makedirs(place.at(name).rsplit("/", 1)[0], exist_ok=True)
        part = f"{name}.{worker_id()}{PART}" if place.is_local else name  # objects appear whole
        place.files.put_file(str(root / name), place.at(part))
        if not arrived(part, size, check):
            raise OSError("arrived damaged")
        if part != name:
            place.files.mv(place.at(part), place.at(name))

    def job(name: str) -> Callable[[], int]:
        def run() -> int:
            check = expected(name)
            patiently(lambda: one(name, check), f"{url}/{name}")
            return (root / name).stat().st_size

        return run

    total = sum((root / name).stat().st_size for name in names if (root / name).is_file())
    with track(f"pushing to {url}", total >> 20, "MiB") as bar:
        in_parallel([job(name) for name in names], bar)
    patiently(lambda: one(last, digest.of_file(root / last)), f"{url}/{last}")


def checked_digest(path: Path, expected: str) -> str:
    """`expected`, if it is the file's SHA-256. Raises SpkdError otherwise."""
    if digest.of_file(path) != expected:
        raise SpkdError(f"{path}: damaged (its digest is another)")
    return expected


def in_parallel(jobs: Iterable[Callable[[], int]], bar: Ticker) -> None:
    """Run jobs side by side, the bar advancing by the bytes they return; the first failure ends all."""
    pool, total, shown = ThreadPoolExecutor(PARALLEL), 0, 0
    try:
        for job in as_completed([pool.submit(job) for job in jobs]):
            total += job.result()
            bar.advance((total >> 20) - shown)
            shown = total >> 20
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
