"""One student in many sizes: nested embeddings against students of each size, on tests of 1 s, 2 s and full length.

Trains an x-vector with the losses and views of the recipe best-mini, as papers.py does, once for each size of
embedding, and once with all sizes nested (`student.nested`); and once where short crops train the small sizes alone
(`student.nested_crops`). The lists are those of papers.py. In a short test the enrolment side is whole and the test
side is cut to the middle 1 s or 2 s; the trials are the same.

    python benchmarks/nested.py --data DIR --teacher FILE --seeds 3

What is finished is kept in the file `--runs` and in the students' folders, and is not done again: after an interruption
the same command continues. Prints a table of EERs and, as its last line, one JSON object, which it keeps in
benchmarks/results/nested.json:
- eer_percent: by method, length of the tests and size; mean and standard deviation over the seeds of the mean EER (%)
  over the lists.
- nested_64_minus_own_64: 64 numbers of a nested embedding against an embedding of 64, whole tests: difference of these
  EERs and its 95 % interval over the speakers.
- minus_own: the same for every method, length and size.
- step_time_ratio: CPU time of a training step with nested sizes over that without, both taking turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import record
import torch
from commands import spkd
from papers import (
    BEST,
    LONG,
    MANY,
    TESTED,
    CachePlan,
    Method,
    Runs,
    Study,
    compare,
    evaluated,
    extract,
    manifests,
    student,
    training_options,
)
from papers import LISTS as WHOLE_LISTS
from train_overhead import steps_of

from spkd import config
from spkd.corpus.manifest import Manifest, Utterance
from spkd.train.settings import TrainConfig
from spkd.train.trainer import build, checked

SIZES = (32, 64, 128, 256)
SECONDS = (1.0, 2.0, None)  # of the test side; None: whole
LENGTHS = {1.0: "1 s", 2.0: "2 s", None: "whole"}
CACHE = "voices16"
NESTED = f"student.nested=[{','.join(map(str, SIZES))}]"
CROPS = "student.nested_crops=[0.5,1,1.5,2]"
TITLES = {"own": "embedding of that size", "nested": "nested", "crops": "nested, short crops train small sizes"}


def own(size: int) -> str:
    return f"own_{size}"


def method(title: str, size: int, *settings: str) -> Method:
    losses, given = BEST
    return Method("nested", title, losses, (*given, *settings), student("xvector", 64, size), LONG, CACHE)


METHODS = {
    **{own(size): method(TITLES["own"], size) for size in SIZES},
    "nested": method(TITLES["nested"], SIZES[-1], NESTED),
    "crops": method(TITLES["crops"], SIZES[-1], NESTED, CROPS),
}


@dataclass(frozen=True)
class Part:
    """Trials of a list with test sides of one length."""

    list: str
    seconds: float | None

    @property
    def name(self) -> str:
        return f"{self.list}-{LENGTHS[self.seconds].replace(' ', '')}"


PARTS = [Part(name, seconds) for seconds in SECONDS for name in WHOLE_LISTS]


def cut(one: Utterance, seconds: float | None) -> Utterance:
    """The middle of an utterance, where it is longer."""
    assert one.duration is not None
    if seconds is None or one.duration <= seconds:
        return one
    return replace(one, start=one.start + (one.duration - seconds) / 2, duration=seconds)


def write_parts(study: Study) -> None:
    """One manifest and one trial list of all parts: a name begins with that of its part, and goes on with the side."""
    utterances: list[Utterance] = []
    with open(study.work / f"{TESTED}.txt", "w") as file:
        for part in PARTS:
            manifest, trials = study.data / WHOLE_LISTS[part.list][0], study.data / WHOLE_LISTS[part.list][1]
            rows = list(Manifest.load(manifest))
            utterances += [replace(one, id=f"{part.name}/enrol/{one.id}") for one in rows]
            utterances += [replace(cut(one, part.seconds), id=f"{part.name}/test/{one.id}") for one in rows]
            for label, first, second in map(str.split, trials.read_text().splitlines()):
                file.write(f"{label} {part.name}/enrol/{first} {part.name}/test/{second}\n")
    Manifest(tuple(utterances)).save(study.work / f"{TESTED}.csv")


def train(study: Study, name: str, seed: int) -> None:
    """A student, unless it is there."""
    folder, one = study.folder(name, seed), study.methods[name]
    if (study.work / folder / "model.json").is_file():
        return
    started = time.time()
    losses = [argument for loss in one.losses for argument in ("--loss", loss)]
    settings = [*one.student, *one.settings, f"steps={one.steps}", f"seed={seed}", f"out={folder}"]
    spkd(study.work, study.threads, "train", *losses, f"cache={one.cache}", *settings)
    print(f"{folder}: trained in {time.time() - started:.0f} s", flush=True)


def sizes_of(name: str) -> list[int]:
    """Sizes at which a method's embedding is tested."""
    return list(SIZES) if name in ("nested", "crops") else [int(name.removeprefix("own_"))]


