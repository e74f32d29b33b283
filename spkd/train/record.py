"""What stays of a run beside the student: its settings, where and with what it ran, its curves on a page."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from spkd import config
from spkd.cache import CacheSource
from spkd.files.atomic import write_bytes, write_json
from spkd.pages import figures, html
from spkd.train.settings import TrainConfig
from spkd.train.speed import describe
from spkd.version import __version__

RUN, SETTINGS, PAGE, LOG = "run.json", "run.yaml", "train.html", "log.jsonl"
PLAIN = ("started", "host", "device", "git_commit")  # of run.json: shown as they are


def start(out: Path, settings: TrainConfig, cache: CacheSource, device: torch.device) -> None:
    """Write run.yaml, from which `spkd train --from` repeats the run, and run.json: command, versions, machine, git
    commit of the working directory, fingerprints of the caches."""
    write_bytes(out / SETTINGS, config.dump(settings).encode())
    tree = {
        "command": sys.argv[1:],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "spkd": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "git_commit": _git_commit(),
        "caches": {member.name: member.fingerprint for member in cache.members},
    }
    write_json(out / RUN, tree)


def finish(out: Path, summary: dict[str, float]) -> None:
    """Add the run's speed to run.json, and write its page."""
    if summary:
        tree = json.loads((out / RUN).read_bytes())
        write_json(out / RUN, tree | {"speed": summary})
    write_page(out)


def write_page(out: Path) -> None:
    """train.html: every curve of log.jsonl, the settings, and where the run was."""
    drawn = [figures.lines({name: points}, name) for name, points in figures.curves(out / LOG).items()]
    tree = json.loads((out / RUN).read_bytes())
    shown: dict[str, object] = {key.replace("_", " "): tree[key] for key in PLAIN if tree.get(key)}
    shown |= {"versions": ", ".join(f"{name} {version}" for name, version in tree["versions"].items())}
    if (speed := tree.get("speed")) is not None:
        shown |= {"speed": describe(speed)}
    shown |= {f"cache {name}": fingerprint for name, fingerprint in tree["caches"].items()}
    parts = [html.figures(*drawn), html.heading("The run"), html.facts(shown)]
    parts += [html.heading("Settings"), html.code((out / SETTINGS).read_text())]
    write_bytes(out / PAGE, html.page(f"Training of {out.name}", *parts).encode())


def _git_commit() -> str | None:
    """Of the working directory, with a + where files were changed; None outside of a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
