"""The five systems, newer ones and their baselines on real speech, at equal student, steps, views and augmentation.

Runs the commands a user would run (extract, train, eval) with the pretrained GE2E d-vector as teacher. Trained on
librispeech-mini and speechocean-mini together (308 speakers, 1.8 h), tested on speakers of their own: LibriSpeech
test-other and test-short, and speechocean's (trials of the same sex and age group). Nothing is tuned or chosen on a
test list; what was chosen was chosen on 58 of the training speakers (`recipes` in docs/losses.md).

    python benchmarks/papers.py --data DIR --teacher FILE --seeds 3

DIR holds the folders librispeech-mini, speechocean-mini and noise. A second call continues the first; a finished run
is never trained again. `--groups` and `--methods` choose a part, `--report` only makes tables of what is finished.
Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/papers.json and makes the tables
of README.md and docs/results.md from it.

Groups:
- losses: every loss with the same x-vector.
- levels: a wide x-vector, distilled and trained with labels on the same speech, teaches a narrow one of the same
  context: multilevel (arXiv 2303.01125), and, as it has a head over the training speakers, the losses over logits
  (arXiv 2309.14838, 2601.14699).
- ssl: one-step against two-step with a small self-supervised shape, DINO and MeMo.
- amounts: LibriSpeech and growing amounts of speechocean's speech without labels.
- views: what each kind of view brings.
- sizes: the recipe best-mini at several sizes, beside students without a teacher and without labels.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from machine import describe
from matplotlib.figure import Figure
from spine import evaluate, spkd

from spkd.eval.bootstrap import SpeakerTrials
from spkd.eval.metrics import Ranking, eer
from spkd.eval.trials import read_scores

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "papers.json"
README, DOC = HERE.parent / "README.md", HERE.parent / "docs" / "results.md"
FIGURE = HERE.parent / "docs" / "frontier.svg"
BEGIN, END = "<!-- made by benchmarks/papers.py -->", "<!-- end -->"
LISTS = {
    "test_other": ("librispeech-mini/test-other.csv", "librispeech-mini/trials-test-other.txt"),
    "test_short": ("librispeech-mini/test-short.csv", "librispeech-mini/trials-test-short.txt"),
    "speechocean": ("speechocean-mini/test.csv", "speechocean-mini/trials-test.txt"),
}
HEADS = {"test_other": "test-other", "test_short": "test-short", "speechocean": "speechocean"}
TRAINED_ON = ("librispeech-mini", "speechocean-mini")
METRICS = ("eer_percent", "min_dcf_0.01")
STEPS, RESAMPLINGS = 600, 300
AMOUNTS = (0, 250, 500, 1000)  # utterances of unlabelled speech of the kind that is tested
SPEEDS = "[0.75,0.8,0.85,0.9,0.95,1.0,1.05,1.1,1.15,1.2,1.25,1.3]"
FORMANTS = "[0.84,0.88,0.92,0.96,1.0,1.04,1.08,1.12,1.16,1.19]"
VOICES = ("view=full:8", f"view.speeds={SPEEDS}", f"view.formants={FORMANTS}")
FEW = ("view=full:4", f"view.speeds={SPEEDS}")
FAST = ("precision=bf16", "loggers=[csv]")


@dataclass(frozen=True)
class CachePlan:
    """A cache. views: settings of `spkd extract`; DATA stands for the folder of the corpora. teacher: another method of
    this file, whose first student it is; None: the d-vector. manifest: of the speech."""

    views: tuple[str, ...]
    targets: str = "embedding"
    teacher: str | None = None
    manifest: str = "train.csv"


CACHES = {
    "voices": CachePlan((*VOICES, "wave=true"), "embedding,stats,frames.layer3"),
    "xvector": CachePlan((*VOICES, "storage.codecs={frames: int8}"), "embedding,stats,segment.a,frames,logits", "wide"),
    "libri": CachePlan(VOICES, manifest="libri.csv"),
    **{f"amount_{n}": CachePlan(VOICES, manifest=f"amount_{n}.csv") for n in AMOUNTS if n},
    "speeds4": CachePlan(FEW),
    "voices4": CachePlan((*FEW, f"view.formants={FORMANTS}")),
    "noise4": CachePlan((*FEW, "view.noise=DATA/noise/noise", "view.rir=DATA/noise/rir_sim")),
    "coders4": CachePlan((*FEW, "view.coders=[g711,gsm,opus,mp3]")),
    "mixed4": CachePlan(
        (*FEW, "view.noise=DATA/speechocean-mini/audio/train", "view.noise_prob=0.5", "view.snr=[0,10]")
    ),
}


def xvector(channels: int) -> tuple[str, ...]:
    return ("student=xvector", f"student.channels={channels}", "student.embedding=256", *FAST)


STUDENT, NARROW, WIDE = xvector(64), xvector(32), xvector(256)
# At the x-vectors' learning rate (0.002) the loss of fine-tuning alone rose and stayed up in one seed of three.
SSL = (
    *("student=ssl", "student.channels=64", "student.embedding=256", "student.adapters=16"),
    *("crop=1.0", "batch_size=32", "optim.lr=0.001", *FAST),
)
TEMPERATURES = ("loss.contrastive.temperature=0.07", "loss.ntxent.temperature=0.07")
MEMO = (
    *("batch_size=32", "loss.memo.locals=2", "loss.memo.local_crop=1.0", "loss.memo.prototypes=2048"),
    *("loss.memo.hidden=512", "loss.memo.bottleneck=128", "loss.memo.momentum=[0.98,1.0]"),
)


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    losses: what `--loss` takes. settings: its own. student: the architecture. steps: times STEPS. cache: which it
    learns from. then: another method, which goes on from this student with the second half of the steps.
    """

    group: str
    title: str
    losses: tuple[str, ...]
    settings: tuple[str, ...] = ()
    student: tuple[str, ...] = STUDENT
    steps: int = 1
    cache: str = "voices"
    then: Method | None = None

    @property
    def caches(self) -> set[str]:
        """By name."""
        return set(self.cache.strip("[]").split(","))


