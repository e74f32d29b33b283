"""Manifests of other tools that name audio within containers, as these tools write them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from spkd.corpus.audio import AudioError, decode
from spkd.corpus.manifest import Manifest, measure
from spkd.errors import SpkdError, UsageError

from .test_containers import write_tar
from .test_shards import audio


def waves(manifest: Manifest) -> dict[str, np.ndarray]:
    """Id -> waveform of each utterance."""
    measured, rejected = measure(manifest)
    assert rejected == {}
    return {u.id: decode(u.path, u.start, u.duration, u.channel).wave for u in measured}


def samples(number: int, count: int = 8000) -> np.ndarray:
    """(count,) noise that 16 bits hold exactly."""
    return np.random.RandomState(number).randint(-8000, 8000, count) / 32_768


def test_wespeakers_shard_list(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for shard in range(2):
        members = []
        for number in range(2):
            key = f"s{shard}-{number}"
            members += [(f"{key}.spk", b"s%d" % shard), (f"{key}.wav", audio(seed=number, form="WAV"))]
        write_tar(tmp_path / f"shards_{shard}.tar", [*members, ("bad.wav", b"x")])
    (tmp_path / "shard.list").write_text("".join(f"{tmp_path}/shards_{n}.tar\n" for n in range(2)))
    manifest = Manifest.load(tmp_path / "shard.list")
    assert [(u.id, u.speaker, u.duration) for u in manifest] == [
        (f"s{shard}-{number}", f"s{shard}", 0.5) for shard in range(2) for number in range(2)
    ]
    assert "left out: 2 (first: " in capsys.readouterr().out
    assert len(Manifest.load(tmp_path / "shards_0.tar")) == 2
    (tmp_path / "shard.list").write_text("none.tar\n")
    with pytest.raises(UsageError, match="none.tar: no such file"):
        Manifest.load(tmp_path / "shard.list")


def write_ark(folder: Path, count: int = 4, **options: Any) -> dict[str, np.ndarray]:
    """Write wav.ark and wav.scp, as kaldiio does. Returns key -> samples."""
    kaldiio = pytest.importorskip("kaldiio")
    arrays = {f"spk{n % 2}-{n}": np.round(samples(n) * 32_768).astype(np.int16) for n in range(count)}
    for key, values in arrays.items():
        kaldiio.save_ark(f"{folder}/wav.ark", {key: (16_000, values)}, f"{folder}/wav.scp", append=True, **options)
    return arrays


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"write_function": "soundfile"},
        {"write_function": "soundfile", "write_kwargs": {"format": "flac", "subtype": "PCM_16"}},
    ],
)
def test_kaldis_archives(tmp_path: Path, options: dict[str, str]) -> None:
    arrays = write_ark(tmp_path, **options)
    (tmp_path / "utt2spk").write_text("".join(f"{key} {key.partition('-')[0]}\n" for key in arrays))
    of_folder, of_archive = Manifest.load(tmp_path), Manifest.load(tmp_path / "wav.ark")
    for manifest in (of_folder, of_archive):
        found = waves(manifest)
        assert list(found) == list(arrays)
        for key, values in arrays.items():
            assert np.array_equal(found[key], values / np.float32(32_768))
    assert of_folder.speakers == ["spk0", "spk1"]
    assert all(u.path.endswith("+0.ark") for u in of_folder)
    assert [u.path.rpartition(".")[2] for u in of_archive] == ["flac" if "flac" in str(options) else "wav"] * 4


def test_an_archive_that_changed_since_its_scp_was_read_is_refused(tmp_path: Path) -> None:
    write_ark(tmp_path)
    manifest = Manifest.load(tmp_path)
    Manifest(manifest).save(tmp_path / "m.csv")
    decode(manifest[1].path)
    content = (tmp_path / "wav.ark").read_bytes()
    (tmp_path / "wav.ark").write_bytes(content + b"x")
    with pytest.raises(AudioError, match="has changed since it was indexed"):
        decode(manifest[1].path)
    with pytest.raises(SpkdError, match="m.csv:2: .*wav.ark has changed since it was indexed"):
        Manifest.load(tmp_path / "m.csv")


def test_an_archive_of_copied_files(tmp_path: Path) -> None:
    """wav-copy puts the files one after the other, as they are."""
    with open(tmp_path / "x.ark", "wb") as file:
        for number in range(3):
            data = io.BytesIO()
            soundfile.write(data, samples(number), 16_000, format="WAV", subtype="PCM_24")
            file.write(b"utt%d " % number + data.getvalue())
    found = waves(Manifest.load(tmp_path / "x.ark"))
    assert all(np.allclose(found[f"utt{n}"], samples(n), atol=1e-7) for n in range(3))
    whole = (tmp_path / "x.ark").read_bytes()
    (tmp_path / "x.ark").write_bytes(whole[:-5])
    assert len(Manifest.load(tmp_path / "x.ark")) == 2
    at = len(whole) // 3
    (tmp_path / "x.ark").write_bytes(whole[:at] + b"?" * 9000 + whole[at:])
    assert len(Manifest.load(tmp_path / "x.ark")) == 1
    streamed = bytearray(whole)
    streamed[9:13] = b"\xff" * 4  # of a pipe: the size was never filled in
    (tmp_path / "x.ark").write_bytes(streamed)
    with pytest.raises(SpkdError, match="unknown length"):
        Manifest.load(tmp_path / "x.ark")


def test_flac_that_was_put_together_without_lengths_is_refused(tmp_path: Path) -> None:
    """Nothing tells where one ends: kaldiio's own load_ark stops at the first. What follows must not be left out."""
    kaldiio = pytest.importorskip("kaldiio")
    places = []
    with open(tmp_path / "x.ark", "wb") as file:
        for number in range(3):
            data = io.BytesIO()
            soundfile.write(data, samples(number), 16_000, format="FLAC", subtype="PCM_16")
            file.write(b"utt%d " % number)
            places.append(file.tell())
            file.write(data.getvalue())
    assert len(list(kaldiio.load_ark(str(tmp_path / "x.ark")))) == 1
    with pytest.raises(SpkdError, match="FLAC of unknown length, as another entry begins near byte"):
        Manifest.load(tmp_path / "x.ark")
    for place in places[:2]:
        with pytest.raises(AudioError, match="FLAC of unknown length"):
            decode(f"{tmp_path}/x.ark#{place}+0.ark")
    assert np.allclose(decode(f"{tmp_path}/x.ark#{places[2]}+0.ark").wave, samples(2), atol=1e-4)
    (tmp_path / "last.ark").write_bytes((tmp_path / "x.ark").read_bytes()[places[2] - 5 :])
    assert [u.id for u in Manifest.load(tmp_path / "last.ark")] == ["utt2"]


