"""The five systems, newer ones and their baselines on real speech, at equal student, steps, views and augmentation.

Runs the commands a user would run (extract, train, eval) with the pretrained GE2E d-vector as teacher. Trained on
librispeech-mini and speechocean-mini together (308 speakers, 1.8 h), tested on speakers of their own: LibriSpeech
test-other and test-short, and speechocean's (trials of the same sex and age group). Nothing is tuned or chosen on a
test list; what was chosen was chosen by recipe.py on 58 of the training speakers.

    python benchmarks/papers.py --data DIR --teacher FILE --seeds 3

DIR holds the folders librispeech-mini, speechocean-mini and noise. Every finished run is kept in the file `--runs`,
with its EERs under 300 resamplings of the speakers, from which all tables, intervals and claims are made. A run that
is there is not trained again, unless its settings have changed since. The default holds the runs of this repository:
name a file of your own to train all of them. `--groups` and `--methods` choose a part, `--report` makes tables of what
is finished. Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/papers.json, from
which it draws the figures and tables.py makes the tables of README.md and docs/results.md.

Groups:
- losses: every loss with the same x-vector.
- recipe: the recipe best-mini, students without a teacher and without labels, over the number of steps.
- sizes: the recipe best-mini at several sizes and architectures.
- levels: a wide x-vector, distilled and trained with labels on the same speech, teaches a narrow one of the same
  context: multilevel (arXiv 2303.01125), and, as it has a head over the training speakers, the losses over logits
  (arXiv 2309.14838, 2601.14699), these in three architectures.
- classes: the same teacher and half of the speakers, with a head over these and over all speakers.
- ssl: one-step against two-step with a small self-supervised shape, DINO and MeMo.
- amounts: LibriSpeech and growing amounts of speechocean's speech without labels.
- views: what each kind of view brings.
- codes: frames of the d-vector, and of the wide x-vector, in 512 bytes and in fewer: by `multilevel` from what a codec
  keeps, and by `codebook` from its codes (arXiv 2211.00508).

The default groups take under four hours on two cores, from nothing; `--groups` names others.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import record
from commands import Lists, spkd
from matplotlib.figure import Figure

from spkd.corpus.manifest import Manifest, Utterance
from spkd.eval.bootstrap import SpeakerTrials
from spkd.eval.metrics import Point, Ranking, eer, min_dcf
from spkd.eval.trials import read_scores
from spkd.students import load_student, save_student

HERE = Path(__file__).parent
FIGURE = HERE.parent / "docs" / "frontier.svg"
TINY = {"methods": ["x_trkd"], "seeds": 1, "jobs": 1}  # its teacher is another student, taught by the d-vector
LISTS = {
    "test_other": ("librispeech-mini/test-other.csv", "librispeech-mini/trials-test-other.txt"),
    "test_short": ("librispeech-mini/test-short.csv", "librispeech-mini/trials-test-short.txt"),
    "speechocean": ("speechocean-mini/test.csv", "speechocean-mini/trials-test.txt"),
}
TESTED = "tested"  # manifest and trials of all lists
HEADS = {"test_other": "test-other", "test_short": "test-short", "speechocean": "speechocean"}
TRAINED_ON = ("librispeech-mini", "speechocean-mini")
STEPS, LONG, LONGEST, RESAMPLINGS = 600, 2400, 4800, 300
CURVE = (STEPS, LONG, LONGEST)
TEACHER = "teacher"
AMOUNTS = (0, 250, 500, 1000)  # utterances of unlabelled speech of the kind that is tested
SPEEDS = "[0.75,0.8,0.85,0.9,0.95,1.0,1.05,1.1,1.15,1.2,1.25,1.3]"
FORMANTS = "[0.84,0.88,0.92,0.96,1.0,1.04,1.08,1.12,1.16,1.19]"
VOICES = ("view=full:8", f"view.speeds={SPEEDS}", f"view.formants={FORMANTS}")
MANY = ("view=full:16", *VOICES[1:])
FEW = ("view=full:4", f"view.speeds={SPEEDS}")
FAST = ("precision=bf16", "loggers=[]")
FRAME_CODECS = ("float16", "int8", "pq8x8", "rq8x8", "lsq8x8")
CODES = FRAME_CODECS[-2:]  # those whose codes `codebook` learns


@dataclass(frozen=True)
class CachePlan:
    """A cache. views: settings of `spkd extract`; DATA stands for the folder of the corpora. teacher: another method of
    this file, whose first student it is; None: the d-vector. manifest: of the speech. own_classes: the teacher's head
    keeps the speakers of the manifest alone."""

    views: tuple[str, ...]
    targets: str = "embedding"
    teacher: str | None = None
    manifest: str = "train.csv"
    own_classes: bool = False


CACHES = {
    "voices": CachePlan((*VOICES, "wave=true"), "embedding,stats,frames.layer3"),
    "voices16": CachePlan(MANY),
    "xvector": CachePlan((*VOICES, "storage.codecs={frames: int8}"), "embedding,stats,segment.a,frames,logits", "wide"),
    "half_own": CachePlan(VOICES, "embedding,logits", "wide", "half.csv", own_classes=True),
    "half_all": CachePlan(VOICES, "embedding,logits", "wide", "half.csv"),
    "libri": CachePlan(VOICES, manifest="libri.csv"),
    **{f"amount_{n}": CachePlan(VOICES, manifest=f"amount_{n}.csv") for n in AMOUNTS if n},
    "speeds4": CachePlan(FEW),
    "voices4": CachePlan((*FEW, f"view.formants={FORMANTS}")),
    "noise4": CachePlan((*FEW, "view.noise=DATA/noise/noise", "view.rir=DATA/noise/rir_sim")),
    "coders4": CachePlan((*FEW, "view.coders=[g711,gsm,opus,mp3]")),
    **{
        f"{of}_{codec}": CachePlan(
            (*FEW, f"view.formants={FORMANTS}", f"storage.codecs={{{target}: {codec}}}"),
            f"embedding,{target}",
            taught_by,
        )
        for of, target, taught_by in (("d-vector", "frames.layer3", None), ("x-vector", "frames", "wide"))
        for codec in FRAME_CODECS
    },
    "mixed4": CachePlan(
        (*FEW, "view.noise=DATA/speechocean-mini/audio/train", "view.noise_prob=0.5", "view.snr=[0,10]")
    ),
}


def student(name: str, channels: int, embedding: int = 256) -> tuple[str, ...]:
    return (f"student={name}", f"student.channels={channels}", f"student.embedding={embedding}", *FAST)


STUDENT, NARROW, QUARTER, WIDE = (student("xvector", channels) for channels in (64, 32, 84, 256))
FRAMES = {"d-vector": ("frames.layer3", 256, STUDENT), "x-vector": ("frames", 512, NARROW)}  # target, size, student
FRAME_WEIGHT = {"multilevel": 0.3, "codebook": 0.1}  # chosen by recipe.py
# At the x-vectors' learning rate (0.002) the loss of fine-tuning alone rose and stayed up in one seed of three.
SSL = (
    *("student=ssl", "student.channels=64", "student.embedding=256", "student.ssl.adapters=16"),
    *("crop=1.0", "batch_size=32", "optim.lr=0.001", *FAST),
)
TEMPERATURES = ("loss.contrastive.temperature=0.07", "loss.ntxent.temperature=0.07")
MEMO = (
    *("batch_size=32", "loss.memo.locals=2", "loss.memo.local_crop=1.0", "loss.memo.prototypes=2048"),
    *("loss.memo.hidden=512", "loss.memo.bottleneck=128", "loss.memo.momentum=[0.98,1.0]"),
)
PARTNER = ("loss.memo.partner=tiny", "loss.memo.partner_channels=24")


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    losses: what `--loss` takes. settings: its own. student: the architecture. cache: which it learns from.
    then: another method, which goes on from this student with the second half of the steps.
    """

    group: str
    title: str
    losses: tuple[str, ...]
    settings: tuple[str, ...] = ()
    student: tuple[str, ...] = STUDENT
    steps: int = STEPS
    cache: str = "voices"
    then: Method | None = None

    @property
    def caches(self) -> list[str]:
        """By name."""
        return self.cache.strip("[]").split(",")


