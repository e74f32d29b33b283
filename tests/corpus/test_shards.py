"""The index of containers: ids, speakers and durations, whatever tool wrote them; stopped and gone on with; changed."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import spkd as spkd_package
from spkd.corpus import loader, shards
from spkd.corpus.audio import decode
from spkd.corpus.manifest import Manifest, build
from spkd.errors import SpkdError, UsageError

from ..conftest import save_teacher
from .test_audio import tone
from .test_containers import write_tar


def audio(seconds: float = 0.5, form: str = "FLAC", seed: int = 0) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, 0.1 * np.random.RandomState(seed).randn(round(seconds * 16_000)), 16_000, format=form)
    return data.getvalue()


def indexed(folder: Path, *names: str, **options: object) -> tuple[Manifest, shards.Summary]:
    """The manifest of containers in a folder, as it is loaded, and what the index reports."""
    summary = shards.index(shards.find([folder / name for name in names]), folder / "m.csv", **options)
    return Manifest.load(folder / "m.csv"), summary


def test_tars_that_webdataset_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            sample = {"__key__": f"s/{number:03d}", "flac": audio(1 + number / 8, seed=number)}
            writer.write(sample | {"json": {"speaker": f"spk{number % 2}"}, "txt": "some words", "cls": number % 2})
    manifest, summary = indexed(tmp_path, "x-{000000..000002}.tar")
    assert [u.id for u in manifest] == [f"s/{number:03d}" for number in range(7)]
    assert [u.speaker for u in manifest] == [f"spk{number % 2}" for number in range(7)]
    assert [u.duration for u in manifest] == [1 + number / 8 for number in range(7)]
    expected = webdataset.WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False)
    for utterance, sample in zip(manifest, expected, strict=True):
        wave, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        assert np.array_equal(decode(utterance.path).wave, wave)
    assert (summary.utterances, summary.speakers, summary.left_out) == (7, 2, {})
    assert summary.origin == "3 containers, speakers from speaker"
    assert os.listdir(tmp_path).count("m.csv.parts") == 0


def test_tars_that_wespeaker_writes(tmp_path: Path) -> None:
    """make_shard_list.py puts KEY.txt, KEY.spk and KEY.wav into a tar, and names the tars in shard.list."""
    for shard in range(2):
        members = []
        for number in range(2):
            key = f"id1000{shard}/abc/0000{number}.wav"
            members += [(f"{key}.txt", b"-"), (f"{key}.spk", f"id1000{shard}".encode()), (f"{key}.wav", audio())]
        write_tar(tmp_path / f"shards_00000000{shard}.tar", members)
    (tmp_path / "shard.list").write_text("".join(f"{tmp_path}/shards_00000000{n}.tar\n" for n in range(2)))
    manifest, _ = indexed(tmp_path, "shard.list")
    assert [(u.id, u.speaker) for u in manifest] == [
        (f"id1000{shard}/abc/0000{number}.wav", f"id1000{shard}") for shard in range(2) for number in range(2)
    ]


def test_keys_of_wespeaker_may_have_dots(tmp_path: Path) -> None:
    keys = {"a.1": "ann", "a.2": "bob", "b": "ann"}
    members = [
        m for k, s in keys.items() for m in ((f"{k}.txt", b"-"), (f"{k}.spk", s.encode()), (f"{k}.wav", audio()))
    ]
    write_tar(tmp_path / "x.tar", members)
    manifest, _ = indexed(tmp_path, "x.tar")
    assert {u.id: u.speaker for u in manifest} == keys


def test_a_list_of_shards_is_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """make_shard_list.py writes the paths as it was given them, which the recipes do relative to their own folder."""
    folders = [tmp_path / name / "data" / "dev" for name in ("one", "two")]
    for folder in folders:
        (folder / "shards").mkdir(parents=True)
        write_tar(folder / "shards" / "0.tar", [("a.spk", b"ann"), ("a.wav", audio())])
        (folder / "shard.list").write_text("data/dev/shards/0.tar\n")
    assert shards.find([folders[0] / "shard.list"]) == [str(folders[0] / "shards" / "0.tar")]
    monkeypatch.chdir(tmp_path / "one")
    assert len(indexed(tmp_path, "one/data/dev/shard.list")[0]) == 1
    with pytest.raises(SpkdError, match="two/data/dev/shards/0.tar and .*one/data/dev/shards/0.tar"):
        shards.find([folders[1] / "shard.list"])


def test_a_zip_of_a_corpus_has_the_ids_of_its_layout(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "vox1.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for speaker in ("id10270", "id10271"):
            for number in range(2):
                file.writestr(f"wav/{speaker}/5r0dWxy17C8/{number:05d}.wav", audio(form="WAV"))
        file.writestr("wav/readme.wav", b"none")
    manifest, summary = indexed(tmp_path, "vox1.zip")
    assert manifest[0].id == "id10270/5r0dWxy17C8/00000.wav"
    assert manifest.speakers == ["id10270", "id10271"]
    assert summary.origin == "1 container, layout voxceleb"
    assert list(summary.left_out) == [f"{tmp_path}/vox1.zip: wav/readme.wav"]
    manifest, _ = indexed(tmp_path, "vox1.zip", layout="folder")
    assert (manifest[0].id, manifest[0].speaker) == ("wav/id10270/5r0dWxy17C8/00000.wav", "id10270")


def test_a_container_that_cannot_be_opened_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(write_tar(tmp_path / f"{number}.tar", [(f"{number}.flac", audio())])) for number in range(2)]
    opened = os.open

    def denied(path: object, *arguments: object, **options: object) -> int:
        if path == paths[0]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    summary = shards.index(paths, tmp_path / "m.csv")
    assert (summary.utterances, summary.left_out) == (1, {paths[0]: "Permission denied"})


def test_members_of_many_kinds_are_counted_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "x.tar", [("a.flac", audio()), *((f"a.k{n}", b"") for n in range(500))])
    indexed(tmp_path, "x.tar")
    assert "others (460)" in capsys.readouterr().out


def test_the_name_of_a_tar_stands_for_a_folder(tmp_path: Path) -> None:
    for speaker in ("id10270", "id10271"):
        write_tar(tmp_path / f"{speaker}.tar", [("5r0dWxy17C8/00001.wav", audio(form="WAV"))])
    manifest, _ = indexed(tmp_path, ".")
    assert [u.id for u in manifest] == [f"{s}/5r0dWxy17C8/00001.wav" for s in ("id10270", "id10271")]
    assert manifest.speakers == ["id10270", "id10271"]


def test_folders_within_a_container_are_speakers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [f"{part}/{speaker}/{n}.flac" for part, speaker in (("train", "ann"), ("test", "bob")) for n in range(2)]
    write_tar(tmp_path / "x.tar", [(name, audio()) for name in names])
    manifest, summary = indexed(tmp_path, "x.tar")
    assert ([u.id for u in manifest], manifest.speakers) == (names, ["ann", "bob"])
    assert summary.origin == "1 container, layout folder"
    assert "speakers are the folders within test, train" in capsys.readouterr().out


def test_keys_that_repeat_among_containers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [("000.flac", audio()), ("000.spk", b"%d" % shard)])
    manifest, _ = indexed(tmp_path, "{0..1}.tar")
    assert [(u.id, u.speaker) for u in manifest] == [("0/000", "0"), ("1/000", "1")]
    assert "whose names precede the ids: 1" in capsys.readouterr().out
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("id10270/x/1.wav", audio())])
    with pytest.raises(SpkdError, match=r"a.tar \(id10270/x/1.wav\) and .*b.tar .* would both be the utterance"):
        indexed(tmp_path, "{a,b}.tar")
    write_tar(tmp_path / "c.tar", [("id10270/x/1.wav", audio()), ("id10270/x/1.flac", audio())])
    with pytest.raises(SpkdError, match="choose with --suffix"):
        indexed(tmp_path, "c.tar")
    assert len(indexed(tmp_path, "c.tar", suffix="flac")[0]) == 1
    assert not (tmp_path / "m.csv.parts").exists() or len(os.listdir(tmp_path / "m.csv.parts")) == 3


def test_one_source_of_speakers_for_all(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Class numbers and names are not mixed: 17 and ann may be one person."""
    members = []
    for number in range(4):
        members += [(f"{number}.flac", audio()), (f"{number}.cls", b"17")]
        members += [(f"{number}.spk", b"ann")] if number else []
    write_tar(tmp_path / "x.tar", members)
    manifest, summary = indexed(tmp_path, "x.tar")
    assert [u.speaker for u in manifest] == [None, "ann", "ann", "ann"]
    assert summary.origin == "1 container, speakers from spk"
    out = capsys.readouterr().out
    assert "utterances without a speaker (spk): 1" in out
    assert "speakers are those of spk, not of cls (--speaker NAME)" in out
    manifest, _ = indexed(tmp_path, "x.tar", speaker="cls")
    assert [u.speaker for u in manifest] == ["17"] * 4
    with pytest.raises(UsageError, match="nothing names speakers by 'spl'; did you mean 'spk'"):
        indexed(tmp_path, "x.tar", speaker="spl")


