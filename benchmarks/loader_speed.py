"""How many hours of audio a core loads in an hour, by the stage, and what a second worker adds.

The views are those of the recipe `best`: crops of 3 s of FLAC files at five speeds and five formant factors, with noise
and reverberation. Each stage is timed alone, on the views that it changes, and then the loading of whole views:
`hours_per_hour_core_best`, and with the input features that `fbank=true` stores `hours_per_hour_core_features`. What
counts is the time of the processor, for each view the least of the rounds: what other processes do to its caches is
left out as far as it goes. `two_workers_over_one` is measured by the clock, with one and two workers in turn (median of
the rounds), once the two are processes; `two_threads_over_one` is the same of two threads, as short runs have them.
Both need two idle cores; `load` is the number of other processes that want a core at the start. `start_seconds` is the
time until there are two processes, and `mb_of_process` the memory of each then, with its share of what they have in
common (proportional set size), and with the noise and impulse responses of DIR.

    python benchmarks/loader_speed.py --data DIR

DIR holds librispeech-mini and noise. Prints a table and, as its last line, one JSON object; keeps it in
benchmarks/results/loader_speed.json.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import record
import torch

from spkd import config
from spkd.corpus import loader as loading
from spkd.corpus.audio import SAMPLE_RATE, change_speed, decode
from spkd.corpus.augment import VERSION, bank, convolve, fast_coloured_noise, mix
from spkd.corpus.formants import VERSION as FORMANTS_VERSION
from spkd.corpus.formants import shift_formants
from spkd.corpus.loader import ViewLoader, stream_batches
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.view import ViewPlan, source_samples
from spkd.extract.settings import ExtractConfig
from spkd.extract.targets import features_of
from spkd.memory import keep_large_buffers
from spkd.outputs.features import FBANK

RECIPE = Path(__file__).parents[1] / "spkd" / "recipes" / "best.yaml"
BATCH = 32
WHOLE, WITH_FEATURES = "whole", "with features"
AHEAD = 8  # batches that may have been loaded while a stream was left alone


def plan_of(data: Path, given: Sequence[str]) -> ViewPlan:
    folders = [f"view.noise={data / 'noise' / 'noise'}", f"view.rir={data / 'noise' / 'rir_sim'}"]
    return ViewPlan.parse(config.load(ExtractConfig, [*folders, *given], RECIPE, environ={}).view)


def stages(loader: ViewLoader, data: Path, views: np.ndarray) -> dict[str, list[Callable[[], object]]]:
    """Calls of each stage with its own input, one for each view that it changes."""
    table, random = loader.views, np.random.RandomState(0)
    rirs, noise = (bank(str(data / "noise" / name)) for name in ("rir_sim", "noise"))

    def decoded(view: int) -> np.ndarray:
        utterance = loader.manifest[int(table.utterance[view])]
        span = int(source_samples(int(table.samples[view]), float(table.speed[view])))
        return decode(utterance.path, utterance.start + table.start[view] / SAMPLE_RATE, span / SAMPLE_RATE).wave

    waves = {int(view): decoded(int(view)) for view in views}
    crops = [np.resize(wave, int(table.samples[view])) for view, wave in waves.items()]
    responses = [rirs.response(random, 0) for _ in crops]
    noises = [noise.stretch(random, len(crop), fast_coloured_noise) for crop in crops]

    def load_with_features(view: int) -> object:
        return features_of(torch.from_numpy(loader(view))[None], [FBANK])

    return {
        "decoding": [partial(decoded, view) for view in waves],
        "speeds": [
            partial(change_speed, wave, round(float(table.speed[view]), 2))
            for view, wave in waves.items()
            if table.speed[view] != 1
        ],
        "formants": [
            partial(shift_formants, crop, round(float(factor), 2))
            for crop, factor in zip(crops, table.formants[views], strict=True)
            if factor != 1
        ],
        "reverberation": [partial(convolve, *pair) for pair in zip(crops, responses, strict=True)],
        "drawing noise": [partial(noise.stretch, random, len(crop), fast_coloured_noise) for crop in crops],
        "adding noise": [partial(mix, crop, added, 10.0) for crop, added in zip(crops, noises, strict=True)],
        "features": [partial(features_of, torch.from_numpy(crop)[None], [FBANK]) for crop in crops],
        WHOLE: [partial(loader, view) for view in waves],
        WITH_FEATURES: [partial(load_with_features, view) for view in waves],
    }


def least(calls: Sequence[Callable[[], object]], before: np.ndarray | float) -> np.ndarray:
    """Time of the processor (s) of each call, or that of the rounds before where it is less."""
    times = []
    for call in calls:
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return np.minimum(times, before)


def wanting_cores() -> int:
    """Number of other processes that want a core now."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    except OSError:
        return round(os.getloadavg()[0])


