"""Two ranks (gloo) against one process with the same batches: gradients, and time.

    python benchmarks/train_ddp.py

Prints, as its last line, one JSON object; keeps it in benchmarks/results/train_ddp.json. Each process has one thread.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path

import record
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from train_resume import TRAIN, prepare, start  # noqa: E402

from tests.train.ranks import steps  # noqa: E402

KEYS = ["student=xvector", "student.channels=128", "student.embedding=64", "batch_size=32", "crop=1.0", "device=cpu"]
KEYS += ["optim.clip=0"]
MEMO = ["loss.memo.partner=tiny", "loss.memo.partner_channels=32", "loss.memo.locals=2", "loss.memo.local_crop=0.6"]
LOSSES = {
    "contrastive, mined negatives": ["loss=contrastive", "mining.negatives=4"],
    "contrastive, ntxent, aam": ["loss=[contrastive,ntxent,aam]", "mining.negatives=4"],
    "relational, cosine": ["loss=[relational,cosine]"],
    "classes divided": ["loss=aam", "loss.aam.sharded=true"],
    "memo": ["loss=memo", *MEMO, "loss.memo.prototypes=512", "loss.memo.hidden=128", "loss.memo.bottleneck=64"],
}


def main() -> None:
    options = record.options(__doc__, "train_ddp")
    options.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="whose trainings are timed")
    options.add_argument("--steps", type=int, default=600, help="of a training that is timed")
    given = record.parse(options, losses=["relational, cosine"], ranks=[2], steps=10)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    random.seed(0)
    prepare(given.work)
    differences = {}
    for loss in given.losses:
        keys = [*KEYS, f"cache={given.work / 'cache'}", *LOSSES[loss]]
        one, two = (
            steps(world, {loss: keys}, ["fp32"], given.work / f"ranks{world}")[0][f"{loss}, fp32"] for world in (1, 2)
        )
        scale = max(float(v.abs().max()) for k, v in one.items() if k.startswith("gradient."))
        differences[loss] = max(float((one[k] - two[k]).abs().max()) for k in one if k.startswith("gradient.")) / scale
    seconds = {}
    for ranks in given.ranks:
        began = time.perf_counter()
        if start(given.work, ranks, [*TRAIN, f"steps={given.steps}", "save_every=20", f"out=time{ranks}"]).wait():
            raise SystemExit((given.work / "log.txt").read_text())
        seconds[str(ranks)] = round(time.perf_counter() - began, 1)
    result = {
        "max_gradient_difference": max(differences.values()),
        "by_loss": differences,
        "seconds": seconds,
        "torch_threads": torch.get_num_threads(),
    }
    record.keep("train_ddp", result, given.tiny)


if __name__ == "__main__":
    main()
