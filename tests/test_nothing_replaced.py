"""No command replaces files of others, neither in its folder for output nor among those that it reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.corpus.manifest import Manifest
from spkd.outputs.features import FBANKS
from spkd.students import Checkpoint, build, save_student
from tests.export.npm import write_package

SMALL = ["student=tiny", "student.channels=8", "student.embedding=6", "steps=2", "batch_size=4", "crop=0.5"]
# Commands that write a folder -> files that they write there.
FOLDERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("train", "--loss", "aam", "cache=cache", *SMALL, "out=out"): (
        *("model.safetensors", "model.earlier.safetensors", "log.jsonl", "run.yaml", "train.html", "run.json"),
        *("state.2.safetensors", "best/model.safetensors"),
    ),
    ("eval", "trials.txt", "manifest=m.csv", "model=student", "device=cpu", "bootstrap=0", "out=out"): (
        *("scores.txt", "utt2spk", "report.json", "report.html"),
    ),
    ("report", "evaluation", "--bootstrap", "0", "--out", "out"): (
        *("comparison.json", "comparison.csv", "comparison.tex", "comparison.md", "comparison.html"),
    ),
    ("map", "of-student", "of-narrow", "steps=2", "out=out"): ("map.safetensors", "map.json"),
    ("cache", "export", "cache", "out"): (
        *("index.json", "plan/0.npz", "codec.safetensors", "000000.tar", "000002.tar"),
    ),
    ("export", "wide", "to=wespeaker", "out=out"): ("avg_model.pt", "config.yaml", "export.json"),
    ("export", "student", "to=web", "web.runtime=runtime", "out=out"): ("index.html", "model.onnx", "export.json"),
    ("cache", "push", "cache", "out"): ("plan/0.npz", "codec.safetensors", "commits/0.json", "fbank/c/0/0"),
    ("cache", "push", "tars", "out"): ("index.json", "plan/0.npz", "000001.tar"),
}


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def inputs(spkd: Callable, corpus: Path) -> Path:
    """The folder of what the commands read: a cache, its export, students, an evaluation, a manifest, and trials."""
    network = build("resnet34", channels=32, embedding=16).eval()
    network.take(FBANKS["wespeaker"])
    save_student("wide", Checkpoint(network))
    save_student("student", Checkpoint(build("tiny", channels=8, embedding=6).eval()))
    lines = (corpus / "manifest.csv").read_text().replace(",audio/", f",{corpus}/audio/")
    Path("m.csv").write_text(lines)
    shutil.copy(corpus / "trials.txt", "trials.txt")
    write_package(Path("runtime"))
    storage = ("storage.codec=sq8", "storage.unit_views=7")
    spkd("extract", "teacher=none", "manifest=m.csv", "cache=cache", *storage).ok()
    spkd("cache", "export", "cache", "tars").ok()
    save_student("narrow", Checkpoint(build("tiny", channels=8, embedding=4).eval()))
    for name, cache in (("student", "of-student"), ("narrow", "of-narrow")):
        given = ("teacher=checkpoint", f"teacher.weights={name}", "manifest=m.csv", f"cache={cache}")
        spkd("extract", *given).ok()
    spkd("eval", "trials.txt", "manifest=m.csv", "model=student", "bootstrap=0", "out=evaluation").ok()
    return Path().absolute()


def test_files_of_others_stay(spkd: Callable, inputs: Path) -> None:
    for command, names in FOLDERS.items():
        for name in names:
            path = Path("out", name)
            path.parent.mkdir(parents=True)
            path.write_text("{}")
            done = spkd(*command)
            assert (done.code, f"{path}: " in done.err, done.err.count("\n")) == (2, True, 1), (command, done.err)
            assert path.read_text() == "{}", (command, name)
            shutil.rmtree("out")
        # Other files do not matter, and its own are replaced: also where a kill left but the first of them.
        Path("out").mkdir()
        Path("out/thesis.tex").write_text("mine")
        spkd(*command).ok()
        whole = content(Path("out"))
        spkd(*command).ok()
        last = max((path for path in whole if path.name != "thesis.tex"), key=lambda path: path.stat().st_mtime_ns)
        last.unlink()
        spkd(*command).ok()
        assert content(Path("out")).keys() >= whole.keys(), command
        assert Path("out/thesis.tex").read_text() == "mine"
        shutil.rmtree("out")


@pytest.mark.slow
def test_what_nobody_named_replaces_its_own_alone(spkd: Callable, inputs: Path) -> None:
    Path("audio/speaker").mkdir(parents=True)
    shutil.copy(Manifest.load("m.csv")[0].path, "audio/speaker/a.wav")
    for command, name, message in (
        (("export", "student", "to=onnx"), "student/model.onnx", "spkd did not write it"),
        (("export", "student", "to=pt2"), "student/model.pt2", "spkd did not write it"),
        (
            ("calibrate", "trials.txt", "model=student", "manifest=m.csv", "force=true"),
            "student/calibration.json",
            "no",
        ),
        (("cache", "catalogue", "."), "catalogue.html", "spkd did not write it); choose --out FILE, or remove it"),
    ):
        Path(name).write_text("utt,wav\nprecious\n")
        done = spkd(*command)
        assert (done.code, f"{name}: would be replaced" in done.err, message in done.err) == (2, True, True), done.err
        assert Path(name).read_text() == "utt,wav\nprecious\n"
        Path(name).unlink()
        spkd(*command).ok()
        first = Path(name).stat().st_ino
        spkd(*command).ok()
        assert Path(name).stat().st_ino != first


def test_a_manifest_replaces_manifests_of_spkd_alone(spkd: Callable, corpus: Path) -> None:
    shutil.copytree(corpus / "audio/spk0", "audio/spk0")
    header = "utt,path,speaker,duration,start"
    for name, text in {
        "manifest.csv": f"{header},age\n",
        "notes.csv": "my notes\n",
        "mine.csv": "path,speaker\n",
        "of-nemo.jsonl": '{"audio_filepath": "a.wav", "duration": 1, "text": "hello"}\n',
        "other.jsonl": '{"id": "a", "audio_filepath": "a.wav", "duration": 1, "text": "hello"}\n',
    }.items():
        Path(name).write_text(text)
        done = spkd("manifest", "audio", "--out", name)
        message = f"error: {name}: would be replaced (spkd did not write it); choose another --out FILE, or remove it\n"
        assert (done.code, done.err, Path(name).read_text()) == (2, message, text)
    Path("empty.csv").write_text("")
    Path("written.csv").write_text(f"{header},channel,container_state\n")
    for name in ("empty.csv", "written.csv", "new.csv", "new.jsonl"):
        spkd("manifest", "audio", "--out", name).ok()
        whole = Path(name).read_text()
        Path(name).write_text("\n".join(whole.split("\n")[:2]))
        spkd("manifest", "audio", "--out", name).ok()
        assert Path(name).read_text() == whole


def test_the_lock_of_another_program_stays(spkd: Callable, inputs: Path) -> None:
    Path("out").mkdir()
    Path("out/run.lock").write_text("4711\n")
    command = ("train", "--loss", "aam", "cache=cache", *SMALL, "out=out")
    done = spkd(*command)
    assert (done.code, "out/run.lock: would be removed" in done.err) == (2, True), done.err
    assert Path("out/run.lock").read_text() == "4711\n"
    Path("out/run.lock").write_text("")  # as a kill leaves that of spkd
    spkd(*command).ok()
    assert not Path("out/run.lock").exists()


def test_no_export_is_written_over_a_cache_or_another_export(spkd: Callable, inputs: Path) -> None:
    spkd("extract", "teacher=none", "manifest=m.csv", "cache=other", "view.seed=3", "view=crops:1,0.7").ok()
    spkd("cache", "export", "other", "other-tars").ok()
    shutil.copytree("other", "without-card")
    Path("without-card/card.json").unlink()
    for command, refused in {
        ("cache", "export", "cache"): ("cache", "other", "without-card", "other-tars"),
        ("cache", "push", "tars"): ("cache", "other", "without-card", "other-tars"),
        ("cache", "push", "cache"): ("other", "without-card"),
    }.items():
        for folder in refused:
            before = content(Path(folder))
            done = spkd(*command, folder)
            assert (done.code, f"{folder}: holds " in done.err) == (2, True), (command, folder, done.err)
            after = content(Path(folder))
            assert {path: after[path] for path in before} == before, (command, folder)
    spkd("cache", "verify", "other").ok()


def test_no_input_is_replaced(spkd: Callable, inputs: Path) -> None:
    shutil.copy("evaluation/scores.txt", "scores.txt")
    Path("m.csv").rename("m.scp")
    Path("data").mkdir()
    rows = Manifest.load("m.scp").utterances
    Path("data/wav.scp").write_text("".join(f"{u.id} {u.path}\n" for u in rows))
    scored = ["calibrate", "trials.txt", "--scores", "scores.txt", "force=true"]
    evaluation = content(Path("evaluation"))
    for command, name in (
        (("eval", "trials.txt", "--scores", "evaluation/scores.txt", "out=evaluation"), "evaluation/scores.txt"),
        (("calibrate", "trials.txt", "--scores", "scores.txt", "force=true", "out=scores.txt"), "scores.txt"),
        (("calibrate", "trials.txt", "--scores", "scores.txt", "force=true", "out=./trials.txt"), "trials.txt"),
        (("embed", "m.scp", "model=student", "out=m.scp"), "m.scp"),
        (("embed", "data", "model=student", "out=data/wav.scp"), "data/wav.scp"),
        ((*scored, "out=student/model.safetensors"), "student/model.safetensors"),
        ((*scored, "out=student/model.json"), "student/model.json"),
    ):
        before = Path(name).read_bytes()
        done = spkd(*command)
        assert (done.code, "would replace" in done.err or "would be replaced" in done.err) == (2, True), done.err
        assert Path(name).read_bytes() == before
    assert content(Path("evaluation")) == evaluation


def test_an_address_becomes_no_folder(spkd: Callable, inputs: Path) -> None:
    """Where a folder or file of this machine is written."""
    url = "https://bob:SECRET@host/x"
    for command in (
        ("extract", "teacher=none", "manifest=m.csv", f"cache={url}"),
        ("train", "--loss=aam", "cache=cache", "steps=1", "batch_size=4", "crop=0.5", f"out={url}"),
        ("eval", "trials.txt", "manifest=m.csv", "model=student", f"out={url}"),
        ("calibrate", "trials.txt", "--scores", "evaluation/scores.txt", f"out={url}"),
        ("embed", "m.csv", "model=student", f"out={url}.npy"),
        ("export", "student", "to=onnx", f"out={url}.onnx"),
        ("manifest", inputs, "--out", f"{url}.csv"),
        ("report", "evaluation", "--out", url),
        ("demo", "--out", url),
        *(("cache", "export", "cache", f"{url}{suffix}") for suffix in ("", ".h5", ".npy")),
        ("cache", "import", "tars", url),
        ("cache", "merge", "cache", "cache", url),
        ("cache", "pull", "cache", url),
        ("cache", "catalogue", "cache", "--out", f"{url}.html"),
    ):
        before = sorted(os.listdir())
        done = spkd(*command)
        assert (done.code, "an address; write to a folder of this machine" in done.err) == (2, True), (command, done)
        assert "SECRET" not in done.out + done.err
        assert sorted(os.listdir()) == before


def test_an_address_that_is_read_as_a_path_shows_no_secret(spkd: Callable) -> None:
    for url in ("https://bob:SECRET@host/x", "s3://bucket/x?token=SECRET", "http://host/x?token=SECRET"):
        for command in (
            *(("cache", "info", url), ("cache", "verify", url), ("cache", "merge", url, "new"), ("report", url)),
            *(("cache", "repair", url, "--from", "c"), ("cache", "export", url, "x.h5"), ("export", url, "to=onnx")),
            *(("embed", url), ("embed", "m.csv", f"model={url}"), ("extract", "teacher=none", f"manifest={url}")),
            *(("manifest", url), ("eval", url), ("calibrate", url)),
            *(("extract", "teacher=checkpoint", f"teacher.weights={url}"), ("train", "--from", url, "out=x")),
        ):
            done = spkd(*command)
            assert done.code in (1, 2)
            assert "SECRET" not in done.out + done.err, command


def test_nothing_but_regular_files_is_replaced(spkd: Callable, inputs: Path) -> None:
    os.mkfifo("pipe")
    os.mkfifo("pipe.ark")
    Path("dead").symlink_to("nowhere")
    long = "n" * 240
    for name, reason in (
        ("pipe", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("dead", "not a regular file"),
        (f"{long}.csv", "File name too long"),
        (f"new/{'n' * 300}/x.csv", "File name too long"),
    ):
        suffix = "" if name.endswith(".csv") else name
        for command in (
            ("cache", "catalogue", "cache", "--out", name),
            ("calibrate", "trials.txt", "--scores", "evaluation/scores.txt", "force=true", f"out={name}"),
            *([] if suffix else [("manifest", inputs, "--out", name)]),
        ):
            done = spkd(*command)
            assert (done.code, f"{name}: cannot be written" in done.err, reason in done.err) == (1, True, True), (
                done.err
            )
    for name in ("pipe.ark", f"{'n' * 225}.ark"):  # of the second, the file of digests alone has too long a name
        for command in (("embed", "m.csv", "model=student", f"out={name}"), ("cache", "export", "cache", name)):
            done = spkd(*command, *(["--target", "fbank"] if "export" in command else []))
            assert (done.code, "cannot be written" in done.err) == (1, True), done.err
    assert sorted(path.name for path in inputs.iterdir() if not path.is_file() and not path.is_dir()) == [
        *("dead", "pipe", "pipe.ark"),
    ]
    assert not Path("new").exists()
