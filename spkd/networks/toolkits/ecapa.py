"""ECAPA-TDNN as SpeechBrain (and 3D-Speaker, which took it over) and WeSpeaker have it; they differ from one another
and from the student of this project in edges, order and attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spkd.networks.ecapa import ECAPA, SCALE, AttentiveStatistics, Res2, SERes2Block
from spkd.networks.network import describe
from spkd.networks.toolkits.pooling import Attentive
from spkd.outputs.features import MELS


class SpeechBrainECAPA(ECAPA):
    """Convolutions mirror their edges, and variances have a lower floor."""

    def __init__(self, channels: int, embedding: int, mels: int = MELS) -> None:
        super().__init__(channels, embedding, mels, reflect=True)
        self.pool[0] = AttentiveStatistics(3 * channels, floor=1e-12)


class AllGroups(Res2):
    """Every group but the last is convolved; the student's Res2 convolves every one but the first."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        *groups, last = x.chunk(SCALE, 1)
        outputs: list[Tensor] = []
        for block, group in zip(self.blocks, groups, strict=True):
            outputs.append(block(group + outputs[-1] if outputs else group, lengths))
        return torch.cat([*outputs, last], 1)


class WeSpeakerECAPA(ECAPA):
    """Joined without batch-norm into 1536 channels; attention without batch-norm, over the frames alone or (GLOB) with
    mean and deviation of the view.

    Args:
        context: GLOB. normalised: batch-norm after the embedding (`emb_bn`).
    """

    WIDE = 1536

    def __init__(
        self, channels: int, embedding: int, mels: int = MELS, context: bool = False, normalised: bool = False
    ) -> None:
        super().__init__(channels, embedding, mels)
        self.blocks = nn.ModuleList(SERes2Block(channels, dilation, kind=AllGroups) for dilation in (2, 3, 4))
        self.levels = describe(self.WIDE, {"stats": 2 * self.WIDE, "embedding": embedding})
        self.join = nn.Sequential(nn.Conv1d(3 * channels, self.WIDE, 1), nn.ReLU())
        self.pool = nn.ModuleList([Attentive(self.WIDE, context), nn.BatchNorm1d(2 * self.WIDE)])
        project = nn.Linear(2 * self.WIDE, embedding)
        self.project = nn.Sequential(project, nn.BatchNorm1d(embedding)) if normalised else project
