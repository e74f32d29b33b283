"""How far formants move, and whether the pitch stays, by Praat's trackers on real speakers.

Speech of several speakers goes through `shift_formants`; Praat's Burg tracker finds F1 to F3 of every voiced frame
before and after, and the median of their ratios is compared with the factor. The tracker looks for five formants below
a ceiling that it needs to be told, and that belongs to the length of the vocal tract: 5,000 Hz for low voices (pitch
below 150 Hz), 5,500 for middle ones, 6,500 for high ones (above 220 Hz), times the factor for moved formants. With one
ceiling for both it finds another formant in between, and too little movement in everything. Praat's own "Change
gender", which moves formants by resampling and pitch-synchronous overlap-add, is measured in the same way: the first
formant of a voice whose harmonics are as far apart as formants cannot be tracked exactly.

    pip install praat-parselmouth
    python benchmarks/formants.py --manifest test.csv other.csv

Prints, as its last line, one JSON object; keeps it in benchmarks/results/formants.json. `worst_factor_error` is the
greatest departure of a group's median ratio from the factor, over groups of voices, factors and F1 to F3;
`worst_f0_error` that of a speaker's median ratio of pitches from 1. `--tiny` takes a synthetic voice and keeps nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import parselmouth
import record
from parselmouth.praat import call

from spkd.corpus.audio import SAMPLE_RATE, decode
from spkd.corpus.formants import VERSION, shift_formants
from spkd.corpus.manifest import Manifest
from spkd.demo.synthesis import speaker, utterance

FACTORS = (0.85, 0.92, 1.1, 1.2)
STEP = 0.01  # s, of the trackers
GROUPS = {"low": (150.0, 5000.0), "middle": (220.0, 5500.0), "high": (np.inf, 6500.0)}  # Hz: pitches below, ceiling


def sound(wave: np.ndarray) -> parselmouth.Sound:
    return parselmouth.Sound(wave.astype(np.float64), SAMPLE_RATE)


def pitch(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times (s) and pitches (Hz, 0 where there is no voice) of the frames."""
    found = sound(wave).to_pitch_ac(time_step=STEP, pitch_floor=60, pitch_ceiling=500)
    return found.xs(), found.selected_array["frequency"]


def formants(wave: np.ndarray, times: Sequence[float], ceiling: float) -> np.ndarray:
    """F1 to F3 (Hz) at these times, (3, frames)."""
    found = sound(wave).to_formant_burg(time_step=STEP, max_number_of_formants=5, maximum_formant=ceiling)
    return np.array([[found.get_value_at_time(number, at) for at in times] for number in (1, 2, 3)])


def by_praat(wave: np.ndarray, factor: float) -> np.ndarray:
    moved = call(sound(wave), "Change gender", 60, 500, factor, 0, 1, 1)
    return moved.values[0][: len(wave)].astype(np.float32)


def voices(manifests: Sequence[Path], most: int) -> dict[str, np.ndarray]:
    """The speech of up to so many speakers of each manifest, about 12 s of each."""
    found: dict[str, np.ndarray] = {}
    for path in manifests:
        speech: dict[str, list[np.ndarray]] = {}
        for one in Manifest.load(path):
            name = f"{path.parent.name}/{one.speaker}"
            if name in speech or len(speech) < most:
                pieces = speech.setdefault(name, [])
                if sum(map(len, pieces)) < 12 * SAMPLE_RATE:
                    pieces.append(decode(one.path, one.start, one.duration).wave)
        found |= {name: np.concatenate(pieces) for name, pieces in speech.items()}
    return found


def main() -> None:
    options = record.options(__doc__)
    options.add_argument("--manifest", type=Path, nargs="+", default=[], help="of real speech")
    options.add_argument("--speakers", type=int, default=24, help="of each manifest, at most")
    given = record.parse(options)
    if not given.tiny and not given.manifest:
        options.error("name a manifest of real speech (--manifest FILE), or take --tiny")
    speech = {"synthetic": utterance(speaker(0), 0, 2.0)} if given.tiny else voices(given.manifest, given.speakers)
    shifts: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {"spkd": shift_formants, "praat": by_praat}

    ratios: dict[tuple[str, str, float], list[np.ndarray]] = {}
    pitches: dict[str, list[float]] = {name: [] for name in shifts}
    counts = dict.fromkeys(GROUPS, 0)
    for wave in speech.values():
        times, before = pitch(wave)
        voiced = before > 0
        middle = float(np.median(before[voiced]))
        group, ceiling = next((name, ceiling) for name, (below, ceiling) in GROUPS.items() if middle < below)
        counts[group] += 1
        base = formants(wave, times[voiced], ceiling)
        for name, shift in shifts.items():
            for factor in FACTORS:
                moved = shift(wave, factor)
                found = formants(moved, times[voiced], min(ceiling * factor, SAMPLE_RATE / 2 - 100)) / base
                ratios.setdefault((name, group, factor), []).append(found[:, np.isfinite(found).all(0)])
                after = pitch(moved)[1][: len(before)]
                both = (before[: len(after)] > 0) & (after > 0)
                pitches[name].append(float(np.median(after[both] / before[: len(after)][both])))
    worst: dict[str, dict[str, float]] = {name: {} for name in shifts}
    print(f"{'':6}{'voices':>12}{'factor':>8}{'F1':>8}{'F2':>8}{'F3':>8}")
    for (name, group, factor), some in sorted(ratios.items()):
        medians = np.median(np.concatenate(some, 1), 1)
        print(f"{name:6}{counts[group]:>5} {group:>6}{factor:>8.2f}" + "".join(f"{ratio:>8.3f}" for ratio in medians))
        error = float(np.abs(medians / factor - 1).max())
        worst[name][group] = max(worst[name].get(group, 0.0), error)
    wave = np.concatenate(list(speech.values()))[: 60 * SAMPLE_RATE]
    start = time.process_time()
    shift_formants(wave, 0.9)
    speed = len(wave) / SAMPLE_RATE / (time.process_time() - start)
    result = {
        "version": VERSION,
        "speakers": counts,
        "worst_factor_error": round(max(worst["spkd"].values()), 4),
        "worst_f0_error": round(max(abs(ratio - 1) for ratio in pitches["spkd"]), 4),
        "factor_errors": {name: {k: round(v, 4) for k, v in some.items()} for name, some in worst.items()},
        "praat_worst_f0_error": round(max(abs(ratio - 1) for ratio in pitches["praat"]), 4),
        "audio_hours_per_core_hour": round(speed),
    }
    record.keep("formants", result, given.tiny)


if __name__ == "__main__":
    main()
