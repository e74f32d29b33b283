"""Files of segments as NIST's tools, pyannote, Kaldi and WeSpeaker write them."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus.audio import AudioError
from spkd.corpus.manifest import Manifest
from spkd.corpus.utterance import Utterance
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.find import speech_alone
from spkd.corpus.vad.segments import ListedSegments
from spkd.errors import SpkdError, UsageError

# NIST RT-09's evaluation plan, appendix A; pyannote.core's Annotation.write_rttm has <NA> for the speaker's type.
RTTM = """;; a comment
SPKR-INFO call-1 1 <NA> <NA> <NA> unknown speaker1 <NA> <NA>
SPEAKER call-1 1 0.500 1.000 <NA> <NA> speaker1 <NA> <NA>
SPEAKER call-1 1 1.250 0.750 <NA> <NA> speaker2 <NA> <NA>
SPEAKER call-1 1 3.000 0.125 <NA> <NA> speaker1 <NA>
NON-SPEECH call-1 1 4.000 1.000 <NA> noise <NA> <NA> <NA>
SPEAKER call-2 1 0 0.25 <NA> <NA> speaker1 <NA> <NA>
SPEAKER call-2 2 1.0 0.25 <NA> <NA> speaker2 <NA> <NA>
"""
KALDI = "call-1-0000050-0000200 call-1 0.5 2.0\ncall-1-0000300-0000313 call-1 3.0 3.125\ncall-3-1 call-3 9.5 -1\n"
WESPEAKER = "call-1-00000050-00000200 call-1 0.500 2.000\ncall-1-00000300-00000313 call-1 3.000 3.125\n"


def utterance(name: str, seconds: float = 10.0, start: float = 0.0, channel: int | None = None) -> Utterance:
    return Utterance(name, f"/data/{name}.wav", "a", seconds, start, channel)


def silence(tmp_path: Path, seconds: float) -> str:
    soundfile.write(tmp_path / "silence.wav", np.zeros(round(16_000 * seconds), np.int16), 16_000)
    return str(tmp_path / "silence.wav")


def listed(tmp_path: Path, text: str) -> ListedSegments:
    (tmp_path / "speech").write_text(text)
    return ListedSegments(tmp_path / "speech")


@pytest.mark.parametrize("text", [RTTM, KALDI, WESPEAKER, "call-1 0.5 2.0\n\ncall-1 3 3.125\n"])
def test_every_format_gives_the_stretches_of_a_recording(tmp_path: Path, text: str) -> None:
    segments = listed(tmp_path, text)
    assert segments.stretches(utterance("call-1")) == [(8000, 32_000), (48_000, 50_000)]
    with pytest.raises(AudioError, match="not in the file of segments"):
        segments.stretches(utterance("another"))
    assert str(segments.card) == "segments"


def test_a_file_of_many_segments(tmp_path: Path) -> None:
    names = [f"call-{number}" for number in range(5000)]
    segments = listed(tmp_path, "".join(f"{name}-a {name} 0.5 2.0\n{name}-b {name} 3.0 3.125\n" for name in names))
    assert all(segments.stretches(utterance(name)) == [(8000, 32_000), (48_000, 50_000)] for name in names)


def test_a_gzipped_file(tmp_path: Path) -> None:
    (tmp_path / "x.rttm.gz").write_bytes(gzip.compress(RTTM.encode()))
    finder = finder_of(str(tmp_path / "x.rttm.gz"))
    assert finder is not None
    assert finder.stretches(utterance("call-1")) == [(8000, 32_000), (48_000, 50_000)]


def test_times_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    """An utterance that is cut from a recording takes its part of the recording's segments."""
    cut = Utterance("call-1-b", "/data/call-1.flac", "a", 2.05, 1.5)
    assert listed(tmp_path, KALDI).stretches(cut) == [(0, 8000), (24_000, 26_000)]
    short = Utterance("call-1", silence(tmp_path, 10.0), "a", 1.0)
    assert listed(tmp_path, KALDI).stretches(short) == [(8000, 16_000)]
    assert listed(tmp_path, KALDI).stretches(utterance("call-3", 10.0)) == [(152_000, 160_000)]


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("call-1 0 3000\n", "3000"),  # in ms
        ("call-1-a call-1 0 48000\ncall-1-b call-1 64000 96000\n", "96000"),  # in samples
        ("SPEAKER call-1 1 1 2 <NA> <NA> A <NA> <NA>\nSPEAKER call-1 1 100 6 <NA> <NA> A <NA> <NA>\n", "106"),
        ("call-1 12 -1\n", "12"),
        ("call-1 1 10.51\n", "10.51"),
    ],
)
def test_segments_beyond_the_end_of_their_file_are_a_reason_to_reject_it(tmp_path: Path, text: str, last: str) -> None:
    """Those of another file, and in another unit: clipped, they would be all of the audio, or none."""
    path = silence(tmp_path, 10.0)
    reason = rf"its segments go up to {last} s, but its file ends at 10 s; are they in seconds"
    for used in (Utterance("call-1", path, "a", 10.0), Utterance("call-1", path, "a", 4.0, 1.0)):
        cut, left_out = speech_alone(Manifest((used,)), listed(tmp_path, text))
        assert len(cut) == 0
        assert re.match(reason, left_out["call-1"])


