"""A new model without enrolling anew: enrolments by an old model, mapped by `spkd map`, and tests by the new one.

Two directions: from the teacher (GE2E d-vector) to a student of it (best-mini at 2,400 steps), and to the same
student from one that was trained apart from it (without labels, at the same steps). The maps are trained on the
training speech alone. The lists are those of papers.py, and so are losses and views.

    python benchmarks/mapping.py --data DIR --teacher FILE --seeds 3

Every finished evaluation is kept in the file `--runs`, students, caches and maps in their folders: after an
interruption the same command continues. Prints a table and, as its last line, one JSON object, which it keeps in
benchmarks/results/mapping.json:
- kept_aside: mean cosine with the new model's embeddings, on training speakers kept aside, of several networks.
- eer_percent: by direction and way of enrolling; mean and standard deviation over the seeds.
- mapped_minus_anew, mapped_minus_old: differences of the mean EER over lists and seeds, and their 95 % intervals over
  the speakers.
- share_of_gain_kept: (old - mapped) / (old - anew), for each list where enrolling anew gains, and for the mean.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from commands import spkd
from papers import (
    BEST,
    FORMANTS,
    HEADS,
    LONG,
    SPEEDS,
    STUDENT,
    TEMPERATURES,
    Method,
    Study,
    compare,
    evaluated,
    extract,
    prepared,
    shorter,
    summary,
)
from torch import nn
from torch.nn.functional import normalize

from spkd.cache import Cache
from spkd.mapping.embedding_map import MapNetwork
from spkd.mapping.fit import Both, as_tensors, begin_linear, cosine, speakers_aside, train
from spkd.mapping.pairs import read_pairs

CACHE = "voices16"
VIEWS = ("view=full:4", f"view.speeds={SPEEDS}", f"view.formants={FORMANTS}")
METHODS = {
    "old": Method("mapping", "old", ("contrastive", "ntxent"), TEMPERATURES, STUDENT, LONG, CACHE),
    "new": Method("mapping", "new", *BEST, STUDENT, LONG, CACHE),
}
DIRECTIONS = {"teacher": "teacher to student", "student": "student to student"}
WAYS = {
    "old": "old model alone",
    "bare": "enrolled by the old model, not mapped",
    "linear": "enrolled by the old model, mapped (hidden=0)",
    "mapped": "enrolled by the old model, mapped",
    "anew": "enrolled anew by the new model",
}
HIDDEN = 512


def model(study: Study, direction: str, seed: int, section: str) -> list[str]:
    """Settings of the old model of a direction."""
    if direction == "teacher":
        return [f"{section}=dvector", f"{section}.weights={study.weights}"]
    return [f"{section}={study.folder('old', seed)}"]


def students(study: Study, seed: int) -> None:
    """Train the students of a seed that are not there."""
    folders = {name: study.folder(name, seed) for name in study.methods}
    missing = [name for name, folder in folders.items() if not (study.work / folder / "model.json").is_file()]
    if missing:
        extract(study, CACHE)
    for name in missing:
        method = study.methods[name]
        losses = [argument for loss in method.losses for argument in ("--loss", loss)]
        settings = [*method.student, *method.settings, f"steps={method.steps}", f"seed={seed}", f"out={folders[name]}"]
        spkd(study.work, study.threads, "train", *losses, f"cache={CACHE}", *settings)
        print(f"trained {folders[name]}", flush=True)


def embeddings(study: Study, name: str, *teacher: str) -> str:
    """Cache of a model's embeddings of the training speech."""
    cache = f"{name}-embeddings"
    spkd(study.work, study.threads, "extract", *teacher, "manifest=train.csv", f"cache={cache}", *VIEWS)
    return cache


def caches(study: Study, direction: str, seed: int) -> tuple[str, str]:
    """Caches of the old and the new model of a direction."""
    new = study.folder("new", seed)
    if direction == "teacher":
        old = embeddings(study, "teacher", "teacher=dvector", f"teacher.weights={study.weights}")
    else:
        folder = study.folder("old", seed)
        old = embeddings(study, folder, "teacher=checkpoint", f"teacher.weights={folder}")
    return old, embeddings(study, new, "teacher=checkpoint", f"teacher.weights={new}")


