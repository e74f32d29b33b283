"""Steps of training with every student and loss, small: settings, modules and batches."""

from __future__ import annotations

import numpy as np
import torch

from spkd.cache import Crop
from spkd.device import sent
from spkd.outputs.target import Target
from spkd.registry import STUDENTS
from spkd.students import Network, build
from spkd.train.alignment import Alignment
from spkd.train.loading import TrainBatch
from spkd.train.losses.base import LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum, chosen_losses
from spkd.train.module import TrainingModule
from spkd.train.settings import TrainConfig
from tests.device.pretended import GPU

VIEWS, SAMPLES, DIM, CLASSES, STEPS = 4, 9840, 8, 5, 10
WIDTHS = {"resnet34": 8, "campplus": 32, "ssl": 32}
FRAMES = {kind: Target(kind, 6, hop, 512) for kind, hop in (("frames", 200), ("frames.half", 160))}
FRAMES["frames.codes"] = Target("frames.codes", 2, 200, 512, "rq2x8")
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
    "codebook": ["loss=codebook"],
    "memo": [*MEMO, "loss.memo.partner=tiny", "loss.memo.partner_channels=8"],
    "dino": [*MEMO, "loss.memo.partner=none", "loss.memo.teacher_weight=1", "loss.memo.frozen_prototypes=0.9"],
    "cosine": ["loss=cosine"],
    "mse": ["loss=mse"],
    "relational": ["loss=relational"],
    "ntxent": ["loss=ntxent"],
    "aam": ["loss=aam", "loss.aam.margin_warmup=[0,0.9]"],
    "aam, nested": ["loss=[aam, contrastive, kld, relational, multilevel]", "student.nested=[2, 4, 8]"],
    "multilevel, nested": [
        "loss=multilevel",
        "loss.multilevel.levels={frames: frames.half, embedding: embedding}",
        *("student.nested=[4, 8]", "student.nested_crops=[0.3, 2]"),
    ],
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


def network_of(student: str, case: str) -> Network:
    """A small student, with adapters where the loss needs them."""
    adapters = {"adapters": 4, "layers": 1} if case.startswith("one-step") else {}
    return build(student, channels=WIDTHS.get(student, 16), embedding=DIM, **adapters)


def module_of(options: TrainConfig, network: Network) -> TrainingModule:
    """A student with the losses of a run, over targets of small widths."""
    targets = {name: Target(name, dim) for name, dim in (("embedding", DIM), ("logits", CLASSES), ("stats", 7))}
    losses = {name: (chosen, "") for name, chosen in chosen_losses(options.loss).items()}
    nested = tuple(options.student.nested), tuple(options.student.nested_crops)
    objective = WeightedSum(losses, LossContext(network.levels, targets | FRAMES, CLASSES, *nested))
    return TrainingModule(network, objective, options.optim.swa_fraction)


def batch(network: Network, case: str, device: torch.device = GPU) -> TrainBatch:
    """A batch of random values as the loader gives it."""
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
    targets["frames.codes"] = torch.randint(256, targets["frames.codes"].shape, dtype=torch.uint8)
    label = torch.arange(VIEWS)
    mined = {}
    if "mined" in case:
        mined = {
            "negatives": sent(torch.randn(VIEWS, 3, DIM), device),
            "is_negative": sent(torch.ones(VIEWS, 3) > 0, device),
        }
    finetunes = case.startswith("one-step")
    inputs = LossInputs(
        {name: sent(values, device) for name, values in targets.items()},
        *(sent(label, device) for _ in range(3)),
        teacher_scale=9.0,
        other_instance=[sent(label, device) for _ in crops[1:]],
        alignments={name: Alignment.of(level, target, whole, crop).to(device) for name, target in FRAMES.items()},
        finetune_label=sent(label, device),
        **mined,
    )
    return TrainBatch([sent(x, device) for x in crops], inputs, sent(crops[0], device) if finetunes else None)


def students_of(case: str) -> list[str]:
    if case.startswith("one-step"):
        return ["ssl"]
    return [name for name in STUDENTS if name != "ssl" or case != "memo"]  # its partner here takes fbank
