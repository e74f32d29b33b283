"""Quality of a recording: whether it holds enough sound, speech at all, and not mostly silence.

Speech differs from steady noise, hum and tones in two ways. It is voiced: the vocal folds repeat their pulse 60 to 400
times a second. And its level moves with the syllables. A frame is voiced where the normalised cross-correlation of a
window with the signal l samples later,

    r(l) = sum_i x[i] x[i + l] / sqrt(sum_i x[i]^2 sum_i x[i + l]^2),

has a local maximum above 0.7 at a lag l of 60 to 400 Hz (D. Talkin, "A robust algorithm for pitch tracking (RAPT)", in
Speech Coding and Synthesis, 1995, with a threshold of our own). Low-pass noise has large r at short lags, and no
maximum. benchmarks/quality.py shows how often the rule is wrong. `spkd/export/page/speaker.js` has the same rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spkd.corpus.audio import CLIPPED, SAMPLE_RATE

FRAME = 320  # samples (20 ms) of a frame whose level is measured, and from one window to the next
LEAST_LEVEL = -55.0  # dB of full scale: a quieter frame holds no speech
LEAST_SECONDS = 0.5  # s of louder frames that a decision needs
SILENCE = ((-90.0, 0.1), (-55.0, 0.8))  # level (dB of full scale), and share of quieter frames that is remarked on
DECIMATION = 4  # samples whose mean is one sample at 4 kHz, in which voicing is looked for
WINDOW = 160  # samples at 4 kHz (40 ms)
SHORTEST, LONGEST = 10, 65  # lags at 4 kHz: 400 and 62 Hz
VOICED = 0.7  # correlation of a voiced frame
FAINT = -65.0  # dB of full scale: quieter windows, after the mean over DECIMATION samples, are left out
LEAST_VOICED = 3  # windows that have to be voiced
VOICED_SHARE = 0.02  # share of the windows that are not faint which has to be voiced
VARIATION = 3.0  # dB: least standard deviation of the level of the windows that are not faint
MUCH_VOICED, LESS_VARIATION = 0.2, 1.3  # share of voiced windows with which that many dB suffice
WAY = ", or take a calibration with vad=energy"  # to leave silence out
AT_ONCE = 1 << 12  # windows that are correlated together


@dataclass(frozen=True)
class Remark:
    """A problem of a recording.

    Attributes:
        text: what it is, as a phrase.
        is_minor: whether a decision is made in spite of it.
    """

    text: str
    is_minor: bool = False


@dataclass(frozen=True)
class Voicing:
    """What a recording has of speech.

    Attributes:
        windows: number of windows that are not faint.
        voiced: number of these that are voiced.
        variation: standard deviation of their level (dB).
    """

    windows: int
    voiced: int
    variation: float

    @property
    def needed(self) -> float:
        """Least number of voiced windows of speech."""
        return max(LEAST_VOICED, VOICED_SHARE * self.windows)

    @property
    def varying(self) -> float:
        """Least variation of the level of speech (dB). Speech without pauses varies less, and is voiced for longer."""
        return LESS_VARIATION if self.voiced > MUCH_VOICED * self.windows else VARIATION

    @property
    def is_speech(self) -> bool:
        return self.voiced >= self.needed and self.variation >= self.varying


def remarks_on(wave: np.ndarray, samples: str, has_speech: bool = False) -> list[Remark]:
    """Problems of a recording.

    Args:
        wave: (samples,), 16 kHz.
        samples: what makes speech unlikely in its samples, as `spkd.corpus.audio.remark_on` gives it.
        has_speech: whether a detector of speech chose the waveform; then speech and silence are not looked for.
    """
    found = [Remark(f"its samples {samples}", samples.startswith(CLIPPED))] if samples else []
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    # Limited to 1e-10 of full scale, which is less than any recorder can write.
    level = 20 * np.log10(np.maximum(frames.std(1, dtype=np.float64), 1e-10))
    seconds = float((level >= LEAST_LEVEL).sum()) * FRAME / SAMPLE_RATE
    if seconds < LEAST_SECONDS:
        text = f"only {seconds:.2f} s are louder than {LEAST_LEVEL:g} dB of full scale"
        found.append(Remark(f"{text}; a decision needs {LEAST_SECONDS:g} s"))
    if has_speech or not all(remark.is_minor for remark in found):
        return found
    if not (voicing := voicing_of(wave)).is_speech:
        voiced, needed = (count * FRAME / SAMPLE_RATE for count in (voicing.voiced, voicing.needed))
        text = f"{voiced:.2f} s are voiced, and the level varies by {voicing.variation:.1f} dB"
        found.append(Remark(f"no speech found ({text}; speech has at least {needed:.2f} s and {voicing.varying:g} dB)"))
        return found
    for limit, most in SILENCE:
        share = float((level < limit).sum()) / len(level)
        if share > most:
            text = f"{math.floor(100 * share)} % of it is silence below {limit:g} dB of full scale"
            found.append(Remark(f"{text}, with which one speaker can score like two; cut it off{WAY}", True))
            break
    return found


def voicing_of(wave: np.ndarray) -> Voicing:
    """What a waveform (samples,) at 16 kHz has of speech."""
    slow = wave[: len(wave) // DECIMATION * DECIMATION].reshape(-1, DECIMATION).mean(1, dtype=np.float64)
    span = WINDOW + LONGEST + 1
    if len(slow) < span:
        return Voicing(0, 0, 0.0)
    windows = np.lib.stride_tricks.sliding_window_view(slow, span)[:: FRAME // DECIMATION]
    parts = [_correlated(windows[at : at + AT_ONCE]) for at in range(0, len(windows), AT_ONCE)]
    level, correlation = (np.concatenate(each) for each in zip(*parts, strict=True))
    loud = level > FAINT
    if not loud.any():
        return Voicing(0, 0, 0.0)
    return Voicing(int(loud.sum()), int((correlation[loud] > VOICED).sum()), float(level[loud].std()))


def _correlated(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level (dB of full scale) of each window, and its correlation at the highest local maximum; 0 without one.

    Args:
        windows: (N, WINDOW + LONGEST + 1) at 4 kHz.
    """
    centred = windows - windows.mean(1, keepdims=True)
    first = centred[:, :WINDOW]
    sums = np.concatenate([np.zeros((len(centred), 1)), np.cumsum(centred**2, 1)], 1)
    power = sums[:, WINDOW]
    values = np.empty((LONGEST - SHORTEST + 3, len(centred)))
    for row, lag in enumerate(range(SHORTEST - 1, LONGEST + 2)):
        energies = power * (sums[:, lag + WINDOW] - sums[:, lag])
        values[row] = (first * centred[:, lag : lag + WINDOW]).sum(1) / np.sqrt(np.maximum(energies, 1e-30))
    middle = values[1:-1]
    is_peak = (middle > values[:-2]) & (middle >= values[2:])
    level = 10 * np.log10(np.maximum(power / WINDOW, 1e-20))
    return level, np.where(is_peak, middle, 0.0).max(0)