def levels(pairs: str, *more: str) -> tuple[str, ...]:
    return (f"loss.multilevel.levels={{{pairs}}}", *more)


def narrow(title: str, loss: str, *settings: str) -> Method:
    """A narrow x-vector taught by the wide one."""
    return Method("levels", title, (loss,), settings, NARROW, cache="xvector")


ONE = ("contrastive",), TEMPERATURES[:1]
BEST = ("contrastive", "aam"), (*TEMPERATURES[:1], "loss.weights.aam=0.3")
METHODS = {
    "no_teacher": Method("losses", "no teacher (AAM-softmax)", ("aam",)),
    "ntxent": Method("losses", "no teacher, no labels (NT-Xent)", ("ntxent",), TEMPERATURES[1:]),
    "ssps": Method(
        "losses",
        "NT-Xent, positives from other recordings (SSPS)",
        ("ntxent",),
        (*TEMPERATURES[1:], "mining.positives=4", "mining.embeddings=student", "mining.refresh=100"),
    ),
    "cosine": Method("losses", "cosine", ("cosine",)),
    "mse": Method("losses", "MSE", ("mse",)),
    "kld": Method("losses", "KLD over prototypes", ("kld",)),
    "contrastive": Method("losses", "contrastive", *ONE),
    "contrastive_mined": Method("losses", "contrastive, mined negatives", ONE[0], (*ONE[1], "mining.negatives=16")),
    "nontarget": Method("losses", "non-target over prototypes", ("nontarget",)),
    "trkd": Method("losses", "TRKD over prototypes", ("trkd",)),
    "both": Method("losses", "contrastive and NT-Xent", ("contrastive", "ntxent"), TEMPERATURES),
    "with_labels": Method("losses", "contrastive and AAM-softmax", *BEST),
    "class_means": Method("losses", "contrastive with class means", ONE[0], (*ONE[1], "class_means=true")),
    "untaught_long": Method("sizes", "no teacher (AAM-softmax)", ("aam",), steps=4),
    "untaught_both": Method(
        "sizes", "no teacher (AAM-softmax and NT-Xent)", ("aam", "ntxent"), TEMPERATURES[1:], steps=4
    ),
    "best_all": Method(
        "sizes",
        "contrastive, NT-Xent and AAM-softmax",
        ("contrastive", "ntxent", "aam"),
        (*TEMPERATURES, "loss.weights.aam=0.3"),
        steps=4,
    ),
    "label_free": Method("sizes", "contrastive, no labels", *ONE, steps=4),
    **{f"best_{c}": Method("sizes", "contrastive and AAM-softmax", *BEST, xvector(c), 4) for c in (32, 64, 96, 192)},
    "wide": Method("levels", "the teacher: contrastive and AAM-softmax", ("contrastive", "aam"), ONE[1], WIDE, 2),
    "x_no_teacher": Method("levels", "no teacher (AAM-softmax)", ("aam",), (), NARROW),
    "x_embedding": narrow("embedding", "multilevel", *levels("embedding: embedding")),
    "x_segment": narrow("embedding and segment", "multilevel", *levels("embedding: embedding, segment.a: segment.a")),
    "x_stats": narrow("embedding and statistics", "multilevel", *levels("embedding: embedding, stats: stats")),
    "x_frames": narrow("embedding and frames", "multilevel", *levels("embedding: embedding, frames: frames")),
    "x_concatenated": narrow(
        "statistics, segment and embedding concatenated",
        "multilevel",
        *levels("", "loss.multilevel.concat=[stats,segment.a,embedding]"),
    ),
    "x_kld": narrow("KLD", "kld", "loss.kld.logits=head"),
    "x_nontarget": narrow("non-target", "nontarget", "loss.nontarget.logits=head"),
    "x_trkd": narrow("TRKD", "trkd", "loss.trkd.logits=head"),
    "one_step": Method("ssl", "one-step (SSL shape)", ("one-step",), ("loss.one_step.targets=[frames.layer3]",), SSL),
    "two_step": Method(
        "ssl",
        "two-step (SSL shape)",
        ("one-step",),
        ("loss.one_step.targets=[frames.layer3]", "loss.one_step.finetune_weight=0"),
        SSL,
        then=Method("ssl", "", ("aam",), (), SSL),
    ),
    "dino": Method(
        "ssl",
        "DINO, no labels",
        ("memo",),
        (*MEMO, "loss.memo.partner=none", "loss.memo.contrastive_weight=0"),
    ),
    "memo": Method("ssl", "MeMo, no labels", ("memo",), (*MEMO, "loss.memo.partner=tiny")),
    "memo_unstopped": Method(
        "ssl",
        "MeMo, contrast never stopped",
        ("memo",),
        (*MEMO, "loss.memo.partner=tiny", "loss.memo.dynamic_stop=false"),
    ),
    **{
        f"amount_{n}": Method("amounts", f"{n} utterances", *ONE, cache="libri" if not n else f"[libri,amount_{n}]")
        for n in AMOUNTS
    },
    "views_speeds": Method("views", "speeds", *ONE, steps=2, cache="speeds4"),
    "views_voices": Method("views", "speeds and formants", *ONE, steps=2, cache="voices4"),
    "views_noise": Method("views", "speeds, noise and reverberation", *ONE, steps=2, cache="noise4"),
    "views_coders": Method("views", "speeds and coders", *ONE, steps=2, cache="coders4"),
    "views_mixed": Method("views", "speeds, another speaker's voice added", *ONE, steps=2, cache="mixed4"),
}
GROUPS = {
    "losses": "Every loss, the same student",
    "sizes": f"The recipe best-mini at several sizes, {4 * STEPS} steps",
    "levels": "An x-vector teaches a narrow one",
    "ssl": "Self-supervised shapes and self-distillation",
    "amounts": "Unlabelled speech of the tested kind beside LibriSpeech (contrastive, tested on speechocean above all)",
    "views": f"What the views bring (contrastive, four views of each utterance, {2 * STEPS} steps)",
}
# What a paper claims: the first method has the lower EER.
CLAIMS = {
    "2212.03090: contrastive < cosine": ("contrastive", "cosine"),
    "2212.03090: contrastive < MSE": ("contrastive", "mse"),
    "2212.03090: contrastive < KLD": ("contrastive", "kld"),
    "2212.03090: contrastive < NT-Xent": ("contrastive", "ntxent"),
    "2309.14838: non-target < KLD, prototypes": ("nontarget", "kld"),
    "2309.14838: non-target < KLD, head": ("x_nontarget", "x_kld"),
    "2309.14838: KLD < no teacher, head": ("x_kld", "x_no_teacher"),
    "2601.14699: TRKD < non-target, prototypes": ("trkd", "nontarget"),
    "2601.14699: TRKD < non-target, head": ("x_trkd", "x_nontarget"),
    "2303.01125: frames < embedding": ("x_frames", "x_embedding"),
    "2303.01125: statistics < embedding": ("x_stats", "x_embedding"),
    "2303.01125: concatenated < embedding": ("x_concatenated", "x_embedding"),
    "2305.17394: one-step < two-step": ("one_step", "two_step"),
    "MeMo < DINO": ("memo", "dino"),
    "MeMo: dynamic stop < none": ("memo", "memo_unstopped"),
    "2505.14561: SSPS < NT-Xent": ("ssps", "ntxent"),
    "2212.03090: 1,000 unlabelled utterances < none": ("amount_1000", "amount_0"),
    "ours: best-mini < no teacher": ("best_64", "untaught_long"),
    "ours: best-mini and NT-Xent < best-mini": ("best_all", "best_64"),
    "ours: best-mini and NT-Xent < no teacher": ("best_all", "untaught_long"),
    "ours: labels beside contrastive < contrastive": ("best_64", "label_free"),
    "ours: mined negatives < none": ("contrastive_mined", "contrastive"),
    "ours: formants < speeds alone": ("views_voices", "views_speeds"),
    "ours: coders < none": ("views_coders", "views_speeds"),
    "ours: another voice added < none": ("views_mixed", "views_speeds"),
    "ours: noise < none": ("views_noise", "views_speeds"),
}


