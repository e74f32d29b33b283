"""Teacher logits: those of its head where it knows the training speakers, or else cosines to prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from spkd.cache import CacheSource
from spkd.errors import SpkdError, UsageError
from spkd.outputs.target import EMBEDDING, LOGITS
from spkd.progress import log
from spkd.train.labels import Labels, mean_embeddings
from spkd.train.losses.base import ChosenLoss

WRONG = 0.05  # divergence (nats) of stored logits, as the card records it, from which a warning is printed


@dataclass(frozen=True)
class TeacherLogits:
    """Teacher logits and their classes.

    Attributes:
        classes: names of the classes.
        label: (views,) class of each view among them, -1 where it has none.
        scale: scale of cosine logits; None for others.
        prototypes: (classes, D) unit vectors; None where the logits come from the cache.
    """

    classes: list[str]
    label: np.ndarray
    scale: float | None
    prototypes: Tensor | None = None

    @property
    def source(self) -> str:
        """Name of the target from which they are computed."""
        return LOGITS if self.prototypes is None else EMBEDDING

    def of(self, embedding: Tensor) -> Tensor:
        """Logits (B, classes) of embeddings (B, D): scale * cos(embedding, prototype)."""
        assert self.prototypes is not None
        assert self.scale is not None
        return self.scale * normalize(embedding.float(), dim=-1) @ self.prototypes.to(embedding.device).mT


def teacher_logits(cache: CacheSource, labels: Labels, losses: dict[str, ChosenLoss]) -> TeacherLogits | None:
    """Logits that label-level losses learn from; None where no loss asks for them.

    Raises:
        UsageError: the logits that the settings name are not available, or two losses ask for different logits.
        SpkdError: a loss needs a class of every view, and the teacher's head lacks some (pseudo-speakers, say).
    """
    # Requests of the losses, which must agree.
    requested = {name: loss.settings.logits_request() for name, loss in losses.items()}
    asking = {name: request for name, request in requested.items() if request is not None}
    requests = list(asking.values())
    if not requests:
        return None
    request = requests[0]
    if any((other.source, other.scale) != (request.source, request.scale) for other in requests):
        raise UsageError(f"{' and '.join(asking)}: give them the same `logits` and the same `scale`")
    head = cache.members[0].card.head
    if any("@" in name for name in cache.names):
        raise UsageError("teachers=separate: losses over logits need one teacher; concatenate or average them")
    # Prototypes: asked for, or by default where the head does not know every class.
    known = {name: i for i, name in enumerate(head.classes)} if head is not None and LOGITS in cache.names else {}
    unknown = [name for name in labels.names if name not in known]
    by_default = request.source == "auto" and cache.labelled and (bool(unknown) or not known)
    if request.source == "prototypes" or by_default:
        if not cache.labelled or EMBEDDING not in cache.names:
            raise UsageError("logits=prototypes: needs the target embedding, and a speaker label of every view")
        prototypes = mean_embeddings(cache, labels.label, len(labels.names))
        return TeacherLogits(labels.names, labels.label, request.scale, prototypes)
    # Logits of the head.
    if head is None or not known:
        raise SpkdError(
            f"{cache.name}: the teacher gave no logits; extract them (teacher.targets=[embedding,logits]), or label "
            "the speakers and take logits=prototypes"
        )
    needy = [name for name in asking if losses[name].kind.needs_labels]
    if unknown and needy:
        raise SpkdError(
            f"--loss {needy[0]}: the teacher's head has no class for {len(unknown)} of {len(labels.names)} classes "
            f"({unknown[0]}); take loss.{needy[0]}.logits=prototypes, or views without other speeds and other speakers"
        )
    for name, asked in asking.items():
        _warn(cache, name, asked.temperature)
    to_teacher = np.array([*(known.get(name, -1) for name in labels.names), -1])
    scale = head.scale if head.kind != "linear" else None
    return TeacherLogits(list(known), to_teacher[labels.label], scale)


def _warn(cache: CacheSource, loss: str, temperature: float) -> None:
    """Log a warning where, according to the card, the stored logits diverge too much at this temperature."""
    for member in cache.members:
        errors = member.card.errors.get(LOGITS, {})
        recorded = {float(name.removeprefix("kl_t")): kl for name, kl in errors.items() if name.startswith("kl_t")}
        if not recorded:
            continue
        nearest = min(recorded, key=lambda t: abs(t - temperature))
        if recorded[nearest] > WRONG:
            measured = ", ".join(f"{kl:.2g} at {t:g}" for t, kl in sorted(recorded.items()))
            log(
                f"warning: {member.name}: the stored logits are wrong by {recorded[nearest]:.2g} nats at temperature "
                f"{nearest:g} (measured at extraction: {measured}); choose loss.{loss}.temperature by that, or extract "
                "exact logits"
            )
