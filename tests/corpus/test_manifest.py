from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus import manifest as manifest_module
from spkd.corpus import shards
from spkd.corpus.audio import AudioError, decode, probe
from spkd.corpus.manifest import Manifest, Utterance, build, measure
from spkd.errors import SpkdError, UsageError

from .test_audio import write_compressed


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
        ("utt,path\na,x.wav\na,y.wav\nnot read\n", "duplicate utterance id 'a'"),
        ("path\nx.wav\nx.wav\nnot,read\n", "duplicate utterance id '.*x.wav@0.0'"),
        ("utt,path,speaker,duration\na,x.wav,s,long\n", "m.csv:2: duration is not a number"),
        ("utt,path,duration\na,x.wav,-2\n", "m.csv:2: duration and start must not be negative"),
        ("utt,path\na,x.wav,surplus\n", "m.csv:2: expected 2 columns"),
        ("utt,path\na\n", "m.csv:2: expected 2 columns"),
        ("name,thing\na,b\n", "m.csv:1: the first line must name"),
        ("utt,path\n", "holds no utterances"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(SpkdError, match=expected):
        Manifest.load(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("rows", "ids", "way"),
    [
        (["1,0", "1,1", "2,0", "2,"], ["1.wav:0", "1.wav:1", "2.wav:0", "2.wav"], "`path:channel`"),
        (
            ["1,0,0.5", "1,1,0.5", "1,1,2"],
            ["1.wav@0.5:0", "1.wav@0.5:1", "1.wav@2.0:1"],
            "`path@start:channel`",
        ),
        (["1,0,0.5", "1,1,2"], ["1.wav@0.5", "1.wav@2.0"], "`path@start`"),
    ],
)
def test_sides_of_a_conversation_have_ids_of_their_own(
    tmp_path: Path, rows: list[str], ids: list[str], way: str
) -> None:
    """A telephone conversation has a speaker on each channel."""
    columns = "path,channel" + ",start" * (rows[0].count(",") - 1)
    (tmp_path / "m.csv").write_text("\n".join([columns, *(row.replace(",", ".wav,", 1) for row in rows)]))
    manifest = Manifest.load(tmp_path / "m.csv")
    assert [u.id for u in manifest] == ids
    (note,) = manifest.notes
    assert note.endswith(f"whose ids are {way}: {len(rows)}")


def test_a_missing_or_unknown_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="spkd manifest"):
        Manifest.load(tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"wav\.scp"):
        Manifest.load(tmp_path)
    (tmp_path / "m.xyz").write_text("x")
    with pytest.raises(UsageError, match="unknown manifest format"):
        Manifest.load(tmp_path / "m.xyz")
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpkdError, match="not UTF-8"):
        Manifest.load(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("layout", "file", "utterance", "speaker"),
    [
        ("voxceleb", "wav/id10270/5r0dWxy17C8/00001.wav", "id10270/5r0dWxy17C8/00001.wav", "id10270"),
        ("voxceleb", "dev/id00012/21Uxsk56VDQ/00001.flac", "id00012/21Uxsk56VDQ/00001.wav", "id00012"),
        ("voxceleb", "audio/id000000/DwgYRqnQZHM/00000.wav", "id000000/DwgYRqnQZHM/00000.wav", "id000000"),  # VoxBlink2
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


@pytest.mark.parametrize(("files", "speakers", "is_noted"), [(20, 1, True), (19, 1, False), (20, 2, False)])
def test_many_files_of_one_speaker_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture, files: int, speakers: int, is_noted: bool
) -> None:
    for number in range(files):
        path = tmp_path / f"s{number % speakers}" / f"u{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.ones(400), 16_000)
    build(tmp_path)
    note = f"all of {files} files are of one speaker, 's0', by the layout folder; if they are of several, choose"
    assert (note in capsys.readouterr().out) == is_noted


@pytest.mark.parametrize(
    ("files", "speakers", "parts"),
    [
        (["train/S1/a.wav", "dev/S2/a.wav", "test/S3/x/a.wav"], ["S1", "S2", "S3"], "dev, test, train"),  # AISHELL
        (["wav/train/S1/a.wav", "wav/test/S3/a.wav"], ["S1", "S3"], "wav/test, wav/train"),
        (["TRAIN/DR1/FCJF0/1.wav", "TEST/DR2/MABC0/1.wav"], ["FCJF0", "MABC0"], "TEST/DR2, TRAIN/DR1"),  # TIMIT
        (["train-clean-100/1/2/a.wav", "test_other/3/4/b.wav"], ["1", "3"], "test_other, train-clean-100"),
        (["audio/train/1/a.wav", "audio/test-short/2/b.wav"], ["1", "2"], "audio/test-short, audio/train"),
        (
            ["data_aishell/wav/train/S0002/a.wav", "data_aishell/wav/test/S0005/a.wav"],
            ["S0002", "S0005"],
            "data_aishell",
        ),
        (["TIMIT/TRAIN/DR1/F1AK0/a.wav", "TIMIT/TRAIN/DR2/F2AK0/a.wav"], ["F1AK0", "F2AK0"], "TIMIT/TRAIN/DR1"),
        (["mls_english/train/audio/103/1/a.wav", "mls_english/dev/audio/7/1/a.wav"], ["103", "7"], "mls_english/dev"),
        (["wav48_silence_trimmed/p225/a.wav", "wav48_silence_trimmed/p226/a.wav"], ["p225", "p226"], "wav48_silence"),
        (["train/SPEECHDATA/wav/SV2/a.wav", "train/SPEECHDATA/wav/SV3/a.wav"], ["SV2", "SV3"], "train/SPEECHDATA/wav"),
        (["male/bob/a.wav", "female/ann/a.wav"], ["ann", "bob"], "female, male"),
        (["session1/ann/a.wav", "session2/ann/b.wav"], ["ann"], "session1, session2"),
        (["clean/ann/a.wav", "noisy/ann/b.wav"], ["ann"], "clean, noisy"),
        (
            ["LibriTTS/train-clean-100/19/1/a.wav", "LibriTTS/train-clean-100/26/1/a.wav", "VCTK/wav48/p225/a.wav"],
            ["19", "26", "p225"],
            "LibriTTS/train-clean-100, VCTK/wav48",
        ),
        (["iOS/data/wav/C0001/a.wav", "iOS/data/wav/C0002/a.wav"], ["C0001", "C0002"], "iOS/data/wav"),  # AISHELL-2
        (["ann/wav/day/a.wav", "bob/wav/day/a.wav"], ["ann", "bob"], ""),
        (["train/a.wav", "ann/b.wav"], ["ann", "train"], ""),
        (["testa/x/a.wav", "training day/x/b.wav"], ["testa", "training day"], ""),
    ],
)
def test_parts_of_a_corpus_are_not_speakers(
    tmp_path: Path, capsys: pytest.CaptureFixture, files: list[str], speakers: list[str], parts: str
) -> None:
    for file in files:
        write_audio(tmp_path / file)
    made, layout, left_out = build(tmp_path)
    assert (made.speakers, layout, left_out) == (speakers, "folder", {})
    assert sorted(u.id for u in made) == sorted(files)
    out = capsys.readouterr().out
    assert (f"speakers are the folders within {parts}" in out) == bool(parts)
    assert ("in several of them, each taken for one person: ann" in out) == (speakers == ["ann"])


@pytest.mark.parametrize(
    ("files", "note"),
    [
        (["train/bob/a.wav", "ann/b.wav"], "train beside ann are taken for speakers; if not, make a manifest"),
        (
            [f"{language}/spk{i}/a.wav" for language in ("de", "en") for i in range(3)],
            "the speakers are de, en, and not the 6 folders within (de/spk0, ...); if not",
        ),
        (
            ["de/clips/a.mp3", "en/clips/b.mp3"],  # Common Voice
            "the speakers are de, en, and not the 2 folders within (de/clips, ...); if not, make a manifest",
        ),
        (["iphone/ann/a.wav", "pc/ann/b.wav"], "the speakers are iphone, pc, and not the 2 folders within (iphone/ann"),
        ([f"s{i}/a.wav" for i in range(3)], ""),
        ([f"s{i}/day{i}/a.wav" for i in range(3)], ""),
        ([f"s{i}/{video}/a.wav" for i in range(11) for video in "xy"], ""),
    ],
)
def test_folders_that_may_be_no_speakers_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture, files: list[str], note: str
) -> None:
    for file in files:
        write_audio(tmp_path / file)
    build(tmp_path)
    out = capsys.readouterr().out
    assert note in out
    assert ("note: " in out) == bool(note)


