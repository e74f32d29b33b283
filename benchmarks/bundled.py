"""The small student that comes with spkd: how it is made, and what it is worth.

Runs the commands a user would run, with the pretrained GE2E d-vector as teacher, on the training speakers of
recipe.py: the recipe best-mini was chosen on those that it keeps aside (25 of speechocean, 33 of LibriSpeech), which
here give the calibration. The student is written with half the bits and without its classifier, into `--out`, which a
wheel carries, with its calibration and its card. All that is measured is measured on that very file.

    python benchmarks/bundled.py --data DIR --teacher FILE

DIR holds librispeech-mini, speechocean-mini, unlabelled-mini and arabic-commands-mini. After an interruption the same
command continues. Prints the tables of docs/bundled.md and, as its last line, one JSON object; keeps it in
benchmarks/results/bundled.json:
- aside: EER (%) on the speakers kept aside, and on Arabic commands across recording sessions.
- lists: of the student, on the test lists: EER with its 95 % interval over speakers, Cllr, misses and false alarms at
  the threshold of its calibration.
- enrolments: the same for people enrolled from 1 to 3 recordings, by `spkd enrol` (the mean of the cosines).
- identification: groups of ten speakers of test-short, by the commands `spkd enrol` and `spkd identify`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import record
from commands import Lists, spkd
from papers import HEADS, LISTS
from recipe import lists as aside_lists

from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.eval.calibration import Calibration
from spkd.eval.metrics import cllr, curve, min_cllr
from spkd.eval.trials import read_scores
from spkd.files.vectors import read_vectors
from spkd.students import Training, load_student, save_student
from spkd.teachers.bundled import CARD, FOLDER

CALIBRATED_ON = ("speechocean", "librispeech")
TRAINED_ON = "english.csv"
LIST_OF_IDENTIFICATION, GROUP, ENROLLED = "test_short", 10, 2  # speakers of a group, recordings of an enrolment
LONG = ("extract", "train")
COUNTED = ("enrolled", "nearest", "named", "nobody", "strangers", "taken")
THRESHOLDS = ("eer", "false_alarm_0.01")
ENROLMENTS = (1, 2, 3)  # recordings
MOST_ENROLMENTS = 6  # of a speaker, with each number of recordings
SPEECH = {  # corpus -> its name, licence and authors
    "librispeech-mini": ("LibriSpeech", "CC BY 4.0", "V. Panayotov, G. Chen, D. Povey, S. Khudanpur"),
    "speechocean-mini": ("speechocean762", "free for commercial and non-commercial use", "J. Zhang et al."),
}
TEACHER = "the GE2E d-vector of the package resemblyzer 0.1.4, Apache-2.0"


@dataclass(frozen=True)
class Maker:
    """Commands in one folder.

    Attributes:
        work: folder of caches and students.
        weights: weights of the teacher.
        tiny: whether all runs in this process.
        extracted: settings of `spkd extract`.
        trained: settings of `spkd train`.
        thresholds: thresholds of the identification.
    """

    work: Path
    weights: Path
    tiny: bool
    extracted: tuple[str, ...] = ()
    trained: tuple[str, ...] = ("precision=bf16",)
    thresholds: tuple[str, ...] = THRESHOLDS

    def spkd(self, *arguments: str) -> str:
        """What a command prints; those that take long run in a process of their own."""
        return spkd(self.work, int(arguments[0] in LONG and not self.tiny), *arguments)


def write_speech(data: Path, work: Path) -> Lists:
    """Write the manifest of the training speech, and manifest and trials of the speakers kept aside, of whom some give
    the list of the calibration. Returns the lists."""
    aside = aside_lists(data, work)
    (work / "others.csv").replace(work / TRAINED_ON)
    pairs = [aside[name] for name in CALIBRATED_ON]
    Manifest(tuple(one for path, _ in pairs for one in Manifest.load(path))).save(work / "calibration.csv")
    (work / "calibration.txt").write_text("".join(path.read_text() for _, path in pairs))
    return aside


def rates(maker: Maker, model: str, lists: Lists) -> dict[str, float]:
    """EER (%) of every list."""
    found = {}
    for name, (manifest, trials) in lists.items():
        out = f"aside-{model}/{name}"
        maker.spkd("eval", str(trials), f"manifest={manifest}", f"model={model}", f"out={out}", "bootstrap=0")
        found[name] = json.loads((maker.work / out / "report.json").read_text())["results"]["eer_percent"]
    return found


def compact(trained: Path, out: Path) -> None:
    """Write a student with half the bits, without its classifier and without what is of this machine alone."""
    student = load_student(trained)
    facts = student.training.settings
    settings = {name: facts[name] for name in ("losses", "batch_size", "teacher_families", "vad") if name in facts}
    training = Training(
        settings,
        student.training.steps,
        people=student.training.people,
        teacher_people=student.training.teacher_people,
    )
    shutil.rmtree(out, ignore_errors=True)
    network = student.network.half()
    save_student(out, replace(student, network=network, head=None, classes=[], scale=1.0, training=training))


def units(maker: Maker, model: str, manifest: Path, out: str) -> dict[str, np.ndarray]:
    """Embeddings of length 1 by the name of the utterance, float64."""
    maker.spkd("embed", str(manifest), f"model={model}", f"out={out}.npy")
    found = {name: vector.astype(np.float64) for name, vector in read_vectors(maker.work / f"{out}.npy")}
    return {name: vector / np.linalg.norm(vector) for name, vector in found.items()}


def costs(ratios: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """Cllr (bits), and misses and false alarms (%) at a threshold, of log-likelihood ratios."""
    errors, targets = curve(ratios, labels), labels.astype(bool)
    return {
        "cllr": round(cllr(errors), 4),
        "min_cllr": round(min_cllr(errors), 4),
        "miss_percent": round(100 * float((ratios[targets] < threshold).mean()), 2),
        "false_alarm_percent": round(100 * float((ratios[~targets] >= threshold).mean()), 2),
    }


def measured(maker: Maker, model: str, name: str, manifest: Path, trials: Path) -> dict[str, Any]:
    """A list: EER and its interval, and what the calibration is worth."""
    out = f"eval-{name}"
    given = (f"manifest={manifest}", f"model={model}", f"calibration={model}/calibration.json", f"out={out}")
    maker.spkd("eval", str(trials), *given, f"bootstrap={20 if maker.tiny else 1000}")
    report = json.loads((maker.work / out / "report.json").read_text())
    listed, ratios = read_scores(maker.work / out / "scores.txt")
    assert listed.label is not None
    thresholds = Calibration.load(maker.work / model / "calibration.json").thresholds
    return {
        "eer_percent": round(report["results"]["eer_percent"], 2),
        "interval": [round(edge, 2) for edge in report["intervals"]["eer_percent"]],
        "trials": len(ratios),
        "speakers": report["trials"]["speakers"],
        **costs(ratios, listed.label, thresholds["eer"]),
    }


def enrolments(speakers: Mapping[str, list[str]], size: int) -> dict[str, list[tuple[str, ...]]]:
    """Some sets of recordings of each speaker, drawn by a seed."""
    random = np.random.RandomState(size)
    found = {}
    for speaker, utterances in sorted(speakers.items()):
        sets = list(combinations(utterances, size))
        found[speaker] = [sets[i] for i in sorted(random.permutation(len(sets))[:MOST_ENROLMENTS])]
    return found


def averaged(
    maker: Maker, embedded: Mapping[str, np.ndarray], manifest: Path, trials: Path, calibration: Calibration
) -> Iterator[dict[str, Any]]:
    """What the calibration of single recordings is worth for people of several.

    The score is the mean of the cosines of a recording with those of the person. Tested are all other recordings of the
    person, and those of every speaker with whom the list tries the person.
    """
    speaker_of = {one.id: one.speaker for one in Manifest.load(manifest)}
    speakers: dict[str, list[str]] = {}
    for name, speaker in speaker_of.items():
        speakers.setdefault(speaker, []).append(name)
    pairs = {tuple(speaker_of[name] for name in line.split()[1:]) for line in trials.read_text().splitlines()}
    pairs |= {(b, a) for a, b in pairs}
    for size in ENROLMENTS:
        scores, labels = [], []
        for speaker, sets in enrolments(speakers, size).items():
            for chosen in sets:
                mean = np.mean([embedded[name] for name in chosen], 0)
                tested = [n for n, who in speaker_of.items() if n not in chosen and (speaker, who) in pairs]
                scores += [float(mean @ embedded[name]) for name in tested]
                labels += [int(speaker_of[name] == speaker) for name in tested]
        if 0 < sum(labels) < len(labels):
            ratios = calibration({"score": np.array(scores)})
            found = costs(ratios, np.array(labels), calibration.thresholds["eer"])
            yield {"recordings": size, "targets": sum(labels), "non_targets": len(labels) - sum(labels), **found}


def identified(maker: Maker, model: str, manifest: Path) -> dict[str, Any]:
    """Recordings of enrolled speakers and of strangers, and how `spkd identify` names them, over groups of speakers."""
    recorded: dict[str, list[str]] = {}
    for one in Manifest.load(manifest):
        recorded.setdefault(one.speaker, []).append(str(one.path))
    names = sorted(recorded)
    enrolled = min(ENROLLED, len(recorded[names[0]]) - 1)
    refused, rows = 0, {threshold: dict.fromkeys(COUNTED, 0) for threshold in maker.thresholds}
    for number, first in enumerate(range(0, len(names), GROUP)):
        settings, there = (f"model={model}", f"voices=voices-{number}.json"), set()
        (maker.work / f"voices-{number}.json").unlink(missing_ok=True)
        group = names[first : first + GROUP]
        for name in group:
            try:
                maker.spkd("enrol", f"person-{name}", *recorded[name][:enrolled], *settings)
                there.add(name)
            except SpkdError as error:  # a recording of too little sound
                print(f"{name}: {error}")
                refused += 1
        tested = [(name, path) for name in names if name in there or name not in group for path in recorded[name]]
        tested = [(name, path) for name, path in tested if path not in recorded[name][:enrolled]]
        for threshold, found in rows.items():
            given = (*(path for _, path in tested), f"threshold={threshold}", *settings)
            answers = dict(line.split(": ", 1) for line in maker.spkd("identify", *given).splitlines() if ": " in line)
            for name, path in tested:
                whom, _, ratios = answers[path].partition(" (log-likelihood ratios: ")
                if name in there:
                    found["enrolled"] += 1
                    found["nearest"] += ratios.startswith(f"person-{name} ")
                    found["named"] += whom == f"person-{name}"
                    found["nobody"] += whom == "nobody enrolled"
                else:
                    found["strangers"] += 1
                    found["taken"] += whom.startswith("person-")
    return {"people": len(names) - refused, "refused": refused, "recordings": enrolled, "rows": rows}


def training_speech(manifest: Path, data: Path) -> list[dict[str, Any]]:
    """Speakers, utterances and hours of each corpus in a manifest."""
    rows = []
    for corpus, (title, licence, authors) in SPEECH.items():
        used = [one for one in Manifest.load(manifest) if Path(one.path).is_relative_to(data / corpus)]
        facts = {"corpus": title, "licence": licence, "authors": authors, "utterances": len(used)}
        hours = round(sum(one.duration for one in used) / 3600, 2)
        rows.append(facts | {"speakers": len({one.speaker for one in used}), "hours": hours})
    return rows


def speech_table(result: dict) -> str:
    """Of docs/bundled.md: what it was trained on."""
    lines = ["| speech | speakers | utterances | hours | licence | authors |", "|---|---|---|---|---|---|"]
    for row in result["speech"]:
        cells = (row["corpus"], row["speakers"], f"{row['utterances']:,}", row["hours"], row["licence"], row["authors"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def table(result: dict) -> str:
    """Of docs/bundled.md: the test lists."""
    lines = [
        "| | speakers | trials | EER (%) | 95 % interval | Cllr (bits) | min Cllr | misses (%) | false alarms (%) |",
        "|---" * 9 + "|",
    ]
    for name, row in result["lists"].items():
        low, high = row["interval"]
        cells = (HEADS.get(name, name), row["speakers"], f"{row['trials']:,}", f"{row['eer_percent']:.2f}")
        cells += (f"{low:.2f} to {high:.2f}", *rates_of(row))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def rates_of(row: dict) -> tuple[str, ...]:
    """Cells of what `costs` gives."""
    cells = (f"{row['cllr']:.3f}", f"{row['min_cllr']:.3f}")
    return (*cells, f"{row['miss_percent']:.1f}", f"{row['false_alarm_percent']:.1f}")


def enrolments_table(result: dict) -> str:
    """Of docs/bundled.md: people of several recordings."""
    lines = [
        "| | recordings | target trials | non-target trials | Cllr (bits) | min Cllr | misses (%) | false alarms (%) |",
        "|---" * 8 + "|",
    ]
    for name, rows in result["enrolments"].items():
        for row in rows:
            cells = (HEADS[name], row["recordings"], f"{row['targets']:,}", f"{row['non_targets']:,}", *rates_of(row))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def identification(result: dict) -> str:
    """Of docs/bundled.md: who of ten people."""
    lines = [
        "| `threshold=` | recordings of enrolled people | nearest is right | named rightly | nobody enrolled "
        "| recordings of strangers | taken for one of the ten |",
        "|---" * 7 + "|",
    ]
    for threshold, found in result["identification"]["rows"].items():
        lines.append(f"| `{threshold}` | {' | '.join(str(found[name]) for name in COUNTED)} |")
    return "\n".join(lines)


def card(result: dict) -> str:
    """Content of the model card, whose facts all are of `result`."""
    hours = sum(row["hours"] for row in result["speech"])
    calibrated = result["calibration"]
    return f"""# The model that comes with spkd

