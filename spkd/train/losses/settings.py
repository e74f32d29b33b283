"""Settings of the losses, without torch, so that --help is quick. The losses are described in their classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from spkd.config import key, section
from spkd.errors import UsageError, did_you_mean
from spkd.registry import STUDENTS

NO_PARTNER = "none"
GLOBALS = 2  # long crops of MeMo, which its teachers take too
CONCAT = "concat"  # the level that learns several targets, concatenated
EMBEDDING = "embedding"  # spkd.outputs.target has the names of targets, but imports torch
CODES = ".codes"


class LogitsRequest(NamedTuple):
    """Teacher logits that a loss learns from.

    Attributes:
        source: auto, head or prototypes.
        scale: scale of prototype logits.
        temperature: temperature at which the logits are used.
    """

    source: str
    scale: float
    temperature: float


@dataclass
class LossSettings:
    """Base class of the settings of losses. It answers what the trainer asks before a loss is built."""

    def check(self) -> None:
        """Check that the settings are compatible; single values are checked by their declaration. Raises UsageError."""

    def needed_targets(self) -> tuple[str, ...]:
        """Names of the targets, where they depend on the settings; (): the names in the loss's `needs`."""
        return ()

    def logits_request(self) -> LogitsRequest | None:
        """Teacher logits that the loss learns from; None where it learns from none."""
        return None

    def contrasts(self) -> bool:
        """Whether the loss contrasts the student with the teacher's embeddings.

        If so, its settings have a `ceiling` (teacher cosine above which two views are not negatives of each other), and
        it uses mined negatives.
        """
        return False

    def finetunes(self) -> bool:
        """Whether the loss also fine-tunes, on labelled views that go through the student's adapters."""
        return False

    def has_margin(self) -> bool:
        """Whether the loss trains a classifier with an angular margin, which large-margin fine-tuning replaces."""
        return False

    def depends_on_progress(self) -> bool:
        """Whether the loss changes over the run, so that a run with more steps differs from its first step on."""
        return False

    def further_crops(self) -> tuple[float, ...]:
        """Lengths (s) of further crops of each instance; 0: the length of the first crop."""
        return ()

    def on_embedding(self) -> LossSettings | None:
        """Settings of the part of the loss that takes the student's embedding, and no other level of it.

        With student.nested this part acts on each of the nested sizes. None: the loss takes other levels alone.
        """
        return self

    def beside_embedding(self) -> LossSettings | None:
        """Settings of the other part of the loss, which student.nested does not change; None: there is none."""
        return None


def check_warmup(between: list[float], name: str) -> None:
    """Check that `between` is two fractions in rising order. Raises UsageError where it is not."""
    if len(between) != 2 or between[0] > between[1]:
        raise UsageError(f"{name}={between}: give two fractions of the run, e.g. [0.13,0.27]")


@dataclass
class MarginSettings(LossSettings):
    """Settings of a cosine classifier with an additive angular margin."""

    margin: float = key(0.2, "additive angular margin (rad)", low=0, high=3.14)
    margin_warmup: list[float] = key(
        [0.0, 0.0],
        "fractions of the run between which the margin grows from 0, exponentially; [0,0]: at once",
        low=0,
        high=1,
    )
    scale: float = key(32.0, "scale of the student's cosine logits", positive=True, high=1e4)

    def has_margin(self) -> bool:
        return True

    def depends_on_progress(self) -> bool:
        return self.margin_warmup[1] > 0

    def unused(self) -> dict[str, str]:
        return {} if self.margin else {"margin_warmup": "the margin is 0"}


@dataclass
class AAMSettings(MarginSettings):
    subcentres: int = key(1, "centres of each class; the nearest counts", low=1, high=1000)
    sharded: bool = key(False, "divide the classes over the ranks of torchrun, for many speakers")

    def check(self) -> None:
        check_warmup(self.margin_warmup, "loss.aam.margin_warmup")


@dataclass
class ContrastiveSettings(LossSettings):
    temperature: float = key(0.05, "temperature", positive=True, high=1e3)
    ceiling: float | None = key(
        None,
        "skip negatives whose teacher cosine to the positive exceeds this (probably the same speaker); default: 0.95, "
        "or above 99 % of different speakers where the teacher's similarities are high even between those",
        low=-1,
        high=2,
    )

    def contrasts(self) -> bool:
        return True


