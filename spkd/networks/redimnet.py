"""Student in the form of ReDimNet2 (2026, arXiv 2603.11841), in a shape for processors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from spkd.networks import padding
from spkd.networks.network import FRAME_LEVEL
from spkd.networks.toolkits.redimnet import AuthorsReDimNet, Shape, StageShape
from spkd.outputs.features import MELS, WINDOW

STEM = (4, 4)  # bands and frames in a step of the first convolution
STAGES = (
    StageShape(bands=1, time=1, blocks=1, expansion=1, reduction=None),
    StageShape(bands=2, time=1, blocks=1, expansion=1, reduction=None),
    StageShape(bands=1, time=1, blocks=2, expansion=1, reduction=4),
    StageShape(bands=2, time=1, blocks=2, expansion=1, reduction=4),
)


class ReDimNet2(AuthorsReDimNet):
    """Strided convolution to 20 bands and 25 frames a second, four stages with C, 2C, 2C and 4C channels, attentive
    statistics, batch-norm, linear. The last two stages have a 1-d block with attention, a quarter as wide as a frame.

    The authors stride over time within the stages, and have depthwise 2-d convolutions. Here the first convolution
    strides, and the others are dense: on a processor, what counts is how often all values of all frames are read and
    written, not how many multiplications there are. C is a multiple of 4; C = 16 has 0.71 M parameters.

    Levels: frames (B, T / 4, 12C), stats (B, 24C), embedding (B, E).
    """

    default_channels = 16

    def __init__(self, channels: int = default_channels, embedding: int = 192) -> None:
        if channels % 4:
            raise ValueError(f"student.channels={channels}: the attention of redimnet2 takes multiples of 4")
        shape = Shape(MELS, channels, STAGES, "basic_resnet", "conv+att", None, True, 12 * channels, stem=STEM)
        super().__init__(shape, embedding)
        self.settings = {"channels": channels, "embedding": embedding}
        # The kernel of the first convolution is centred on the first frame of a step.
        self.levels[FRAME_LEVEL] = replace(self.levels[FRAME_LEVEL], window=WINDOW)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        # A last step that is not full is filled with the mean, which is 0, so that views of any length have a frame:
        # the padding of the first convolution is as long as its kernel reaches into such a step.
        step = self._step
        whole = None if lengths is None else (lengths + step - 1) // step * step
        return self._of_steps(padding.mask(features, lengths), whole)
