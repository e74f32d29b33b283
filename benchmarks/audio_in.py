"""What it costs to read audio from containers rather than from files: the speed of what an extraction does for a view.

The same speech, as FLAC and as 16-bit WAV, is loaded with the features of `teacher=none fbank=true` from files, tars,
zips (stored and deflated), Kaldi's archives and parquet (as pyarrow writes it, and without compression), in turn for
each utterance. What counts is the time of the processor, for each utterance the least of the rounds: what other
processes do to its caches is left out as far as it goes. `containers_over_files` is the worst ratio of hours in an hour
of one core; `bit_equal` whether caches that are extracted have the same bytes; `peak_mb` the most memory of a process
that extracts. The index is timed, too: members in a second of one core, and the bytes that it reads over those of the
containers.

    python benchmarks/audio_in.py --data DIR

DIR holds librispeech-mini. Prints a table and, as its last line, one JSON object; keeps it in
benchmarks/results/audio_in.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import record
import soundfile
import torch

from spkd import config
from spkd.corpus import shards
from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest, build
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.extract.targets import features_of
from spkd.memory import keep_large_buffers
from spkd.outputs.features import FBANK
from spkd.teachers import load_teacher

FORMATS = ("flac", "wav")
FILES = "files"
SHARDS = 4  # containers of each kind


def members(data: Path, form: str, most: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, speaker and content of each of the first files."""
    for utterance in Manifest.load(data / "librispeech-mini" / "train.csv").utterances[:most]:
        wave, rate = soundfile.read(utterance.path, dtype="int16")
        content = io.BytesIO()
        soundfile.write(content, wave, rate, format=form.upper())
        yield utterance.id, utterance.speaker or "", content.getvalue()


def write_files(root: Path, form: str, audio: list[tuple[str, str, bytes]]) -> list[Path]:
    for name, speaker, content in audio:
        path = root / speaker / f"{name}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [root]


