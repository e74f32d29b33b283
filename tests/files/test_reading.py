"""Reading of files that anyone may have written: pipes, sizes, text and JSON."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.cache.lock import exclusive
from spkd.corpus import audio
from spkd.errors import SpkdError
from spkd.files import digest, reading


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 200_000, b"9" * 5000, b"[" * 70 + b"]" * 70], ids=range(5))
def test_json_that_cannot_be_read_is_a_line(data: bytes) -> None:
    with pytest.raises(SpkdError, match=r"^there: damaged") as caught:
        reading.parse_json(data, "there")
    assert len(str(caught.value)) < 400
    assert reading.parse_json(b'{"a": [1]}', "there") == {"a": [1]}


def test_json_of_too_many_parts_is_a_line() -> None:
    with pytest.raises(SpkdError, match="there: damaged, JSON of more than"):
        reading.parse_json(b"[" + b"[]," * (reading.MOST_BRACKETS + 1) + b"1]", "there")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "folder", "device", "socket"):
            with pytest.raises(SpkdError, match=f"{name}: not a regular file"):
                reading.read_json(tmp_path / name)
    with pytest.raises(SpkdError, match="none: missing"):
        reading.read_json(tmp_path / "none")


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize(
    "read",
    [reading.read_bytes, digest.of_file, lambda path: audio.probe(str(path)), lambda path: exclusive(path).__enter__()],
)
def test_a_file_that_comes_or_goes_meanwhile_is_regular_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object], is_there: bool
) -> None:
    """Another process makes or removes it after each look at it."""
    path, look = tmp_path / "claim", os.stat
    path.touch() if is_there else None

    def looked(name: object, *given: object, **named: object) -> os.stat_result:
        try:
            return look(name, *given, **named)  # type: ignore[call-overload,no-any-return]
        finally:
            if str(name) == str(path):
                path.unlink() if os.access(path, os.R_OK) else path.touch()

    monkeypatch.setattr(os, "stat", looked)
    message = ""
    try:
        read(path)
    except (FileNotFoundError, SpkdError, audio.AudioError) as error:
        message = str(error)
    assert "regular" not in message


def test_holes_of_a_file_are_counted_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(b"a" * (1 << 16))
        file.seek(100 << 20)
        file.write(b"b" * (1 << 16))
        file.truncate(200 << 20)
    with open(path, "rb") as file:
        empty = reading.holes(file)
    assert empty >= (200 << 20) - path.stat().st_blocks * 512  # as `du` counts
    for read in (reading.read_bytes, digest.of_file):
        with pytest.raises(SpkdError, match=f"{path}: {empty:,} of its 209,715,200 bytes are holes"):
            read(path)
    os.truncate(path, 1 << 20)  # few holes
    assert reading.read_bytes(path) == b"a" * (1 << 16) + bytes((1 << 20) - (1 << 16))


def test_size_and_text_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(SpkdError, match=f"{path}: larger than the 268,435,456 bytes that it may have"):
        reading.read_bytes(path)
    path.write_bytes(b"\xef\xbb\xbftext")
    assert reading.read_text(path) == "text"
    path.write_bytes(b"\xff")
    with pytest.raises(SpkdError, match="cannot be read as text"):
        reading.read_text(path)
    assert reading.read_text(path, errors="replace") == "\ufffd"
