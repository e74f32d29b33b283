"""Memory of scoring a long trial list: 1 million trials over 200,000 utterances.

The utterances are stretches of 0.1 s of one synthetic recording, so that the time goes into numbers, not into audio;
the student is small and untrained. The real `spkd eval` runs in a process of its own, and once more over ten
utterances for what the libraries take.

    python benchmarks/eval_scale.py

Prints, as its last line, one JSON object; keeps it in benchmarks/results/eval_scale.json. `beyond_embeddings_mb` is the
peak less the libraries and the embeddings themselves.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import record
import soundfile
import torch

from spkd.demo.synthesis import speaker, utterance
from spkd.students import Checkpoint, build, save_student

HERE = Path(__file__).parent
EMBEDDING = 192
RUN = """
import sys
from pathlib import Path
from spkd.cli import main

sys.argv = ["spkd", *sys.argv[1:]]
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if "VmHWM" in line))
"""


def peak_mb(work: Path, utterances: int, trials: int) -> tuple[float, float]:
    """Peak memory of scoring random trials over so many utterances, and its seconds."""
    lines = [f"u{i},long.wav,s{i % 1000},0.1,{0.1 * (i % 590):.1f}\n" for i in range(utterances)]
    (work / "m.csv").write_text("utt,path,speaker,duration,start\n" + "".join(lines))
    pairs = np.random.RandomState(0).randint(0, utterances, (trials, 2)).tolist()
    (work / "t.txt").write_text("".join(f"{int(n % 10 == 0)} u{a} u{b}\n" for n, (a, b) in enumerate(pairs)))
    command = ["eval", "t.txt", "model=student", "manifest=m.csv", "min_seconds=0.05", "batch_size=128"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *command], cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1]) / 1024, time.perf_counter() - start


def main() -> None:
    options = record.options(__doc__, "eval_scale")
    options.add_argument("--utterances", type=int, default=200_000)
    options.add_argument("--trials", type=int, default=1_000_000)
    given = record.parse(options, utterances=50, trials=200)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    soundfile.write(given.work / "long.wav", utterance(speaker(0), 0, 60.0), 16_000)
    torch.manual_seed(0)
    save_student(given.work / "student", Checkpoint(build("xvector", channels=8, embedding=EMBEDDING).eval()))
    libraries, _ = peak_mb(given.work, 10, 10)
    peak, seconds = peak_mb(given.work, given.utterances, given.trials)
    embeddings = given.utterances * EMBEDDING * 4 / 2**20
    result = {
        "utterances": given.utterances,
        "trials": given.trials,
        "seconds": round(seconds),
        "peak_mb": round(peak),
        "libraries_mb": round(libraries),
        "embeddings_mb": round(embeddings),
        "beyond_embeddings_mb": round(peak - libraries - embeddings),
    }
    record.keep("eval_scale", result, given.tiny)


if __name__ == "__main__":
    main()