def write_tar(path: Path, form: str, audio: list[tuple[str, str, bytes]]) -> None:
    with tarfile.open(path, "w") as file:
        for name, speaker, content in audio:
            for suffix, data in ((form, content), ("spk", speaker.encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def write_zip(path: Path, form: str, audio: list[tuple[str, str, bytes]], method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, speaker, content in audio:
            file.writestr(f"{name}.{form}", content)
            file.writestr(f"{name}.spk", speaker)


def write_ark(path: Path, audio: list[tuple[str, str, bytes]]) -> None:
    """As kaldiio's write_function=soundfile does."""
    with open(path, "wb") as file:
        for name, _, content in audio:
            length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "little")
            file.write(f"{name} AUDIO".encode() + bytes([len(length)]) + length + content)


def write_parquet(path: Path, form: str, audio: list[tuple[str, str, bytes]], compression: str) -> None:
    import pyarrow
    from pyarrow import parquet

    cells = [{"bytes": content, "path": f"{name}.{form}"} for name, _, content in audio]
    table = pyarrow.table({"audio": cells, "speaker": [speaker for _, speaker, _ in audio]})
    parquet.write_table(table, path, row_group_size=100, compression=compression)


def write(kind: str, root: Path, form: str, audio: list[tuple[str, str, bytes]]) -> list[Path]:
    """Write the audio as files or as containers of a kind; the paths for `spkd manifest`."""
    if kind == FILES:
        return write_files(root, form, audio)
    root.mkdir(parents=True)
    paths = []
    for number in range(SHARDS):
        first, last = (len(audio) * each // SHARDS for each in (number, number + 1))
        path, part = root / f"{number:03d}.{kind.partition('-')[0]}", audio[first:last]
        if kind == "tar":
            write_tar(path, form, part)
        elif kind.startswith("zip"):
            write_zip(path, form, part, zipfile.ZIP_DEFLATED if kind == "zip-deflated" else zipfile.ZIP_STORED)
        elif kind == "ark":
            write_ark(path, part)
        else:
            write_parquet(path, form, part, "none" if kind == "parquet-plain" else "snappy")
        paths.append(path)
    return paths


def read_so_far() -> int:
    """Bytes that this process has read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def indexed(kind: str, paths: list[Path], out: Path) -> dict[str, float]:
    """Write the manifest of files or containers. Members in a second of one core, and share of the bytes read."""
    start, before = time.process_time(), read_so_far()
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == FILES:
            build(paths[0], "folder")[0].save(out)
        else:
            shards.index(paths, out)
    seconds, count = time.process_time() - start, sum(1 for _ in open(out)) - 1
    held = sum(path.stat().st_size for root in paths for path in (root.rglob("*.*") if root.is_dir() else [root]))
    return {
        "members_per_second": round(count / seconds),
        "share_read": round((read_so_far() - before) / held, 4),
    }


def extracted(manifest: Path, cache: Path) -> str:
    """Extract to a new cache. Returns a digest of its features."""
    shutil.rmtree(cache, ignore_errors=True)
    given = config.load(
        ExtractConfig, ["teacher=none", "fbank=true", "workers=2", f"manifest={manifest}", f"cache={cache}"], environ={}
    )
    with contextlib.redirect_stdout(io.StringIO()):
        extract(given, load_teacher(given.teacher, "cpu"), Manifest.load(manifest))
    return content(cache)


def least_times(manifests: dict[str, Path], rounds: int) -> tuple[dict[str, np.ndarray], float]:
    """Time of the processor (s) of each utterance from each kind, the least of the rounds; and the hours of all."""
    plan, loaders = ViewPlan.parse(ViewConfig()), dict[str, ViewLoader]()
    for kind, path in manifests.items():
        manifest = Manifest.load(path)
        loaders[kind] = ViewLoader(manifest, plan.views(manifest), plan)
    times = {kind: np.full(len(manifest), np.inf) for kind in manifests}
    for _ in range(rounds + 1):  # the first reads the files into memory
        for view in range(len(manifest)):
            for kind, loader in loaders.items():
                start = time.thread_time()
                features_of(torch.from_numpy(loader(view))[None], [FBANK])
                times[kind][view] = min(times[kind][view], time.thread_time() - start)
    return times, manifest.seconds / 3600


def content(cache: Path) -> str:
    """Digest of the features in a cache."""
    digest = hashlib.sha256()
    for path in sorted(path for path in cache.glob("*/c/**/*") if path.is_file()):
        digest.update(f"{path.relative_to(cache)}".encode() + path.read_bytes())
    return digest.hexdigest()


def alone(manifest: Path, cache: Path) -> float:
    """Most memory of a process that extracts once (MB)."""
    command = [sys.executable, __file__, "--alone", str(manifest), str(cache)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        extracted(Path(sys.argv[2]), Path(sys.argv[3]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    options = record.options(__doc__, "audio_in", data=True, teacher=False)
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--members", type=int, default=160)
    given = record.parse(options, rounds=1, members=4)
    shutil.rmtree(given.work, ignore_errors=True)
    keep_large_buffers()
    torch.set_num_threads(1)
    kinds = [FILES, "tar", "zip", "zip-deflated", "ark"]
    with contextlib.suppress(ImportError):
        import pyarrow  # noqa: F401

        kinds += ["parquet", "parquet-plain"]
    rows, digests = [], set()
    for form in FORMATS:
        audio = sorted(members(given.data, form, given.members), key=lambda each: (each[1], each[0]))
        manifests, costs = {}, {}
        for kind in kinds:
            root = given.work / form / kind
            manifests[kind] = given.work / form / f"{kind}.csv"
            costs[kind] = indexed(kind, write(kind, root, form, audio), manifests[kind])
        for kind, path in manifests.items():  # the same utterances, so that the caches can be compared
            by_stem = {Path(u.id).stem: u for u in Manifest.load(path)}
            made = tuple(replace(by_stem[name], id=name, speaker=speaker) for name, speaker, _ in audio)
            assert kind == FILES or all("#" in u.path for u in made)
            Manifest(made).save(path)
        digests |= {(form, extracted(path, given.work / "cache")) for path in manifests.values()}
        times, hours = least_times(manifests, given.rounds)
        for kind, each in times.items():
            row = {"format": form, "kind": kind, "hours_per_hour": round(hours * 3600 / each.sum())}
            row["over_files"] = round(times[FILES].sum() / each.sum(), 3)
            row |= costs[kind] | {"peak_mb": 0 if given.tiny else round(alone(manifests[kind], given.work / "cache"))}
            rows.append(row)
            speed = f"{row['hours_per_hour']:>6} hours per hour {row['over_files']:>6} of files"
            cost = f"{row['members_per_second']:>6} in a second, {row['share_read']:>7.2%} read"
            print(f"{form:<5} {kind:<14} {speed}  index: {cost}  {row['peak_mb']} MB", flush=True)
    result = {
        "containers_over_files": min(row["over_files"] for row in rows),
        "load": round(os.getloadavg()[0], 1),
        "bit_equal": len(digests) == len(FORMATS),
        "audio_hours": round(hours, 2),
        "members": len(audio),
        "rounds": given.rounds,
        "rows": rows,
    }
    shutil.rmtree(given.work, ignore_errors=True)
    record.keep("audio_in", result, given.tiny)


if __name__ == "__main__":
    main()
