"""What a run has to know of its teacher before the first step: its logits, of its own head where it knows the speakers
or else cosines to prototypes; and how alike it finds different voices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.cache import EMBEDDING, LOGITS, Contents
from spkd.config import LossConfig
from spkd.errors import SpkdError, UsageError
from spkd.progress import say
from spkd.train.data import Classes, mean_embeddings
from spkd.train.losses import CEILING, LOSSES

WRONG = 0.05  # nats of divergence from which the card's logits are called wrong
SAMPLED = 1024  # views whose pairs tell how alike different voices are
DIFFERENT = 0.99  # fraction of these pairs that must stay below the ceiling


@dataclass(frozen=True)
class TeacherLogits:
    """Over which classes the teacher speaks.

    classes: their names. label: (views,) the class of each view among them, -1 where it has none. scale: of cosine
    logits, None of others. prototypes: (classes, D) unit vectors; None where the logits come from the cache.
    """

    classes: list[str]
    label: np.ndarray
    scale: float | None
    prototypes: Tensor | None = None

    @property
    def source(self) -> str:
        """The target from which they follow."""
        return LOGITS if self.prototypes is None else EMBEDDING

    def of(self, embedding: Tensor) -> Tensor:
        """(B, D) -> (B, classes): scale * cos(embedding, prototype)."""
        assert self.prototypes is not None
        assert self.scale is not None
        return self.scale * normalize(embedding.float(), dim=-1) @ self.prototypes.to(embedding.device).mT


def teacher_logits(
    cache: Contents, classes: Classes, config: LossConfig, losses: Sequence[str]
) -> TeacherLogits | None:
    """The logits that label-level losses learn from; None where no loss asks for them.

    Raises:
        UsageError: they cannot be had in the way that the settings name.
        SpkdError: a loss needs a class of every view, and the teacher's head lacks some (those of changed speed, say).
    """
    if not any(LOGITS in LOSSES[name].needs for name in losses):
        return None
    head = cache.members[0].card["head"]
    if any("@" in name for name in cache.names):
        raise UsageError("teachers=separate: losses over logits need one teacher; concatenate or average them")
    has_head = LOGITS in cache.names and head is not None
    known = {name: i for i, name in enumerate(head["classes"])} if has_head else {}
    unknown = [name for name in classes.names if name not in known]
    prototypes = config.logits == "prototypes" or (
        config.logits == "auto" and cache.labelled and (bool(unknown) or not has_head)
    )
    if prototypes:
        if not cache.labelled or EMBEDDING not in cache.names:
            raise UsageError("loss.logits=prototypes: needs the target embedding, and a speaker label of every view")
        return TeacherLogits(
            classes.names, classes.label, config.scale, mean_embeddings(cache, classes.label, len(classes.names))
        )
    if not has_head:
        raise SpkdError(
            f"{cache.name}: the teacher gave no logits; extract them (teacher.targets=[embedding,logits]), or label "
            "the speakers and take loss.logits=prototypes"
        )
    needy = [name for name in losses if LOSSES[name].needs_labels and LOGITS in LOSSES[name].needs]
    if unknown and needy:
        raise SpkdError(
            f"--loss {needy[0]}: the teacher's head has no class for {len(unknown)} of {len(classes.names)} classes "
            f"({unknown[0]}); take loss.logits=prototypes, or views without other speeds and other speakers"
        )
    _warn(cache, config)
    to_teacher = np.array([*(known.get(name, -1) for name in classes.names), -1])
    scale = float(head["scale"]) if head["kind"] != "linear" else None
    return TeacherLogits(list(known), to_teacher[classes.label], scale)


def _warn(cache: Contents, config: LossConfig) -> None:
    """Say so where the card records that the stored logits are wrong at this temperature."""
    for member in cache.members:
        errors = member.card["errors"].get(LOGITS, {})
        recorded = {float(name.removeprefix("kl_t")): kl for name, kl in errors.items() if name.startswith("kl_t")}
        if not recorded:
            continue
        nearest = min(recorded, key=lambda t: abs(t - config.kd_temperature))
        if recorded[nearest] > WRONG:
            all_ = ", ".join(f"{kl:.2g} at {t:g}" for t, kl in sorted(recorded.items()))
            say(
                f"warning: {member.name}: the stored logits are wrong by {recorded[nearest]:.2g} nats at temperature "
                f"{nearest:g} (measured at extraction: {all_}); choose loss.kd_temperature by that, or extract exact "
                "logits"
            )


def contrasts(losses: Sequence[str], config: LossConfig) -> bool:
    """Whether a loss contrasts the student with the teacher's embeddings."""
    return "contrastive" in losses or ("memo" in losses and config.memo.teacher > 0)


def ceiling(cache: Contents, losses: Sequence[str], config: LossConfig) -> float:
    """`loss.ceiling`, or its default: 0.95, but no lower than 99 % of the cosines between different voices.

    Embeddings pooled from self-supervised encoders all lie in a narrow cone: a fixed ceiling would leave no negatives.
    Different voices are views of different speakers, or of different utterances where those are unknown.
    """
    if config.ceiling is not None:
        return config.ceiling
    if not contrasts(losses, config):
        return CEILING
    rows = cache.order(0, 0)[:SAMPLED]
    utterance, speaker = cache.plan.views.utterance[rows], cache.speaker(rows)
    different = (utterance != utterance[:, None]) & ((speaker != speaker[:, None]) | (speaker < 0))
    found = CEILING
    for name in [name for name in cache.names if name.split("@")[0] == EMBEDDING]:
        said = normalize(cache.decode(cache.stored(rows, [name]), [name])[name].float(), dim=-1)
        cosines = (said @ said.mT)[torch.from_numpy(different)]
        if len(cosines):
            found = max(found, float(cosines.quantile(DIFFERENT)))
    if found > CEILING:
        say(
            f"the teacher finds even different voices alike: loss.ceiling is {found:.4f}, above {DIFFERENT:.0%} of them"
        )
    return found
