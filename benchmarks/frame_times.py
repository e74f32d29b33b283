"""Does a student that is its teacher have the frames of its own cache?

A trained student is teacher and student at once, over synthetic speech; nothing is learnt. Frames
of crops are compared with the cached ones at the same times: in crops of whole utterances (view=full) and of views that
the teacher has heard as such (view=crops), at every start, at three speeds, and in utterances that are repeated.

What `multilevel` measures without learning is printed in two ways: as in training, where batch-norm takes the
statistics of the batch, and as in use, where it has its own as the teacher had. In use, what remains in crops of whole
utterances is context: the mean that a view is normalised by, and what lies beyond the ends of the crop.

    python benchmarks/frame_times.py

Prints, as its last line, one JSON object; keeps it in benchmarks/results/frame_times.json.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from pathlib import Path

import record
import soundfile
import torch

from spkd import config
from spkd.corpus.manifest import Manifest, Utterance
from spkd.demo.synthesis import speaker, utterance
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.teachers import load_teacher
from spkd.train.alignment import align
from spkd.train.losses.multilevel import cosines
from spkd.train.settings import TrainConfig
from spkd.train.trainer import build, checked, train

HERE = Path(__file__).parent
CROP = 2.0  # s
VIEWS = {"full": ["view=full"], "crops": [f"view=crops:2,{CROP}"], "speeds": ["view=full", "view.speeds=[0.9,1.0,1.1]"]}
LEVELS = "loss.multilevel.levels={frames: frames}"


def manifest_of(work: Path, seconds: float, name: str, speakers: int) -> Path:
    """Speech of so many seconds (and some samples more) an utterance, two of each speaker."""
    rows = []
    for s in range(speakers):
        for u in range(2):
            path, length = work / f"{name}-{s}-{u}.wav", seconds + 0.0131 * (2 * s + u)
            wave = utterance(speaker(s), 2 * s + u, length)
            soundfile.write(path, wave, 16_000)
            rows.append(Utterance(path.stem, str(path), f"s{s}", len(wave) / 16_000))
    Manifest(tuple(rows)).save(work / f"{name}.csv")
    return work / f"{name}.csv"


def extracted(manifest: Path, cache: Path, given: list[str]) -> None:
    keys = [*given, f"manifest={manifest}", f"cache={cache}", "fbank=true", "device=cpu"]
    settings = config.load(ExtractConfig, keys, environ={})
    with contextlib.redirect_stdout(io.StringIO()):
        extract(settings, load_teacher(settings.teacher, torch.device("cpu")), Manifest.load(str(manifest)))


def settings_of(cache: Path, out: Path, student: list[str], given: list[str]) -> TrainConfig:
    keys = [f"cache={cache}", f"out={out}", *student, *given, "device=cpu"]
    keys += ["mask.frames=0", "mask.bands=0", "batch_size=8"]
    return config.load(TrainConfig, keys, environ={})


def compared(cache: Path, out: Path, student: list[str], init: Path, steps: int) -> dict[str, float]:
    """What multilevel measures of the teacher as a student: in training, in use, and in use away from the ends."""
    given = ["loss=multilevel", LEVELS, f"student.init={init}", f"crop={CROP}", f"steps={steps}", "optim.lr=1e-12"]
    with contextlib.redirect_stdout(io.StringIO()):
        run = build(checked(settings_of(cache, out, student, given)), out)
    found: dict[str, list[float]] = {"training": [], "use": [], "use_middle": []}
    trained = run.module.network
    # Another copy in training, whose batch-norm goes on counting.
    networks = {"training": copy.deepcopy(trained).train(), "use": trained.eval()}
    for batch in run.loader.batches_from(0, steps, run.config, run.device):
        theirs, alignment = batch.inputs.targets["frames"].float(), batch.inputs.alignments["frames"]
        for name, network in networks.items():
            with torch.no_grad():
                mine = network(batch.crops[0])["frames"]
            mine, same, kept = align(mine.float(), theirs, alignment)
            apart = 1.0 - cosines(mine, same)
            kept = torch.ones_like(apart, dtype=torch.bool) if kept is None else kept
            found[name].append(float(apart[kept].mean()))
            if name == "use":
                third = apart.shape[1] // 3
                found["use_middle"].append(float(apart[:, third : 2 * third][kept[:, third : 2 * third]].mean()))
    return {name: round(sum(values) / len(values), 4) for name, values in found.items()}


def main() -> None:
    given = record.parse(record.options(__doc__, "frame_times"))
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    speakers, steps = (4, 4) if given.tiny else (12, 20)
    long = manifest_of(given.work, 4.0, "long", speakers)
    short = manifest_of(given.work, 1.3, "short", speakers)
    extracted(long, given.work / "c", ["teacher=none"])
    result: dict[str, object] = {}
    for name, channels in (("tiny", 48),) if given.tiny else (("tiny", 48), ("xvector", 48), ("resnet34", 8)):
        student = [f"student={name}", f"student.channels={channels}", "student.embedding=32"]
        trained = given.work / name
        with contextlib.redirect_stdout(io.StringIO()):
            train(settings_of(given.work / "c", trained, student, ["loss=aam", f"steps={3 * steps}", "crop=1.0"]))
        teacher = ["teacher=checkpoint", f"teacher.weights={trained}", "teacher.targets=[embedding,frames]"]
        rows = {}
        for view, keys in {**VIEWS, "repeated": ["view=full"]}.items():
            cache = given.work / f"{name}-{view}"
            extracted(short if view == "repeated" else long, cache, [*teacher, *keys])
            rows[view] = compared(cache, given.work / f"{name}-{view}-out", student, trained, steps)
            print(
                f"{name:10} {view:10}",
                "   ".join(f"{key} {value:.4f}" for key, value in rows[view].items()),
                flush=True,
            )
        result[name] = rows
    record.keep("frame_times", result, given.tiny)


if __name__ == "__main__":
    main()