def networks(study: Study, old: str, new: str) -> dict[str, float]:
    """Cosine on the speakers kept aside of several kinds of map, each trained as `spkd map` trains its own."""
    pairs = read_pairs(Cache.open(study.work / old), Cache.open(study.work / new), 10**6, 0)
    aside = speakers_aside(pairs, 0.1, 0)
    fitted, kept = as_tensors(pairs, ~aside), as_tensors(pairs, aside)
    a, b, steps = pairs.old.shape[1], pairs.new.shape[1], 4 if study.threads == 0 else 2000

    def layers(*widths: int) -> nn.Module:
        found: list[nn.Module] = [Units()]
        for one, other in itertools.pairwise(widths):
            found += [nn.Linear(one, other), nn.GELU()]
        return nn.Sequential(*found[:-1])

    def of_spkd(hidden: int) -> nn.Module:
        made = MapNetwork(a, b, hidden)
        begin_linear(made, fitted, kept)
        return made

    made: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: of_spkd(0),
        "linear and hidden layer": lambda: of_spkd(HIDDEN),
        "one hidden layer": lambda: layers(a, HIDDEN, b),
        "two hidden layers": lambda: layers(a, HIDDEN, HIDDEN, b),
    }
    found = {"orthogonal Procrustes": procrustes(fitted, kept)} if a == b else {}
    for name, make in made.items():
        torch.manual_seed(0)
        network = make()
        train(network, fitted, kept, steps, 0)
        found[name] = cosine(network, kept)
    return {name: round(value, 4) for name, value in found.items()}


