from __future__ import annotations

import gzip
import itertools
from collections import deque
from pathlib import Path

import pytest

from spkd.errors import SpkdError
from spkd.files import text
from spkd.files.text import counted, dotted, numbered_lines, read_lines


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


def test_gzipped_text_is_compared_with_its_bytes_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 4 MB that stands for 1.7 GB is refused in its first lines, not after 400 MB; a real list is read."""
    monkeypatch.setattr(text, "SMALL", 1 << 20)
    real = b"".join(b"%d id%05d/%d.wav\n" % (n % 2, 7919 * n % 10_000, n * n) for n in range(100_000))
    path = tmp_path / "lines"
    path.write_bytes(gzip.compress(real))
    assert len(list(read_lines(path))) == 100_000
    path.write_bytes(gzip.compress(b"a b 0.5\n") + gzip.compress(b"a b 0.5\n" * (1 << 19), 9) * 100)
    lines = enumerate(read_lines(path))
    with pytest.raises(SpkdError, match=r"lines: more than [\d,]+ characters of text in [\d,]+ gzipped bytes$"):
        deque(itertools.takewhile(lambda line: line[0] < 500_000, lines), 0)  # of 52 million


def test_things_are_counted_in_words() -> None:
    assert [counted(count, "view") for count in (0, 1, 2, 1200)] == ["0 views", "1 view", "2 views", "1,200 views"]


def test_nested_values_have_names_with_dots() -> None:
    tree = {"seed": 1, "optim": {"lr": 0.1, "sgd": {"nesterov": True}, "none": {}}, "cache": ["a"]}
    assert dotted(tree) == {"seed": 1, "optim.lr": 0.1, "optim.sgd.nesterov": True, "cache": ["a"]}
