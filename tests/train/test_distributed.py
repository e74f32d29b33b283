"""Ranks that share a run come to what one process does."""

from __future__ import annotations

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

from spkd import config
from spkd.errors import SpkdError
from spkd.students import Checkpoint, build, load_student, save_student
from spkd.train.checks import check_ranks
from spkd.train.distributed import Ranks
from spkd.train.settings import TrainConfig
from spkd.train.trainer import checked
from tests.train.ranks import steps

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=8", "crop=0.6", "device=cpu", "workers=0"]
MEMO = [
    "loss.memo.partner=tiny",
    *("loss.memo.partner_channels=8", "loss.memo.locals=1", "loss.memo.local_crop=0.4", "loss.memo.prototypes=32"),
    *("loss.memo.hidden=16", "loss.memo.bottleneck=8"),
]
LOSSES = {
    "contrastive": ["loss=contrastive", "mining.negatives=2"],
    "ntxent and aam": ["loss=[ntxent,aam]"],
    "relational and cosine": ["loss=[relational,cosine]", "accumulate=2"],
    "labels": ["loss=kld"],
    "frames, ecapa": ["loss=multilevel", "loss.multilevel.levels={frames: frames}", "student=ecapa"],
    "divided classes": ["loss=[contrastive,aam]", "loss.aam.sharded=true", "optim.clip=0.1", "accumulate=2"],
    "divided sub-centres": ["loss=aam", "loss.aam.sharded=true", "loss.aam.subcentres=3", "optim.clip_by=tensor"],
    "memo": ["loss=memo", *MEMO],
    "dino and contrastive": ["loss=[memo,contrastive]", *MEMO, "loss.memo.partner=none", "loss.memo.teacher_weight=1"],
    "2-d": ["loss=cosine", "student=resnet34", "student.channels=8"],
}
MAIN = "from spkd.cli import main; main()"


@pytest.fixture
def cached(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_student(tmp_path / "teacher", Checkpoint(build("xvector", channels=16, embedding=12).eval()))
    given = ["teacher=checkpoint", "teacher.weights=teacher", f"manifest={corpus / 'manifest.csv'}", "fbank=true"]
    done = spkd("extract", *given, "teacher.targets=[embedding,frames]", "view.speeds=[0.9,1.0]")
    assert done.code == 0, done.err


@pytest.mark.usefixtures("cached")
def test_gradients_and_statistics_are_those_of_one_process(tmp_path: Path) -> None:
    runs = {name: [*SMALL, "optim.clip=0", *keys] for name, keys in LOSSES.items()}
    (alone,), ranks = steps(1, runs, tmp_path / "one"), steps(2, runs, tmp_path / "two")
    for name, one in alone.items():
        assert one.keys() == ranks[0][name].keys()
        for key, expected in one.items():
            first, second = (rank[name][key] for rank in ranks)
            if key.startswith("term."):
                assert torch.allclose((first + second) / 2, expected, rtol=1e-3), (name, key)
                continue
            assert torch.equal(first, second), (name, key)
            if name == "2-d":  # a deep network of tiny batches amplifies the rounding of their statistics
                assert torch.cosine_similarity(first.flatten(), expected.flatten(), dim=0) > 0.999, key
                continue
            near = 2e-5 * max(1.0, float(expected.abs().max()))
            assert torch.allclose(first, expected, rtol=1e-3, atol=near), (name, key)


def torchrun(arguments: list[str], tmp_path: Path) -> subprocess.Popen:
    (tmp_path / "main.py").write_text(MAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command, piped = [*launcher, "train", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=piped, stderr=piped, text=True)


@pytest.mark.usefixtures("cached")
def test_two_ranks_of_torchrun_train_one_student_and_continue_exactly(tmp_path: Path) -> None:
    arguments = ["--loss", "contrastive", *SMALL, "steps=40", "save_every=10"]
    out, error = torchrun([*arguments, "out=whole"], tmp_path).communicate(timeout=120)
    assert (tmp_path / "whole" / "model.safetensors").is_file(), error
    assert out.count("parameters; mean of the last steps") == 1
    running = torchrun([*arguments, "out=cut"], tmp_path)
    while not (tmp_path / "cut" / "state.json").is_file():
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = running.communicate(timeout=120)
    assert running.returncode
    assert "Traceback" not in "".join(line for line in error.splitlines() if line.startswith("error:"))
    torchrun([*arguments, "out=cut"], tmp_path).communicate(timeout=120)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [0, 20]
    assert load_student(tmp_path / "whole").training["steps"] == 40


@pytest.mark.usefixtures("cached")
def test_divided_classes_are_one_classifier_on_disk(spkd: Callable, tmp_path: Path) -> None:
    """Saved by two ranks, finished by one process, and the other way round: as if never divided."""

    def run(ranks: int, out: str, *more: str) -> None:
        given = [*arguments, f"out={out}", *more]
        error = spkd("train", *given).err if ranks == 1 else torchrun(given, tmp_path).communicate(timeout=120)[1]
        assert (tmp_path / out / "model.safetensors").is_file(), error

    arguments = ["--loss", "aam", *SMALL, "steps=8", "save_every=4", "loss.aam.sharded=true", "optim.clip=0.5"]
    arguments += ["optim.schedule=constant", "optim.warmup=0"]
    for name, first, then in (("a", 2, 1), ("b", 1, 2)):
        run(first, name)
        run(then, name, "steps=12")
    a, b = (load_student(tmp_path / name) for name in "ab")
    assert a.classes == b.classes
    assert a.training["steps"] == b.training["steps"] == 12
    assert a.head is not None
    assert b.head is not None
    assert a.head.shape == (len(a.classes), 8)
    assert torch.cosine_similarity(a.head, b.head).min() > 0.999


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["loss=cosine", "batch_size=7"], "of all ranks together, so a multiple of 2"),
        (["loss=cosine", "batch_size=64"], "usable views are less than a batch of all ranks"),
    ],
)
def test_what_cannot_be_divided_is_refused(given: list[str], error: str) -> None:
    task = checked(config.load(TrainConfig, [*SMALL, *given], environ={}))
    with pytest.raises(SpkdError, match=error):
        check_ranks(Ranks(0, 2), task.cache, task.config)
