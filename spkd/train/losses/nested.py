"""Nested embeddings: a loss at every size of an embedding whose first numbers are embeddings themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError
from spkd.networks.network import Network
from spkd.outputs.features import HOP, WINDOW
from spkd.outputs.target import EMBEDDING
from spkd.train.losses.base import ChosenLoss, Loss, LossContext, LossInputs, TrainedClassifier


class Nested(Loss):
    """L_beside + 1/|M| sum_{m in M} L(e[:m]): the mean of a loss over the sizes M of the student's embedding e.

    L(e[:m]) is the loss as it is for a student whose embedding is the first m numbers of e: it has a projection to the
    teacher's width, a classifier and a normalisation of its own for each m. L_beside is the part of a loss that takes
    other levels of the student (frames, statistics).

    This is the objective of nested ("Matryoshka") representations (Kusupati et al., NeurIPS 2022, eq. 1), for speakers
    M-Vec (Wang et al., arXiv 2409.15782), with the weights c_m = 1 / |M|: a mean, so that the weights of the losses,
    the clipping of gradients and the learning rate mean the same as for one size. Both papers train a classifier at
    each size; that a loss against a teacher is taken in the same way is this project's choice.

    With `nested_crops`, the mean is over the sizes whose length the crops of the batch reach. The duration-aware
    embeddings of Jung et al. (DAME, arXiv 2601.13999) align sizes with durations in this sense, short crops with the
    first numbers; of their weights only the abstract was at hand, so the rule is this project's.

    Attributes:
        of_size: the loss of each size, the smallest first.
        beside: loss of the other levels; None: there is none.
    """

    def __init__(self, loss: ChosenLoss, context: LossContext) -> None:
        """Make a loss for each size.

        Raises:
            UsageError: a loss that keeps networks of its own, or as of the loss.
        """
        super().__init__(loss.settings, context)
        if loss.kind.averages_weights:
            raise UsageError(
                f"student.nested: not with --loss {loss.name}, whose heads and averaged networks are for one size of "
                "embedding; leave one of the two out"
            )
        self._sizes, self._lengths = context.nested, context.nested_crops
        on, beside = loss.settings.on_embedding(), loss.settings.beside_embedding()
        whole = context.levels[EMBEDDING]
        self.of_size = nn.ModuleList(
            loss.kind(on, replace(context, levels={**context.levels, EMBEDDING: replace(whole, dim=size)}))
            for size in self._sizes
        )
        self.beside = None if beside is None else loss.kind(beside, context)

    def join(self, network: Network) -> None:
        for loss in self._all():
            loss.join(network)

    def after_step(self, network: Network, progress: float) -> None:
        for loss in self._all():
            loss.after_step(network, progress)

    def classifier(self) -> TrainedClassifier | None:
        """Classifier of the whole embedding; those of the other sizes are not kept."""
        return self._all()[-1].classifier()

    def report(self) -> dict[str, Any]:
        return self._all()[-1].report()

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        losses = [
            loss(cut(student, size), cut_inputs(inputs, size))
            for size, loss in zip(self._sizes, self.of_size, strict=True)
            if self._trains(size, inputs)
        ]
        total = torch.stack(losses).mean()
        return total if self.beside is None else total + self.beside(student, inputs)

    def _trains(self, size: int, inputs: LossInputs) -> bool:
        """Whether the crops of a batch train a size: the smallest always, so that no batch trains nothing."""
        if not self._lengths or size == self._sizes[0]:
            return True
        # A crop has as many frames as windows fit: less than a window is missing from their hops.
        missing = self._lengths[self._sizes.index(size)] * SAMPLE_RATE - inputs.crops[0].shape[1] * HOP
        return missing < WINDOW

    def _all(self) -> list[Loss]:
        """The losses: of the other levels, then of each size, the whole embedding last."""
        return cast(list[Loss], [*([] if self.beside is None else [self.beside]), *self.of_size])


def make_loss(loss: ChosenLoss, context: LossContext) -> Loss:
    """Loss of a run, at every size of the student's embedding where it has several. Raises UsageError as the loss."""
    if context.nested and loss.settings.on_embedding() is not None:
        return Nested(loss, context)
    return loss.kind(loss.settings, context)


def cut(levels: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Levels of a student whose embedding has the first numbers alone; {} of {}."""
    return {name: values[:, :size] if name == EMBEDDING else values for name, values in levels.items()}


def cut_inputs(inputs: LossInputs, size: int) -> LossInputs:
    """Inputs of a loss with the student's levels of other crops and of the path through the adapters cut."""
    others = [cut(levels, size) for levels in inputs.other_levels]
    return replace(inputs, other_levels=others, finetune_levels=cut(inputs.finetune_levels, size))
