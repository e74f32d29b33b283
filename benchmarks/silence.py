"""What silence around utterances costs, and what leaving it out brings back: EER of the GE2E d-vector on test-short.

Each utterance stands between 2 s before and 2 s after it, and over all of it lies a stretch of a recorded noise, drawn
by a seed, at some ratio to the utterance's own power. `spkd eval` scores the same trials with each `vad`; `segments`
are where the utterances stand, which nobody knows in practice. Utterances in which silero finds no speech as they were
recorded are left out of all, so that none has easier trials. Also the hours of this audio that one core decodes, and
in which it finds speech, in an hour (CPU time, decoding included).

    python benchmarks/silence.py --data DIR --teacher FILE

Prints the table of docs/results.md and, as its last line, one JSON object; keeps it in benchmarks/results/silence.json.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import record
import soundfile
import torch
from workspace import must

from spkd.corpus.audio import SAMPLE_RATE, decode
from spkd.corpus.manifest import Manifest, Utterance, measure
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.find import speech_alone

PADDING = 2.0  # s
RATIOS = (None, 60.0, 30.0, 20.0, 10.0)  # dB of the utterance over the noise; None: the utterances as they are
SEGMENTS = "segments"
VADS = ("none", "energy", "silero", SEGMENTS)


def surrounded(wave: np.ndarray, noise: np.ndarray, ratio: float, random: np.random.RandomState) -> np.ndarray:
    """An utterance (samples,) between two pauses, under a stretch of noise.

    Args:
        noise: (samples,) a recorded noise, which is repeated where it is too short.
        ratio: power of the utterance over that of the noise (dB).
    """
    pause = np.zeros(round(PADDING * SAMPLE_RATE), np.float32)
    padded = np.concatenate([pause, wave, pause])
    begin = random.randint(len(noise))
    stretch = np.resize(np.roll(noise, -begin), len(padded))
    power, of_noise = float(np.mean(wave**2)), float(np.mean(stretch**2))
    mixed = padded + stretch * np.sqrt(power / of_noise / 10 ** (ratio / 10))
    return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


def make(folder: Path, utterances: list[Utterance], noises: list[np.ndarray], ratio: float, seed: int) -> None:
    """Write manifest.csv, the audio of the surrounded utterances, and segments."""
    random, made, lines = np.random.RandomState(seed), list[Utterance](), list[str]()
    (folder / "audio").mkdir(parents=True)
    for number, one in enumerate(utterances):
        wave = decode(one.path, one.start, one.duration, one.channel).wave
        path = folder / "audio" / f"{number}.wav"
        mixed = surrounded(wave, noises[random.randint(len(noises))], ratio, random)
        soundfile.write(path, mixed, SAMPLE_RATE, subtype="FLOAT")
        made.append(Utterance(one.id, str(path), one.speaker, len(mixed) / SAMPLE_RATE))
        lines.append(f"{one.id} {PADDING} {PADDING + len(wave) / SAMPLE_RATE}\n")
    Manifest(tuple(made)).save(folder / "manifest.csv")
    (folder / SEGMENTS).write_text("".join(lines))


def evaluated(trials: Path, manifest: Path, teacher: Path, vad: str) -> dict[str, float]:
    """EER (%) of the teacher, and how many utterances have no speech."""
    name = str(manifest.parent / SEGMENTS) if vad == SEGMENTS else vad
    keys = (
        "model=dvector",
        f"model.weights={teacher}",
        f"manifest={manifest}",
        f"vad={name}",
        "out=eval",
        "device=cpu",
    )
    must("eval", str(trials), *keys, "bootstrap=0", "worst=0")
    report = json.loads(Path("eval/report.json").read_text())
    return {"eer_percent": report["results"]["eer_percent"], "rejected": len(report["rejected"])}


def speeds(manifest: Manifest) -> dict[str, int]:
    """Hours of audio in an hour of one core: decoded alone, and with speech found."""
    manifest, found = measure(manifest)[0], {}
    for name in ("decoding", "energy", "silero"):
        finder = None if name == "decoding" else finder_of(name)
        start = time.process_time()
        if finder is None:
            for one in manifest:
                decode(one.path, one.start, one.duration, one.channel)
        else:
            speech_alone(manifest, finder, workers=1)
        found[name] = round(manifest.seconds / (time.process_time() - start))
    return found


def table(result: dict) -> str:
    """Of docs/results.md: EER (%) for each way to find speech, and each level of noise."""
    rows, lines = result["rows"], []
    vads = list(dict.fromkeys(row["vad"] for row in rows))
    lines = [
        f"| `vad` | {' | '.join(heading(ratio) for ratio in result['ratios'])} |",
        "|---" * (1 + len(result["ratios"])) + "|",
    ]
    for vad in vads:
        cells = [
            cell(next((r for r in rows if (r["vad"], r["ratio"]) == (vad, ratio)), None)) for ratio in result["ratios"]
        ]
        lines.append(f"| {'where the utterances stand' if vad == SEGMENTS else f'`{vad}`'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(ratio: float | None) -> str:
    return "as recorded" if ratio is None else f"2 s around, {ratio:g} dB"


def cell(row: dict | None) -> str:
    """Mean and standard deviation, and the utterances without speech where there are any."""
    if row is None:
        return ""
    deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
    rejected = f" ({row['rejected']:g} of {row['utterances']} without speech)" if row["rejected"] else ""
    return f"{row['eer_percent']:.2f}{deviation}{rejected}"


def main() -> None:
    options = record.options(__doc__, "silence", data=True)
    options.add_argument("--seeds", type=int, default=3, help="of the noise")
    given = record.parse(options, seeds=1)
    corpus, ratios = given.data / "librispeech-mini", RATIOS[:3] if given.tiny else RATIOS
    spoken, silent = speech_alone(measure(Manifest.load(corpus / "test-short.csv"))[0], finder_of("silero"))
    utterances = [replace(one, duration=one.whole, speech=None) for one in spoken]
    noises = [decode(str(path)).wave for path in sorted((given.data / "noise" / "noise").iterdir())]
    given.work.mkdir(parents=True, exist_ok=True)
    os.chdir(given.work)
    torch.set_num_threads(1)
    Manifest(tuple(utterances)).save(given.work / "recorded.csv")
    lines = (corpus / "trials-test-short.txt").read_text().splitlines(keepends=True)
    trials = given.work / "trials.txt"
    trials.write_text("".join(line for line in lines if not set(line.split()) & set(silent)))
    rows = []
    for ratio in ratios:
        made = [given.work / "recorded.csv"]
        if ratio is not None:
            made = []
            for seed in range(given.seeds):
                folder = given.work / f"{ratio:g}-{seed}"
                if not (folder / SEGMENTS).is_file():
                    make(folder, utterances, noises, ratio, seed)
                made.append(folder / "manifest.csv")
        for vad in VADS if ratio is not None else VADS[:-1]:
            found = [evaluated(trials, path, given.teacher, vad) for path in made]
            rates = [one["eer_percent"] for one in found]
            row = {
                "ratio": ratio,
                "vad": vad,
                "eer_percent": round(float(np.mean(rates)), 3),
                "deviation": round(float(np.std(rates, ddof=1)), 3) if len(rates) > 1 else None,
                "rejected": round(float(np.mean([one["rejected"] for one in found])), 1),
                "utterances": len(utterances),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    speed = speeds(Manifest.load(given.work / f"{ratios[1]:g}-0" / "manifest.csv"))
    result = {
        "rows": rows,
        "ratios": ratios,
        "seeds": given.seeds,
        "left_out": sorted(silent),
        "audio_hours_per_core_hour": speed,
    }
    print(table(result))
    record.keep("silence", result, given.tiny)


if __name__ == "__main__":
    main()
