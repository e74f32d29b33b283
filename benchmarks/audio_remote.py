"""Extraction from shards on a web server and in a bucket against the same shards as local files.

The shards are tars of FLAC. The servers run in a process of their own on this machine, on a core of their own, as other
machines would, and wait before each answer as a network does (--latency). What is timed is `teacher=none fbank=true`
with two workers on the other cores, by the clock, local and remote in turn; ratios are medians over the rounds, and
need an idle machine: `load` is the number of processes that wanted a core at the start. The shards are small, since the
bucket's server copies the whole object for each range that it gives. `remote_over_files` is the
worst ratio, `bit_equal` whether all caches have the same bytes.

    python benchmarks/audio_remote.py --data DIR

DIR holds librispeech-mini. Prints a table and, as its last line, one JSON object; keeps it in
benchmarks/results/audio_remote.json.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import record
import torch
from audio_in import content, members, write_tar
from s3fs import S3FileSystem

from spkd import config
from spkd.corpus import remote, shards
from spkd.corpus.manifest import Manifest
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.memory import keep_large_buffers
from spkd.teachers import load_teacher

BUCKET = "shards"
CORES = os.sched_getaffinity(0)
SERVERS = {max(CORES)}  # cores of the servers
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Handler that gives ranges of files, after a pause."""

    latency = 0.0  # s
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.latency)
        with open(self.translate_path(self.path), "rb") as file:
            size, changed = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or f"bytes=0-{size - 1}")
            first, last = int(match[1]), min(int(match[2]), size - 1)  # type: ignore[index]
            file.seek(first)
            data = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(changed))
        self.end_headers()
        self.wfile.write(data)


def serve(kind: str, folder: str, latency: float, core: int) -> None:
    """Serve a folder by HTTP, or an empty store by S3, on one core; print the port."""
    os.sched_setaffinity(0, {core})
    if kind == "http":
        handler = type("Late", (Ranges,), {"latency": latency})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
        print(server.server_port, flush=True)
        server.serve_forever()
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)

    def late(environment: dict, start: object) -> object:
        time.sleep(latency if environment["REQUEST_METHOD"] == "GET" else 0)
        return app(environment, start)

    server = make_server("127.0.0.1", 0, late, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextlib.contextmanager
def bucket_of(store: str) -> Iterator[S3FileSystem]:
    """The file system of the store at an address, named in the environment for a time, as a user would.

    File systems that were opened before belong to other stores; they are forgotten before and after.
    """
    S3FileSystem.clear_instance_cache()
    with mock.patch.dict(os.environ, KEYS | {"AWS_ENDPOINT_URL": store}):
        files = S3FileSystem()
        files.mkdir(BUCKET)
        yield files
    S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def server(kind: str, folder: Path, latency: float) -> Iterator[str]:
    """Address of a server in a process of its own."""
    core = str(max(SERVERS))
    command = [sys.executable, __file__, "--serve", kind, str(folder), str(latency), core]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        try:
            assert run.stdout is not None
            yield f"http://127.0.0.1:{int(run.stdout.readline())}"
        finally:
            run.kill()


def extracted(manifest: Path, cache: Path) -> tuple[float, str]:
    """Seconds of an extraction to a new cache, and a digest of its features."""
    shutil.rmtree(cache, ignore_errors=True)
    for of_process in (remote._opened, remote._blocks, remote._ranges):  # as in a process of its own
        of_process.cache_clear()
    given = config.load(
        ExtractConfig, ["teacher=none", "fbank=true", "workers=2", f"manifest={manifest}", f"cache={cache}"], environ={}
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        extract(given, load_teacher(given.teacher, "cpu"), Manifest.load(manifest))
    return time.perf_counter() - start, content(cache)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
        return
    options = record.options(__doc__, "audio_remote", data=True, teacher=False)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--members", type=int, default=180)
    options.add_argument("--copies", type=int, default=8, help="of each member, under other names")
    options.add_argument("--shards", type=int, default=16)
    options.add_argument("--latency", type=float, default=0.02, help="of an answer (s)")
    given = record.parse(options, rounds=1, members=4, copies=1, shards=2)
    load = os.getloadavg()[0]
    os.sched_setaffinity(0, CORES - SERVERS or CORES)
    keep_large_buffers()
    torch.set_num_threads(1)
    shutil.rmtree(given.work, ignore_errors=True)
    folder = given.work / "shards"
    folder.mkdir(parents=True)
    audio = list(members(given.data, "flac", given.members))
    every = [(f"{copy}-{name}", speaker, data) for copy in range(given.copies) for name, speaker, data in audio]
    for number in range(given.shards):
        write_tar(folder / f"{number}.tar", "flac", every[number :: given.shards])
    names = [f"{number}.tar" for number in range(given.shards)]
    with (
        server("http", folder, given.latency) as web,
        server("s3", folder, given.latency) as store,
        bucket_of(store) as files,
    ):
        files.put([str(folder / name) for name in names], f"{BUCKET}/")
        places = {"files": str(folder), "http": web, "s3": f"s3://{BUCKET}"}
        manifests = {kind: given.work / f"{kind}.csv" for kind in places}
        index = {}
        for kind, place in places.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                shards.index([f"{place}/{name}" for name in names], manifests[kind])
            index[kind] = round(len(every) / (time.perf_counter() - start))
        hours = Manifest.load(manifests["files"]).seconds / 3600
        seconds: dict[str, list[float]] = {kind: [] for kind in places}
        digests = set()
        for _ in range(given.rounds + 1):  # the first opens connections, and reads the files into memory
            for kind, manifest in manifests.items():
                taken, digest = extracted(manifest, given.work / "cache")
                seconds[kind].append(taken)
                digests.add(digest)
    kept = {kind: each[1:] or each for kind, each in seconds.items()}
    ratios = {
        kind: round(statistics.median(a / b for a, b in zip(kept["files"], kept[kind], strict=True)), 3)
        for kind in places
        if kind != "files"
    }
    for kind, each in kept.items():
        speed = hours / statistics.median(each) * 3600
        print(f"{kind:<6} {speed:>7.0f} hours per hour  {ratios.get(kind, 1.0):>6} of files  index: {index[kind]}/s")
    result = {
        "remote_over_files": min(ratios.values()),
        "ratios": ratios,
        "seconds": {kind: [round(each, 2) for each in times] for kind, times in kept.items()},
        "members_indexed_per_second": index,
        "bit_equal": len(digests) == 1,
        "audio_hours": round(hours, 2),
        "members": len(every),
        "latency": given.latency,
        "rounds": given.rounds,
        "load": round(load, 1),
    }
    shutil.rmtree(given.work, ignore_errors=True)
    record.keep("audio_remote", result, given.tiny)


if __name__ == "__main__":
    main()
