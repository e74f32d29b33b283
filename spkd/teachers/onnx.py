"""Any speaker model in ONNX, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest
from spkd.networks import padding
from spkd.outputs.features import FBANKS, HOP, PREEMPHASIS, WINDOW, fbank_of, slaney_filters
from spkd.outputs.target import EMBEDDING, Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.progress import log
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig

FRAMES = "frames"
NEMO = "nemo"
PROBES = (16_000, 16_480, 17_760, 24_000, 31_999)  # samples at which the rate of frame outputs is found out
LONGEST = 300 * SAMPLE_RATE  # what a graph needs memory for cannot be read from it


class ONNX(Teacher):
    """Targets: embedding, and frames where the graph has such an output.

    The input is the waveform (B, samples), or fbank (B, T, mels) or (B, mels, T), with a second input of lengths or
    not. Whose fbank it is says the metadata that sherpa-onnx's models carry, else teacher.onnx.input.
    """

    family = "onnx"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> ONNX:
        """weights: the file. input: see `Teacher`. outputs: names in the graph of embedding and frames, where they
        are not clear."""
        return cls(config.weights, config.settings.input, config.settings.outputs, device)

    def __init__(self, weights: str | None, kind: str, outputs: dict[str, str], device: torch.device) -> None:
        if weights is None:
            raise UsageError("teacher=onnx: name the model by teacher.weights=FILE.onnx")
        self._path, self.device = Path(weights), device
        self._session = _session(self._path, device)
        described = self._session.get_modelmeta().custom_metadata_map
        if (rate := described.get("sample_rate", str(SAMPLE_RATE))) != str(SAMPLE_RATE):
            raise UsageError(f"{weights}: trained on audio of {rate} Hz; this project has {SAMPLE_RATE} Hz")
        self._inputs = self._session.get_inputs()
        self._kind, self._bands_first, self._mels = _input_kind(weights, self._inputs, kind, described)
        self._batches = not isinstance(self._inputs[0].shape[0], int)
        self._names = _outputs(weights, self._session.get_outputs(), outputs, described)
        fixed = self._inputs[0].shape[-1 if self._kind == "waveform" or self._bands_first else 1]
        if isinstance(fixed, int) and self._kind != "waveform":
            raise UsageError(f"{weights}: takes exactly {fixed} frames; spkd loads graphs of any length")
        if isinstance(fixed, int):
            self.min_samples = self.max_samples = fixed
            self.targets = self._find_targets((fixed,))
        else:
            self.targets = self._find_targets(PROBES)
            self.min_samples = max(WINDOW, *(target.window for target in self.targets.values()))
            self.max_samples = LONGEST

    def card(self) -> TeacherCard:
        taken = {"waveform": "waveform as it is", NEMO: f"{self._mels}-mel fbank of NeMo, normalised per band and view"}
        return TeacherCard(
            family=self.family,
            weights_sha256=digest.of_file(self._path),
            licence="see the model's own page",
            source=self._path.name,
            preprocessing=taken.get(
                self._kind, f"{self._mels}-mel fbank of {self._kind}, 25/10 ms, mean-normalised per view"
            ),
            details={"outputs": self._names},
        )

    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        wanted = [name for name in self._names if name in names or not names]
        parts = waves.split(len(waves) if self._batches else 1)
        try:
            results = [self._run(part, [self._names[name] for name in wanted]) for part in parts]
        except Exception as error:  # onnxruntime's own kinds
            raise SpkdError(
                f"{self._path}: fails on {waves.shape[1] / SAMPLE_RATE:g} s ({first_line(error)})"
            ) from error
        joined = (np.concatenate(values) for values in zip(*results, strict=True))
        outputs = {name: torch.from_numpy(values) for name, values in zip(wanted, joined, strict=True)}
        if EMBEDDING in outputs:
            outputs[EMBEDDING] = outputs[EMBEDDING].flatten(1)
        return outputs

    def _run(self, waves: Tensor, names: list[str]) -> list[np.ndarray]:
        values = waves
        if self._kind == NEMO:
            values = nemo_fbank(waves, self._mels)
        elif self._kind != "waveform":
            bank = fbank_of(self._kind, waves, self._mels)
            values = bank - bank.mean(1, keepdim=True)
        count = values.shape[1]
        if self._bands_first:
            values = values.transpose(1, 2)
        if self._kind == NEMO:  # as NeMo pads its batches
            values = pad(values, (0, -count % 16))
        feed = {self._inputs[0].name: values.cpu().contiguous().numpy()}
        for other in self._inputs[1:]:
            feed[other.name] = np.full(len(values), count, np.int32 if "int32" in other.type else np.int64)
        return self._session.run(names, feed)

    def _find_targets(self, probes: tuple[int, ...]) -> dict[str, Target]:
        """Widths and rates, by running the graph on noise."""
        generator = torch.Generator().manual_seed(0)
        found = [self.forward(0.1 * torch.randn(1, n, generator=generator), list(self._names)) for n in probes]
        targets = {EMBEDDING: Target(EMBEDDING, found[0][EMBEDDING].shape[1])}
        if FRAMES in self._names:
            shapes = [outputs[FRAMES].shape for outputs in found]
            timing = _timing(probes, [shape[1] for shape in shapes])
            if timing is None or len(shapes[0]) != 3:
                log(f"note: {self._path.name}: its frames do not come at a constant rate, so they are no target")
                del self._names[FRAMES]
            else:
                targets[FRAMES] = Target(FRAMES, shapes[0][2], *timing)
        return targets


def _session(path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("teacher=onnx needs onnxruntime: pip install 'spkd[onnx]'") from error
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own kinds
        raise SpkdError(f"{path}: cannot be loaded as an ONNX model ({first_line(error)})") from error


def _input_kind(source: str, inputs: list[Any], kind: str, described: dict[str, str]) -> tuple[str, bool, int]:
    """What the graph takes, whether its bands come before time, and how many bands there are.

    Raises:
        UsageError: it is not clear, or none that is known here.
    """
    shape, framework = inputs[0].shape, described.get("framework")
    if len(inputs) > 2 or len(shape) not in (2, 3):
        shapes = ", ".join(f"{i.name} {i.shape}" for i in inputs)
        raise UsageError(f"{source}: inputs {shapes}; expected a waveform (B, samples) or fbank (B, T, mels)")
    if "spkd_features" in described and kind == "auto":  # exported by spkd
        kind = described["spkd_features"]
    if len(shape) == 2:
        if kind not in ("auto", "waveform"):
            raise UsageError(f"onnx.input={kind}: {source} takes a waveform")
        return "waveform", False, 0
    if kind == "auto" and framework in ("wespeaker", "3d-speaker", NEMO):
        kind = framework
    if kind in ("auto", "waveform"):
        raise UsageError(
            f"{source}: takes fbank {shape}, but not whose: set teacher.onnx.input to {', '.join(FBANKS)} or {NEMO}"
        )
    first = isinstance(shape[1], int) and (not isinstance(shape[2], int) or kind == NEMO)
    mels = shape[1] if first else shape[2]
    if not isinstance(mels, int):
        first = kind == NEMO
        mels = int(described.get("feat_dim", 80))
    return kind, first, mels


def _outputs(source: str, outputs: list[Any], named: dict[str, str], described: dict[str, str]) -> dict[str, str]:
    """Names in the graph of embedding, and of frames where there are any.

    Raises:
        UsageError: a name that is not there, or several outputs that may be the embedding.
    """
    by_name = {output.name: output for output in outputs}
    for target, name in named.items():
        if target not in (EMBEDDING, FRAMES) or name not in by_name:
            raise UsageError(f"onnx.outputs: {target}: {name}; {source} has {', '.join(by_name)}")
    vectors = [o.name for o in outputs if len(o.shape) == 2 or (len(o.shape) == 3 and 1 in o.shape[1:])]
    size = described.get("output_dim")
    sized = [n for n in vectors if size is not None and str(by_name[n].shape[-1]) == size]
    likely = sized or [n for n in vectors if "emb" in n.lower()] or vectors
    found = dict(named)
    if EMBEDDING not in found:
        if len(likely) != 1:
            raise UsageError(
                f"{source}: which of {', '.join(by_name)} is the embedding? Set onnx.outputs={{embedding: NAME}}"
            )
        found[EMBEDDING] = likely[0]
    steps = [o.name for o in outputs if len(o.shape) == 3 and o.name not in vectors]
    if FRAMES not in found and len(steps) == 1:
        found[FRAMES] = steps[0]
    return found


def _timing(samples: tuple[int, ...], counts: list[int]) -> tuple[int, int] | None:
    """Hop and window (samples) that give these numbers of frames; None where there are none."""
    spread = counts[-1] - counts[0]
    for hop in range(HOP, 33 * HOP, HOP) if spread > 0 else ():
        for window in range(0, 40 * HOP + WINDOW, HOP // 2):
            timed = Target(FRAMES, 1, hop, window)
            if all(timed.num_frames(n) == count for n, count in zip(samples, counts, strict=True)):
                return hop, window
    return None


def nemo_fbank(waves: Tensor, mels: int) -> Tensor:
    """NeMo's AudioToMelSpectrogramPreprocessor (its defaults for speakers, no dither): pre-emphasis 0.97, centred
    windows of 25 ms (Hann) every 10 ms, 512 points, power, Slaney's filters, log(x + 2^-24), every band to zero mean
    and unit deviation of the sample.

    Returns:
        (B, 1 + samples // 160, mels).
    """
    waves = torch.cat([waves[:, :1], waves[:, 1:] - PREEMPHASIS * waves[:, :-1]], 1)
    window = torch.hann_window(WINDOW, periodic=False, device=waves.device)
    spectrum = torch.stft(waves, 512, HOP, WINDOW, window, True, "constant", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    bands = (slaney_filters(mels, 512).to(waves.device) @ power + 2.0**-24).log()
    variance, mean = padding.var_mean(bands, None, correction=1)
    return ((bands - mean) / (variance.sqrt() + 1e-5)).transpose(1, 2)
