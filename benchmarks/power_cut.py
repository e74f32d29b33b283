"""Power cuts at every moment of every command that writes: is anything lost, wrong or stuck afterwards?

Each command runs once while everything that it does to files is recorded. A cut is what a disk may hold after the power
failed behind any of these operations. Of a file, only what was synced is there: the rest is empty. Names that were
given, changed or removed in a folder since it was synced may be there or not; three disks are made of each cut: one
without any of them, one with all, one with those of some folders. Then the same command runs again on what is there,
and a second time where it fails. It is

    lost   where a record promises content that is not there, where what was there before the command is gone, or where
           the command had ended and its result is not there;
    wrong  where it ends well and gives something else than without a cut;
    stuck  where it fails twice, and its result is not there.

    python benchmarks/power_cut.py --cuts 12

takes 12 moments of each command at equal distances (0: all). Left out are the demo, which calls these commands and
whose audio is written by processes of its own, and the export to LiteRT, which writes one file as the others do. Prints
a table and, as its last line, one JSON object; keeps it in benchmarks/results/power_cut.json.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record
from workspace import LEARNT, OF_STUDENT, STUDENT, TEACHER, must, outcome, prepare, spkd

from spkd.cache import verify
from spkd.cache.exchange import formats, hdf5
from spkd.cache.exchange.tars import INDEX, Export
from spkd.cache.folder import CARD, COMPLETE, PULLED, CommitRecord, commit_path, load_card
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.students import Checkpoint, build, load_student, save_student
from spkd.students.description import DESCRIPTION

OUT = Path("o")  # the folder that all commands write into, and the only one
EXTRACT = ("extract", *TEACHER, LEARNT)
TRAIN = ("train", "--loss", "cosine", "cache=cache", *STUDENT)
VALID = ("valid.trials=dev.txt", "valid.manifest=dev.csv", "valid.every=10")
EVAL = ("eval", "trials.txt", "manifest=manifest.csv", "model=student", "bootstrap=0", "device=cpu", "out=o/eval")
BEFORE = time.time() - 3600  # s since the epoch; a machine takes a while to start again
COLUMNS = ("operations", "cuts", "lost", "wrong", "stuck")
VARIANTS = ("without new names", "with new names", "with some new names")


@dataclass(frozen=True)
class Command:
    """A command, and what has to be there.

    Attributes:
        arguments: of the command, which writes below `o`.
        before: arguments of the commands that run first and are not recorded.
    """

    arguments: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()


COMMANDS = {
    "manifest": Command(("manifest", "audio", "--out", "o/m.csv")),
    "manifest, a tar": Command(("manifest", "shard.tar", "--out", "o/m.csv")),
    "extract": Command((*EXTRACT, "manifest=manifest.csv", "cache=o/cache")),
    "extract, a longer manifest": Command(
        (*EXTRACT, "manifest=manifest.csv", "cache=o/cache"), ((*EXTRACT, "manifest=few.csv", "cache=o/cache"),)
    ),
    "extract, silence left out": Command((*EXTRACT, "manifest=manifest.csv", "view.vad=energy", "cache=o/cache")),
    "cache export, HDF5": Command(("cache", "export", "cache", "o/out.h5")),
    "cache export, tars": Command(("cache", "export", "cache", "o/tars")),
    "cache export, ark": Command(("cache", "export", "cache", "o/v.ark")),
    "cache export, npy": Command(("cache", "export", "cache", "o/v.npy")),
    "cache import, HDF5": Command(("cache", "import", "out.h5", "o/cache")),
    "cache import, tars": Command(("cache", "import", "tars", "o/cache")),
    "cache import, ark": Command(("cache", "import", "vectors.ark", "o/cache", "--manifest", "manifest.csv")),
    "cache merge": Command(("cache", "merge", "share0", "share1", "o/cache")),
    "cache push": Command(("cache", "push", "cache", "o/cache")),
    "cache push, tars": Command(("cache", "push", "tars", "o/tars")),
    "cache pull": Command(("cache", "pull", "cache", "o/cache")),
    "cache verify": Command(("cache", "verify", "o/cache"), (("cache", "pull", "cache", "o/cache"),)),
    "cache catalogue": Command(("cache", "catalogue", ".", "--out", "o/catalogue.html")),
    "cache cluster": Command(("cache", "cluster", "cache", "--out", "o/labels.csv.gz")),
    "train": Command((*TRAIN, *VALID, "steps=30", "save_every=10", "out=o/student")),
    "train, more steps": Command(
        (*TRAIN, "optim.schedule=constant", "steps=30", "save_every=10", "out=o/student"),
        ((*TRAIN, "optim.schedule=constant", "steps=10", "out=o/student"),),
    ),
    "train, a sweep": Command((*TRAIN, "-m", "optim.lr=0.01,0.02", "steps=4", "out=o/sweep")),
    "eval": Command(EVAL),
    "eval, again": Command((*EVAL, "worst=3"), (EVAL,)),
    "calibrate": Command(
        ("calibrate", "dev.txt", "manifest=dev.csv", "model=student", "force=true", "device=cpu", "out=o/c.json")
    ),
    "report": Command(("report", "one", "two", "--bootstrap", "5", "--out", "o/comparison")),
    "embed, ark": Command(("embed", "manifest.csv", "model=student", "device=cpu", "out=o/e.ark")),
    "embed, npy": Command(("embed", "manifest.csv", "model=student", "device=cpu", "out=o/e.npy")),
    "enrol": Command(("enrol", "ann", "ann.flac", "model=student", "device=cpu", "voices=o/v.json")),
    "enrol, another": Command(
        ("enrol", "bob", "bob.flac", "model=student", "device=cpu", "voices=o/v.json"),
        (("enrol", "ann", "ann.flac", "model=student", "device=cpu", "voices=o/v.json"),),
    ),
    "map": Command(("map", "cache", "o/new", "steps=2", "out=o/map"), ((*OF_STUDENT, "cache=o/new"),)),
    "map, another": Command(
        ("map", "cache", "o/new", "steps=2", "hidden=4", "out=o/map"),
        ((*OF_STUDENT, "cache=o/new"), ("map", "cache", "o/new", "steps=2", "out=o/map")),
    ),
    "voices, mapped": Command(
        ("voices", "o/v.json", "--map", "o/map", "--out", "o/mapped.json"),
        (
            (*OF_STUDENT, "cache=o/new"),
            ("map", "cache", "o/new", "steps=2", "out=o/map"),
            ("enrol", "ann", "ann.flac", "model=teacher", "device=cpu", "voices=o/v.json"),
        ),
    ),
    "export, ONNX": Command(("export", "student", "--to", "onnx", "out=o/m.onnx")),
    "export, 8-bit ONNX": Command(
        ("export", "student", "--to", "onnx-int8", "onnx_int8.manifest=manifest.csv", "out=o/m.onnx")
    ),
    "export, pt2": Command(("export", "student", "--to", "pt2", "out=o/m.pt2")),
    "export, WeSpeaker": Command(("export", "wide", "--to", "wespeaker", "out=o/wespeaker")),
}
TINY = ("manifest", "cache push", "eval")

Entries = Mapping[str, int]  # name in a folder -> inode


@dataclass
class Disk:
    """What a disk holds for sure, and what it may hold.

    Attributes:
        folders: inode of a folder -> its entries now.
        synced: inode of a folder -> its entries when it was synced.
        content: inode of a file -> its content when it was synced.
        done: operations so far, in words.
    """

    folders: dict[int, Entries] = field(default_factory=dict)
    synced: dict[int, Entries] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)
    done: str = ""

    def copy(self) -> Disk:
        return Disk(dict(self.folders), dict(self.synced), dict(self.content), self.done)


class Recorder:
    """Recorder of what happens to the files below a folder, by replacing functions of `os`.

    Whatever a library writes without them counts once it is synced by them, as on a disk.

    Args:
        root: the folder, in which all is synced.
    Attributes:
        disks: the disk before the first operation, and behind each.
    """

    CHANGES = ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir")
    TWO_NAMES = CHANGES[:4]
    SYNCS = ("fsync", "fdatasync")

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root.absolute(), threading.RLock()
        self._held: dict[int, int] = {}  # descriptors, so that no number of an inode is given twice
        now = Disk()
        self._look(now)
        now.synced = dict(now.folders)
        now.content = {inode: path.read_bytes() for inode, path in self._files.items()}
        self.disks = [now]

    def _look(self, disk: Disk) -> None:
        """Note the entries of all folders."""
        folders: dict[int, Entries] = {}
        self._files: dict[int, Path] = {}

        def visit(folder: Path) -> int:
            inode, entries = folder.stat().st_ino, {}
            for entry in os.scandir(folder):
                path = Path(entry.path)
                with contextlib.suppress(FileNotFoundError):
                    entries[entry.name] = visit(path) if entry.is_dir() else self._hold(path)
            folders[self._hold(folder)] = entries
            return inode

        self.root_inode = visit(self._root)
        same = {inode for inode, entries in folders.items() if disk.folders.get(inode) == entries}
        disk.folders = {inode: (disk.folders if inode in same else folders)[inode] for inode in folders}

    def _hold(self, path: Path) -> int:
        found = path.stat()
        if found.st_ino not in self._held:
            self._held[found.st_ino] = os.open(path, os.O_RDONLY)
        if stat.S_ISREG(found.st_mode):
            self._files[found.st_ino] = path
        return found.st_ino

    def __enter__(self) -> Recorder:
        self._real = {name: getattr(os, name) for name in (*self.CHANGES, *self.SYNCS)}
        for name in self._real:
            setattr(os, name, self._recorded(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)
        for descriptor in self._held.values():
            os.close(descriptor)

    def _recorded(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def run(*given: Any, **named: Any) -> Any:
            with self._lock:
                result = real(*given, **named)
                disk = self.disks[-1].copy()
                disk.done = f"{name} {self._shown(given[name in self.TWO_NAMES])}"
                self._look(disk)
                if name in self.SYNCS:
                    inode = os.fstat(given[0]).st_ino
                    if inode in disk.folders:
                        disk.synced[inode] = disk.folders[inode]
                    elif (path := Path(os.readlink(f"/proc/self/fd/{given[0]}"))).is_file():  # also outside of the root
                        disk.content[inode] = path.read_bytes()
                self.disks.append(disk)
                return result

        return run

    def _shown(self, given: object) -> str:
        path = os.readlink(f"/proc/self/fd/{given}") if isinstance(given, int) else str(given)
        return path.removeprefix(f"{self._root}/")


def restore(disk: Disk, root_inode: int, root: Path, variant: str, chance: random.Random) -> None:
    """Make the folder that a power cut leaves."""

    def make(inode: int, folder: Path) -> None:
        folder.mkdir()
        has_new = {VARIANTS[0]: False, VARIANTS[1]: True}.get(variant, chance.random() < 0.5)
        synced = disk.synced.get(inode, {})
        for name, entry in (disk.folders.get(inode, synced) if has_new else synced).items():
            if entry in disk.folders or entry in disk.synced:
                make(entry, folder / name)
            else:
                (folder / name).write_bytes(disk.content.get(entry, b""))
                os.utime(folder / name, (BEFORE, BEFORE))

    shutil.rmtree(root, ignore_errors=True)
    make(root_inode, root)


def broken_promises(root: Path) -> list[str]:
    """What records say is there, and is not."""
    checks = {CARD: _of_cache, DESCRIPTION: _of_student, INDEX: _of_tars}
    broken = []
    for name, check in checks.items():
        for path in root.rglob(name):
            try:
                broken += check(path.parent)
            except (SpkdError, OSError) as error:
                broken.append(str(error))
    return broken


def _of_cache(root: Path) -> list[str]:
    if (root / PULLED).is_file() and not (root / COMPLETE).is_file():
        return []  # an unfinished pull, which begins with the records
    card = load_card(root)
    committed = [unit for unit in range(card.units) if commit_path(root, unit).is_file()]
    for unit in committed:
        for target, shard in CommitRecord.load(root, card, unit).targets.items():
            path = root / target / "c" / str(unit) / "0"
            if not path.is_file() or path.stat().st_size != shard.bytes:
                return [f"{path}: committed, but not there"]
    return verify(root) if (root / COMPLETE).is_file() else []


def _of_student(root: Path) -> list[str]:
    load_student(root)
    return []


def _of_tars(root: Path) -> list[str]:
    index = Export(str(root)).index
    files = {**index["small"], **index["tars"]}
    return [f"{root / name}: damaged" for name, check in files.items() if digest.of_file(root / name) != check]


def inputs() -> dict[str, tuple[int, int]]:
    """Size and time of every file that no command may change."""
    files = (path for path in Path().rglob("*") if path.is_file() and path.parts[0] != OUT.name)
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.name not in ("pulled.json",)}


def moments(count: int, most: int) -> list[int]:
    """Numbers of the disks to try; the last, of the finished command, is always among them."""
    if not most or count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def try_command(command: Command, cuts: int) -> dict[str, int]:
    """Record a command, then run it again behind its cuts."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for arguments in command.before:
        must(*arguments)
    before = inputs()
    with Recorder(OUT) as recorder:
        must(*command.arguments)
    expected, chance = outcome(OUT), random.Random(0)
    found = dict.fromkeys(COLUMNS, 0) | {"operations": len(recorder.disks) - 1}

    def blame(kind: str, where: str, why: object) -> None:
        found[kind] += 1
        if found[kind] <= 3:
            print(f"    {kind}: {where}: {str(why)[:300]}", flush=True)

    for moment in moments(len(recorder.disks), cuts):
        disk, ended = recorder.disks[moment], moment == len(recorder.disks) - 1
        for variant in VARIANTS:
            restore(disk, recorder.root_inode, OUT, variant, chance)
            found["cuts"] += 1
            where = f"behind {disk.done or 'nothing'} ({moment} of {len(recorder.disks) - 1}), {variant}"
            broken = broken_promises(OUT)
            if broken or (ended and not expected.items() <= outcome(OUT).items()):
                blame("lost", where, broken or differences(outcome(OUT), expected))
            code, printed = spkd(*command.arguments)
            if code:
                code, printed = spkd(*command.arguments)
            after = outcome(OUT)
            if code and after != expected:  # an import is refused where it is complete
                blame("stuck", where, printed.strip()[-300:])
            elif after != expected:
                blame("wrong", where, differences(after, expected))
            if inputs() != before:
                blame("lost", where, "a file that the command only reads")
                before = inputs()
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)))


