"""The five systems on real speech: every loss against its baselines, at equal student, steps and augmentation.

Runs the commands a user would run (extract, train, eval) on librispeech-mini with the pretrained GE2E d-vector: whole
recordings at seven speeds; then per method and seed one student. All but the methods over self-supervised shapes train
the same x-vector. Unlabelled speech: unlabelled-mini and arabic-commands-mini, its labels left out. Nothing is tuned or
chosen on the test lists. A second call continues the first; a finished run is never trained again.

    python benchmarks/papers.py --data DIR --teacher FILE --seeds 3

DIR is librispeech-mini; the other corpora lie beside it. Prints a table and, as its last line, one JSON object; keeps
both in benchmarks/results/papers.json and makes the table of README.md from it (`--report` does only that).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from machine import describe
from spine import LISTS, SPEEDS, evaluate, spkd

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "papers.json", HERE.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/papers.py -->", "<!-- end -->"
STEPS = 600
XVECTOR = ("student=xvector", "student.channels=96", "student.embedding=256", "crop=2.0")
WIDE = ("student=xvector", "student.channels=192", "student.embedding=256", "crop=2.0")
# At the x-vectors' learning rate (0.002) the loss of fine-tuning alone rose and stayed up in one seed of three.
SSL = (
    *("student=ssl", "student.channels=64", "student.embedding=256", "student.adapters=16"),
    *("crop=1.0", "batch_size=32", "optim.lr=0.001"),
)
KD_FRAMES = ("loss.one_step.targets=[frames.layer3]",)
EVERYWHERE = "cache=[libri,unlabelled,arabic]"
BOTH = ("loss.contrastive.temperature=0.07", "loss.ntxent.temperature=0.07")
MEMO = (
    *("batch_size=32", "loss.memo.locals=2", "loss.memo.local_crop=1.0", "loss.memo.prototypes=2048"),
    *("loss.memo.hidden=512", "loss.memo.bottleneck=128", "loss.memo.momentum=[0.98,1.0]"),
)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    losses: what `--loss` takes. settings: its own. student: the architecture. then: another method, which goes on from
    this student with the second half of the steps.
    """

    title: str
    losses: tuple[str, ...]
    settings: tuple[str, ...] = ()
    student: tuple[str, ...] = XVECTOR
    then: Method | None = None


def multilevel(levels: str, *more: str) -> tuple[str, ...]:
    return (f"loss.multilevel.levels={{{levels}}}", *more)


METHODS = {
    "no_teacher": Method("no teacher (AAM-softmax)", ("aam",)),
    "ntxent": Method("no teacher, no labels (NT-Xent)", ("ntxent",), ("loss.ntxent.temperature=0.1",)),
    "cosine": Method("cosine", ("cosine",)),
    "mse": Method("MSE", ("mse",)),
    "relational": Method("relational", ("relational",)),
    "kld": Method("KLD over prototypes", ("kld",)),
    "contrastive": Method("contrastive", ("contrastive",)),
    "contrastive_mined": Method("contrastive, mined negatives", ("contrastive",), ("mining.negatives=16",)),
    "contrastive_unlabelled": Method("contrastive, unlabelled speech added", ("contrastive",), (EVERYWHERE,)),
    "nontarget": Method("non-target over prototypes", ("nontarget",)),
    "multilevel_frame": Method(
        "multilevel: embedding, frames", ("multilevel",), multilevel("embedding: embedding, frames: frames.layer3")
    ),
    "multilevel_stats": Method(
        "multilevel: embedding, statistics", ("multilevel",), multilevel("embedding: embedding, stats: stats")
    ),
    "multilevel_concatenated": Method(
        "multilevel: concatenated", ("multilevel",), multilevel("", "loss.multilevel.concat=[stats,embedding]")
    ),
    "one_step": Method("one-step (SSL shape)", ("one-step",), KD_FRAMES, SSL),
    "two_step": Method(
        "two-step (SSL shape)",
        ("one-step",),
        (*KD_FRAMES, "loss.one_step.finetune_weight=0"),
        SSL,
        then=Method("", ("aam",), (), SSL),
    ),
    "dino": Method("DINO, no labels", ("memo",), (*MEMO, "loss.memo.partner=none", "loss.memo.contrastive_weight=0")),
    "memo": Method("MeMo, no labels", ("memo",), (*MEMO, "loss.memo.partner=tiny")),
    "no_teacher_wide": Method("no teacher (AAM-softmax), wider student", ("aam",), (), WIDE),
    "best": Method("contrastive and NT-Xent", ("contrastive", "ntxent"), BOTH),
    "best_wide": Method("contrastive and NT-Xent, wider student", ("contrastive", "ntxent"), BOTH, WIDE),
}


# The last ones, so that the others can be looked at early.
COSTLY = ("one_step", "two_step", "dino", "memo", "no_teacher_wide", "best_wide")


def corpora(work: Path, data: Path) -> dict[str, Path]:
    """The manifests; that of the Arabic corpus without its labels."""
    labelled = data.parent / "arabic-commands-mini" / "train.csv"
    arabic = work / "arabic.csv"
    with open(labelled, newline="") as source, open(arabic, "w", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["utt", "path", "duration"])
        for row in csv.DictReader(source):
            rows.writerow([row["utt"], labelled.parent / row["path"], row["duration"]])
    return {
        "libri": data / "train.csv",
        "unlabelled": data.parent / "unlabelled-mini" / "train.csv",
        "arabic": arabic,
    }


