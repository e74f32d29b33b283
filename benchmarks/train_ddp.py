"""Two ranks (gloo) against one process with the same batches: gradients, and time.

    python benchmarks/train_ddp.py

Prints, as its last line, one JSON object; keeps it in benchmarks/results/train_ddp.json. Each process has one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from machine import describe

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from train_resume import TRAIN, prepare, start  # noqa: E402

from tests.train.ranks import steps  # noqa: E402

KEYS = ["student=xvector", "student.channels=128", "student.embedding=64", "batch_size=32", "crop=1.0", "device=cpu"]
KEYS += ["workers=0", "optim.clip=0"]
MEMO = ["loss.memo.partner=tiny", "loss.memo.partner_channels=32", "loss.memo.locals=2", "loss.memo.local_crop=0.6"]
LOSSES = {
    "contrastive, mined negatives": ["loss=contrastive", "mining.negatives=4"],
    "contrastive, ntxent, aam": ["loss=[contrastive,ntxent,aam]", "mining.negatives=4"],
    "relational, cosine": ["loss=[relational,cosine]"],
    "classes divided": ["loss=aam", "loss.aam.sharded=true"],
    "memo": ["loss=memo", *MEMO, "loss.memo.prototypes=512", "loss.memo.hidden=128", "loss.memo.bottleneck=64"],
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=HERE / "work" / "train_ddp")
    given = options.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    random.seed(0)
    prepare(given.work)
    differences = {}
    for loss, own in LOSSES.items():
        keys = [*KEYS, f"cache={given.work / 'cache'}", *own]
        one, two = (steps(world, {loss: keys}, given.work / f"ranks{world}")[0][loss] for world in (1, 2))
        scale = max(float(v.abs().max()) for k, v in one.items() if k.startswith("gradient."))
        differences[loss] = max(float((one[k] - two[k]).abs().max()) for k in one if k.startswith("gradient.")) / scale
    seconds = {}
    for ranks in (1, 2):
        began = time.perf_counter()
        if start(given.work, ranks, [*TRAIN, f"out=time{ranks}"]).wait():
            raise SystemExit((given.work / "log.txt").read_text())
        seconds[str(ranks)] = round(time.perf_counter() - began, 1)
    result = {
        "max_gradient_difference": max(differences.values()),
        "by_loss": differences,
        "seconds": seconds,
        "machine": describe(),
        "torch_threads": torch.get_num_threads(),
    }
    (HERE / "results" / "train_ddp.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