def test_espnets_dumps_are_relative_to_the_recipe(tmp_path: Path) -> None:
    data = tmp_path / "exp" / "dump" / "raw" / "dev"
    data.mkdir(parents=True)
    arrays = write_ark(data)
    text = (data / "wav.scp").read_text().replace(str(tmp_path / "exp") + "/", "")
    assert "dump/raw/dev/wav.ark:" in text
    (data / "wav.scp").write_text(text)
    (data / "segments").write_text("a spk0-0 0.1 0.3\nb spk1-1 0.0 -1\n")
    found = waves(Manifest.load(data))
    assert np.array_equal(found["a"], arrays["spk0-0"][1600:4800] / np.float32(32_768))
    assert np.array_equal(found["b"], arrays["spk1-1"] / np.float32(32_768))
    (data / "segments").unlink()
    (data / "wav.scp").write_text(text.replace("\n", "[0:100]\n"))
    with pytest.raises(SpkdError, match=r"wav.scp:1: a range \(\[0:100\]\)"):
        Manifest.load(data)


def test_a_path_of_two_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        write_ark(tmp_path / name, 1)
        (tmp_path / name / "wav.scp").write_text("a wav.ark:8\n")
        (tmp_path / name / "a.wav").write_bytes(audio(form="WAV"))
    monkeypatch.chdir(tmp_path / "test")
    assert len(Manifest.load("../test")) == 1
    for text in ("a wav.ark:8\n", "a a.wav\n"):
        (tmp_path / "train" / "wav.scp").write_text(text)
        with pytest.raises(SpkdError, match="wav.scp:1: .* is ../train/.* and .*/test/"):
            Manifest.load("../train")


def test_relative_paths_of_manifests_that_point_into_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nemo").mkdir()
    write_tar(tmp_path / "nemo" / "audio_0.tar", [("a.wav", audio(form="WAV"))])
    line = '{"audio_filepath": "a.wav", "duration": 0.5, "shard_id": 0}\n'
    (tmp_path / "nemo" / "tarred_audio_manifest.json").write_text(line)
    monkeypatch.chdir(tmp_path)
    ((_, wave),) = waves(Manifest.load("nemo/tarred_audio_manifest.json")).items()
    assert len(wave) == 8000


