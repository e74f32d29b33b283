"""Pooling over time of WeSpeaker and 3D-Speaker, with their names of tensors: (B, D, T) -> (B, D) or (B, 2D)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from spkd.networks import padding
from spkd.networks.resnet import FLOOR, SampleStatistics

BOTTLENECK = 128
HEAD_BOTTLENECK = 64  # width of the bottleneck of each head of attention
HEADS, QUERIES = 8, 2  # of MQMHASTP
LARGEST_PRECISION = 15.0  # largest magnitude of a logarithmic precision


class Mean(nn.Module):
    """Mean over time: (B, D, T) -> (B, D)."""

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return padding.mean(frames, lengths)[..., 0]


class Deviation(SampleStatistics):
    """Standard deviation of the sample over time: (B, D, T) -> (B, D)."""

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return super().forward(frames, lengths).chunk(2, 1)[1]


class Attentive(nn.Module):
    """Attentive statistics (Okabe, Koshinaka and Shinoda, Interspeech 2018) with tanh: those of ECAPA-TDNN without
    batch-norm.

    Args:
        width: width D of the frames.
        context: whether the attention also takes mean and deviation of the whole view.
    """

    def __init__(self, width: int, context: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Conv1d(3 * width if context else width, BOTTLENECK, 1)
        self.linear2 = nn.Conv1d(BOTTLENECK, width, 1)
        self._context = context

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        seen = frames
        if self._context:
            variance, mean = padding.var_mean(frames, lengths, correction=1)
            seen = torch.cat([frames, mean.expand_as(frames), (variance + FLOOR).sqrt().expand_as(frames)], 1)
        weights = padding.softmax(self.linear2(self.linear1(seen).tanh()), lengths)
        return weighted_statistics(frames, weights, FLOOR)


class AttentiveReLU(nn.Module):
    """Attentive statistics with ReLU and batch-norm (WeSpeaker's ASP, SpeechBrain's ResNet).

    Args:
        width: width D of the frames.
        bottleneck: width of the bottleneck of the attention.
    """

    def __init__(self, width: int, bottleneck: int = BOTTLENECK) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv1d(width, bottleneck, 1), nn.ReLU(), nn.BatchNorm1d(bottleneck), nn.Conv1d(bottleneck, width, 1)
        )

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return weighted_statistics(frames, padding.softmax(self.attention(frames), lengths), 1e-5)


class MultiHead(nn.Module):
    """Multi-head attentive statistics, MHASTP (India, Safari and Hernando, Interspeech 2019, arXiv 1906.09890).

    The channels are split into heads; each has its attention, mean and deviation: (B, D, T) -> (B, 2D).

    Args:
        width: width D of the frames.
        heads: number of heads.
        channelwise: whether every channel has a weight of its own; else all channels of a head share one.
    Raises:
        ValueError: the width is no multiple of the number of heads.
    """

    def __init__(self, width: int, heads: int = 2, channelwise: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a pooling of {heads} heads does not fit {width} channels")
        own = width // heads

        def attention() -> nn.Sequential:
            first, last = nn.Conv1d(own, HEAD_BOTTLENECK, 1), nn.Conv1d(HEAD_BOTTLENECK, own if channelwise else 1, 1)
            return nn.Sequential(OrderedDict(att_0=first, tanh0=nn.Tanh(), att_1=last))

        self.heads_att_trans = nn.ModuleList(attention() for _ in range(heads))

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        heads = zip(frames.chunk(len(self.heads_att_trans), 1), self.heads_att_trans, strict=True)
        return torch.cat([weighted_statistics(x, padding.softmax(layer(x), lengths), FLOOR) for x, layer in heads], 1)


class MultiQuery(nn.Module):
    """Multi-query multi-head attentive statistics, MQMHASTP (Zhao et al., ICASSP 2022, arXiv 2110.05042):
    (B, D, T) -> (B, 4D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n_query = nn.ModuleList(MultiHead(width, HEADS, channelwise=True) for _ in range(QUERIES))

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return torch.cat([query(frames, lengths) for query in self.n_query], 1)


class PosteriorMean(nn.Module):
    """Posterior mean of a Gaussian whose precision is estimated for every number of every frame: (B, D, T) -> (B, D).

    It is the pooling of the xi-vector (Lee, Wang and Koshinaka, IEEE SPL 28, 2021). The prior counts as one more frame.

    Args:
        width: width D of the frames.
        bottleneck: width of the hidden layer of the estimate.
    """

    def __init__(self, width: int, bottleneck: int = 256) -> None:
        super().__init__()
        self.prior_mean, self.prior_logprec = nn.Parameter(torch.zeros(1, width)), nn.Parameter(torch.zeros(1, width))
        self.lin1_relu_bn = nn.Sequential(nn.Conv1d(width, bottleneck, 1), nn.ReLU(), nn.BatchNorm1d(bottleneck))
        self.lin2 = nn.Conv1d(bottleneck, width, 1)

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        precision = 2 * softplus(self.lin2(self.lin1_relu_bn(frames))).log()  # logarithmic
        precision = precision.clamp(-LARGEST_PRECISION, LARGEST_PRECISION)
        # The prior comes first, so that padding remains at the end.
        precision = torch.cat([self.prior_logprec[..., None].expand(len(frames), -1, -1), precision], -1)
        seen = torch.cat([self.prior_mean[..., None].expand(len(frames), -1, -1), frames], -1)
        weights = padding.softmax(precision, None if lengths is None else lengths + 1)
        return (weights * seen).sum(-1)


def weighted_statistics(frames: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Weighted mean and standard deviation over time: (B, D, T) -> (B, 2D).

    Args:
        frames: (B, D, T).
        weights: (B, D, T) or (B, 1, T), summing to 1 over time.
        floor: least variance.
    """
    mean = (weights * frames).sum(-1)
    # Centred before squaring: E[x^2] - E[x]^2 cancels.
    variance = (weights * (frames - mean[..., None]).square()).sum(-1)
    return torch.cat([mean, variance.clamp_min(floor).sqrt()], 1)


POOLINGS = ("TSTP", "ASTP", "TAP", "TSDP", "MHASTP", "MQMHASTP", "XI")


def make_pooling(name: str, width: int, context: bool = False, floor: float = FLOOR) -> tuple[nn.Module, int]:
    """Pooling layer by its name in WeSpeaker's settings, and the width of its output over that of its input.

    Args:
        name: one of POOLINGS.
        context: whether the attention of ASTP also takes mean and deviation of the whole view.
        floor: number added to a variance before its root.
    Raises:
        ValueError: an unknown name, or a width that the layer cannot have.
    """
    makers: dict[str, Callable[[], tuple[nn.Module, int]]] = {
        "TSTP": lambda: (SampleStatistics(floor), 2),
        "ASTP": lambda: (Attentive(width, context), 2),
        "TAP": lambda: (Mean(), 1),
        "TSDP": lambda: (Deviation(floor), 1),
        "MHASTP": lambda: (MultiHead(width), 2),
        "MQMHASTP": lambda: (MultiQuery(width), 2 * QUERIES),
        "XI": lambda: (PosteriorMean(width), 1),
    }
    if name not in makers:
        raise ValueError(f"pooling_func {name} (known here: {', '.join(POOLINGS)})")
    return makers[name]()
