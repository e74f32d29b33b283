"""Kaldi's energy-based VAD (compute-vad), with the settings of its VoxCeleb recipes (egs/voxceleb/v1 and v2).

The log energy of each frame of 25 ms every 10 ms is that of Kaldi's MFCC (`--use-energy`, `--raw-energy`,
`--snip-edges=false`), without dither, so that the same audio always gives the same frames: the squares of its samples
at 16-bit scale, less their mean, summed, and the logarithm of at least the float32 epsilon. A frame is loud above 5.5
plus 0.5 of the mean of the utterance's log energies. It is speech where at least 0.12 of the frames up to 2 away from
it are loud. Frame t is the 10 ms that begin at 10 t ms, around which its window lies.
"""

from __future__ import annotations

import numpy as np

from spkd.corpus.vad.base import Detector, Stretches, VADCard

VERSION = "1"  # of this module's formula
THRESHOLD, MEAN_SCALE, CONTEXT, PROPORTION = 5.5, 0.5, 2, 0.12
WINDOW, HOP = 400, 160  # samples
SCALE = 32768.0
FLOOR = float(np.finfo(np.float32).eps)
AT_ONCE = 1 << 12  # frames whose energies are computed together


class Energy(Detector):
    """Detector by the energy of frames."""

    finds_speech = False

    def __init__(self) -> None:
        parameters = {
            "vad_energy_threshold": THRESHOLD,
            "vad_energy_mean_scale": MEAN_SCALE,
            "vad_frames_context": float(CONTEXT),
            "vad_proportion_threshold": PROPORTION,
        }
        self.card = VADCard("energy", VERSION, "", parameters)

    def detect(self, wave: np.ndarray) -> Stretches:
        energies = log_energies(wave)
        if not len(energies):
            return []
        edges = np.flatnonzero(np.diff(np.concatenate([[False], voiced(energies), [False]])))
        ends = np.append(np.arange(1, len(energies)) * HOP, len(wave))  # the last frame takes what is left
        pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        return [(first * HOP, int(ends[last - 1])) for first, last in pairs]


def log_energies(wave: np.ndarray) -> np.ndarray:
    """Logarithms of the energies of frames, (frames,), float64.

    Args:
        wave: (samples,).
    """
    count = (len(wave) + HOP // 2) // HOP
    if not count:
        return np.empty(0)
    # Frame t is around the middle of its hop; beyond the ends, the waveform is mirrored.
    before = (WINDOW - HOP) // 2
    after = max((count - 1) * HOP + WINDOW - before - len(wave), 0)
    padded = np.pad(wave, (before, after), "symmetric")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:count]
    variances = [frames[at : at + AT_ONCE].astype(np.float64).var(1) for at in range(0, count, AT_ONCE)]
    return np.log(np.maximum(WINDOW * SCALE**2 * np.concatenate(variances), FLOOR))


def voiced(energies: np.ndarray) -> np.ndarray:
    """Whether each frame is speech.

    Args:
        energies: (frames,) log energies.
    """
    loud = energies > THRESHOLD + MEAN_SCALE * energies.mean()
    around = np.convolve(np.ones(len(loud)), np.ones(2 * CONTEXT + 1))[CONTEXT:-CONTEXT]
    count = np.convolve(loud.astype(float), np.ones(2 * CONTEXT + 1))[CONTEXT:-CONTEXT]
    return count >= PROPORTION * around
