"""Settings of the losses, without torch, so that --help is quick. The losses' classes say what they do."""

from __future__ import annotations

from dataclasses import dataclass

from spkd.config import key, section
from spkd.registry import STUDENTS

NO_PARTNER = "none"


@dataclass
class MarginSettings:
    """A cosine classifier with an additive angular margin."""

    margin: float = key(0.2, "additive angular margin (rad)", low=0, high=3.14)
    margin_warmup: list[float] = key(
        [0.0, 0.0],
        "fractions of the run between which the margin grows from 0, exponentially; [0,0]: at once",
        low=0,
        high=1,
    )
    scale: float = key(32.0, "scale of the student's cosine logits", positive=True, high=1e4)


@dataclass
class AAMSettings(MarginSettings):
    subcentres: int = key(1, "centres of each class; the nearest counts", low=1, high=1000)
    sharded: bool = key(False, "divide the classes over the ranks of torchrun, for many speakers")


@dataclass
class ContrastiveSettings:
    temperature: float = key(0.05, "temperature", positive=True, high=1e3)
    ceiling: float | None = key(
        None,
        "skip negatives whose teacher cosine to the positive exceeds this (probably the same speaker); default: 0.95, "
        "or above 99 % of different speakers where the teacher's similarities are high even between those",
        low=-1,
        high=2,
    )


@dataclass
class NTXentSettings:
    temperature: float = key(0.05, "temperature", positive=True, high=1e3)


@dataclass
class LabelSettings(MarginSettings):
    temperature: float = key(1.0, "temperature of the divergence", positive=True, high=1e3)
    kd_warmup: float = key(
        0.0, "fraction of the run over which the weight of the divergence grows from 0 to 1", low=0, high=1
    )
    teacher_margin: float = key(0.2, "margin put on the teacher's own cosine logits (rad)", low=0, high=3.14)
    logits: str = key(
        "auto",
        "the teacher's logits: of its own head, or cosines to its mean embedding of each training class; auto takes "
        "the head where it knows every class",
        ("auto", "head", "prototypes"),
    )


@dataclass
class NonTargetSettings(LabelSettings):
    gamma: float = key(2.0, "weight of the non-target part", low=0, high=1e6)


@dataclass
class TriageSettings(LabelSettings):
    cutoff: list[float] = key(
        [0.99, 0.8],
        "cumulative probability of the confusion set among the non-target speakers, at the beginning and at the end",
        low=0,
        high=1,
    )
    gamma: float = key(2.0, "weight of the divergence within the confusion set", low=0, high=1e6)


@dataclass
class MultiLevelSettings:
    levels: dict[str, str] = key(
        {"embedding": "embedding"},
        "student level -> target, e.g. {frames: frames, stats: stats, embedding: embedding}",
    )
    concat: list[str] = key([], "targets whose concatenation the student's embedding learns, besides")
    distance: str = key("cosine", "1 - cosine, or mse (mean over the numbers)", ("cosine", "mse"))
    level_weights: dict[str, float] = key({}, "weight of a student level, or of concat (default 1)", low=0, high=1e9)


@dataclass
class OneStepSettings:
    targets: list[str] = key(
        ["frames.layer4", "frames.layer8", "frames.layer12"], "teacher's frames that the path without adapters predicts"
    )
    distance: str = key("l1", "l1: mean |difference| - cosine * log sigmoid(cosine); mse", ("l1", "mse"))
    cosine: float = key(1.0, "weight of the cosine part of l1", low=0, high=1e6)
    time_reduction: str = key("mean", "of the cosine part over the frames; the authors' code sums", ("mean", "sum"))
    weight: float = key(1.0, "weight of the distillation beside the fine-tuning", low=0, high=1e6)
    linear_decay: bool = key(False, "let that weight fall linearly to 0 over the run")
    finetune_weight: float = key(
        1.0, "weight of the fine-tuning (0: none, distillation alone, as DistilHuBERT)", low=0, high=1e6
    )
    classifier: str = key("aam", "of the fine-tuning path", ("aam", "softmax"))
    aam: AAMSettings = section(AAMSettings)


@dataclass
class MeMoSettings:
    partner: str = key("resnet34", "the other architecture; none: one alone, which is DINO", (*STUDENTS, NO_PARTNER))
    partner_channels: int | None = key(None, "width of the other architecture (default: its own)", low=1, high=65_536)
    locals: int = key(4, "short crops beside the two long ones (which are as long as crop)", low=0, high=100)
    local_crop: float = key(2.0, "length of the short crops (s)", positive=True, high=1000)
    prototypes: int = key(65536, "outputs of each head", low=2, high=10**8)
    hidden: int = key(2048, "width of the heads", low=1, high=10**6)
    bottleneck: int = key(256, "width of the heads before the prototypes", low=1, high=10**6)
    student_temperature: float = key(0.1, "temperature of the students' outputs", positive=True, high=1e3)
    teacher_temperature: list[float] = key(
        [0.04, 0.07], "temperature of the teachers' outputs, first and last", positive=True, high=1e3
    )
    teacher_temperature_warmup: float = key(
        0.2, "fraction of the run over which it grows from the one to the other", low=0, high=1
    )
    centre: float = key(0.9, "momentum of the centres", low=0, high=1)
    momentum: list[float] = key([0.996, 1.0], "momentum of the teachers, first and last", low=0, high=1)
    frozen_prototypes: float = key(
        0.0067, "first fraction of the run in which the prototypes are not trained (one of 150 epochs)", low=0, high=1
    )
    cross_weight: float = key(1.0, "weight of the cross mode", low=0, high=1e6)
    contrastive_weight: float = key(1.0, "weight of the contrastive term (0: none)", low=0, high=1e6)
    dynamic_stop: bool = key(True, "let the contrastive term stop by itself")
    teacher_weight: float = key(
        0.0, "weight of a third mode: contrast with the cached teacher's embeddings (0: none)", low=0, high=1e6
    )
    frozen_temperature: float = key(0.05, "temperature of the third mode", positive=True, high=1e3)
    ceiling: float | None = key(None, "of the third mode; see loss.contrastive.ceiling", low=-1, high=2)
