"""Seconds and memory at scale: opening 8 and 100 million views, and commands at 10,000 to 1,000,000 utterances.

Plans of these sizes are made and written as extraction would write them; the targets themselves, which opening never
touches, are left out. Each cache is opened in a fresh process: `open` is until it can be read, `ready` until labels,
order and places of the first batch are there; `mb` is what the peak of the memory grew by, with the pages of mapped
files, which all processes share, `private_mb` what stays of this process alone, and `most_private_mb` the most of that
at any time. The commands are the estimate, one pass of claims over all units, the completion of a cache whose units are
committed, and the catalogue. As many members of tars are indexed, the manifest is read for the first time, opened by
other processes, and planned. `load` is the number of processes that wanted
a core at the start; `ten_million` is what 10 million members would take by the growth between the last two sizes.

    python benchmarks/scale.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/scale.json.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import record
from synthetic import make_card, whole_views

from spkd.cache import Card, Plan, initialise
from spkd.cache.folder import COMPLETE, CompletionRecord, metadata_files
from spkd.cache.mapped_plan import mend
from spkd.corpus.manifest import Manifest, Utterance
from spkd.files import digest
from spkd.files.atomic import write_json
from spkd.outputs.target import Target

HERE = Path(__file__).parent
TARGETS = [Target("embedding", 256), Target("frames", 512, 320, 400)]
MEASURED = """
import json, sys, threading, time
from pathlib import Path

def kb(name):  # not getrusage's, which a child inherits from its parent
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if name in line))

def watch(most, end):
    while not end.wait(0.05):
        most.append(max(most.pop(), kb("RssAnon")))

