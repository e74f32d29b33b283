from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import typer

from spkd import cli, config
from spkd.corpus.manifest import Manifest
from spkd.eval.settings import EvalConfig
from spkd.extract.settings import ExtractConfig
from spkd.train.settings import TrainConfig
from spkd.version import __version__
from tests import processes


@pytest.mark.parametrize(
    "arguments", [["--help"], ["extract", "--help"], ["train", "--help"], ["eval", "--help"], ["--version"]]
)
def test_help_needs_no_heavy_import(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom spkd.cli import main\nsys.argv = ['spkd', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'zarr', 'faiss', 'transformers', 'matplotlib', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "schema"),
    [("extract", ExtractConfig), ("train", TrainConfig), ("eval", EvalConfig)],
)
def test_help_shows_every_key(spkd: Callable, command: str, schema: type) -> None:
    out = spkd(command, "--help").out
    for key in config.keys(schema):
        assert key.name in out
    # A key's meaning has the whole width of a terminal of 80 columns, but for its indent.
    lines = out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("device  str, default auto"))
    device = next(key for key in config.keys(schema) if key.name == "device")
    meaning = f"{device.meaning} ({' | '.join(device.choices)})"
    assert lines[place + 1].strip() == textwrap.wrap(meaning, 76)[0]


def test_a_folder_that_is_no_cache_is_said_alike(spkd: Callable) -> None:
    expected = "nosuch: no teacher cache; name its folder, or make one with `spkd extract cache=nosuch`"
    for command in ("info", "verify"):
        done = spkd("cache", command, "nosuch")
        assert (done.code, expected in done.err) == (2, True), done.err


def test_the_three_command_run_needs_no_options(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    Path("spkd.yaml").write_text(
        f"device: cpu\nextract:\n  teacher: {{weights: {tiny_wavlm}}}\n  fbank: true\n"
        "train:\n  steps: 4\n  batch_size: 4\n  crop: 0.6\n  student: {channels: 16, embedding: 8}\n"
    )
    assert spkd("manifest", corpus / "audio").out.startswith("manifest.csv: 18 utterances, 6 speakers")
    for command in (["extract", "teacher=wavlm"], ["train", "--loss", "contrastive"], ["eval", corpus / "trials.txt"]):
        done = spkd(*command).ok()
    assert "EER" in done.out
    assert "all checksums match" in spkd("cache", "verify", "cache").out
    assert "18 utterances, 6 speakers" in spkd("cache", "info", "cache").out


def test_damage_is_reported_by_verify(spkd: Callable, corpus: Path) -> None:
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}").ok()
    shard = Path("cache/fbank/c/0/0")
    data = bytearray(shard.read_bytes())
    data[1000] ^= 4
    shard.write_bytes(bytes(data))
    done = spkd("cache", "verify", "cache")
    assert done.code == 1
    assert "cache/fbank/c/0/0: changed in rows 0 to 127" in done.err


