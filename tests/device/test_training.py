"""Steps of training on a pretended GPU: nothing mixes devices, and the host waits for nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils as foreach

from spkd import config
from spkd.device import sent
from spkd.outputs.target import Target
from spkd.registry import LOSSES, OPTIMISERS, STUDENTS
from spkd.students import build
from spkd.train.distributed import share_over_ranks
from spkd.train.loading import TrainBatch
from spkd.train.losses.base import LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum, chosen_losses
from spkd.train.losses.memo import MeMo
from spkd.train.module import TrainingModule
from spkd.train.settings import TrainConfig
from spkd.train.step import Optimisation
from tests.device.pretended import GPU, HostWaits, gpu
from tests.device.steps import CASES, CLASSES, DIM, STEPS, VIEWS, WAYS, batch, module_of, network_of, students_of


def step(student: str, case: str, way: str, ranks: int = 1) -> None:
    """Do a step on a pretended GPU, as one of several ranks."""
    options = config.load(TrainConfig, [*CASES[case], *WAYS[way], f"steps={STEPS}", "batch_size=4"], environ={})
    network = network_of(student, case)
    module = module_of(options, network)
    for loss in module.objective.by_name().values():
        if isinstance(loss, MeMo):
            loss._steps = 10  # it measures, and the run does not log
    if ranks > 1:
        share_over_ranks(module, VIEWS)
    number = STEPS if way == "large margin" else STEPS // 2
    with gpu():
        module.to(GPU)
        optimisation = Optimisation(options, module, GPU)
        batches = [batch(network, case) for _ in range(options.accumulate)]
        terms = optimisation.step(number, batches)
    assert all(term.device == GPU for term in terms.values())
    trained = [p for p in module.parameters() if p.grad is not None]
    assert trained
    assert all(p.grad.device == p.device == GPU for p in trained if p.grad is not None)


def sampled() -> list[tuple[str, str, str]]:
    """Triples in which every student, every loss and every way occurs; the slow networks with few losses."""
    slow, found = ("campplus", "resnet34", "ecapa", "ssl"), []
    ways = itertools.cycle(WAYS)
    for number, case in enumerate(CASES):
        students = students_of(case)
        rest = [s for s in students if s not in slow] or students
        found.append((slow[number] if number < len(slow) - 1 else rest[number % len(rest)], case, next(ways)))
    return found


@pytest.mark.parametrize(("student", "case", "way"), sampled())
def test_a_step_mixes_no_devices_and_waits_for_nothing(student: str, case: str, way: str) -> None:
    step(student, case, way)


def test_the_sample_has_every_student_loss_and_way() -> None:
    students, cases, ways = (set(names) for names in zip(*sampled(), strict=True))
    assert students == set(STUDENTS)
    assert cases == set(CASES)
    assert ways == set(WAYS)
    assert set(LOSSES) <= {case.split(",")[0] for case in CASES}
    assert set(OPTIMISERS) <= {"adamw", *WAYS}


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """The first of two ranks; torch's `fake` connection sends nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("student", "case", "way"),
    [pytest.param(s, c, w, marks=[] if c == "aam" else pytest.mark.slow) for s, c, w in sampled()],
)
def test_a_step_of_a_rank_mixes_no_devices_and_waits_for_nothing(student: str, case: str, way: str) -> None:
    step(student, case, way, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_every_student(case: str, way: str) -> None:
    for student in students_of(case):
        step(student, case, way)


def test_a_wait_and_a_mix_are_found() -> None:
    with gpu():
        values = sent(torch.randn(3), GPU)
        for wait in (values.sum().item, values.cpu, values.nonzero, lambda: values[values > 0]):
            with pytest.raises(HostWaits):
                wait()
        for wait in (lambda: torch.randn(3).to(GPU), lambda: torch.tensor(1.0, device=GPU)):
            with pytest.raises(HostWaits):
                wait()
        with pytest.raises(RuntimeError, match="same device|two different devices"):  # of torch 2.14, and 2.11
            values + torch.randn(3)


@pytest.mark.parametrize(("optim", "clip_by"), list(zip(OPTIMISERS, ("network", "tensor"), strict=True)))
def test_the_ways_of_a_gpu_to_update_come_to_the_same(
    optim: str, clip_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter after the other, many at once as on a GPU, and fused: forced on the CPU, with real values."""
    keys = ["loss=[aam,cosine]", f"steps={STEPS}", "batch_size=4", f"optim={optim}", f"optim.clip_by={clip_by}"]
    options = config.load(TrainConfig, [*keys, "optim.clip=0.1", "optim.warmup=0", "optim.swa_fraction=1"], environ={})
    found = []
    for way in ("single", "foreach", "fused"):
        supported = ["cpu"] if way == "foreach" else []
        monkeypatch.setattr(foreach, "_get_foreach_kernels_supported_devices", lambda kinds=supported: kinds)
        torch.manual_seed(0)
        network = build("tiny", channels=8, embedding=DIM)
        losses = {name: (chosen, "") for name, chosen in chosen_losses(options.loss).items()}
        context = LossContext(network.levels, {"embedding": Target("embedding", DIM)}, CLASSES)
        module = TrainingModule(network, WeightedSum(losses, context), options.optim.swa_fraction)
        optimisation = Optimisation(options, module, torch.device("cpu"))
        for group in optimisation.optimiser.param_groups:
            group |= {"fused": way == "fused", "foreach": way == "foreach"}
        for number in range(3):
            crop, label = torch.randn(VIEWS, 40, 80), torch.arange(VIEWS)
            inputs = LossInputs({"embedding": torch.randn(VIEWS, DIM)}, label, label)
            optimisation.step(number, [TrainBatch([crop], inputs)])
        found.append(torch.cat([values.double().flatten() for values in module.state_dict().values()]))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=1e-6)
