"""Exported graph: a network, with or without its features, made of operations that every runtime has."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError
from spkd.networks.network import Network
from spkd.outputs.features import (
    FBANKS,
    HOP,
    WAVE,
    WINDOW,
    frame_spectra,
    is_fbank,
    mel_filters,
    mirrored,
    without_padding,
)
from spkd.outputs.target import EMBEDDING, Target

BATCH = torch.export.Dim("batch", min=1, max=65_536)
# Shortest inputs (frames or samples) for which the exporter verifies that one graph serves. Networks that pool segments
# of frames need the second, which is longer than a segment of CAM++ (100 of its frames, 200 of fbank).
SHORTEST = {False: (16, 256), True: (3200, 256 * HOP + WINDOW)}
FLOOR = torch.finfo(torch.float32).eps


class Fbank(nn.Module):
    """Fbank of one of FBANKS, with its linear steps as one convolution.

    Removal of the mean, pre-emphasis, window and Fourier transform of a frame are linear together.
    """

    kernels: Tensor
    filters: Tensor

    def __init__(self, toolkit: str) -> None:
        super().__init__()
        spectra = frame_spectra(toolkit)
        self.register_buffer("kernels", torch.cat([spectra.real, spectra.imag]).float()[:, None])
        self.register_buffer("filters", mel_filters(toolkit).T.contiguous())
        self._kind = FBANKS[toolkit]
        self._centred = self._kind.window < WINDOW

    def forward(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        """Fbank (B, T, 80) of waveforms (B, samples)."""
        waves = mirrored(waves, lengths) if self._centred else without_padding(waves, lengths)
        spectra = nn.functional.conv1d(waves[:, None], self.kernels, stride=HOP)
        real, imaginary = spectra.chunk(2, 1)
        return (self.filters @ (real.square() + imaginary.square())).clamp_min(FLOOR).log().transpose(1, 2)

    def num_frames(self, lengths: Tensor) -> Tensor:
        return self._kind.num_frames(lengths)


class Samples(nn.Module):
    """Samples in rows of 160: (B, samples) -> (B, T, 160)."""

    def forward(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        frames = waves.shape[1] // HOP
        return without_padding(waves, lengths)[:, : frames * HOP].unflatten(1, (frames, HOP))

    def num_frames(self, lengths: Tensor) -> Tensor:
        return WAVE.num_frames(lengths)


class Embedder(nn.Module):
    """Module from input to embedding (B, D).

    Args:
        waveform: whether the input is the waveform (B, samples) instead of the network's features (B, T, F).
    """

    def __init__(self, network: Network, waveform: bool) -> None:
        super().__init__()
        self.network = network.eval()
        self.front_end: Fbank | Samples | None = None
        if waveform:
            self.front_end = Fbank(toolkit_of(network.input_kind)) if is_fbank(network.input_kind) else Samples()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings (B, D).

        Args:
            x: (B, samples) or (B, T, F).
            lengths: (B,) number of valid samples or frames of each view. All are valid where it exceeds the length of
                the batch, or is None.
        """
        if lengths is not None:
            lengths = lengths.clamp_max(x.shape[1])
        if self.front_end is not None:
            x = self.front_end(x, lengths)
            if lengths is not None:
                lengths = self.front_end.num_frames(lengths)
        return self.network(x, lengths=lengths)[EMBEDDING]

    def example(self, seconds: float, batch: int = 1, seed: int = 0) -> Tensor:
        """Input of noise."""
        generator = torch.Generator().manual_seed(seed)
        waves = 0.1 * torch.randn(batch, round(seconds * SAMPLE_RATE), generator=generator)
        return waves if self.front_end is not None else self.network.features(waves)


def toolkit_of(kind: Target) -> str:
    """Name of a kind of fbank among FBANKS."""
    return next(name for name, target in FBANKS.items() if target == kind)


def traced(embedder: Embedder, lengths: bool = False) -> torch.export.ExportedProgram:
    """Graph of an embedder, for any batch size and length.

    Args:
        lengths: whether the graph has a second input, the lengths (B,) of the views of a padded batch.
    Raises:
        SpkdError: the network has recurrent layers.
        Exception: errors of many kinds, where torch cannot export the network.
    """
    if recurrent := next((m for m in embedder.network.modules() if isinstance(m, nn.RNNBase)), None):
        raise SpkdError(
            f"it has a recurrent layer ({type(recurrent).__name__}), which torch exports for one length alone: take "
            "convolutions or attention, or run it in Python from its folder (spkd.load)"
        )
    example = embedder.example(4.0, batch=2)
    inputs: tuple[Tensor, ...] = (example,)
    if lengths:
        inputs += (torch.tensor([example.shape[1], example.shape[1] // 2]),)
    shorter, longer = SHORTEST[embedder.front_end is not None]
    try:
        return _traced(embedder, inputs, shorter)
    except torch._dynamo.exc.UserError:
        return _traced(embedder, inputs, longer)


def _traced(embedder: Embedder, inputs: tuple[Tensor, ...], shortest: int) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=shortest, max=10**7)
    dynamic = ({0: BATCH, 1: length}, {0: BATCH})[: len(inputs)]
    with quiet(), torch.no_grad():
        return torch.export.export(
            embedder, inputs, dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's warnings and output while the block runs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