@dataclass
class NTXentSettings(LossSettings):
    temperature: float = key(0.05, "temperature", positive=True, high=1e3)

    def further_crops(self) -> tuple[float, ...]:
        return (0.0,)


@dataclass
class LabelSettings(MarginSettings):
    """Settings of the losses over teacher logits."""

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

    def check(self) -> None:
        check_warmup(self.margin_warmup, "margin_warmup")

    def depends_on_progress(self) -> bool:
        return super().depends_on_progress() or self.kd_warmup > 0

    def logits_request(self) -> LogitsRequest:
        return LogitsRequest(self.logits, self.scale, self.temperature)


@dataclass
class NonTargetSettings(LabelSettings):
    """Settings of the loss that emphasises non-target speakers."""

    gamma: float = key(2.0, "weight of the non-target part", low=0, high=1e6)


@dataclass
class TriageSettings(LabelSettings):
    """Settings of triage distillation."""

    cutoff: list[float] = key(
        [0.99, 0.8],
        "cumulative probability of the confusion set among the non-target speakers, at the beginning and at the end",
        low=0,
        high=1,
    )
    gamma: float = key(2.0, "weight of the divergence within the confusion set", low=0, high=1e6)

    def check(self) -> None:
        super().check()
        if len(self.cutoff) != 2:
            raise UsageError(f"loss.trkd.cutoff={self.cutoff}: give the first and the last value, e.g. [0.99,0.8]")

    def depends_on_progress(self) -> bool:
        return super().depends_on_progress() or self.cutoff[0] != self.cutoff[1]


@dataclass
class MultiLevelSettings(LossSettings):
    levels: dict[str, str] = key(
        {"embedding": "embedding"},
        "student level -> target, e.g. {frames: frames, stats: stats, embedding: embedding}",
    )
    concat: list[str] = key([], "further targets, whose concatenation the student's embedding learns")
    distance: str = key("cosine", "1 - cosine, or mse (mean over the numbers)", ("cosine", "mse"))
    level_weights: dict[str, float] = key({}, "weight of a student level, or of concat (default 1)", low=0, high=1e9)

    def check(self) -> None:
        if not self.levels and not self.concat:
            raise UsageError("loss.multilevel.levels: name at least one pair of a student level and a target")

    def unused(self) -> dict[str, str]:
        compared = [*self.levels, *([CONCAT] if self.concat else [])]
        return {
            f"level_weights{{{level}}}": f"{level!r} is not compared{did_you_mean(level, compared)}"
            for level in self.level_weights
            if level not in compared
        }

    def needed_targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.levels.values(), *self.concat]))

    def on_embedding(self) -> MultiLevelSettings | None:
        part = replace(self, levels=_on_embedding(self.levels))
        return part if part.levels or part.concat else None

    def beside_embedding(self) -> MultiLevelSettings | None:
        part = replace(self, levels=_beside_embedding(self.levels), concat=[])
        return part if part.levels else None


@dataclass
class CodebookSettings(LossSettings):
    levels: dict[str, str] = key(
        {"frames": "frames"}, "student level -> target whose codes it predicts, e.g. {frames: frames.layer8}"
    )
    hop: float = key(
        0.04, "seconds from one frame that is compared to the next; 0: every frame of the teacher", low=0.0, high=10.0
    )

    def check(self) -> None:
        if not self.levels:
            raise UsageError("loss.codebook.levels: name at least one pair of a student level and a target")
        if coded := next((name for name in self.levels.values() if name.endswith(CODES)), None):
            raise UsageError(f"loss.codebook.levels: {coded}: name the target itself, {coded.removesuffix(CODES)}")

    def needed_targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name + CODES for name in self.levels.values()))

    def on_embedding(self) -> CodebookSettings | None:
        part = replace(self, levels=_on_embedding(self.levels))
        return part if part.levels else None

    def beside_embedding(self) -> CodebookSettings | None:
        part = replace(self, levels=_beside_embedding(self.levels))
        return part if part.levels else None


def _on_embedding(levels: dict[str, str]) -> dict[str, str]:
    return {level: target for level, target in levels.items() if level == EMBEDDING}


