"""One step of a run on several ranks, in processes of their own."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def step(number: int, world: int, port: int, keys: list[str], out: str) -> None:
    """What rank `number` does: gradients and buffers after a step, and its loss terms, into `out`.NUMBER."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    from spkd import config
    from spkd.train.distributed import ranks_of
    from spkd.train.trainer import build, checked

    task = checked(config.load(config.TrainConfig, keys, environ={}))
    with ranks_of(task.device) as ranks:
        run = build(task, Path(out), ranks)
        batches = list(run.loader.batches_from(0, task.config.accumulate, task.config, task.device))
        terms = run.optimisation.step(0, batches)
        found = {f"gradient.{n}": p.grad for n, p in run.module.named_parameters() if p.grad is not None}
        found |= {f"buffer.{n}": b for n, b in run.module.named_buffers() if "running" in n}
        found |= {f"term.{n}": value for n, value in terms.items()}
        torch.save({name: value.detach().clone() for name, value in found.items()}, f"{out}.{number}")


def steps(world: int, keys: list[str], out: Path) -> list[dict[str, torch.Tensor]]:
    """What every rank found."""
    mp.spawn(step, (world, free_port(), keys, str(out)), nprocs=world)
    return [torch.load(f"{out}.{number}") for number in range(world)]
