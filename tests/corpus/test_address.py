from __future__ import annotations

from pathlib import Path

import pytest

from spkd.corpus.address import Address, file_of, parse, state_of_audio, suffix_of


@pytest.mark.parametrize(
    ("text", "address", "suffix", "storage", "column"),
    [
        ("/d/000.tar#1536+32044.flac", Address("/d/000.tar", 1536, 32_044, "flac"), ".flac", "", ""),
        ("a.zip#7+9.wav.deflate", Address("a.zip", 7, 9, "wav.deflate"), ".wav", "deflate", ""),
        ("a.zip#7+9.wav.deflate:0a1b2c3d", Address("a.zip", 7, 9, "wav.deflate:0a1b2c3d"), ".wav", "deflate", ""),
        ("a.zip#7+9.wav.crc:0a1b2c3d", Address("a.zip", 7, 9, "wav.crc:0a1b2c3d"), ".wav", "", ""),
        ("a#1+2.wav#3+4.mp3", Address("a#1+2.wav", 3, 4, "mp3"), ".mp3", "", ""),
        ("x.parquet#17+900.m4a.row", Address("x.parquet", 17, 900, "m4a.row"), ".m4a", "row", ""),
        ("x.parquet#17+9.wav.row:a.b: c", Address("x.parquet", 17, 9, "wav.row:a.b: c"), ".wav", "row", "a.b: c"),
        ("wav.ark#123+0.ark", Address("wav.ark", 123, 0, "ark"), ".ark", "ark", ""),
    ],
)
def test_an_address_is_a_text(text: str, address: Address, suffix: str, storage: str, column: str) -> None:
    assert parse(text) == address
    assert str(address) == text
    assert (address.suffix, address.storage, address.column) == (suffix, storage, column)
    assert address.crc == (0x0A1B2C3D if text.endswith(":0a1b2c3d") else None)
    assert (file_of(text), suffix_of(text)) == (address.container, suffix)


@pytest.mark.parametrize(
    "text",
    [
        "a.wav",
        "",
        "#1+2.wav",
        "a.tar#1+2",
        "a.tar#-1+2.wav",
        "a.tar#1+2.WAV",
        "a.tar#1+2.wav.gz",
        "C#/a.wav",
        "a.zip#1+2.wav.crc",
    ],
)
def test_other_texts_are_paths(text: str) -> None:
    assert parse(text) is None
    assert file_of(text) == text


def test_what_exists_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar#0+4.wav"
    assert parse(str(path)) is not None
    path.write_bytes(b"file")
    assert parse(str(path)) is None
    assert state_of_audio(str(path)) == (4, path.stat().st_mtime_ns)
    (tmp_path / "a.tar").write_bytes(b"container")
    assert state_of_audio(f"{tmp_path}/a.tar#0+5.wav") == (9, (tmp_path / "a.tar").stat().st_mtime_ns)
    assert state_of_audio(f"{tmp_path}/b.tar#0+5.wav") is None
