"""Single-bit flips anywhere in a cache: does `verify` find every one?

A real cache (synthetic audio through the real extractor, with several targets and a rejected view) gets one flipped bit
at a time: in shards, headers, indices, plan, commit records, card, array metadata and completion record alike.

    python benchmarks/cache_flips.py --flips 1000

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/cache_flips.json.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import record
import soundfile
import torch

from spkd import config
from spkd.cache import verify
from spkd.corpus.manifest import Manifest, Utterance, build
from spkd.demo.synthesis import speaker, utterance
from spkd.errors import SpkdError
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.students import Checkpoint, save_student
from spkd.students import build as build_student
from spkd.teachers import load_teacher

HERE = Path(__file__).parent


def make(work: Path) -> Path:
    """A small cache with targets of every kind."""
    shutil.rmtree(work, ignore_errors=True)
    for s in range(4):
        (work / "audio" / f"s{s}").mkdir(parents=True)
        for u in range(3):
            soundfile.write(work / "audio" / f"s{s}" / f"{u}.wav", utterance(speaker(s), 10 * s + u, 1.0), 16_000)
    manifest, _, _ = build(work / "audio", "folder")
    manifest = Manifest((*manifest.utterances, Utterance("gone", str(work / "gone.wav"), "s0", 1.0)))
    torch.manual_seed(0)
    network = build_student("xvector", channels=16, embedding=8).eval()
    save_student(work / "teacher", Checkpoint(network, torch.randn(4, 8), list("abcd"), 30.0))
    settings = config.load(
        ExtractConfig,
        [
            "teacher=checkpoint",
            f"teacher.weights={work / 'teacher'}",
            "teacher.targets=[frames,stats,embedding,logits]",
            "fbank=true",
            "storage.codecs={frames: int8, stats: float16+zstd}",
            "storage.unit_views=5",
            f"cache={work / 'cache'}",
        ],
        environ={},
    )
    extract(settings, load_teacher(settings.teacher, torch.device("cpu")), manifest)
    return work / "cache"


def kind(root: Path, path: Path, offset: int) -> str:
    """Which part of the cache a byte belongs to."""
    relative = path.relative_to(root)
    if relative.parts[0] == "manifest":
        return "unit manifest"
    if path.name == "0":
        if offset < 128:
            return "shard header"
        return "shard data or index"
    return "array metadata" if path.name == "zarr.json" else relative.name


def main() -> None:
    options = record.options(__doc__, "cache_flips")
    options.add_argument("--flips", type=int, default=1000)
    given = record.parse(options, flips=20)
    root = make(given.work)
    if verify(root):
        raise SystemExit("the fresh cache does not verify")
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "rejected.csv")
    random = np.random.RandomState(0)
    tried: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for flip in range(given.flips):
        # Every other flip in a file by its size, the others in any file: small files matter as much.
        sizes = np.array([p.stat().st_size for p in files], float)
        path = (
            files[random.choice(len(files), p=sizes / sizes.sum())] if flip % 2 else files[random.randint(len(files))]
        )
        good = path.read_bytes()
        offset = random.randint(len(good))
        bad = bytearray(good)
        bad[offset] ^= 1 << random.randint(8)
        path.write_bytes(bytes(bad))
        try:
            damaged = verify(root)
        except SpkdError as error:
            damaged = [str(error)]
        path.write_bytes(good)
        tried[kind(root, path, offset)] += 1
        found[kind(root, path, offset)] += bool(damaged)
        if not damaged:
            print(
                f"missed: {path.relative_to(root)}, byte {offset} of {len(good)}: {bytes(good[offset : offset + 1])!r}"
            )
    print(f"{'part':22} {'flips':>6} {'detected':>9}")
    for part, count in sorted(tried.items()):
        print(f"{part:22} {count:6} {found[part]:9}")
    result = {"flips": given.flips, "detected": sum(found.values()), "parts": dict(tried)}
    record.keep("cache_flips", result, given.tiny)


if __name__ == "__main__":
    main()
