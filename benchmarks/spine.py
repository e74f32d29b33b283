"""The spine on real speech: does a student distilled from the cache beat the same student without a teacher?

Runs the commands a user would run (extract, train, eval) on librispeech-mini with the pretrained GE2E d-vector:
one cache of whole recordings at seven speeds, then per seed two students of equal architecture, steps, views and
masks; without the teacher from labels (AAM-softmax, every speed a class of its own), with it from its embeddings alone
(contrastive, labels unused). Nothing is tuned or chosen on the test lists. A second call continues the first.

    python benchmarks/spine.py --data DIR --teacher FILE

Prints a table and, as its last line, one JSON object; keeps both in benchmarks/results/spine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import describe

HERE = Path(__file__).parent
SPEEDS = "view.speeds=[0.85,0.9,0.95,1.0,1.05,1.1,1.15]"
LISTS = {"test_other": "test-other", "test_short": "test-short"}
METHODS = {"student_no_teacher": "aam", "student_kd": "contrastive"}


def spkd(work: Path, threads: int, *arguments: str) -> None:
    """Run one command in `work`; its output goes to log.txt there, and is shown if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", "from spkd.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    with open(work / "log.txt", "a") as log:
        log.write(f"$ spkd {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        raise SystemExit(f"failed: spkd {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def evaluate(work: Path, lists: dict[str, tuple[Path, Path]], threads: int, out: str, *model: str) -> dict[str, dict]:
    """Reports of one model on every list, a manifest and its trials."""
    reports = {}
    for name, (manifest, trials) in lists.items():
        target = work / out / name
        spkd(work, threads, "eval", str(trials), f"manifest={manifest}", f"out={target}", "bootstrap=0", *model)
        reports[name] = json.loads((target / "report.json").read_text())
    return reports


def listed(data: Path) -> dict[str, tuple[Path, Path]]:
    """Manifest and trials of both lists."""
    return {name: (data / f"{split}.csv", data / f"trials-{split}.txt") for name, split in LISTS.items()}


def student(work: Path, data: Path, threads: int, method: str, seed: int, settings: list[str]) -> dict[str, dict]:
    folder = f"{method}-{seed}"
    arguments = ["cache=cache", f"out={folder}", f"seed={seed}", *settings]
    spkd(work, threads, "train", "--loss", METHODS[method], *arguments)
    print(f"trained {folder}", flush=True)
    return evaluate(work, listed(data), threads, f"{folder}-eval", f"model={folder}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="the folder librispeech-mini")
    options.add_argument("--teacher", type=Path, required=True, help="weights of the GE2E d-vector")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--channels", type=int, default=192, help="width of the x-vector student")
    options.add_argument("--jobs", type=int, default=2, help="students trained side by side")
    options.add_argument("--work", type=Path, default=HERE / "work" / "spine")
    given = options.parse_args()
    data, weights, work = given.data.resolve(), given.teacher.resolve(), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    cores = os.cpu_count() or 1
    started = time.time()

    extract = [
        "teacher=dvector",
        f"teacher.weights={weights}",
        f"manifest={data / 'train.csv'}",
        "cache=cache",
        "fbank=true",
        SPEEDS,
    ]
    spkd(work, cores, "extract", *extract)
    extracted = time.time() - started
    teacher = evaluate(work, listed(data), cores, "teacher-eval", "model=dvector", f"weights={weights}")
    print(f"cache and teacher: {time.time() - started:.0f} s", flush=True)

    settings = [f"steps={given.steps}", f"student.channels={given.channels}"]
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            (method, seed): pool.submit(student, work, data, max(cores // given.jobs, 1), method, seed, settings)
            for seed in range(given.seeds)
            for method in METHODS
        }
        reports = {key: run.result() for key, run in runs.items()}

    result: dict[str, object] = {
        f"teacher_eer_{name}": round(teacher[name]["results"]["eer_percent"], 3) for name in LISTS
    }
    print(f"\n{'model':22} {'list':11} {'EER % mean':>10} {'sd':>6} {'minDCF(0.01)':>13} {'sd':>6}   per seed")
    for name in LISTS:
        values = teacher[name]["results"]
        print(f"{'teacher':22} {name:11} {values['eer_percent']:10.2f} {'':6} {values['min_dcf_0.01']:13.3f}")
    for method in METHODS:
        for name in LISTS:
            results = [reports[method, seed][name]["results"] for seed in range(given.seeds)]
            rates, costs = [r["eer_percent"] for r in results], [r["min_dcf_0.01"] for r in results]
            row = {
                "mean": round(statistics.mean(rates), 3),
                "sd": round(statistics.stdev(rates), 3) if len(rates) > 1 else None,
                "seeds": [round(r, 3) for r in rates],
                "min_dcf_0.01_mean": round(statistics.mean(costs), 4),
            }
            result[f"{method}_eer_{name}"] = row
            spread = statistics.stdev(costs) if len(costs) > 1 else 0.0
            print(
                f"{method:22} {name:11} {row['mean']:10.2f} {row['sd'] or 0:6.2f} "
                f"{statistics.mean(costs):13.3f} {spread:6.3f}   " + " ".join(f"{r:.2f}" for r in rates)
            )
    one = reports["student_kd", 0]["test_other"]
    result |= {
        "parameters": one["models"][-1]["parameters"],
        "steps": given.steps,
        "channels": given.channels,
        "seeds": given.seeds,
        "extract_seconds": round(extracted),
        "total_seconds": round(time.time() - started),
        "machine": describe(),
    }
    (HERE / "results" / "spine.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