def test_an_archive_of_features_holds_no_audio(tmp_path: Path) -> None:
    kaldiio = pytest.importorskip("kaldiio")
    kaldiio.save_ark(str(tmp_path / "f.ark"), {"a": np.ones((3, 4), np.float32)}, scp=str(tmp_path / "wav.scp"))
    with pytest.raises(AudioError, match="archives of features hold none"):
        decode(Manifest.load(tmp_path)[0].path)


def write_nemo(folder: Path, tars: Path, suffix: str = "") -> None:
    """A corpus as NeMo's convert_to_tarred_audio_dataset.py leaves it: two tars, and a manifest of their members."""
    rows = []
    for shard in range(2):
        members = [(f"a_{shard}_{n}.wav", audio(1.0, "WAV", 10 * shard + n)) for n in range(2)]
        write_tar(tars / f"audio_{shard}{suffix}.tar", members)
        for name, _ in members:
            rows.append({"audio_filepath": name, "duration": 1.0, "text": "x", "label": f"s{shard}", "shard_id": shard})
    first = rows[0]["audio_filepath"]
    rows.append(rows[0] | {"audio_filepath": f"{first[:-4]}-sub1.wav", "offset": 0.25, "duration": 0.5})
    (folder / "tarred_audio_manifest.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nemos_tarred_manifests(tmp_path: Path) -> None:
    write_nemo(tmp_path, tmp_path)
    manifest = Manifest.load(tmp_path / "tarred_audio_manifest.json")
    assert [(u.id, u.speaker) for u in manifest] == [
        ("a_0_0", "s0"),
        ("a_0_1", "s0"),
        ("a_1_0", "s1"),
        ("a_1_1", "s1"),
        ("a_0_0-sub1", "s0"),
    ]
    found = waves(manifest)
    for shard in range(2):
        for n in range(2):
            expected, _ = soundfile.read(io.BytesIO(audio(1.0, "WAV", 10 * shard + n)), dtype="float32")
            assert np.array_equal(found[f"a_{shard}_{n}"], expected)
    assert np.array_equal(found["a_0_0-sub1"], found["a_0_0"][4000:12_000])


def test_names_that_repeat_among_the_tars_of_nemo(tmp_path: Path) -> None:
    rows = [{"audio_filepath": "a.wav", "duration": 1.0, "label": f"s{shard}", "shard_id": shard} for shard in range(2)]
    for shard in range(2):
        write_tar(tmp_path / f"audio_{shard}.tar", [("a.wav", audio(1.0, "WAV", shard))])
    (tmp_path / "t.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = Manifest.load(tmp_path / "t.json")
    assert [(u.id, u.speaker) for u in manifest] == [("0/a.wav", "s0"), ("1/a.wav", "s1")]
    for shard, wave in enumerate(waves(manifest).values()):
        expected, _ = soundfile.read(io.BytesIO(audio(1.0, "WAV", shard)), dtype="float32")
        assert np.array_equal(wave, expected)


def test_a_pattern_of_manifests_is_all_of_them(tmp_path: Path) -> None:
    write_nemo(tmp_path, tmp_path)
    (tmp_path / "sharded").mkdir()
    rows = (tmp_path / "tarred_audio_manifest.json").read_text().splitlines(keepends=True)
    for shard in range(2):
        mine = [row for row in rows if f'"shard_id": {shard}' in row]
        (tmp_path / "sharded" / f"manifest_{shard}.json").write_text("".join(mine))
    for pattern in ("manifest_{0..1}.json", "manifest__OP_0..1_CL_.json"):
        manifest = Manifest.load(tmp_path / "sharded" / pattern)
        assert [u.id for u in manifest] == ["a_0_0", "a_0_1", "a_0_0-sub1", "a_1_0", "a_1_1"]
    assert any(note == "columns not used: 'text'" for note in manifest.notes)
    for pattern, message in (("manifest_{0..2}.json", "manifest_2.json: no such manifest"), ("x.json", "no manifest")):
        with pytest.raises(UsageError, match=message):
            Manifest.load(tmp_path / "sharded" / pattern)
    (tmp_path / "sharded" / "manifest_2.json").write_text(rows[0])
    with pytest.raises(SpkdError, match="duplicate utterance id 'a_0_0'"):
        Manifest.load(tmp_path / "sharded" / "manifest_{0..2}.json")


def test_nemos_sharded_manifests_and_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "sharded_manifests").mkdir()
    write_nemo(tmp_path / "sharded_manifests", tmp_path)
    path = tmp_path / "sharded_manifests" / "tarred_audio_manifest.json"
    assert len(Manifest.load(path)) == 5
    lines = path.read_text().splitlines(keepends=True)
    for text, message in (
        (lines[0].replace("a_0_0", "zzz"), "no member 'zzz.wav'"),
        (lines[0].replace('"shard_id": 0', '"shard_id": 7'), "no tar beside it has the number 7"),
        (lines[0].replace('"shard_id": 0', '"shard_id": "0"'), "no shard_id"),
        (lines[0] * 2, "a_0_0.wav' of shard 0 is there twice"),
    ):
        path.write_text(text)
        with pytest.raises(SpkdError, match=message):
            Manifest.load(path)
    path.write_text(lines[0])
    write_nemo(tmp_path, tmp_path, "_0")  # audio_0.tar and audio_0_0.tar
    with pytest.raises(SpkdError, match="have the number 0"):
        Manifest.load(path)


def cuts_of(folder: Path) -> Any:
    """Lhotse's cuts of three recordings, one of which is a stretch of its file."""
    lhotse = pytest.importorskip("lhotse")
    cuts = []
    for n in range(5):
        path = folder / f"{n}.wav"
        soundfile.write(path, samples(n, 32_000), 16_000)
        recording = lhotse.Recording.from_file(path, recording_id=f"rec{n}")
        start, duration = (0.5, 1.0) if n == 1 else (0.0, 2.0)
        supervision = lhotse.SupervisionSegment(f"sup{n}", f"rec{n}", 0.0, duration, speaker=f"s{n % 2}")
        cuts.append(lhotse.MonoCut(f"cut{n}", start, duration, 0, [supervision], recording=recording))
    return lhotse.CutSet.from_cuts(cuts)


@pytest.mark.parametrize("form", ["wav", "flac"])
@pytest.mark.parametrize("size", [2, None])
def test_lhotse_shar(tmp_path: Path, form: str, size: int | None) -> None:
    cuts, folder = cuts_of(tmp_path), tmp_path / "shar"
    folder.mkdir()
    shar = pytest.importorskip("lhotse.shar")
    lhotse = pytest.importorskip("lhotse")
    with shar.SharWriter(str(folder), fields={"recording": form}, shard_size=size) as writer:
        for cut in cuts:
            writer.write(cut)
        writer.write(lhotse.MonoCut("none", 0, 1, 0, []))
    manifest = Manifest.load(folder)
    assert [(u.id, u.speaker) for u in manifest] == [(f"cut{n}", f"s{n % 2}") for n in range(5)]
    assert any("cuts without a recording, left out: 1" in note for note in manifest.notes)
    found = waves(manifest)
    for cut in lhotse.CutSet.from_shar(in_dir=folder):
        if cut.has_recording:
            assert np.array_equal(found[cut.id], cut.load_audio()[0])
    first = folder / ("cuts.000000.jsonl.gz" if size else "cuts.jsonl.gz")
    assert len(Manifest.load(first)) == (size or 5)
    tar = folder / first.name.replace("cuts", "recording").replace("jsonl.gz", "tar")
    with tarfile.open(tar) as file:
        members = [(m.name, file.extractfile(m).read()) for m in file.getmembers() if "cut0" not in m.name]
    write_tar(tar, members)
    with pytest.raises(SpkdError, match="the cut 'cut0' is not in the tar of its shard"):
        Manifest.load(folder)
    tar.unlink()
    with pytest.raises(SpkdError, match=re.escape("no recording.*.tar of this shard") + "|cuts.jsonl"):
        Manifest.load(first)


def test_a_manifest_of_another_tool_is_written_with_durations(spkd: Callable, tmp_path: Path) -> None:
    """A folder of Lhotse Shar holds tars, whose members alone would have no speakers."""
    write_nemo(tmp_path, tmp_path)
    done = spkd("manifest", "tarred_audio_manifest.json", "--out", "m.csv").ok()
    assert "5 utterances, 2 speakers, 0.00 h (from tarred_audio_manifest.json)" in done.out
    made, given = Manifest.load("m.csv"), Manifest.load("tarred_audio_manifest.json")
    assert [(u.id, u.start, u.duration) for u in made] == [(u.id, u.start, u.duration) for u in given]
    write_tar(Path("audio_0.tar"), [("a.wav", audio())])
    with pytest.raises(SpkdError, match="has changed since it was indexed"):
        Manifest.load("m.csv")
    write_tar(Path("shar.tar"), [("x.wav", audio())])
    Path("shar").mkdir()
    rows = {"id": "x", "start": 0, "duration": 0.5, "channel": 0, "supervisions": [{"id": "x", "speaker": "ann"}]}
    recording = {"id": "x", "sources": [{"type": "shar", "channels": [0], "source": ""}], "sampling_rate": 16_000}
    Path("shar/cuts.000000.jsonl").write_text(json.dumps(rows | {"recording": recording}) + "\n")
    Path("shar.tar").rename("shar/recording.000000.tar")
    assert "1 utterance, 1 speaker" in spkd("manifest", "shar", "--out", "s.csv").ok().out
    assert "has no effect" in spkd("manifest", "shar", "--layout", "folder").err
    Path("part.csv").write_text("utt,path,duration\na,audio_0.tar,1\nb,gone.wav,1\n")
    done = spkd("manifest", "part.csv", "--out", "p.csv").ok()
    assert "1 utterance, " in done.out
    assert "b: no such file" in done.out + done.err
    Path("gone.csv").write_text("path\ngone.wav\n")
    done = spkd("manifest", "gone.csv", "--out", "g.csv")
    assert (done.code, "none of 1 utterance can be read (gone: no such file)" in done.err) == (1, True)
    assert not Path("g.csv").exists()
    assert "would replace" in spkd("manifest", "s.csv", "--out", "s.csv").err


def test_lhotses_recordings_and_supervisions(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    recordings, supervisions = [], []
    for n in range(3):
        soundfile.write(tmp_path / f"{n}.wav", samples(n, 32_000), 16_000)
        recordings.append(lhotse.Recording.from_file(tmp_path / f"{n}.wav", recording_id=f"rec{n}"))
        supervisions += [
            lhotse.SupervisionSegment(f"u{n}-{k}", f"rec{n}", 0.5 * k, 0.5, speaker=f"s{n}") for k in range(2)
        ]
    lhotse.RecordingSet.from_recordings(recordings).to_file(tmp_path / "x_recordings_train.jsonl.gz")
    lhotse.SupervisionSet.from_segments(supervisions).to_file(tmp_path / "x_supervisions_train.jsonl.gz")
    manifest = Manifest.load(tmp_path / "x_supervisions_train.jsonl.gz")
    assert_as_lhotse_reads(manifest, recordings, supervisions)
    (tmp_path / "x_recordings_train.jsonl.gz").unlink()
    with pytest.raises(SpkdError, match="lhotse cut simple"):
        Manifest.load(tmp_path / "x_supervisions_train.jsonl.gz")


def assert_as_lhotse_reads(manifest: Manifest, recordings: list[Any], supervisions: list[Any]) -> None:
    import lhotse

    cuts = lhotse.CutSet.from_manifests(
        lhotse.RecordingSet.from_recordings(recordings), lhotse.SupervisionSet.from_segments(supervisions)
    ).trim_to_supervisions()
    found = waves(manifest)
    expected = {cut.supervisions[0].id: cut.load_audio()[0] for cut in cuts}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert manifest.speakers == ["s0", "s1", "s2"]


def test_lhotses_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lhotse = pytest.importorskip("lhotse")
    monkeypatch.chdir(tmp_path)
    recordings, supervisions = [], []
    for n in range(3):
        Path("data/wav").mkdir(parents=True, exist_ok=True)
        soundfile.write(f"data/wav/{n}.wav", samples(n, 16_000), 16_000)
        recordings.append(lhotse.Recording.from_file(f"data/wav/{n}.wav", recording_id=f"rec{n}"))
        supervisions.append(lhotse.SupervisionSegment(f"u{n}", f"rec{n}", 0.25, 0.5, speaker=f"s{n}"))
    lhotse.RecordingSet.from_recordings(recordings).to_file("data/x_recordings_train.jsonl.gz")
    lhotse.SupervisionSet.from_segments(supervisions).to_file("data/x_supervisions_train.jsonl.gz")
    assert_as_lhotse_reads(Manifest.load("data/x_supervisions_train.jsonl.gz"), recordings, supervisions)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    made = Manifest.load("../data/x_supervisions_train.jsonl.gz")
    assert [Path(u.path).resolve() for u in made] == [tmp_path / "data" / "wav" / f"{n}.wav" for n in range(3)]