LISTS = {  # as the corpora have them, by the recipes of Kaldi, 3D-Speaker, Hyperion and entries to FFSVC22
    "sitw": {"lists/enroll-core.lst": "12013 audio/unaob.flac\n", "keys/core-core.lst": "12013 audio/lmvnx.flac tgt\n"},
    "sdsv": {"docs/train_labels.txt": "train-file-id speaker-id phrase-id\ntrn_000001 spk_000007 03\n"},
    "ffsvc": {"dev_meta_list": "Original_Name FFSVC2022_Name\nT0344_344I1M_1_0307_normal ffsvc22_dev_000000\n"},
    "3d-speaker": {
        "files/train_wav.scp": "0001_Device01 train/0001/0001_Device01.wav\n",
        "files/train_utt2spk": "0001_Device01 0001\n",
        "files/test_wav.scp": "9_Device02 test/9/9_Device02.wav\n",
        "files/test_utt2spk": "9_Device02 9\n",
    },
    "common-voice": {
        "validated.tsv": 'client_id\tpath\tsentence\nab12\tcommon_voice_en_1.wav\tSo "it is.\n',
        "dev.tsv": "client_id\tpath\tsentence\ncd34\tcommon_voice_en_2.wav\tYes.\n",
        "clip_durations.tsv": "clip\tduration[ms]\ncommon_voice_en_1.wav\t500\n",
    },
}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("sitw", {"audio/unaob.flac": ("audio/unaob.flac", None), "audio/lmvnx.wav": ("audio/lmvnx.flac", None)}),
        (
            "sdsv",
            {
                "wav/train/trn_000001.wav": ("trn_000001", "spk_000007"),
                "wav/enrollment/enr_000001.wav": ("enr_000001", None),
                "wav/evaluation/evl_000002.wav": ("evl_000002", None),
            },
        ),
        ("ffsvc", {"dev/ffsvc22_dev_000000.wav": ("ffsvc22_dev_000000.wav", "0344")}),
        (
            "3d-speaker",
            {
                "train/0001/0001_Device01.wav": ("0001_Device01", "0001"),
                "test/9/9_Device02.wav": ("9_Device02", "9"),
            },
        ),
        (
            "common-voice",
            {
                "clips/common_voice_en_1.wav": ("common_voice_en_1", "ab12"),
                "clips/common_voice_en_2.wav": ("common_voice_en_2", "cd34"),
            },
        ),
    ],
)
def test_speakers_are_those_of_the_lists_of_a_corpus(
    tmp_path: Path, layout: str, expected: dict[str, tuple[str, str | None]]
) -> None:
    """In a folder of the corpus, and in a tar of it that holds the lists, too."""
    for name, text in LISTS[layout].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in expected:
        write_audio(tmp_path / name)
    for asked in (layout, None):
        made, found, left_out = build(tmp_path, asked)
        assert (found, left_out) == (layout, {})
        assert {u.path: (u.id, u.speaker) for u in made} == {str(tmp_path / k): v for k, v in expected.items()}
    with tarfile.open(tmp_path / "corpus.tar", "w") as tar:
        for path in sorted(path for path in tmp_path.iterdir() if path.is_dir() or path.suffix != ".tar"):
            tar.add(path, path.name)
    for asked in (None, layout):
        shards.index([tmp_path / "corpus.tar"], tmp_path / "elsewhere" / "m.csv", asked)
        loaded = Manifest.load(tmp_path / "elsewhere" / "m.csv")
        assert {(u.id, u.speaker) for u in loaded} == set(expected.values())
        assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["m.csv"]


