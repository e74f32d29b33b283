"""How many hours of audio a core loads in an hour, by the stage, and what a second worker adds.

The views are those of the recipe `best`: crops of 3 s of FLAC files at five speeds and five formant factors, with noise
and reverberation. Each stage is timed alone, on the views that it changes, and then the loading of whole views:
`hours_per_hour_core_best`, and with the input features that `fbank=true` stores `hours_per_hour_core_features`. What
counts is the time of the processor, for each view the least of the rounds: what other processes do to its caches is
left out as far as it goes. `two_workers_over_one` is measured by the clock, with one and two workers in turn (median of
the rounds), and needs two idle cores; `load` is the number of processes that wanted a core at the start.

    python benchmarks/loader_speed.py --data DIR

DIR holds librispeech-mini and noise. Prints a table and, as its last line, one JSON object; keeps it in
benchmarks/results/loader_speed.json.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import record
import torch

from spkd import config
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


def main() -> None:
    options = record.options(__doc__, "loader_speed", data=True, teacher=False)
    options.add_argument("--views", type=int, default=400, help="in a round, at most")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=3.0, help="of a crop")
    given = record.parse(options, views=8, rounds=1, seconds=0.5)
    load = os.getloadavg()[0]
    keep_large_buffers()
    torch.set_num_threads(1)
    manifest, _ = measure(Manifest.load(given.data / "librispeech-mini" / "train.csv"))
    plan = plan_of(given.data, [f"view=crops:8,{given.seconds}"])
    loader = ViewLoader(manifest, plan.views(manifest), plan)
    views = np.random.RandomState(0).permutation(len(loader.views))[: given.views]

    def failed(view: int, error: Exception) -> None:
        raise SystemExit(f"view {view}: {error}")

    def seconds(workers: int) -> float:
        start = time.perf_counter()
        for _ in stream_batches(loader, [(0, views)], BATCH, workers, failed):
            pass
        return time.perf_counter() - start

    seconds(2)  # files, impulse responses and tables of filters are in memory from here on
    calls = stages(loader, given.data, views)
    times: dict[str, np.ndarray | float] = dict.fromkeys(calls, np.inf)
    ratios = []
    for _ in range(given.rounds):
        times = {name: least(calls[name], before) for name, before in times.items()}
        ratios.append(seconds(1) / seconds(2))
    speeds = {name: round(given.seconds * len(calls[name]) / float(np.sum(each))) for name, each in times.items()}
    result = {
        "hours_per_hour_core_best": speeds.pop(WHOLE),
        "hours_per_hour_core_features": speeds.pop(WITH_FEATURES),
        "two_workers_over_one": round(statistics.median(ratios), 2),
        "stages": speeds,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "views": len(views),
        "rounds": given.rounds,
        "crop_seconds": given.seconds,
        "versions": {"formants": FORMANTS_VERSION, "augmentation": VERSION},
        "load": round(load, 1),
    }
    for name, speed in result["stages"].items():
        print(f"{name:<16}{speed:>8,} hours per hour and core")
    record.keep("loader_speed", result, given.tiny)


if __name__ == "__main__":
    main()
