"""What a student saves in use: its parameters and the time of one embedding, beside its teacher's.

The shapes of papers.py (weights do not change the time) and the GE2E d-vector that teaches them there, each from
waveform to embedding, one utterance at a time on one thread. They take turns, so that all meet the same machine; CPU
time is taken, of which other processes take no part.

    python benchmarks/inference.py --teacher FILE

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/inference.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import record
import torch
from papers import SIZES, SSL, TEACHER

from spkd import config
from spkd.corpus.audio import SAMPLE_RATE
from spkd.students import Checkpoint, make_student, save_student
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig
from spkd.train.settings import TrainConfig

HERE = Path(__file__).parent
SHAPES = {"ssl_64": SSL, **{name: shape for name, (_, shape) in SIZES.items()}}
WARM_UP = 3  # rounds that are not counted


def student(shape: tuple[str, ...], folder: Path) -> Teacher:
    """An untrained student, loaded as a model that gives embeddings."""
    settings = config.load(TrainConfig, ["cache=none", "loss=cosine", *shape], environ={})
    save_student(folder, Checkpoint(make_student(settings.student).eval()))
    return load_teacher(ModelConfig("checkpoint", str(folder)), torch.device("cpu"))


def main() -> None:
    options = record.options(__doc__, "inference", data=True)
    options.add_argument("--seconds", type=float, default=4.0, help="length of an utterance")
    options.add_argument("--rounds", type=int, default=50)
    given = record.parse(options, seconds=1.0, rounds=1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dvector = load_teacher(ModelConfig("dvector", str(given.teacher)), torch.device("cpu"))
    models: dict[str, Teacher] = {TEACHER: dvector}
    with tempfile.TemporaryDirectory() as folder:
        models |= {name: student(shape, Path(folder) / name) for name, shape in SHAPES.items()}
    wave = 0.1 * torch.randn(1, round(given.seconds * SAMPLE_RATE))
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(given.rounds + WARM_UP):
        for name, model in models.items():
            start = time.process_time()
            model.extract(wave, ["embedding"])
            if number >= WARM_UP:
                times[name].append(time.process_time() - start)
    base, rows = np.array(times[TEACHER]), {}
    for name, model in models.items():
        assert model.num_parameters is not None
        assert dvector.num_parameters is not None
        low, middle, high = np.quantile(np.array(times[name]) / base, [0.25, 0.5, 0.75])
        rows[name] = {
            "parameters": model.num_parameters,
            "of_teacher_parameters": round(model.num_parameters / dvector.num_parameters, 3),
            "ms": round(1000 * float(np.median(times[name])), 2),
            "of_teacher_time": round(float(middle), 3),
            "quartiles": [round(float(low), 3), round(float(high), 3)],
        }
        print(f"{name:12} {json.dumps(rows[name])}")
    result = {"models": rows, "seconds": given.seconds, "rounds": given.rounds}
    record.keep("inference", result, given.tiny)


if __name__ == "__main__":
    main()
