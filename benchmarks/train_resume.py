"""A training that is killed again and again against one that is not: are losses and weights the same, bit for bit?

    python benchmarks/train_resume.py --kills 5

Runs `spkd train` on a synthetic corpus, alone and as two ranks of torchrun (gloo), kills it with SIGKILL at random
moments, starts the same command again, and compares log.jsonl and the weights with those of an uninterrupted run.
Prints, as its last line, one JSON object; keeps it in benchmarks/results/train_resume.json.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import record
import soundfile
import torch

from spkd.corpus.manifest import Manifest, Utterance
from spkd.demo.synthesis import speaker, utterance

HERE = Path(__file__).parent
RUN = "import sys; from spkd.cli import main; sys.argv = ['spkd', *sys.argv[1:]]; main()"
TRAIN = ["train", "--loss", "aam", "--loss", "contrastive", "--loss", "ntxent", "cache=cache", "student=xvector"]
TRAIN += ["student.channels=48", "student.embedding=32", "batch_size=16", "crop=1.0", "mining.negatives=4"]
TRAIN += ["optim.swa_fraction=0.2", "device=cpu"]


def command(ranks: int, arguments: list[str]) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-c", RUN, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(HERE / "spkd_main.py"), *arguments]


def start(work: Path, ranks: int, arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    with open(work / "log.txt", "a") as log:
        return subprocess.Popen(
            command(ranks, arguments), cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def descendants(process: int) -> list[int]:
    """The processes that one has started, and theirs: torchrun's ranks have sessions of their own."""
    children = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*(one for child in children for one in descendants(child)), *children]


def prepare(work: Path) -> None:
    rows = []
    for s in range(12):
        for u in range(6):
            path = work / f"{s}-{u}.wav"
            soundfile.write(path, utterance(speaker(s), 6 * s + u, 1.5), 16_000)
            rows.append(Utterance(path.stem, str(path), f"s{s}", 1.5))
    Manifest(tuple(rows)).save(work / "manifest.csv")
    common = ["manifest=manifest.csv", "fbank=true"]
    for arguments in (
        ["extract", "teacher=none", *common, "cache=features"],
        [
            "train",
            "--loss",
            "aam",
            "cache=features",
            "student.channels=32",
            "student.embedding=24",
            "steps=5",
            "out=teacher",
        ],
        [
            "extract",
            "teacher=checkpoint",
            "teacher.weights=teacher",
            *common,
            "cache=cache",
            "view.speeds=[0.9,1.0,1.1]",
        ],
    ):
        if start(work, 1, arguments).wait():
            raise SystemExit((work / "log.txt").read_text())


def compared(work: Path, ranks: int, steps: int, kills: int, chance: random.Random) -> dict[str, object]:
    train = [*TRAIN, f"steps={steps}", f"save_every={max(steps // 30, 1)}"]
    whole, killed = f"whole{ranks}", f"killed{ranks}"
    began = time.perf_counter()
    if start(work, ranks, [*train, f"out={whole}"]).wait():
        raise SystemExit((work / "log.txt").read_text())
    seconds, done, starts = time.perf_counter() - began, 0, 0
    while done < kills:
        starts += 1
        running = start(work, ranks, [*train, f"out={killed}"])
        try:
            running.wait(timeout=chance.uniform(0.27, 0.35) * seconds)
            break  # finished before its time came
        except subprocess.TimeoutExpired:
            for process in [*descendants(running.pid), running.pid]:
                os.kill(process, signal.SIGKILL)
            running.wait()
            done += 1
    if start(work, ranks, [*train, f"out={killed}"]).wait():
        raise SystemExit((work / "log.txt").read_text())
    logs = [(work / name / "log.jsonl").read_text() for name in (whole, killed)]
    weights = [(work / name / "model.safetensors").read_bytes() for name in (whole, killed)]
    return {"kills": done, "losses_equal": logs[0] == logs[1], "weights_equal": weights[0] == weights[1]}


def main() -> None:
    options = record.options(__doc__, "train_resume")
    options.add_argument("--kills", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--steps", type=int, default=600)
    given = record.parse(options, kills=1, ranks=[1], steps=30)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    torch.set_num_threads(1)
    prepare(given.work)
    chance = random.Random(given.seed)
    found = {str(ranks): compared(given.work, ranks, given.steps, given.kills, chance) for ranks in given.ranks}
    result = {"losses_equal": all(one["losses_equal"] for one in found.values()), "ranks": found}
    record.keep("train_resume", result, given.tiny)


if __name__ == "__main__":
    main()
