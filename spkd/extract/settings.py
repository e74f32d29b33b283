"""Settings of `spkd extract`, and of the commands that reproduce its views."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from spkd.config import Settings, key, load, section
from spkd.corpus.settings import MANIFEST, AugmentationFolders, FetchConfig, ViewConfig
from spkd.errors import UsageError
from spkd.networks.settings import FBANK_NAMES
from spkd.outputs.settings import StorageConfig
from spkd.teachers.settings import DEVICES, ModelConfig, TeacherConfig


@dataclass
class ContentConfig(Settings):
    """Settings of what an extraction stores, and of the teacher that gives it."""

    COMMAND: ClassVar[str] = "extract"
    HINTS: ClassVar[dict[str, str]] = {"model": "teacher"}

    manifest: str = key(MANIFEST, "manifest of the audio (CSV, JSONL or Kaldi folder)")
    teacher: TeacherConfig = section(TeacherConfig)
    view: ViewConfig = section(ViewConfig)
    fbank: bool = key(False, "also store 80-mel fbank of every view, which most students take: training needs no audio")
    features: str = key("kaldi", "whose fbank fbank=true stores; as student.features", FBANK_NAMES)
    wave: bool = key(False, "also store the samples of every view, for students that take the waveform (ssl)")
    storage: StorageConfig = section(StorageConfig)
    batch_size: int = key(
        32,
        "views in one teacher batch; of different length only where padding does not change what the teacher gives",
        low=1,
        high=100_000,
    )
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)

    @property
    def stores_fbank(self) -> bool:
        """Whether fbank is a target, because it is asked for, or because there would be no other."""
        return self.fbank or (self.teacher.name == "none" and not self.wave)

    def unused(self) -> dict[str, str]:
        return {} if self.stores_fbank else {"features": "no fbank is stored (fbank=true)"}


@dataclass
class ExtractConfig(ContentConfig):
    cache: str = key("cache", "folder of the teacher cache")
    workers: int = key(2, "threads, or in longer runs processes, that decode and augment", low=1, high=1024)
    min_seconds: float = key(0.3, "shorter utterances are rejected (s)", low=0, high=100_000)
    engine: str = key(
        "auto",
        "auto: this process, or a rank of torchrun or srun; ray: actors of a Ray cluster; not taken from a file",
        ("auto", "ray"),
        not_from_files=("ray",),
    )
    fetch: FetchConfig = section(FetchConfig)
    processes: int = key(
        0, "actors of engine=ray, or tasks of --slurm-script (0: by the GPUs, or the CPUs)", low=0, high=100_000
    )


def load_pass(
    overrides: Sequence[str], also: Sequence[str], file: Path | None, recipe: str | None
) -> list[ExtractConfig]:
    """Settings of every teacher of one pass over the audio.

    Args:
        overrides: items `key=value` of the command line, which the other teachers share but for teacher and cache.
        also: text of each `--also`: the settings of another teacher.
        file: as `base` and `file` of spkd.config.load, as is `recipe`.
    Raises:
        UsageError: as spkd.config.load, or a key in `also` that only the whole pass can have.
    """
    of_one = ("teacher=", "teacher.", "cache=")
    shared = [item for item in overrides if not item.startswith(of_one)]
    given = [list(overrides)]
    for keys in also:
        try:
            own = shlex.split(keys)
        except ValueError as error:
            raise UsageError(f"--also {keys!r}: {error}") from error
        for item in own:
            if not item.startswith((*of_one, "storage.codec")):
                raise UsageError(
                    f"--also: {item!r} is none of teacher, teacher.*, cache, storage.codec, storage.codecs"
                )
        given.append(shared + own)
    return [load(ExtractConfig, items, file, base=recipe) for items in given]


@dataclass
class EstimateConfig(ContentConfig):
    """Settings of `spkd cache estimate`; the `extract:` section of a file fills them."""

    BORROWS: ClassVar[bool] = True

    def unused(self) -> dict[str, str]:
        return super().unused() | ({"device": "teacher=none runs no model"} if self.teacher.name == "none" else {})


@dataclass
class VerifyConfig(Settings):
    """Settings of `spkd cache verify --live`; the `extract:` section of a file fills them."""

    COMMAND: ClassVar[str] = "extract"
    BORROWS: ClassVar[bool] = True
    HINTS: ClassVar[dict[str, str]] = {"model": "teacher"}

    manifest: str = key(MANIFEST, "manifest of the audio, as at extraction")
    teacher: ModelConfig = section(ModelConfig)
    view: AugmentationFolders = section(AugmentationFolders)
    fetch: FetchConfig = section(FetchConfig)
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)

    def unused(self) -> dict[str, str]:
        return {"device": "teacher=none runs no model"} if self.teacher.name == "none" else {}


@dataclass
class CacheExportConfig(Settings):
    """Settings of `spkd cache export --audio`; the `extract:` section of a file fills them."""

    COMMAND: ClassVar[str] = "extract"
    BORROWS: ClassVar[bool] = True

    manifest: str = key(MANIFEST, "manifest of the audio, as at extraction")
    view: AugmentationFolders = section(AugmentationFolders)
    fetch: FetchConfig = section(FetchConfig)
