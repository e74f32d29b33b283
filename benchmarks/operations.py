"""How many operations is a training step? A GPU waits for Python where each of them is small.

Forward, losses, backward, clipping and the fused optimiser of one step in fp32, counted by torch's dispatcher: all that
start kernels, so neither views nor allocations. What a GPU does to many tensors at once counts as one, as there. Small
tensors of random values serve, since the number does not depend on their sizes.
- students: each at its default width, with the losses of best-mini;
- recipes: each with its own student and losses; `network` counts forward and backward of the student alone, which
  compile=reduce-overhead repeats from CUDA graphs with a launch for each direction.

    python benchmarks/operations.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/operations.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import record
import torch
from torch import Tensor
from torch.utils import _foreach_utils as foreach
from torch.utils._python_dispatch import TorchDispatchMode

from spkd import config
from spkd.cache import Crop
from spkd.networks.network import forward_crops
from spkd.outputs.target import LOGITS, Target
from spkd.registry import STUDENTS
from spkd.students import Network, make_student
from spkd.train.alignment import Alignment
from spkd.train.loading import TrainBatch
from spkd.train.losses.base import LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum, chosen_losses
from spkd.train.module import TrainingModule
from spkd.train.settings import TrainConfig
from spkd.train.step import Optimisation

VIEWS, SECONDS, CLASSES, NEGATIVES = 4, 1.2, 8, 4
DIM, FRAMES = 256, Target("frames", 32, 320, 400)
LOSSES = "best-mini"  # recipe whose losses train every student
STEP = 101  # MeMo measures its networks in every tenth
NO_KERNEL = {f"aten::{kind}" for kind in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
NO_KERNEL |= {"aten::_unsafe_view", "aten::lift_fresh"}


class Counted(TorchDispatchMode):
    """Mode that counts the operations that start kernels, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not func.is_view and name not in NO_KERNEL:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def many_at_once() -> Iterator[None]:
    """Let torch update and clip many tensors at once while the block runs, as it does on a GPU alone."""
    before = foreach._get_foreach_kernels_supported_devices
    foreach._get_foreach_kernels_supported_devices = lambda: ["cpu"]
    try:
        yield
    finally:
        foreach._get_foreach_kernels_supported_devices = before


def settings(recipe: str, student: str = "") -> TrainConfig:
    """Settings of a recipe, with its student from random weights, or with another student."""
    given = [f"student={student}", "student.embedding=192"] if student else []
    options = config.load(TrainConfig, [*given, "steps=1000", "batch_size=4"], environ={}, base=recipe)
    options.student.init = None
    return options


def module_of(options: TrainConfig) -> tuple[TrainingModule, dict[str, Target]]:
    """A student with its losses, and the targets that they learn from."""
    losses = chosen_losses(options.loss)
    network = make_student(options.student)
    targets = {LOGITS: Target(LOGITS, CLASSES)}
    for name in {name for loss in losses.values() for name in loss.needed_targets} - {LOGITS}:
        targets[name] = Target(name, FRAMES.dim, FRAMES.hop, FRAMES.window) if "frames" in name else Target(name, DIM)
    objective = WeightedSum(
        {name: (loss, "") for name, loss in losses.items()}, LossContext(network.levels, targets, CLASSES)
    )
    return TrainingModule(network, objective, options.optim.swa_fraction), targets


def batch_of(options: TrainConfig, network: Network, targets: dict[str, Target]) -> TrainBatch:
    """A batch of random values as the loader gives it, with hard negatives where they are mined."""
    kind, samples = network.input_kind, round(SECONDS * 16_000)
    losses = chosen_losses(options.loss).values()
    further = max((loss.settings.further_crops() for loss in losses), key=len)
    lengths = [samples, *(samples if seconds in (0, options.crop) else samples // 2 for seconds in further)]
    crops = [torch.randn(VIEWS, kind.num_frames(n), kind.dim) for n in lengths]
    values, alignments, crop = {}, {}, Crop(np.zeros(VIEWS, int), samples)
    for name, target in targets.items():
        shape = (VIEWS, target.dim) if target.hop is None else (VIEWS, int(target.num_frames(samples)), target.dim)
        values[name] = torch.randn(shape)
        if target.hop is not None:
            alignments[name] = Alignment.of(network.levels["frames"], target, np.full(VIEWS, samples), crop)
    label = torch.arange(VIEWS)
    mined = options.mining.negatives > 0
    inputs = LossInputs(
        *(values, label, label, label),
        teacher_scale=30.0,
        negatives=torch.randn(VIEWS, NEGATIVES, DIM) if mined else None,
        is_negative=torch.ones(VIEWS, NEGATIVES) > 0 if mined else None,
        other_instance=[label for _ in crops[1:]],
        alignments=alignments,
        finetune_label=label,
    )
    finetunes = any(loss.settings.finetunes() for loss in losses)
    return TrainBatch(crops, inputs, crops[0] if finetunes else None)


def counted(call: Callable[[], object]) -> Counter[str]:
    with many_at_once(), Counted() as counts:
        call()
    return counts.by_name


def count(options: TrainConfig) -> tuple[dict[str, int], Counter[str]]:
    """Operations of a step, and of the student within it; and those of the step by name."""
    torch.manual_seed(0)
    module, targets = module_of(options)
    optimisation = Optimisation(options, module, torch.device("cpu"))
    batch = batch_of(options, module.network, targets)
    optimisation.step(STEP - 1, [batch])  # the optimiser makes its state
    by_name = counted(lambda: optimisation.step(STEP, [batch]))

    def student() -> None:
        crops = batch.crops if batch.finetune_batch is None else [torch.cat([batch.crops[0], batch.finetune_batch])]
        levels: list[Tensor] = [level for crop in forward_crops(module.network, crops) for level in crop.values()]
        torch.autograd.backward(levels, [torch.ones_like(level) for level in levels])

    optimisation.optimiser.zero_grad(set_to_none=True)
    return {"step": by_name.total(), "network": counted(student).total()}, by_name


def main() -> None:
    options = record.options(__doc__)
    options.add_argument("--students", nargs="*", default=list(STUDENTS))
    options.add_argument("--recipes", nargs="*", default=config.recipes())
    options.add_argument("--by-name", action="store_true", help="also print the most frequent operations of each")
    given = record.parse(options, students=["tiny"], recipes=["best-mini"])
    names = [(name, settings(LOSSES, name)) for name in given.students]
    found: dict[str, dict[str, dict[str, int]]] = {"students": {}, "recipes": {}}
    for kind, rows in (("students", names), ("recipes", [(name, settings(name)) for name in given.recipes])):
        for name, chosen in rows:
            found[kind][name], by_name = count(chosen)
            print(f"{kind[:-1]:8} {name:16} {found[kind][name]}", flush=True)
            if given.by_name:
                print("  " + ", ".join(f"{op.removeprefix('aten::')} {n}" for op, n in by_name.most_common(25)))
    record.keep("operations", found, given.tiny)


if __name__ == "__main__":
    main()
