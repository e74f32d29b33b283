"""SpecAugment (Park et al., Interspeech 2019) without warping."""

from __future__ import annotations

import torch
from torch import Tensor

from spkd.device import sent


def mask(
    features: Tensor, frames: int, bands: int, generator: torch.Generator, part: slice | None = None, whole: int = 0
) -> Tensor:
    """Replace one stretch of frames and one of mel bands of each crop by the crop's mean.

    Args:
        features: (B, T, F).
        frames: largest number of masked frames.
        bands: largest number of masked bands.
        generator: random generator on the CPU.
        part: rows of these crops in a larger batch, for which the random numbers are drawn; None: the whole batch.
        whole: size of that larger batch.
    Returns:
        (B, T, F).
    """
    mean = features.mean(1, keepdim=True)
    for axis, widest in ((1, frames), (2, bands)):
        size = features.shape[axis]
        width = torch.rand(whole or len(features), generator=generator) * min(widest, size)
        start = torch.rand(whole or len(features), generator=generator) * (size - width)
        width, start = (values if part is None else values[part] for values in (width, start))
        first, last = sent(torch.stack([start.floor(), start.floor() + width.floor()]), features.device)[..., None]
        position = torch.arange(size, device=features.device)
        hidden = (position >= first) & (position < last)
        features = torch.where(hidden[:, :, None] if axis == 1 else hidden[:, None, :], mean, features)
    return features