def started(batches: Iterator[None]) -> float:
    """Time until two processes load (s)."""
    start = time.perf_counter()
    while len(multiprocessing.active_children()) < 2:
        next(batches)
    return time.perf_counter() - start


def private(process: int) -> float:
    """Memory of a process (MB), with its share of what it has in common with others; 0 where the system gives none."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:"))
    return 0.0


def main() -> None:
    options = record.options(__doc__, "loader_speed", data=True, teacher=False)
    options.add_argument("--views", type=int, default=400, help="in a round, at most")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--batches", type=int, default=40, help="of a round by one and two workers")
    options.add_argument("--seconds", type=float, default=3.0, help="of a crop")
    given = record.parse(options, views=8, rounds=1, batches=1, seconds=0.5)
    load = wanting_cores()
    keep_large_buffers()
    torch.set_num_threads(1)
    manifest, _ = measure(Manifest.load(given.data / "librispeech-mini" / "train.csv"))
    plan = plan_of(given.data, [f"view=crops:8,{given.seconds}"])
    loader = ViewLoader(manifest, plan.views(manifest), plan)
    views = np.random.RandomState(0).permutation(len(loader.views))[: given.views]

    def failed(view: int, error: Exception) -> None:
        raise SystemExit(f"view {view}: {error}")

    def stream(workers: int) -> Iterator[None]:
        """Batches without end."""
        groups = itertools.repeat((0, views))
        for _, batch in stream_batches(loader, groups, BATCH, workers, failed):
            if batch is not None:
                yield

    def seconds(batches: Iterator[None]) -> float:
        for _ in range(AHEAD):
            next(batches)
        start = time.perf_counter()
        for _ in range(given.batches):
            next(batches)
        return time.perf_counter() - start

    one, threads, processes = stream(1), stream(2), stream(2)
    loading.AFTER = np.inf
    for each in (one, threads):  # files, impulse responses and tables of filters are in memory from here on
        seconds(each)
    loading.AFTER = 0.0
    start_seconds = started(processes)
    loading.AFTER = np.inf
    seconds(processes)
    megabytes = statistics.mean(private(child.pid or 0) for child in multiprocessing.active_children())
    calls = stages(loader, given.data, views)
    times: dict[str, np.ndarray | float] = dict.fromkeys(calls, np.inf)
    ratios, of_threads = [], []
    for _ in range(given.rounds):
        times = {name: least(calls[name], before) for name, before in times.items()}
        ratios.append(seconds(one) / seconds(processes))
        of_threads.append(seconds(one) / seconds(threads))
    speeds = {name: round(given.seconds * len(calls[name]) / float(np.sum(each))) for name, each in times.items()}
    result = {
        "hours_per_hour_core_best": speeds.pop(WHOLE),
        "hours_per_hour_core_features": speeds.pop(WITH_FEATURES),
        "two_workers_over_one": round(statistics.median(ratios), 2),
        "two_threads_over_one": round(statistics.median(of_threads), 2),
        "start_seconds": round(start_seconds, 1),
        "mb_of_process": round(megabytes),
        "stages": speeds,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "views": len(views),
        "rounds": given.rounds,
        "crop_seconds": given.seconds,
        "versions": {"formants": FORMANTS_VERSION, "augmentation": VERSION},
        "load": load,
    }
    for name, speed in result["stages"].items():
        print(f"{name:<16}{speed:>8,} hours per hour and core")
    record.keep("loader_speed", result, given.tiny)


if __name__ == "__main__":
    main()
