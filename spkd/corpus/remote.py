"""Containers and files of audio elsewhere, by URLs of fsspec (s3://, gs://, hf://, http://): ranges of their bytes.

Who reads one member after the other gets blocks, which are fetched ahead; who reads here and there gets the ranges
that he asks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

from fsspec.asyn import sync

from spkd.errors import SpkdError, public_address
from spkd.files.reading import State
from spkd.files.remote_folder import RemoteFolder, patiently

BLOCK = 1 << 22  # bytes that are fetched at once of what is read in order
AHEAD = 4  # blocks that are fetched ahead
MOST_BLOCKS = 64  # that are kept of all files together
MOST_RANGES, LONGEST_RANGE = 256, 1 << 20  # ranges that are kept, which were asked for by themselves; bytes of each
REQUESTS = 16  # under way at once in this process
# Names under which places name the content of a file.
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime")
ELSEWHERE = re.compile(r"(?:s3|gs|gcs|az|abfs|hf|https?)://")
RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
AGAIN = 60.0  # s after which places that name no content in their answers are asked for it again
TOUCHED = 64  # numbers of blocks that were read last, by which reading in order is recognised

_numbers = itertools.count()  # of the files that were opened: an address in memory may be given twice


def is_elsewhere(path: str) -> bool:
    """Whether a path is the URL of a file on another machine."""
    return ELSEWHERE.match(path) is not None


class Remote:
    """File elsewhere, of which ranges are read by any number of threads.

    Attributes:
        size: its bytes.
        shown: its URL without credentials, for messages.
        state: its size, and a number made of what its place names its content by (an ETag, a time).
    Raises:
        OSError: it is not there, its place does not answer, does not give its size, names its content by nothing, or
            gives no parts of files; or a web server is never sent a part of the URL, the one behind #.
    """

    def __init__(self, url: str) -> None:
        if url.startswith("http") and "#" in url:
            raise OSError("what follows # in a URL is not sent to its server; write %23 for a # in a name")
        base, mark, query = url.partition("?") if url.startswith("http") else (url, "", "")
        parent, _, self._name = base.rpartition("/")
        self.shown = public_address(url)
        try:
            self._folder = RemoteFolder.of(f"{parent}{mark}{query}")
            self.state = patiently(self._state, self.shown)
        except SpkdError as error:
            raise OSError(str(error).removeprefix(f"{self.shown}: ")) from error
        self.size = self.state[0]
        self._number, self._known_until = next(_numbers), time.monotonic() + AGAIN
        self._lock = threading.Lock()
        self._touched: OrderedDict[int, None] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a range.

        Raises:
            ValueError: the range lies beyond the end.
            OSError: its place does not answer, or gives other bytes; the file has changed since it was opened.
        """
        if offset + length > self.size:
            raise ValueError("lies beyond the end of its container; was it truncated?")
        if length == 0:
            return b""
        if (known := _ranges(os.getpid()).known((self._number, offset, length))) is not None:
            return known.result()
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        with self._lock:
            in_order = first in self._touched or first - 1 in self._touched
            for number in range(first, last + 1):
                self._touched[number] = None
                self._touched.move_to_end(number)
            while len(self._touched) > TOUCHED:
                self._touched.popitem(last=False)
            wanted = [self._begun(number) for number in range(first, last + 1)] if in_order else []
            if in_order:
                for number in range(last + 1, min(last + AHEAD, (self.size - 1) // BLOCK) + 1):
                    self._begun(number)
        if not in_order:
            return self.fetched(offset, length)
        data = b"".join(block.result() for block in wanted)
        return data[offset - first * BLOCK : offset - first * BLOCK + length]

    def expect(self, offset: int, length: int) -> None:
        """Begin to fetch a range, which is read soon in any order; nothing where it is too long to be kept."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if not length > 0 or offset + length > self.size or last - first >= MOST_BLOCKS // 2:
            return
        with self._lock:
            for number in range(first, last + 1):
                self._touched[number] = None
                self._begun(number)

    def expect_alone(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch ranges (offset and length), which are read soon, and of which others are not read; nothing
        where they are more, or longer, than is kept."""
        if len(ranges) > MOST_RANGES // 2:
            return
        for offset, length in ranges:
            if 0 < length <= LONGEST_RANGE and offset + length <= self.size:
                _ranges(os.getpid()).get((self._number, offset, length), self.fetched, offset, length)

    def _begun(self, number: int) -> Future[bytes]:
        """A block that is there or under way."""
        begin = number * BLOCK
        return _blocks(os.getpid()).get((self._number, number), self.fetched, begin, min(BLOCK, self.size - begin))

    def fetched(self, offset: int, length: int) -> bytes:
        """Bytes of a range, asked for at its place. Raises OSError: no answer, other bytes, or a file that changed."""
        kind = self._folder.kind
        ask = {"http": self._from_web, "s3": self._from_bucket}.get(kind, self._from_elsewhere)

        def once() -> bytes:
            data: bytes = self._folder.answer(lambda: ask(offset, length), self.shown, length)
            if len(data) != length:
                raise OSError(f"{len(data):,} bytes came instead of {length:,}")
            return data

        with _requests(os.getpid()):
            try:
                return patiently(once, self.shown)
            except SpkdError as error:
                raise OSError(str(error).removeprefix(f"{self.shown}: ")) from error

    def _from_elsewhere(self, offset: int, length: int) -> bytes:
        self._check_again()
        path = self._folder.at(self._name)
        # The hub's files are read ahead by 5 MiB each time they are opened, which they are for each range.
        options = {"cache_type": "none"} if self._folder.kind == "hf" else {}
        data: bytes = self._folder.files.cat_file(path, start=offset, end=offset + length, **options)
        return data

    def _from_web(self, offset: int, length: int) -> bytes:
        with self._asked(f"bytes={offset}-{offset + length - 1}") as file:
            status, headers = file.r.status, file.r.headers
            if status != 206:
                raise OSError(f"the whole file came instead of {length:,} bytes (status {status})")
            self._check(offset, headers.get("Content-Range", ""), headers)
            data: bytes = file.read()
        return data

    def _from_bucket(self, offset: int, length: int) -> bytes:
        files = self._folder.files
        bucket, key, _ = files.split_path(self._folder.at(self._name))
        wanted = f"bytes={offset}-{offset + length - 1}"
        found = files.call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, **files.req_kw)
        self._check(offset, found.get("ContentRange", ""), found)
        data: bytes = sync(files.loop, found["Body"].read)
        return data

    def _check(self, offset: int, content_range: str, answer: Mapping[str, Any]) -> None:
        """Check that an answer is of the file as it was opened, and of the range that was asked for.

        Args:
            content_range: as RFC 9110, 14.4, has it: `bytes FIRST-LAST/SIZE`.
            answer: what may name the content, as of `TAGS`.
        Raises:
            SpkdError: of a file that has changed.
            OSError: of another range.
        """
        part = RANGE.fullmatch(content_range)
        if part is None or int(part[1]) != offset:
            raise OSError(f"another range came than the one from byte {offset:,} on ({content_range[:80]!r})")
        if (part[2] != "*" and int(part[2]) != self.size) or _number(_tag(answer)) != self.state[1]:
            reason = "has changed since it was opened, or its server gives another ETag with each answer"
            raise SpkdError(f"{self.shown}: {reason}; index it again (spkd manifest)")

    def _check_again(self) -> None:
        """Check now and then that the file is as it was opened, where answers do not name the content they are of.

        Raises:
            SpkdError: it has changed.
        """
        with self._lock:
            if time.monotonic() < self._known_until:
                return
            self._known_until = time.monotonic() + AGAIN
        self._folder.files.invalidate_cache(self._folder.files._parent(self._folder.at(self._name)))
        if self._state() != self.state:
            raise SpkdError(f"{self.shown}: has changed since it was opened; index it again (spkd manifest)")

    def _state(self) -> State:
        """Size, and a number of the content's name. Raises SpkdError: no answer, not both, or no parts of files."""
        try:
            found = self._head() if self._folder.is_http else self._information()
        except FileNotFoundError as error:
            raise SpkdError(f"{self.shown}: not found") from error
        if found.get("size") is None:
            raise SpkdError(f"{self.shown}: its server does not give its size")
        if not (tag := _tag(found)):
            reason = "its server gives neither an ETag nor Last-Modified, by which a change would be noticed"
            raise SpkdError(f"{self.shown}: {reason}; copy it to this machine")
        return int(found["size"]), _number(tag)

    def _information(self) -> dict[str, Any]:
        files, path = self._folder.files, self._folder.at(self._name)
        found: dict[str, Any] = self._folder.answer(lambda: files.info(path), self.shown)
        if found.get("type") == "directory":
            raise SpkdError(f"{self.shown}: a folder")
        return found

    def _head(self) -> dict[str, Any]:
        """What a web server answers for the first byte: others give the whole file, whatever is asked for."""
        with self._asked("bytes=0-0") as file:
            headers = file.r.headers
            total = re.fullmatch(r"bytes 0-0/(\d+)", headers.get("Content-Range", ""))
            if file.r.status != 206 or total is None:
                raise SpkdError(f"{self.shown}: its server gives whole files alone, and no parts of them")
            return {"size": int(total[1]), **{name: headers[name] for name in TAGS if name in headers}}

    def _asked(self, wanted: str) -> Any:
        """What a web server answers for a range, as a file of fsspec."""
        options = {"block_size": 0, "size": 1, "headers": {"Range": wanted, "Accept-Encoding": "identity"}}
        return self._folder.files.open(self._folder.at(self._name), "rb", **options)


def _tag(answer: Mapping[str, Any]) -> str:
    """What names the content of a file in an answer; "" where nothing does."""
    return next((str(answer[name]) for name in TAGS if answer.get(name)), "")


def _number(tag: str) -> int:
    return int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7], "big")


