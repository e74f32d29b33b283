"""Ceiling of negatives: teacher similarity above which two views are not used as negatives of each other.

Two views with a similarity above it are probably of the same speaker.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import normalize

from spkd.cache import CacheSource
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.train.losses.base import ChosenLoss
from spkd.train.losses.contrastive import CEILING

SAMPLED = 1024  # views whose pairs are compared
DIFFERENT = 0.99  # fraction of the pairs of different speakers that must stay below the ceiling


def with_ceilings(losses: dict[str, ChosenLoss], cache: CacheSource) -> dict[str, ChosenLoss]:
    """Losses with the default ceiling, where they use negatives and none was set.

    It is 0.95, or higher where needed to keep 99 % of the pairs of different speakers as negatives: embeddings pooled
    from self-supervised encoders all lie in a narrow cone, in which a fixed ceiling would leave no negatives.
    """
    if not any(loss.settings.contrasts() and loss.settings.ceiling is None for loss in losses.values()):
        return losses
    ceiling = default_ceiling(cache)
    if ceiling > CEILING:
        log(
            f"teacher similarities between different speakers are high: the ceiling of negatives is {ceiling:.4f}, "
            f"above {DIFFERENT:.0%} of them"
        )
    return {
        name: replace(loss, settings=replace(loss.settings, ceiling=ceiling))
        if loss.settings.contrasts() and loss.settings.ceiling is None
        else loss
        for name, loss in losses.items()
    }


def mining_ceiling(losses: dict[str, ChosenLoss]) -> float:
    """Ceiling (cosine) of the negatives that all losses of a run may use."""
    return min((loss.settings.ceiling for loss in losses.values() if loss.settings.contrasts()), default=CEILING)


def default_ceiling(cache: CacheSource) -> float:
    """Default ceiling (cosine): 0.95, or the 99 % quantile of the teacher's cosines of different speakers where higher.

    Where the speakers are unknown, the cosines are those of different utterances.
    """
    views = cache.order(0, 0)[:SAMPLED]
    utterance, speaker = cache.plan.views.utterance[views], cache.speaker(views)
    different = (utterance != utterance[:, None]) & ((speaker != speaker[:, None]) | (speaker < 0))
    ceiling = CEILING
    for name in [name for name in cache.names if name.split("@")[0] == EMBEDDING]:
        embeddings = normalize(cache.decode(cache.stored(views, [name]), [name])[name].float(), dim=-1)
        cosines = (embeddings @ embeddings.mT)[torch.from_numpy(different)]
        if len(cosines):
            ceiling = max(ceiling, float(cosines.quantile(DIFFERENT)))
    return ceiling
