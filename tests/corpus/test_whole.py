"""Files whose header does not tell their length are read whole, as FFmpeg (by PyAV) reads them."""

from __future__ import annotations

import io
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from spkd.corpus.audio import AudioError, decode, probe

from .test_audio import tone, write_compressed

VARIABLE = {"flags": "+qscale", "global_quality": "472"}  # lame's -V 4
WITHOUT_XING = {"write_xing": "0", "id3v2_version": "0"}


def ffmpeg(path: Path) -> np.ndarray:
    """(samples,) the whole file as FFmpeg decodes it, averaged over the channels."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        return np.concatenate([frame.to_ndarray().mean(0) for frame in file.decode(audio=0)])


def speech_like(rate: int, channels: int = 1, seconds: float = 8.0) -> np.ndarray:
    """(samples, channels): noise, silence and a tone, which take very different bit rates."""
    noise, silence = (
        0.2 * np.random.RandomState(0).randn(round(rate * seconds / 4)),
        np.zeros(round(rate * seconds / 4)),
    )
    return np.concatenate([noise, silence, tone(300, rate, seconds / 2)])[:, None].repeat(channels, 1)


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_mp3_of_variable_rate_without_a_header(tmp_path: Path, rate: int, channels: int) -> None:
    path = tmp_path / "a.mp3"
    write_compressed(path, speech_like(rate, channels), rate, "libmp3lame", VARIABLE, **WITHOUT_XING)
    expected = ffmpeg(path)
    assert soundfile.info(path).frames < 0.8 * len(expected)  # what libsndfile takes for the whole
    assert probe(str(path)) == pytest.approx(len(expected) / rate, abs=1e-9)
    if rate == 16_000:
        assert np.abs(decode(str(path)).wave - expected).max() < 1e-4
        # The tone has small frames, which lean on many before them.
        assert np.abs(decode(str(path), 5.0, 2.0).wave - expected[5 * rate : 7 * rate]).max() < 1e-4
    else:
        assert len(decode(str(path)).wave) == -(-len(expected) * 16_000 // rate)


def test_what_lies_behind_the_frames_of_an_mp3_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    write_compressed(path, speech_like(16_000), 16_000, "libmp3lame", VARIABLE, **WITHOUT_XING)
    expected = ffmpeg(path)
    with open(path, "ab") as file:
        file.write(b"\xff" * (2 << 20))
    start = time.process_time()
    assert probe(str(path)) == len(expected) / 16_000
    assert np.abs(decode(str(path)).wave - expected).max() < 1e-4
    assert time.process_time() - start < 3
    os.truncate(path, 6 << 30)
    with pytest.raises(AudioError, match=r"a.mp3: cannot be decoded .* of its 6,442,450,944 bytes are holes"):
        probe(str(path))


def test_a_start_within_an_mp3_file_with_a_header(tmp_path: Path) -> None:
    write_compressed(tmp_path / "a.mp3", speech_like(16_000), 16_000, "libmp3lame", VARIABLE)
    expected = ffmpeg(tmp_path / "a.mp3")
    assert probe(str(tmp_path / "a.mp3")) == len(expected) / 16_000 == 8.0
    assert np.abs(decode(str(tmp_path / "a.mp3"), 5.0, 2.0).wave - expected[80_000:112_000]).max() < 1e-4


def test_mp3_files_put_together(tmp_path: Path) -> None:
    for name, hertz, rate in (("a", 300, 16_000), ("b", 900, 16_000), ("c", 900, 22_050)):
        write_compressed(tmp_path / f"{name}.mp3", tone(hertz, rate, 2.0)[:, None], rate, "libmp3lame")
    a, b, c = ((tmp_path / f"{name}.mp3").read_bytes() for name in "abc")
    (tmp_path / "ab.mp3").write_bytes(a + b)
    wave = decode(str(tmp_path / "ab.mp3")).wave
    assert probe(str(tmp_path / "ab.mp3")) == len(wave) / 16_000 == pytest.approx(4.1, abs=0.1)
    first = decode(str(tmp_path / "a.mp3")).wave
    assert np.abs(wave[: len(first) - 600] - first[:-600]).max() < 1e-4
    assert np.argmax(np.abs(np.fft.rfft(wave[-16_000:]))) == 900
    (tmp_path / "ac.mp3").write_bytes(a + c)
    with pytest.raises(AudioError, match="sampling rate or number of channels changes"):
        probe(str(tmp_path / "ac.mp3"))
    (tmp_path / "tagged.mp3").write_bytes(b"ID3\4\0\0\0\0\0\4abcd" + a + b"TAG" + bytes(125))
    assert probe(str(tmp_path / "tagged.mp3")) == 2.0


@pytest.mark.parametrize("kind", [{"format": "OGG"}, {"format": "OGG", "subtype": "OPUS"}])
def test_ogg_streams_one_after_the_other(tmp_path: Path, kind: dict[str, Any]) -> None:
    contents, waves = [], []
    for hertz, seconds in ((300, 1.0), (500, 2.0), (700, 0.5)):
        file = io.BytesIO()
        soundfile.write(file, tone(hertz, 16_000, seconds), 16_000, **kind)
        contents.append(file.getvalue())
        waves.append(soundfile.read(io.BytesIO(contents[-1]), dtype="float32")[0])
    path = tmp_path / "a.ogg"
    path.write_bytes(b"".join(contents))
    expected = np.concatenate(waves)
    assert probe(str(path)) == 3.5
    assert len(ffmpeg(path)) / (48_000 if "subtype" in kind else 16_000) == pytest.approx(3.5, abs=0.05)
    assert np.array_equal(decode(str(path)).wave, expected)
    assert np.abs(decode(str(path), 2.5, 0.75).wave - expected[40_000:52_000]).max() < 1e-3
    assert len(decode(str(path), 3.25, 1.0).wave) == 4_000
    file = io.BytesIO()
    soundfile.write(file, tone(300, 16_000), 8_000, **kind)
    path.write_bytes(contents[0] + file.getvalue())
    with pytest.raises(AudioError, match="sampling rate or number of channels changes"):
        decode(str(path))


def test_opus_whose_times_begin_late(tmp_path: Path) -> None:
    """Granules of a stream that was cut begin late; the 312 samples before the audio are left out all the same."""
    av = pytest.importorskip("av")
    wave = (0.1 * np.repeat(np.random.RandomState(0).standard_normal(300), 480)).astype(np.float32)
    for name, late in (("a.opus", 0), ("b.opus", 48_000 * 5)):
        with av.open(str(tmp_path / name), "w", format="ogg") as file:
            stream = file.add_stream("libopus", rate=48_000, layout="mono")
            for first in range(0, len(wave), 960):
                frame = av.AudioFrame.from_ndarray(wave[None, first : first + 960], "flt", "mono")
                frame.sample_rate, frame.time_base, frame.pts = 48_000, Fraction(1, 48_000), first + late
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    usual, late = (decode(str(tmp_path / name)).wave for name in ("a.opus", "b.opus"))
    assert np.array_equal(usual, late)
    assert np.array_equal(decode(str(tmp_path / "b.opus"), 1.0, 0.5).wave.shape, (8_000,))


def test_wav_from_a_pipe(tmp_path: Path) -> None:
    path, samples = tmp_path / "a.wav", (1000 * np.random.RandomState(0).randn(8000)).astype(np.int16)
    soundfile.write(path, samples, 16_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = data[4:8] = bytes(4)
    path.write_bytes(data)
    assert probe(str(path)) == 0.5
    assert np.array_equal(decode(str(path)).wave, ffmpeg(path) / np.float32(2**15))
    path.write_bytes(data[: at + 4] + b"LIST\4\0\0\0abcdid3 \1\0\0\0x\0")
    with pytest.raises(AudioError, match="holds no samples"):
        probe(str(path))


@pytest.mark.parametrize("kind", ["WAVEX", "RF64", "AU"])
def test_sizes_that_were_never_filled_in(tmp_path: Path, kind: str) -> None:
    samples, file = (1000 * np.random.RandomState(0).randn(8000)).astype(np.int16), io.BytesIO()
    soundfile.write(file, samples, 16_000, format=kind, subtype="PCM_16")
    data, path = bytearray(file.getvalue()), tmp_path / ("a.au" if kind == "AU" else "a.wav")
    if kind == "AU":
        data[8:12] = bytes(4)
    elif kind == "RF64":
        data[20:44] = bytes(24)  # sizes of the file and of the samples, and the number of samples, in the chunk ds64
    else:
        at = data.index(b"data") + 4
        data[at : at + 4] = data[4:8] = bytes(4)
    path.write_bytes(data)
    assert probe(str(path)) == 0.5
    assert np.array_equal(decode(str(path)).wave, samples / np.float32(2**15))
    path.write_bytes(data[: len(data) - 2 * len(samples)])
    with pytest.raises(AudioError, match="holds no samples|cannot be decoded"):
        probe(str(path))


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_raw_aac_is_counted(tmp_path: Path, rate: int) -> None:
    write_compressed(tmp_path / "a.aac", speech_like(rate), rate, "aac", {"b": "32000"})
    assert probe(str(tmp_path / "a.aac")) == pytest.approx(len(ffmpeg(tmp_path / "a.aac")) / rate, abs=1e-9)