def test_an_end_that_is_rounded_up_is_cut_off(tmp_path: Path) -> None:
    """Kaldi's extract-segments cuts off up to 0.5 s by default (--max-overshoot), and leaves out what has more."""
    recording = Utterance("call-1", silence(tmp_path, 10.0), "a", 10.0)
    assert listed(tmp_path, "call-1 1 10.49\n").stretches(recording) == [(16_000, 160_000)]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("id10270/5r0dWxy17C8/00001.wav", "/data/vox.tar#1536+320044.wav"),  # an id of the layout voxceleb
        ("shard-3/00001", "/data/shard-3.tar#1536+320044.flac"),  # a key that repeats among containers
        ("00001", "/data/wav.ark#10+0.ark"),
        ("a/00001.wav", "/data/0.parquet#7+0.wav.row:audio"),
        ("any", "https://host/vox/00001.wav?version=1.2"),
        ("any", "s3://bucket/vox/00001.flac"),
    ],
)
def test_segments_of_audio_in_containers_and_elsewhere_are_found_by_its_name(
    tmp_path: Path, name: str, path: str
) -> None:
    found = listed(tmp_path, "00001 2 4\n")
    assert found.stretches(Utterance(name, path, "a", 10.0)) == [(32_000, 64_000)]
    with pytest.raises(AudioError, match="not in the file of segments"):
        found.stretches(Utterance("id10270/x/00002.wav", "/data/vox.tar#400000+320044.wav", "a", 10.0))


def test_channels_of_rttm_count_from_1(tmp_path: Path) -> None:
    segments = listed(tmp_path, RTTM)
    assert segments.stretches(utterance("call-2", channel=1)) == [(16_000, 20_000)]
    assert segments.stretches(utterance("call-2", channel=0)) == [(0, 4000)]
    assert segments.stretches(utterance("call-2")) == [(0, 4000), (16_000, 20_000)]
    second = listed(tmp_path, "SPEAKER a 2 0.5 0.25 <NA> <NA> A <NA> <NA>\n")
    assert [second.stretches(utterance("a", channel=number)) for number in (0, 1)] == [[], [(8000, 12_000)]]
    # Where all are of one channel, tools wrote 1 for any.
    assert segments.stretches(utterance("call-1", channel=1)) == [(8000, 32_000), (48_000, 50_000)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "call-1 0.5\n",
            r"speech:1: expected a line of RTTM, or `\[name\] recording start end` \(s\), found 'call-1 0.5'",
        ),
        ("\na call-1 2.0 1.0\n", r"speech:2: the end \(1.0 s\) is before the start \(2.0 s\)"),
        ("call-1 x 1.0\n", "speech:1: 'x' is no time in seconds"),
        ("call-1 0.5 nan\n", "speech:1: 'nan' is no time in seconds"),
        ("call-1 -0.5 1\n", "speech:1: '-0.5' is no time in seconds"),
        ("SPEAKER call-1 1 0.5 -1 <NA> <NA> a <NA> <NA>\n", "speech:1: '-1' is no time in seconds"),
        (";; nothing\n", "speech: holds no segments"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SpkdError, match=reason):
        listed(tmp_path, text)


def test_the_name_of_several_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "speech").write_text("00001 0.5 2.0\n")
    several = Manifest(tuple(Utterance(f"{s}/00001.wav", f"/data/{s}/00001.wav", s, 3.0) for s in ("a", "b")))
    with pytest.raises(
        SpkdError, match=r"'00001' is the name of several files, /data/a/00001.wav and /data/b/00001.wav"
    ):
        speech_alone(several, finder_of(str(tmp_path / "speech")))
    (tmp_path / "speech").write_text("a/00001.wav 0.5 2.0\nb/00001.wav 1 2\n")
    cut, left_out = speech_alone(several, finder_of(str(tmp_path / "speech")))
    assert [u.duration for u in cut] == [1.5, 1.0]
    assert left_out == {}


def test_a_name_that_is_neither_a_detector_nor_a_file() -> None:
    with pytest.raises(UsageError, match=r"vad=silerro: none, silero, energy or a file of segments; did you mean"):
        finder_of("silerro")
    assert finder_of("none") is None
