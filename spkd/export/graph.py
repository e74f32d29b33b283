"""Exported graph: a network, with or without its features, made of operations that every runtime has."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError
from spkd.networks.network import Network
from spkd.outputs.features import (
    FBANKS,
    FFT,
    HOP,
    PREEMPHASIS,
    WAVE,
    WINDOW,
    is_fbank,
    mel_filters,
    mirrored,
    scaled_window,
    without_padding,
)
from spkd.outputs.target import EMBEDDING, Target

BATCH = torch.export.Dim("batch", min=1, max=65_536)
# Shortest inputs (frames or samples) for which the exporter verifies that one graph serves. Networks that pool segments
# of frames need the second, which is longer than a segment of CAM++ (100 of its frames, 200 of fbank).
SHORTEST = {False: (16, 256), True: (3200, 256 * HOP + WINDOW)}
ROWS, COLUMNS = 16, 32  # the Fourier transform is one of ROWS points and one of COLUMNS
FILLED = -(-WINDOW // COLUMNS)  # rows that hold samples of a frame; zeros fill the others
FLOOR = torch.finfo(torch.float32).eps


class Fbank(nn.Module):
    """Fbank of one of FBANKS, of products with small matrices: no runtime needs an operator for Fourier transforms.

    The transform of 512 points is one of 16 points and one of 32, with factors between them (Cooley and Tukey, An
    Algorithm for the Machine Calculation of Complex Fourier Series, 1965). As one product it would take 0.8 MB and four
    times the multiplications. With n = 32 n1 + n2 and k = k1 + 16 k2,

        X[k] = sum_n2 w32^(n2 k2) w512^(n2 k1) sum_n1 x[n] w16^(n1 k1),   wN = exp(-2 pi i / N)

    Bins above 255 are left out, as the filters do not take them.
    """

    window: Tensor
    first: Tensor
    cosines: Tensor
    sines: Tensor
    second: Tensor
    filters: Tensor

    def __init__(self, toolkit: str) -> None:
        super().__init__()
        self._kind = FBANKS[toolkit]
        self._centred = self._kind.window < WINDOW
        inner, outer = torch.arange(ROWS), torch.arange(COLUMNS)
        bins = inner[:, None] + ROWS * inner  # (k1, k2)
        transform = _roots(inner[:, None] * torch.arange(FILLED), ROWS)
        factors = _roots(inner[:, None] * outer, FFT)
        last = _roots(outer[:, None] * inner, COLUMNS)
        self.register_buffer("window", scaled_window(toolkit))
        self.register_buffer("first", torch.cat([transform.real, transform.imag]).float())
        self.register_buffer("cosines", factors.real.float())
        self.register_buffer("sines", factors.imag.float())
        # A complex product as a real one: rows for real and imaginary parts of the input, columns of the result.
        rows = torch.cat([last.real, last.imag], 1), torch.cat([-last.imag, last.real], 1)
        self.register_buffer("second", torch.cat(rows).float())
        self.register_buffer("filters", mel_filters(toolkit)[bins.flatten()].contiguous())

    def forward(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        """Fbank (B, T, 80) of waveforms (B, samples)."""
        waves = mirrored(waves, lengths) if self._centred else without_padding(waves, lengths)
        frames = _frames(waves)
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        frames = nn.functional.pad((frames - PREEMPHASIS * previous) * self.window, (0, FILLED * COLUMNS - WINDOW))
        real, imaginary = (self.first @ frames.unflatten(-1, (FILLED, COLUMNS))).chunk(2, -2)
        turned = (
            real * self.cosines - imaginary * self.sines,
            real * self.sines + imaginary * self.cosines,
        )
        real, imaginary = (torch.cat(turned, -1) @ self.second).chunk(2, -1)
        power = (real.square() + imaginary.square()).flatten(-2)
        return (power @ self.filters).clamp_min(FLOOR).log()

    def num_frames(self, lengths: Tensor) -> Tensor:
        return self._kind.num_frames(lengths)


def _frames(waves: Tensor) -> Tensor:
    """Frames (B, T, 400), 160 samples apart, that fit whole into waveforms (B, samples)."""
    # Of two rows of 160 samples and half of a third each; other operators for it are slow or missing in runtimes.
    # A row more than is taken, lest the graph depend on whether the last one is full.
    waves = nn.functional.pad(waves, (0, 4 * HOP - WINDOW))
    count = waves.shape[1] // HOP - 1
    rows = waves[:, : count * HOP].unflatten(1, (count, HOP))
    return torch.cat([rows[:, :-2], rows[:, 1:-1], rows[:, 2:, : WINDOW - 2 * HOP]], -1)


def _roots(powers: Tensor, order: int) -> Tensor:
    """exp(-2 pi i power / order), complex, double precision."""
    angles = -2 * math.pi * (powers % order).double() / order
    return torch.polar(torch.ones_like(angles), angles)


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


def check_traceable(network: Network) -> None:
    """Check that torch exports a network. Raises UsageError for one with a recurrent layer."""
    if recurrent := next((m for m in network.modules() if isinstance(m, nn.RNNBase)), None):
        raise UsageError(
            f"the student has a recurrent layer ({type(recurrent).__name__}), which torch exports for one length "
            "alone: take convolutions or attention, or run it in Python from its folder (spkd.load)"
        )


def traced(embedder: Embedder, lengths: bool = False) -> torch.export.ExportedProgram:
    """Graph of an embedder, for any batch size and length.

    Args:
        lengths: whether the graph has a second input, the lengths (B,) of the views of a padded batch.
    Raises:
        SpkdError: the network is for longer views.
        Exception: errors of many kinds, where torch cannot export the network.
    """
    example = embedder.example(4.0, batch=2)
    inputs: tuple[Tensor, ...] = (example,)
    if lengths:
        inputs += (torch.tensor([example.shape[1], example.shape[1] // 2]),)
    return _of_any_length(embedder, inputs, {0: BATCH}, 10**7)


def traced_alone(embedder: Embedder, seconds: float) -> torch.export.ExportedProgram:
    """Graph of an embedder for a single view: of features up to a length, of the waveform of this length alone.

    Runtimes of phones lack the arithmetic on lengths by which the features of any waveform are found.

    Args:
        seconds: greatest length (s), or the only one.
    Raises:
        SpkdError: the network is for longer views.
        Exception: errors of many kinds, where torch cannot export the network.
    """
    example = embedder.example(seconds)
    with unchecked(), torch.no_grad():
        if embedder.front_end is None:
            return _of_any_length(embedder, (example,), {}, example.shape[1])
        return torch.export.export(embedder, (example,), strict=False)


def simplified(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A graph without checks and maxima of its length and without aliases, for which converters have no operators.

    The graph is changed in place. It gives the same at the lengths that it takes, those of `lengths_of`.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        is_first = node.target == torch.sym_max and _is_first(*node.args)
        if node.target == torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
        elif is_first or node.target == torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _is_first(one: Any, other: Any) -> bool:
    """Whether the maximum of two numbers of a graph is the first one at every length; the second may be a constant."""
    return isinstance(other, int) and statically_known_true(one.meta["val"] >= other)


def lengths_of(program: torch.export.ExportedProgram) -> tuple[int, int]:
    """Least and greatest length of the input of a graph, in frames or samples."""
    node = next(node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0])
    length = node.meta["val"].shape[1]
    if isinstance(length, int):
        return length, length
    limits = program.range_constraints[length.node.expr]
    return int(limits.lower), int(limits.upper)


def samples_of(program: torch.export.ExportedProgram, embedder: Embedder) -> tuple[int, int]:
    """Least and greatest number of samples of a recording whose input a graph takes."""
    least, most = lengths_of(program)
    if embedder.front_end is not None or least == most:
        return least, most
    return least * HOP + WINDOW - HOP, most * HOP


def _of_any_length(
    embedder: Embedder, inputs: tuple[Tensor, ...], batch: dict[int, Any], longest: int
) -> torch.export.ExportedProgram:
    shorter, longer = SHORTEST[embedder.front_end is not None]
    try:
        return _traced(embedder, inputs, batch, shorter, longest)
    except (torch._dynamo.exc.UserError, AssertionError):  # the latter where torch fails to word the former
        if longest <= longer:
            raise SpkdError(f"it takes {longer} frames or more; give it more seconds") from None
        return _traced(embedder, inputs, batch, longer, longest)


def _traced(
    embedder: Embedder, inputs: tuple[Tensor, ...], batch: dict[int, Any], shortest: int, longest: int
) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=shortest, max=longest)
    dynamic = ({**batch, 1: length}, batch)[: len(inputs)]
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


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Trace graphs quietly while the block runs, and where torch can without checks of their lengths: converters trace
    them anew, and have no operators for these.
    """
    with quiet(), torch._dynamo.config.patch(do_not_emit_runtime_asserts=True):
        yield
