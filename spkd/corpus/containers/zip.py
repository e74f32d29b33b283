"""Zip archives, with members that are stored or compressed by deflate. Only the directory and headers are read."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from spkd.corpus.containers.members import Archive, Member
from spkd.corpus.ranges import Range, Source
from spkd.errors import SpkdError

LOCAL = struct.Struct("<4s5H3I2H")  # header before a member (APPNOTE.TXT 4.3.7)
UTF8, ENCRYPTED = 1 << 11, 1 << 0  # flags (APPNOTE.TXT 4.4.4)


class Zip(Archive):
    """Reader of the directory of a zip."""

    describes = "zip"
    suffixes = (".zip",)

    @classmethod
    def recognises(cls, path: str, begin: bytes) -> bool:
        return begin[:4] in (b"PK\3\4", b"PK\5\6") or path.lower().endswith(".zip")

    def members(self) -> Iterator[Member]:
        source = self.opened()
        try:
            with zipfile.ZipFile(cast(BinaryIO, io.BufferedReader(Range(source, 0, source.size)))) as file:
                infos = sorted(file.infolist(), key=lambda info: info.header_offset)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, EOFError) as error:
            raise SpkdError(
                f"{self.path}: not a zip that can be read ({' '.join(str(error).split())[:200]}); if it is one of "
                "several parts, put them together first (cat PARTS > whole.zip)"
            ) from error
        for info in infos:
            name = info.filename.removeprefix("./").lstrip("/")
            if info.is_dir():
                continue
            if (readable := _name(info)) is None:
                self._leave_out(name, "its name is not UTF-8")
                continue
            name = readable.removeprefix("./").lstrip("/")
            if info.flag_bits & ENCRYPTED:
                self._leave_out(name, "encrypted")
            elif info.external_attr >> 28 == 0xA:  # S_IFLNK, of the mode in the upper half
                self._leave_out(name, "a symbolic link")
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                self._leave_out(name, f"compressed by method {info.compress_type}, which is not read here; unpack it")
            elif (offset := _offset(source, info)) is None:
                self._leave_out(name, "damaged (its header is not that of the directory)")
            else:
                compressed = info.compress_type == zipfile.ZIP_DEFLATED
                yield Member(name, offset, info.compress_size, compressed, info.CRC)

    def _leave_out(self, name: str, reason: str) -> None:
        if Path(name).suffix.lower() in self.wanted.suffixes:
            self.left_out[name.encode(errors="backslashreplace").decode()] = reason


def _name(info: zipfile.ZipInfo) -> str | None:
    """Name of a member; without a flag for UTF-8, most tools write UTF-8 all the same. None where it is not UTF-8."""
    if info.flag_bits & UTF8 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return None


def _offset(source: Source, info: zipfile.ZipInfo) -> int | None:
    """Place of the bytes of a member, behind its own header; None where there is no such header."""
    try:
        header = LOCAL.unpack(source.read(info.header_offset, LOCAL.size))
        begin = info.header_offset + LOCAL.size
        name = source.read(begin, header[9])
        offset = begin + header[9] + header[10]
        inside = offset + info.compress_size <= source.size
    except (ValueError, struct.error, OSError):
        return None
    expected = info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437", "replace")
    return offset if header[0] == b"PK\3\4" and name == expected and inside else None
