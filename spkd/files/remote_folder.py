"""Remote folders, as URLs of fsspec: s3://, file:// and others; http:// for reading."""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urljoin

import fsspec

from spkd.errors import FULL, SpkdError, UsageError, check_address, first_line, public_address, without_secrets
from spkd.files import digest
from spkd.files.atomic import ADDRESS, check_no_links, remove_abandoned, writing
from spkd.files.reading import is_irregular
from spkd.files.text import counted
from spkd.progress import Ticker, track

Result = TypeVar("Result")

HTTP = ("http://", "https://")
PARALLEL = 8
TRIES = 4
WAIT = 0.5  # s before the second try; each further wait is four times as long
BUSY = (429, 500, 502, 503, 504)  # answers of a web server that will be another one later
BLOCK = 1 << 22  # bytes
SILENCE = 60.0  # s without a byte, or for the head of an answer, after which a transfer fails
SLOWEST = 1000.0  # bytes per s that another machine must give beyond that; a slow transfer may take any time
LARGEST_RECORD = 1 << 28  # bytes of a completion record or an index
MOST_ENTRIES = 100_000  # of a folder in a bucket
LARGEST_PAGE = 1 << 22  # bytes of the page with which a web server lists a folder
LINK = re.compile(r"""href=["']([^"'<>]+)["']""", re.IGNORECASE)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder on this machine or elsewhere.

    Attributes:
        url: its URL as the user wrote it, without credentials; for messages and files.
        path: its path within the file system.
        query: what follows the path of every file on a web server, such as `?token=...`.
    """

    url: str
    files: fsspec.AbstractFileSystem
    path: str
    query: str = ""

    @classmethod
    def of(cls, url: str) -> RemoteFolder:
        """The folder of a URL. What is no URL is the path of a folder here, whatever its name holds.

        Raises:
            UsageError: the package for this kind of URL is not installed, there is no such kind, or as `check_address`.
            SpkdError: the place does not answer.
        """
        if "://" not in url:
            if ADDRESS.match(url):
                raise UsageError(f"{public_address(url)}: an address is written with ://")
            return cls(public_address(url), fsspec.filesystem("file"), os.path.abspath(url).rstrip("/"))
        check_address(url)
        kinds = url.partition("://")[0].split("::")
        # In a chain, fsspec takes an unknown kind for a path; and what is in memory is gone with this process.
        if unknown := [kind for kind in kinds if kind == "memory" or kind not in fsspec.available_protocols()]:
            raise UsageError(f"{public_address(url)}: {unknown[0]}:// is no place for files")
        # A name of a file is put before a query. On other places than web servers, a name may hold a question mark.
        address, mark, query = url.partition("?") if url.startswith(HTTP) else (url, "", "")
        try:
            files, path = fsspec.core.url_to_fs(address, **_options(url))
        except (ImportError, ValueError) as error:
            raise UsageError(
                f'{public_address(url)}: {error}; pip install "spkd[remote]" brings s3:// and http://'
            ) from error
        except Exception as error:  # some kinds ask their server at once, and each raises its own kinds of errors
            raise SpkdError(f"{public_address(url)}: {first_line(error)}") from error
        return cls(public_address(url), files, path.rstrip("/"), mark + query)

    @property
    def shown(self) -> str:
        """The whole URL without credentials, or the path of a local folder, for people."""
        return self.path if self.is_local else public_address(self.files.unstrip_protocol(self.path))

    @property
    def is_http(self) -> bool:
        """Whether it is read by http, which cannot write."""
        return "http" in self._protocols()

    @property
    def kind(self) -> str:
        """Protocol by which it is read: `http`, also of https://, `s3`, or another name of fsspec."""
        return next((kind for kind in ("http", "s3") if kind in self._protocols()), self._protocols()[0])

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
        return f"{self.path}/{name}{self.query}"

    def read(self, name: str, limit: int) -> bytes | None:
        """Read a file.

        Args:
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
            limit: most bytes that the file may have.
        Raises:
            SpkdError: the file is larger, not a regular file, or comes so slowly that it may never end.
        """
        total, waited = 0, 0.0
        where = f"{self.url}/{name}"
        with self._opened(name) as file:
            # A web server gives what has come; of other places, a call ends when the whole block is there.
            size = None if self.is_http else getattr(file, "size", None)
            while True:
                since = time.monotonic()
                wanted = min(BLOCK, limit + 1 - total)
                expected = wanted if size is None else min(wanted, max(size - total, 0))
                block = self.answer(partial(file.read, wanted), where, expected)
                total, waited = total + len(block), waited + time.monotonic() - since
                if not block:
                    return
                if total > limit:
                    raise SpkdError(f"{self.url}/{name}: larger than the {limit:,} bytes that it may have")
                if not self.is_local and waited > SILENCE + total / SLOWEST:
                    raise SpkdError(f"{self.url}/{name}: given up, since {total:,} bytes took {waited:.0f} s")
                yield block

    def beginning(self, name: str, count: int) -> bytes:
        """Up to the first `count` bytes of a file. Raises SpkdError: not a regular file, or no answer in time."""
        with self._opened(name) as file:
            data, block = b"", b"x"
            while block and len(data) < count:  # a web server gives what has come
                block = self.answer(partial(file.read, count - len(data)), f"{self.url}/{name}", count)
                data += block
        return data

    def _opened(self, name: str) -> Any:
        """A file, opened to be read from its beginning. Raises SpkdError: not a regular file, or no answer in time."""
        if self.is_local and is_irregular(self.at(name)):
            raise SpkdError(f"{self.url}/{name}: not a regular file")
        # With a size, fsspec asks no web server for one, of which every failure would read `not found`.
        options = {"block_size": 0, "size": 1} if self.is_http else {"cache_type": "none"}
        return self.answer(lambda: self.files.open(self.at(name), "rb", **options), f"{self.url}/{name}")

    def answer(self, call: Callable[[], Result], where: str, size: int = 0) -> Result:
        """Result of a call to an object store, which is given up where it takes too long for its bytes.

        Args:
            where: what is asked for.
            size: bytes that it transfers.
        Raises:
            SpkdError: given up. The call goes on in a thread, which ends with the process at the latest.
        """
        if self.is_local or self.is_http:  # `_options` limits the time of these
            return call()
        results: SimpleQueue[Future[Result]] = SimpleQueue()
        seconds = 2 * SILENCE + size / SLOWEST

        def run() -> None:
            done: Future[Result] = Future()
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)
            results.put(done)

        Thread(target=run, daemon=True).start()
        try:
            return results.get(timeout=seconds).result()
        except Empty:
            raise SpkdError(f"{where}: given up, since there was no whole answer within {seconds:.0f} s") from None

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where there is no such file, or the place does not give sizes."""
        return self.state(name)[0]

    def state(self, name: str) -> tuple[int | None, str | None]:
        """Size of a file, as `size`, and what an object store names its content by; None where it does not.

        Raises:
            SpkdError: no answer in time.
        """
        try:
            found = self.answer(lambda: self.files.info(self.at(name)), f"{self.url}/{name}")
        except FileNotFoundError:
            return None, None
        tag = next((str(found[key]) for key in ("ETag", "etag", "md5Hash") if key in found), None)
        return None if found["size"] is None else int(found["size"]), tag

    def entries(self) -> tuple[list[RemoteFolder], set[str]]:
        """Folders within the folder, sorted, and the names of its files.

        Raises:
            SpkdError: the place does not answer, or lists too many.
        """
        if self.is_http:
            return self._linked()
        folders, files, folder = [], set(), self.path.rstrip("/")
        if "s3" in self._protocols() and folder:
            listed = self._pages()
        else:
            listed = patiently(
                lambda: self.answer(lambda: self.files.ls(self.path, detail=True), self.url, LARGEST_PAGE), self.url
            )
        for entry in sorted(listed, key=lambda entry: entry["name"]):
            path = entry["name"].rstrip("/")
            if entry["type"] != "directory":
                files.add(path.rsplit("/", 1)[-1])
            elif path != folder and len(path) > len(folder):
                shown = path if self.is_local else self.files.unstrip_protocol(path)
                folders.append(RemoteFolder(shown, self.files, path))
        return folders, files

    def _pages(self) -> list[dict[str, str]]:
        """Entries of the folder in a bucket, page by page, as the endpoint of a stranger may give any number."""
        bucket, key, _ = self.files.split_path(self.path)
        request = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "Delimiter": "/"}
        found, tokens = list[dict[str, str]](), set[str]()
        while True:
            page: dict[str, Any] = patiently(
                lambda: self.answer(lambda: self.files.call_s3("list_objects_v2", **request), self.url), self.url
            )
            for part in page.get("CommonPrefixes", ()):
                found.append({"name": f"{bucket}/{part['Prefix']}", "type": "directory"})
            for part in page.get("Contents", ()):
                found.append({"name": f"{bucket}/{part['Key']}", "type": "file"})
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                break
            if len(found) > MOST_ENTRIES or token in tokens:
                what = "pages without end" if token in tokens else f"more than {MOST_ENTRIES:,} entries"
                raise SpkdError(f"{self.url}: {what}; name a folder within it")
            tokens.add(token)
            request["ContinuationToken"] = token
        if not found and key:
            raise SpkdError(f"{self.url}: not found")
        return found

    def _linked(self) -> tuple[list[RemoteFolder], set[str]]:
        """`entries` on a web server: those to which the page of the folder links."""
        page = self.read("", LARGEST_PAGE)
        if page is None:
            raise SpkdError(f"{self.url}: not found")
        base, names = f"{self.path}/", set[str]()
        for link in LINK.findall(page.decode(errors="replace")):
            address = urljoin(base, html.unescape(link)).partition("#")[0].partition("?")[0]
            if address.startswith(base):
                names.add(address.removeprefix(base))
        shown = public_address(base)
        folders = sorted(name.removesuffix("/") for name in names if name.find("/") == len(name) - 1 > 0)
        found = [replace(self, url=shown + name, path=base + name) for name in folders]
        return found, {name for name in names if name and "/" not in name}


def _options(url: str) -> dict[str, Any]:
    """Options of the file system of a URL: the limits of time for web servers."""
    if not url.startswith(HTTP):
        return {}
    with contextlib.suppress(ImportError):
        from aiohttp import ClientResponse, ClientTimeout

        class Prompt(ClientResponse):
            """Answer whose head comes in time; aiohttp limits the time between two of its bytes alone."""

            async def start(self, connection: Any) -> ClientResponse:
                try:
                    async with asyncio.timeout(SILENCE):
                        return await super().start(connection)
                except TimeoutError as error:
                    raise TimeoutError(f"no answer within {SILENCE:g} s") from error

        limits = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        return {"client_kwargs": {"timeout": limits, "response_class": Prompt}}
    return {}


def patiently(call: Callable[[], Result], what: str) -> Result:
    """Call a function, and call it again after ever longer pauses where the network failed or the server is busy.

    Raises:
        SpkdError: the last attempt failed too.
        OSError: the disk is full, which no pause changes.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except SpkdError:
            raise
        except Exception as error:  # each file system raises its own kinds of errors
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            status = getattr(error, "status", None)
            refused = status is not None and status not in BUSY
            if refused or isinstance(error, FileNotFoundError | PermissionError) or attempt == TRIES - 1:
                message = str(error) or str(
                    error.__cause__ or ""
                )  # fsspec's error of a time limit has no message itself
                text = f"the server answers {status} {getattr(error, 'message', '')}" if status else message
                if status == 0 or not text.strip():  # aiohttp's error of endless redirections has none
                    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
                text = " ".join(text.split())
                raise SpkdError(f"{what}: {without_secrets(text)[:200]}") from error
            time.sleep(WAIT * 4**attempt)
    raise AssertionError("unreachable")


