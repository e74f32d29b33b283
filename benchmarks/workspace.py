"""A small laboratory made by the real commands, and what commands leave in a folder, for comparison."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile

from spkd.cache import Cache
from spkd.cache.folder import CARD, COMPLETE, REJECTED
from spkd.cli import main
from spkd.corpus.manifest import Manifest, build
from spkd.demo.synthesis import speaker, utterance
from spkd.errors import SpkdError

PEOPLE = Path(__file__).parents[1] / "spkd" / "demo" / "people"  # recordings
SPEAKERS, UTTERANCES = 4, 3
TEACHER = (
    *("teacher=checkpoint", "teacher.weights=teacher", "teacher.targets=[frames,embedding,logits]"),
    *("storage.unit_views=4", "fbank=true", "device=cpu"),
)
LEARNT = "storage.codecs={frames: int8}"  # a codec that learns; caches of two codebooks cannot be merged
OF_STUDENT = ("extract", "teacher=checkpoint", "teacher.weights=student", "manifest=manifest.csv", "device=cpu")
STUDENT = ("student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6", "device=cpu")
VOLATILE = ("seconds", "real_time_factor", "digest", "check", "made", "at", "writer")  # values that no two runs share
PAGES = (".html", ".svg")
# Files of times and places.
UNCOMPARED = (
    "run.json",
    "run.lock",
    "run.lock.lock",
    "v.json.lock",
    "verified.json",
    "verified.log",
    "pulled.json",
    "zarr.json",
)


def spkd(*arguments: str) -> tuple[int, str]:
    """Exit code of a command in this process and folder, and what it printed."""
    printed, given = io.StringIO(), sys.argv
    sys.argv = ["spkd", *arguments]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as exit_:
        return int(exit_.code or 0), printed.getvalue()
    finally:
        sys.argv = given
    return 0, printed.getvalue()


def must(*arguments: str) -> None:
    """Run a command that has to work."""
    code, printed = spkd(*arguments)
    if code:
        raise SystemExit(f"failed: spkd {' '.join(arguments)}\n{printed}")


def prepare() -> None:
    """Fill the current folder.

    manifest.csv (four speakers, one file that is not there), few.csv and rest.csv (its halves), trials.txt over all
    pairs; dev.csv and dev.txt (other speakers); teacher, a student with classes; cache, share0 and share1 (of the
    halves); ann.flac and bob.flac (real speech); student, with a calibration; one and two (evaluations); out.h5, tars
    and vectors.ark (exports); shard.tar (the audio of manifest.csv).
    """
    for s in range(2 * SPEAKERS):
        folder = Path("audio" if s < SPEAKERS else "audio-dev") / f"s{s}"
        folder.mkdir(parents=True)
        for u in range(UTTERANCES):
            soundfile.write(folder / f"{u}.wav", utterance(speaker(s), 10 * s + u, 1.0), 16_000)
    for name, audio in (("manifest", "audio"), ("dev", "audio-dev")):
        made, _, _ = build(Path(audio).absolute(), "folder")
        made.save(Path(f"{name}.csv"))
        every = made.utterances
        pairs = [(a, b) for i, a in enumerate(every) for b in every[i + 1 :]]
        lines = [f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs]
        Path(f"{'trials' if name == 'manifest' else 'dev'}.txt").write_text("".join(lines))
    every = Manifest.load("manifest.csv").utterances
    for name, part in (("few", every[:6]), ("rest", every[6:])):
        Manifest(part).save(Path(f"{name}.csv"))
    must("extract", "teacher=none", "manifest=manifest.csv", "cache=features", "fbank=true")
    must("train", "--loss", "aam", "cache=features", *STUDENT, "steps=2", "out=teacher")
    must("extract", *TEACHER, LEARNT, "manifest=manifest.csv", "cache=cache")
    for cache, manifest in (("share0", "few"), ("share1", "rest")):
        must("extract", *TEACHER, f"manifest={manifest}.csv", f"cache={cache}")
    must("train", "--loss", "cosine", "cache=cache", *STUDENT, "steps=4", "out=student")
    must("calibrate", "dev.txt", "manifest=dev.csv", "model=student", "force=true", "device=cpu")
    for out, model in (("one", "student"), ("two", "teacher")):
        must("eval", "trials.txt", "manifest=manifest.csv", f"model={model}", "bootstrap=0", "device=cpu", f"out={out}")
    for out in ("out.h5", "tars", "vectors.ark"):
        must("cache", "export", "cache", out)
    for name, recording in (("ann", "1998/1.flac"), ("bob", "2033/0.flac")):
        shutil.copyfile(PEOPLE / recording, f"{name}.flac")
    with tarfile.open("shard.tar", "w") as tar:
        tar.add("audio")


def content(root: Path) -> str:
    """Digest over everything that a complete cache serves, and what it rejects."""
    cache, state = Cache.open(root), hashlib.sha256()
    state.update(json.dumps(sorted(cache.rejected.items())).encode())
    state.update(cache.fingerprint.encode())
    for name in sorted(cache.targets):
        state.update(name.encode() + cache.ragged(cache.usable_views, name).values.numpy().tobytes())
    state.update(str(cache.codebook.digest).encode())
    if cache.head is not None:
        state.update(cache.head.weight.numpy().tobytes())
    return state.hexdigest()


def outcome(folder: Path) -> dict[str, str]:
    """What lies in a folder: path -> digest, without what no two runs share.

    Pages count by their names alone, caches by what they serve; records without the values in `VOLATILE`.
    """
    found = {}
    caches = {path.parent for name in (CARD, COMPLETE) for path in folder.rglob(name)}
    for root in caches:
        try:
            found[f"{root.relative_to(folder)}/"] = content(root)
        except SpkdError as error:
            found[f"{root.relative_to(folder)}/"] = str(error)
    for path in sorted(folder.rglob("*")):
        inside = any(root in path.parents for root in caches) and path.name != REJECTED
        if path.is_dir() or inside or path.name in UNCOMPARED or "tensorboard" in path.parts:
            continue
        found[str(path.relative_to(folder))] = "" if path.suffix in PAGES else _digest(path)
    return found


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError):
            data = json.dumps([_lasting(json.loads(line)) for line in _documents(path, data)]).encode()
    return hashlib.sha256(data).hexdigest()


def _documents(path: Path, data: bytes) -> Iterator[bytes]:
    yield from data.splitlines() if path.suffix == ".jsonl" else [data]


def _lasting(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _lasting(value) for name, value in tree.items() if name not in VOLATILE}
    return [_lasting(value) for value in tree] if isinstance(tree, list) else tree
