"""One step of a run on several ranks, in processes of their own."""

from __future__ import annotations

import copy
import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import nn

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMALISED = ((nn.BatchNorm1d, (16, 4, 8209)), (nn.BatchNorm2d, (16, 4, 80, 103)))  # more values than float16 counts to
Found = dict[str, torch.Tensor]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def work(number: int, world: int, port: int, runs: dict[str, list[str]], out: str) -> None:
    """What rank `number` does: gradients, buffers and loss terms after a step of each run, in every precision, and what
    batch-norms give; into `out`.NUMBER."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    from spkd import config
    from spkd.train.distributed import ranks_of
    from spkd.train.settings import TrainConfig
    from spkd.train.trainer import build, checked

    results = {}
    with ranks_of(torch.device("cpu")) as ranks:
        for name, keys in runs.items():
            # One rank alone has all classes: there the setting is refused.
            kept = [key for key in keys if world > 1 or ".sharded=" not in key]
            task = checked(config.load(TrainConfig, kept, environ={}))
            run = build(task, Path(out), ranks)
            batches = list(run.loader.batches_from(0, task.config.accumulate, task.config, task.device))
            fresh = copy.deepcopy(run.module.state_dict())
            for precision, type_ in TYPES.items():
                run.module.load_state_dict(fresh)
                run.optimisation._type = type_  # float16, too, which a CPU can compute in; the setting refuses it there
                results[f"{name}, {precision}"] = step(run, batches)
        if world > 1:
            results["batch-norm"] = normalised(ranks.number, world)
    torch.save(results, f"{out}.{number}")


def step(run: object, batches: list) -> Found:
    from spkd.train.sharding import divisions, whole_state

    terms = run.optimisation.step(0, batches)  # type: ignore[attr-defined]
    module: nn.Module = run.module  # type: ignore[attr-defined]
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    gradients = whole_state(gradients, divisions(module))
    found = {f"gradient.{n}": gradient for n, gradient in gradients.items()}
    found |= {f"buffer.{n}": b for n, b in module.named_buffers() if "running" in n}
    found |= {f"term.{n}": value for n, value in terms.items()}
    return {key: value.detach().clone() for key, value in found.items()}


def values_of(kind: type[nn.Module], shape: tuple[int, ...], type_: torch.dtype) -> torch.Tensor:
    """Input of a batch-norm, the same for every rank."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 1.5 + 3).to(type_)


def normalised(number: int, world: int) -> Found:
    """What batch-norms over all ranks give for this rank's rows, and their statistics."""
    from spkd.train.distributed import share_over_ranks

    found = {}
    for kind, shape in NORMALISED:
        for type_ in (torch.float32, torch.bfloat16, torch.float16):
            norm = kind(shape[1])
            share_over_ranks(nn.Sequential(norm), shape[0] // world)
            rows = values_of(kind, shape, type_).chunk(world)[number]
            name = f"{kind.__name__} {type_}"
            found |= {name: norm(rows).detach(), f"{name} mean": norm.running_mean, f"{name} var": norm.running_var}
    return found


def steps(world: int, runs: dict[str, list[str]], out: Path) -> list[dict[str, Found]]:
    """What every rank found, by run."""
    mp.spawn(work, (world, free_port(), runs, str(out)), nprocs=world)
    return [torch.load(f"{out}.{number}") for number in range(world)]
