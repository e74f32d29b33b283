"""`spkd demo`: synthesise a corpus, train a teacher, extract it, train a student with and without it, score all three;
then compare recordings of real people by the model that comes with spkd.

Every step is an ordinary command of spkd, and is printed as a user would type it.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from multiprocessing import get_context
from pathlib import Path

import soundfile

from spkd import config
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.manifest import Manifest, build
from spkd.demo.synthesis import speaker, utterance
from spkd.errors import SpkdError, UsageError
from spkd.eval.compare import compare_systems, load_systems
from spkd.eval.report import Report
from spkd.eval.run import evaluate_trials
from spkd.eval.settings import EvalConfig
from spkd.extract.run import load_and_extract
from spkd.extract.settings import ExtractConfig
from spkd.files.atomic import check_no_links, writable_folder, write_bytes, writing
from spkd.files.reading import read_text
from spkd.progress import log, track
from spkd.students.description import WEIGHTS
from spkd.teachers.settings import BUNDLED
from spkd.train.settings import TrainConfig
from spkd.train.trainer import train
from spkd.voices.run import verify
from spkd.voices.settings import VerifyVoiceConfig

LABEL = "synthetic speech: shows the machinery, not accuracy"
MARKER, TRIALS = "spkd-demo", "synthetic-trials.txt"


@dataclass(frozen=True)
class Subset:
    """A subset of the corpus. No two subsets have a speaker in common."""

    name: str
    speakers: int
    utterances: int
    seconds: float


SUBSETS = (Subset("teacher", 300, 4, 2.5), Subset("train", 120, 1, 5.0), Subset("test", 40, 5, 3.0))
SPEEDS = "view.speeds=[0.9,1.0,1.1]"
TEACHER = ["student.channels=128", "student.embedding=128", "steps=500", "optim.lr=0.004"]
STUDENT = ["student.channels=40", "student.embedding=64", "steps=600", "optim.lr=0.004"]

# Recordings of people, of which the first two are of one, and their licence.
PEOPLE, LICENCE = ("2033/0.flac", "2033/1.flac", "1998/1.flac"), "LICENSE.txt"
MODELS = {"teacher": "teacher", "student, no teacher": "student-no-teacher", "student, distilled": "student"}


@dataclass(frozen=True)
class Row:
    """Row of the final table, for one model."""

    name: str
    report: Report
    bytes: int


def run_demo(out: Path, seed: int) -> list[Row]:
    """Run the demonstration, and print its table. Raises SpkdError: `out` holds other files, or cannot be written."""
    # The folder.
    started = time.monotonic()
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise SpkdError(f"{out}: is not empty and not a demo's folder; choose another with --out")
    writable_folder(out)
    check_no_links(out, os.listdir(out))
    if (out / MARKER).is_file() and read_text(out / MARKER) != f"{seed}\n":
        raise UsageError(f"{out}: holds the demo of another seed; choose another folder with --out")
    write_bytes(out / MARKER, f"{seed}\n".encode())
    log(f"spkd demo ({LABEL}), in {out}/")
    # The corpus.
    for subset in SUBSETS:
        _synthesise(out, subset, seed)
    _write_trials(out)
    # The teacher, its cache, and the students.
    _extract(out, ["teacher=none", "cache=teacher-features", "manifest=teacher.csv", SPEEDS])
    _train(out, "aam", ["cache=teacher-features", "out=teacher", *TEACHER, f"seed={seed}"])
    _extract(
        out,
        ["teacher=checkpoint", "teacher.weights=teacher", "cache=cache", "manifest=train.csv", "fbank=true", SPEEDS],
    )
    _train(out, "aam", ["cache=cache", "out=student-no-teacher", *STUDENT, f"seed={seed}"])
    _train(out, "contrastive", ["cache=cache", "out=student", *STUDENT, f"seed={seed}"])
    # The evaluations.
    rows = [Row(name, _eval(out, folder), (out / folder / WEIGHTS).stat().st_size) for name, folder in MODELS.items()]
    _compare(out)
    _print(rows)
    log(f"{LABEL}. {time.monotonic() - started:.0f} s in all; {out}/comparison/comparison.html has the curves.")
    _verify(out)
    log("next: `spkd verify a.wav b.wav` compares two recordings of yours, by the same small model")
    return rows


def _synthesise(out: Path, subset: Subset, seed: int) -> None:
    """Write the FLAC files of a subset, one folder per speaker, and its manifest."""
    if (out / f"{subset.name}.csv").is_file():
        return
    first = 10_000 * SUBSETS.index(subset)
    jobs = [(out / subset.name, seed, first + i, subset.utterances, subset.seconds) for i in range(subset.speakers)]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        with track(f"synthesising {subset.name}", len(jobs), "speakers") as bar:
            for _ in pool.map(_synthesise_speaker, jobs, chunksize=8):
                bar.advance(1)
    manifest, _, _ = build(out / subset.name, "folder")
    manifest.save(out / f"{subset.name}.csv")


def _synthesise_speaker(job: tuple[Path, int, int, int, float]) -> None:
    folder, seed, number, utterances, seconds = job
    base = (seed * 100_000 + number) * 100
    identity = speaker(base % 2**32)
    home = folder / f"speaker{number:05d}"
    for i in range(utterances):
        wave = utterance(identity, (base + 1 + i) % 2**32, seconds)
        with writing(home / f"{i}.flac") as file:
            soundfile.write(file, wave, SAMPLE_RATE, format="FLAC")


def _write_trials(out: Path) -> None:
    """Write the trial list, of every pair of test utterances. The name of the list is shown on every page."""
    manifest = Manifest.load(out / "test.csv")
    pairs = itertools.combinations(manifest, 2)
    lines = (f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs)
    write_bytes(out / TRIALS, "".join(lines).encode())


def _in(out: Path, overrides: list[str]) -> list[str]:
    """Settings with the names of files and folders placed in the folder of the demonstration."""
    places = ("cache", "manifest", "out", "teacher.weights", "model")
    pairs = (item.split("=", 1) for item in overrides)
    return [f"{name}={out / value}" if name in places else f"{name}={value}" for name, value in pairs]


def _extract(out: Path, overrides: list[str]) -> None:
    placed = _in(out, [*overrides, "device=cpu"])
    log(f"\n$ spkd extract {shlex.join(placed)}")
    settings = config.load(ExtractConfig, placed, environ={})
    load_and_extract([settings], Manifest.load(settings.manifest))


def _train(out: Path, loss: str, overrides: list[str]) -> None:
    placed = _in(out, [*overrides, "device=cpu"])
    log(f"\n$ spkd train --loss {loss} {shlex.join(placed)}")
    train(config.load(TrainConfig, [f"loss={loss}", *placed], environ={}))


def _eval(out: Path, folder: str) -> Report:
    trials = str(out / TRIALS)
    placed = _in(out, [f"model={folder}", "manifest=test.csv", f"out=eval/{folder}", "bootstrap=200", "device=cpu"])
    log(f"\n$ spkd eval {shlex.join([trials, *placed])}")
    settings = config.load(EvalConfig, placed, environ={})
    report = evaluate_trials(settings, trials)
    log(report.line())
    return report


def _compare(out: Path) -> None:
    systems = [f"{name}={out / 'eval' / folder}" for name, folder in MODELS.items()]
    log(f"\n$ spkd report {shlex.join(systems)} --out {shlex.quote(str(out / 'comparison'))} --bootstrap 200")
    compare_systems(load_systems(systems), out / "comparison", 200, 0)


def _verify(out: Path) -> None:
    """Compare recordings of real people, which are copied to the folder, by the model that comes with spkd."""
    log("\nReal speech (LibriSpeech, CC BY 4.0), by the small model that comes with spkd: one person, then two")
    people = resources.files(__package__).joinpath("people")
    for name in (*PEOPLE, LICENCE):
        write_bytes(out / "people" / name, people.joinpath(name).read_bytes())
    first, settings = str(out / "people" / PEOPLE[0]), [f"model={BUNDLED}", "device=cpu"]
    for other in (str(out / "people" / name) for name in PEOPLE[1:]):
        log(f"\n$ spkd verify {shlex.join([first, other, *settings])}")
        for line in verify(first, other, config.load(VerifyVoiceConfig, settings, environ={})):
            log(line)
    log("")


METRICS = {"eer_percent": 2, "min_dcf_0.01": 3}  # metrics in the table, and their decimals
SIZES = ("parameters", "on disk (MB)", "real-time factor (1 CPU thread)")


def _cells(row: Row) -> list[str]:
    size = row.report.models[-1].efficiency
    return [
        row.name,
        *(f"{row.report.results[key]:.{decimals}f}" for key, decimals in METRICS.items()),
        f"{size.parameters or 0:,}",
        f"{row.bytes / 1e6:.2f}",
        f"{size.real_time_factor or 0:.4f}",
    ]


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Unseen speakers, {LABEL}", title_justify="left")
    titles = {metric.key: metric.title for metric in rows[0].report.metrics}
    for i, name in enumerate(["model", *(titles[key] for key in METRICS), *SIZES]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*_cells(row))
    log("")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