def test_common_voice_as_it_is_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Releases hold languages, and these their tables and `clips`."""
    for language in ("de", "en"):
        write_audio(tmp_path / "cv-corpus-23.0" / language / "clips" / f"common_voice_{language}_1.wav")
        write_audio(tmp_path / "cv-corpus-23.0" / language / "clips" / f"common_voice_{language}_2.wav")
        rows = "".join(f"ab{n}{language}\tcommon_voice_{language}_{n}.wav\tYes.\n" for n in (1, 2))
        (tmp_path / "cv-corpus-23.0" / language / "validated.tsv").write_text("client_id\tpath\tsentence\n" + rows)
    speakers = [f"ab{n}{language}" for n in (1, 2) for language in ("de", "en")]
    for folder, expected in (("", speakers), ("en", speakers[1::2]), ("en/clips", speakers[1::2])):
        made, layout, left_out = build(tmp_path / "cv-corpus-23.0" / folder)
        assert (layout, made.speakers, left_out) == ("common-voice", expected, {})
    with tarfile.open(tmp_path / "cv-en.tar", "w") as tar:
        tar.add(tmp_path / "cv-corpus-23.0", "cv-corpus-23.0")
    shards.index([tmp_path / "cv-en.tar"], tmp_path / "m.csv")
    assert {u.id: u.speaker for u in Manifest.load(tmp_path / "m.csv")} == {
        f"common_voice_{language}_{n}": f"ab{n}{language}" for n in (1, 2) for language in ("de", "en")
    }


def test_lists_beside_the_tars_of_a_corpus(tmp_path: Path) -> None:
    """3D-Speaker is downloaded as test.tar and train.tar, with the folder `files` beside these."""
    for name, text in LISTS["3d-speaker"].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for part, name in (("train", "train/0001/0001_Device01.wav"), ("test", "test/9/9_Device02.wav")):
        write_audio(tmp_path / name)
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            tar.add(tmp_path / part, part)
    shards.index([tmp_path / "train.tar", tmp_path / "test.tar"], tmp_path / "m.csv")
    assert [(u.id, u.speaker) for u in Manifest.load(tmp_path / "m.csv")] == [
        ("0001_Device01", "0001"),
        ("9_Device02", "9"),
    ]


def test_one_speaker_of_all_members_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_audio(tmp_path / "a.wav")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(20):
            tar.add(tmp_path / "a.wav", f"corpus/{number}.wav")
    shards.index([tmp_path / "x.tar"], tmp_path / "m.csv")
    assert "all of 20 utterances are of one speaker, 'corpus'; if they are of several" in capsys.readouterr().out


def test_lists_that_a_corpus_lacks_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio(tmp_path / "wav" / "train" / "trn_000001.wav")
    assert build(tmp_path)[0].speakers == []
    assert "no docs/train_labels.txt there or in the folder above: speakers are unknown" in capsys.readouterr().out
    # What no list names is left out, and counted.
    write_audio(tmp_path / "cv" / "clips" / "a.wav")
    write_audio(tmp_path / "cv" / "clips" / "b.wav")
    (tmp_path / "cv" / "other.tsv").write_text("client_id\tpath\nab12\ta.wav\n")
    made, layout, left_out = build(tmp_path / "cv")
    assert (layout, made.speakers, set(left_out)) == ("common-voice", ["ab12"], {"clips/b.wav"})


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (["84/121123/84-121123-0000.wav", "174/50561/174-50561-0000.wav"], "librispeech"),
        (["121123/84-121123-0000.wav", "121126/84-121126-0000.wav"], "folder"),
        (["ann/2021-03-05.wav", "bob/2021-03-06.wav"], "folder"),
        (["ann/2021/0001-2-1.wav", "bob/2021/0002-2-1.wav"], "folder"),
    ],
)
def test_librispeech_is_detected_by_its_folders_too(tmp_path: Path, files: list[str], layout: str) -> None:
    """Dates have the form of its names (SPEAKER-CHAPTER-UTTERANCE), which are within SPEAKER/CHAPTER."""
    for file in files:
        write_audio(tmp_path / file)
    made, detected, _ = build(tmp_path)
    assert detected == layout
    assert made.speakers == sorted({file.split("/")[0] for file in files})
    assert build(tmp_path, "librispeech")[0].speakers == sorted({Path(file).name.split("-")[0] for file in files})


def test_recordings_in_two_formats_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for file in ("ann/1.wav", "ann/1.flac", "ann/2.wav", "bob/1.wav"):
        write_audio(tmp_path / file)
    assert len(build(tmp_path)[0]) == 4
    assert "an utterance each: ann/1.flac, ann/1.wav; if they are one recording, choose with --suffix flac" in (
        capsys.readouterr().out
    )
    assert len(build(tmp_path, suffix="wav")[0]) == 3
    assert "--suffix" not in capsys.readouterr().out


def test_a_speaker_is_one_however_accents_are_written(tmp_path: Path) -> None:
    """Unicode has two forms of `José`: macOS writes the decomposed one into names of files."""
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    (tmp_path / "m.csv").write_text(f"path,speaker\na.wav,{composed}\nb.wav,{decomposed}\nc.wav,Zoe\u0308\n")
    manifest = Manifest.load(tmp_path / "m.csv")
    assert manifest.speakers == [composed, "Zo\u00eb"]
    assert manifest.notes == (f"speakers written in several Unicode forms, each taken for one person: {composed}",)
    write_audio(tmp_path / "wav" / decomposed / "a.wav")
    assert build(tmp_path / "wav")[0].speakers == [composed]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["dev/audio/a.flac", "eval/audio/b.flac"], "the speakers would be audio; make a manifest of each"),  # SITW
        (["ann-1.wav", "bob-1.wav"], r"fits the layout folder; choose another --layout \(3d-speaker, common-voice"),
    ],
)
def test_folders_without_speakers_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        write_audio(tmp_path / file)
    with pytest.raises(SpkdError, match=message):
        build(tmp_path)


def test_audio_of_other_suffixes_is_found_or_listed(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    for name, kind, subtype in (("a.oga", "OGG", "VORBIS"), ("b.w64", "W64", "PCM_16"), ("c.caf", "CAF", "PCM_16")):
        soundfile.write(tmp_path / "ann" / name, np.zeros(8000), 16_000, format=kind, subtype=subtype)
    soundfile.write(tmp_path / "ann" / "d.snd", np.zeros(8000), 16_000, format="AU", subtype="PCM_16")
    for name in ("e.wv1", "f.RAW", "g.txt"):
        (tmp_path / "ann" / name).write_bytes(b"x")
    made, _, left_out = build(tmp_path)
    assert [(u.id, u.duration) for u in made] == [(f"ann/{n}", 0.5) for n in ("a.oga", "b.w64", "c.caf", "d.snd")]
    assert sorted(left_out) == ["ann/e.wv1", "ann/f.RAW"]
    assert "is not decoded here; convert it to WAV or FLAC" in left_out["ann/e.wv1"]
    with pytest.raises(SpkdError, match=r"no audio files \(\.ape\)"):
        build(tmp_path, suffix="ape")


def test_parts_of_a_corpus_without_folders_of_speakers_are_refused(tmp_path: Path) -> None:
    for file in ("train/a.wav", "dev/b.wav"):
        write_audio(tmp_path / file)
    with pytest.raises(SpkdError, match="the speakers would be dev, train; make a manifest of each"):
        build(tmp_path)


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
    ("name", "count", "first"),
    [
        ("manifest.csv", 3, ("ann-1", 4.25)),
        ("manifest.jsonl", 3, ("ann-1", 4.25)),
        ("cuts.jsonl", 2, ("ann-1", 4.25)),
        ("kaldi", 2, ("ann-1", 4.25)),
        ("speechbrain.csv", 2, ("ann-1", 4.25)),
        ("speechbrain.json", 1, ("ann-1", 4.25)),
        ("3d-speaker.csv", 2, ("ann-1", 4.25)),
        ("raw.list", 1, ("ann-1", 4.25)),
        ("common-voice.tsv", 1, ("1", None)),
        ("train_list.txt", 2, ("ann/1.flac", None)),
    ],
)
def test_the_documented_examples_load(name: str, count: int, first: tuple[str, float | None]) -> None:
    examples = Path(__file__).parents[2] / "manifests" / "examples"
    loaded = Manifest.load(examples / name)
    assert len(loaded) == count
    folder = examples / ("kaldi" if name == "kaldi" else "")
    assert loaded[0] == Utterance(first[0], str(folder / "ann/1.flac"), "ann", first[1])
    if count > 1 and name in ("speechbrain.csv", "3d-speaker.csv", "manifest.csv", "cuts.jsonl"):
        assert (loaded[1].id, loaded[1].start, round(loaded[1].duration or 0.0, 6)) == ("ann-2", 61.5, 3.1)


def loaded(folder: Path, name: str, content: str | bytes) -> list[Utterance]:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return list(Manifest.load(folder / name))


EXPECTED = ("a", "x.wav", "s 1", 2.5)


@pytest.mark.parametrize(
    "content",
    [
        "utt,path,speaker,duration\na,x.wav,s 1,2.5\n",
        "\ufeffutt, path, speaker, duration\r\na, x.wav, s 1, 2.5\r\n\r\n",
        "utt;path;speaker;duration\ra;x.wav;s 1;2.5\r",
        "utt\tpath\tspeaker\tduration\na\tx.wav\ts 1\t2.5\n",
        'UTT,Path,Speaker,Duration\n"a","x.wav","s 1","2.5"\n',
        "ID,wav,spk_id,duration\na,x.wav,s 1,2.5\n",
    ],
)
def test_tables_as_other_tools_write_them(tmp_path: Path, content: str) -> None:
    for name, data in (("m.csv", content.encode()), ("m.csv.gz", gzip.compress(content.encode()))):
        (u,) = loaded(tmp_path, name, data)
        assert (u.id, Path(u.path).name, u.speaker, u.duration) == EXPECTED


@pytest.mark.parametrize("unknown", ["", "-1", "0", "nan", "NaN", "None", "-1.0", "null"])
def test_an_unknown_duration_or_speaker_is_no_value(tmp_path: Path, unknown: str) -> None:
    (u,) = loaded(tmp_path, "m.csv", f"utt,path,speaker,duration\na,x.wav,,{unknown}\n")
    assert (u.speaker, u.duration) == (None, None)


def test_speechbrains_start_and_stop_are_samples(tmp_path: Path) -> None:
    (u,) = loaded(tmp_path, "m.csv", "ID,duration,wav,start,stop,spk_id\nid1--x,60.0,x.wav,16000,64000,id1\n")
    assert (u.id, u.speaker, u.start, u.duration) == ("id1--x", "id1", 1.0, 3.0)
    with pytest.raises(SpkdError, match=r"m\.csv:2: stop is not after start"):
        loaded(tmp_path, "m.csv", "ID,duration,wav,start,stop,spk_id\na,6.0,x.wav,9,9,id1\n")


def test_a_list_of_paths_is_a_manifest(tmp_path: Path) -> None:
    found = loaded(tmp_path, "m.txt", "# mine\r\na/1.wav\r\nb c/2.wav\r\n")
    assert [u.id for u in found] == ["a/1.wav", "b c/2.wav"]


def test_a_speaker_that_is_a_number_is_a_name(tmp_path: Path) -> None:
    (u,) = loaded(tmp_path, "m.jsonl", '{"audio_filepath": "x.wav", "speaker": 7, "duration": 1}\n')
    assert u.speaker == "7"


CUT = {
    "id": "c",
    "start": 1.0,
    "duration": 2.0,
    "channel": 1,
    "recording": {"sources": [{"type": "file", "source": "x.wav", "channels": [0, 1]}]},
    "supervisions": [{"speaker": 5}],
}


def test_the_chosen_channel_is_the_one_that_is_decoded(tmp_path: Path) -> None:
    (u,) = loaded(tmp_path, "m.jsonl", json.dumps(CUT))
    assert (u.channel, u.speaker, u.start) == (1, "5", 1.0)
    two = [{"type": "file", "source": f"{c}.wav", "channels": [c]} for c in (0, 1)]
    (u,) = loaded(tmp_path, "m.jsonl", json.dumps(CUT | {"recording": {"sources": two}}))
    assert (Path(u.path).name, u.channel) == ("1.wav", None)
    (u,) = loaded(tmp_path, "m.jsonl", json.dumps(CUT | {"channel": [0, 1]}))
    assert u.channel is None
    with pytest.raises(SpkdError, match=r"m\.jsonl:1: a cut of several channels"):
        loaded(tmp_path, "m.jsonl", json.dumps(CUT | {"channel": [0, 1, 2]}))
    (u,) = loaded(tmp_path, "m.jsonl", '{"audio_filepath": "x.wav", "channel_selector": 1}')
    assert u.channel == 1
    soundfile.write(tmp_path / "x.wav", np.stack([np.zeros(16_000), 0.5 * np.ones(16_000)], 1), 16_000)
    assert decode(u.path, channel=1).wave.mean() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(AudioError, match="has 2 channels; channel 2"):
        decode(u.path, channel=2)
    Manifest((u,)).save(tmp_path / "out.csv")
    assert Manifest.load(tmp_path / "out.csv")[0].channel == 1
    assert Manifest((u,)).digest != Manifest((dataclasses.replace(u, channel=0),)).digest


@pytest.mark.parametrize(
    "change",
    [
        {"duration": float("nan")},
        {"supervisions": "x"},
        {"supervisions": [{"speaker": []}]},
        {"recording": 5},
        {"id": {}},
    ],
)
def test_a_cut_with_wrong_values_is_a_line(tmp_path: Path, change: dict) -> None:
    with pytest.raises(SpkdError, match=r"m\.jsonl:1: "):
        loaded(tmp_path, "m.jsonl", json.dumps(CUT | change))


def kaldi(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def test_kaldis_dialects_of_segments(tmp_path: Path) -> None:
    data = kaldi(
        tmp_path / "d", wav_scp="rec x.wav\n", segments="a rec 1.5 -1\nb rec 0 2 1\nc rec 0 2 B\n", utt2spk="a s\n"
    )
    a, b, c = Manifest.load(data)
    assert (a.start, a.duration, a.channel, a.speaker) == (1.5, None, None, "s")
    assert (b.duration, b.channel, c.channel) == (2.0, 1, 1)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"wav_scp": "a x.wav\na y.wav\n"}, r"wav\.scp:2: 'a' is already in .*wav\.scp:1"),
        ({"wav_scp": "a x.wav\n", "utt2spk": "a s\na t\n"}, r"utt2spk:2: 'a' is already in"),
        ({"wav_scp": "a x.wav\n", "segments": "u a 2 1\n"}, r"segments:1: the segment ends before"),
        ({"wav_scp": "a x.wav\n", "segments": "u a 2\n"}, r"segments:1: expected"),
        ({"wav_scp": "a x.wav\n", "segments": "u b 0 1\n"}, r"segments:1: recording 'b' is not in"),
        ({"wav_scp": "a x.wav\n", "utt2dur": "a nan-ish\n"}, r"is not a number"),
        ({"wav_scp": "a sox x.wav |\n"}, r"wav\.scp:1: commands are not run"),
    ],
)
def test_kaldi_folders_that_cannot_be_read(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    with pytest.raises(SpkdError, match=expected):
        Manifest.load(kaldi(tmp_path / "d", **files))


@pytest.mark.parametrize(
    "content",
    ["utt,path\n\x00,x\n", 'utt,path\n"a,x\n', "utt,path\na," + "x" * 200_000, "utt,path,start\na,x.wav,inf\n"],
    ids=range(4),
)
def test_a_table_that_is_none_is_a_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(SpkdError, match=r"m\.csv"):
        loaded(tmp_path, "m.csv", content)


def test_links_are_followed_once(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "ann"
    real.mkdir(parents=True)
    soundfile.write(real / "1.wav", np.zeros(1600), 16_000)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "ann").symlink_to(real)
    (corpus / "again").symlink_to(real)
    (real / "circle").symlink_to(corpus)
    (real / "2.wav").symlink_to(real / "1.wav")
    (corpus / "broken.wav").symlink_to(corpus / "nothing.wav")
    made, _, _ = build(corpus, "folder")
    assert len(made) == 1
    assert made[0].speaker in ("ann", "again")


def test_files_that_no_manifest_can_name_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    soundfile.write(tmp_path / "ann" / "1.wav", np.zeros(1600), 16_000)
    good = (tmp_path / "ann" / "1.wav").read_bytes()
    with open(os.fsencode(tmp_path) + b"/ann/\xfc.wav", "wb") as file:
        file.write(good)
    (tmp_path / "ann" / "a\nb.wav").write_bytes(good + b"\0\0")
    os.mkfifo(tmp_path / "ann" / "fifo.wav")
    made, _, left_out = build(tmp_path, "folder")
    assert [u.id for u in made] == ["ann/1.wav"]
    assert sorted(left_out.values()) == ["its name holds control characters", "its name is not UTF-8"]


def test_copies_in_two_formats_are_named_with_a_way_to_choose(tmp_path: Path) -> None:
    folder = tmp_path / "id10001" / "abcdefghijk"
    folder.mkdir(parents=True)
    for suffix in ("wav", "flac"):
        soundfile.write(folder / f"00001.{suffix}", np.zeros(1600), 16_000)
    with pytest.raises(SpkdError, match=r"00001\.flac and .*00001\.wav would both be .*--suffix wav"):
        build(tmp_path)
    assert build(tmp_path, suffix="flac")[0][0].path.endswith(".flac")


def test_compressed_audio_is_found(tmp_path: Path) -> None:
    """VoxCeleb2 as it is downloaded."""
    folder = tmp_path / "aac" / "id00012" / "21Uxsk56VDQ"
    folder.mkdir(parents=True)
    write_compressed(folder / "00001.m4a", np.zeros((16_000, 1)), 16_000, "aac")
    (folder / "00002.m4a").write_bytes(b"no audio")
    made, layout, left_out = build(tmp_path / "aac")
    assert layout == "voxceleb"
    assert [u.id for u in made] == ["id00012/21Uxsk56VDQ/00001.wav"]
    assert made[0].duration == pytest.approx(1.0, abs=0.1)
    assert "cannot be decoded" in next(iter(left_out.values()))


def test_a_duration_in_another_unit_is_rejected_with_the_reason(tmp_path: Path) -> None:
    manifest = Manifest((Utterance("a", "x.wav", None, 1e18), Utterance("b", "y.wav", None, 4.0)))
    kept, rejected = measure(manifest)
    assert [u.id for u in kept] == ["b"]
    assert "durations are in seconds" in rejected["a"]


def test_a_measurement_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spkd: Callable
) -> None:
    """A kill after the second of three groups of files: only the third is measured, and a file that changed."""
    folder, opened = tmp_path / "audio" / "ann", list[str]()
    for number in range(5):
        write_audio(folder / f"{number}.wav", 0.5 + number / 10)
    (folder / "5.wav").write_bytes(b"none")
    monkeypatch.setattr(manifest_module, "CHUNK", 2)

    def probed(path: str) -> float:
        if len(opened) == stops:
            raise KeyboardInterrupt
        opened.append(Path(path).name)
        return probe(path)

    monkeypatch.setattr(manifest_module, "probe", probed)
    stops = 4
    with contextlib.suppress(BaseException):
        spkd("manifest", tmp_path / "audio", "--out", "m.csv", "--workers", 1)
    assert sorted(opened) == [f"{number}.wav" for number in range(4)]
    assert sorted(path.name for path in Path("m.csv.parts").iterdir()) == ["measured-0.json", "measured-1.json"]
    write_audio(folder / "2.wav", 3.0)
    opened.clear()
    stops = 100
    spkd("manifest", tmp_path / "audio", "--out", "m.csv", "--workers", 1).ok()
    assert sorted(opened) == [f"{number}.wav" for number in (2, 3, 4, 5)]
    assert [u.duration for u in Manifest.load("m.csv")] == [0.5, 0.6, 3.0, 0.8, 0.9]
    assert not Path("m.csv.parts").exists()


def test_a_column_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("utt,path,speaker,gender\na,a.wav,x,f\n")
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "speaker": "x", "gender": "f"}\n')
    for file in ("m.csv", "m.jsonl"):
        with pytest.raises(UsageError, match="no column 'gendr', or nothing in it; did you mean 'gender'?"):
            Manifest.load(tmp_path / file, ["gendr"])
