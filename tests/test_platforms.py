"""What a system lacks: macOS has no posix_fadvise, no sched_getaffinity and no /proc, and POSIX leaves them open."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spkd import cores
from spkd.cache import owner
from spkd.files.atomic import machine_id, worker_id
from tests.conftest import save_teacher

LACKING = ("posix_fadvise", "POSIX_FADV_WILLNEED", "sched_getaffinity", "sched_setaffinity", "copy_file_range")
OF_LINUX = ("/proc/", "/sys/")


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This system without the calls and folders of Linux."""

    def hidden(function: Callable) -> Callable:
        def call(path: Any, *given: Any, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(OF_LINUX):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return function(path, *given, **named)

        return call

    import torch._dynamo  # noqa: F401  other packages are those of Linux, and read these folders where they are loaded

    for name in LACKING:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(io, "open", hidden(io.open))
    monkeypatch.setattr("builtins.open", hidden(open))
    monkeypatch.setattr(os, "readlink", hidden(os.readlink))
    monkeypatch.setattr(os, "open", hidden(os.open))
    machine_id.cache_clear()
    yield
    machine_id.cache_clear()


@pytest.mark.usefixtures("macos")
def test_commands_work(spkd: Callable, extraction: list[str], corpus: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Path("/proc/self/stat").read_text()
    save_teacher(Path("teacher"))
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd("manifest", corpus / "audio", "--out", "m.csv").ok()
    spkd(*extraction, "fbank=true", "storage.unit_views=5").ok()
    small = ["student.channels=8", "student.embedding=8", "batch_size=6", "crop=0.5", "steps=2"]
    spkd("train", "loss=cosine", *small).ok()
    spkd("train", "loss=cosine", *small, "augment.noise=synthetic", manifest, "workers=1", "out=loaded").ok()
    spkd("eval", corpus / "trials.txt", manifest, "model=student").ok()
    spkd("cache", "verify", "cache").ok()
    spkd("cache", "info", "cache").ok()


@pytest.mark.usefixtures("macos")
def test_owners_are_known_by_their_heartbeats_alone() -> None:
    assert cores.usable() == os.cpu_count()
    here = owner.this_process()
    assert (here["started"], here["namespace"]) == (None, worker_id())
    assert len(machine_id()) == 6