A demonstration: a small student that tells speakers apart, so that spkd can be tried without data and without a
network. It was trained on {hours:.1f} hours of speech; for anything that matters, train a student of your own.

- Network: {result["network"]}, {result["parameters"]:,} parameters in 16 bits, {result["bytes"] / 1e6:.2f} MB; Kaldi's
  fbank of 80 bands.
- Teacher: {TEACHER}. Recipe best-mini, {result["steps"]:,} steps.
- Calibration: {calibrated["targets"]:,} target and {calibrated["non_targets"]:,} non-target trials of
  {calibrated["speakers"]} speakers that it was not trained on, within one recording session. Pairs of different
  sessions are harder: {result["aside"]["arabic"]:.1f} % EER on Arabic commands, a language that was in no training.
- Licence: Apache-2.0, the speech below that of its authors. Made by benchmarks/bundled.py.

## Trained on

{speech_table(result)}

## Error rates, on other speakers

{table(result)}

Cllr, misses and false alarms are those of its calibration and its threshold `eer`.
"""


def make(maker: Maker, data: Path, tested: Lists, out: Path) -> dict[str, Any]:
    """Make the model, write it, and measure it."""
    maker.work.mkdir(parents=True, exist_ok=True)
    aside = write_speech(data, maker.work)
    # The student.
    teacher, trained = ("teacher=dvector", f"teacher.weights={maker.weights}"), "student-english"
    recipe, model = ("--recipe", "best-mini"), "shipped"
    maker.spkd("extract", *recipe, *teacher, f"manifest={TRAINED_ON}", "cache=english", *maker.extracted)
    print("extracted", flush=True)
    maker.spkd("train", *recipe, "cache=[english]", f"out={trained}", "loggers=[]", *maker.trained)
    print("trained", flush=True)
    # What is shipped.
    compact(maker.work / trained, maker.work / model)
    force = ("force=true",) if maker.tiny else ()
    maker.spkd("calibrate", "calibration.txt", "manifest=calibration.csv", f"model={model}", *force)
    calibration = Calibration.load(maker.work / model / "calibration.json")
    # What it is worth.
    lists = {name: measured(maker, model, name, *pair) for name, pair in tested.items()}
    embedded = {name: units(maker, model, manifest, f"embedded-{name}") for name, (manifest, _) in tested.items()}
    whole = units(maker, trained, tested[LIST_OF_IDENTIFICATION][0], "embedded-whole")
    student = load_student(maker.work / model)
    trained_on = calibration.trained_on
    result = {
        "aside": rates(maker, model, aside),
        "network": f"{type(student.network).__name__} {student.network.settings}",
        "parameters": sum(values.numel() for values in student.network.parameters()),
        "steps": student.training.steps,
        "bytes": sum(path.stat().st_size for path in (maker.work / model).iterdir()),
        "weights_sha256": student.weights_sha256,
        "least_cosine_of_16_bits": min(float(whole[n] @ v) for n, v in embedded[LIST_OF_IDENTIFICATION].items()),
        "speech": training_speech(maker.work / TRAINED_ON, data),
        "calibration": {
            "targets": trained_on.targets,
            "non_targets": trained_on.non_targets,
            "speakers": len(trained_on.speakers),
            "thresholds": calibration.thresholds,
        },
        "lists": lists,
        "enrolments": {
            name: list(averaged(maker, embedded[name], *pair, calibration)) for name, pair in tested.items()
        },
        "identification": identified(maker, model, tested[LIST_OF_IDENTIFICATION][0]),
    }
    (maker.work / model / CARD).write_text(card(result))
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(maker.work / model, out)
    return result


def main() -> None:
    options = record.options(__doc__, "bundled", data=True)
    options.add_argument("--out", type=Path, default=FOLDER, help="folder of the model")
    options.add_argument(
        "--identify", action="store_true", help="identify again, by the model that is there; all else stays as it was"
    )
    given = record.parse(options)
    maker = Maker(given.work, given.teacher, given.tiny)
    if given.tiny:
        maker = replace(
            maker, thresholds=("eer",), extracted=("view=full:2",), trained=("steps=2", "batch_size=8", "crop=0.5")
        )
        given.out = given.work / "out"
    tested = {name: (given.data / manifest, given.data / trials) for name, (manifest, trials) in LISTS.items()}
    if given.identify:
        given.work.mkdir(parents=True, exist_ok=True)
        result = record.kept("bundled")
        found = identified(maker, str(given.out), tested[LIST_OF_IDENTIFICATION][0])
        result["identification"] = found | {"commit": record.commit()}
        print(identification(result))
        (record.RESULTS / "bundled.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    result = make(maker, given.data, tested, given.out)
    print(card(result), enrolments_table(result), identification(result), sep="\n\n")
    record.keep("bundled", result, given.tiny)


if __name__ == "__main__":
    main()
