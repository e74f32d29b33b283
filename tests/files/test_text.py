from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from spkd.errors import SpkdError
from spkd.files import text
from spkd.files.text import numbered_lines, read_lines


@pytest.mark.parametrize(
    "data",
    [
        "a b\nü\n".encode(),
        "a b\r\nü\r\n".encode(),
        "a b\rü".encode(),
        b"\xef\xbb\xbf" + "a b\nü\n".encode(),
        "a b\nü\n".encode("utf-16"),
        gzip.compress("a b\nü\n".encode()),
    ],
    ids=["lf", "crlf", "cr", "bom", "utf-16", "gzip"],
)
def test_the_same_lines_however_a_tool_wrote_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    assert list(numbered_lines(tmp_path / "x")) == [(1, "a b"), (2, "ü")]


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a\u2028b\n\n \n# c\nd\x0ce")
    assert list(numbered_lines(tmp_path / "x")) == [(1, "a\u2028b"), (5, "d\x0ce")]
    assert list(numbered_lines(tmp_path / "x", comments=False))[1] == (4, "# c")
    assert list(read_lines(tmp_path / "x")) == ["a\u2028b", "", " ", "# c", "d\x0ce"]


def test_text_that_cannot_be_read_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin").write_bytes("a\nb\nü\n".encode("latin-1"))
    with pytest.raises(SpkdError, match=r"latin:3: not UTF-8 text; convert it"):
        list(read_lines(tmp_path / "latin"))
    whole = gzip.compress(b"x" * 5000)
    for bad in (whole[:-9], whole[:20] + b"\0\0\0" + whole[23:], b"\x1f\x8b"):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(SpkdError, match="cannot be read"):
            list(read_lines(tmp_path / "bad"))
    (tmp_path / "bomb").write_bytes(whole)
    with pytest.raises(SpkdError, match=r"more than 4,000 characters"):
        list(read_lines(tmp_path / "bomb", most=4000))
    monkeypatch.setattr(text, "MOST_OF_LINE", 4000)
    with pytest.raises(SpkdError, match=r"bomb:1: a line of more"):
        list(read_lines(tmp_path / "bomb"))
    with pytest.raises(SpkdError, match="not a regular file"):
        list(read_lines(tmp_path))
