"""What keeping freed buffers (spkd/memory.py) saves on a CPU: extraction and training, with and without it in turn.

A setting of glibc in the environment, which changes nothing by itself, makes spkd leave the allocator as it is.

    python benchmarks/buffers.py --data DIR --teacher FILE

DIR holds librispeech-mini, FILE is the weights of the GE2E d-vector. Prints, as its last line, one JSON object;
keeps it in benchmarks/results/buffers.json.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import record
from papers import corpus_rows, write_manifest

HERE = Path(__file__).parent
AS_IT_IS = {"MALLOC_ARENA_TEST": "8"}  # glibc's own default


def measured(work: Path, environment: dict[str, str], *arguments: str) -> dict[str, float]:
    """Seconds of one command, and those of its processors in the system."""
    command = [sys.executable, str(HERE / "spkd_main.py"), *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=work, env=os.environ | environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": time.perf_counter() - start, "system": after.ru_stime - before.ru_stime}


def main() -> None:
    options = record.options(__doc__, "buffers", data=True)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--utterances", type=int, default=20)
    options.add_argument("--steps", type=int, default=60)
    given = record.parse(options, rounds=1, steps=2, utterances=2)
    work = given.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_manifest(work / "some.csv", corpus_rows(given.data, "librispeech-mini")[: given.utterances])
    extract = ("extract", "teacher=dvector", f"teacher.weights={given.teacher}", "manifest=some.csv")
    extract += ("view=full:8", "view.speeds=[0.8,0.9,1.0,1.1,1.2]", "fbank=true")
    train = ("train", "--loss", "contrastive", "cache=kept-0", f"steps={given.steps}", "loggers=[]")
    train += ("student=xvector", "student.channels=256")
    if given.tiny:
        train += ("batch_size=4",)
    found: dict[str, dict[str, list[dict[str, float]]]] = {"extract": {}, "train": {}}
    for number in range(given.rounds):
        for name, environment in (("kept", {}), ("returned", AS_IT_IS)):
            folder = f"{name}-{number}"
            runs = {"extract": (*extract, f"cache={folder}"), "train": (*train, f"out=student-{folder}")}
            for command, arguments in runs.items():
                found[command].setdefault(name, []).append(measured(work, environment, *arguments))
                print(command, name, found[command][name][-1], flush=True)
    result: dict[str, object] = {}
    for command, by_name in found.items():
        rows_of = {name: [round(run["seconds"], 1) for run in runs] for name, runs in by_name.items()}
        ratio = statistics.median(rows_of["kept"]) / statistics.median(rows_of["returned"])
        system = {name: round(statistics.median(run["system"] for run in runs), 1) for name, runs in by_name.items()}
        result[command] = {"time_ratio": round(ratio, 3), "seconds": rows_of, "system_seconds": system}
    record.keep("buffers", result, given.tiny)


if __name__ == "__main__":
    main()
