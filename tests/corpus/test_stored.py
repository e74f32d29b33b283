"""Audio in a container is read as that of a file, to the bit, whatever its format and wherever it lies."""

from __future__ import annotations

import io
import os
import re
import signal
import tarfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus import stored
from spkd.corpus.address import Address, parse
from spkd.corpus.audio import AudioError, decode, exact_length, probe, sample_rate
from spkd.corpus.expected import forget
from spkd.corpus.kept import Kept
from spkd.corpus.manifest import Manifest
from spkd.corpus.shards import index

from .test_audio import tone, write_compressed
from .test_whole import VARIABLE, WITHOUT_XING, speech_like

SOUNDFILE = {
    "wav": ("WAV", "PCM_16", 16_000),
    "rf64": ("RF64", "PCM_24", 16_000),
    "w64": ("W64", "FLOAT", 22_050),
    "flac": ("FLAC", "PCM_16", 16_000),
    "ogg": ("OGG", "VORBIS", 16_000),
    "opus": ("OGG", "OPUS", 48_000),
    "mp3": ("MP3", "MPEG_LAYER_III", 16_000),
    "aiff": ("AIFF", "PCM_16", 44_100),
    "au": ("AU", "ULAW", 8_000),
    "sph": ("NIST", "ALAW", 8_000),
    "caf": ("CAF", "ALAC_16", 16_000),
}


def in_tar(path: Path) -> str:
    """Address of a file in a tar that has another file in front of it and behind it."""
    tar = path.with_suffix(path.suffix + ".tar")
    with tarfile.open(tar, "w") as file:
        for name in ("before", path.name, "behind"):
            info = tarfile.TarInfo(name)
            data = path.read_bytes() if name == path.name else b"\xff\xfb" * 300
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    with tarfile.open(tar) as file:
        info = file.getmember(path.name)
    return f"{tar}#{info.offset_data}+{info.size}{path.suffix}"


def in_zip(path: Path) -> str:
    """Address of a file that is compressed in a zip."""
    archive = path.with_suffix(path.suffix + ".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("before", b"x" * 1000)
        file.write(path, path.name)
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo(path.name)
    begin = info.header_offset + 30 + len(info.filename)
    return f"{archive}#{begin}+{info.compress_size}{path.suffix}.deflate"


def assert_as_a_file(path: Path, *addresses: str) -> None:
    whole = decode(str(path))
    for address in addresses:
        assert probe(address) == probe(str(path))
        assert sample_rate(address) == sample_rate(str(path))
        assert exact_length(address) == exact_length(str(path))
        assert np.array_equal(decode(address).wave, whole.wave)
        seconds = len(whole.wave) / 16_000
        for start, duration in ((0.0, 0.3), (0.4 * seconds, 0.2 * seconds), (0.9 * seconds, None)):
            part = decode(str(path), start, duration)
            assert np.array_equal(decode(address, start, duration).wave, part.wave)
            assert (decode(address, start, duration).rate, part.remark) == (part.rate, part.remark)


@pytest.mark.parametrize("suffix", SOUNDFILE)
def test_formats_of_libsndfile(tmp_path: Path, suffix: str) -> None:
    form, subtype, rate = SOUNDFILE[suffix]
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([tone(300, rate, 3.0), tone(500, rate, 3.0)], 1), rate, subtype, format=form)
    assert_as_a_file(path, in_tar(path), in_zip(path))


