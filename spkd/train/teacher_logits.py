"""Teacher logits: those of its head where it knows the training speakers, or else cosines to prototypes."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.cache import CacheSource
from spkd.cache.lazy import picked
from spkd.errors import SpkdError, UsageError, listed
from spkd.outputs.target import EMBEDDING, LOGITS
from spkd.progress import log
from spkd.train.labels import Labels, mean_embeddings
from spkd.train.losses.base import ChosenLoss

CPU = torch.device("cpu")
WRONG = 0.05  # divergence (nats) of stored logits, as the card records it, from which a warning is printed


@dataclass(frozen=True)
class TeacherLogits:
    """Teacher logits and their classes.

    Attributes:
        label: (views,) class of each view among them, -1 where it has none.
        scale: scale of cosine logits; None for others.
        source: name of the target from which they are computed: logits, or the embedding by prototypes.
        prototypes: (classes, D) unit vectors, on the device of the run; None before `with_prototypes`, or where the
            logits come from the cache.
    """

    classes: list[str]
    label: np.ndarray
    scale: float | None
    source: str = LOGITS
    prototypes: Tensor | None = None

    def with_prototypes(self, cache: CacheSource, device: torch.device = CPU) -> TeacherLogits:
        """The same with their prototypes, for which all embeddings of the cache are read."""
        if self.source == LOGITS:
            return self
        return replace(self, prototypes=mean_embeddings(cache, self.label, len(self.classes)).to(device))

    def of(self, embedding: Tensor) -> Tensor:
        """Logits (B, classes) of embeddings (B, D): scale * cos(embedding, prototype)."""
        assert self.prototypes is not None
        assert self.scale is not None
        return self.scale * normalize(embedding.float(), dim=-1) @ self.prototypes.mT


def teacher_logits(cache: CacheSource, labels: Labels, losses: dict[str, ChosenLoss]) -> TeacherLogits | None:
    """Logits that label-level losses learn from, without prototypes; None where no loss asks for them.

    Raises:
        UsageError: the logits that the settings name are not available, or two losses ask for different logits.
        SpkdError: a loss needs a class of every view, and the teacher's head lacks some (pseudo-speakers, say).
    """
    # Requests of the losses, which must agree.
    requested = {name: loss.settings.logits_request() for name, loss in losses.items()}
    asking = {name: request for name, request in requested.items() if request is not None}
    if not asking:
        return None
    first, request = next(iter(asking.items()))
    if any((other.source, other.scale) != (request.source, request.scale) for other in asking.values()):
        raise UsageError(f"{listed(list(asking))}: give them the same `logits` and the same `scale`")
    head = cache.members[0].card.head
    if any("@" in name for name in cache.names):
        raise UsageError("teachers=separate: losses over logits need one teacher; concatenate or average them")
    # Prototypes: asked for, or by default where the head does not know every class.
    classes = list(head.classes) if head is not None and LOGITS in cache.names else []
    known = _by_name(classes)
    unknown = [name for name in labels.names if name not in known]
    by_default = request.source == "auto" and cache.labelled and (bool(unknown) or not known)
    if by_default and numbered(classes):
        log(f"note: {cache.name}: the classes of the teacher's head are numbers, not names: prototypes are taken")
    if request.source == "prototypes" or by_default:
        if not cache.labelled or EMBEDDING not in cache.names:
            lacks = "the target embedding" if cache.labelled else "the speaker of every utterance"
            raise UsageError(f"loss.{first}.logits=prototypes needs {lacks}, which {cache.name} lacks")
        return TeacherLogits(labels.names, labels.label, request.scale, EMBEDDING)
    # Logits of the head.
    if head is None or not classes:
        raise SpkdError(f"--loss {first}: {cache.name} holds no logits; {_way_to_logits(cache, first)}")
    needy = [name for name in asking if losses[name].kind.needs_labels]
    if unknown and needy:
        reason = "its own are numbers, not names" if numbered(classes) else unknown[0]
        raise SpkdError(
            f"--loss {needy[0]}: the teacher's head has no class for {len(unknown)} of {len(labels.names)} classes "
            f"({reason}); take loss.{needy[0]}.logits=prototypes, or views without other speeds and other speakers"
        )
    for name, asked in asking.items():
        _warn(cache, name, asked.temperature)
    to_teacher = np.array([*(known.get(name, -1) for name in labels.names), -1])
    scale = head.scale if head.kind != "linear" else None
    return TeacherLogits(classes, picked(to_teacher, labels.label), scale)


def _by_name(classes: list[str]) -> dict[str, int]:
    """Number of each class by its name; without names that several have, and {} where the classes are numbered."""
    if numbered(classes):
        return {}
    names = Counter(classes)
    return {name: i for i, name in enumerate(classes) if names[name] == 1}


def numbered(classes: Sequence[str]) -> bool:
    """Whether classes have numbers (0, 1, ...) instead of names, as of WeSpeaker and 3D-Speaker, which keep no names.

    A speaker of the manifest that is written as such a number is then somebody else.
    """
    return bool(classes) and all(name == str(i) for i, name in enumerate(classes))


def _way_to_logits(cache: CacheSource, loss: str) -> str:
    """Phrase that says how a loss over logits can learn: by prototypes, or by another extraction."""
    card = cache.members[0].card
    family = "NAME" if card.teacher.family == "none" else shlex.quote(card.teacher.family)
    prototypes = f"take loss.{loss}.logits=prototypes" if cache.labelled else "name the speaker of every utterance"
    return (
        f"{prototypes}, or extract logits of a teacher with a classifier: spkd extract teacher={family} "
        f"'teacher.targets=[embedding,logits]' {card.views.arguments} cache=NEW_FOLDER"
    )


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
