"""Codecs on real speech: what each costs in bytes and error, and what it does to a student.

The GE2E d-vector is run on librispeech-mini at seven speeds (whole recordings). Its embeddings and its frames (the last
LSTM layer) are coded by every codec, fitted on three quarters of the speakers and measured on the others. For each
codec of the embeddings a whole cache is extracted under that codec; an x-vector student is then distilled from each
cache by `--loss contrastive` (equal steps, views, masks and seeds) and scored on both test lists. A second call
continues the first.

    python benchmarks/cache_codecs.py --data DIR --teacher FILE

DIR holds librispeech-mini, FILE is the weights of the d-vector.
Prints two tables and, as its last line, one JSON object; keeps it in benchmarks/results/cache_codecs.json.
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import record
from commands import Lists, evaluate, spkd

from spkd.cache import Cache
from spkd.cache import codec as codecs
from spkd.cache.layout import FRAME_CHUNK, compress

HERE = Path(__file__).parent
SPEEDS = "view.speeds=[0.85,0.9,0.95,1.0,1.05,1.1,1.15]"
LISTS = {"test_other": "test-other", "test_short": "test-short"}
STORED = "storage.codecs={{embedding: {}}}"
EMBEDDING = ("float16", "int8", "sq4", "pq64x4", "opq32x4")  # a student of each
FRAMES = ("float32", "float16", "float16+zstd", "int8", "sq8", "sq6", "sq4", "pq64x8", "opq64x8", "pq32x8")


def extract(work: Path, data: Path, weights: Path, threads: int, folder: str, *settings: str) -> Cache:
    common = ("teacher=dvector", f"teacher.weights={weights}", f"manifest={data / 'train.csv'}", f"cache={folder}")
    spkd(work, threads, "extract", *common, *settings)
    print(f"extracted {folder}", flush=True)
    return Cache.open(work / folder)


def lists(data: Path) -> Lists:
    """Manifest and trials of both lists."""
    return {name: (data / f"{split}.csv", data / f"trials-{split}.txt") for name, split in LISTS.items()}


def rows_of(cache: Cache, name: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit codecs on, and rows of other utterances to measure them on."""
    order = np.random.RandomState(0).permutation(len(cache.plan.utterances))
    held_out = np.isin(cache.plan.views.utterance[cache.usable_views], order[: len(order) // 4])
    parts = (cache.ragged(cache.usable_views[which], name).values.numpy() for which in (~held_out, held_out))
    training, measured = (rows[:: max(len(rows) // most, 1)] for rows in parts)
    return training, measured


def cost(cache: Cache, name: str, codec_name: str) -> dict[str, float]:
    """Bytes per row and error of a codec on the teacher's outputs, fitted and measured on different speakers."""
    training, measured = rows_of(cache, name, 20_000)
    codec = codecs.make_codec(codec_name, training.shape[1])
    if codec.training_rows:
        codecs.fit(name, codec, training)
    return {"bytes_per_row": stored_bytes(codec_name, codec.encode(measured)), **codecs.error(codec, measured)}


def stored_bytes(codec_name: str, stored: np.ndarray) -> float:
    """Bytes that a row of these takes in a shard."""
    size = float(stored.nbytes)
    if codecs.compressed(codec_name):
        chunks = [stored[i : i + FRAME_CHUNK] for i in range(0, len(stored), FRAME_CHUNK)]
        size = float(sum(len(compress(chunk.tobytes())) for chunk in chunks))
    return round(size / len(stored), 1)


def spread_cost(cache: Cache, name: str, power: float) -> dict[str, float]:
    """`cost` of int8 with channels divided by sd^power instead of its root: what the codec was chosen against."""
    training, measured = rows_of(cache, name, 20_000)
    codec = codecs.make_codec("int8", training.shape[1])
    codecs.fit(name, codec, training)
    deviation = training.astype(np.float64).std(0)
    codec.parameters["spread"] = np.where(deviation > 0, deviation**power, 1.0).astype(np.float32)
    return {"bytes_per_row": float(codec.columns), **codecs.error(codec, measured)}


def student(work: Path, data: Path, threads: int, codec: str, seed: int, settings: list[str]) -> dict[str, float]:
    """EER (%) of one student on every list."""
    folder = f"student-{codec}-{seed}"
    arguments = [f"cache=embedding-{codec}", f"out={folder}", f"seed={seed}", *settings]
    spkd(work, threads, "train", "--loss", "contrastive", *arguments)
    print(f"trained {folder}", flush=True)
    reports = evaluate(work, lists(data), threads, f"{folder}-eval", f"model={folder}")
    return {name: report["results"]["eer_percent"] for name, report in reports.items()}


def embeddings_table(result: dict) -> str:
    """The first table of docs/cache.md."""
    lines = ["| embedding (256) | bytes | 1 - cosine | worst row | student, test-other (%) | test-short (%) |"]
    lines.append("|---|---|---|---|---|---|")
    for codec, rates in result["students_eer"].items():
        students = " | ".join(f"{rates[name]['mean']:.2f} ± {rates[name]['sd']:.2f}" for name in LISTS)
        lines.append(f"| `{codec}` | {cells(result['errors']['embedding'][codec])} | {students} |")
    return "\n".join(lines)


def frames_table(result: dict) -> str:
    """The second table of docs/cache.md."""
    lines = ["| frames (256, last LSTM layer) | bytes | 1 - cosine | worst row |", "|---|---|---|---|"]
    errors = result["errors"]["frames.layer3"]
    return "\n".join([*lines, *(f"| `{codec}` | {cells(errors[codec])} |" for codec in FRAMES)])


def cells(row: dict[str, float]) -> str:
    """Bytes and errors of a codec."""
    return (
        f"{row['bytes_per_row']:.0f} | {record.figure(1 - row['cosine_mean'])} | {record.figure(1 - row['cosine_min'])}"
    )


def main() -> None:
    options = record.options(__doc__, "cache_codecs", data=True)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--channels", type=int, default=96, help="width of the x-vector student")
    options.add_argument("--jobs", type=int, default=2, help="students trained side by side")
    options.add_argument("--codecs", nargs="+", default=list(EMBEDDING), help="of the embeddings; a student of each")
    options.add_argument("--frames", nargs="+", default=list(FRAMES), help="codecs of the frames")
    given = record.parse(
        options, seeds=1, steps=2, batch_size=8, channels=8, jobs=1, codecs=["float16"], frames=["float16+zstd", "sq4"]
    )
    data, weights, work = given.data / "librispeech-mini", given.teacher, given.work
    work.mkdir(parents=True, exist_ok=True)
    cores, started = 0 if given.tiny else os.cpu_count() or 1, time.time()

    for codec in given.codecs:
        extract(work, data, weights, cores, f"embedding-{codec}", "fbank=true", SPEEDS, STORED.format(codec))
    exact = extract(work, data, weights, cores, "embedding-float32", "fbank=true", SPEEDS, STORED.format("float32"))
    settings = ("teacher.targets=[frames.layer3]", "view=crops:2,3.0", "storage.codec=float32")
    frames = extract(work, data, weights, cores, "frames", *settings)
    errors = {
        "embedding": {codec: cost(exact, "embedding", codec) for codec in given.codecs},
        "frames.layer3": {codec: cost(frames, "frames.layer3", codec) for codec in given.frames},
    }
    print(f"codecs measured after {time.time() - started:.0f} s", flush=True)

    errors["embedding"]["int8, standardised"] = spread_cost(exact, "embedding", 1.0)
    errors["embedding"]["int8, plain"] = spread_cost(exact, "embedding", 0.0)
    errors["frames.layer3"]["int8, standardised"] = spread_cost(frames, "frames.layer3", 1.0)
    errors["frames.layer3"]["int8, plain"] = spread_cost(frames, "frames.layer3", 0.0)

    settings = [f"steps={given.steps}", f"student.channels={given.channels}", f"batch_size={given.batch_size}"]
    threads = min(cores, max(cores // given.jobs, 1))
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            (codec, seed): pool.submit(student, work, data, threads, codec, seed, settings)
            for seed in range(given.seeds)
            for codec in given.codecs
        }
        scored = {key: run.result() for key, run in runs.items()}

    for target, found in errors.items():
        print(f"\n{target:18} {'bytes/row':>9} {'1 - cosine':>11} {'worst':>9} {'relative MSE':>13}")
        for codec, row in found.items():
            print(
                f"{codec:18} {row['bytes_per_row']:9.1f} {1 - row['cosine_mean']:11.1e} {1 - row['cosine_min']:9.1e} "
                f"{row['relative_mse']:13.1e}"
            )
    students = {}
    print(f"\n{'student of':16} {'list':11} {'EER % mean':>10} {'sd':>6}   per seed")
    for codec in given.codecs:
        students[codec] = {}
        for name in LISTS:
            rates = [scored[codec, seed][name] for seed in range(given.seeds)]
            spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
            students[codec][name] = {
                "mean": round(statistics.mean(rates), 3),
                "sd": round(spread, 3),
                "seeds": [round(rate, 3) for rate in rates],
            }
            listed = " ".join(f"{rate:.2f}" for rate in rates)
            print(f"{codec:16} {name:11} {statistics.mean(rates):10.2f} {spread:6.2f}   {listed}")
    result = {
        "errors": errors,
        "students_eer": students,
        "seeds": given.seeds,
        "steps": given.steps,
        "channels": given.channels,
        "total_seconds": round(time.time() - started),
    }
    record.keep("cache_codecs", result, given.tiny)


if __name__ == "__main__":
    main()
