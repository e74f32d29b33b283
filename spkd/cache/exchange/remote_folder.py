"""Remote folders, as URLs of fsspec: s3://, file://, memory:// and others; http:// for reading."""

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
SILENCE = 60.0  # s without a byte after which a transfer fails; a slow transfer may take any time
LARGEST_RECORD = 1 << 28  # bytes of a completion record or an index


@dataclass(frozen=True)
class RemoteFolder:
    """A folder on this machine or elsewhere.

    Attributes:
        url: its URL as the user wrote it.
        files: the file system.
        path: its path within the file system.
    """

    url: str
    files: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, url: str) -> RemoteFolder:
        """The folder of a URL.

        Raises:
            UsageError: the package for this kind of URL is not installed.
        """
        try:
            files, path = fsspec.core.url_to_fs(url, **_options(url))
        except (ImportError, ValueError) as error:
            raise UsageError(f'{url}: {error}; pip install "spkd[remote]" brings s3:// and http://') from error
        return cls(url, files, path.rstrip("/"))

    @property
    def shown(self) -> str:
        """The whole URL, or the path of a local folder, for people."""
        return self.path if self.is_local else self.files.unstrip_protocol(self.path)

    @property
    def is_http(self) -> bool:
        """Whether it is read by http, which cannot write."""
        return "http" in self._protocols()

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return "file" in self._protocols()

    @property
    def is_object_store(self) -> bool:
        """Whether it is in an object store, which has no real folders."""
        return bool({"s3", "gs", "az"} & set(self._protocols()))

    def _protocols(self) -> tuple[str, ...]:
        protocol = self.files.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def at(self, name: str) -> str:
        """Path of a file within the file system."""
        return f"{self.path}/{name}"

    def read(self, name: str, limit: int) -> bytes | None:
        """Read a file.

        Args:
            name: path within the folder.
            limit: most bytes that the file may have.
        Returns:
            Its content; None where there is no such file.
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
        """Read a file in blocks.

        Args:
            name: path within the folder.
            limit: most bytes that the file may have.
        Raises:
            SpkdError: the file is larger, or not a regular file.
        """
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
        """Size of a file in bytes; None where there is no such file."""
        try:
            return int(self.files.info(self.at(name))["size"])
        except FileNotFoundError:
            return None

    def entries(self) -> tuple[list[RemoteFolder], set[str]]:
        """Folders within the folder, sorted, and the names of its files.

        Raises:
            SpkdError: the place does not answer.
        """
        folders, files, folder = [], set(), self.path.rstrip("/")
        listed = patiently(lambda: self.files.ls(self.path, detail=True), self.url)
        for entry in sorted(listed, key=lambda entry: entry["name"]):
            path = entry["name"].rstrip("/")
            if entry["type"] != "directory":
                files.add(path.rsplit("/", 1)[-1])
            elif path != folder and len(path) > len(folder):
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
    """Call a function, and call it again after a pause where the network failed.

    Args:
        call: the function.
        what: URL of the file that it reads or writes, for errors.
    Raises:
        SpkdError: the last attempt failed too.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except SpkdError:
            raise
        except Exception as error:  # each file system raises its own kinds of errors
            if isinstance(error, FileNotFoundError | PermissionError) or attempt == TRIES - 1:
                text = " ".join(str(error).split()) or type(error).__name__
                raise SpkdError(f"{what}: {text[:200]}") from error
            time.sleep(0.5 * 4**attempt)
    raise AssertionError("unreachable")


def send(root: Path, url: str, names: Sequence[str], expected: Callable[[str], str], last: str) -> None:
    """Copy files of a folder to a place, unless they are there already, and read every one back.

    Args:
        root: the local folder.
        url: folder or URL of the copy.
        names: paths of the files within the folder.
        expected: function that checks a local file and returns its SHA-256.
        last: path of the file that completes the copy, sent after the others.
    Raises:
        UsageError: the place cannot be written.
        SpkdError: a local file is damaged, or the place does not answer.
    """
    place = RemoteFolder.of(url)
    if place.is_http:
        raise UsageError(f"{url}: http can be pulled from, not pushed to")

    def arrived(name: str, size: int, check: str) -> bool:
        try:
            return place.size(name) == size and digest.of_blocks(place.blocks(name, size)) == check
        except SpkdError:
            return False

    def send_file(name: str, check: str) -> None:
        size = (root / name).stat().st_size
        if arrived(name, size, check):
            return
        if not place.is_object_store:  # in an object store, this could make a new bucket
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
            patiently(lambda: send_file(name, check), f"{url}/{name}")
            return (root / name).stat().st_size

        return run

    total = sum((root / name).stat().st_size for name in names if (root / name).is_file())
    with track(f"pushing to {url}", total >> 20, "MiB") as bar:
        in_parallel([job(name) for name in names], bar)
    patiently(lambda: send_file(last, digest.of_file(root / last)), f"{url}/{last}")


def checked_digest(path: Path, expected: str) -> str:
    """Check the SHA-256 of a file.

    Returns:
        The digest.
    Raises:
        SpkdError: the file has another digest than `expected`.
    """
    if digest.of_file(path) != expected:
        raise SpkdError(f"{path}: damaged (its digest is another)")
    return expected


def in_parallel(jobs: Iterable[Callable[[], int]], bar: Ticker) -> None:
    """Run jobs on several threads. The first failure ends all.

    Args:
        jobs: functions that return the number of bytes done.
        bar: progress bar, which advances by these bytes (MiB).
    """
    pool, total, shown = ThreadPoolExecutor(PARALLEL), 0, 0
    try:
        for job in as_completed([pool.submit(job) for job in jobs]):
            total += job.result()
            bar.advance((total >> 20) - shown)
            shown = total >> 20
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