class Runs:
    """The records of finished runs by the key of their settings and seed, in a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def get(self, key: str, seed: int) -> dict | None:
        return self._read().get(f"{key}-{seed}")

    def keep(self, key: str, seed: int, record: dict) -> None:
        with self._lock:
            records = self._read() | {f"{key}-{seed}": record}
            lines = ",\n".join(f"{json.dumps(run)}: {json.dumps(kept)}" for run, kept in sorted(records.items()))
            written = self._path.with_suffix(".new")
            written.write_text(f"{{\n{lines}\n}}\n")
            written.replace(self._path)

    def _read(self) -> dict[str, dict]:
        return json.loads(self._path.read_text()) if self._path.is_file() else {}


@dataclass(frozen=True)
class Study:
    """Students of several methods and what they learn from and are tested on.

    work: folder of the caches and students. data: of the corpora. weights: of the d-vector. lists: that are tested.
    threads: of a command.
    """

    work: Path
    data: Path
    weights: Path
    lists: Lists
    methods: dict[str, Method]
    caches: dict[str, CachePlan]
    runs: Runs
    threads: int = 1

    def key(self, name: str) -> str:
        """Changes with what a method's students depend on: its settings and those of its caches and their teachers."""
        parts: list[object] = []
        method: Method | None = self.methods[name]
        while method is not None:
            parts += [method.losses, method.settings, method.student, method.steps]
            for cache in map(self.caches.__getitem__, method.caches):
                parts += [cache, cache.teacher and self.key(cache.teacher)]
            method = method.then
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def folder(self, name: str, seed: int) -> str:
        """Of a student, below `work`; other settings are another folder."""
        return f"{name}-{self.key(name)[:6]}-{seed}"

    def tiny(self) -> Study:
        """The same with two steps for every student and few views, all in this process."""
        methods = {name: shorter(method) for name, method in self.methods.items()}
        caches = {
            name: replace(plan, views=tuple(re.sub("full:\\d+", "full:4", view) for view in plan.views))
            for name, plan in self.caches.items()
        }
        return replace(self, methods=methods, caches=caches, threads=0)

    def finished(self, name: str, seeds: int) -> list[dict]:
        """Records of a method's finished runs."""
        records = [self.runs.get(self.key(name), seed) for seed in range(seeds)]
        return [record for record in records if record is not None]


def shorter(method: Method) -> Method:
    """The same student after two steps of small batches."""
    given = any(setting.startswith("batch_size=") for setting in (*method.settings, *method.student))
    settings = method.settings if given else (*method.settings, "batch_size=8")
    return replace(method, settings=settings, steps=2, then=method.then and shorter(method.then))


def levels(pairs: str, *more: str) -> tuple[str, ...]:
    return (f"loss.multilevel.levels={{{pairs}}}", *more)


