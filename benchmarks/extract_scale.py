"""One cache from one process, from two ranks of torchrun and from two actors of Ray: the same bytes? And after a kill?

    python benchmarks/extract_scale.py

Every process has one thread, so that the three do the same arithmetic. In the last part one of two ranks is killed
(kill -9) in the middle, and the same command is given again: `lost_after_kill` counts units that were committed and are
gone or changed. Prints a table and, as its last line, one JSON object; keeps it in
benchmarks/results/extract_scale.json.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import record
from extract_overhead import corpus, save_resnet

HERE = Path(__file__).parent
RUN = "from spkd.cli import main; main()"
ENGINES = {  # by cache: in words, ranks, further settings
    "one": ("1 process", 1, ()),
    "ranks": ("2 ranks of torchrun", 2, ()),
    "actors": ("2 actors of Ray", 1, ("engine=ray", "processes=2")),
}


def start(work: Path, cache: str, ranks: int, *more: str) -> subprocess.Popen:
    """Extraction by one process or by ranks of torchrun."""
    script = work / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script)]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0", str(script)]
        command = [sys.executable, *launch]
    keys = [
        "teacher=checkpoint", f"teacher.weights={work / 'resnet'}", "teacher.targets=[embedding,stats]", "device=cpu",
        f"manifest={work / 'manifest.csv'}", f"cache={work / cache}", "view=crops:4,2.0", "view.noise=synthetic",
        "storage.unit_views=16", "workers=1", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        [*command, "extract", *keys], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[float, str]:
    begun = time.perf_counter()
    out = process.communicate()[0]
    if process.returncode:
        sys.exit(out)
    return time.perf_counter() - begun, [line for line in out.splitlines() if "views" in line][-1]


def digest(root: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    shards = sorted(p for p in root.glob("*/c/**/*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in shards}


def committed(root: Path) -> set[str]:
    return {p.stem for p in (root / "commits").glob("*.json")}


def kill_one(work: Path, after: int) -> tuple[int, int]:
    """Units committed when a rank was killed, and how many of them were lost or changed in the end.

    Args:
        after: number of units that are committed then at least.
    """
    root, running = work / "killed", start(work, "killed", 2)
    while len(committed(root)) < after and running.poll() is None:
        time.sleep(0.01)
    if running.poll() is not None:
        raise SystemExit("complete before the kill: give more --utterances")
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    running.wait()
    before = {unit: (root / "commits" / f"{unit}.json").read_bytes() for unit in committed(root)}
    shards = digest(root)
    finish(start(work, "killed", 1))
    now = digest(root)
    changed = {name for name in shards if Path(name).name in before and now.get(name) != shards[name]}
    records = {u for u, data in before.items() if (root / "commits" / f"{u}.json").read_bytes() != data}
    return len(before), len(changed) + len(records)


def main() -> None:
    options = record.options(__doc__, "extract_scale")
    options.add_argument("--utterances", type=int, default=64)
    options.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    given = record.parse(options, utterances=8, engines=["one", "ranks"])
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    corpus(given.work, given.utterances).save(given.work / "manifest.csv")
    save_resnet(given.work / "resnet")
    rows, digests = {}, []
    for cache in given.engines:
        name, ranks, more = ENGINES[cache]
        seconds, line = finish(start(given.work, cache, ranks, *more))
        rows[name] = round(seconds, 1)
        digests.append(digest(given.work / cache))
        print(f"{name:<22} {seconds:6.1f} s   {line}", flush=True)
    before, lost = kill_one(given.work, 4 if given.utterances > 32 else 1)
    digests.append(digest(given.work / "killed"))
    print(f"killed with {before} units committed: {lost} lost or changed")
    report = {
        "content_identical": all(d == digests[0] for d in digests),
        "lost_after_kill": lost,
        "committed_before_kill": before,
        "shards": len(digests[0]),
        "seconds": rows,
    }
    record.keep("extract_scale", report, given.tiny)


if __name__ == "__main__":
    main()