def test_what_cannot_be_used_is_listed_and_nothing_stops(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "1.tar", [("a.flac", audio()), ("b.wav", b"none"), ("c.wav", b"")])
    (tmp_path / "2.tar").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "3.tar").write_bytes(b"x" * 3000)
    with tarfile.open(tmp_path / "4.tar", "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.wav"))
    (tmp_path / "5.tar").symlink_to("1.tar")
    (tmp_path / "6.tar").symlink_to("6.tar")
    manifest, summary = indexed(tmp_path, ".")
    assert [u.id for u in manifest] == ["a"]
    shown = {name.replace(str(tmp_path) + "/", ""): reason for name, reason in summary.left_out.items()}
    assert "cannot be decoded" in shown["1.tar: b.wav"]
    assert shown["1.tar: c.wav"] == "empty file"
    assert shown["2.tar: a.flac"] == "cut off by the end of its tar"
    assert "not a tar that can be read" in shown["3.tar"]
    assert "gunzip -k" in shown["4.tar"]
    with pytest.raises(SpkdError, match="no audio that can be used"):
        indexed(tmp_path, "3.tar")


def test_a_container_that_changed_is_an_error_with_the_command(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.flac", audio()), ("b.flac", audio())])
    indexed(tmp_path, "x.tar")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    with pytest.raises(
        SpkdError, match=rf"m.csv:2: {path} has changed .*spkd manifest CONTAINERS --out {tmp_path}/m.csv"
    ):
        Manifest.load(tmp_path / "m.csv")
    shards.index([path], tmp_path / "m.jsonl")
    Manifest.load(tmp_path / "m.jsonl").save(tmp_path / "again.csv")
    assert [u.path for u in Manifest.load(tmp_path / "again.csv")] == [
        u.path for u in Manifest.load(tmp_path / "m.jsonl")
    ]
    write_tar(path, [("a.flac", audio())])
    for name in ("m.jsonl", "again.csv"):
        with pytest.raises(SpkdError, match="has changed since it was indexed"):
            Manifest.load(tmp_path / name)
    path.unlink()  # as a file that is missing: rejected where it is read
    assert len(Manifest.load(tmp_path / "again.csv")) == 2


def test_the_digest_of_a_manifest_ignores_containers(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [(f"{name}.flac", audio(seed=n)) for n, name in enumerate("abc")])
    (tmp_path / "files").mkdir()
    with tarfile.open(tmp_path / "x.tar") as tar:
        tar.extractall(tmp_path / "files", filter="data")
    (tmp_path / "files.csv").write_text("path,duration\n" + "".join(f"files/{name}.flac,0.5\n" for name in "abc"))
    assert indexed(tmp_path, "x.tar")[0].digest == Manifest.load(tmp_path / "files.csv").digest


def test_a_manifest_moves_with_its_containers(tmp_path: Path) -> None:
    (tmp_path / "a" / "shards").mkdir(parents=True)
    write_tar(tmp_path / "a" / "shards" / "x.tar", [("1.flac", audio())])
    shards.index([tmp_path / "a" / "shards" / "x.tar"], tmp_path / "a" / "m.csv")
    assert (tmp_path / "a" / "m.csv").read_text().splitlines()[1].startswith("1,shards/x.tar#512+")
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(decode(Manifest.load(tmp_path / "b" / "m.csv")[0].path).wave) == 8000


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a_{0..2}.tar", ["a_0.tar", "a_1.tar", "a_2.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{train,dev}-{1..2}.tar", ["train-1.tar", "train-2.tar", "dev-1.tar", "dev-2.tar"]),
        ("audio__OP_0..1_CL_.tar", ["audio_0.tar", "audio_1.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_patterns_as_nemo_and_webdataset_write_them(pattern: str, names: list[str]) -> None:
    assert shards.expanded(pattern) == names
    braceexpand = pytest.importorskip("braceexpand")
    assert list(braceexpand.braceexpand(pattern.replace("_OP_", "{").replace("_CL_", "}"))) == names


def test_what_is_no_container_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("none.tar", "no such file or folder"),
        ("{0..1}.tar", "0.tar: no such file"),
        ("{0..99999999}.tar", "more than 1,000,000 names"),
        ("a.txt", "neither a folder of audio nor a container"),
        ("pipe", "not a regular file"),
    ):
        with pytest.raises(UsageError, match=message):
            shards.find([tmp_path / name])
    with pytest.raises(UsageError, match="an address"):
        shards.find(["ftp://bucket/x.tar"])


def test_an_index_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.flac", audio(seed=number))])
    paths = shards.find([tmp_path / "{0..2}.tar"])
    read = list[str]()
    original = shards._measured

    def stops(entry: object) -> tuple[float, int | None] | str:
        read.append(str(entry.address.container))
        if len(read) == 3:
            raise KeyboardInterrupt
        return original(entry)

    monkeypatch.setattr(shards, "_measured", stops)
    with pytest.raises(KeyboardInterrupt):
        shards.index(paths, tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()
    # A container that changed meanwhile is read again; another choice reads all again.
    write_tar(tmp_path / "1.tar", [("new.flac", audio(1.0))])
    shards.index(paths, tmp_path / "m.csv")
    assert [Path(name).stem for name in read] == ["0", "1", "2", "1", "2"]
    assert [(u.id, u.duration) for u in Manifest.load(tmp_path / "m.csv")] == [("0", 0.5), ("new", 1.0), ("2", 0.5)]
    assert not (tmp_path / "m.csv.parts").exists()  # nor the part of the container as it was


def test_parts_of_containers_that_are_gone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spkd: Callable
) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.flac", audio(seed=number))])
    (tmp_path / "folder" / "ann").mkdir(parents=True)
    (tmp_path / "folder" / "ann" / "a.flac").write_bytes(audio())
    parts = tmp_path / "m.csv.parts"
    for then in ("2.tar", "folder"):
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_naming", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                shards.index(shards.find([tmp_path / "{0..1}.tar"]), tmp_path / "m.csv")
        assert len(set(os.listdir(parts)) - {"mine.jsonl"}) == 2
        (parts / "mine.jsonl").touch()
        spkd("manifest", tmp_path / then, "--out", tmp_path / "m.csv").ok()
        assert os.listdir(parts) == ["mine.jsonl"]


@pytest.mark.slow
def test_a_killed_index_goes_on(tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / f"{number:02d}.tar", [(f"{number:02d}/{n}.flac", audio(0.1)) for n in range(100)])
    arguments = ["manifest", str(tmp_path / "{00..39}.tar"), "--out", str(tmp_path / "m.csv")]
    command = [sys.executable, "-c", "from spkd.cli import main; main()", *arguments]
    child = subprocess.Popen(command)
    parts = tmp_path / "m.csv.parts"
    while not parts.is_dir() or len(list(parts.glob("*.jsonl"))) < 3:
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "m.csv").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of 40 read before" in done.stdout
    assert not parts.exists()
    shards.index(shards.find([tmp_path / "{00..39}.tar"]), tmp_path / "whole.csv")
    assert (tmp_path / "m.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def in_containers(corpus: Path, spkd: Callable) -> dict[str, Path]:
    """Manifests of the same audio as files, tars and a compressed zip, of the same ids, by `spkd manifest`."""
    files = sorted((corpus / "audio").rglob("*.*"))
    names = [str(path.relative_to(corpus / "audio")) for path in files]
    for number, part in enumerate((slice(0, 9), slice(9, 18))):
        write_tar(Path(f"{number}.tar"), list(zip(names[part], (f.read_bytes() for f in files[part]), strict=True)))
    with zipfile.ZipFile("all.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, path in zip(names, files, strict=True):
            file.write(path, name)
    made = {}
    for kind, given in (("files", corpus / "audio"), ("tars", "{0..1}.tar"), ("zip", "all.zip")):
        made[kind] = Path(f"{kind}.csv")
        assert "18 utterances, 6 speakers" in spkd("manifest", given, "--out", made[kind]).ok().out
    return made


@pytest.mark.slow
def test_caches_of_containers_are_those_of_files(spkd: Callable, corpus: Path) -> None:
    held = {}
    for kind, manifest in in_containers(corpus, spkd).items():
        given = ("teacher=none", f"manifest={manifest}")
        spkd("extract", *given, "fbank=true", f"cache={kind}", "view=crops:2,0.5").ok()
        spkd("cache", "verify", kind, "--live", "4", *given).ok()
        held[kind] = {
            str(p.relative_to(kind)): p.read_bytes() for p in Path(kind).rglob("*") if "c/" in str(p) and p.is_file()
        }
    assert held["files"]
    assert held["files"] == held["tars"] == held["zip"]
    assert len({Manifest.load(f"{kind}.csv").digest for kind in held}) == 1
    assert "give one folder" in spkd("manifest", corpus / "audio", corpus / "audio").err
    assert "--speaker spk is for containers" in spkd("manifest", corpus / "audio", "--speaker", "spk").err
    assert spkd("manifest", "0.tar", "--out", "x.csv", "--strict").code == 0


@pytest.mark.slow
def test_commands_and_python_read_containers_as_files(spkd: Callable, corpus: Path) -> None:
    """Embeddings, scores, reports with audio, calibrations, and a training with fresh audio."""
    save_teacher(Path("teacher"))
    model, found = ("model=teacher", "device=cpu"), dict[str, list[object]]()
    for kind, manifest in in_containers(corpus, spkd).items():
        given = (*model, f"manifest={manifest}")
        spkd("embed", manifest, *model, f"out={kind}.npy").ok()
        spkd("eval", corpus / "trials.txt", *given, f"out={kind}-eval", "audio=true", "worst=2", "bootstrap=0").ok()
        spkd("calibrate", corpus / "trials.txt", *given, f"out={kind}.json", "force=true").ok()
        given = ("teacher=checkpoint", "teacher.weights=teacher", f"manifest={manifest}", f"cache={kind}-cache")
        spkd("extract", *given).ok()
        fresh = ("augment.noise=synthetic", "augment.noise_prob=1", "steps=3", "batch_size=4", "crop=0.5", "workers=1")
        spkd("train", f"cache={kind}-cache", f"manifest={manifest}", *fresh, f"out={kind}-student", "device=cpu").ok()
        page = Path(f"{kind}-eval/report.html").read_text()
        assert page.count("<audio") == 8
        paths = [u.path for u in Manifest.load(manifest)][:3]
        found[kind] = [
            Path(f"{kind}.npy").read_bytes(),
            Path(f"{kind}-eval/scores.txt").read_bytes(),
            page.count("data:audio/flac;base64,"),
            re.findall('base64,[^"]+', page),
            spkd_package.load("teacher").embed(paths).tobytes(),
            next(Path(f"{kind}-student").glob("*.safetensors")).stat().st_size,
        ]
    assert found["files"] == found["tars"] == found["zip"]


@pytest.mark.slow
def test_an_extraction_reads_each_container_once_from_end_to_end(
    spkd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unit by unit; within a unit, which is read ahead, the shorter utterances come first."""
    for shard in range(2):
        members = [(f"{shard}-{n}.flac", audio(0.4 + 0.1 * (n * 7 % 5), seed=n)) for n in range(12)]
        write_tar(tmp_path / f"{shard}.tar", members)
    spkd("manifest", "{0..1}.tar", "--out", "m.csv").ok()
    read = list[tuple[str, int]]()
    monkeypatch.setattr(loader, "decode", lambda path, *rest: read.append(path) or decode(path, *rest))
    spkd("extract", "teacher=none", "fbank=true", "manifest=m.csv", "workers=2", "storage.unit_views=4").ok()
    paths = [u.path for u in Manifest.load("m.csv")]
    assert len(paths) == 24
    read = read[-24:]  # before, codecs are calibrated on a few views of all
    assert all(set(read[unit : unit + 4]) == set(paths[unit : unit + 4]) for unit in range(0, 24, 4))


def test_containers_in_a_folder_are_found_by_their_suffixes(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for seed, name in enumerate(("d/b.TAR", "a.tar")):
        write_tar(tmp_path / name, [("x.flac", audio(seed=seed))])
    for name in ("c.tar.gz", "d/e.tgz"):
        with tarfile.open(tmp_path / name, "w:gz") as file:
            file.addfile(tarfile.TarInfo("y.flac"))
    for name in ("notes.txt.gz", "m.train.csv.gz", "x.csv"):
        (tmp_path / name).write_bytes(b"\x1f\x8b" + bytes(2000))
    found = [str(Path(path).relative_to(tmp_path)) for path in shards.find([tmp_path])]
    assert found == ["a.tar", "c.tar.gz", "d/b.TAR", "d/e.tgz"]
    _, summary = indexed(tmp_path, ".")
    assert sorted(Path(name).name for name in summary.left_out) == ["c.tar.gz", "e.tgz"]
    with pytest.raises(UsageError, match="neither a folder of audio nor a container"):
        shards.find([tmp_path / "m.train.csv.gz"])


def test_containers_beside_files_of_audio_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "1.flac").write_bytes(audio())
    for name in ("more.tar", "ann/all.tar.gz", "notes.gz"):
        (tmp_path / name).write_bytes(b"x")
    assert len(build(tmp_path)[0]) == 1
    assert f"as there are files of audio: 2 containers ({tmp_path}/ann/all.tar.gz)" in capsys.readouterr().out


def test_a_manifest_in_a_folder_of_audio_names_its_utterances(spkd: Callable, tmp_path: Path) -> None:
    """As in every command that is given the folder, and as `datasets` and Kaldi have it."""
    for name in ("data/0", "data/1", "data/2", "more/x"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(f"{name}.flac").write_bytes(audio(2.0))
    Path("metadata.csv").write_text("file_name,speaker\ndata/0.flac,ann\ndata/1.flac,bob\ndata/2.flac,bob\n")
    done = spkd("manifest", ".", "--out", "m.csv").ok()
    assert "read as audiofolder; --layout NAME takes the files" in done.out
    assert "files of audio that no line of it names: 1 (first: more/x.flac)" in done.out
    assert [(u.id, u.speaker) for u in Manifest.load("m.csv")] == [("0", "ann"), ("1", "bob"), ("2", "bob")]
    spkd("manifest", ".", "--layout", "folder", "--out", "f.csv").ok()
    assert len(Manifest.load("f.csv")) == 4
    Path("metadata.csv").unlink()
    Path("wav.scp").write_text("rec data/0.flac\n")
    Path("segments").write_text("u1 rec 0.5 1.0\nu2 rec 1.0 2.0\n")
    done = spkd("manifest", ".", "--out", "k.csv").ok()
    assert "neither utt2spk nor spk2utt: speakers are unknown" in done.out
    Path("utt2spk").write_text("u1 ann\nu2 bob\n")
    spkd("manifest", ".", "--out", "k.csv").ok()
    found = [(u.id, u.speaker, u.start, u.duration) for u in Manifest.load("k.csv")]
    assert found == [("u1", "ann", 0.5, 0.5), ("u2", "bob", 1.0, 1.0)]
    Path("wav.scp").rename("data/wav.scp")
    done = spkd("manifest", ".", "--out", "up.csv").ok()
    assert "not read, as a layout is: 1 manifest (data/wav.scp)" in done.out


def test_rejected_views_of_a_container_are_tried_again(spkd: Callable, tmp_path: Path) -> None:
    """A container that was mended is another one: its rejected views are tried again."""
    damaged = bytearray(audio(2.0))
    damaged[20_000:20_200] = bytes(200)
    path = write_tar(tmp_path / "x.tar", [("a.flac", audio(2.0)), ("b.flac", bytes(damaged))])
    spkd("manifest", "x.tar", "--out", "m.csv").ok()
    assert "rejected b" in spkd("extract", "teacher=none", "fbank=true", "manifest=m.csv").ok().err
    write_tar(path, [("a.flac", audio(2.0)), ("b.flac", audio(2.0))])
    spkd("manifest", "x.tar", "--out", "m.csv").ok()
    assert (
        "1 rejected view can be loaded now" in spkd("extract", "teacher=none", "fbank=true", "manifest=m.csv").ok().out
    )


def test_kinds_of_json_lines(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.flac", audio()), ("a.spk", b"ann"), ("b.flac", audio())])
    shards.index([tmp_path / "x.tar"], tmp_path / "m.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row.get("speaker") for row in rows] == ["ann", None]
    assert rows[0]["container_state"].startswith(f"{(tmp_path / 'x.tar').stat().st_size}@")


def test_tone_is_heard_where_it_lies(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(300, 16_000), 16_000)
    write_tar(tmp_path / "x.tar", [("a.wav", (tmp_path / "a.wav").read_bytes())])
    manifest, _ = indexed(tmp_path, "x.tar")
    assert np.array_equal(decode(manifest[0].path).wave, decode(str(tmp_path / "a.wav")).wave)