def manifests(data: Path, work: Path) -> None:
    """The training speech with absolute paths: all of it, LibriSpeech's, and parts of speechocean's without labels."""
    rows: dict[str, list[list[str]]] = {}
    for corpus in TRAINED_ON:
        with open(data / corpus / "train.csv", newline="") as source:
            rows[corpus] = [
                [row["utt"], str(data / corpus / row["path"]), row["duration"], row["speaker"]]
                for row in csv.DictReader(source)
            ]
    libri, ocean = rows.values()
    write_manifest(work / "train.csv", [*libri, *ocean])
    write_manifest(work / "libri.csv", libri)
    order = np.random.RandomState(0).permutation(len(ocean))
    for count in filter(None, AMOUNTS):
        write_manifest(work / f"amount_{count}.csv", [[*ocean[i][:3], ""] for i in sorted(order[:count])])


def write_manifest(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["utt", "path", "duration", "speaker"])
        writer.writerows(rows)


def extract(work: Path, data: Path, weights: Path, name: str) -> None:
    plan = CACHES[name]
    views = [view.replace("DATA", str(data)) for view in plan.views]
    teacher = ["teacher=dvector", f"teacher.weights={weights}"]
    if plan.teacher is not None:
        teacher = ["teacher=checkpoint", f"teacher.weights={plan.teacher}-0"]
    settings = (f"teacher.targets=[{plan.targets}]", f"manifest={plan.manifest}", f"cache={name}", "fbank=true")
    spkd(work, 1, "extract", *teacher, *settings, *views)
    print(f"extracted {name}", flush=True)