def recipe(
    title: str,
    steps: int,
    losses: tuple[str, ...],
    settings: tuple[str, ...] = (),
    cache: str = "voices16",
    shape: tuple[str, ...] = STUDENT,
) -> Method:
    """A row beside best-mini."""
    return Method("recipe", title, losses, settings, shape, steps, cache)


def with_frames(of: str, loss: str, codec: str, weight: float | None = None) -> Method:
    """A student that learns frames beside the embedding. of: the teacher, a key of FRAMES. weight: of the frames; None:
    the one that was chosen."""
    target, dim, shape = FRAMES[of]
    size = {"float16": 2 * dim, "int8": dim + 2}.get(codec, 8)
    settings = (
        *ONE[1],
        f"loss.{loss}.levels={{frames: {target}}}",
        f"loss.weights.{loss}={weight or FRAME_WEIGHT[loss]}",
    )
    title = f"{of}, {loss}, {codec} ({size} bytes a frame)"
    return Method("codes", title, ("contrastive", loss), settings, shape, cache=f"{of}_{codec}")


def narrow(title: str, loss: str, *settings: str, shape: tuple[str, ...] = NARROW) -> Method:
    """A small student taught by the wide x-vector."""
    return Method("levels", title, (loss,), settings, shape, cache="xvector")


