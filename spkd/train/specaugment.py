"""SpecAugment (Park et al., Interspeech 2019) without warping."""

from __future__ import annotations

import torch
from torch import Tensor


def mask(
    features: Tensor, frames: int, bands: int, generator: torch.Generator, part: slice | None = None, whole: int = 0
) -> Tensor:
    """Per crop one stretch of up to `frames` frames and one of up to `bands` mel bands take the crop's mean.

    Args:
        features: (B, T, F).
        generator: on the CPU.
        part, whole: which views of a larger batch these are, and its size; None: all of it.
    Returns:
        (B, T, F).
    """
    mean = features.mean(1, keepdim=True)
    for axis, widest in ((1, frames), (2, bands)):
        size = features.shape[axis]
        width = torch.rand(whole or len(features), generator=generator) * min(widest, size)
        start = torch.rand(whole or len(features), generator=generator) * (size - width)
        width, start = (values if part is None else values[part] for values in (width, start))
        position = torch.arange(size)
        hidden = (position >= start.floor()[:, None]) & (position < (start.floor() + width.floor())[:, None])
        hidden = hidden.to(features.device)
        features = torch.where(hidden[:, :, None] if axis == 1 else hidden[:, None, :], mean, features)
    return features