@pytest.mark.parametrize(
    "command",
    [
        *(
            "extract nonsense",
            "nonsense",
            "manifest",
            "manifest nosuch",
            "manifest made --workers x",
            "manifest m.csv --layout folder",
        ),
        *("manifest made --workers 1_0", "manifest made --workers=\uff13", "report made --bootstrap"),
        *("extract manifest=nosuch teacher=none", "extract manifest=m.csv teacher=checkpoint teacher.weights=nosuch"),
        *("train", "train cache=nosuch", "train cache=m.csv", "train --from nosuch", "train --config nosuch.yaml"),
        *("eval", "eval nosuch manifest=m.csv", "eval --scores nosuch", "eval m.csv manifest=nosuch"),
        *(
            "calibrate nosuch model=made manifest=m.csv",
            "report nosuch",
            "report made",
            "export nosuch",
            "export m.csv",
        ),
        *("embed nosuch", "embed m.csv model=nosuch", "embed m.csv out=x.txt", "embed made", "cache info made"),
        *(f"cache {each} nosuch" for each in ("info", "verify", "ls", "catalogue", "merge")),
        *(f"cache {each} nosuch x" for each in ("push", "pull", "import", "export", "merge m.csv")),
        *("cache import nosuch.h5 x", "cache import nosuch.ark x --manifest m.csv", "cache export nosuch x.h5"),
        *("extract manifest=n.csv cache=other teacher=none", "extract manifest=n.csv cache=t.txt teacher=none"),
        *(
            "manifest audio --layout voxceleb",
            "manifest audio --suffix mp3",
        ),
        *(f"extract manifest=n.csv teacher=none view.{given}" for given in ("noise=nosuch", "rir=m.csv")),
        *("eval t.txt manifest=m.csv model=ok", "eval m.csv manifest=m.csv model=ok"),
        *("cache estimate manifest=nosuch teacher=none", "cache estimate --hour inf", "cache estimate --hour nan"),
    ],
)
def test_what_has_to_be_typed_otherwise_ends_with_2(spkd: Callable, command: str) -> None:
    from spkd.students import Checkpoint, build, save_student

    for folder in ("made", "other", "audio/x/y/z"):
        Path(folder).mkdir(parents=True)
    Path("other/notes.txt").write_text("x")
    soundfile.write("audio/a.wav", np.random.RandomState(0).normal(0, 0.1, 16_000), 16_000)
    Path("m.csv").write_text("utt,path\na,a.wav\n")
    Path("n.csv").write_text("utt,path\na,audio/a.wav\n")
    Path("t.txt").write_text("1 b c\n0 c b\n")
    if "model=ok" in command:
        save_student("ok", Checkpoint(build("tiny", channels=4, embedding=4)))
    done = spkd(*command.split())
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ")


@pytest.mark.parametrize(
    "command",
    [
        *("manifest made", "extract manifest=m.csv teacher=none"),
        *("embed m.csv model=broken", "report broken", "eval t.txt manifest=m.csv model=broken", "cache info broken"),
        *(
            "train cache=broken",
            "cache pull broken x",
            "eval t.txt manifest=m.csv model=ok calibration=broken/model.json",
        ),
    ],
)
def test_what_fails_as_it_is_typed_ends_with_1(spkd: Callable, command: str) -> None:
    from spkd.students import Checkpoint, build, save_student

    for folder in ("made", "broken"):
        Path(folder).mkdir()
    save_student("ok", Checkpoint(build("tiny", channels=4, embedding=4)))
    Path("made/notes.txt").write_text("x")
    for name in ("model.json", "report.json", "card.json", "COMPLETE.json"):
        Path("broken", name).write_text("{")
    Path("m.csv").write_text("utt,path\na,a.wav\n")
    Path("t.txt").write_text("1 a a\n")
    done = spkd(*command.split())
    assert (done.code, done.err.count("\n")) == (1, 1), done.err


def test_success_ends_with_0(spkd: Callable) -> None:
    done = spkd("--version")
    assert (done.code, done.out.strip()) == (0, __version__)