def measured(step):
    peak, private, start, cpu = kb("VmHWM"), kb("RssAnon"), time.perf_counter(), time.process_time()
    most, end = [private], threading.Event()
    watcher = threading.Thread(target=watch, args=(most, end))
    watcher.start()
    result = step()
    seconds = {"seconds": round(time.perf_counter() - start, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}
    end.set()
    watcher.join()
    private_memory = {"private_mb": kb("RssAnon") - private, "most_private_mb": max(*most, kb("RssAnon")) - private}
    memory = {name: round(kilobytes / 1024) for name, kilobytes in {"mb": kb("VmHWM") - peak, **private_memory}.items()}
    return result, seconds | memory
"""
OPEN = """
import numpy as np
from spkd.cache import Cache
from spkd.train.labels import Labels, Siblings

def ready():
    labels, views = Labels.of(cache), cache.order(0, 0)[:256]
    siblings = Siblings(cache, labels.instance).same(views, np.random.RandomState(0))
    return labels.label[views], labels.instance[siblings], cache.plan.places(cache.targets["frames"], views)

cache, opened = measured(lambda: Cache.open(sys.argv[1]))
print(json.dumps({"views": len(cache), "open": opened, "ready": measured(ready)[1]}))
"""
COMMANDS = """
from spkd.cache import Plan, claim_units, finalize
from spkd.cache.claims import release
from spkd.cache.folder import CommitRecord, ShardRecord, commit_path, load_card
from spkd.cli import main

root = Path(sys.argv[1]) / "cache"

def run(*arguments):
    sys.argv = ["spkd", *arguments]
    main()

def claim():
    for unit in claim_units(root, card.units):
        release(root, unit)

def commit():
    shards = {target.name: ShardRecord(1, (), 0) for target in card.targets}
    record = json.dumps(CommitRecord({}, {}, shards, {"host": "none"}).to_json())
    (root / "commits").mkdir()
    for unit in range(card.units):
        commit_path(root, unit).write_text(record)

card = load_card(root)
plan = Plan.load(root, card)
found = {"claim": measured(claim)[1]}
commit()
complete, found["finalize"] = measured(lambda: finalize(root, card, plan))
assert complete
folder = str(root.parent)
_, found["catalogue"] = measured(lambda: run("cache", "catalogue", folder, "--out", folder + "/catalogue.html"))
print(json.dumps(found))
"""
ESTIMATE = """
from spkd.cli import main

sys.argv = ["spkd", "cache", "estimate", "teacher=none", "fbank=true", "manifest=" + sys.argv[1], "view=crops:1,2.0"]
print(json.dumps(measured(main)[1]))
"""


MEMBERS = """
from spkd.cache import Plan
from spkd.cli import main
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan

def index():
    sys.argv = ["spkd", "manifest", sys.argv[1] + "/tars", "--out", sys.argv[1] + "/members.csv"]
    main()

def planned():
    return Plan.make(manifest, ViewPlan.parse(ViewConfig()).views(manifest), 1024, 1280.0)

if sys.argv[2] == "index":
    print(json.dumps(measured(index)[1]))
else:
    manifest, load = measured(lambda: Manifest.load(sys.argv[1] + "/members.csv"))
    found = {sys.argv[2] + "_members": load}
    if sys.argv[2] == "open":
        plan, found["plan_members"] = measured(planned)
    print(json.dumps(found))
"""
PER_TAR = 10_000  # members


def in_process(script: str, *arguments: str) -> dict:
    """The last line that a script prints in a process of its own."""
    command = [sys.executable, "-c", MEASURED + script, *arguments]
    users = {"XDG_CACHE_HOME": f"{arguments[0]}.users"}  # what is kept of manifests is of this run
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | users)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def named(utterances: int) -> Manifest:
    """Utterances of 200 to each speaker, with names as long as those of VoxCeleb2."""
    names = (f"id{i // 200:05d}/{i % 1_000_003:011d}/{i % 200:05d}.wav" for i in range(utterances))
    return Manifest(tuple(Utterance(name, name, name[:7], 8.0) for name in names))


def planned(root: Path, manifest: Manifest, crops: int) -> Card:
    """A cache of some crops of each utterance, of which nothing is extracted."""
    shutil.rmtree(root, ignore_errors=True)
    plan = Plan.make(manifest, whole_views(np.full(len(manifest), 32_000), crops), 1024, 1280.0)
    card = make_card(TARGETS, manifest, plan)
    initialise(root, card, [plan])
    return card


def make(root: Path, manifest: Manifest, crops: int) -> None:
    """A finished cache of some crops of each utterance, without its shards."""
    card = planned(root, manifest, crops)
    files = (name for name in metadata_files(card) if not name.endswith(".safetensors"))
    sha256 = {name: digest.of_file(root / name) if (root / name).is_file() else "0" * 64 for name in files}
    record = CompletionRecord(card, {}, 0, sha256)
    mend(root, record)
    write_json(root / COMPLETE, record.to_json())


def write_tars(root: Path, members: int) -> None:
    """Tars of members of 20 ms, since all that an index reads is headers."""
    root.mkdir()
    header = b"RIFF" + struct.pack(
        "<I4s4sIHHIIHH4sI", 676, b"WAVE", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data", 640
    )
    audio = header + bytes(640)
    for number, utterance in enumerate(named(members)):
        if number % PER_TAR == 0:
            tar = tarfile.open(root / f"{number // PER_TAR:05d}.tar", "w")
        info = tarfile.TarInfo(utterance.id)
        info.size = len(audio)
        tar.addfile(info, io.BytesIO(audio))
        if (number + 1) % PER_TAR == 0 or number + 1 == members:
            tar.close()


def members(root: Path, count: int) -> dict:
    """Seconds and memory of an index of so many members, and of a plan of them."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    write_tars(root / "tars", count)
    found = {"index": in_process(MEMBERS, str(root), "index")}
    return {
        "members": count,
        **found,
        **in_process(MEMBERS, str(root), "load"),
        **in_process(MEMBERS, str(root), "open"),
    }


def extrapolated(rows: list[dict], count: int) -> dict:
    """Seconds and MB of each step for so many members, by a line through the last two sizes."""
    (a, b), steps = rows[-2:], [name for name in rows[-1] if name != "members"]

    def at(step: str, kind: str) -> float:
        slope = (b[step][kind] - a[step][kind]) / (b["members"] - a["members"])
        return round(b[step][kind] + slope * (count - b["members"]), 1)

    return {step: {kind: at(step, kind) for kind in b[step]} for step in steps}


def commands(root: Path, utterances: int) -> dict:
    """Seconds and memory of the commands at so many utterances."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    manifest = named(utterances)
    manifest.save(root / "manifest.csv")
    planned(root / "cache", manifest, 1)
    found = {"estimate": in_process(ESTIMATE, str(root / "manifest.csv"))}
    return {"utterances": utterances, **found, **in_process(COMMANDS, str(root))}


def main() -> None:
    options = record.options(__doc__, "scale")
    options.add_argument("--utterances", type=int, default=1_000_000, help="of the caches that are opened")
    options.add_argument("--crops", type=int, nargs="+", default=[8, 100], help="views of each utterance")
    options.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="for the commands")
    options.add_argument("--members", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of tars")
    given = record.parse(options, utterances=2000, crops=[1, 2], sizes=[100], members=[20, 100])
    load, rows, table, indexed, manifest = os.getloadavg()[0], [], [], [], named(given.utterances)
    print(f"{'views':>12} {'open (s)':>9} {'ready (s)':>10} {'private (MB)':>13}")
    for crops in given.crops:
        make(given.work, manifest, crops)
        in_process(OPEN, str(given.work))  # the files are in the page cache, as for all processes but the first
        row = in_process(OPEN, str(given.work))
        rows.append(row)
        seconds = row["open"]["seconds"] + row["ready"]["seconds"]
        memory = row["open"]["private_mb"] + row["ready"]["private_mb"]
        print(f"{row['views']:12,} {row['open']['seconds']:9.2f} {seconds:10.2f} {memory:13}", flush=True)
        shutil.rmtree(given.work)
    del manifest
    for size in given.sizes:
        row = commands(given.work, size)
        table.append(row)
        times = (f"{name} {row[name]['seconds']:.2f} s {row[name]['mb']} MB" for name in row if name != "utterances")
        print(f"{size:12,} utterances: {', '.join(times)}", flush=True)
    for count in given.members:
        row = members(given.work, count)
        indexed.append(row)
        times = (f"{name} {row[name]['seconds']:.2f} s {row[name]['mb']} MB" for name in row if name != "members")
        print(f"{count:12,} members: {', '.join(times)}", flush=True)
    shutil.rmtree(given.work)
    shutil.rmtree(f"{given.work}.users", ignore_errors=True)
    last = rows[-1]["open"]
    result = {
        "open_100m_seconds": last["seconds"],
        "open_100m_mb": last["mb"],
        "rows": rows,
        "commands": table,
        "members": indexed,
        "ten_million": extrapolated(indexed, 10_000_000),
        "load": round(load, 1),
    }
    record.keep("scale", result, given.tiny)


if __name__ == "__main__":
    main()
