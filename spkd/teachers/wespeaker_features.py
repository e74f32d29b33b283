"""Front ends of WeSpeaker other than fbank: the log-mel energies of Whisper."""

from __future__ import annotations

import torch
from torch import Tensor

from spkd.networks import padding
from spkd.outputs.features import HOP, WINDOW, in_float32, slaney_filters
from spkd.outputs.target import Target
from spkd.teachers.toolkit import FrontEnd


@in_float32
def whisper_mel(waves: Tensor, lengths: Tensor | None, mels: int) -> Tensor:
    """Log-mel energies of openai/whisper (`log_mel_spectrogram`): (B, samples) -> (B, samples // 160, mels).

    Hann windows of 25 ms around every 10 ms, mirrored at the edges; Slaney's filters; logarithms at most 8 decades
    below the largest of the view.

    Args:
        waves: (B, samples), at 16 kHz.
        lengths: (B,) samples of each waveform, where shorter ones are padded; None where all have the full length.
    """
    waves = padding.reflect(waves.float()[:, None], WINDOW // 2, lengths)[:, 0]
    window = torch.hann_window(WINDOW, device=waves.device)
    spectra = torch.stft(waves, WINDOW, HOP, window=window, center=False, return_complex=True)[..., :-1]
    energies = slaney_filters(mels, WINDOW, device=waves.device) @ spectra.abs().square()
    logarithms = energies.clamp_min(1e-10).log10()
    counts = None if lengths is None else lengths // HOP
    inside = logarithms if counts is None else logarithms.masked_fill(~padding.valid(logarithms, counts), -torch.inf)
    logarithms = logarithms.maximum(inside.amax((1, 2), keepdim=True) - 8)
    return ((logarithms + 4) / 4).transpose(1, 2)


def whisper_front_end(mels: int) -> FrontEnd:
    """Front end of Whisper; frame i is centred on sample 160 i."""
    frames = Target("fbank.whisper", mels, HOP, HOP, centre=0)
    words = f"{mels}-mel log energies of Whisper, 25/10 ms"
    return FrontEnd(frames, lambda waves, lengths: whisper_mel(waves, lengths, mels), words)