@pytest.mark.parametrize(
    ("command", "form"),
    [
        ("train loss=aam,cosine", "loss=aam,cosine: no such loss; a list is written loss=[aam,cosine]"),
        ("train --loss aam,cosine", "--loss aam,cosine: one loss for each --loss; a list is written loss=[aam,cosine]"),
        ("train --loss cosine cache=a,b", "cache=a,b: no such folder; a list is written cache=[a,b]"),
        ("train optim.lr=0.1,0.2", "must be a number, not '0.1,0.2'; a run for each of several values: spkd train -m"),
        ("train student=tiny,ssl", "; a run for each of several values: spkd train -m"),
        ("extract view.speeds=0.9,1.1", "; write view.speeds=[0.9,1.1]"),
        ("eval --scores s.txt points=0.1,0.2", "; a list is written points=[0.1,0.2]"),
        ("eval --scores s.txt manifest=m.csv by=age,sex", "; a list is written by=[age,sex]"),
    ],
)
def test_commas_are_answered_with_the_form_that_is_meant(spkd: Callable, command: str, form: str) -> None:
    Path("s.txt").write_text("a b 0.5 target\na c 0.1 nontarget\n")
    Path("m.csv").write_text("utt,path\na,a.wav\nb,b.wav\nc,c.wav\n")
    done = spkd(*command.split())
    assert (done.code, done.err.endswith(f"{form}\n")) == (2, True), done.err


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("manifest out=m.csv audio", "out=m.csv: out is an option; write --out m.csv"),
        ("train --steps 5", "--steps: settings have no dashes; write steps=VALUE"),
        ("eval t.txt --batch-size=5", "--batch-size: settings have no dashes; write batch_size=5"),
        ("train --lr=0.1", "--lr: settings have no dashes; write optim.lr=0.1 or large_margin.lr=0.1"),
        ("cache estimate hour=3", "hour=3: hour is an option; write --hour 3"),
        ("manifest", "Missing argument 'PATHS...'; see `spkd manifest --help`"),
        ("cache nonsense", "No such command 'nonsense'; see `spkd cache --help`"),
        ("train --zzz", "No such option: --zzz; see `spkd train --help`"),
    ],
)
def test_options_and_settings_are_told_apart_in_a_line(spkd: Callable, command: str, error: str) -> None:
    done = spkd(*command.split())
    assert (done.code, done.err) == (2, f"error: {error}\n")


@pytest.mark.parametrize(
    "given", [["manifest", ""], ["manifest", "x", "--out="], ["train", "--recipe", ""], ["eval", ""]]
)
def test_an_empty_argument_is_not_the_current_folder(spkd: Callable, given: list[str]) -> None:
    done = spkd(*given)
    assert (done.code, "an empty argument; is a variable of the shell not set?" in done.err) == (2, True)


def test_keys_that_components_share_are_in_one_line(spkd: Callable) -> None:
    out = spkd("extract", "--help").out
    assert "teacher.wavlm.layer, teacher.hubert.layer" in out
    assert out.count("hidden layer pooled") == 1


def test_manifest_lists_what_it_leaves_out(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "audio" / "ann").mkdir(parents=True)
    (tmp_path / "audio" / "ann" / "bad.wav").write_text("x")
    (tmp_path / "audio" / "ann" / "good.flac").write_bytes((corpus / "audio" / "spk0" / "u0.flac").read_bytes())
    done = spkd("manifest", "audio", "--out", "m.jsonl")
    assert (done.code, "rejected ann/bad.wav: cannot be decoded" in done.err) == (0, True)
    assert spkd("manifest", "audio", "--strict").code == 1
    assert spkd("manifest", "audio", "--out", "m.txt").code == 2