CONCATENATED = "loss.multilevel.concat=[stats,segment.a,embedding]"
ONE = ("contrastive",), TEMPERATURES[:1]
LABELS = ("contrastive", "aam"), (*TEMPERATURES[:1], "loss.weights.aam=0.3")
BEST = ("contrastive", "ntxent", "aam"), (*TEMPERATURES, "loss.weights.aam=0.3")
BEST_MINI, UNTAUGHT = f"best_{LONGEST}", "no teacher (AAM-softmax)"
IN_README = (BEST_MINI, "label_free_ntxent", f"untaught_{LONGEST}")
SIZES = {
    "tiny_24": ("tiny", student("tiny", 24, 64)),
    "xvector_24": ("x-vector", student("xvector", 24, 128)),
    "xvector_64": ("x-vector", student("xvector", 64)),
    "xvector_128": ("x-vector", student("xvector", 128)),
    "ecapa_32": ("ECAPA-TDNN", student("ecapa", 32)),
}
METHODS = {
    "no_teacher": Method("losses", UNTAUGHT, ("aam",)),
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
    "class_means": Method("losses", "contrastive with class means", ONE[0], (*ONE[1], "class_means=true")),
    "with_labels": Method("losses", "contrastive and AAM-softmax", *LABELS),
    "best": Method("losses", "contrastive, NT-Xent and AAM-softmax", *BEST),
    **{f"untaught_{n}": recipe(UNTAUGHT, n, ("aam",)) for n in CURVE},
    "untaught_128": recipe(UNTAUGHT, LONGEST, ("aam",), shape=SIZES["xvector_128"][1]),
    "label_free_ntxent": recipe("contrastive and NT-Xent, no labels", LONGEST, ("contrastive", "ntxent"), TEMPERATURES),
    **{f"best_{n}": recipe("contrastive, NT-Xent and AAM-softmax", n, *BEST) for n in CURVE},
    **{name: Method("sizes", title, *BEST, shape, LONGEST, "voices16") for name, (title, shape) in SIZES.items()},
    # Its many small layers take nine times as long on a CPU as the x-vector: compare it with best_600. It is not in the
    # figure, whose students have eight times the steps.
    "campplus_16": Method("sizes", f"CAM++, {STEPS} steps", *BEST, student("campplus", 16), STEPS, "voices16"),
    "wide": Method("levels", "the teacher: contrastive and AAM-softmax", ("contrastive", "aam"), ONE[1], WIDE, LONG),
    "x_no_teacher": Method("levels", UNTAUGHT, ("aam",), (), NARROW),
    "x_embedding": narrow("embedding", "multilevel", *levels("embedding: embedding")),
    "x_segment": narrow("embedding and segment", "multilevel", *levels("embedding: embedding, segment.a: segment.a")),
    "x_stats": narrow("embedding and statistics", "multilevel", *levels("embedding: embedding, stats: stats")),
    "x_frames": narrow("embedding and frames", "multilevel", *levels("embedding: embedding, frames: frames")),
    "x_concatenated": narrow(
        "statistics, segment and embedding concatenated",
        "multilevel",
        *levels("", CONCATENATED),
    ),
    "x_quarter": narrow("embedding", "multilevel", *levels("embedding: embedding"), shape=QUARTER),
    "x_quarter_concatenated": narrow("concatenated", "multilevel", *levels("", CONCATENATED), shape=QUARTER),
    "x_kld": narrow("KLD", "kld", "loss.kld.logits=head"),
    "x_nontarget": narrow("non-target", "nontarget", "loss.nontarget.logits=head"),
    "x_trkd": narrow("TRKD", "trkd", "loss.trkd.logits=head"),
    "x_trkd_open": narrow("TRKD, cut-off kept at 1", "trkd", "loss.trkd.logits=head", "loss.trkd.cutoff=[1,1]"),
    **{
        f"x_{name}_{loss}": narrow(
            f"{title} ({shape})", loss, f"loss.{loss}.logits=head", shape=student(name, channels)
        )
        for name, shape, channels in (("ecapa", "ECAPA-TDNN", 32), ("tiny", "tiny", 64))
        for loss, title in (("kld", "KLD"), ("nontarget", "non-target"))
    },
    **{
        f"half_{loss}_{head}": Method(
            "classes", f"{title}, {classes}", (loss,), (f"loss.{loss}.logits=head",), NARROW, cache=f"half_{head}"
        )
        for loss, title in (("kld", "KLD"), ("nontarget", "non-target"))
        for head, classes in (("own", "classes of the half"), ("all", "classes of all speakers"))
    },
    "one_step": Method(
        "ssl",
        "one-step (SSL shape)",
        ("one-step",),
        ("loss.one_step.targets=[frames.layer3]",),
        SSL,
        2 * STEPS,
    ),
    "two_step": Method(
        "ssl",
        "two-step (SSL shape)",
        ("one-step",),
        ("loss.one_step.targets=[frames.layer3]", "loss.one_step.finetune_weight=0"),
        SSL,
        2 * STEPS,
        then=Method("ssl", "", ("aam",), (), SSL),
    ),
    "dino": Method(
        "ssl",
        "DINO, no labels",
        ("memo",),
        (*MEMO, "loss.memo.partner=none", "loss.memo.contrastive_weight=0"),
        steps=2 * STEPS,
    ),
    "memo": Method("ssl", "MeMo, no labels", ("memo",), (*MEMO, *PARTNER), steps=2 * STEPS),
    "memo_unstopped": Method(
        "ssl",
        "MeMo without its stop, no labels",
        ("memo",),
        (*MEMO, *PARTNER, "loss.memo.dynamic_stop=false"),
        steps=2 * STEPS,
    ),
    **{
        f"amount_{n}": Method("amounts", f"{n} utterances", *ONE, cache="libri" if not n else f"[libri,amount_{n}]")
        for n in AMOUNTS
    },
    **{
        f"{of}_alone": Method("codes", f"{of}, embedding alone", *ONE, shape, cache=f"{of}_float16")
        for of, (_, _, shape) in FRAMES.items()
    },
    **{
        f"{of}_{loss}_{codec}": with_frames(of, loss, codec)
        for of in FRAMES
        for loss, codecs in (("multilevel", FRAME_CODECS[:-1]), ("codebook", CODES))
        for codec in codecs
    },
    **{
        f"views_{kind}": Method("views", title, *ONE, steps=2 * STEPS, cache=f"{kind}4")
        for kind, title in {
            "speeds": "speeds",
            "voices": "speeds and formants",
            "noise": "speeds, noise and reverberation",
            "coders": "speeds and coders",
            "mixed": "speeds, another speaker's voice added",
        }.items()
    },
}
GROUPS = {
    "losses": "Every loss, the same student",
    "recipe": "The recipe best-mini, without labels, and without a teacher",
    "sizes": "The recipe best-mini at several sizes",
    "levels": "An x-vector teaches a narrow one",
    "classes": "The classes of the teacher's head, for students that are trained on half of the speakers",
    "ssl": "Self-supervised shapes and self-distillation",
    "amounts": "Unlabelled speech of the tested kind beside LibriSpeech (contrastive, tested on speechocean above all)",
    "views": f"What the views bring (contrastive, four views of each utterance, {2 * STEPS} steps)",
    "codes": "Frames of a teacher in 8 bytes (contrastive besides, four views of each utterance)",
}
DEFAULT_GROUPS = ("losses", "recipe", "sizes", "levels")
CODES_AGAINST_FRAMES = "2211.00508: codes of 8 bytes < frames of float16, {}"
# What a paper claims: the first method, or the mean of the first methods, has the lower EER.
CLAIMS = {
    "2212.03090: contrastive < cosine": ("contrastive", "cosine"),
    "2212.03090: contrastive < MSE": ("contrastive", "mse"),
    "2212.03090: contrastive < KLD": ("contrastive", "kld"),
    "2212.03090: contrastive < NT-Xent": ("contrastive", "ntxent"),
    "2309.14838: non-target < KLD, prototypes": ("nontarget", "kld"),
    "2309.14838: non-target < KLD, head": ("x_nontarget", "x_kld"),
    "2309.14838: KLD < no teacher, head": ("x_kld", "x_no_teacher"),
    "2309.14838: non-target < KLD, head, ECAPA-TDNN": ("x_ecapa_nontarget", "x_ecapa_kld"),
    "2309.14838: non-target < KLD, head, tiny": ("x_tiny_nontarget", "x_tiny_kld"),
    "2309.14838: non-target < KLD, head, all three": (
        "x_nontarget x_ecapa_nontarget x_tiny_nontarget",
        "x_kld x_ecapa_kld x_tiny_kld",
    ),
    "2309.14838: more non-target speakers < fewer": ("half_nontarget_all", "half_nontarget_own"),
    "2601.14699: TRKD < non-target, prototypes": ("trkd", "nontarget"),
    "2601.14699: TRKD < non-target, head": ("x_trkd", "x_nontarget"),
    "2303.01125: frames < embedding": ("x_frames", "x_embedding"),
    "2303.01125: statistics < embedding": ("x_stats", "x_embedding"),
    "2303.01125: concatenated < embedding, 12 % of the size": ("x_concatenated", "x_embedding"),
    "2303.01125: concatenated < embedding, 25 % of the size": ("x_quarter_concatenated", "x_quarter"),
    "2305.17394: one-step < two-step": ("one_step", "two_step"),
    "MeMo < DINO": ("memo", "dino"),
    "MeMo: with its stop < without": ("memo", "memo_unstopped"),
    "2505.14561: SSPS < NT-Xent": ("ssps", "ntxent"),
    "2212.03090: 1,000 unlabelled utterances < none": ("amount_1000", "amount_0"),
    "ours: best-mini < its teacher, speechocean": (BEST_MINI, TEACHER, "speechocean"),
    "ours: best-mini without labels < the teacher, speechocean": ("label_free_ntxent", TEACHER, "speechocean"),
    "ours: best-mini < no teacher": (BEST_MINI, f"untaught_{LONGEST}"),
    "ours: best-mini < no teacher, 0.40 M parameters": ("xvector_128", "untaught_128"),
    "ours: best-mini < best-mini without labels": (BEST_MINI, "label_free_ntxent"),
    "ours: mined negatives < none": ("contrastive_mined", "contrastive"),
    "ours: formants < speeds alone": ("views_voices", "views_speeds"),
    "ours: coders < none": ("views_coders", "views_speeds"),
    "ours: another voice added < none": ("views_mixed", "views_speeds"),
    "ours: noise < none": ("views_noise", "views_speeds"),
    **{
        claim.format(of): (f"{of}_{first}", f"{of}_{second}")
        for of in FRAMES
        for claim, first, second in (
            ("2211.00508: codes of 8 bytes < embedding alone, {}", "codebook_rq8x8", "alone"),
            (CODES_AGAINST_FRAMES, "codebook_rq8x8", "multilevel_float16"),
            ("2211.00508: codes of lsq8x8 < codes of rq8x8, {}", "codebook_lsq8x8", "codebook_rq8x8"),
            ("ours: frames < embedding alone, {}", "multilevel_float16", "alone"),
            ("ours: frames of rq8x8 < frames of pq8x8, {}", "multilevel_rq8x8", "multilevel_pq8x8"),
        )
    },
}


