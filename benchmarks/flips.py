"""Single flipped bits in everything that a command loads: is every one found, or without effect?

The real commands make caches (complete, half-extracted), a student with its calibration, a map to it, an unfinished
training, two evaluations and exports. One bit at a time is flipped in them, in every kind of file as often; then the
command that loads the file runs, in a copy. It is `detected` where the command fails and names the file, `harmless`
where it gives what it gives without the flip, and `silent` where it gives something else. The shards of a cache are
read whole by `cache verify` alone; a training maps them, and compares their sizes and indices.

    python benchmarks/flips.py --flips 1000

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/flips.json.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record
from workspace import LEARNT, OF_STUDENT, STUDENT, TEACHER, must, outcome, prepare, spkd

from spkd.train import resume

KINDS = ("detected", "harmless", "not named", "silent")
EXTRACT = ("extract", *TEACHER, LEARNT, "manifest=manifest.csv")
EVAL = ("eval", "trials.txt", "manifest=manifest.csv", "bootstrap=0", "device=cpu", "out=o/eval")
TRAIN = ("train", "--loss", "cosine", "--loss", "kld", "loss.weights.kld=0.1", *STUDENT)
RUN = (*TRAIN, "cache=cache", "steps=30", "save_every=25", "out=o/run")


@dataclass(frozen=True)
class Part:
    """A folder or file of the laboratory, and the command that loads it.

    Attributes:
        path: the folder or file; what is below `o` is changed by the command, and made again for every flip.
        command: arguments of the command, which writes below `o`.
        files: patterns of its files.
    """

    path: str
    command: tuple[str, ...]
    files: tuple[str, ...] = ("**/*",)


PARTS = {
    "cache, by verify": Part("cache", ("cache", "verify", "cache")),
    "cache, by info": Part("cache", ("cache", "info", "cache"), ("*.json", "plan/*", "commits/*")),
    "cache, by training": Part("cache", (*TRAIN, "cache=cache", "steps=1", "out=o/trained"), ("*.*", "plan/*")),
    "half a cache, by extraction": Part(
        "o/half", (*EXTRACT, "cache=o/half"), ("*.*", "plan/*", "commits/*", "*/*.json")
    ),
    "shares, by merge": Part(
        "share0", ("cache", "merge", "share0", "share1", "o/merged"), ("*.*", "plan/*", "commits/*")
    ),
    "pulled copy, by pull": Part("o/copy", ("cache", "pull", "cache", "o/copy")),
    "student, by evaluation": Part("student", (*EVAL, "model=student"), ("model.*", "log.jsonl")),
    "calibration, by evaluation": Part(
        "student", (*EVAL, "model=student", "calibration=student/calibration.json"), ("calibration.json",)
    ),
    "map, by evaluation": Part("map", (*EVAL, "model=student", "enrol.model=teacher", "enrol.map_by=map")),
    "training state, by training": Part("o/run", RUN),
    "settings of a run, by --from": Part(
        "student", ("train", "--from", "student", "out=o/again"), ("run.yaml", "run.json")
    ),
    "evaluation, by report": Part("one", ("report", "one", "two", "--bootstrap", "5", "--out", "o/compared")),
    "ONNX file, by evaluation": Part("m.onnx", (*EVAL, "model=onnx", "model.weights=m.onnx")),
    "HDF5, by import": Part("out.h5", ("cache", "import", "out.h5", "o/imported")),
    "Kaldi's ark, by import": Part(
        "vectors.ark", ("cache", "import", "vectors.ark", "o/imported", "--manifest", "manifest.csv")
    ),
    "tars, by import": Part("tars", ("cache", "import", "tars", "o/imported")),
}


def begin() -> None:
    """Make the folders below `begun` that commands go on with."""
    Path("begun").mkdir()
    must(*EXTRACT, "cache=begun/half")
    Path("begun/half/COMPLETE.json").unlink()
    for name in ("commits/1.json", "embedding/c/1/0"):
        Path("begun/half", name).unlink()
    must("export", "student", "--to", "onnx", "out=m.onnx")
    must(*OF_STUDENT, "cache=of-student")
    must("map", "cache", "of-student", "steps=2", "hidden=4")
    must("cache", "pull", "cache", "begun/copy")
    Path("begun/copy/embedding/c/1/0").unlink()
    must(*(argument.replace("o/run", "whole") for argument in RUN))
    interrupted(lambda: must(*(argument.replace("o/run", "begun/run") for argument in RUN)))


def interrupted(call: Callable[[], None]) -> None:
    """Run a training that dies when it has saved its state."""

    class Died(BaseException):
        pass

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise Died

    save = resume.save
    with contextlib.suppress(Died):
        try:
            resume.save = save_and_die
            call()
        finally:
            resume.save = save


def run(part: Part) -> tuple[int, str, object]:
    """Exit code of the command of a part, what it printed, and what it gives."""
    code, printed = spkd(*part.command)
    prints = part.command[:2] == ("cache", "info")
    return code, printed, (printed if prints else outcome(Path("o")))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def try_part(name: str, flips: int, random: np.random.RandomState) -> Counter[str]:
    """Flip so many bits of a part, one at a time. Returns how many were detected, harmless, ..."""
    part, found = PARTS[name], Counter[str]()
    fresh()
    code, printed, expected = run(part)
    if code:
        raise SystemExit(f"failed: {' '.join(part.command)}\n{printed}")
    fresh()
    root = Path(part.path)
    files = [root] if root.is_file() else sorted({p for f in part.files for p in root.glob(f) if p.is_file()})
    for _ in range(flips):
        fresh()
        path = files[random.randint(len(files))]
        good = path.read_bytes()
        bit = random.randint(8 * len(good))
        path.write_bytes(flipped(good, bit))
        code, printed, given = run(part)
        if root.parts[0] != "o":
            path.write_bytes(good)
        kind = "detected" if code else "harmless" if given == expected else "silent"
        if code and path.name not in printed and str(root) not in printed:
            kind = "not named"
        found[kind] += 1
        if kind in ("not named", "silent"):
            where = f"bit {bit % 8} of byte {bit // 8} of {path}"
            print(f"{name}: {kind}: {where}: {printed.strip()[-200:]}", flush=True)
    return found


def fresh() -> None:
    """Make the folder that commands write into."""
    shutil.rmtree("o", ignore_errors=True)
    shutil.copytree("begun", "o")


def main() -> None:
    options = record.options(__doc__, "flips")
    options.add_argument("--flips", type=int, default=1000)
    given = record.parse(options, flips=len(PARTS))
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    random, results, total = np.random.RandomState(0), {}, Counter[str]()
    print(" ".join([f"{'loaded':32}", *(f"{kind:>10}" for kind in KINDS)]), flush=True)
    with contextlib.chdir(given.work):
        prepare()
        begin()
        for number, name in enumerate(PARTS):
            flips = given.flips * (number + 1) // len(PARTS) - given.flips * number // len(PARTS)
            results[name] = found = try_part(name, flips, random)
            total += found
            print(" ".join([f"{name:32}", *(f"{found[kind]:10}" for kind in KINDS)]), flush=True)
    result = {"flips": total.total(), **{kind.replace(" ", "_"): total[kind] for kind in KINDS}, "parts": results}
    record.keep("flips", result, given.tiny)


if __name__ == "__main__":
    main()
