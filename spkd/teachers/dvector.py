"""GE2E d-vector (Wan et al., ICASSP 2018, arXiv 1710.10467), pretrained in the package Resemblyzer (Apache-2.0).

LSTM 40 -> 3 x 256, linear 256 -> 256, ReLU, L2 norm, on 1.6 s windows every 0.8 s.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest
from spkd.networks import padding
from spkd.networks.network import statistics
from spkd.outputs.features import in_float32, slaney_filters
from spkd.outputs.target import EMBEDDING, Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.students import read_weights
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig

MELS = 40
FFT, HOP = 400, 160  # samples: 25 ms, 10 ms
WINDOW_FRAMES, WINDOW_HOP = 160, 80  # frames of 10 ms: 1.6 s every 0.8 s
HIDDEN, LAYERS = 256, 3
STATS = "stats"
LOUDNESS = -30.0  # level (dBFS) to which quieter views are raised


class DVector(Teacher):
    """GE2E d-vector.

    Targets: `embedding` (256), `windows` (256, the embedding of each window), `frames.layer1..3` (256, 100 Hz), `stats`
    (512, mean and standard deviation of the last layer's frames over time).

    For `embedding` and `windows` the LSTM runs on every window from its initial state, as in the original; for the
    frames and their statistics it runs once over the whole view.

    Windows overlap by half, as in the paper. `embed_utterance` of Resemblyzer, whose weights these are, gives other
    embeddings: it takes 1.3 windows a second (every 77 frames), pads the last one with zeros where the audio covers
    three quarters of it, and a recording shorter than a window; and `preprocess_wav` cuts long silences out. Here a
    part of a window at the end is left out, and a shorter view is one shorter window.
    """

    family = "dvector"
    takes_lengths = True

    def __init__(self, weights: str | None, device: torch.device) -> None:
        tensors, source = _weights(weights)
        self.device = device
        self._lstm = nn.LSTM(MELS, HIDDEN, LAYERS, batch_first=True).to(device).eval()
        self._linear = nn.Linear(HIDDEN, HIDDEN).to(device).eval()
        try:
            self._lstm.load_state_dict(
                {k.removeprefix("lstm."): v for k, v in tensors.items() if k.startswith("lstm.")}
            )
            self._linear.load_state_dict({k: tensors[f"linear.{k}"] for k in ("weight", "bias")})
        except (RuntimeError, KeyError) as error:
            raise SpkdError(f"{source}: not the weights of the GE2E d-vector ({first_line(error)})") from error
        self._digest = digest.of_tensors({k: v for k, v in tensors.items() if k.startswith(("lstm.", "linear."))})
        # A window of frames extends from the centre of its first frame to that of its last.
        windows = Target("windows", HIDDEN, WINDOW_HOP * HOP, (WINDOW_FRAMES - 1) * HOP)
        frames = [Target(f"frames.layer{i}", HIDDEN, HOP, 0) for i in range(1, LAYERS + 1)]
        vectors = (Target(EMBEDDING, HIDDEN), Target(STATS, 2 * HIDDEN))
        self.targets = {t.name: t for t in (*vectors, windows, *frames)}
        self.num_parameters = sum(p.numel() for module in (self._lstm, self._linear) for p in module.parameters())

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> DVector:
        return cls(config.weights, device)

    def card(self) -> TeacherCard:
        return TeacherCard(
            family=self.family,
            weights_sha256=self._digest,
            licence="Apache-2.0",
            source="Resemblyzer 0.1.4 (its weights; windows, ends and silences are not those of its embed_utterance)",
            cite="Wan et al., Generalized end-to-end loss for speaker verification, ICASSP 2018, arXiv 1710.10467",
            preprocessing="raised to -30 dBFS; 40 Slaney mel bands of power, 25/10 ms, centred; "
            "1.6 s windows every 0.8 s",
        )

    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        mel = linear_mel(raise_loudness(waves, lengths), lengths)
        counts = None if lengths is None else 1 + lengths // HOP
        outputs: dict[str, Tensor] = {}
        if {EMBEDDING, "windows"} & set(names):
            outputs["windows"] = windows = self._windows(mel, counts)
            of_view = None if counts is None else _window_count(counts)
            outputs[EMBEDDING] = normalize(padding.mean(windows.transpose(1, 2), of_view)[..., 0], dim=-1)
        layers = [int(name.removeprefix("frames.layer")) for name in names if name.startswith("frames.")]
        if STATS in names:
            layers.append(LAYERS)
        hidden = mel
        for layer in range(1, max(layers, default=0) + 1):
            hidden = self._layer(layer, hidden)
            outputs[f"frames.layer{layer}"] = hidden
        if STATS in names:
            outputs[STATS] = statistics(hidden.transpose(1, 2), counts)
        return outputs

    def _windows(self, mel: Tensor, counts: Tensor | None) -> Tensor:
        """Embeddings (B, windows, 256) of the full windows; a view shorter than a window is one window.

        Args:
            mel: (B, T, 40).
            counts: (B,) number of valid frames of each view; None: all are valid.
        """
        if mel.shape[1] < WINDOW_FRAMES:
            windows = mel[:, None]
        else:
            windows = mel.unfold(1, WINDOW_FRAMES, WINDOW_HOP).transpose(2, 3)
        if counts is None:
            hidden, _ = self._lstm(windows.flatten(0, 1))
            return self._projected(hidden[:, -1].contiguous()).unflatten(0, windows.shape[:2])
        view, window = torch.nonzero(
            torch.arange(windows.shape[1], device=mel.device) < _window_count(counts)[:, None]
        ).T
        hidden, _ = self._lstm(windows[view, window])
        last = hidden[torch.arange(len(view)), counts[view].clamp_max(windows.shape[2]) - 1]
        out = mel.new_zeros(*windows.shape[:2], HIDDEN)
        out[view, window] = self._projected(last)
        return out

    def _projected(self, last: Tensor) -> Tensor:
        """Embeddings (N, 256) from the outputs (N, 256) of the LSTM at the end of windows."""
        return normalize(torch.relu(self._linear(last)), dim=-1)

    def _layer(self, layer: int, inputs: Tensor) -> Tensor:
        """Output (B, T, 256) of one LSTM layer."""
        parameters = [
            getattr(self._lstm, f"{kind}_l{layer - 1}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        zeros = inputs.new_zeros(1, len(inputs), HIDDEN)
        return torch.lstm(inputs, (zeros, zeros), parameters, True, 1, 0.0, False, False, True)[0]


def _window_count(frames: Tensor) -> Tensor:
    """Number (B,) of windows of views with `frames` (B,) frames."""
    return ((frames - WINDOW_FRAMES) // WINDOW_HOP + 1).clamp_min(1)


def raise_loudness(waves: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Waveforms (B, samples) scaled up to a mean power of -30 dBFS; louder ones are unchanged."""
    power = padding.mean(waves.square(), lengths)
    gain = 10.0 ** (LOUDNESS / 20.0) / power.clamp_min(1e-20).sqrt()
    return waves * gain.clamp_min(1.0)


@in_float32
def linear_mel(waves: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mel bands of power, without a logarithm: (B, samples) -> (B, 1 + samples // 160, 40).

    They are those of librosa's defaults when the network was trained: Slaney's scale and area normalisation, edges
    padded by reflection (librosa pads with zeros since 0.10).
    """
    window = torch.hann_window(FFT, device=waves.device)
    waves = padding.reflect(waves[:, None], FFT // 2, lengths)[:, 0]
    spectrum = torch.stft(waves, FFT, HOP, window=window, center=False, return_complex=True)
    return (slaney_filters(MELS, FFT, device=waves.device) @ spectrum.abs().square()).transpose(1, 2)


def _weights(weights: str | None) -> tuple[dict[str, Tensor], str]:
    """Tensors and their source: a file, or the file in the installed resemblyzer package, which is not imported."""
    if weights is None:
        package = importlib.util.find_spec("resemblyzer")
        if package is None or not package.submodule_search_locations:
            raise UsageError(
                "dvector needs its weights: `pip install --no-deps resemblyzer`, or their file (teacher.weights=FILE, "
                "model.weights=FILE; in Python weights=FILE)"
            )
        weights = str(Path(next(iter(package.submodule_search_locations))) / "pretrained.pt")
    return read_weights(weights), weights
