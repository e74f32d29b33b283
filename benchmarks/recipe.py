"""How the recipe best-mini was chosen: on speakers kept aside, never on a test list.

58 of the training speakers of papers.py are kept aside (25 of speechocean, 33 of LibriSpeech), and the same student is
trained on the other 250 with every candidate. Scored on three lists: speechocean's speakers against others of the same
sex and age group, pieces of the LibriSpeech recordings, and Arabic commands across recording sessions, a language
that no student was trained on.

    python benchmarks/recipe.py --data DIR --teacher FILE --seeds 2

DIR holds librispeech-mini, speechocean-mini, unlabelled-mini and arabic-commands-mini. Finished runs are kept as
papers.py keeps them. Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/recipe.json,
from which tables.py makes a table of docs/results.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import papers
import record
from commands import Lists
from papers import (
    BEST,
    LABELS,
    LONG,
    LONGEST,
    MANY,
    ONE,
    SPEEDS,
    STEPS,
    STUDENT,
    TEACHER,
    TEMPERATURES,
    TRAINED_ON,
    VOICES,
    CachePlan,
    Method,
    Runs,
    Study,
    corpus_rows,
    evaluated,
    rows,
    run,
    show,
    student,
    table,
    training_options,
    with_frames,
    write_manifest,
    write_tested,
)
from papers_why import across_sessions, recordings

HERE = Path(__file__).parent
ASIDE = {"librispeech-mini": 33, "speechocean-mini": 25}  # speakers, of 183 and 125
HEADS = {"speechocean": "speechocean", "librispeech": "LibriSpeech", "arabic": "Arabic"}
PIECE = 3.0  # s, at least, of a recording of LibriSpeech
CHILD = 15  # years; the age groups of the trials

CACHES = {
    "aside": CachePlan(VOICES, manifest="others.csv"),
    "unlabelled": CachePlan(VOICES, manifest="unlabelled.csv"),
    "aside_16": CachePlan(MANY, manifest="others.csv"),
    "aside_speeds": CachePlan(("view=full:8", f"view.speeds={SPEEDS}"), manifest="others.csv"),
    **{
        f"aside_{codec}": replace(papers.CACHES[f"d-vector_{codec}"], manifest="others.csv")
        for codec in ("float16", "rq8x8")
    },
}
MORE = "[aside,unlabelled]"
FRAME_WEIGHTS = (0.1, 0.3, 1.0)


def candidate(
    title: str,
    losses: tuple[str, ...],
    settings: tuple[str, ...] = (),
    shape: tuple[str, ...] = STUDENT,
    cache: str = "aside",
    steps: int = LONG,
) -> Method:
    return Method("choice", title, losses, settings, shape, steps, cache)


def weighted(weight: float) -> tuple[str, ...]:
    return (*TEMPERATURES[:1], f"loss.weights.aam={weight}")


METHODS = {
    "aam": candidate("no teacher (AAM-softmax)", ("aam",)),
    "aam_slow": candidate("no teacher, half the learning rate", ("aam",), ("optim.lr=0.001",)),
    "aam_fast": candidate("no teacher, twice the learning rate", ("aam",), ("optim.lr=0.004",)),
    "aam_ntxent": candidate("no teacher (AAM-softmax and NT-Xent)", ("aam", "ntxent"), TEMPERATURES[1:]),
    "aam_4800": candidate("no teacher, 4,800 steps", ("aam",), steps=LONGEST),
    "aam_16_4800": candidate("no teacher, 16 pseudo-speakers, 4,800 steps", ("aam",), cache="aside_16", steps=LONGEST),
    "speeds": candidate("contrastive, speeds alone", *ONE, cache="aside_speeds"),
    "contrastive": candidate("contrastive", *ONE),
    "contrastive_ntxent": candidate("contrastive and NT-Xent", ("contrastive", "ntxent"), TEMPERATURES),
    "contrastive_more": candidate("contrastive, unlabelled speech besides", *ONE, cache=MORE),
    "aam_01": candidate("contrastive, AAM-softmax (0.1)", LABELS[0], weighted(0.1)),
    "aam_03": candidate("contrastive, AAM-softmax (0.3)", *LABELS),
    "aam_1": candidate("contrastive, AAM-softmax (1)", LABELS[0], weighted(1.0)),
    "means": candidate("contrastive with class means", ONE[0], (*ONE[1], "class_means=true")),
    "best": candidate("contrastive, NT-Xent, AAM-softmax (0.3)", *BEST),
    "best_more": candidate("the same, unlabelled speech besides", *BEST, cache=MORE),
    "best_averaged": candidate("the same, weights averaged", BEST[0], (*BEST[1], "optim.swa_fraction=0.2")),
    "best_longer": candidate("the same, crops of 3 s", BEST[0], (*BEST[1], "crop=3.0")),
    "best_16": candidate("the same, 16 pseudo-speakers", *BEST, cache="aside_16"),
    "best_4800": candidate("the same, 4,800 steps", *BEST, steps=LONGEST),
    "best_16_4800": candidate("the same, 16 pseudo-speakers, 4,800 steps", *BEST, cache="aside_16", steps=LONGEST),
    "best_fast": candidate("the same, twice the learning rate", BEST[0], (*BEST[1], "optim.lr=0.004")),
    "wider": candidate("the same with 128 channels", *BEST, student("xvector", 128)),
    "nontarget": candidate("non-target over prototypes", ("nontarget",), steps=STEPS),
    "frames_0": candidate("contrastive, four views", *ONE, cache="aside_float16", steps=STEPS),
    **{
        f"{loss}_{weight}": replace(
            with_frames("d-vector", loss, codec, weight),
            group="choice",
            title=f"contrastive and {loss} from {codec} ({weight})",
            cache=f"aside_{codec}",
        )
        for loss, codec in (("multilevel", "float16"), ("codebook", "rq8x8"))
        for weight in FRAME_WEIGHTS
    },
    **{
        f"trkd_{first}_{last}": candidate(
            f"TRKD over prototypes, cut-off {first} to {last}",
            ("trkd",),
            (f"loss.trkd.cutoff=[{first},{last}]",),
            steps=STEPS,
        )
        for first, last in ((0.99, 0.8), (1, 0.99), (1, 1))
    },
}


def choice(result: dict) -> str:
    """The table of docs/results.md."""
    return table(result["methods"], HEADS, result["teacher"])


def lists(data: Path, work: Path) -> Lists:
    """Write the manifest of the other training speakers, and manifest and trials of every list of those kept aside."""
    others, aside = [], {}
    for corpus in TRAINED_ON:
        utterances = corpus_rows(data, corpus)
        speakers = sorted({row["speaker"] for row in utterances})
        chosen = {
            speakers[i]
            for i in np.random.RandomState(0).permutation(len(speakers))[: min(ASIDE[corpus], len(speakers) // 2)]
        }
        others += [row for row in utterances if row["speaker"] not in chosen]
        aside[corpus] = [row for row in utterances if row["speaker"] in chosen]
    write_manifest(work / "others.csv", others)
    write_manifest(work / "unlabelled.csv", corpus_rows(data, "unlabelled-mini"))
    pieces = [piece for row in aside["librispeech-mini"] for piece in cut(row)]

    def group(row: dict[str, str]) -> tuple[str, bool]:
        return row["gender"], int(row["age"]) < CHILD

    write_list(work / "aside-speechocean", aside["speechocean-mini"], lambda a, b: group(a) == group(b))
    write_list(work / "aside-librispeech", pieces, lambda a, b: True)
    arabic = data / "arabic-commands-mini" / "train.csv"
    across_sessions(work / "aside-arabic.txt", recordings(arabic))
    found = {name: (work / f"aside-{name}.csv", work / f"aside-{name}.txt") for name in HEADS}
    return found | {"arabic": (arabic, work / "aside-arabic.txt")}


def cut(row: dict[str, str]) -> list[dict[str, str]]:
    """A recording in equal pieces of PIECE or longer."""
    count = max(int(float(row["duration"]) / PIECE), 1)
    length = float(row["duration"]) / count
    place = [{"duration": f"{length:.3f}", "start": f"{i * length:.3f}"} for i in range(count)]
    return [{**row, "utt": f"{row['utt']}-{i}", **where} for i, where in enumerate(place)]


def write_list(path: Path, utterances: list[dict[str, str]], tried: Callable[..., bool]) -> None:
    """Manifest and trials: pairs of one speaker, and those of two that are to be tried."""
    write_manifest(path.with_suffix(".csv"), utterances)
    path.with_suffix(".txt").write_text("".join(trials(utterances, tried)))


def trials(utterances: list[dict[str, str]], tried: Callable[..., bool]) -> Iterable[str]:
    for a, b in combinations(utterances, 2):
        target = a["speaker"] == b["speaker"]
        if target or tried(a, b):
            yield f"{int(target)} {a['utt']} {b['utt']}\n"


def main() -> None:
    given = record.parse(training_options(__doc__, "recipe"), methods=["aam"], seeds=1, jobs=1)
    data, work = given.data, given.work
    work.mkdir(parents=True, exist_ok=True)
    tested = lists(data, work)
    write_tested(work, tested)
    runs = Runs(work / "runs.json" if given.tiny else given.runs)
    study = Study(work, data, given.teacher, tested, METHODS, CACHES, runs)
    if given.tiny:
        study = study.tiny()
    if not given.report:
        run(study, given.methods or list(METHODS), given.seeds, given.jobs)
    teacher = study.runs.get(TEACHER, 0)
    if teacher is None:
        teacher = evaluated(study, "teacher-aside", "model=dvector", f"model.weights={study.weights}")
        study.runs.keep(TEACHER, 0, teacher)
    methods = rows(study, {name: found for name in METHODS if (found := study.finished(name, given.seeds))})
    rates = {name: round(teacher["lists"][name]["eer_percent"], 2) for name in HEADS}
    show(methods)
    mean = {
        name: round(statistics.mean(found[part]["eer_percent"]["mean"] for part in HEADS), 2)
        for name, found in methods.items()
    }
    result = {"teacher": rates, "mean_eer_percent": mean, "methods": methods}
    record.keep("recipe", result, given.tiny)


if __name__ == "__main__":
    main()
