"""`spkd demo`: synthesise a corpus, train a teacher, extract it, train a student with and without it, score all three.

Every step is an ordinary spkd command, printed as one would type it.
"""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import soundfile
import torch

from spkd import config
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.manifest import Manifest, build
from spkd.demo.synthesis import speaker, utterance
from spkd.errors import SpkdError
from spkd.eval import plots, trials
from spkd.eval.embed import real_time_factor
from spkd.eval.metrics import Curve, compute, curve, metrics_of
from spkd.eval.score import score
from spkd.eval.settings import EvalConfig
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.files.atomic import writable_folder, write_bytes, write_json
from spkd.pages import html
from spkd.progress import log, track
from spkd.teachers import load_model, load_teacher
from spkd.train.settings import TrainConfig
from spkd.train.trainer import train

LABEL = "synthetic speech: shows the machinery, not accuracy"
MARKER = "spkd-demo"


@dataclass(frozen=True)
class Part:
    """One part of the corpus: its speakers are in no other part."""

    name: str
    speakers: int
    utterances: int
    seconds: float


PARTS = (Part("teacher", 300, 4, 2.5), Part("train", 120, 1, 5.0), Part("test", 40, 5, 3.0))
SPEEDS = "view.speeds=[0.9,1.0,1.1]"
TEACHER = ["student.channels=128", "student.embedding=128", "steps=500", "optim.lr=0.004"]
STUDENT = ["student.channels=40", "student.embedding=64", "steps=600", "optim.lr=0.004"]


@dataclass(frozen=True)
class Row:
    """One model of the closing table.

    Attributes:
        name: for people.
        metrics: by key.
        parameters: of the model.
        bytes: of model.safetensors.
        real_time: real-time factor on one CPU thread.
        curve: of the errors.
    """

    name: str
    metrics: dict[str, float]
    parameters: int
    bytes: int
    real_time: float
    curve: Curve


def run_demo(out: Path, seed: int) -> list[Row]:
    """Run the demonstration in `out`, print its table, write report.html and report.json.

    Raises:
        SpkdError: `out` holds something else, or cannot be written.
    """
    started = time.monotonic()
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise SpkdError(f"{out}: is not empty and not a demo's folder; choose another with --out")
    writable_folder(out)
    if (out / MARKER).is_file() and (out / MARKER).read_text() != f"{seed}\n":
        raise SpkdError(f"{out}: holds the demo of another seed; choose another folder with --out")
    write_bytes(out / MARKER, f"{seed}\n".encode())
    log(f"spkd demo ({LABEL}), in {out}/")
    for part in PARTS:
        _synthesise(out, part, seed)
    _write_trials(out)

    _extract(out, ["teacher=none", "cache=teacher-features", "manifest=teacher.csv", SPEEDS])
    _train(out, "aam", ["cache=teacher-features", "out=teacher", *TEACHER, f"seed={seed}"])
    _extract(
        out,
        ["teacher=checkpoint", "teacher.weights=teacher", "cache=cache", "manifest=train.csv", "fbank=true", SPEEDS],
    )
    _train(out, "aam", ["cache=cache", "out=student-no-teacher", *STUDENT, f"seed={seed}"])
    _train(out, "contrastive", ["cache=cache", "out=student", *STUDENT, f"seed={seed}"])
    rows = [
        _row(out, name, folder)
        for name, folder in (
            ("teacher", "teacher"),
            ("student, no teacher", "student-no-teacher"),
            ("student, distilled", "student"),
        )
    ]
    _print(rows)
    _report(out, rows, seed)
    log(f"{LABEL}. {time.monotonic() - started:.0f} s in all; {out}/report.html has the curves.")
    return rows


def _synthesise(out: Path, part: Part, seed: int) -> None:
    """Write the part's FLAC files, one folder per speaker, and its manifest."""
    if (out / f"{part.name}.csv").is_file():
        return
    first = 10_000 * [p.name for p in PARTS].index(part.name)
    jobs = [(out / part.name, seed, first + i, part.utterances, part.seconds) for i in range(part.speakers)]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        with track(f"synthesising {part.name}", len(jobs), "speakers") as bar:
            for _ in pool.map(_synthesise_speaker, jobs, chunksize=8):
                bar.advance(1)
    manifest, _, _ = build(out / part.name, "folder")
    manifest.save(out / f"{part.name}.csv")