def import_here(path: Path, root: Path) -> None:
    """Import an HDF5 file in this process, where it is recorded."""
    try:
        hdf5._import(path, root)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise SpkdError(str(error)) from error


def main() -> None:
    options = record.options(__doc__, "power_cut")
    options.add_argument("--cuts", type=int, default=12, help="moments of each command; 0: all")
    options.add_argument("--only", help="commands whose name begins so")
    given = record.parse(options, cuts=4)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    results, imports = {}, formats.import_hdf5
    print(" ".join([f"{'command':28}", *(f"{column:>10}" for column in COLUMNS)]), flush=True)
    with contextlib.chdir(given.work):
        prepare()
        save_student("wide", Checkpoint(build("campplus", embedding=8)))  # of a width that WeSpeaker has
        formats.import_hdf5 = import_here  # type: ignore[assignment]
        for name, command in COMMANDS.items():
            if (given.tiny and name not in TINY) or not name.startswith(given.only or ""):
                continue
            results[name] = row = try_command(command, given.cuts)
            print(" ".join([f"{name:28}", *(f"{row[column]:>10}" for column in COLUMNS)]), flush=True)
        formats.import_hdf5 = imports
    total = {column: sum(row[column] for row in results.values()) for column in COLUMNS[1:]}
    record.keep("power_cut", {"commands": len(results), **total, "rows": results}, given.tiny or bool(given.only))


if __name__ == "__main__":
    main()