def listed(data: Path) -> dict[str, tuple[Path, Path]]:
    """Manifest and trials of every list."""
    return {name: (data / manifest, data / trials) for name, (manifest, trials) in LISTS.items()}


def finished(work: Path, name: str, seed: int) -> Path:
    """Where the results of a finished student lie."""
    return work / f"{name}-{seed}-eval" / "reports.json"


def train(work: Path, data: Path, name: str, seed: int) -> None:
    """One student of a method, trained and scored on every list."""
    method, folder, init, left = METHODS[name], f"{name}-{seed}", "", METHODS[name].steps * STEPS
    started = time.time()
    while True:
        count = left // 2 if method.then else left
        losses = [argument for loss in method.losses for argument in ("--loss", loss)]
        settings = (*method.student, *method.settings, f"steps={count}", f"seed={seed}", f"out={folder}")
        spkd(
            work, 1, "train", *losses, f"cache={method.cache}", *settings, *((f"student.init={init}",) if init else ())
        )
        if method.then is None:
            break
        method, init, folder, left = method.then, folder, f"{folder}-then", left - count
    reports = evaluate(work, listed(data), 1, f"{name}-{seed}-eval", f"model={folder}")
    record = json.loads((work / folder / "model.json").read_text())["training"]
    kept = {
        "lists": {part: {key: reports[part]["results"][key] for key in METRICS} for part in LISTS},
        "model": {k: reports["test_other"]["models"][-1][k] for k in ("parameters", "macs_per_second")},
        "memo": record.get("memo"),
        "seconds": round(time.time() - started),
    }
    finished(work, name, seed).write_text(json.dumps(kept))
    print(f"{name}-{seed}: {kept['lists']}", flush=True)