class Units(nn.Module):
    """Embeddings divided by their lengths."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return normalize(embeddings, dim=1)


def procrustes(fitted: Both, kept: Both) -> float:
    """Cosine of the best rotation (with reflection) between both spaces, each around its mean."""
    x, y = (normalize(side.double(), dim=1) for side in fitted)
    u, _, v = torch.linalg.svd((x - x.mean(0)).mT @ (y - y.mean(0)))
    mapped = (normalize(kept[0].double(), dim=1) - x.mean(0)) @ (u @ v) + y.mean(0)
    return float(torch.cosine_similarity(mapped, kept[1].double()).mean())


def runs(study: Study, direction: str, seed: int) -> dict[str, dict]:
    """Records of every way of enrolling of a direction."""
    new = study.folder("new", seed)
    key = f"{direction}-{study.key('new')}" + (f"-{study.key('old')}" if direction == "student" else "")
    names = {way: f"{way}-{key}" for way in WAYS}
    if any(study.runs.get(name, seed) is None for name in names.values()):
        old, fresh = caches(study, direction, seed)
        maps = {"mapped": f"map-{direction}-{seed}", "linear": f"linear-map-{direction}-{seed}"}
        for way, folder in maps.items():
            steps = ["steps=4"] if study.threads == 0 else []
            hidden = ["hidden=0"] if way == "linear" else []
            spkd(study.work, study.threads, "map", old, fresh, f"out={folder}", *hidden, *steps)
        both = [f"model={new}", *model(study, direction, seed, "enrol.model")]
        given = {
            "old": model(study, direction, seed, "model"),
            "bare": both,
            **{way: [*both, f"enrol.map_by={folder}"] for way, folder in maps.items()},
            "anew": [f"model={new}"],
        }
        for way, settings in given.items():
            if study.runs.get(names[way], seed) is None:
                found = evaluated(study, f"eval-{way}-{direction}-{seed}", *settings)
                study.runs.keep(names[way], seed, {"method": names[way], **found})
        aside = f"aside-{key}"
        if study.runs.get(aside, seed) is None:
            study.runs.keep(aside, seed, {"method": aside, "cosines": networks(study, old, fresh)})
        print(f"{DIRECTIONS[direction]}, seed {seed}: done", flush=True)
    found = {way: study.runs.get(name, seed) for way, name in names.items()}
    return {way: run for way, run in found.items() if run is not None} | {
        "aside": study.runs.get(f"aside-{key}", seed) or {}
    }


def of_direction(found: list[dict[str, dict]]) -> dict[str, Any]:
    """What is reported of a direction.

    Args:
        found: records by way, of each seed.
    """
    by_way = {way: [runs[way] for runs in found] for way in WAYS}
    rates = {way: summary(records) for way, records in by_way.items()}
    means = {way: {part: rate["eer_percent"]["mean"] for part, rate in rates[way].items()} for way in WAYS}
    for of_way in means.values():
        of_way["mean"] = statistics.fmean(of_way.values())
    shares = {}
    for part, anew in means["anew"].items():
        gain = means["old"][part] - anew
        shares[part] = round((means["old"][part] - means["mapped"][part]) / gain, 2) if gain > 0 else None
    cosines = [runs["aside"]["cosines"] for runs in found]
    return {
        "kept_aside": {name: round(float(np.mean([each[name] for each in cosines])), 4) for name in cosines[0]},
        "eer_percent": {
            way: {part: rate["eer_percent"] for part, rate in rates[way].items()}
            | {"mean": round(means[way]["mean"], 3)}
            for way in WAYS
        },
        "mapped_minus_anew": compare(by_way["mapped"], by_way["anew"]),
        "mapped_minus_old": compare(by_way["mapped"], by_way["old"]),
        "share_of_gain_kept": shares,
    }


def table(result: dict) -> str:
    """The tables of docs/results.md."""
    cells = ["", *(f"{head}, EER (%)" for head in HEADS.values()), "mean, EER (%)"]
    lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
    for direction, title in DIRECTIONS.items():
        for way, what in WAYS.items():
            rates = result["eer_percent"][direction][way]
            shown = [f"{rates[part]['mean']:.2f} ± {rates[part]['sd']:.2f}" for part in HEADS]
            lines.append(f"| {title}: {what} | {' | '.join(shown)} | {rates['mean']:.2f} |")
    lines += [
        "",
        "| | mapped less anew (points) | mapped less old (points) | share of the gain kept |",
        "|---|---|---|---|",
    ]
    for direction, title in DIRECTIONS.items():
        shown = []
        for what in ("mapped_minus_anew", "mapped_minus_old"):
            found = result[what][direction]
            low, high = found["interval"]
            shown.append(f"{found['difference']:+.2f} ({low:+.2f} to {high:+.2f})")
        shares = result["share_of_gain_kept"][direction]
        kept = [
            f"{HEADS.get(part, 'mean of the lists')} {f'{100 * share:.0f} %' if share > 0 else 'nothing'}"
            for part, share in shares.items()
            if share is not None
        ]
        lines.append(f"| {title} | {' | '.join(shown)} | {', '.join(kept) or 'nothing is gained'} |")
    names = list(dict.fromkeys(name for found in result["kept_aside"].values() for name in found))
    lines += ["", f"| cosine, speakers kept aside | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for direction, title in DIRECTIONS.items():
        found = result["kept_aside"][direction]
        lines.append(f"| {title} | {' | '.join(f'{found[name]:.3f}' if name in found else '' for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    options = record.options(__doc__, "mapping", data=True)
    options.add_argument("--seeds", type=int, default=3)
    kept = Path(__file__).parent / "results" / "mapping_runs.json"
    options.add_argument("--runs", type=Path, default=kept, help="file of the finished evaluations")
    given = record.parse(options, seeds=1)
    study = prepared(given)
    methods = {name: shorter(each) if given.tiny else each for name, each in METHODS.items()}
    study = replace(study, methods=methods)
    kept_runs: dict[str, list[dict[str, dict]]] = {direction: [] for direction in DIRECTIONS}
    for seed in range(given.seeds):
        students(study, seed)
        for direction, of_seeds in kept_runs.items():
            of_seeds.append(runs(study, direction, seed))
    found = {direction: of_direction(of_seeds) for direction, of_seeds in kept_runs.items()}
    names = next(iter(found.values()))
    result: dict[str, Any] = {name: {direction: each[name] for direction, each in found.items()} for name in names}
    result["seeds"] = given.seeds
    print(table(result))
    record.keep("mapping", result, given.tiny)


if __name__ == "__main__":
    main()