@pytest.mark.parametrize(("suffix", "codec"), [("m4a", "aac"), ("mkv", "aac"), ("aac", "aac"), ("webm", "libopus")])
def test_formats_of_ffmpeg(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_compressed(path, tone(300, 16_000, 3.0)[:, None], 16_000, codec)
    assert_as_a_file(path, in_tar(path), in_zip(path))


def test_headers_that_tell_no_length(tmp_path: Path) -> None:
    mp3, wav, ogg = (tmp_path / f"a.{suffix}" for suffix in ("mp3", "wav", "ogg"))
    write_compressed(mp3, speech_like(16_000), 16_000, "libmp3lame", VARIABLE, **WITHOUT_XING)
    soundfile.write(wav, tone(300, 16_000), 16_000)
    data = bytearray(wav.read_bytes())
    data[40:44] = bytes(4)
    wav.write_bytes(data)
    soundfile.write(ogg, tone(300, 16_000), 16_000)
    ogg.write_bytes(ogg.read_bytes() * 2)
    for path in (mp3, wav, ogg):
        assert_as_a_file(path, in_tar(path), in_zip(path))


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_long_recordings_are_read_piece_by_piece(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.3 * np.random.RandomState(0).randn(200_000), 16_000)
    monkeypatch.setattr(stored, "WHOLE", 10_000)
    assert_as_a_file(path, in_tar(path))
    read = list[int]()
    original = stored.Opened.read
    monkeypatch.setattr(stored.Opened, "read", lambda s, at, n: read.append(n) or original(s, at, n))
    decode(in_tar(path), 6.0, 0.5)
    assert 0 < sum(read) < path.stat().st_size / 2
    read.clear()
    probe(in_tar(path))
    assert 0 < sum(read) <= 20_000


def test_threads_share_containers_more_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_open", Kept(2, lambda _: 1))
    expected = {}
    for number in range(6):
        path = tmp_path / f"{number}.flac"
        soundfile.write(path, 0.1 * np.random.RandomState(number).randn(16_000), 16_000)
        expected[in_tar(path)] = decode(str(path)).wave
    asked = [address for _ in range(20) for address in expected]
    with ThreadPoolExecutor(8) as pool:
        waves = list(pool.map(lambda address: decode(address).wave, asked))
    assert all(np.array_equal(wave, expected[address]) for address, wave in zip(asked, waves, strict=True))
    descriptors = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if fd.isdigit() and os.path.islink(f"/proc/self/fd/{fd}")
    ]
    assert sum(name.startswith(str(tmp_path)) for name in descriptors) <= 2
    kept = sum("memfd:audio" in name for name in descriptors)
    assert kept <= 1  # of this thread; those of the others ended with them


def test_a_fork_has_locks_of_its_own() -> None:
    """A thread that is making a value in the parent never ends in the child."""
    kept: Kept[bytes] = Kept(10, len)
    started, go = threading.Event(), threading.Event()

    def make() -> bytes:
        started.set()
        go.wait()
        return b"parent"

    thread = threading.Thread(target=lambda: kept.get(1, make))
    thread.start()
    started.wait()
    if (child := os.fork()) == 0:
        os._exit(0 if kept.get(1, lambda: b"child") == b"child" else 1)
    try:
        assert os.waitstatus_to_exitcode(waited(child)) == 0
    finally:
        go.set()
        thread.join()
    assert kept.get(1, lambda: b"new") == b"parent"


def test_a_fork_has_a_file_in_memory_of_its_own(tmp_path: Path) -> None:
    """The one that a thread keeps for its next audio is shared with a fork, which would change what is decoded."""
    for number, hertz in enumerate((300, 500)):
        soundfile.write(tmp_path / f"{number}.wav", tone(hertz, 16_000), 16_000)
    first, second = (in_tar(tmp_path / f"{number}.wav") for number in range(2))
    expected = decode(first).wave
    memory = stored.in_memory(b"parent")
    assert memory is not None
    memory.release()
    if (child := os.fork()) == 0:
        decode(second)
        os._exit(0)
    assert os.waitstatus_to_exitcode(waited(child)) == 0
    assert os.pread(memory.descriptor, 6, 0) == b"parent"
    assert np.array_equal(decode(first).wave, expected)


def waited(child: int, seconds: float = 20.0) -> int:
    """Status of a child, which is killed where it does not end."""
    end = time.monotonic() + seconds
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.005)
    return found[1]


def test_what_lies_together_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int, int]]()
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, length, advice: asked.append((offset, length, advice)))
    (tmp_path / "x.tar").write_bytes(bytes(1 << 20))
    members = [f"{tmp_path}/x.tar#{512 + n * 1024}+900.wav" for n in range(9)]
    stored.read_ahead([*reversed(members), str(tmp_path / "a.wav"), f"{tmp_path}/none.tar#0+9.wav", "x#1+0.wav.row"])
    assert asked == [(512, 8 * 1024 + 900, os.POSIX_FADV_WILLNEED)]
    asked.clear()
    stored.read_ahead([members[0], f"{tmp_path}/x.tar#{1 << 19}+900.wav"])
    assert asked == []


