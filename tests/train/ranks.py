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


def work(number: int, world: int, port: int, runs: dict[str, list[str]], out: str) -> None:
    """What rank `number` does: gradients, buffers and loss terms after a step of each run, into `out`.NUMBER."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    from spkd import config
    from spkd.train.distributed import ranks_of
    from spkd.train.settings import TrainConfig
    from spkd.train.sharding import divisions, whole_state
    from spkd.train.trainer import build, checked

    results = {}
    with ranks_of(torch.device("cpu")) as ranks:
        for name, keys in runs.items():
            task = checked(config.load(TrainConfig, keys, environ={}))
            run = build(task, Path(out), ranks)
            batches = list(run.loader.batches_from(0, task.config.accumulate, task.config, task.device))
            terms = run.optimisation.step(0, batches)
            gradients = {n: p.grad for n, p in run.module.named_parameters() if p.grad is not None}
            gradients = whole_state(gradients, divisions(run.module))
            found = {f"gradient.{n}": gradient for n, gradient in gradients.items()}
            found |= {f"buffer.{n}": b for n, b in run.module.named_buffers() if "running" in n}
            found |= {f"term.{n}": value for n, value in terms.items()}
            results[name] = {key: value.detach().clone() for key, value in found.items()}
    torch.save(results, f"{out}.{number}")


def steps(world: int, runs: dict[str, list[str]], out: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What every rank found, by run."""
    mp.spawn(work, (world, free_port(), runs, str(out)), nprocs=world)
    return [torch.load(f"{out}.{number}") for number in range(world)]
