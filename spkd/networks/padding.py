"""Operations on batches of views of different lengths, whose results do not depend on the padding.

`lengths` (B,) are the numbers of valid steps of each view on the last axis; None: all are valid. On the valid steps,
the results equal those of the view alone, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

CACHED = 2**19  # values that stay in the cache of a core, together with the values computed from them


def valid(x: Tensor, lengths: Tensor) -> Tensor:
    """Mask of the valid steps of x (B, ..., T): bool, (B, 1..., T)."""
    return torch.arange(x.shape[-1], device=x.device) < lengths.view(-1, *[1] * (x.dim() - 1))


def mask(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, ..., T) with zeros in the padding, as convolutions pad a single view."""
    return x if lengths is None else torch.where(valid(x, lengths), x, 0.0)


def strided(lengths: Tensor | None, stride: int) -> Tensor | None:
    """Lengths (B,) after a convolution with odd kernel k, padding (k - 1) / 2 and this stride."""
    return lengths if lengths is None or stride == 1 else (lengths - 1) // stride + 1


def mean(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean over the valid steps: (B, ..., T) -> (B, ..., 1)."""
    if lengths is None:
        return x.mean(-1, keepdim=True)
    return mask(x, lengths).sum(-1, keepdim=True) / _counts(x, lengths)


def var_mean(x: Tensor, lengths: Tensor | None, correction: int = 0) -> tuple[Tensor, Tensor]:
    """Variance and mean over the valid steps of x (B, ..., T): (B, ..., 1) each.

    The variance of a single step is 0. The computation takes two passes, which on a CPU are faster than torch.var_mean;
    sums of half precision are in fp32.

    Args:
        x: (B, ..., T).
        lengths: (B,) number of valid steps; None: all are valid.
        correction: number subtracted from the number of steps (1: variance of the sample).
    """
    # While a graph is traced, the composed form is used: the trace would fix the number of chunks of the example.
    if lengths is None and torch.is_grad_enabled() and x.requires_grad and not torch.jit.is_tracing():
        return _VarMean.apply(x, correction)
    wide = _in_single(x)
    average = mean(wide, lengths)
    deviations = mask(wide - average, lengths)
    squares = (deviations * deviations).sum(-1, keepdim=True)
    if lengths is None:
        variance = squares / max(x.shape[-1] - correction, 1)
    else:
        variance = squares / (_counts(wide, lengths) - correction).clamp_min(1)
    return variance.to(x.dtype), average.to(x.dtype)


class _VarMean(torch.autograd.Function):
    """Variance and mean, with a gradient in one pass over x (the composed one takes eight).

    Both directions compute some views at a time, so that intermediate values stay in the cache of a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
        # The composed form: no gradient is recorded here.
        chunks = [var_mean(chunk, None, correction) for chunk in x.split(_views_at_once(x))]
        variance, average = map(torch.cat, zip(*chunks, strict=True))
        ctx.save_for_backward(x)
        ctx.count = max(x.shape[-1] - correction, 1)
        return variance, average

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        size = _views_at_once(x)
        gradient = torch.empty_like(x)
        for chunk, out, *given in zip(*(y.split(size) for y in (x, gradient, *gradients)), strict=True):
            wide, of_variance, of_average = map(_in_single, (chunk, *given))
            scale = of_variance * (2.0 / ctx.count)
            out.copy_(torch.addcmul(of_average / x.shape[-1] - scale * wide.mean(-1, keepdim=True), wide, scale))
        return gradient, None


def _in_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _views_at_once(x: Tensor) -> int:
    return max(1, CACHED // x[0].numel()) if x.device.type == "cpu" else len(x)


def softmax(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Softmax over the valid steps: (B, ..., T) -> (B, ..., T); padding has weight 0."""
    return (x if lengths is None else x.masked_fill(~valid(x, lengths), -torch.inf)).softmax(-1)


def reflect(x: Tensor, width: int, lengths: Tensor | None) -> Tensor:
    """x (B, C, T) padded by reflection with `width` steps on both sides, at each view's first and last valid step."""
    if lengths is None:
        return pad(x, (width, width), mode="reflect")
    steps = torch.arange(-width, x.shape[-1] + width, device=x.device).abs()
    last = lengths[:, None] - 1
    source = (last - (last - steps).abs()).clamp_min(0)
    return x.gather(-1, source[:, None].expand(-1, x.shape[1], -1))


def _counts(x: Tensor, lengths: Tensor) -> Tensor:
    return lengths.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