def interrupted(*arguments: str) -> None:
    """The command line, and Ctrl-C as the first batch arrives."""
    import spkd.extract.run as run

    real = run.begin_targets

    def interrupt(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    run.begin_targets = interrupt
    processes.command(*arguments)


def interrupted_at(name: str, *arguments: str) -> None:
    """The command line, and SIGTERM as it opens a file of this name for the first time."""
    asked = []

    def watch(event: str, given: tuple) -> None:
        if event == "open" and not asked and str(given[0]).endswith(f"/{name}"):
            asked.append(name)
            os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(watch)
    processes.command(*arguments)


@pytest.mark.slow
def test_an_interrupt_is_no_damage_of_the_file_that_is_read(spkd: Callable, corpus: Path) -> None:
    extract = ["extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "fbank=true"]
    spkd(*extract).ok()
    train = ["train", "--loss", "aam", "cache=cache", "student.channels=8", "batch_size=4", "crop=0.3", "device=cpu"]
    train += ["optim.schedule=constant", "save_every=2", "out=student"]
    spkd(*train, "steps=2").ok()
    for name, *arguments in (
        ("0.json", "cache", "verify", "cache"),
        ("zarr.json", "cache", "export", "cache", "cache.h5"),
        ("COMPLETE.json", *extract),
        ("manifest.csv", *extract),
        ("state.json", *train, "steps=4"),
        ("state.2.safetensors", *train, "steps=4"),
    ):
        done = processes.Running(interrupted_at, name, *arguments)
        _, error = done.communicate()
        expected = "error: interrupted; what was committed stays, and the same command goes on or starts anew\n"
        assert (done.returncode, error.endswith(expected)) == (130, True), (name, error)
    assert "continuing student at step 2" in spkd(*train, "steps=4").ok().out


def interrupted_in_a_finaliser(*arguments: str) -> None:
    """The command line, and SIGTERM in a finaliser, which no error leaves, as it opens a completion record."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def watch(event: str, given: tuple) -> None:
        if event == "open" and str(given[0]).endswith("COMPLETE.json"):
            Finalised()
            time.sleep(2.0)

    sys.addaudithook(watch)
    processes.command(*arguments)


def test_an_interrupt_in_a_finaliser_ends_the_command(spkd: Callable) -> None:
    Path("cache").mkdir()
    Path("cache/COMPLETE.json").write_text("{}")
    done = processes.Running(interrupted_in_a_finaliser, "cache", "verify", "cache")
    _, error = done.communicate()
    assert done.returncode == 130, error
    assert error == "error: interrupted; what was committed stays, and the same command goes on or starts anew\n"


def test_an_interrupt_leaves_nothing_half_done(spkd: Callable, corpus: Path) -> None:
    arguments = ["extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}"]
    done = processes.Running(interrupted, *arguments)
    _, error = done.communicate()
    assert done.returncode == 130
    assert error == "error: interrupted; what was committed stays, and the same command goes on or starts anew\n"
    assert not list(Path("cache").glob("**/*.part"))
    assert "18 views extracted" in spkd(*arguments).out


def test_a_full_disk_is_reported_as_such_and_the_run_continues(
    spkd: Callable, corpus: Path, manifest: Manifest
) -> None:
    Path("small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", "small"], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        Manifest(manifest.utterances[:6]).save(Path("first.csv"))
        arguments = ["extract", "teacher=none", "cache=small/c", "storage.unit_views=6"]
        done = spkd(*arguments, "manifest=first.csv")
        assert "6 views extracted" in done.out, done.err
        arguments.append(f"manifest={corpus / 'manifest.csv'}")
        done = spkd(*arguments)
        assert done.code == 1
        assert "the disk is full; everything committed stays valid" in done.err
        assert len(done.err.splitlines()) == 1
        subprocess.run(["mount", "-o", "remount,size=2m", "small"], check=True)
        done = spkd(*arguments)
        assert "complete" in done.out
        assert "18 views extracted" not in done.out
        assert "all checksums match" in spkd("cache", "verify", "small/c").out
    finally:
        gc.collect()  # maps of files there, which frames of the error refer to
        subprocess.run(["umount", "small"], check=True)


def commands(group: Any, *above: str) -> dict[tuple[str, ...], Any]:
    """All commands below a group, by their words."""
    found: dict[tuple[str, ...], Any] = {}
    for name, command in group.commands.items():
        words = (*above, name)
        found |= commands(command, *words) if hasattr(command, "commands") else {words: command}
    return found


COMMANDS = commands(typer.main.get_command(cli.app))


@pytest.mark.parametrize("words", COMMANDS, ids="-".join)
def test_every_help_shows_an_example_of_its_command(spkd: Callable, words: tuple[str, ...]) -> None:
    out = " ".join(spkd(*words, "--help").out.split())
    assert f"Example: spkd {' '.join(words)}" in out


@pytest.mark.slow
def test_every_example_of_a_help_runs(spkd: Callable, corpus: Path, tiny_wavlm: Path, s3: str) -> None:
    """As it stands there, but for folders that are the machine's own; sizes come from spkd.yaml."""
    Path("spkd.yaml").write_text(
        f"device: cpu\nteacher: {{weights: {tiny_wavlm}}}\nbootstrap: 5\ncalibrate: {{force: true}}\n"
        "train: {steps: 2, batch_size: 4, crop: 0.6, student: {channels: 8, embedding: 6}}\n"
    )
    places = {
        "/data/voxceleb2": f"{corpus / 'audio'}",
        "/lab/caches": "lab",
        "/scratch/wavlm": "scratch",
        "s3://lab/caches/wavlm": f"{s3}/examples/wavlm",
        "s3://lab/caches": f"{s3}/examples",
    }
    some = Manifest(Manifest.load(corpus / "manifest.csv").utterances[:6])
    for name in ("manifest.csv", "test.csv", "dev.csv", "voxceleb2.csv"):
        some.save(Path(name))
    for name in ("trials.txt", "dev-trials.txt"):
        pairs = itertools.combinations(some, 2)
        Path(name).write_text("".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs))
    made = ["manifest", "extract", "train", "calibrate", "eval", "report", "embed", "export", "enrol", "verify"]
    made += ["identify", "voices", "cache push", "cache repair", "cache ls"]
    order = sorted(COMMANDS, key=lambda words: made.index(" ".join(words)) if " ".join(words) in made else len(made))
    for words in order:
        if words == ("demo",):  # minutes: tests/demo runs it on less
            continue
        example = (COMMANDS[words].epilog or "").removeprefix("Example: spkd ").split()
        ready(words, spkd)
        spkd(*(places.get(word, word) for word in example)).ok()


def ready(words: tuple[str, ...], spkd: Callable) -> None:
    """Put there what an example names and no other example has made."""
    match words:
        case ("report",):
            shutil.copytree("eval", "evaluation")
            Path("eval").rename("eval.old")
            Path("eval").mkdir()
            for name in ("ours", "teacher"):
                shutil.copytree("evaluation", f"eval/{name}")
        case ("enrol",):
            # No speech is found in the breathy voice of the first speaker.
            recordings = [utterance.path for utterance in Manifest.load(Path("manifest.csv"))][3:]
            for path, name in zip(recordings, ("ann1.wav", "ann2.wav", "new.wav"), strict=False):
                shutil.copy(path, name)
        case ("map",):
            for name in ("old", "new"):  # of a student, and of the family
                given = ("teacher=checkpoint", "teacher.weights=student") if name == "old" else ("teacher=wavlm",)
                spkd("extract", *given, "manifest=manifest.csv", f"cache={name}-cache").ok()
        case ("cache", "catalogue"):
            shutil.copytree("cache", "lab/wavlm")
        case ("cache", "merge"):
            half = Manifest.load(Path("manifest.csv")).utterances
            shutil.move("cache", "whole")
            for number in range(2):
                Manifest(half[3 * number : 3 * number + 3]).save(Path(f"half{number}.csv"))
                given = ("teacher=wavlm", f"manifest=half{number}.csv", f"cache=share{number}", "fbank=true")
                spkd("extract", *given).ok()
        case ("cache", "import"):
            spkd("cache", "export", "cache", "out.h5").ok()
            shutil.move("cache", "exported")


def test_settings_are_used_or_refused_never_dropped(spkd: Callable, tmp_path: Path) -> None:
    Path("new.yaml").write_text("train: {loss: [hubbub]}\n")
    assert "loss=hubbub" in spkd("train", "--config", "new.yaml").err
    assert "not by both" in spkd("train", "--loss", "aam", "loss=[mse]").err
    assert "not by both" in spkd("export", "s", "--to", "onnx", "to=pt2").err
    assert "to must not be empty" in spkd("export", "s", "to=").err
    assert "--losses lists every loss" in spkd("train", "--losses", "bogus=1").err
    assert "--targets lists the targets of one teacher" in spkd("extract", "--targets", "--slurm-script").err
    assert "--seed 5 has no effect" in spkd("report", "e", "--bootstrap", "0", "--seed", "5").err
    assert (
        "--target frames: folder gets every target" in spkd("cache", "export", "c", "folder", "--target", "frames").err
    )
    for key in ("cache=c", "workers=1", "engine=ray", "processes=2", "min_seconds=1"):
        done = spkd("cache", "estimate", key)
        assert (done.code, "unknown key" in done.err) == (2, True)
    done = spkd("cache", "estimate", "teacher=none", "device=cpu")
    assert (done.code, "device=cpu has no effect: teacher=none runs no model" in done.err) == (2, True)
    assert "loss=hubbub" in spkd("train", "loss=[contrastive,hubbub]").err
    assert "did you mean 'optim.lr'" in spkd("train", "lr=0.1").err


def test_export_and_verify_take_only_the_keys_they_use(spkd: Callable, corpus: Path) -> None:
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}").ok()
    assert "unknown key" in spkd("cache", "export", "cache", "x.h5", "storage.codec=int8").err
    assert "--audio only" in spkd("cache", "export", "cache", "tars", "manifest=m.csv").err
    assert ".h5 files hold no audio" in spkd("cache", "export", "cache", "x.h5", "--audio").err
    assert "--live only" in spkd("cache", "verify", "cache", "teacher=none").err
    assert "unknown key" in spkd("cache", "verify", "cache", "--live", "1", "batch_size=3").err
    assert not Path("x.h5").exists()
    # A file's section of extract serves both.
    Path("spkd.yaml").write_text(f"extract: {{teacher: none, fbank: true, manifest: {corpus / 'manifest.csv'}}}\n")
    done = spkd("cache", "verify", "cache", "--live", "2")
    assert (done.code, "live: fbank" in done.out) == (0, True), done.err