def send(
    files: Mapping[str, Path],
    url: str,
    expected: Callable[[str], str],
    stages: Iterable[Iterable[str]],
    replaces: bool,
) -> None:
    """Copy files to a place, unless they are there already, and read every one back.

    Args:
        files: path of each file within the copy -> the local file.
        expected: function that checks a file, by its path within the copy, and returns its SHA-256.
        stages: paths within the copy in the order of sending: those of a stage when all before them have arrived.
        replaces: whether the place holds an earlier copy, whose files may be replaced; other files are not.
    Raises:
        UsageError: the place cannot be written.
        SpkdError: a local file is damaged, the place has another file under one of the names, a folder of it is a
            symbolic link, or it does not answer.
    """
    place = RemoteFolder.of(url)
    url = place.url
    if place.is_http:
        raise UsageError(f"{url}: http can be pulled from, not pushed to")
    names: Iterable[str] = ()
    sent, tags = set[str](), dict[str, str | None]()

    def arrived(name: str, size: int, check: str) -> bool:
        try:
            there, tag = place.state(name)  # before it is read, so that a later content has another
            if there != size or digest.of_blocks(place.blocks(name, size)) != check:
                return False
        except SpkdError:
            return False
        tags[name] = tag
        return True

    def send_file(name: str, check: str) -> None:
        size = files[name].stat().st_size
        if arrived(name, size, check):
            return
        if not replaces and name not in sent and place.size(name) is not None:
            raise UsageError(f"{url}/{name}: would be replaced (no copy is there); choose another place, or remove it")
        sent.add(name)
        if place.is_local:
            with writing(Path(place.at(name))) as file, open(files[name], "rb") as source:
                shutil.copyfileobj(source, file, BLOCK)
                file.flush()
                if digest.of_file(Path(file.name)) != check:
                    raise OSError("arrived damaged")
            return
        if not place.is_object_store:  # in an object store, this could make a new bucket
            place.files.makedirs(place.at(name).rsplit("/", 1)[0], exist_ok=True)
        # Objects appear whole.
        place.answer(lambda: place.files.put_file(str(files[name]), place.at(name)), f"{url}/{name}", size)
        if not arrived(name, size, check):
            raise OSError("arrived damaged")

    def job(name: str) -> Callable[[], int]:
        def run() -> int:
            check = expected(name)
            patiently(lambda: send_file(name, check), f"{url}/{name}")
            return files[name].stat().st_size

        return run

    if place.is_local:
        check_no_links(Path(place.path), {Path(name).parent for name in files})
        for folder in {Path(place.at(name)).parent for name in files}:
            remove_abandoned(folder)
    total = sum(file.stat().st_size for file in files.values() if file.is_file())
    with track(f"pushing to {url}", total >> 20, "MiB") as bar:
        for names in stages:
            in_parallel([job(name) for name in names], bar)
    # An object store has no locks. Who ends last sees what another push has replaced since.
    if place.is_local:
        return
    with ThreadPoolExecutor(PARALLEL) as pool:
        now = pool.map(lambda name: patiently(lambda: place.state(name)[1], f"{url}/{name}"), tags)
    if replaced := [name for name, tag in zip(tags, now, strict=True) if tag != tags[name]]:
        of = "the other" if list(names)[-1] in replaced else "this one"
        raise SpkdError(
            f"{url}: another push at the same time replaced {counted(len(replaced), 'file')} (the first: "
            f"{replaced[0]}); the record there is that of {of}; push again what is to be there when the other has ended"
        )


def checked_digest(path: Path, expected: str) -> str:
    """Check the SHA-256 of a file. Raises SpkdError: the file has another digest than `expected`."""
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
