"""Kinds of containers: what an index takes from each, and what it leaves out with the reason."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from spkd.corpus.containers.container import Container, Entry, Wanted
from spkd.corpus.containers.tar import Tar
from spkd.corpus.containers.zip import Zip
from spkd.corpus.shards import kind_of
from spkd.corpus.stored import read
from spkd.errors import SpkdError

WANTED = Wanted(frozenset({".wav", ".flac"}))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def entries_of(path: Path, wanted: Wanted = WANTED) -> tuple[dict[str, Entry], Container]:
    """Name within the container -> entry, and the container."""
    kind = kind_of(str(path))
    assert kind is not None
    container = kind(str(path), wanted)
    return {entry.name: entry for entry in container.entries()}, container


def contents(entries: dict[str, Entry]) -> dict[str, bytes]:
    return {name: read(entry.address) for name, entry in entries.items()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_headers_of_all_kinds_of_tar(tmp_path: Path, form: int) -> None:
    long = "/".join(["folder" * 4] * (5 if form == tarfile.USTAR_FORMAT else 30)) + "/ä.wav"
    files = {"a.wav": b"first", "./b/c.flac": b"", long: b"x" * 3000}
    found, container = entries_of(write_tar(tmp_path / "x.tar", files.items(), form))
    assert contents(found) == {"a.wav": b"first", "b/c.flac": b"", long: b"x" * 3000}
    assert [entry.key for entry in found.values()] == ["a", "b/c", long.removesuffix(".wav")]
    assert container.left_out == {}


def test_tars_of_gnu_tar_and_bsd_tar(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("1.wav", "é" * 110 + ".wav"):
        (tmp_path / "d" / name).write_bytes(name.encode() * 50)
    for form in ("gnu", "oldgnu", "pax", "posix"):
        subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "x.tar", "-C", tmp_path, "d"], check=True)
        found, container = entries_of(tmp_path / "x.tar")
        assert contents(found) == {f"d/{name}": name.encode() * 50 for name in os.listdir(tmp_path / "d")}
        assert container.left_out == {}


def test_speakers_are_named_beside_the_audio(tmp_path: Path) -> None:
    members = [
        ("u1.json", b'{"Speaker_ID": 7, "text": "yes", "label": "x", "age": 40}'),
        ("u1.wav", b"1"),
        ("u1.txt", b"word"),
        ("d/u2.cls", b"12\n"),
        ("d/u2.spk", "Zoë".encode()),
        ("d/u2.seg.wav", b"2"),
        ("u3.wav", b"3"),
        ("u3.json", b"[" * 100),
        ("u4.wav", b"4"),
        ("u4.spk", b"\xff\xfe\xfd"),
        ("u5.wav", b"5"),
        ("u5.json", b'{"speaker": {"name": "x"}, "spk": true, "label": ""}'),
        ("readme", b""),
    ]
    found, container = entries_of(write_tar(tmp_path / "x.tar", members))
    assert {e.key: e.speakers for e in found.values()} == {
        "u1": {"Speaker_ID": "7", "label": "x"},
        "d/u2": {"cls": "12", "spk": "Zoë"},
        "u3": {},
        "u4": {},
        "u5": {},
    }
    assert container.unused == {
        ".txt": 1,
        ".json that cannot be read": 1,
        ".spk that cannot be read": 1,
        "without a suffix": 1,
    }
    found, _ = entries_of(tmp_path / "x.tar", Wanted(WANTED.suffixes, speaker="txt"))
    assert found["u1.wav"].speakers["txt"] == "word"
    found, _ = entries_of(tmp_path / "x.tar", Wanted(WANTED.suffixes, speaker="age"))
    assert found["u1.wav"].speakers["age"] == "40"


def test_members_of_one_key_and_of_one_name(tmp_path: Path) -> None:
    members = [("a.wav", b"old"), ("b.source.wav", b"1"), ("b.target.wav", b"2"), ("c.wav", b"3"), ("c.flac", b"4")]
    found, container = entries_of(write_tar(tmp_path / "x.tar", [*members, ("./a.wav", b"new")]))
    assert [entry.key for entry in found.values()] == ["b.source.wav", "b.target.wav", "c.wav", "c.flac", "a"]
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "x.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert contents(found) == {name: (tmp_path / "out" / name).read_bytes() for name in found}
    assert container.left_out == {"a.wav (at byte 512)": "replaced by a later member of the same name"}


def test_links_and_holes_within_a_tar(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.wav").write_bytes(b"audio")
    os.link(folder / "a.wav", folder / "b.wav")
    (folder / "c.wav").symlink_to("a.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    with open(folder / "hole.wav", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    os.mkfifo(folder / "pipe.wav")
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "-S", "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."]
        subprocess.run(command, check=True)
        found, container = entries_of(tmp_path / "x.tar")
        assert contents(found) == {"a.wav": b"audio", "b.wav": b"audio"} or "hole.wav" not in container.left_out
        assert container.left_out["c.wav"] == container.left_out["loop.wav"] == "a symbolic link"
        assert container.left_out["pipe.wav"] == "not a regular file"
        assert "sparse" in container.left_out["hole.wav"]


def test_names_that_no_manifest_can_have(tmp_path: Path) -> None:
    members = [("gr\udcfcn.wav", b"1"), ("a\nb.wav", b"2"), (".hidden.wav", b"3"), ("d/._x.wav", b"4"), ("e.wv1", b"5")]
    found, container = entries_of(write_tar(tmp_path / "x.tar", members))
    assert found == {}
    assert list(container.left_out.values()) == [
        "its name is not UTF-8",
        "its name holds control characters",
        "a hidden file",
        "a hidden file",
        ".wv1 is not decoded here; convert it to WAV or FLAC",
    ]


def test_a_tar_that_is_cut_off_or_damaged(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{n}.wav", bytes([n]) * 1000) for n in range(4)])
    whole = path.read_bytes()
    step = 512 + 1024
    for cut, count, reason in (
        (3 * step + 700, 3, "cut off by the end of its tar"),
        (3 * step + 300, 3, "no header at byte 4,608"),
        (3 * step, 3, "ends without an end mark at byte 4,608"),
    ):
        path.write_bytes(whole[:cut])
        found, container = entries_of(path)
        assert len(found) == count
        assert any(reason in text for text in container.left_out.values()), container.left_out
    path.write_bytes(whole[: 2 * step] + b"\xff" * 512 + whole[2 * step + 512 :])
    found, container = entries_of(path)
    assert (list(found), container.left_out[""].split(";")[0]) == (["0.wav", "1.wav"], "no header at byte 3,072")
    path.write_bytes(whole + whole)
    found, container = entries_of(path)
    assert (len(found), "two tars in one file" in container.left_out[""]) == (4, True)
    path.write_bytes(b"x" * 2000)
    with pytest.raises(SpkdError, match="not a tar that can be read"):
        entries_of(path)
    path.write_bytes(b"")
    with pytest.raises(SpkdError, match="not a tar that can be read"):
        entries_of(path)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Header of a member (POSIX.1-1988), with the sum of its bytes."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"00000000000\0" + b" " * 8 + kind)
    block += bytes(100) + b"ustar\x0000" + bytes(512)
    block = block[:512]
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_sizes_that_lead_back_or_far_away(tmp_path: Path) -> None:
    first, path = header(b"a.wav", b"00000000004\0") + b"data".ljust(512, b"\0"), tmp_path / "x.tar"
    negative = b"\xff" + (-1024).to_bytes(11, "big", signed=True)
    huge = b"\x80" + (1 << 50).to_bytes(11, "big")
    for second, reason in (
        (header(b"b.wav", negative), "damaged"),
        (header(b"b.wav", huge), "cut off"),
        (header(b"b.wav", negative, b"L"), "damaged"),
        (header(b"b.wav", huge, b"x"), "damaged"),
        (header(b"b.wav", b"00000000000\0", b"L") * 3000, "damaged"),
    ):
        path.write_bytes(first + second + bytes(1024))
        found, container = entries_of(path)
        assert contents(found) == {"a.wav": b"data"}
        assert any(reason in text for text in container.left_out.values()), container.left_out


def test_members_beyond_8_gib(tmp_path: Path) -> None:
    path, size = tmp_path / "x.tar", 9 << 30
    with open(path, "wb") as file:  # a member of 9 GiB of nothing, then one with audio
        file.write(header(b"a.bin", b"\x80" + size.to_bytes(11, "big")))
        file.seek(size, os.SEEK_CUR)
        file.write(header(b"b.wav", b"00000000005\0") + b"audio".ljust(512, b"\0") + bytes(1024))
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("a file system without holes")
    found, container = entries_of(path)
    assert found["b.wav"].address.offset == size + 1024
    assert (contents(found), container.left_out) == ({"b.wav": b"audio"}, {})


@pytest.mark.parametrize(("mode", "command"), [("gz", "gunzip -k"), ("bz2", "bunzip2 -k"), ("xz", "unxz -k")])
def test_compressed_tars_are_refused_with_the_command(tmp_path: Path, mode: str, command: str) -> None:
    path = tmp_path / f"x.tar.{mode}"
    with tarfile.open(path, f"w:{mode}") as file:
        file.addfile(tarfile.TarInfo("a.wav"))
    with pytest.raises(SpkdError, match=f"`{command} {path}`"):
        entries_of(path)


def test_zips(tmp_path: Path) -> None:
    path, noise = tmp_path / "x.zip", os.urandom(5000)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("d/", b"")
        file.writestr("d/a.wav", noise, zipfile.ZIP_STORED)
        file.writestr("d/ü.flac", b"x" * 5000, zipfile.ZIP_DEFLATED)
        file.writestr("d/a.spk", "Zoë", zipfile.ZIP_DEFLATED)
        file.writestr("b.wav", b"x" * 50, zipfile.ZIP_BZIP2)
        link = zipfile.ZipInfo("c.wav")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "d/a.wav")
    path.write_bytes(b"#!/bin/sh\n" * 7 + path.read_bytes())  # one that unpacks itself
    found, container = entries_of(path)
    assert contents(found) == {"d/a.wav": noise, "d/ü.flac": b"x" * 5000}
    assert found["d/a.wav"].speakers == {"spk": "Zoë"}
    assert "method 12" in container.left_out["b.wav"]
    assert container.left_out["c.wav"] == "a symbolic link"


def test_zips_with_encryption_other_names_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a.wav", "b.wav", "xx.wav", "yy.wav"):
            file.writestr(name, b"audio")
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    data[directory + 8] |= 1  # the flag of encryption of the first
    data[data.index(b"b.wav") - 30 : data.index(b"b.wav") - 26] = b"PK\7\7"  # the header of the second
    for name in (b"xx.wav", b"yy.wav"):  # UTF-8 without its flag, and Latin-1
        while name in data:
            at = data.index(name)
            data[at : at + 2] = "ü".encode() if name == b"xx.wav" else b"\xfcy"
    path.write_bytes(data)
    found, container = entries_of(path)
    assert contents(found) == {"ü.wav": b"audio"}
    assert {reason.split(" (")[0] for reason in container.left_out.values()} == {
        "encrypted",
        "damaged",
        "its name is not UTF-8",
    }
    path.write_bytes(data[: directory - 3])
    with pytest.raises(SpkdError, match="put them together first"):
        entries_of(path)


def test_zip64(tmp_path: Path) -> None:
    """Offsets beyond 4 GiB, as in a zip with a hole in front of the last member."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.wav", b"first")
        directory = file.fp
        assert directory is not None
        directory.seek(5 << 30)
        file.start_dir = 5 << 30
        file.writestr("b.wav", b"second")
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("a file system without holes")
    found, _ = entries_of(path)
    assert found["b.wav"].address.offset == (5 << 30) + struct.calcsize("<4s5H3I2H") + 5
    assert contents(found) == {"a.wav": b"first", "b.wav": b"second"}


def test_kinds_are_recognised_by_content(tmp_path: Path) -> None:
    write_tar(tmp_path / "tar", [("a.wav", b"")])
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("a.wav", b"")
    (tmp_path / "wav").write_bytes(b"RIFF" * 500)
    (tmp_path / "empty").touch()
    assert [kind_of(str(tmp_path / name)) for name in ("tar", "zip", "wav", "empty")] == [Tar, Zip, None, None]
    with pytest.raises(SpkdError, match="not a regular file"):
        kind_of(str(tmp_path))
