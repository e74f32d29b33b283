"""Several processes that extract one cache together: who this one is, and what all of them did."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from spkd.errors import SpkdError
from spkd.files.atomic import read_json, worker_id, write_json
from spkd.files.schema import record
from spkd.progress import log

FOLDER = "workers"  # of a cache while several processes fill it
# Number and count as launchers put them into the environment.
LAUNCHERS = (("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"))


@dataclass(frozen=True)
class Rank:
    """One of `world` processes. run: what all of them share."""

    number: int
    world: int
    run: str

    @classmethod
    def launched(cls, environ: Mapping[str, str] = os.environ) -> Rank | None:
        """This process's rank under torchrun or srun; None where it is alone."""
        for number, world, run in LAUNCHERS:
            if environ.get(number, "").isdecimal() and environ.get(world, "").isdecimal() and int(environ[world]) > 1:
                return cls(int(environ[number]), int(environ[world]), environ.get(run, ""))
        return None


@dataclass(frozen=True)
class Work:
    """What one process has done so far.

    Attributes:
        views: extracted. hours: of audio. seconds: it took. busy: share of that in which the teacher ran.
    """

    run: str
    rank: int
    views: int
    hours: float
    seconds: float
    busy: float

    def save(self, root: Path) -> None:
        write_json(root / FOLDER / f"{worker_id()}.json", asdict(self))


def merged(root: Path, run: str) -> list[Work]:
    """What the processes of a run did, by rank. Their notes are removed."""
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            work = record(Work, read_json(path), str(path))
        except (SpkdError, OSError):
            continue
        if work.run == run:
            found.append(work)
    shutil.rmtree(root / FOLDER, ignore_errors=True)
    return sorted(found, key=lambda work: work.rank)


def report(root: Path, run: str) -> None:
    """Log what the processes of a run did together."""
    done = [work for work in merged(root, run) if work.views]
    if not done:
        return
    hours, seconds = sum(work.hours for work in done), max(work.seconds for work in done)
    busy = ", ".join(f"{work.busy:.0%}" for work in done)
    log(
        f"{root}: {sum(work.views for work in done)} views by {len(done)} processes, {hours:.2f} h of audio in "
        f"{seconds:.0f} s: {hours * 3600 / max(seconds, 1e-9):.0f} hours per hour; the teachers were busy {busy}"
    )
