"""Labels from clusters, round after round, against the same student without labels.

The speech is that of papers.py without its labels: manifests name no speaker, and every utterance is taken in the same
twelve voices, so that no view depends on who speaks. A student is trained by contrast with the teacher and NT-Xent; its
embeddings are clustered (`spkd cache cluster`), a new student learns from the clusters besides, and so on, each from
fresh weights with as many steps. Tests are those of papers.py, on other speakers.

    python benchmarks/pseudo_label.py --data DIR --teacher FILE --seeds 3

DIR holds librispeech-mini, speechocean-mini and arabic-commands-mini. What is left to a user (the smallest cluster that
is kept, the weight of the labels) was chosen on the 58 training speakers that recipe.py keeps aside, by students of the
other 250; on those the rule that chooses the number of clusters is tried, too. Finished runs are kept as papers.py
keeps them; with `--methods`, these rows of the rounds alone are trained. Prints tables and, as its last line, one JSON
object; keeps it in benchmarks/results/pseudo_label.json, from which tables.py makes the tables of docs/results.md.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import papers
import record
from commands import Lists, spkd
from papers import HEADS, LISTS, TEACHER, TEMPERATURES, CachePlan, Method, Runs, Study, corpus_rows
from recipe import lists as lists_aside

from spkd.train.cluster import normalised_mutual_information, purity
from spkd.train.label_file import read_labels

NOBODY, GRID = "nobody.csv", "grid"
VOICES = ("view=full", "view.speeds=[0.8,0.9,1.0,1.15]", "view.formants=[0.88,1.0,1.12]")
FEW = ("view=full", "view.speeds=[0.85,1.0]", "view.formants=[0.9,1.0]")
TRUTH = "truth"
STUDENT_STEPS, SEEDS_ASIDE = 1200, 1  # of each student; of the choices
LABEL_FREE, LAST, RULE = "label_free", "round_3", "rule"
ASIDE = {"speechocean": "speechocean", "librispeech": "LibriSpeech"}


@dataclass(frozen=True)
class Row:
    """A student of a table.

    Attributes:
        before: row of the student whose embeddings are clustered; TEACHER: the teacher's; TRUTH: labels of the corpus;
            "": no labels.
        clustering: settings of `spkd cache cluster`.
        weight: weight of AAM-softmax.
    """

    title: str
    before: str = ""
    clustering: tuple[str, ...] = ()
    weight: float = 0.3


KEPT = ("smallest=1",)
ROUNDS = {
    LABEL_FREE: Row("contrastive and NT-Xent, no labels"),
    "round_1": Row("and clusters of that student: round 1", LABEL_FREE, KEPT),
    "round_2": Row("round 2", "round_1", KEPT),
    LAST: Row("round 3", "round_2", KEPT),
    "teacher": Row("clusters of the teacher: round 1", TEACHER, KEPT),
    TRUTH: Row("labels of the corpora", TRUTH),
}
CHOICES = {
    LABEL_FREE: ROUNDS[LABEL_FREE],
    "one": Row("clusters of that student", LABEL_FREE, KEPT),
    "two": Row("of two utterances at least", LABEL_FREE, ("smallest=2",)),
    "heavy": Row("weight of the labels 1", LABEL_FREE, KEPT, 1.0),
    TRUTH: Row("labels of the corpora", TRUTH),
    "many": Row("300 clusters", LABEL_FREE, (*KEPT, "speakers=300")),
    "most": Row("500 clusters", LABEL_FREE, (*KEPT, "speakers=500")),
    "teacher": Row("clusters of the teacher", TEACHER, KEPT),
}


@dataclass(frozen=True)
class Table:
    """Rows, and what their students learn from and are tested on.

    Attributes:
        truth: manifest of the speech with its speakers.
    """

    study: Study
    rows: dict[str, Row]
    truth: str
    heads: dict[str, str]
    steps: int
    tiny: bool

    def methods(self, seed: int) -> dict[str, Method]:
        """The rows as papers.py has them: the file of labels of each names the student that it follows from."""
        found: dict[str, Method] = {}
        for name, row in self.rows.items():
            losses, settings = ("contrastive", "ntxent"), TEMPERATURES
            if row.before:
                losses = (*losses, "aam")
                settings = (*settings, f"loss.weights.aam={row.weight}", f"labels={self._labels(row, found, seed)}")
            found[name] = Method("pseudo_label", row.title, losses, settings, steps=self.steps, cache=GRID)
        return found

    def _labels(self, row: Row, methods: dict[str, Method], seed: int) -> str:
        if row.before == TRUTH:
            return self.truth
        source = replace(self.study, methods=methods).folder(row.before, seed) if row.before in methods else row.before
        return "-".join([source, *(setting.replace("=", "") for setting in row.clustering)]) + ".csv"

    def of(self, seed: int) -> Study:
        """The study of one seed."""
        found = replace(self.study, methods=self.methods(seed))
        return found.tiny() if self.tiny else found

    def run(self, seeds: int, names: Sequence[str] = ()) -> None:
        """Train what is not finished, seed after seed.

        Args:
            names: rows; by default all of them.
        """
        for seed in range(seeds):
            study = self.of(seed)
            for name in names or self.rows:
                row = self.rows[name]
                if study.runs.get(study.key(name), seed) is not None:
                    continue
                if not (study.work / GRID / "COMPLETE.json").is_file():
                    papers.extract(study, GRID)
                found = {}
                if row.before:
                    labels = next(s for s in study.methods[name].settings if s.startswith("labels=")).partition("=")[2]
                    self._cluster(study, row, labels, seed)
                    found = agreement(study.work / labels, study.work / self.truth)
                papers.train(study, name, seed)
                kept = study.runs.get(study.key(name), seed)
                study.runs.keep(study.key(name), seed, {**kept, "clusters": found})

    def _cluster(self, study: Study, row: Row, labels: str, seed: int) -> None:
        """The file of labels of a row, from the student that it follows from, which is trained where it is missing."""
        if (study.work / labels).is_file():
            return
        cache = GRID
        if row.before != TEACHER:
            folder = study.folder(row.before, seed)
            if not (study.work / folder / "model.json").is_file():
                papers.train(study, row.before, seed)
            cache = f"{folder}-own"
            given = ("teacher=checkpoint", f"teacher.weights={folder}", f"manifest={NOBODY}", "view=full")
            spkd(study.work, study.threads, "extract", *given, f"cache={cache}")
        printed = spkd(study.work, study.threads, "cache", "cluster", cache, "--out", labels, *row.clustering)
        print(printed, end="", flush=True)

    def finished(self, seeds: int) -> dict[str, list[dict]]:
        """Records of the finished runs by row."""
        found: dict[str, list[dict]] = {}
        for seed in range(seeds):
            study = self.of(seed)
            for name in self.rows:
                if (one := study.runs.get(study.key(name), seed)) is not None:
                    found.setdefault(name, []).append(one)
        return found

    def teacher(self) -> dict:
        """Record of the teacher on the lists."""
        kept = self.study.runs.get(TEACHER, 0)
        if kept is None:
            model = ("model=dvector", f"model.weights={self.study.weights}")
            kept = {"method": TEACHER, **papers.evaluated(self.of(0), "teacher-eval", *model)}
            self.study.runs.keep(TEACHER, 0, kept)
        return kept

    def report(self, seeds: int) -> dict[str, Any]:
        """Figures of the table."""
        records = self.finished(seeds)
        study = self.of(0)
        methods = papers.rows(study, records)
        for name, runs in records.items():
            clusters = [run["clusters"] for run in runs if run.get("clusters")]
            methods[name]["clusters"] = {key: spread([c[key] for c in clusters]) for key in (clusters or [{}])[0]}
        teacher = self.teacher()
        return {
            "teacher": {name: round(teacher["lists"][name]["eer_percent"], 3) for name in self.heads},
            "methods": methods,
        }


def rule(choices: Table) -> list[dict[str, Any]]:
    """Clusters of the speakers kept aside by the embeddings of the teacher and of a student that was trained on others;
    their number is chosen by `spkd cache cluster`."""
    study = choices.of(0)
    models = {
        "teacher": ("teacher=dvector", f"teacher.weights={study.weights}"),
        "student": ("teacher=checkpoint", f"teacher.weights={study.folder(LABEL_FREE, 0)}"),
    }
    found = []
    for name, (manifest, _) in study.lists.items():
        with open(manifest, newline="") as file:
            speakers = len({row["speaker"] for row in csv.DictReader(file)})
        for whose, model in models.items():
            cache = f"{RULE}-{name}-{whose}"
            if not (study.work / f"{cache}.csv").is_file():
                spkd(
                    study.work, study.threads, "extract", *model, f"manifest={manifest}", f"cache={cache}", "view=full"
                )
                spkd(study.work, study.threads, "cache", "cluster", cache, "--out", f"{cache}.csv")
            row = {"list": name, "embeddings": whose, "speakers": speakers}
            found.append(row | agreement(study.work / f"{cache}.csv", manifest))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {
        "mean": round(statistics.fmean(values), 4),
        "sd": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
    }


def agreement(labels: Path, truth: Path) -> dict[str, float]:
    """Agreement of a file of labels with the speakers of a manifest, over the utterances that have a label."""
    with open(truth, newline="") as file:
        speaker = {row["utt"]: row["speaker"] for row in csv.DictReader(file)}
    given = {utterance: who for _, utterance, who in read_labels(labels)}
    pairs = [(given[utterance], speaker[utterance]) for utterance in speaker if utterance in given]
    a, b = (np.unique(names, return_inverse=True)[1] for names in zip(*pairs, strict=True))
    return {
        "clusters": len(set(a.tolist())),
        "left_out": len(speaker) - len(pairs),
        "purity": purity(a, b),
        "nmi": normalised_mutual_information(a, b),
    }


def table(result: dict[str, Any], heads: dict[str, str]) -> str:
    """A table of docs/results.md."""
    cells = ["", "clusters", "left out", "purity", "NMI", "steps", "seeds", *(f"{h}, EER (%)" for h in heads.values())]
    cells.append("mean, EER (%)")
    lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
    teacher = [result["teacher"][name] for name in heads]
    lines.append(f"| teacher | | | | | | | {' | '.join(f'{r:.2f}' for r in [*teacher, statistics.fmean(teacher)])} |")
    for found in result["methods"].values():
        of = found["clusters"]
        shown = [f"{of[key]['mean']:,.0f}" if of else "" for key in ("clusters", "left_out")]
        shown += [f"{of[key]['mean']:.3f}" if of else "" for key in ("purity", "nmi")]
        cells = [found["title"], *shown, f"{found['steps']:,}", str(found["seeds"])]
        rates = [found[name]["eer_percent"] for name in heads]
        seeds = [statistics.fmean(each) for each in zip(*(rate["seeds"] for rate in rates), strict=True)]
        for each in [*(rate["seeds"] for rate in rates), seeds]:
            cells.append(
                f"{statistics.fmean(each):.2f}" + (f" ± {statistics.stdev(each):.2f}" if len(each) > 1 else "")
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rounds(result: dict[str, Any]) -> str:
    """The table of the rounds."""
    return table(result, HEADS)


def choices(result: dict[str, Any]) -> str:
    """The table of the choices."""
    return table(result["aside"], ASIDE)


def without_speakers(work: Path, manifest: str) -> None:
    """Write the manifest NOBODY of the same speech without its speakers."""
    with open(work / manifest, newline="") as file:
        papers.write_manifest(
            work / NOBODY, [{k: v for k, v in row.items() if k != "speaker"} for row in csv.DictReader(file)]
        )


def prepared(work: Path, given: Any, name: str, lists: Lists, views: tuple[str, ...]) -> Study:
    """A study with its folder, its manifest without speakers and its lists."""
    runs = Runs(work / "runs.json" if given.tiny else given.runs.with_name(f"{given.runs.stem}{name}.json"))
    papers.write_tested(work, lists)
    caches = {GRID: CachePlan(views, manifest=NOBODY)}
    return Study(work, given.data, given.teacher, lists, {}, caches, runs)


def tables(given: Any) -> tuple[Table, Table]:
    """The table of the rounds, and that of the choices."""
    work, aside = given.work, given.work / "aside"
    aside.mkdir(parents=True, exist_ok=True)
    train = [row for corpus in papers.TRAINED_ON for row in corpus_rows(given.data, corpus)]
    papers.write_manifest(work / "train.csv", train)
    kept_aside = {name: found for name, found in lists_aside(given.data, aside).items() if name in ASIDE}
    without_speakers(work, "train.csv")
    without_speakers(aside, "others.csv")
    tested = {name: (given.data / manifest, given.data / trials) for name, (manifest, trials) in LISTS.items()}
    rows = {name: CHOICES[name] for name in (LABEL_FREE, "one")} if given.tiny else CHOICES
    return (
        Table(prepared(work, given, "", tested, VOICES), ROUNDS, "train.csv", HEADS, STUDENT_STEPS, given.tiny),
        Table(prepared(aside, given, "_aside", kept_aside, FEW), rows, "others.csv", ASIDE, STUDENT_STEPS, given.tiny),
    )


def rules(result: dict[str, Any]) -> str:
    """The table of the rule that chooses the number of clusters."""
    lines = ["| speakers kept aside | embeddings | speakers | clusters | purity | NMI |", "|---" * 6 + "|"]
    for row in result[RULE]:
        figures = f"{row['speakers']} | {row['clusters']} | {row['purity']:.3f} | {row['nmi']:.3f}"
        lines.append(f"| {ASIDE[row['list']]} | of the {row['embeddings']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    options = papers.training_options(__doc__, "pseudo_label")
    given = record.parse(options, seeds=1)
    given.work.mkdir(parents=True, exist_ok=True)
    of_rounds, of_choices = tables(given)
    if not given.report:
        if not given.methods:
            of_choices.run(SEEDS_ASIDE)
            of_choices.study.runs.keep(RULE, 0, {"rows": rule(of_choices)})
        of_rounds.run(given.seeds, given.methods or ())
    result = of_rounds.report(given.seeds) | {"aside": of_choices.report(SEEDS_ASIDE)}
    result[RULE] = (of_choices.study.runs.get(RULE, 0) or {"rows": []})["rows"]
    records = of_rounds.finished(given.seeds)
    result["differences"] = {
        name: papers.compare(runs[:shared], records[LABEL_FREE][:shared])
        for name, runs in records.items()
        if name != LABEL_FREE and (shared := min(len(runs), len(records[LABEL_FREE])))
    }
    print(table(result, HEADS), table(result["aside"], ASIDE), sep="\n\n")
    record.keep("pseudo_label", result | {"pseudo_label_minus_label_free": result["differences"].get(LAST)}, given.tiny)


if __name__ == "__main__":
    main()