def summary(runs: Sequence[dict]) -> dict[str, dict]:
    """Mean and standard deviation over the seeds, by list."""
    found: dict[str, dict] = {}
    for name in LISTS:
        found[name] = {}
        for key, figures in (("eer_percent", 3), ("min_dcf_0.01", 4)):
            values = [run["lists"][name][key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name][key] = {"mean": round(statistics.mean(values), figures), "sd": round(spread, figures)}
            found[name][key]["seeds"] = [round(value, figures) for value in values]
    return found


def scored(work: Path, data: Path, name: str, seed: int, part: str) -> tuple[np.ndarray, SpeakerTrials]:
    """The scores of one student on one list, and the speakers of its trials."""
    trials, scores = read_scores(work / f"{name}-{seed}-eval" / part / "scores.txt")
    with open(data / LISTS[part][0], newline="") as source:
        speaker = {row["utt"]: row["speaker"] for row in csv.DictReader(source)}
    number = {name: i for i, name in enumerate(sorted(set(speaker.values())))}
    of = np.array([number[speaker[name]] for name in trials.names])
    assert trials.label is not None
    return scores, SpeakerTrials(of[trials.enrolment], of[trials.test], trials.label)


def compare(work: Path, data: Path, first: str, second: str, seeds: Sequence[int]) -> dict[str, object]:
    """Mean EER over lists and seeds of two methods, first minus second, with the 95 % interval over speakers, who are
    drawn for both methods together."""
    draws = np.zeros((RESAMPLINGS, len(LISTS)))
    observed = []
    for column, part in enumerate(LISTS):
        rankings = []
        for name, sign in ((first, 1.0), (second, -1.0)):
            for seed in seeds:
                scores, trials = scored(work, data, name, seed, part)
                rankings.append((sign, Ranking.of(scores, trials.labels)))

        def difference(weight: np.ndarray | None, rankings: list[tuple[float, Ranking]] = rankings) -> float:
            return 100 * sum(sign * eer(r.curve(weight))[0] for sign, r in rankings) / len(seeds)

        observed.append(difference(None))
        random = np.random.RandomState(column)
        for row in range(RESAMPLINGS):
            while True:
                draw = np.bincount(random.randint(0, trials.speakers, trials.speakers), minlength=trials.speakers)
                try:
                    draws[row, column] = difference(trials.weights(draw.astype(np.float64)))
                    break
                except ValueError:  # no target trials among the speakers drawn
                    continue
    low, high = np.quantile(draws.mean(1), [0.025, 0.975])
    value = float(np.mean(observed))
    verdict = "holds" if high < 0 else "does not hold" if low > 0 else "open"
    interval = [round(float(low), 2), round(float(high), 2)]
    return {"verdict": verdict, "difference": round(value, 2), "interval": interval, "seeds": len(seeds)}


def table(methods: dict[str, dict], teacher: dict[str, float] | None = None) -> str:
    """A table of README or docs."""
    heads = ("", "parameters", "steps", "seeds", *(f"{head}, EER (%)" for head in HEADS.values()))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    if teacher is not None:
        lines.append(f"| teacher | 1.42 M | | | {' | '.join(f'{teacher[name]:.2f}' for name in LISTS)} |")
    for found in methods.values():
        cells = [found["title"], f"{found['parameters'] / 1e6:.2f} M", str(found["steps"]), str(found["seeds"])]
        for name in LISTS:
            rate = found[name]["eer_percent"]
            cells.append(f"{rate['mean']:.2f}" + (f" ± {rate['sd']:.2f}" if found["seeds"] > 1 else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="the folder of the corpora")
    options.add_argument("--teacher", type=Path, required=True, help="weights of the GE2E d-vector")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--groups", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--jobs", type=int, default=2, help="students trained side by side, one thread each")
    options.add_argument("--work", type=Path, default=HERE / "work" / "papers")
    options.add_argument("--report", action="store_true", help="train nothing; tables of what is finished")
    given = options.parse_args()
    data, weights, work = given.data.resolve(), given.teacher.resolve(), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    manifests(data, work)
    chosen = [name for name in given.methods if METHODS[name].group in given.groups]
    if not given.report:
        run(work, data, weights, chosen, given.seeds, given.jobs)
    report(work, data, weights, given.seeds)


def run(work: Path, data: Path, weights: Path, chosen: list[str], seeds: int, jobs: int) -> None:
    """Extract what is needed and train what is not finished, seed after seed."""
    with ThreadPoolExecutor(jobs) as pool:
        # A cache of a student's outputs needs the student, which needs another cache.
        for by_student in (False, True):
            caches = {cache for name in chosen for cache in METHODS[name].caches}
            caches |= {"voices"} if any(CACHES[cache].teacher for cache in caches) else set()
            now = [cache for cache in CACHES if cache in caches and (CACHES[cache].teacher is not None) == by_student]
            for cache in now:
                if (teacher := CACHES[cache].teacher) is not None and not finished(work, teacher, 0).is_file():
                    train(work, data, teacher, 0)
            list(pool.map(lambda cache: extract(work, data, weights, cache), now))
            waiting = [
                pool.submit(train, work, data, name, seed)
                for seed in range(seeds)
                for name in chosen
                if METHODS[name].caches & set(now) and not finished(work, name, seed).is_file()
            ]
            for one in waiting:
                one.result()


def report(work: Path, data: Path, weights: Path, seeds: int) -> None:
    """Tables, claims, the figure and the last line, of what is finished."""
    teacher = evaluate(work, listed(data), os.cpu_count() or 1, "teacher-eval", "model=dvector", f"weights={weights}")
    done = {name: [seed for seed in range(seeds) if finished(work, name, seed).is_file()] for name in METHODS}
    methods = {}
    for name, of in done.items():
        if of:
            runs = [json.loads(finished(work, name, seed).read_text()) for seed in of]
            methods[name] = {
                "group": METHODS[name].group,
                "title": METHODS[name].title,
                "steps": METHODS[name].steps * STEPS,
                "seeds": len(of),
                **runs[0]["model"],
                **summary(runs),
            }
            if runs[0]["memo"] is not None:
                methods[name]["memo"] = [found["memo"] for found in runs]
    claims = {}
    for claim, (first, second) in CLAIMS.items():
        if shared := sorted(set(done[first]) & set(done[second])):
            claims[claim] = compare(work, data, first, second, shared)
    rates = {name: round(teacher[name]["results"]["eer_percent"], 3) for name in LISTS}
    result = {"teacher": rates, **goals(methods), "orderings": claims, "methods": methods, "machine": describe()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    write_tables(result)
    for name, found in methods.items():
        shown = "   ".join(
            f"{found[part]['eer_percent']['mean']:6.2f} {found[part]['eer_percent']['sd']:5.2f}" for part in LISTS
        )
        print(f"{name:20} {found['seeds']} {shown}")
    print(json.dumps({key: value for key, value in result.items() if key not in ("methods", "machine")}))


def goals(methods: dict[str, dict]) -> dict[str, object]:
    """EER on speechocean and the mean of both LibriSpeech lists: of the best students of up to 1 M and 0.25 M
    parameters, and of the best without a teacher."""

    def best(names: list[str]) -> dict[str, object] | None:
        if not names:
            return None
        name = min(names, key=lambda n: methods[n]["speechocean"]["eer_percent"]["mean"])
        libri = statistics.mean(methods[name][part]["eer_percent"]["mean"] for part in ("test_other", "test_short"))
        rate = methods[name]["speechocean"]["eer_percent"]["mean"]
        return {"method": name, "speechocean": rate, "librispeech": round(libri, 3), "seeds": methods[name]["seeds"]}

    untaught = [name for name in methods if "no teacher" in methods[name]["title"]]
    taught = [name for name in methods if name not in untaught]
    return {
        "best_under_1m_test_speechocean": best([n for n in taught if methods[n]["parameters"] <= 1e6]),
        "best_under_250k_test_speechocean": best([n for n in taught if methods[n]["parameters"] <= 250e3]),
        "untaught_same_student": best(untaught),
    }


def write_tables(result: dict) -> None:
    """The tables of README.md and docs/results.md, and the figure."""
    methods, parts = result["methods"], []
    for group, title in GROUPS.items():
        rows = {name: found for name, found in methods.items() if found["group"] == group}
        if rows:
            parts.append(f"## {title}\n\n{table(rows, result['teacher'] if group in ('losses', 'sizes') else None)}")
    lines = ["| claim: lower EER | | difference (points) | 95 % interval | seeds |", "|---|---|---|---|---|"]
    for claim, found in result["orderings"].items():
        low, high = found["interval"]
        cells = (f"{found['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}", str(found["seeds"]))
        lines.append(f"| {claim} | {found['verdict']} | {' | '.join(cells)} |")
    note = (
        "Mean EER over the three lists and the seeds, first minus second; intervals over speakers, who are resampled."
    )
    parts.append(f"## Orderings\n\n{note}\n\n" + "\n".join(lines))
    between(DOC, "\n\n".join(parts))
    between(README, table({n: f for n, f in methods.items() if f["group"] == "sizes"}, result["teacher"]))
    draw(methods, result["teacher"])


def between(path: Path, made: str) -> None:
    """Put a text between the marks of a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}")


def draw(methods: dict[str, dict], teacher: dict[str, float]) -> None:
    """docs/frontier.svg: EER against parameters."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots(1, len(LISTS), sharex=True)
    rows = [found for found in methods.values() if found["group"] == "sizes"]
    titles = list(dict.fromkeys(found["title"] for found in rows))
    for panel, part in zip(axes, LISTS, strict=True):
        for title, marker in zip(titles, "sDo^v", strict=False):
            mine = sorted((f for f in rows if f["title"] == title), key=lambda found: found["parameters"])
            rates = [found[part]["eer_percent"] for found in mine]
            panel.errorbar(
                [found["parameters"] / 1e6 for found in mine],
                [rate["mean"] for rate in rates],
                [rate["sd"] for rate in rates],
                marker=marker,
                markersize=4,
                capsize=2,
                label=title,
            )
        panel.axhline(teacher[part], color="#444444", linestyle="--", linewidth=1, label="teacher, 1.42 M")
        panel.set(title=HEADS[part], xlabel="parameters (M)", xscale="log", xlim=(0.09, 1.1), ylim=(0, None))
        panel.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
        panel.minorticks_off()
    axes[0].set_ylabel("EER (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "spkd"}):
        figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