def test(study: Study, name: str, seed: int) -> None:
    """EERs of a student at all of its sizes, unless they are kept."""
    key, folder = study.key(name), study.folder(name, seed)
    if study.runs.get(key, seed) is not None:
        return
    speed = json.loads((study.work / folder / "run.json").read_text()).get("speed")
    found: dict[str, dict] = {}
    for size in sizes_of(name):
        dimension = [f"model.dimension={size}"] if name in ("nested", "crops") else []
        out = evaluated(study, f"{folder}-eval-{size}", f"model={folder}", *dimension)
        found[str(size)] = {what: out[what] for what in ("lists", "resampled", "model")}
    study.runs.keep(key, seed, {"method": name, "speed": speed, "sizes": found})
    print(f"{folder}: tested at {', '.join(found)}", flush=True)


def step_time_ratio(study: Study, rounds: int) -> float:
    """CPU time of a step of the nested student over that of the same student without, on one thread; the median."""
    torch.set_num_threads(1)
    steps = []
    for name in ("nested", own(SIZES[-1])):
        one = study.methods[name]
        keys = [f"loss=[{','.join(one.losses)}]", f"cache={study.work / one.cache}", *one.student, *one.settings]
        settings = config.load(TrainConfig, [*keys, "steps=100000", "device=cpu"], environ={})
        steps.append(steps_of(build(checked(settings), study.work / "timed")))
    times = []
    for _ in range(rounds + 1):
        starts = [time.process_time()]
        for step in steps:
            next(step)
            starts.append(time.process_time())
        times.append((starts[1] - starts[0]) / (starts[2] - starts[1]))
    return round(statistics.median(times[1:]), 3)


def at(study: Study, name: str, size: int, seeds: int) -> list[dict]:
    """Results at a size, for each seed that is finished."""
    return [run["sizes"][str(size)] for run in study.finished(own(size) if name == "own" else name, seeds)]


def summary(runs: list[dict], parts: list[str]) -> dict[str, object]:
    """Mean and standard deviation over the seeds of the mean EER (%) over parts."""
    rates = [statistics.fmean(run["lists"][part]["eer_percent"] for part in parts) for run in runs]
    spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
    return {"mean": round(statistics.fmean(rates), 3), "sd": round(spread, 3), "seeds": [round(r, 3) for r in rates]}


def report(study: Study, seeds: int) -> dict[str, object]:
    """EERs and differences of what is finished."""
    rates: dict[str, dict] = {}
    minus: dict[str, dict] = {}
    for name in TITLES:
        for seconds in SECONDS:
            parts, length = [part.name for part in PARTS if part.seconds == seconds], LENGTHS[seconds]
            for size in SIZES:
                ours, theirs = at(study, name, size, seeds), at(study, "own", size, seeds)
                if ours:
                    rates.setdefault(name, {}).setdefault(length, {})[str(size)] = summary(ours, parts)
                if ours and theirs and name != "own":
                    both = min(len(ours), len(theirs))
                    found = compare(ours[:both], theirs[:both], parts)
                    minus.setdefault(name, {}).setdefault(length, {})[str(size)] = found
    headline = minus.get("nested", {}).get(LENGTHS[None], {}).get("64")
    return {"eer_percent": rates, "minus_own": minus, "nested_64_minus_own_64": headline}


def tables(result: dict) -> str:
    """The tables of docs/results.md."""
    head = ["tests", *(f"{size} numbers" for size in SIZES)]
    compared = {name: title for name, title in TITLES.items() if name != "own"}
    rates = _table(["embedding", *head], TITLES, result["eer_percent"], _rate)
    return "\n".join([*rates, "", *_table(["minus own size", *head], compared, result["minus_own"], _difference)])


def _table(head: list[str], titles: dict[str, str], results: dict, shown: Callable[[dict], str]) -> list[str]:
    """Lines of a table with a column for each size."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for length in LENGTHS.values():
        for name, title in titles.items():
            if found := results.get(name, {}).get(length):
                cells = [shown(found[str(size)]) if str(size) in found else "" for size in SIZES]
                lines.append(f"| {title} | {length} | {' | '.join(cells)} |")
    return lines


def _rate(found: dict) -> str:
    return f"{found['mean']:.2f} ± {found['sd']:.2f}"


def _difference(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    given = record.parse(training_options(__doc__, "nested"), methods=["own_64", "nested"], seeds=1, jobs=1)
    given.work.mkdir(parents=True, exist_ok=True)
    manifests(given.data, given.work)
    runs = Runs(given.work / "runs.json" if given.tiny else given.runs)
    # The lists name the parts, for papers.scored.
    lists = {part.name: (Path(), Path()) for part in PARTS}
    study = Study(given.work, given.data, given.teacher, lists, METHODS, {CACHE: CachePlan(MANY)}, runs)
    study = study.tiny() if given.tiny else study
    chosen = [(name, seed) for seed in range(given.seeds) for name in given.methods or METHODS]
    waiting = [one for one in chosen if runs.get(study.key(one[0]), one[1]) is None and not given.report]
    if any(not (study.work / study.folder(*one) / "model.json").is_file() for one in waiting):
        extract(study, CACHE)
    for name, seed in waiting:
        train(study, name, seed)
    if waiting:
        write_parts(study)
    for name, seed in waiting:
        test(study, name, seed)
    result = report(study, given.seeds)
    if (study.work / CACHE / "card.json").is_file():
        result["step_time_ratio"] = step_time_ratio(study, 1 if given.tiny else 20)
    print(tables(result))
    record.keep("nested", result, given.tiny)


if __name__ == "__main__":
    main()