def test_a_student_in_a_folder_named_like_a_family_is_found(spkd: Callable, corpus: Path) -> None:
    import torch

    from spkd.students import Checkpoint, build, save_student

    torch.manual_seed(0)
    save_student("wavlm", Checkpoint(build("tiny", channels=8, embedding=4)))
    spkd("eval", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "model=wavlm").ok()
    # Weights are those of the family, not of the folder.
    Path("wavlm").rename("onnx")
    done = spkd("embed", corpus / "manifest.csv", "model=onnx", "out=a.npy").ok()
    assert "note: model=onnx is the student in that folder" in done.out
    done = spkd("embed", corpus / "manifest.csv", "model=onnx", "model.weights=nowhere.onnx", "out=b.npy")
    assert done.code != 0
    assert "nowhere.onnx" in done.err
    assert not Path("b.npy").exists()


def test_a_students_precision_acts(spkd: Callable, corpus: Path) -> None:
    import numpy as np
    import torch

    from spkd.students import Checkpoint, build, save_student

    torch.manual_seed(0)
    save_student("student", Checkpoint(build("xvector", channels=8, embedding=4)))
    for name, given in (("full", []), ("half", ["model.precision=bf16"])):
        spkd("embed", corpus / "manifest.csv", f"out={name}.npy", *given).ok()
    full, half = np.load("full.npy"), np.load("half.npy")
    assert not np.array_equal(full, half)
    assert np.abs(full - half).max() < 0.05 * np.abs(full).max()


def test_the_losses_are_listed_with_their_settings(spkd: Callable) -> None:
    from spkd.registry import LOSSES

    out = spkd("train", "--losses").out
    for name in LOSSES.ours:
        assert f"\n{name}: learns from" in f"\n{out}"
    assert "loss.nontarget.gamma" in out
