"""Records of a run in its folder: its settings, its machine and versions, and a page with its curves."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spkd import config
from spkd.cache import CacheSource
from spkd.files.atomic import read_json, write_bytes, write_json
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.pages import figures, html
from spkd.students.curves import read_curves
from spkd.train.settings import TrainConfig
from spkd.train.speed import describe
from spkd.version import __version__

RUN, SETTINGS, PAGE = "run.json", "run.yaml", "train.html"
FORMAT = Format("spkd_run", 1, "the record of a training", "train in another folder (out=FOLDER)")


@dataclass(frozen=True)
class Speed:
    """Speed of a run, as measured by its meter.

    Attributes:
        views_per_second: trained views per second.
        waited: fraction of the time spent waiting for data.
        memory_gb: peak memory of the GPU, or of the process (GB).
    """

    views_per_second: float = field(metadata={"low": 0})
    waited: float = field(metadata={"low": 0, "high": 1})
    memory_gb: float = field(metadata={"low": 0})


@dataclass(frozen=True)
class RunRecord:
    """Content of run.json.

    Attributes:
        command: arguments of the command line.
        started: time of the start (UTC).
        host: name of the machine.
        device: name of the GPU, or the kind of device.
        versions: versions of spkd, Python and libraries.
        git_commit: commit of the working directory, with a + where files were changed; None outside of a repository.
        caches: fingerprint of each cache.
        speed: speed of the run; None before its end, and for a run too short to be measured.
    """

    command: tuple[str, ...]
    started: str
    host: str
    device: str
    versions: dict[str, str]
    git_commit: str | None
    caches: dict[str, str]
    speed: Speed | None = None

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read run.json. Raises SpkdError: missing, damaged, or of another format."""
        return FORMAT.open(read_json(path), str(path), lambda content, where: record(cls, content, where))

    def write(self, path: Path) -> None:
        write_json(path, FORMAT.seal(asdict(self)))

    def facts(self) -> dict[str, Any]:
        """Fields by name, formatted for people."""
        shown = {"started": self.started, "host": self.host, "device": self.device, "git commit": self.git_commit}
        facts: dict[str, Any] = {name: value for name, value in shown.items() if value}
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        if self.speed is not None:
            facts["speed"] = describe(asdict(self.speed))
        return facts | {f"cache {name}": fingerprint for name, fingerprint in self.caches.items()}


def start(out: Path, settings: TrainConfig, cache: CacheSource, device: torch.device) -> None:
    """Write run.yaml, from which `spkd train --from` repeats the run, and run.json."""
    write_bytes(out / SETTINGS, config.dump(settings).encode())
    versions = {
        "spkd": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    RunRecord(
        tuple(sys.argv[1:]),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        platform.node(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions,
        _git_commit(),
        {member.name: member.fingerprint for member in cache.members},
    ).write(out / RUN)


def finish(out: Path, summary: dict[str, float]) -> None:
    """Add the run's speed to run.json, and write its page."""
    if summary:
        replace(RunRecord.read(out / RUN), speed=Speed(**summary)).write(out / RUN)
    write_page(out)


def write_page(out: Path) -> None:
    """Write train.html: every curve of the log, the settings, and the content of run.json."""
    drawn = [figures.lines({name: points}, name) for name, points in read_curves(out).items()]
    parts = [html.figures(*drawn), html.heading("The run"), html.facts(RunRecord.read(out / RUN).facts())]
    parts += [html.heading("Settings"), html.code((out / SETTINGS).read_text())]
    write_bytes(out / PAGE, html.page(f"Training of {out.name}", *parts).encode())


def _git_commit() -> str | None:
    """Commit of the working directory, with a + where files were changed; None outside of a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
