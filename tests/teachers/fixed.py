"""The same weights and audio on every machine, for outputs that a library gave elsewhere."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def fixed_weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Weights by name, each a function of its name and size alone; batch-norms as after training."""
    weights = {}
    for name, shape in shapes:
        random = np.random.RandomState(zlib.crc32(name.encode()))
        size = int(np.prod(shape))
        if name.endswith("running_var"):
            values = random.uniform(0.5, 1.5, size)
        elif name.endswith("weight") and len([n for n in shape if n > 1]) > 1:
            values = random.standard_normal(size) * (shape[0] / size) ** 0.5
        else:
            values = random.uniform(-0.1, 0.1, size) + float(name.endswith("weight"))
        weights[name] = torch.from_numpy(values.reshape(shape).astype(np.float32))
    return weights


def fixed_wave(seconds: float = 1.3) -> np.ndarray:
    """(samples,), in [-1, 1]: harmonics that glide, and noise."""
    time = np.arange(round(16_000 * seconds)) / 16_000
    random = np.random.RandomState(7)
    phase = 2 * np.pi * (140 * time + 30 * time**2)
    voiced = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * voiced + 0.01 * random.standard_normal(len(time))).astype(np.float32)
