from __future__ import annotations

import json
import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

import spkd as package
from spkd.corpus.audio import AudioError, change_speed, decode, probe, resample

from ..conftest import torchaudio


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_decoding_is_exact_for_16_bit_files(tmp_path: Path) -> None:
    samples = np.random.RandomState(0).randint(-(2**15), 2**15, 8000).astype(np.int16)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{suffix}", samples, 16_000)
        assert np.array_equal(decode(str(tmp_path / f"a.{suffix}")).wave, samples / np.float32(2**15))
        part = decode(str(tmp_path / f"a.{suffix}"), 0.1, 0.2).wave
        assert np.array_equal(part, samples[1600:4800] / np.float32(2**15))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(440, rate), rate, subtype="FLOAT")
    decoded = decode(str(tmp_path / "a.wav"))
    assert decoded.rate == rate
    inner = slice(800, 7200)  # away from the edges
    assert np.abs(decoded.wave[inner] - tone(440, 16_000)[inner]).max() < 2e-3


def test_resampling_agrees_with_scipy() -> None:
    wave = np.random.RandomState(0).randn(4800).astype(np.float32)
    wave = scipy.signal.sosfilt(scipy.signal.butter(8, 0.25, output="sos"), wave).astype(np.float32)
    ours, theirs = resample(wave, 48_000, 16_000), scipy.signal.resample_poly(wave, 1, 3)
    assert len(ours) == len(theirs)
    assert np.abs(ours - theirs)[50:-50].max() < 0.02 * np.abs(theirs).max()


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(200, 16_000), tone(300, 16_000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    decoded = decode(str(tmp_path / "a.wav"))
    assert decoded.channels == 2
    assert np.allclose(decoded.wave, (left + right) / 2, atol=1e-6)


def test_speed_shifts_pitch_and_length() -> None:
    faster = change_speed(tone(440, 16_000, 1.0).astype(np.float32), 1.1)
    assert abs(len(faster) - 16_000 / 1.1) < 2
    peak = np.argmax(np.abs(np.fft.rfft(faster))) * 16_000 / len(faster)
    assert abs(peak - 440 * 1.1) < 2
    wave = np.ones(10, np.float32)
    assert change_speed(wave, 1.0) is wave


def test_bad_files_say_why(tmp_path: Path) -> None:
    empty, text, nan, nothing = (tmp_path / f"{n}.wav" for n in ("empty", "text", "nan", "nothing"))
    empty.touch()
    text.write_text("not audio")
    soundfile.write(nan, np.array([0.0, np.nan, 0.1]), 16_000, subtype="FLOAT")
    soundfile.write(nothing, np.zeros(0), 16_000)
    for path, reason in (
        (tmp_path / "none.wav", "no such file"),
        (empty, "empty file"),
        (text, "cannot be decoded"),
        (nan, "not finite"),
        (nothing, "no samples"),
    ):
        with pytest.raises(AudioError, match=reason):
            decode(str(path))
    for path, reason in ((empty, "empty file"), (text, "cannot be decoded"), (nothing, "no samples")):
        with pytest.raises(AudioError, match=reason):
            probe(str(path))


def with_total(path: Path, total: int) -> None:
    """Change the number of samples in a FLAC header (STREAMINFO, 36 bits), as streamed recorders leave it."""
    data = bytearray(path.read_bytes())
    assert data[:4] == b"fLaC"
    at = 8 + 13  # marker, block header, the fields before it
    data[at] = (data[at] & 0xF0) | (total >> 32)
    data[at + 1 : at + 5] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("total", [0, 2**36 - 1, 2**35])
def test_a_flac_header_that_lies_about_its_length(tmp_path: Path, total: int) -> None:
    samples = (1000 * np.random.RandomState(0).randn(8000)).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", samples, 16_000)
    with_total(tmp_path / "a.flac", total)
    path = str(tmp_path / "a.flac")
    assert probe(path) == 0.5
    assert np.array_equal(decode(path).wave, samples / np.float32(2**15))
    assert len(decode(path, 0.1, 0.2).wave) == 3200


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_header_that_lies_about_its_length(tmp_path: Path, size: int) -> None:
    samples = (1000 * np.random.RandomState(0).randn(8000)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(bytes(data))
    assert probe(str(tmp_path / "a.wav")) == 0.5
    assert len(decode(str(tmp_path / "a.wav")).wave) == 8000


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    for call in (probe, decode):
        with pytest.raises(AudioError, match="not a regular file"):
            call(str(tmp_path / "a.wav"))
        with pytest.raises(AudioError, match="no such file"):
            call(str(tmp_path / "\udcff.wav"))


def test_clipping_is_remarked_on_after_coders_resamplers_and_changes_of_level(tmp_path: Path) -> None:
    """In speech of which a part was clipped at 48 or 16 kHz, on both sides or on one; never in speech as it is."""

    def remarked(gain: float, limit: float = 1.0) -> dict[str, bool]:
        loud = np.clip(gain * speech / np.abs(speech).max(), -1, limit)
        finer = np.clip(scipy.signal.resample_poly(gain * speech / np.abs(speech).max(), 3, 1), -1, limit)
        whole = scipy.signal.resample_poly(finer, 1, 3)
        files = {
            "plain.wav": (loud, 16_000),
            "down.wav": (0.2 * loud, 16_000),
            "coded.mp3": (loud, 16_000),
            "coded.ogg": (0.5 * loud, 16_000),
            "resampled.wav": (whole, 16_000),
            "normalised.wav": (whole / np.abs(whole).max(), 16_000),
            "phone.wav": (scipy.signal.resample_poly(finer, 1, 6), 8_000),
        }
        for name, (wave, rate) in files.items():
            soundfile.write(tmp_path / name, wave, rate, **({"subtype": "FLOAT"} if name.endswith("wav") else {}))
        return {name: decode(str(tmp_path / name)).remark.startswith("are clipped") for name in files}

    for path in sorted((Path(package.__file__).parent / "demo" / "people").glob("*/*.flac")):
        speech = soundfile.read(path)[0]
        assert not any(remarked(1.0).values()), path
        for gain, limit in ((6.0, 1.0), (20.0, 1.0), (40.0, 1.0), (20.0, 0.7)):
            assert all((found := remarked(gain, limit)).values()), (path, gain, limit, found)


def test_float_samples_at_integer_scale_are_refused(tmp_path: Path) -> None:
    wave = tone(440, 16_000)
    soundfile.write(tmp_path / "loud.wav", 3 * wave, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "integer.wav", 32_768 * wave, 16_000, subtype="FLOAT")
    assert decode(str(tmp_path / "loud.wav")).wave.max() == pytest.approx(1.5, abs=1e-3)
    with pytest.raises(AudioError, match="at integer scale; divide them by 32768"):
        decode(str(tmp_path / "integer.wav"))


@pytest.mark.parametrize("rate", [22_255, 44_101, 15_999, 7_993])
def test_awkward_rates_give_what_the_usual_way_gives(rate: int) -> None:
    wave = tone(440, rate, 0.3).astype(np.float32)
    found = resample(wave, rate, 16_000)
    expected = _reference(wave.astype(np.float64), rate, 16_000)
    assert found.shape == expected.shape
    assert np.abs(found - expected)[50:-50].max() < 2e-4


RATES = [(8_000, 16_000), (44_100, 16_000), (48_000, 16_000), (9, 10), (11, 10), (95, 100)]


@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampling_is_frozen(source: int, target: int) -> None:
    """Views of caches that are there must come out the same, whatever libraries are installed."""
    wave = np.random.RandomState(0).uniform(-1, 1, 3000).astype(np.float32)
    found = resample(wave, source, target)
    frozen = json.loads(Path(__file__).with_name("resampled.json").read_text())[f"{source}/{target}"]
    assert len(found) == frozen["length"]
    assert np.allclose(found[:: len(found) // 20][:20], frozen["every"], rtol=0, atol=5e-7)
    if torchaudio is None:
        return
    from torchaudio.functional import resample as reference

    assert np.array_equal(found, reference(torch.from_numpy(wave), source, target).numpy())


def write_compressed(
    path: Path, wave: np.ndarray, rate: int, codec: str, options: dict[str, str] | None = None, **container: str
) -> None:
    """(samples, channels) as an AAC, Opus, ... file, by PyAV."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        layout = stream.layout = "mono" if wave.shape[1] == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T.astype(np.float32)), "fltp", layout)
        frame.sample_rate = rate
        fifo = av.AudioFifo()
        fifo.write(frame)
        while (part := fifo.read(1024, partial=True)) is not None:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *(
            ("m4a", "aac"),
            ("mp4", "aac"),
            ("aac", "aac"),
            ("mkv", "aac"),
            ("m4b", "aac"),
            ("mov", "aac"),
            ("3gp", "aac"),
        ),
        *(("mka", "aac"), ("avi", "aac"), ("flv", "aac"), ("wv", "wavpack"), ("tta", "tta")),
    ],
)
def test_what_libsndfile_cannot_decode_is_decoded_by_ffmpeg(tmp_path: Path, suffix: str, codec: str) -> None:
    rate, path = 44_100, tmp_path / f"a.{suffix}"
    wave = np.stack([tone(440, rate, 2.0), tone(440, rate, 2.0)], 1)
    write_compressed(path, wave, rate, codec)
    assert probe(str(path)) == pytest.approx(2.0, abs=0.1)
    whole = decode(str(path))
    assert (whole.rate, whole.channels) == (rate, 2)
    expected = tone(440, 16_000, 2.0)
    offset = int(np.argmax(np.correlate(whole.wave[:4000], expected[:2000])))
    assert np.abs(whole.wave[offset + 500 : offset + 20_000] - expected[500:20_000]).max() < 0.05
    part = decode(str(path), 0.5, 0.75)
    assert len(part.wave) == 12_000
    assert np.abs(part.wave[100:-100] - whole.wave[8_100:19_900]).max() < 1e-3


def test_a_start_far_into_a_compressed_file_is_sought(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    wave = 0.1 * np.repeat(random.standard_normal(75 * 40), 400)[:, None]
    write_compressed(tmp_path / "long.m4a", wave, 16_000, "aac")
    whole = decode(str(tmp_path / "long.m4a")).wave
    part = decode(str(tmp_path / "long.m4a"), 70.0, 2.0).wave
    assert len(part) == 32_000
    difference = np.abs(part - whole[70 * 16_000 : 72 * 16_000])  # AAC fills some bands with noise of its own
    assert difference.mean() < 1e-3 * np.abs(part).mean()
    assert np.array_equal(part, decode(str(tmp_path / "long.m4a"), 70.0, 2.0).wave)


def test_a_track_that_begins_late_is_read_from_its_own_start(tmp_path: Path) -> None:
    """The times of packets begin at 5 s, and not at 0, which is where the whole file, as FFmpeg decodes it, begins."""
    av = pytest.importorskip("av")
    wave = (0.1 * np.repeat(np.random.RandomState(0).standard_normal(75 * 40), 400)).astype(np.float32)
    with av.open(str(tmp_path / "late.m4a"), "w") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        for first in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, first : first + 1024], "fltp", "mono")
            frame.sample_rate, frame.time_base, frame.pts = 16_000, Fraction(1, 16_000), first + 5 * 16_000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with av.open(str(tmp_path / "late.m4a")) as file:
        assert file.streams.audio[0].start_time * file.streams.audio[0].time_base > 4
        whole = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    for start in (30.0, 70.0):
        part = decode(str(tmp_path / "late.m4a"), start, 1.0).wave
        expected = whole[round(start * 16_000) :][:16_000]
        assert np.abs(part - expected).mean() < 1e-3 * np.abs(expected).mean()


def write_with_pause(path: Path, wave: np.ndarray, rate: int, codec: str, pause: tuple[float, float]) -> None:
    """Write a file whose times jump.

    Args:
        pause: where the pause is, and how long (s).
    """
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 64_000
        stream.codec_context.open()
        planar = av.AudioResampler(format=stream.codec_context.format.name)
        size = stream.codec_context.frame_size or 1024
        for first in range(0, len(wave), size):
            frame = av.AudioFrame.from_ndarray(wave[None, first : first + size], "fltp", "mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = first + round(pause[1] * rate) * (first >= pause[0] * rate)
            for part in planar.resample(frame):
                file.mux(stream.encode(part))
        file.mux(stream.encode(None))


def by_time(path: Path) -> np.ndarray:
    """Waveform in which each frame that FFmpeg decodes lies at its time."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        rate = file.streams.audio[0].rate
        frames = [(float(f.pts * f.time_base), f.to_ndarray().reshape(-1)) for f in file.decode(audio=0)]
    wave = np.zeros(round(frames[-1][0] * rate) + len(frames[-1][1]), np.float32)
    for time, samples in frames:
        wave[round(time * rate) :][: len(samples)] = samples
    return wave


@pytest.mark.parametrize(
    ("name", "codec", "rate"), [("a.m4a", "aac", 16_000), ("a.mka", "flac", 16_000), ("a.opus", "libopus", 48_000)]
)
def test_where_times_jump_there_is_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, rate: int
) -> None:
    """A recording that was paused: all starts, the whole and the measured duration go by the times of FFmpeg."""
    monkeypatch.setattr("spkd.corpus.ffmpeg.FAR", 6.0)
    wave = (0.1 * np.repeat(np.random.RandomState(0).standard_normal(10 * 40), rate // 40)).astype(np.float32)
    write_with_pause(tmp_path / name, wave, rate, codec, (3.0, 2.5))
    expected = by_time(tmp_path / name)
    if expected.max() > 1:  # 16-bit integers
        expected = expected / 32768
    expected = resample(expected, rate, 16_000)
    assert len(expected) == pytest.approx(12.5 * 16_000, abs=1_600)
    assert probe(str(tmp_path / name)) == pytest.approx(len(expected) / 16_000, abs=0.1)
    whole = decode(str(tmp_path / name)).wave
    assert len(whole) == len(expected)
    assert np.abs(whole - expected).max() < 1e-5
    for start in (1.0, 2.8, 4.0, 5.3, 5.9, 6.1, 7.0, 10.0):
        part = decode(str(tmp_path / name), start, 0.6).wave
        there = expected[round(start * 16_000) :][: len(part)]
        assert len(part) == 9_600
        assert np.abs(part - there).mean() < 1e-2 * np.abs(expected).mean()  # AAC has noise of its own


def test_where_times_go_back_samples_are_counted_on(tmp_path: Path) -> None:
    """FLV files put together: the times of the second begin at 0 again, and its pause is kept."""
    write_with_pause(tmp_path / "a.flv", tone(440, 44_100, 4.0).astype(np.float32), 44_100, "aac", (2.0, 1.5))
    data = (tmp_path / "a.flv").read_bytes()
    (tmp_path / "b.flv").write_bytes(data + data[13:])  # without the header of the second
    once, twice = (len(decode(str(tmp_path / name)).wave) for name in ("a.flv", "b.flv"))
    assert once == pytest.approx(5.5 * 16_000, abs=1_600)
    assert twice == pytest.approx(2 * once, abs=2)
    assert probe(str(tmp_path / "b.flv")) == pytest.approx(twice / 16_000, abs=1e-4)


def test_an_absurd_jump_of_times_is_refused(tmp_path: Path) -> None:
    wave = np.full(5 * 16_000, 0.1, np.float32)
    write_with_pause(tmp_path / "a.mka", wave, 16_000, "flac", (3.0, 1e6))
    assert len(decode(str(tmp_path / "a.mka"), 1.0, 1.0).wave) == 16_000
    for read in (decode, probe):
        with pytest.raises(AudioError, match="its times jump by 1000000 s"):
            read(str(tmp_path / "a.mka"))


@pytest.mark.parametrize(("name", "codec"), [("a.wma", "wmav2"), ("a.avi", "pcm_s16le"), ("a.wav", "libmp3lame")])
def test_a_header_that_counts_from_elsewhere_is_no_duration(tmp_path: Path, name: str, codec: str) -> None:
    """The length in the header of ASF counts a late beginning, that of FFmpeg's AVI is longer than the audio, and the
    length of MP3 in WAV is an estimate.
    """
    write_with_pause(tmp_path / name, np.full(60 * 44_100, 0.1, np.float32), 44_100, codec, (0.0, 5.0))
    assert abs(probe(str(tmp_path / name)) * 16_000 - len(decode(str(tmp_path / name)).wave)) <= 1


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "GSM610"), ("wav", "G721_32"), ("au", "G721_32")])
def test_codings_in_which_nothing_can_be_sought_are_read_forwards(tmp_path: Path, suffix: str, subtype: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(440, 8_000, 3.0), 8_000, subtype=subtype)
    whole, _ = soundfile.read(path, dtype="float32")
    for start in (0.1, 1.7):
        part = decode(str(path), start, 0.5).wave
        expected = resample(whole[round(start * 8_000) :][:4_000], 8_000, 16_000)
        assert np.array_equal(part, expected)


def test_the_blocks_of_a_voc_file_are_no_samples(tmp_path: Path) -> None:
    """FFmpeg writes a block for each 1,024 samples."""
    wave = tone(440, 16_000, 2.0)
    write_compressed(tmp_path / "a.voc", wave[:, None], 16_000, "pcm_s16le")
    assert probe(str(tmp_path / "a.voc")) == 2.0
    assert np.abs(decode(str(tmp_path / "a.voc")).wave - wave).max() < 1e-4
    assert np.abs(decode(str(tmp_path / "a.voc"), 0.5, 0.25).wave - wave[8_000:12_000]).max() < 1e-4


def test_a_start_far_into_a_file_with_rounded_times_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spkd.corpus.ffmpeg.FAR", 3.0)
    wave = 0.1 * np.repeat(np.random.RandomState(0).standard_normal(6 * 100), 110)[:, None]
    write_compressed(tmp_path / "a.mkv", wave, 11_025, "aac")  # Matroska has times in milliseconds
    whole, part = decode(str(tmp_path / "a.mkv")).wave, decode(str(tmp_path / "a.mkv"), 5.0, 0.5).wave
    assert np.abs(part[100:-100] - whole[80_100:87_900]).max() < 1e-4


def test_damaged_compressed_files_and_playlists_are_refused(tmp_path: Path) -> None:
    write_compressed(tmp_path / "a.m4a", tone(440, 16_000)[:, None], 16_000, "aac")
    data = (tmp_path / "a.m4a").read_bytes()
    for name, content in (("cut.m4a", data[:300]), ("text.m4a", b"no audio"), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioError, match="cannot be decoded|empty file|holds no"):
            decode(str(tmp_path / name))
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'a.m4a'}\n")
    with pytest.raises(AudioError, match="cannot be decoded"):
        decode(str(tmp_path / "list.m4a"))


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.m4a").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"needs PyAV to be decoded: pip install 'spkd\[codecs\]'"):
        probe(str(tmp_path / "a.m4a"))


def _reference(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """Windowed-sinc interpolation, sample by sample, in float64 (torchaudio.functional.resample's formula)."""
    cutoff = 0.99 * min(source, target)
    out = np.zeros(math.ceil(len(wave) * target / source))
    time = np.arange(len(wave)) / source
    for n in range(len(out)):
        t = cutoff * (time - n / target)
        near = np.abs(t) < 6
        t = t[near]
        out[n] = (wave[near] * np.sinc(t) * np.cos(np.pi * t / 12) ** 2).sum() * cutoff / source
    return out