def test_a_container_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    first, second = tmp_path / "1.wav", tmp_path / "2.wav"
    soundfile.write(first, tone(300, 16_000), 16_000)
    soundfile.write(second, tone(500, 16_000), 16_000)
    address = Address(str(tmp_path / "x.bin"), 0, first.stat().st_size, "wav")
    (tmp_path / "x.bin").write_bytes(first.read_bytes())
    assert np.array_equal(decode(str(address)).wave, decode(str(first)).wave)
    (tmp_path / "new").write_bytes(second.read_bytes())
    os.utime(tmp_path / "new", ns=(1, 1))
    (tmp_path / "new").replace(tmp_path / "x.bin")
    assert np.array_equal(decode(str(address)).wave, decode(str(second)).wave)
    assert decode(str(address)).state == (second.stat().st_size, 1)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(300, 16_000), 16_000)
    tar, packed = in_tar(path), in_zip(path)
    container, _, place = packed.rpartition("#")
    begin, _, rest = place.partition("+")
    os.mkfifo(tmp_path / "pipe")
    for address, reason in (
        (f"{tmp_path}/none.tar#0+10.wav", "no such file"),
        (f"{tmp_path}/pipe#0+10.wav", "not a regular file"),
        (f"{tmp_path}#0+10.wav", "not a regular file"),
        (re.sub(r"#\d+", "#999999", tar), "lies beyond the end of its container"),
        (f"{path}.tar#0+0.wav", "empty file"),
        (f"{path}.tar#0+512.wav", "cannot be decoded"),
        (f"{path}.tar#0+512.m4a", "cannot be decoded"),
        (f"{path}.tar#0+18446744073709551615.wav", "no such file"),  # more digits than a place has: a file
        (f"{path}.tar#0+9223372036854775807.wav", "lies beyond the end"),
        (f"{container}#{begin}+100.wav.deflate", "its compressed bytes end early"),
        (f"{container}#{int(begin) + 7}+500.wav.deflate", "damaged in its zip"),
        (f"{path}.tar#0+0.ark", "no audio in this entry"),
    ):
        with pytest.raises(AudioError, match=reason):
            decode(address)
        with pytest.raises(AudioError, match=reason):
            probe(address)
    assert rest.endswith(".wav.deflate")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_member_of_a_zip_whose_bits_changed_is_refused(tmp_path: Path, method: int) -> None:
    """The oracle is zipfile; most flips within deflate leave a stream that ends well."""
    path, archive = tmp_path / "a.wav", tmp_path / "a.zip"
    soundfile.write(path, 0.1 * np.random.RandomState(0).randn(16_000), 16_000)
    with zipfile.ZipFile(archive, "w", method) as file:
        file.write(path, "a.wav")
        file.writestr("a.spk", "ann")
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
    index([archive], tmp_path / "m.csv")
    (utterance,) = Manifest.load(tmp_path / "m.csv")
    assert utterance.speaker == "ann"
    assert np.array_equal(decode(utterance.path).wave, decode(str(path)).wave)
    whole, begin = archive.read_bytes(), parse(utterance.path)
    assert begin is not None
    refused = 0
    for place in range(begin.offset + 100, begin.offset + members[0].compress_size, 2999):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        archive.write_bytes(flipped)
        forget(str(archive))
        with zipfile.ZipFile(archive) as file, pytest.raises((zipfile.BadZipFile, zlib.error)):
            file.read("a.wav")
        with pytest.raises(AudioError, match="damaged in its zip"):
            decode(utterance.path)
        refused += 1
    assert refused >= 10


def test_gigabytes_of_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SMALL", 1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = packer.compress(bytes(8 << 20)) + packer.flush()
    (tmp_path / "bomb").write_bytes(data)
    with pytest.raises(AudioError, match="longer than audio can be"):
        decode(f"{tmp_path}/bomb#0+{len(data)}.wav.deflate")
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(200 << 20)
    if os.stat(tmp_path / "hole").st_blocks == 0:
        with pytest.raises(AudioError, match="are holes"):
            decode(f"{tmp_path}/hole#0+{200 << 20}.m4a")


def test_a_value_is_made_once_for_all_threads() -> None:
    made, ready = list[int](), threading.Barrier(4)
    kept: Kept[bytes] = Kept(10, len)

    def make(number: int) -> bytes:
        made.append(number)
        return bytes(4)

    def ask(number: int) -> bytes:
        ready.wait()
        return kept.get(number % 2, lambda: make(number % 2))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [bytes(4)] * 4
    assert sorted(made) == [0, 1]
    kept.get(2, lambda: make(2))  # the one used longest ago makes room
    assert made.count(2) == 1
    kept.get(2, lambda: make(2))
    assert made.count(2) == 1
    with pytest.raises(ZeroDivisionError):
        kept.get(3, lambda: bytes(1 // 0))
    assert kept.get(3, lambda: b"x") == b"x"
