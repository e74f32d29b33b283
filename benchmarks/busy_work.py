"""Work that benchmarks/busy.py times: SPINS PLACE WHAT FOLDER CHANNELS.

Every line of the input is a number of seconds; the answers are amounts of work per second, and cores that were in use.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from spkd.cores import limit_threads


def training(work: Path, channels: int) -> Iterator[float]:
    """Utterances of every step."""
    from train_overhead import run_of, steps_of

    run = run_of(work, 4 if channels < 32 else 32, channels, ["loss=[aam,cosine]"])
    for _ in steps_of(run):
        yield run.config.batch_size


def extraction(work: Path, channels: int) -> Iterator[float]:
    """Seconds of audio of every pass over the corpus."""
    import torch
    from extract_overhead import corpus, empty, settings

    from spkd.extract.run import extract
    from spkd.teachers import load_teacher

    keys = ["teacher=checkpoint", f"teacher.weights={work / 'teacher'}", "batch_size=8", "device=cpu"]
    given = replace(settings(work, ["view=crops:2,2.0"], keys), cache=f"{work / 'cache'}-{os.getpid()}")
    manifest, teacher = corpus(work, 0), load_teacher(given.teacher, torch.device("cpu"))
    while True:
        yield 2.0 * extract(given, teacher, manifest).views
        empty(Path(given.cache))


def main() -> None:
    spins, place, what, work, channels = sys.argv[1:]
    if place == "one core":
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    elif place != "all cores":  # a control group
        (Path(place) / "cgroup.procs").write_text(str(os.getpid()))
    if spins == "spkd":
        limit_threads()  # before torch is loaded, as the command line does
    import torch

    from spkd.memory import keep_large_buffers

    keep_large_buffers()
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")
    amounts = {"training": training, "extraction": extraction}[what](Path(work), int(channels))
    next(amounts)
    print(torch.get_num_threads(), file=answers, flush=True)
    for line in sys.stdin:
        next(amounts)  # what was prepared before
        done, begun, used = 0.0, time.perf_counter(), time.process_time()
        while not done or time.perf_counter() - begun < float(line):
            done += next(amounts)
        seconds = time.perf_counter() - begun
        print(done / seconds, (time.process_time() - used) / seconds, file=answers, flush=True)


main()
