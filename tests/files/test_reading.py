"""Reading of files that anyone may have written: pipes, sizes, text and JSON."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from spkd.errors import SpkdError
from spkd.files import reading


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
