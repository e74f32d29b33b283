"""Steps of training on a pretended GPU: nothing mixes devices, and the host waits for nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils as foreach

from spkd import config
from spkd.cache import Crop
from spkd.device import sent
from spkd.outputs.target import Target
from spkd.registry import LOSSES, OPTIMISERS, STUDENTS
from spkd.students import build
from spkd.train.alignment import Alignment
from spkd.train.distributed import share_over_ranks
from spkd.train.loading import TrainBatch
from spkd.train.losses.base import LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum, chosen_losses
from spkd.train.losses.memo import MeMo
from spkd.train.module import TrainingModule
from spkd.train.settings import TrainConfig
from spkd.train.step import Optimisation
from tests.device.pretended import GPU, HostWaits, gpu

VIEWS, SAMPLES, DIM, CLASSES, STEPS = 4, 9840, 8, 5, 10
WIDTHS = {"resnet34": 8, "campplus": 32, "ssl": 32}
FRAMES = {kind: Target(kind, 6, hop, 512) for kind, hop in (("frames", 200), ("frames.half", 160))}
MEMO = ["loss=memo", "loss.memo.prototypes=12", "loss.memo.hidden=8", "loss.memo.bottleneck=4", "loss.memo.locals=1"]
CASES = {
    "contrastive": ["loss=contrastive"],
    "contrastive, mined": ["loss=contrastive", "mining.negatives=3"],
    "nontarget": ["loss=nontarget"],
    "trkd": ["loss=trkd"],
    "kld": ["loss=kld", "loss.kld.kd_warmup=0.8"],
    "one-step": ["loss=one-step", "loss.one_step.targets=[frames]"],
    "one-step, softmax": ["loss=one-step", "loss.one_step.targets=[frames]", "loss.one_step.classifier=softmax"],
    "one-step, mse": ["loss=one-step", "loss.one_step.targets=[frames.half]", "loss.one_step.distance=mse"],
    "multilevel": [
        "loss=multilevel",
        "loss.multilevel.levels={frames: frames.half, stats: stats, embedding: embedding}",
    ],
    "multilevel, mse": ["loss=multilevel", "loss.multilevel.levels={frames: frames}", "loss.multilevel.distance=mse"],
    "multilevel, concat": ["loss=multilevel", "loss.multilevel.concat=[embedding, stats]"],
    "memo": [*MEMO, "loss.memo.partner=tiny", "loss.memo.partner_channels=8"],
    "dino": [*MEMO, "loss.memo.partner=none", "loss.memo.teacher_weight=1", "loss.memo.frozen_prototypes=0.9"],
    "cosine": ["loss=cosine"],
    "mse": ["loss=mse"],
    "relational": ["loss=relational"],
    "ntxent": ["loss=ntxent"],
    "aam": ["loss=aam", "loss.aam.margin_warmup=[0,0.9]"],
    "aam, sub-centres": ["loss=[aam, contrastive]", "loss.aam.subcentres=2", "loss.final_weights={contrastive: 0}"],
}
WAYS = {
    "fp32": [],
    "bf16": ["precision=bf16"],
    "fp16": ["precision=fp16"],
    "channels last": ["channels_last=true"],
    "accumulated": ["accumulate=2", "precision=fp16"],
    "averaged": ["optim.swa_fraction=0.9"],
    "large margin": ["large_margin.steps=2"],
    "clipped by tensor": ["optim.clip_by=tensor"],
    "sgd": ["optim=sgd", "precision=fp16"],
}


def step(student: str, case: str, way: str, ranks: int = 1) -> None:
    """Do a step on a pretended GPU, as one of several ranks."""
    options = config.load(TrainConfig, [*CASES[case], *WAYS[way], f"steps={STEPS}", "batch_size=4"], environ={})
    adapters = {"adapters": 4, "layers": 1} if case.startswith("one-step") else {}
    network = build(student, channels=WIDTHS.get(student, 16), embedding=DIM, **adapters)
    targets = {name: Target(name, dim) for name, dim in (("embedding", DIM), ("logits", CLASSES), ("stats", 7))}
    losses = {name: (chosen, "") for name, chosen in chosen_losses(options.loss).items()}
    objective = WeightedSum(losses, LossContext(network.levels, targets | FRAMES, CLASSES))
    module = TrainingModule(network, objective, options.optim.swa_fraction)
    for loss in objective.by_name().values():
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


def batch(network: torch.nn.Module, case: str) -> TrainBatch:
    """A batch as the loader gives it. Its values do not matter."""
    kind, level = network.input_kind, network.levels["frames"]
    crops = [torch.randn(VIEWS, kind.num_frames(SAMPLES), kind.dim) for _ in range(2)]
    if "memo" in case or "dino" in case:
        crops.append(torch.randn(VIEWS, kind.num_frames(SAMPLES // 2), kind.dim))
    elif case != "ntxent":
        crops = crops[:1]
    whole, crop = np.full(VIEWS, SAMPLES), Crop(np.zeros(VIEWS, int), SAMPLES)
    targets = {
        "embedding": torch.randn(VIEWS, DIM),
        "logits": torch.randn(VIEWS, CLASSES),
        "stats": torch.randn(VIEWS, 7),
    }
    for name, target in FRAMES.items():
        values = torch.randn(VIEWS, int(target.num_frames(SAMPLES)), target.dim)
        targets[name] = values.half() if "half" in name else values
    label = torch.arange(VIEWS)
    mined = {}
    if "mined" in case:
        mined = {"negatives": sent(torch.randn(VIEWS, 3, DIM), GPU), "is_negative": sent(torch.ones(VIEWS, 3) > 0, GPU)}
    finetunes = case.startswith("one-step")
    inputs = LossInputs(
        {name: sent(values, GPU) for name, values in targets.items()},
        *(sent(label, GPU) for _ in range(3)),
        teacher_scale=9.0,
        other_instance=[sent(label, GPU) for _ in crops[1:]],
        alignments={name: Alignment.of(level, target, whole, crop).to(GPU) for name, target in FRAMES.items()},
        finetune_label=sent(label, GPU),
        **mined,
    )
    return TrainBatch([sent(x, GPU) for x in crops], inputs, sent(crops[0], GPU) if finetunes else None)


def students_of(case: str) -> list[str]:
    if case.startswith("one-step"):
        return ["ssl"]
    return [name for name in STUDENTS if name != "ssl" or case != "memo"]  # its partner here takes fbank


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
        with pytest.raises(RuntimeError, match="same device"):
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
