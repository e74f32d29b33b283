from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.errors import SpkdError, UsageError
from spkd.manifest import Manifest, Utterance, build, measure


def write_audio(path: Path, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * 16_000)), 16_000)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_is_saved_is_loaded(tmp_path: Path, suffix: str) -> None:
    made = Manifest(
        (
            Utterance("a", str(tmp_path / "x" / "a.wav"), "s1", 1.25),
            Utterance("b,\"'ü", "/elsewhere/b.wav", None, None, 0.5),
        )
    )
    made.save(tmp_path / f"m.{suffix}")
    loaded = Manifest.load(tmp_path / f"m.{suffix}")
    assert loaded.utterances == made.utterances
    assert loaded.digest == made.digest


def test_gzip_and_nemo_keys(tmp_path: Path) -> None:
    line = json.dumps({"audio_filepath": "a.wav", "duration": 2, "label": "s", "offset": 1.5})
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    assert Manifest.load(tmp_path / "m.jsonl.gz")[0] == Utterance("a", str(tmp_path / "a.wav"), "s", 2.0, 1.5)


def test_lhotse_cuts(tmp_path: Path) -> None:
    cut = {
        "id": "c1",
        "start": 1.0,
        "duration": 2.0,
        "type": "MonoCut",
        "supervisions": [{"speaker": "s"}],
        "recording": {"sources": [{"type": "file", "channels": [0], "source": "a.wav"}]},
    }
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut))
    assert Manifest.load(tmp_path / "cuts.jsonl")[0] == Utterance("c1", str(tmp_path / "a.wav"), "s", 2.0, 1.0)


def test_kaldi_folders(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("r1 a.wav\nr2 b.wav\n")
    (tmp_path / "utt2spk").write_text("r1 s1\nr2 s2\nr1-0 s1\n")
    assert [u.speaker for u in Manifest.load(tmp_path)] == ["s1", "s2"]
    (tmp_path / "utt2dur").write_text("r1 1.5\nr2 2\n")
    assert Manifest.load(tmp_path).seconds == 3.5
    (tmp_path / "segments").write_text("r1-0 r1 0.5 1.25\n")
    assert Manifest.load(tmp_path)[0] == Utterance("r1-0", str(tmp_path / "a.wav"), "s1", 0.75, 0.5)
    (tmp_path / "wav.scp").write_text("r1 sox a.wav -t wav - |\n")
    with pytest.raises(SpkdError, match="commands are not run"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("utt,path\na,x.wav\na,y.wav\n", "duplicate utterance id 'a'"),
        ("utt,path,speaker,duration\na,x.wav,s,long\n", "m.csv:2: duration or start is not a number"),
        ("utt,path,duration\na,x.wav,-1\n", "m.csv:2: duration and start must not be negative"),
        ("utt,path\na,x.wav,surplus\n", "m.csv:2: expected 2 columns"),
        ("utt,path\na\n", "m.csv:2: expected 2 columns"),
        ("name,file\na,b\n", "m.csv:1: the first line must name"),
        ("utt,path\n", "holds no utterances"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(SpkdError, match=expected):
        Manifest.load(tmp_path / "m.csv")


def test_a_missing_or_unknown_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="spkd manifest"):
        Manifest.load(tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"wav\.scp"):
        Manifest.load(tmp_path)
    (tmp_path / "m.txt").write_text("x")
    with pytest.raises(UsageError, match="unknown manifest format"):
        Manifest.load(tmp_path / "m.txt")
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpkdError, match="not a UTF-8"):
        Manifest.load(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("layout", "file", "utterance", "speaker"),
    [
        ("voxceleb", "wav/id10270/5r0dWxy17C8/00001.wav", "id10270/5r0dWxy17C8/00001.wav", "id10270"),
        ("voxceleb", "dev/id00012/21Uxsk56VDQ/00001.flac", "id00012/21Uxsk56VDQ/00001.wav", "id00012"),
        ("librispeech", "dev-clean/84/121123/84-121123-0000.flac", "84-121123-0000", "84"),
        ("cnceleb", "data/id00000/singing-01-001.flac", "id00000/singing-01-001", "id00000"),
        ("cnceleb", "eval/enroll/id00800-enroll.flac", "id00800-enroll", "id00800"),
        ("cnceleb", "eval/test/id00800-singing-01-001.flac", "test/id00800-singing-01-001.wav", "id00800"),
        ("folder", "ann/day1/a.wav", "ann/day1/a.wav", "ann"),
    ],
)
def test_layouts_name_utterances_as_the_trial_lists_do(
    tmp_path: Path, layout: str, file: str, utterance: str, speaker: str
) -> None:
    write_audio(tmp_path / file)
    for asked in (layout, None):
        made, found, left_out = build(tmp_path, asked)
        assert (found, left_out) == (layout, {})
        assert [(u.id, u.speaker, u.duration) for u in made] == [(utterance, speaker, 0.5)]


def test_building_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    write_audio(tmp_path / "ann" / "a.wav")
    (tmp_path / "ann" / "b.wav").write_bytes(b"no audio")
    (tmp_path / "ann" / "c.wav").touch()
    made, _, left_out = build(tmp_path, "folder")
    assert [u.id for u in made] == ["ann/a.wav"]
    assert set(left_out) == {"ann/b.wav", "ann/c.wav"}
    assert left_out["ann/c.wav"] == "empty file"


def test_building_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        build(tmp_path / "none")
    with pytest.raises(SpkdError, match="no audio files"):
        build(tmp_path)
    write_audio(tmp_path / "ann" / "a.wav")
    with pytest.raises(SpkdError, match="fits the layout voxceleb"):
        build(tmp_path, "voxceleb")
    with pytest.raises(UsageError, match="did you mean 'voxceleb'"):
        build(tmp_path, "voxcleb")


def test_the_digest_ignores_where_the_audio_lies_and_sees_everything_else() -> None:
    one = Manifest((Utterance("a", "x/a.wav", "s", 1.0),))
    assert one.digest == Manifest((Utterance("a", "/y/a.wav", "s", 1.0),)).digest
    for other in (
        Utterance("b", "", "s", 1.0),
        Utterance("a", "", "t", 1.0),
        Utterance("a", "", "s", 1.1),
        Utterance("a", "", "s", 1.0, 2.0),
    ):
        assert one.digest != Manifest((other,)).digest


def test_measuring_fills_durations_and_lists_the_unreadable(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 0.75)
    made = Manifest((Utterance("a", str(tmp_path / "a.wav")), Utterance("b", str(tmp_path / "b.wav"))))
    measured, rejected = measure(made)
    assert [(u.id, u.duration) for u in measured] == [("a", 0.75)]
    assert rejected == {"b": "no such file"}


@pytest.mark.parametrize(
    ("name", "count"), [("manifest.csv", 3), ("manifest.jsonl", 3), ("cuts.jsonl", 1), ("kaldi", 2)]
)
def test_the_documented_examples_load(name: str, count: int) -> None:
    examples = Path(__file__).parents[1] / "manifests" / "examples"
    loaded = Manifest.load(examples / name)
    assert len(loaded) == count
    assert loaded[0] == Utterance(
        "ann-1", str(examples / ("kaldi" if name == "kaldi" else "") / "ann/1.flac"), "ann", 4.25
    )
