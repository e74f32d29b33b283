"""Records of a run in its folder: its settings, its machine and versions, and a page with its curves."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spkd import config
from spkd.cache import CacheSource
from spkd.cache.describe import growth
from spkd.corpus.settings import FetchConfig
from spkd.errors import SpkdError, UsageError, without_secrets
from spkd.files import digest
from spkd.files.atomic import write_bytes, write_json
from spkd.files.reading import read_bytes, read_json, read_text
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.files.text import utc
from spkd.pages import figures, html
from spkd.progress import log
from spkd.students.curves import read_curves
from spkd.train.settings import TrainConfig
from spkd.train.speed import Speed
from spkd.version import __version__

CHECKOUT = Path(__file__).parents[2]
RUN, SETTINGS, PAGE = "run.json", "run.yaml", "train.html"
FORMAT = Format("spkd_run", 1, "the record of a training", "train in another folder (out=FOLDER)")


@dataclass(frozen=True)
class RunRecord:
    """Content of run.json.

    Attributes:
        command: arguments of the command line, without the credentials of addresses.
        started: time of the start (UTC).
        device: name of the GPU, or the kind of device.
        git_commit: commit of spkd's own checkout; None where it was installed as a package.
        code: digest of spkd's own modules; it shows whether they differ from those of the commit or version.
        settings_sha256: digest of run.yaml.
        contents: digests of what the run reads beside its caches, such as labels, by setting.
        speed: speed of the run; None before its end, and for a run too short to be measured.
    """

    command: tuple[str, ...]
    started: str
    host: str
    device: str
    versions: dict[str, str]
    git_commit: str | None
    code: str
    caches: dict[str, str]
    settings_sha256: str
    contents: dict[str, str] = field(default_factory=dict)
    speed: Speed | None = None

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read run.json. Raises SpkdError: missing, damaged, or of another format."""
        return FORMAT.open(read_json(path), str(path), lambda content, where: record(cls, content, where))

    def write(self, path: Path) -> None:
        write_json(path, FORMAT.seal(asdict(self)))

    def facts(self) -> dict[str, Any]:
        """Fields by name, formatted for people."""
        shown = {"started": self.started, "host": self.host, "device": self.device, "code": self.code}
        shown |= {} if self.git_commit is None else {"git commit": self.git_commit}
        facts: dict[str, Any] = {name: value for name, value in shown.items() if value}
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        if self.speed is not None:
            facts["speed"] = str(self.speed)
        facts |= {f"content of {name}": content for name, content in self.contents.items()}
        return facts | {f"cache {name}": fingerprint for name, fingerprint in self.caches.items()}


def start(
    out: Path, settings: TrainConfig, cache: CacheSource, device: torch.device, contents: Mapping[str, str]
) -> None:
    """Write run.json, by which a folder is known as a run's, and run.yaml, which `spkd train --from` repeats.

    Args:
        contents: as of RunRecord.
    """
    # The folder of copies is this machine's, and changes no result.
    dumped = config.dump(replace(settings, fetch=FetchConfig())).encode()
    versions = {
        "spkd": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    RunRecord(
        tuple(map(without_secrets, sys.argv[1:])),
        utc(),
        platform.node(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions,
        _commit_of(CHECKOUT),
        _digest_of(CHECKOUT / "spkd"),
        {member.name: member.fingerprint for member in cache.members},
        digest.of_bytes(dumped),
        dict(contents),
    ).write(out / RUN)
    write_bytes(out / SETTINGS, dumped)


def settings_of(run: Path) -> Path:
    """File of the settings of a training.

    Raises:
        UsageError: there is none.
        SpkdError: it is not the file that the training wrote.
    """
    path = run / SETTINGS
    if not path.is_file():
        raise UsageError(f"{run}: no training was there ({SETTINGS})")
    if digest.of_bytes(read_bytes(path)) != RunRecord.read(run / RUN).settings_sha256:
        raise SpkdError(
            f"{path}: changed since the training (its digest is not that of {RUN}); copy it, and train with --config"
        )
    return path


def validation_of(run: Path) -> dict[str, str]:
    """Settings of the validation of a training, as text: those that differ from the defaults. Raises as settings_of."""
    return (config.read_tree(settings_of(run)).get(TrainConfig.COMMAND) or {}).get("valid", {})


def note_growth(run: Path, caches: Collection[str]) -> None:
    """Print a note of each cache of a run that has grown since.

    Args:
        caches: folders of the caches that a repetition takes.
    """
    for name, fingerprint in RunRecord.read(run / RUN).caches.items():
        if name in caches and (phrase := growth(Path(name), fingerprint)):
            log(f"note: {phrase}; this run takes them all")


def finish(out: Path, speed: Speed | None) -> None:
    """Add the run's speed to run.json, and write its page."""
    if speed is not None:
        replace(RunRecord.read(out / RUN), speed=speed).write(out / RUN)
    write_page(out)


def write_page(out: Path) -> None:
    """Write train.html: every curve of the log, the settings, and the content of run.json."""
    drawn = [figures.lines({name: points}, name) for name, points in read_curves(out).items()]
    parts = [html.figures(*drawn), html.heading("The run"), html.facts(RunRecord.read(out / RUN).facts())]
    parts += [html.heading("Settings"), html.code(read_text(out / SETTINGS))]
    write_bytes(out / PAGE, html.page(f"Training of {out.name}", *parts).encode())


def _digest_of(package: Path) -> str:
    """Digest of the modules of a package."""
    return digest.of_blocks(path.read_bytes() for path in sorted(package.rglob("*.py")))


def _commit_of(checkout: Path) -> str | None:
    """Commit of a checkout; None where it is none.

    It is read from git's files, since git would run programs that the settings of a repository name.
    """
    git = checkout / ".git"
    try:
        if git.is_file():  # a further worktree: `gitdir: PLACE`
            git = checkout / _line(git).removeprefix("gitdir: ")
        head = _line(git / "HEAD")
        if not head.startswith("ref: "):
            return head
        branch = head.removeprefix("ref: ")
        common = git / _line(git / "commondir") if (git / "commondir").is_file() else git
        if (common / branch).is_file():
            return _line(common / branch)
        packed = (line.partition(" ") for line in read_text(common / "packed-refs").splitlines())
        return next((commit for commit, _, name in packed if name == branch), None)
    except (SpkdError, OSError):
        return None


def _line(path: Path) -> str:
    return read_text(path, most=4096).strip()
