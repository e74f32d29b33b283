"""`spkd train` through the real command line."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spkd import models
from spkd.config import OptimConfig
from spkd.models import Checkpoint
from spkd.train.trainer import learning_rate, make_optimiser

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6", "steps=12"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    models.save(tmp_path / "teacher", Checkpoint(models.build("xvector", channels=16, embedding=12).eval()))
    return tmp_path / "teacher"


@pytest.fixture
def cached(spkd: Callable, corpus: Path, teacher: Path) -> None:
    done = spkd(
        "extract",
        "teacher=checkpoint",
        f"teacher.weights={teacher}",
        f"manifest={corpus / 'manifest.csv'}",
        "fbank=true",
        "view.speeds=[0.9,1.0]",
    )
    assert done.code == 0, done.err


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("student", ["xvector", "ecapa"])
@pytest.mark.parametrize("losses", [["aam"], ["cosine"], ["mse"], ["contrastive"], ["aam", "contrastive", "cosine"]])
def test_every_loss_trains_every_student(spkd: Callable, student: str, losses: list[str]) -> None:
    chosen = [argument for loss in losses for argument in ("--loss", loss)]
    done = spkd("train", *chosen, f"student={student}", *SMALL)
    assert done.code == 0, done.err
    checkpoint = models.load("student")
    assert checkpoint.training["settings"]["losses"] == losses
    assert set(checkpoint.training["last_terms"]) == set(losses)
    assert (checkpoint.head is not None) == ("aam" in losses)
    if checkpoint.head is not None:
        assert len(checkpoint.classes) == len(checkpoint.head) == 12
    lines = [json.loads(line) for line in Path("student/log.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", "lr", *losses}
    assert list(Path("student/tensorboard").glob("events.*"))
    assert not list(Path("student").glob("state*"))


@pytest.mark.usefixtures("cached")
def test_training_lowers_the_loss(spkd: Callable) -> None:
    done = spkd("train", "--loss", "cosine", *SMALL[:-1], "steps=150", "optim.warmup=10", "optim.lr=0.01")
    assert done.code == 0, done.err
    first = json.loads(Path("student/log.jsonl").read_text().splitlines()[0])["cosine"]
    assert models.load("student").training["last_terms"]["cosine"] < 0.5 * first


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_killed_run_continues_to_the_same_weights(spkd: Callable, tmp_path: Path, optimiser: str) -> None:
    arguments = [
        "train",
        "--loss",
        "contrastive",
        "--loss",
        "aam",
        *SMALL[:-1],
        "steps=40",
        "save_every=5",
        f"optim={optimiser}",
    ]
    assert spkd(*arguments, "out=whole").code == 0
    command = [sys.executable, "-c", "from spkd.cli import main; main()", *arguments, "out=killed"]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it in their last bits
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command, cwd=tmp_path, env=threads, **quiet)  # type: ignore[call-overload]
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    done = spkd(*arguments, "out=killed")
    assert done.code == 0, done.err
    whole, killed = load_file("whole/model.safetensors"), load_file("killed/model.safetensors")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in Path("killed/log.jsonl").read_text().splitlines()]
    assert steps == [0, 20]
    assert "finished already" in spkd(*arguments, "out=killed").out


@pytest.mark.usefixtures("cached")
def test_a_folder_with_another_run_is_not_overwritten(spkd: Callable) -> None:
    assert spkd("train", "--loss", "mse", *SMALL).code == 0
    done = spkd("train", "--loss", "cosine", *SMALL)
    assert (done.code, "holds a student with other settings" in done.err) == (1, True)


def test_audio_is_replayed_where_no_features_are_cached(spkd: Callable, corpus: Path, teacher: Path) -> None:
    extract = [
        "extract",
        "teacher=checkpoint",
        f"teacher.weights={teacher}",
        f"manifest={corpus / 'manifest.csv'}",
        "view=crops:2,0.6",
    ]
    assert spkd(*extract).code == 0
    assert spkd(*extract, "cache=with", "fbank=true", "storage.codec=float32").code == 0
    assert spkd(*extract, "cache=without", "storage.codec=float32").code == 0
    done = spkd("train", "--loss", "mse", *SMALL)
    assert (done.code, "give manifest=FILE, or extract with fbank=true" in done.err) == (1, True)
    assert spkd("train", "--loss", "mse", *SMALL, "cache=with", "out=a").code == 0
    done = spkd("train", "--loss", "mse", *SMALL, "cache=without", "out=b", f"manifest={corpus / 'manifest.csv'}")
    assert done.code == 0, done.err
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    assert all(torch.allclose(a[name], b[name], atol=2e-2) for name in a if "num_batches" not in name)
    Path("other.csv").write_text("utt,path,speaker,duration\nx,x.wav,s,1\n")
    done = spkd("train", "--loss", "mse", *SMALL, "cache=without", "out=c", "manifest=other.csv")
    assert (done.code, "extracted from another manifest" in done.err) == (1, True)


def test_what_the_cache_lacks_is_refused_with_the_command_that_makes_it(spkd: Callable, corpus: Path) -> None:
    assert spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}").code == 0
    done = spkd("train", "--loss", "contrastive", *SMALL)
    assert done.code == 1
    assert "needs the target embedding" in done.err
    assert "spkd extract teacher=NAME " in done.err
    assert "teacher.targets=[embedding]" in done.err
    assert spkd("train", "--loss", "aam", *SMALL).code == 0


def test_labels_are_asked_for_only_where_needed(spkd: Callable, corpus: Path, teacher: Path) -> None:
    text = (corpus / "manifest.csv").read_text().splitlines()
    rows = [line.split(",") for line in text]
    Path("unlabelled.csv").write_text(
        "\n".join(",".join([r[0], str(corpus / r[1]) if i else r[1], r[3]]) for i, r in enumerate(rows))
    )
    assert (
        spkd(
            "extract", "teacher=checkpoint", f"teacher.weights={teacher}", "manifest=unlabelled.csv", "fbank=true"
        ).code
        == 0
    )
    done = spkd("train", "--loss", "aam", *SMALL)
    assert (done.code, "needs speaker labels" in done.err) == (1, True)
    assert spkd("train", "--loss", "contrastive", *SMALL).code == 0


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["cache=none"], "no teacher cache"),
        (["--loss", "kosine"], "did you mean 'cosine'"),
        (["student.channels=30", "student=ecapa"], "multiple of 8"),
        (["batch_size=1"], "at least 2"),
        (["out=file/x"], "cannot be written"),
        (["optim.lr=1e9", "optim.warmup=0", "optim.clip=0"], "diverged"),
    ],
)
def test_one_line_errors(spkd: Callable, extra: list[str], expected: str) -> None:
    Path("file").touch()
    done = spkd("train", "--loss", "mse", *SMALL[2:], "student.channels=16", *extra)
    assert done.code in (1, 2)
    assert expected in done.err
    assert len(done.err.splitlines()) == 1


def test_the_schedule_warms_up_and_decays_to_its_end() -> None:
    config = OptimConfig(lr=1.0, final_lr=0.1, warmup=10)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert abs(rates[-1] - 0.1) < 1e-12
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_only_matrices_are_decayed() -> None:
    network = models.build("xvector", channels=16, embedding=8)
    decayed, free = make_optimiser(OptimConfig(), network).param_groups
    assert decayed["weight_decay"] > 0 == free["weight_decay"]
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
