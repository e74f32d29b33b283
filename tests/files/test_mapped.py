"""Mapped files: what is read from them is what was written, or an error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from spkd.cache.lazy import Column
from spkd.errors import SpkdError
from spkd.files import digest, mapped
from spkd.files.mapped import MappedFile, NotThis, Texts, write_mapped

CONTENT = {"plan": "0" * 64}
ROWS = np.empty(1000, [("a", "<i4"), ("b", "<f8")])
ROWS["a"], ROWS["b"] = np.arange(1000), np.arange(1000) / 7
TEXTS = ["ab", "", "üß", "x" * 50] * 30
ENDS = np.cumsum([len(text.encode()) for text in TEXTS]).astype([("end", "<i8")])
BYTES = np.frombuffer("".join(TEXTS).encode(), [("byte", "u1")])


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mapped, "BLOCK", 512)
    sections = {
        "rows": (ROWS.dtype, 1000, [ROWS[:1], ROWS[1:400], ROWS[400:]]),
        "texts": (BYTES.dtype, len(BYTES), [BYTES]),
        "ends": (ENDS.dtype, len(ENDS), [ENDS]),
    }
    write_mapped(tmp_path / "f.bin", CONTENT, sections)
    return tmp_path / "f.bin"


def opened(path: Path, low: int = 0) -> MappedFile:
    return MappedFile(path, CONTENT, {"rows": {"a": (low, 999)}})


def test_it_holds_what_was_written(path: Path) -> None:
    file = opened(path)
    for each in (file, pickle.loads(pickle.dumps(file))):
        assert np.array_equal(each.whole("rows"), ROWS)
        numbers = np.array([999, 0, 31, 32, 512])
        for field in ("a", "b"):
            assert np.array_equal(each.take("rows", field, numbers), ROWS[field][numbers])
        assert np.array_equal(Column(each, "rows", "b")[10:300:7], ROWS["b"][10:300:7])
        assert np.array_equal(each.take("rows", "b", np.array([200, 250], np.uint8)), ROWS["b"][[200, 250]])
        for outside in ([1000], [-1], [3, -(2**62)]):
            with pytest.raises(IndexError):
                each.take("rows", "a", np.array(outside))
        texts = Texts(each, "texts", "ends")
        assert list(texts) == TEXTS
        assert texts == TEXTS
        assert (texts[2], texts[-1], texts[5:9]) == (TEXTS[2], TEXTS[-1], TEXTS[5:9])
        with pytest.raises(IndexError):
            texts[len(TEXTS)]


def test_every_flipped_bit_is_found(path: Path) -> None:
    good = path.read_bytes()
    random = np.random.RandomState(0)
    used = 8 + int.from_bytes(good[:8], "little") + 32  # the rest of the header is empty
    for place in [*random.randint(0, used, 60), *random.randint(used, len(good), 200)]:
        bad = bytearray(good)
        bad[place] ^= 1 << random.randint(8)
        path.write_bytes(bad)
        with pytest.raises(SpkdError, match=r"f\.bin"):
            opened(path).check()


def test_only_what_is_touched_is_checked(path: Path) -> None:
    bad = bytearray(path.read_bytes())
    bad[mapped.HEADER + 12 * 500] ^= 1
    path.write_bytes(bad)
    file = opened(path)
    assert np.array_equal(file.take("rows", "a", np.arange(400)), ROWS["a"][:400])
    for _ in range(2):
        with pytest.raises(SpkdError, match=r"f\.bin: damaged; remove it"):
            file.take("rows", "a", np.array([3, 500]))
    assert np.array_equal(file.take("rows", "b", np.arange(600, 900)), ROWS["b"][600:900])


def test_short_and_foreign_files_are_not_used(path: Path, tmp_path: Path) -> None:
    good = path.read_bytes()
    for data in (b"", good[:100], good[: mapped.HEADER], good[:-1], good + b"\0", bytes(len(good))):
        path.write_bytes(data)
        with pytest.raises(NotThis):
            opened(path)
    path.write_bytes(good)
    with pytest.raises(NotThis, match="of another content"):
        MappedFile(path, {"plan": "1" * 64}, {})
    for odd in (tmp_path / "none", tmp_path):
        with pytest.raises(NotThis):
            opened(odd)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["sections"]["rows"]["fields"].append(["c", "|O"]),
        lambda header: header["sections"]["rows"]["fields"].append(["c", "<i2"]),
        lambda header: header["sections"]["rows"].update(offset=0),
        lambda header: header["sections"]["rows"].update(bytes=-12),
        lambda header: header["sections"].update(rows=7),
        lambda header: header["checksums"].update(count=2**40),
        lambda header: header.update(spkd_mapped=2),
        lambda header: header.pop("content"),
    ],
    ids=range(8),
)
def test_headers_that_somebody_signed_anew_are_checked(path: Path, change: object) -> None:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    sealed = len(text).to_bytes(8, "little") + text + bytes.fromhex(digest.of_bytes(text))
    path.write_bytes(sealed.ljust(mapped.HEADER, b"\0") + data[mapped.HEADER :])
    with pytest.raises(NotThis):
        opened(path)


def test_values_out_of_bounds_are_refused_whatever_the_checksums_say(path: Path) -> None:
    opened(path).check()
    with pytest.raises(SpkdError, match="damaged"):
        opened(path, low=1).take("rows", "a", np.array([0]))