def _beside_embedding(levels: dict[str, str]) -> dict[str, str]:
    return {level: target for level, target in levels.items() if level != EMBEDDING}


@dataclass
class OneStepSettings(LossSettings):
    targets: list[str] = key(
        ["frames.layer4", "frames.layer8", "frames.layer12"], "teacher's frames that the path without adapters predicts"
    )
    distance: str = key("l1", "l1: mean |difference| - cosine * log sigmoid(cosine); mse", ("l1", "mse"))
    cosine: float = key(1.0, "weight of the cosine part of l1", low=0, high=1e6)
    time_reduction: str = key("mean", "of the cosine part over the frames; the authors' code sums", ("mean", "sum"))
    weight: float = key(1.0, "weight of the distillation relative to the fine-tuning", low=0, high=1e6)
    linear_decay: bool = key(False, "let that weight fall linearly to 0 over the run")
    finetune_weight: float = key(
        1.0, "weight of the fine-tuning (0: none, distillation alone, as DistilHuBERT)", low=0, high=1e6
    )
    classifier: str = key("aam", "of the fine-tuning path", ("aam", "softmax"))
    aam: AAMSettings = section(AAMSettings)

    def check(self) -> None:
        if not self.targets:
            raise UsageError("loss.one_step.targets: name at least one target")
        self.aam.check()

    def needed_targets(self) -> tuple[str, ...]:
        return tuple(self.targets)

    def on_embedding(self) -> OneStepSettings | None:
        return replace(self, targets=[]) if self.finetunes() else None

    def beside_embedding(self) -> OneStepSettings:
        return replace(self, finetune_weight=0.0)

    def finetunes(self) -> bool:
        return self.finetune_weight > 0

    def has_margin(self) -> bool:
        return self.finetunes() and self.classifier == "aam"

    def depends_on_progress(self) -> bool:
        return self.linear_decay or self.aam.depends_on_progress()

    def unused(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if not self.weight:
            keys = ("distance", "cosine", "time_reduction", "linear_decay")
            reasons |= dict.fromkeys(keys, "the distillation has the weight 0")
        elif self.distance != "l1":
            reasons |= dict.fromkeys(("cosine", "time_reduction"), f"distance={self.distance} has no cosine part")
        elif not self.cosine:
            reasons["time_reduction"] = "the cosine part has the weight 0"
        if not self.finetune_weight:
            reasons |= dict.fromkeys(("classifier", "aam"), "the fine-tuning has the weight 0")
        elif self.classifier != "aam":
            reasons["aam"] = f"classifier={self.classifier}"
        return reasons


@dataclass
class MeMoSettings(LossSettings):
    partner: str = key("resnet34", "the other architecture; none: one alone, which is DINO", (*STUDENTS, NO_PARTNER))
    partner_channels: int | None = key(None, "width of the other architecture (default: its own)", low=1, high=65_536)
    locals: int = key(4, "short crops in addition to the two long ones (which are as long as crop)", low=0, high=100)
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

    def check(self) -> None:
        for name in ("teacher_temperature", "momentum"):
            if len(getattr(self, name)) != 2:
                raise UsageError(f"loss.memo.{name}={getattr(self, name)}: give the first and the last value")

    def needed_targets(self) -> tuple[str, ...]:
        return (EMBEDDING,) if self.teacher_weight > 0 else ()

    def contrasts(self) -> bool:
        return self.teacher_weight > 0

    def unused(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if self.partner == NO_PARTNER:
            reasons |= dict.fromkeys(("partner_channels", "cross_weight"), "one network alone has no partner")
        if not self.locals:
            reasons["local_crop"] = "there are no short crops (locals=0)"
        if not self.contrastive_weight:
            reasons["dynamic_stop"] = "the contrastive term has the weight 0"
        if not self.teacher_weight:
            reasons |= dict.fromkeys(("frozen_temperature", "ceiling"), "the third mode has the weight 0")
        if len(set(self.teacher_temperature)) == 1:
            reasons["teacher_temperature_warmup"] = "the first temperature is the last"
        return reasons

    def depends_on_progress(self) -> bool:
        return True  # momentum, temperature and the dynamic stop

    def further_crops(self) -> tuple[float, ...]:
        return (0.0,) * (GLOBALS - 1) + (self.local_crop,) * self.locals