class _Blocks:
    """Blocks or ranges of all files that were read last, and those under way.

    Args:
        most: number of those that are kept.
    """

    def __init__(self, most: int) -> None:
        self._futures: OrderedDict[tuple[int, ...], Future[bytes]] = OrderedDict()
        self._most, self._lock = most, threading.Lock()
        self._pool = ThreadPoolExecutor(REQUESTS // 2, "fetch")

    def each(self, function: Callable[[str], None], items: Sequence[str]) -> None:
        """Call a function of each item, of several at once."""
        for _ in self._pool.map(function, items):
            pass

    def known(self, key: tuple[int, ...]) -> Future[bytes] | None:
        """That of a key; None where it is not there, or could not be fetched."""
        with self._lock:
            block = self._futures.get(key)
            return None if block is None or (block.done() and block.exception() is not None) else block

    def get(self, key: tuple[int, ...], fetch: Callable[[int, int], bytes], begin: int, length: int) -> Future[bytes]:
        """The block of a key; where it is not there, or could not be fetched, `fetch(begin, length)` is begun."""
        with self._lock:
            block = self._futures.get(key)
            if block is None or (block.done() and block.exception() is not None):
                block = self._futures[key] = self._pool.submit(fetch, begin, length)
            self._futures.move_to_end(key)
            while len(self._futures) > self._most:
                self._futures.popitem(last=False)
            return block


@cache
def _blocks(process: int) -> _Blocks:
    """Blocks and threads of this process: a forked one has no threads of its parent."""
    return _Blocks(MOST_BLOCKS)


@cache
def _ranges(process: int) -> _Blocks:
    """Ranges by themselves, as `_blocks`."""
    return _Blocks(MOST_RANGES)


_limit = [REQUESTS]


def limit_requests(most: int) -> None:
    """Let no more requests be under way at once in this process, which has none yet."""
    _limit[:] = [most]


@cache
def _requests(process: int) -> threading.Semaphore:
    return threading.Semaphore(_limit[0])


@lru_cache(maxsize=1 << 12)
def _opened(url: str, process: int) -> Remote:
    return Remote(url)


def opened(url: str) -> Remote:
    """A file elsewhere, which is asked for once in a process. Raises OSError as `Remote` does."""
    return _opened(url, os.getpid())


def open_together(urls: Sequence[str]) -> None:
    """Open files elsewhere, several at once. What cannot be opened raises its error when it is read."""

    def try_one(url: str) -> None:
        with contextlib.suppress(OSError):
            opened(url)

    if len(urls) > 1:
        _ranges(os.getpid()).each(try_one, urls)