def extract(work: Path, weights: Path, name: str, manifest: Path) -> None:
    targets = ["teacher.targets=[embedding,stats,frames.layer3]", "wave=true"] if name == "libri" else []
    common = ("teacher=dvector", f"teacher.weights={weights}", f"manifest={manifest}", f"cache={name}", SPEEDS)
    spkd(work, 1, "extract", *common, "fbank=true", *targets)
    print(f"extracted {name}", flush=True)


def scores(work: Path, name: str, seed: int) -> Path:
    """Where the reports of a finished student lie."""
    return work / f"{name}-{seed}-eval" / "reports.json"


def train(work: Path, data: Path, name: str, seed: int, steps: int) -> dict[str, dict]:
    """One student of a method, trained and scored; its reports on both lists."""
    method, folder, init, left = METHODS[name], f"{name}-{seed}", "", steps
    scored = scores(work, name, seed)
    if scored.is_file():
        return json.loads(scored.read_text())
    started = time.time()
    while True:
        count = left // 2 if method.then else left
        losses = [argument for loss in method.losses for argument in ("--loss", loss)]
        cache = () if any(s.startswith("cache=") for s in method.settings) else ("cache=libri",)
        settings = (*cache, *method.student, *method.settings, f"steps={count}", f"seed={seed}", f"out={folder}")
        spkd(work, 1, "train", *losses, *settings, *((f"student.init={init}",) if init else ()))
        if method.then is None:
            break
        method, init, folder, left = method.then, folder, f"{folder}-then", left - count
    print(f"trained {name}-{seed} in {time.time() - started:.0f} s", flush=True)
    reports = evaluate(work, data, 1, f"{name}-{seed}-eval", f"model={folder}")
    record = json.loads((work / folder / "model.json").read_text())["training"]
    for report in reports.values():
        report["memo"] = record.get("memo")
    scored.write_text(json.dumps(reports))
    return reports


def row(reports: list[dict[str, dict]]) -> dict[str, dict]:
    """Mean and standard deviation over the seeds, by list."""
    found: dict[str, dict] = {}
    for name in LISTS:
        results = [report[name]["results"] for report in reports]
        found[name] = {}
        for key, figures in (("eer_percent", 3), ("min_dcf_0.01", 4)):
            values = [result[key] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name][key] = {"mean": round(statistics.mean(values), figures), "sd": round(spread, figures)}
            found[name][key]["seeds"] = [round(value, figures) for value in values]
    return found


def mean_eer(found: dict[str, dict]) -> float:
    return statistics.mean(found[name]["eer_percent"]["mean"] for name in LISTS)


def table(result: dict) -> str:
    """README's table."""
    heads = ("", "parameters", "steps", "seeds", "test-other, EER (%)", "minDCF", "test-short, EER (%)", "minDCF")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for found in result["methods"].values():
        cells = [found["title"], f"{found['parameters'] / 1e6:.2f} M", str(found["steps"]), str(found["seeds"])]
        for name in LISTS:
            eer, cost = found[name]["eer_percent"], found[name]["min_dcf_0.01"]
            spread = f" ± {eer['sd']:.2f}" if found["seeds"] > 1 else ""
            cells += [f"{eer['mean']:.2f}{spread}", f"{cost['mean']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_readme() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    made = table(json.loads(RESULTS.read_text()))
    README.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="the folder librispeech-mini")
    options.add_argument("--teacher", type=Path, required=True, help="weights of the GE2E d-vector")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--jobs", type=int, default=2, help="students trained side by side, one thread each")
    options.add_argument("--work", type=Path, default=HERE / "work" / "papers")
    options.add_argument("--report", action="store_true", help="train nothing; the table of what is finished")
    given = options.parse_args()
    data, weights, work = given.data.resolve(), given.teacher.resolve(), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    jobs = [
        (name, seed)
        for costly in (False, True)
        for seed in range(given.seeds)
        for name in given.methods
        if (name in COSTLY) == costly and (not given.report or scores(work, name, seed).is_file())
    ]
    with ThreadPoolExecutor(given.jobs) as pool:
        for done in [pool.submit(extract, work, weights, *corpus) for corpus in corpora(work, data).items()]:
            done.result()
        runs = {job: pool.submit(train, work, data, *job, given.steps) for job in jobs}
        reports = {key: run.result() for key, run in runs.items()}
    teacher = evaluate(work, data, os.cpu_count() or 1, "teacher-eval", "model=dvector", f"weights={weights}")

    methods = {}
    for name in given.methods:
        found = [reports[name, seed] for seed in range(given.seeds) if (name, seed) in reports]
        if not found:
            continue
        one = found[0]["test_other"]
        methods[name] = {
            "title": METHODS[name].title,
            "parameters": one["models"][-1]["parameters"],
            "steps": given.steps,
            "seeds": len(found),
            **row(found),
        }
        if one["memo"] is not None:
            methods[name]["memo"] = [f["test_other"]["memo"] for f in found]
    result = {
        "teacher": {name: teacher[name]["results"]["eer_percent"] for name in LISTS},
        "methods": methods,
        "machine": describe(),
    }
    for name, found in methods.items():
        cells = "   ".join(
            f"{found[x]['eer_percent']['mean']:6.2f} {found[x]['eer_percent']['sd']:5.2f}" for x in LISTS
        )
        print(f"{name:26} {cells}   mean {mean_eer(found):5.2f}")
    if set(given.methods) == set(METHODS):
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        write_readme()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