def _synthesise_speaker(job: tuple[Path, int, int, int, float]) -> None:
    folder, seed, number, utterances, seconds = job
    base = (seed * 100_000 + number) * 100
    identity = speaker(base % 2**32)
    home = folder / f"speaker{number:05d}"
    home.mkdir(parents=True, exist_ok=True)
    for i in range(utterances):
        wave = utterance(identity, (base + 1 + i) % 2**32, seconds)
        soundfile.write(home / f"{i}.flac", wave, SAMPLE_RATE)


def _write_trials(out: Path) -> None:
    """Every pair of test utterances."""
    manifest = Manifest.load(out / "test.csv")
    pairs = itertools.combinations(manifest, 2)
    lines = (f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs)
    write_bytes(out / "trials.txt", "".join(lines).encode())


def _in(out: Path, overrides: list[str]) -> list[str]:
    """Names of files and folders, placed in the demo's folder."""
    places = ("cache", "manifest", "out", "teacher.weights", "model")
    pairs = (item.split("=", 1) for item in overrides)
    return [f"{name}={out / value}" if name in places else f"{name}={value}" for name, value in pairs]


def _extract(out: Path, overrides: list[str]) -> None:
    placed = _in(out, overrides)
    log(f"\n$ spkd extract {' '.join(placed)}")
    settings = config.load(ExtractConfig, placed, environ={})
    extract(settings, load_teacher(settings.teacher, torch.device("cpu")), Manifest.load(settings.manifest))


def _train(out: Path, loss: str, overrides: list[str]) -> None:
    placed = _in(out, overrides)
    log(f"\n$ spkd train --loss {loss} {' '.join(placed)}")
    train(config.load(TrainConfig, [f"loss={loss}", *placed, "device=cpu"], environ={}))


def _row(out: Path, name: str, folder: str) -> Row:
    placed = _in(out, [f"model={folder}", "manifest=test.csv"])
    log(f"\n$ spkd eval {out / 'trials.txt'} {' '.join(placed)}")
    settings = config.load(EvalConfig, [*placed, "device=cpu"], environ={})
    model = load_model(settings.model, torch.device("cpu"))
    listed = trials.read(out / "trials.txt")
    scored = score(settings, model, Manifest.load(settings.manifest), listed)
    assert scored.trials.label is not None
    at = curve(scored.scores[0], scored.trials.label)
    size = (out / folder / "model.safetensors").stat().st_size
    return Row(name, compute(at, metrics_of()), model.num_parameters or 0, size, real_time_factor(model), at)


SHOWN = {"eer_percent": 2, "min_dcf_0.01": 3}  # metrics of the table, and their decimals
LABELS = {metric.key: f"{metric.label} (%)" if metric.unit == " %" else metric.label for metric in metrics_of()}
HEADER = ["model", *(LABELS[key] for key in SHOWN), "parameters", "on disk (MB)", "real-time factor (1 CPU thread)"]


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        *(f"{row.metrics[key]:.{decimals}f}" for key, decimals in SHOWN.items()),
        f"{row.parameters:,}",
        f"{row.bytes / 1e6:.2f}",
        f"{row.real_time:.4f}",
    ]


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Unseen speakers, {LABEL}", title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*_cells(row))
    log("")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _report(out: Path, rows: list[Row], seed: int) -> None:
    test = next(p for p in PARTS if p.name == "test")
    about = (
        f"{test.speakers} unseen synthetic speakers, {test.utterances} utterances of {test.seconds:g} s each, every "
        f"pair a trial; seed {seed}. The student is trained on {PARTS[1].speakers} speakers with "
        f"{PARTS[1].utterances} recording of {PARTS[1].seconds:g} s each, at three speeds: without the teacher on "
        "their labels (AAM-softmax, speeds as extra classes), with it on the teacher's embeddings alone (contrastive, "
        "labels unused); same student, steps, views and masks."
    )
    page = html.page(
        f"spkd demo ({LABEL})",
        html.table(HEADER, [_cells(row) for row in rows]),
        html.figures(plots.det({row.name: row.curve for row in rows})),
        html.heading("What was done"),
        html.note(about),
    )
    write_bytes(out / "report.html", page.encode())
    shown = [
        {"name": r.name, **r.metrics, "parameters": r.parameters, "bytes": r.bytes, "real_time": r.real_time}
        for r in rows
    ]
    write_json(out / "report.json", {"label": LABEL, "seed": seed, "rows": shown})
