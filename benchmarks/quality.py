"""How often spkd takes speech for none, and sound without speech for speech (`spkd.corpus.quality`).

Speech as it is, and under a stretch of noise at 10 and 5 dB, drawn by a seed; sound without speech in pieces of 4 s:
recorded noises, and noise of several colours, hum, tones and clicks that are synthesised. The limits were chosen on the
training lists and on three of the recorded noises (boiler, sb_noise1, sb_noise3). The figures of the test lists and the
other noises were seen under one earlier rule, which was then widened for the synthetic voices of the demo, and for
nothing else. Babble is speech, and is left out. Recordings without half a second above -55 dB of full scale, which get
no decision in any case, are left out.

    python benchmarks/quality.py --data DIR

Prints the table of docs/export.md and, as its last line, one JSON object; keeps it in benchmarks/results/quality.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import record

from spkd.corpus.audio import SAMPLE_RATE, decode, remark_on
from spkd.corpus.augment import mix
from spkd.corpus.manifest import Manifest
from spkd.corpus.quality import remarks_on, voicing_of

PIECE = 4 * SAMPLE_RATE  # samples of sound without speech
RATIOS = (None, 10.0, 5.0)  # dB of the speech over the noise; None: as recorded
CHOSEN_ON = {"asc_boiler", "sb_noise1", "sb_noise3"}
TRAINING = ("librispeech-mini", "speechocean-mini", "arabic-commands-mini", "unlabelled-mini")
LISTS = {
    "chosen on": tuple(f"{corpus}/train" for corpus in TRAINING),
    "test": ("librispeech-mini/test-other", "librispeech-mini/test-short", "speechocean-mini/test"),
}


def synthesised() -> Iterator[tuple[str, np.ndarray]]:
    """Kind and waveform (PIECE,) of sound without speech, at -50 and -20 dB of full scale."""
    t = np.arange(PIECE) / SAMPLE_RATE
    for seed, level in ((0, -50.0), (1, -20.0)):
        random = np.random.RandomState(seed)
        spectrum, bins = np.fft.rfft(random.standard_normal(PIECE)), np.maximum(np.arange(PIECE // 2 + 1), 1.0)
        noise = 0.05 * random.standard_normal(PIECE)
        kinds = {
            f"noise of spectrum 1/f^{slope:g}": [np.fft.irfft(spectrum / bins ** (slope / 2))] for slope in (0, 1, 2)
        }
        kinds["mains hum"] = [
            sum(np.sin(2 * np.pi * k * f * t + k + seed) / k for k in (1, 2, 3, 5)) + noise for f in (50, 60)
        ]
        kinds["tones"] = [np.sin(2 * np.pi * f * t + seed) for f in (100, 140, 220, 440, 1000, 3000)]
        kinds["clicks"] = [(np.arange(PIECE) % (SAMPLE_RATE // rate) == 0).astype(float) for rate in (2, 4, 10)]
        for kind, waves in kinds.items():
            for wave in waves:
                yield kind, (wave / wave.std() * 10 ** (level / 20)).astype(np.float32)


def decides(wave: np.ndarray) -> bool:
    """Whether a decision is made on a recording: no remark on it is a major one."""
    return all(remark.is_minor for remark in remarks_on(wave, remark_on(wave, wave[:, None])))


def refused(waves: list[np.ndarray], noises: list[np.ndarray], ratio: float | None) -> tuple[int, int]:
    """Recordings of speech on which no decision is made, and all.

    Args:
        noises: those that are laid over the speech, (samples,) each.
        ratio: of the powers of speech and noise (dB); None: the speech alone.
    """
    random, decisions = np.random.RandomState(0), []
    for wave in waves:
        if ratio is not None:
            noise = noises[random.randint(len(noises))]
            wave = mix(wave, np.resize(np.roll(noise, -random.randint(len(noise))), len(wave)), ratio)
        decisions.append(decides(wave))
    return decisions.count(False), len(decisions)


def accepted(pieces: list[np.ndarray]) -> tuple[int, int]:
    """Pieces of sound without speech on which a decision is made, and all."""
    decisions = [decides(piece) for piece in pieces]
    return decisions.count(True), len(decisions)


def table(result: dict) -> str:
    """Of docs/export.md."""
    lines = [
        "| speech that gets no decision | as recorded | 10 dB over noise | 5 dB over noise |",
        "|---|---|---|---|",
    ]
    for row in result["speech"]:
        cells = (f"{refused} of {count:,} ({100 * refused / max(count, 1):.2f} %)" for refused, count in row["refused"])
        lines.append(f"| {row['list']}{', chosen on' if row['part'] == 'chosen on' else ''} | {' | '.join(cells)} |")
    lines += ["", "| sound without speech that gets a decision | pieces of 4 s |", "|---|---|"]
    for row in result["other"]:
        name = f"{row['kind']}{', chosen on' if row['part'] == 'chosen on' else ''}"
        lines.append(f"| {name} | {row['accepted'][0]} of {row['accepted'][1]} |")
    return "\n".join(lines)


def part_of(path: Path) -> str:
    """Whether the limits were chosen on a noise."""
    return "chosen on" if path.stem in CHOSEN_ON else "test"


def main() -> None:
    given = record.parse(record.options(__doc__, "quality", data=True, teacher=False))
    files = {path: decode(str(path)).wave for path in sorted((given.data / "noise" / "noise").iterdir())}
    parts: dict[str, list[np.ndarray]] = {part: [] for part in LISTS}
    for path, noise in files.items():
        parts[part_of(path)].append(noise)
    speech, other, milliseconds, seconds = [], list[dict](), 0.0, 0.0
    for part, lists in LISTS.items():
        noises = parts[part] or list(files.values())
        for name in lists:
            manifest = Manifest.load(given.data / f"{name}.csv")
            waves = [decode(one.path, one.start, one.duration, one.channel).wave for one in manifest]
            counts = [refused(waves, noises, ratio) for ratio in RATIOS]
            speech.append({"list": name, "part": part, "refused": counts})
            start = time.process_time()
            for wave in waves:
                voicing_of(wave)
            milliseconds += 1000 * (time.process_time() - start)
            seconds += sum(map(len, waves)) / SAMPLE_RATE
            print(speech[-1], flush=True)
    for path, noise in files.items():
        pieces = [noise[at : at + PIECE] for at in range(0, max(len(noise) - PIECE // 2, 1), PIECE)]
        other.append({"kind": path.stem, "part": part_of(path), "accepted": accepted(pieces)})
    made = list(synthesised())
    for kind in dict.fromkeys(kind for kind, _ in made):
        found = accepted([wave for each, wave in made if each == kind])
        other.append({"kind": kind, "part": "synthesised", "accepted": found})
    result = {"speech": speech, "other": other, "ms_per_second": round(milliseconds / seconds, 2)}
    print(table(result))
    record.keep("quality", result, given.tiny)


if __name__ == "__main__":
    main()
