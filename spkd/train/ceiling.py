"""Above which teacher similarity two views are no negatives of each other: they are probably of one speaker."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import normalize

from spkd.cache import CacheSource
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.train.losses.base import ChosenLoss
from spkd.train.losses.contrastive import CEILING

SAMPLED = 1024  # views whose pairs are looked at
DIFFERENT = 0.99  # fraction of the pairs of different speakers that must stay below the ceiling


def with_ceilings(losses: dict[str, ChosenLoss], cache: CacheSource) -> dict[str, ChosenLoss]:
    """The losses, with the default ceiling where they contrast and none was set.

    It is 0.95, but no lower than 99 % of the cosines between different speakers: embeddings pooled from self-supervised
    encoders all point into a narrow cone, where a fixed ceiling would leave no negatives.
    """
    if not any(loss.settings.contrasts() and loss.settings.ceiling is None for loss in losses.values()):
        return losses
    found = default_ceiling(cache)
    if found > CEILING:
        log(
            f"teacher similarities between different speakers are high: the ceiling of negatives is {found:.4f}, above "
            f"{DIFFERENT:.0%} of them"
        )
    return {
        name: replace(loss, settings=replace(loss.settings, ceiling=found))
        if loss.settings.contrasts() and loss.settings.ceiling is None
        else loss
        for name, loss in losses.items()
    }


def mining_ceiling(losses: dict[str, ChosenLoss]) -> float:
    """Of the negatives that all losses of a run may use."""
    return min((loss.settings.ceiling for loss in losses.values() if loss.settings.contrasts()), default=CEILING)


def default_ceiling(cache: CacheSource) -> float:
    """0.95, or where it is higher the 99 % quantile of the teacher's cosines between views of different speakers (of
    different utterances where the speakers are unknown)."""
    views = cache.order(0, 0)[:SAMPLED]
    utterance, speaker = cache.plan.views.utterance[views], cache.speaker(views)
    different = (utterance != utterance[:, None]) & ((speaker != speaker[:, None]) | (speaker < 0))
    found = CEILING
    for name in [name for name in cache.names if name.split("@")[0] == EMBEDDING]:
        embeddings = normalize(cache.decode(cache.stored(views, [name]), [name])[name].float(), dim=-1)
        cosines = (embeddings @ embeddings.mT)[torch.from_numpy(different)]
        if len(cosines):
            found = max(found, float(cosines.quantile(DIFFERENT)))
    return found
