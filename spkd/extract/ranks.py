"""Ranks of processes that extract one cache together, and reports of their work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from spkd.errors import SpkdError
from spkd.files.atomic import check_no_links, remove_abandoned, worker_id, write_json
from spkd.files.reading import read_json
from spkd.files.schema import record
from spkd.files.text import counted
from spkd.progress import log

FOLDER = "workers"  # folder in a cache while several processes fill it
# Variables of the environment with number, count and name of the run, as launchers set them.
LAUNCHERS = (("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"))


@dataclass(frozen=True)
class Rank:
    """Rank of a process.

    Attributes:
        number: number of the process, counted from 0.
        world: number of processes.
        run: name of the run, the same for all its processes.
    """

    number: int
    world: int
    run: str

    @classmethod
    def launched(cls, environ: Mapping[str, str] = os.environ) -> Rank | None:
        """Rank of this process under torchrun or srun; None where it is the only process."""
        for number, world, run in LAUNCHERS:
            if environ.get(number, "").isdecimal() and environ.get(world, "").isdecimal() and int(environ[world]) > 1:
                return cls(int(environ[number]), int(environ[world]), environ.get(run, ""))
        return None


@dataclass(frozen=True)
class Work:
    """Work that one process has done so far.

    Attributes:
        hours: duration of their audio (h).
        seconds: time since the start (s).
        busy: share of the time in which the teacher ran.
    """

    run: str
    rank: int
    views: int
    hours: float
    seconds: float
    busy: float

    def save(self, root: Path) -> None:
        """Write it to the folder of a cache."""
        check_no_links(root, [FOLDER])
        write_json(root / FOLDER / f"{worker_id()}.json", asdict(self))


def merged(root: Path, run: str) -> list[Work]:
    """Read the work of all processes of a run, sorted by rank, and remove the files."""
    works = []
    check_no_links(root, [FOLDER])
    remove_abandoned(root / FOLDER)
    for path in sorted((root / FOLDER).glob("*.json")):
        with contextlib.suppress(SpkdError, OSError):
            work = record(Work, read_json(path), str(path))
            works += [work] * (work.run == run)
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds files of others
        (root / FOLDER).rmdir()
    return sorted(works, key=lambda work: work.rank)


def report(root: Path, run: str) -> None:
    """Log the work of all processes of a run together."""
    done = [work for work in merged(root, run) if work.views]
    if not done:
        return
    hours, seconds = sum(work.hours for work in done), max(work.seconds for work in done)
    busy = ", ".join(f"{work.busy:.0%}" for work in done)
    log(
        f"{root}: {counted(sum(work.views for work in done), 'view')} by {counted(len(done), 'rank')}, "
        f"{hours:.2f} h of audio in {seconds:.0f} s: {hours * 3600 / max(seconds, 1e-9):.0f} hours per hour; "
        f"the teachers were busy {busy}"
    )