def corpus_rows(data: Path, corpus: str) -> list[dict[str, str]]:
    """The training utterances of a corpus, with absolute paths."""
    with open(data / corpus / "train.csv", newline="") as source:
        return [{**row, "path": str(data / corpus / row["path"])} for row in csv.DictReader(source)]


def manifests(data: Path, work: Path) -> None:
    """The training speech: all of it, that of half of the speakers, LibriSpeech's, and parts of speechocean's without
    labels."""
    libri, ocean = (corpus_rows(data, corpus) for corpus in TRAINED_ON)
    write_manifest(work / "train.csv", [*libri, *ocean])
    write_manifest(work / "half.csv", [row for corpus in (libri, ocean) for row in half(corpus)])
    write_manifest(work / "libri.csv", libri)
    order = np.random.RandomState(0).permutation(len(ocean))
    for count in filter(None, AMOUNTS):
        write_manifest(work / f"amount_{count}.csv", [{**ocean[i], "speaker": ""} for i in sorted(order[:count])])


def half(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of every second speaker."""
    speakers = set(sorted({row["speaker"] for row in rows})[::2])
    return [row for row in rows if row["speaker"] in speakers]


def write_manifest(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    columns = [name for name in ("utt", "path", "duration", "speaker", "start") if name in rows[0]]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def extract(study: Study, name: str) -> None:
    """One cache."""
    plan = study.caches[name]
    views = [view.replace("DATA", str(study.data)) for view in plan.views]
    teacher = ["teacher=dvector", f"teacher.weights={study.weights}"]
    if plan.teacher is not None:
        folder = study.folder(plan.teacher, 0)
        if plan.own_classes:
            folder = cut_head(study.work, folder, study.work / plan.manifest)
        teacher = ["teacher=checkpoint", f"teacher.weights={folder}"]
    settings = (f"teacher.targets=[{plan.targets}]", f"manifest={plan.manifest}", f"cache={name}", "fbank=true")
    spkd(study.work, study.threads, "extract", *teacher, *settings, *views)
    print(f"extracted {name}", flush=True)


def cut_head(work: Path, folder: str, manifest: Path) -> str:
    """Folder of the same student, whose classifier keeps the speakers of a manifest, in all their voices."""
    speakers, whole = {row.speaker for row in Manifest.load(manifest)}, load_student(work / folder)
    kept = [i for i, name in enumerate(whole.classes) if name.partition("@")[0] in speakers]
    assert whole.head is not None
    cut = f"{folder}-{manifest.stem}"
    save_student(work / cut, replace(whole, head=whole.head[kept], classes=[whole.classes[i] for i in kept]))
    return cut


def train(study: Study, name: str, seed: int) -> None:
    """One student of a method, trained, scored on every list and recorded."""
    method, folder, init = study.methods[name], study.folder(name, seed), ""
    left, started = method.steps, time.time()
    while True:
        count = left // 2 if method.then else left
        losses = [argument for loss in method.losses for argument in ("--loss", loss)]
        settings = [*method.student, *method.settings, f"steps={count}", f"seed={seed}", f"out={folder}"]
        if init:
            settings.append(f"student.init={init}")
        spkd(study.work, study.threads, "train", *losses, f"cache={method.cache}", *settings)
        if method.then is None:
            break
        method, init, folder, left = method.then, folder, f"{folder}-then", left - count
    found = {"method": name, **evaluated(study, f"{folder}-eval", f"model={folder}")}
    found["memo"] = json.loads((study.work / folder / "model.json").read_text())["training"]["reports"].get("memo")
    study.runs.keep(study.key(name), seed, found | {"seconds": round(time.time() - started)})
    shown = {part: round(result["eer_percent"], 2) for part, result in found["lists"].items()}
    print(f"{name}-{seed}: {shown}, {time.time() - started:.0f} s", flush=True)


def write_tested(work: Path, lists: Lists) -> None:
    """One manifest and one trial list of everything that is tested, so that a model is loaded once; the names of the
    utterances begin with that of their list."""
    utterances: list[Utterance] = []
    with open(work / f"{TESTED}.txt", "w") as file:
        for part, (manifest, trials) in lists.items():
            utterances += [replace(one, id=f"{part}/{one.id}") for one in Manifest.load(manifest)]
            for label, first, second in map(str.split, trials.read_text().splitlines()):
                file.write(f"{label} {part}/{first} {part}/{second}\n")
    Manifest(tuple(utterances)).save(work / f"{TESTED}.csv")


def evaluated(study: Study, out: str, *model: str) -> dict:
    """What is kept of a model: metrics and resampled EERs (%) of every list, and its size."""
    spkd(
        study.work,
        study.threads,
        "eval",
        f"{TESTED}.txt",
        f"manifest={TESTED}.csv",
        f"out={out}",
        "bootstrap=0",
        *model,
    )
    last = json.loads((study.work / out / "report.json").read_text())["models"][-1]
    found: dict[str, dict] = {
        "lists": {},
        "resampled": {},
        "model": {key: last.get(key) for key in ("parameters", "macs_per_second")},
    }
    for seed, (part, (scores, trials)) in enumerate(scored(study, out).items()):
        curve = Ranking.of(scores, trials.labels).curve()
        found["lists"][part] = {"eer_percent": 100 * eer(curve)[0], "min_dcf_0.01": min_dcf(curve, Point(0.01))[0]}
        found["resampled"][part] = resampled(scores, trials, seed)
    return found


def scored(study: Study, out: str) -> dict[str, tuple[np.ndarray, SpeakerTrials]]:
    """Scores of every list, and the speakers of their trials."""
    trials, scores = read_scores(study.work / out / "scores.txt")
    assert trials.label is not None
    speaker = {one.id: one.speaker for one in Manifest.load(study.work / f"{TESTED}.csv")}
    part_of = np.array([name.partition("/")[0] for name in trials.names])
    found = {}
    for part in study.lists:
        own = sorted({who for name, who in speaker.items() if name.partition("/")[0] == part})
        number = {name: i for i, name in enumerate(own)}
        of = np.array([number.get(speaker[name], -1) for name in trials.names])
        mine = part_of[trials.enrolment] == part
        sides = (of[trials.enrolment][mine], of[trials.test][mine])
        found[part] = (scores[mine], SpeakerTrials(*sides, trials.label[mine]))
    return found


def resampled(scores: np.ndarray, trials: SpeakerTrials, seed: int) -> list[float]:
    """EER (%) under RESAMPLINGS draws of the speakers, the same draws for every model of a list."""
    random, ranking = np.random.RandomState(seed), Ranking.of(scores, trials.labels)
    found: list[float] = []
    while len(found) < RESAMPLINGS:
        draw = np.bincount(random.randint(0, trials.speakers, trials.speakers), minlength=trials.speakers)
        try:
            found.append(round(100 * eer(ranking.curve(trials.weights(draw.astype(np.float64))))[0], 3))
        except ValueError:  # no target trials among the speakers drawn, whatever the scores
            continue
    return found


def summary(runs: Sequence[dict]) -> dict[str, dict]:
    """Mean and standard deviation over the seeds, by list."""
    found: dict[str, dict] = {}
    for name in runs[0]["lists"]:
        found[name] = {}
        for key, figures in (("eer_percent", 3), ("min_dcf_0.01", 4)):
            values = [run["lists"][name][key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name][key] = {"mean": round(statistics.mean(values), figures), "sd": round(spread, figures)}
            found[name][key]["seeds"] = [round(value, figures) for value in values]
    return found


def compare(first: Sequence[dict], second: Sequence[dict], lists: Sequence[str] = tuple(LISTS)) -> dict[str, object]:
    """Mean EER over lists and runs of two methods, first minus second, with the 95 % interval over speakers, who are
    drawn for both methods together."""

    def mean(runs: Sequence[dict]) -> tuple[float, np.ndarray]:
        rates = [run["lists"][part]["eer_percent"] for run in runs for part in lists]
        return float(np.mean(rates)), np.mean([run["resampled"][part] for run in runs for part in lists], 0)

    (a, draws_a), (b, draws_b) = mean(first), mean(second)
    low, high = (round(float(edge), 2) for edge in np.quantile(draws_a - draws_b, [0.025, 0.975]))
    verdict = "holds" if high < 0 else "does not hold" if low > 0 else "open"
    runs = max(len(first), len(second))  # the teacher has one
    return {"verdict": verdict, "difference": round(a - b, 2), "interval": [low, high], "runs": runs}


def table(methods: dict[str, dict], heads: dict[str, str], teacher: dict[str, float] | None = None) -> str:
    """A table of README or docs. Rows that have the seconds of their runs show the least: other work on the machine
    only adds to them."""
    timed = any("seconds" in found for found in methods.values())
    cells = ["", "parameters", "MACs of 1 s", "steps", *(["seconds"] if timed else []), "seeds"]
    cells += [f"{head}, EER (%)" for head in heads.values()]
    lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
    if teacher is not None:
        empty = "| " * (len(cells) - len(heads) - 2)
        lines.append(f"| teacher | 1.42 M {empty}| {' | '.join(f'{teacher[name]:.2f}' for name in heads)} |")
    for found in methods.values():
        size = f"{found['parameters'] / 1e6:.{2 if found['parameters'] > 1e5 else 3}f} M"
        cells = [found["title"], size, f"{found['macs_per_second'] / 1e6:.1f} M"]
        cells += [f"{found['steps']:,}", *([f"{min(found['seconds']):,}"] if timed else []), str(found["seeds"])]
        for name in heads:
            rate = found[name]["eer_percent"]
            cells.append(f"{rate['mean']:.2f}" + (f" ± {rate['sd']:.2f}" if found["seeds"] > 1 else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_options(description: str | None, name: str) -> argparse.ArgumentParser:
    """Of the command that trains the students of a study."""
    found = record.options(description, name, data=True)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--methods", nargs="*", help="only these")
    found.add_argument("--jobs", type=int, default=2, help="students trained side by side, one thread each")
    runs = HERE / "results" / f"{name}_runs.json"
    found.add_argument("--runs", type=Path, default=runs, help="file of the finished runs")
    found.add_argument("--report", action="store_true", help="train nothing; tables of what is finished")
    return found


def main() -> None:
    arguments = training_options(__doc__, "papers")
    arguments.add_argument("--groups", nargs="*", default=list(DEFAULT_GROUPS), choices=list(GROUPS))
    given = record.parse(arguments, **TINY)
    study = prepared(given)
    if not given.report:
        run(study, [n for n in given.methods or METHODS if METHODS[n].group in given.groups], given.seeds, given.jobs)
    result = report(study, given.seeds)
    show(result["methods"])
    record.keep("papers", result, given.tiny)
    # The figures are drawn from what is kept.
    if not given.tiny:
        draw(result["methods"], result["teacher"])
        subprocess.run([sys.executable, str(HERE.parent / "docs" / "figure.py")], check=True)


def prepared(given: argparse.Namespace) -> Study:
    """The study, with its manifests and lists written."""
    given.work.mkdir(parents=True, exist_ok=True)
    manifests(given.data, given.work)
    lists = {name: (given.data / manifest, given.data / trials) for name, (manifest, trials) in LISTS.items()}
    write_tested(given.work, lists)
    runs = Runs(given.work / "runs.json" if given.tiny else given.runs)
    study = Study(given.work, given.data, given.teacher, lists, METHODS, CACHES, runs)
    return study.tiny() if given.tiny else study


def run(study: Study, chosen: list[str], seeds: int, jobs: int) -> None:
    """Extract what is needed and train what is not finished, seed after seed; of a teacher one alone.

    What is needed stands before what needs it, and so far before it that no job waits for long: a teacher is trained
    while the students of others are.
    """
    waiting = {}  # methods of the same settings share their runs
    taught_by = {plan.teacher for plan in study.caches.values()}
    for seed in range(seeds):
        for name in chosen:
            if seed and name in taught_by:
                continue
            if study.runs.get(key := study.key(name), seed) is None:
                waiting.setdefault((key, seed), (name, seed))
    needed = {cache for name, _ in waiting.values() for cache in study.methods[name].caches}
    teachers = {teacher for cache in needed if (teacher := study.caches[cache].teacher) is not None}
    absent = sorted(name for name in teachers if not (study.work / study.folder(name, 0) / "model.json").is_file())
    # A cache of a student's outputs needs the student, which needs another cache.
    first = {cache for name in absent for cache in study.methods[name].caches}
    taught = {cache for cache in needed if study.caches[cache].teacher is not None}
    left = [one for one in waiting.values() if one[0] not in absent]
    soon = [one for one in left if one[1] == 0 and taught.isdisjoint(study.methods[one[0]].caches)]
    order: list[str | tuple[str, int]] = [  # caches, and students with their seeds
        *sorted(first),
        *sorted(needed - first - taught),
        *((name, 0) for name in absent),
        *soon,
        *sorted(taught),
        *(one for one in left if one not in soon),
    ]
    started, tasks = time.time(), dict[object, Future[None]]()

    def task(one: str | tuple[str, int], needs: list[Future[None]]) -> None:
        for before in needs:
            before.result()
        if isinstance(one, str):
            extract(study, one)
        else:
            train(study, *one)

    with ThreadPoolExecutor(jobs) as pool:
        for one in order:
            needs = [(study.caches[one].teacher, 0)] if isinstance(one, str) else study.methods[one[0]].caches
            tasks[one] = pool.submit(task, one, [tasks[key] for key in needs if key in tasks])
    for done in tasks.values():
        done.result()
    print(f"{len(left) + len(absent)} students in {(time.time() - started) / 3600:.2f} h", flush=True)


def report(study: Study, seeds: int) -> dict[str, Any]:
    """Rows and claims of what is finished."""
    teacher = study.runs.get(TEACHER, 0)
    if teacher is None:
        teacher = {
            "method": TEACHER,
            **evaluated(study, "teacher-eval", "model=dvector", f"model.weights={study.weights}"),
        }
        study.runs.keep(TEACHER, 0, teacher)
    records = {name: found for name in study.methods if (found := study.finished(name, seeds))}
    methods = rows(study, records)
    records[TEACHER] = [teacher]
    claims = {}
    for claim, (first, second, *lists) in CLAIMS.items():
        names = first.split(), second.split()
        if records.keys() >= {name for side in names for name in side}:
            shared = min(len(records[name]) for side in names for name in side if name != TEACHER)
            lower, higher = ([run for name in side for run in records[name][:shared]] for side in names)
            claims[claim] = compare(lower, higher, lists or tuple(LISTS))
    rates = {part: round(teacher["lists"][part]["eer_percent"], 3) for part in LISTS}
    codes = {"codebook_8_bytes_minus_fp16_frames": claims.get(CODES_AGAINST_FRAMES.format("d-vector"))}
    return {"teacher": rates, **goals(methods), **codes, "orderings": claims, "methods": methods}


def rows(study: Study, records: dict[str, list[dict]]) -> dict[str, dict]:
    """What the tables say of each method."""
    found = {}
    for name, runs in records.items():
        method = study.methods[name]
        found[name] = {
            "group": method.group,
            "title": method.title,
            "steps": method.steps,
            "seeds": len(runs),
            "seconds": [run["seconds"] for run in runs if "seconds" in run],
            **runs[0]["model"],
            **summary(runs),
        }
        if runs[0]["memo"] is not None:
            found[name]["memo"] = [run["memo"] for run in runs]
    return found


def show(methods: dict[str, dict]) -> None:
    """Print the mean and spread of the EERs."""
    for name, found in methods.items():
        rates = [part["eer_percent"] for part in found.values() if isinstance(part, dict)]
        shown = "   ".join(f"{rate['mean']:6.2f} {rate['sd']:5.2f}" for rate in rates)
        print(f"{name:20} {found['seeds']} {shown}")


def goals(methods: dict[str, dict]) -> dict[str, object]:
    """EER on speechocean and the mean of both LibriSpeech lists: of the best students of up to 1 M and 0.25 M
    parameters, and of the best without a teacher. Where a row has two seeds, those of one seed do not count."""

    def best(names: list[str]) -> dict[str, object] | None:
        names = [n for n in names if methods[n]["seeds"] > 1] or names
        if not names:
            return None
        name = min(names, key=lambda n: methods[n]["speechocean"]["eer_percent"]["mean"])
        libri = statistics.mean(methods[name][part]["eer_percent"]["mean"] for part in ("test_other", "test_short"))
        rate = methods[name]["speechocean"]["eer_percent"]["mean"]
        return {"method": name, "speechocean": rate, "librispeech": round(libri, 3), "seeds": methods[name]["seeds"]}

    untaught = [name for name in methods if methods[name]["title"].startswith("no teacher")]
    taught = [name for name in methods if name not in untaught]
    return {
        "best_under_1m_test_speechocean": best([n for n in taught if methods[n]["parameters"] <= 1e6]),
        "best_under_250k_test_speechocean": best([n for n in taught if methods[n]["parameters"] <= 250e3]),
        "untaught_same_student": best(untaught),
    }


def tables(result: dict) -> str:
    """The tables of docs/results.md."""
    methods, parts = result["methods"], []
    for group, title in GROUPS.items():
        found = {name: row for name, row in methods.items() if row["group"] == group}
        if found:
            teacher = result["teacher"] if group in ("losses", "recipe", "sizes") else None
            parts.append(f"## {title}\n\n{table(found, HEADS, teacher)}")
    lines = ["| claim: lower EER | | difference (points) | 95 % interval | runs of each |", "|---|---|---|---|---|"]
    for claim, found in result["orderings"].items():
        low, high = found["interval"]
        cells = (f"{found['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}", str(found["runs"]))
        lines.append(f"| {claim} | {found['verdict']} | {' | '.join(cells)} |")
    note = "Mean EER over the lists and the seeds, first minus second; intervals over speakers, who are resampled."
    parts.append(f"## Orderings\n\n{note}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def readme_table(result: dict) -> str:
    """The table of README.md, with the mean over the two lists of LibriSpeech, which its text quotes."""
    lists, mean = ("test_other", "test_short"), statistics.fmean
    shown = {}
    for name, row in result["methods"].items():
        if name in IN_README or name in SIZES:
            seeds = [mean(pair) for pair in zip(*(row[part]["eer_percent"]["seeds"] for part in lists), strict=True)]
            spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
            shown[name] = row | {"librispeech": {"eer_percent": {"mean": mean(seeds), "sd": spread}}}
            del shown[name]["seconds"]
    teacher = result["teacher"] | {"librispeech": mean(result["teacher"][part] for part in lists)}
    heads = {name: HEADS[name] for name in lists} | {"librispeech": "mean of both", "speechocean": HEADS["speechocean"]}
    return table(shown, heads, teacher)


def draw(methods: dict[str, dict], teacher: dict[str, float]) -> None:
    """docs/frontier.svg: EER against parameters and against MACs."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    panels = figure.subplots(2, len(LISTS), sharey="col")
    rows = [methods[name] for name in SIZES if name in methods]
    untaught = (f"untaught_{LONGEST}", "untaught_128")
    rows += [methods[name] | {"title": "x-vector, no teacher"} for name in untaught if name in methods]
    axes = {
        "parameters": ("parameters (M)", 1.42e6, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)),
        "macs_per_second": ("MACs of 1 s (M)", None, (1, 2, 5, 10, 20, 50)),
    }
    for line, (key, (label, of_teacher, ticks)) in zip(panels, axes.items(), strict=True):
        for panel, part in zip(line, LISTS, strict=True):
            for title, marker in zip(dict.fromkeys(found["title"] for found in rows), "oDsv^", strict=False):
                mine = sorted((f for f in rows if f["title"] == title), key=lambda found: found[key])
                rates = [found[part]["eer_percent"] for found in mine]
                panel.errorbar(
                    [found[key] / 1e6 for found in mine],
                    [rate["mean"] for rate in rates],
                    [rate["sd"] for rate in rates],
                    marker=marker,
                    markersize=4,
                    capsize=2,
                    label=title,
                )
            size = "" if of_teacher is None else f", {of_teacher / 1e6:.2f} M parameters"
            panel.axhline(teacher[part], color="#444444", linestyle="--", linewidth=1, label=f"teacher{size}")
            panel.margins(0.1)
            panel.set(xlabel=label, xscale="log", ylim=(0, None))
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
    for panel, part in zip(panels[0], LISTS, strict=True):
        panel.set_title(HEADS[part])
    for line in panels:
        line[0].set_ylabel("EER (%)")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "spkd"}):
        figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
