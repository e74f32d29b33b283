"""One step of a run on several ranks, in processes of their own."""

from __future__ import annotations

import copy
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.processes import SERVER, command, free_port

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMALISED = ((nn.BatchNorm1d, (16, 4, 8209)), (nn.BatchNorm2d, (16, 4, 80, 103)))  # more values than float16 counts to
Found = dict[str, torch.Tensor]


def environment(number: int, world: int, port: int) -> dict[str, str]:
    """Variables that torchrun sets for a rank."""
    return {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def train_elsewhere(*arguments: str) -> None:
    """`spkd train` of a rank that soon believes that a file is not there."""
    from spkd.train import checks

    checks.SEEN_WITHIN = 2.0
    command("train", *arguments)


def join(kind: str) -> None:
    """Meet the other ranks with a device of this kind."""
    from spkd.train.distributed import ranks_of

    with ranks_of(torch.device(kind)):
        pass


def wait_for_the_first(number: int, port: int, seconds: float, out: str) -> None:
    """Wait for a first rank that works alone for longer than a collective operation may take; then in such an one."""
    os.environ |= environment(number, 2, port)
    from spkd.train.distributed import first_ranks, ranks_of

    with ranks_of(torch.device("cpu")) as ranks:
        ranks.barrier()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))
        with ranks.first_alone():
            time.sleep(2 * seconds if ranks.is_first else 0)
        Path(f"{out}.{number}").write_text(str(int(first_ranks(torch.tensor(7 + number)))))
        try:
            with ranks.first_alone():
                if ranks.is_first:
                    raise ValueError("damaged")
        except (ValueError, RuntimeError) as error:
            Path(f"{out}.{number}.failed").write_text(str(error))
        try:
            time.sleep(2 * seconds if ranks.is_first else 0)
            first_ranks(torch.tensor(7 + number))
        except RuntimeError:
            Path(f"{out}.{number}.late").touch()


def work(number: int, world: int, port: int, runs: dict[str, list[str]], precisions: list[str], out: str) -> None:
    """What rank `number` does: gradients, buffers and loss terms after a step of each run, in these precisions, and
    what batch-norms give; into `out`.NUMBER."""
    os.environ |= environment(number, world, port)
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
            for precision in precisions:
                run.module.load_state_dict(fresh)
                # Also float16, which the setting refuses on a CPU, though it can compute in it.
                run.optimisation._type = TYPES[precision]
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


def steps(world: int, runs: dict[str, list[str]], precisions: list[str], out: Path) -> list[dict[str, Found]]:
    """What every rank found, by run."""
    arguments = world, free_port(), runs, precisions, str(out)
    mp.start_processes(work, arguments, nprocs=world, start_method=SERVER.get_start_method())
    return [torch.load(f"{out}.{number}") for number in range(world)]
