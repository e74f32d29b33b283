"""Does a teacher cost a training step anything? A step from the cache against one of the same student without.

One cache of crops holds the student's fbank, and a teacher's embeddings, logits and frames (synthetic audio, an
untrained x-vector as teacher: what is timed does not depend on either). The same student with the same batches is
trained without a teacher (AAM-softmax), and with each kind of target beside it; steps of all of them take turns, so
that all meet the same machine. `online` runs a teacher (ECAPA-TDNN, 512 channels) on the batch's waveforms in every
step. At last the loader
alone: batches of 512 x 2 s of fbank and embedding from the warm cache, with a copy of the same bytes from a memory map
beside it.

    python benchmarks/train_overhead.py

Prints, as its last line, one JSON object; keeps it in benchmarks/results/train_overhead.json.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import record
import soundfile
import torch

from spkd import config
from spkd.cache import Cache
from spkd.corpus.manifest import Manifest, Utterance
from spkd.demo.synthesis import speaker, utterance
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.memory import keep_large_buffers
from spkd.outputs.features import FBANK, input_features
from spkd.students import Checkpoint, build, save_student
from spkd.teachers import load_teacher
from spkd.teachers.settings import ModelConfig
from spkd.train.batches import BatchContent, CropPlan, InputSource, StepBatches, ViewOrder
from spkd.train.labels import Labels
from spkd.train.samplers import shuffled_views
from spkd.train.settings import TrainConfig
from spkd.train.trainer import Run, checked
from spkd.train.trainer import build as build_run

HERE = Path(__file__).parent
SECONDS, EACH, VIEWS = 2.0, 4, 4
# Of the teacher: its frames are as wide as the student's then; a wider one costs a projection in the loss.
WIDTH = 256
VARIANTS = {
    "no_teacher": ["loss=aam"],
    "embedding": ["loss=[aam,cosine]"],
    "logits": ["loss=kld"],
    "frames": ["loss=[aam,multilevel]", "loss.multilevel.levels={frames: frames}"],
}
STUDENT = ["student=xvector", f"crop={SECONDS}", "steps=100000", "device=cpu"]


def prepare(work: Path, speakers: int) -> None:
    """Audio, the teacher, and the cache."""
    rows = []
    for s in range(speakers):
        for u in range(EACH):
            path = work / f"{s}-{u}.wav"
            soundfile.write(path, utterance(speaker(s), EACH * s + u, 3.0), 16_000)
            rows.append(Utterance(path.stem, str(path), f"s{s}", 3.0))
    Manifest(tuple(rows)).save(work / "manifest.csv")
    torch.manual_seed(0)
    network = build("xvector", channels=WIDTH, embedding=192).eval()
    head = torch.nn.functional.normalize(torch.randn(speakers, 192), dim=1)
    save_student(work / "teacher", Checkpoint(network, head, [f"s{s}" for s in range(speakers)], 30.0))
    given = ["teacher=checkpoint", f"teacher.weights={work / 'teacher'}", "fbank=true", f"cache={work / 'cache'}"]
    given += ["teacher.targets=[embedding,logits,frames]", f"view=crops:{VIEWS},{SECONDS}", "device=cpu"]
    settings = config.load(ExtractConfig, [*given, f"manifest={work / 'manifest.csv'}"], environ={})
    extract(settings, load_teacher(settings.teacher, torch.device("cpu")), Manifest.load(settings.manifest))


def run_of(work: Path, batch: int, channels: int, given: list[str]) -> Run:
    keys = [
        *STUDENT,
        *given,
        f"batch_size={batch}",
        f"student.channels={channels}",
        f"cache={work / 'cache'}",
        f"out={work / 'out'}",
    ]
    settings = config.load(TrainConfig, keys, environ={})
    with contextlib.redirect_stdout(io.StringIO()):
        return build_run(checked(settings), work / "out")


def steps_of(run: Run, before: Callable[[int], None] | None = None) -> Iterator[None]:
    """Step after step of a run."""
    batches = run.loader.batches_from(0, run.config.total_steps, run.config, run.device)
    for number, batch in enumerate(batches):
        if before is not None:
            before(number)
        run.optimisation.step(number, [batch])
        yield


def loader_speed(work: Path, seconds: float) -> dict[str, float]:
    """Utterances a second of the loader alone, and of a copy of the same bytes from one memory map."""
    cache = Cache.open(work / "cache")
    content = BatchContent(cache, Labels.of(cache), InputSource(FBANK), ["embedding"])
    size = min(512, len(cache.usable_views) // 2)
    batches = StepBatches(content, ViewOrder(shuffled_views(cache, 0), size), CropPlan((SECONDS,)), 0)

    def timed(call: Callable[[int], object]) -> float:
        for step in range(5):
            call(step)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            call(count)
            count += 1
        return count * size / (time.perf_counter() - start)

    frames = FBANK.num_frames(round(SECONDS * 16_000))
    whole = np.lib.format.open_memmap(work / "flat.npy", "w+", np.float16, (len(cache), frames, 80))
    whole[:] = 1
    vectors = np.lib.format.open_memmap(work / "vectors.npy", "w+", np.float16, (len(cache), 192))
    vectors[:] = 1

    def copy(step: int) -> None:
        views = batches.order.views(step)
        torch.from_numpy(whole[views])
        torch.from_numpy(vectors[views])

    ours = [timed(batches.__getitem__) for _ in range(3)]
    map_ = [timed(copy) for _ in range(3)]
    return {
        "loader_utterances_per_s": round(float(np.median(ours))),
        "memory_map_utterances_per_s": round(float(np.median(map_))),
    }


def main() -> None:
    options = record.options(__doc__, "train_overhead")
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--speakers", type=int, default=64)
    options.add_argument("--batch", type=int, default=64, help="views of a step")
    options.add_argument("--width", type=int, default=WIDTH, help="channels of the student")
    options.add_argument("--channels", type=int, default=512, help="of the teacher that runs in every step")
    options.add_argument("--seconds", type=float, default=3.0, help="that the loader alone is timed for")
    given = record.parse(options, rounds=1, speakers=4, batch=8, width=16, channels=32, seconds=0.1)
    keep_large_buffers()  # as the command line does
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    prepare(given.work, given.speakers)
    loader = loader_speed(given.work, given.seconds)
    print(loader, flush=True)
    runs = {name: run_of(given.work, given.batch, given.width, keys) for name, keys in VARIANTS.items()}
    runs["online"] = run_of(given.work, given.batch, given.width, VARIANTS["embedding"])
    save_student(given.work / "large", Checkpoint(build("ecapa", channels=given.channels, embedding=192).eval()))
    teacher = load_teacher(ModelConfig("checkpoint", str(given.work / "large")), torch.device("cpu"))
    waves = 0.1 * torch.randn(given.batch, round(SECONDS * 16_000))

    def teach(_: int) -> None:
        teacher.extract(waves, ["embedding"])
        input_features(FBANK, waves)  # without a cache the student's features are computed, too

    steps = {name: steps_of(run, teach if name == "online" else None) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    warm_up = min(3, given.rounds)
    for number in range(given.rounds + warm_up):
        for name, step in steps.items():
            start = time.perf_counter()
            next(step)
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    base = np.array(times["no_teacher"])
    ratios = {name: float(np.median(np.array(times[name]) / base)) for name in ("embedding", "logits", "frames")}
    result = {
        "step_time_ratio_cached_vs_no_teacher": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "times_online_teacher": round(medians["online"] / medians["embedding"], 2),
        "step_ms": {name: round(1000 * value, 1) for name, value in medians.items()},
        **loader,
        "rounds": given.rounds,
    }
    record.keep("train_overhead", result, given.tiny)


if __name__ == "__main__":
    main()
