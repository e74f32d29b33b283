"""Teachers: frozen models, one file per family. `spkd extract` runs them, and `spkd eval` scores them."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spkd.errors import UsageError
from spkd.progress import log
from spkd.registry import TEACHERS
from spkd.teachers.settings import BUNDLED, CHECKPOINT, STUDENT, ModelConfig

if TYPE_CHECKING:
    import torch

    from spkd.teachers.base import Teacher

TYPES = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}


def load_teacher(config: ModelConfig, device: torch.device) -> Teacher:
    """Teacher of a family, with its weights, on a device.

    Raises:
        UsageError: unknown family, missing weights or packages, a precision that the device lacks, or a dimension that
            the model lacks.
        SpkdError: damaged weights.
    """
    import torch

    from spkd.device import compiled, note_precision

    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError(f"{config.SECTION}.precision=fp16: needs a GPU; bf16 works everywhere")
    note_precision(f"{config.SECTION}.precision", config.precision, device)
    _check_dimension(config)
    teacher: Teacher = TEACHERS[config.name].load(config, device)
    own = asdict(config.settings)
    teacher.own_settings = {name: own[name] for name in own if name not in teacher.on_card}
    lower = TYPES[config.precision]
    teacher.precision = None if lower is None else getattr(torch, lower)
    if config.compile:
        teacher.forward = compiled(teacher.forward, "compile=true")  # type: ignore[method-assign]
    return teacher


def check_model(config: ModelConfig, key: str = "model") -> None:
    """Check that the model that `spkd eval` scores is there, before anything else is done.

    Raises:
        UsageError: neither the folder of a student nor a teacher family, or a dimension that it lacks.
    """
    from spkd.students import check_student

    path = Path(config.name)
    if path.suffix == ".onnx" and path.is_file():
        raise UsageError(f"{path}: an ONNX model; write {key}=onnx {key}.weights={shlex.quote(str(path))}")
    if config.name not in TEACHERS:
        check_student(path)
    elif resolved(config).weights == config.name:
        log(f"note: {key}={path} is the student in that folder; for the family of its name, name {key}.weights")
    _check_dimension(resolved(config))


def _check_dimension(config: ModelConfig) -> None:
    """Check that a model can be used at the dimension that is asked for. Raises UsageError where it cannot."""
    from spkd.students.description import DESCRIPTION, Description

    if config.dimension is None:
        return
    if config.name not in (CHECKPOINT, BUNDLED):
        way = "; export the student at the dimension" if config.name == "onnx" else ""
        raise UsageError(
            f"dimension={config.dimension}: {config.name} has embeddings of one size; only a student that was trained "
            f"with student.nested has several{way}"
        )
    if config.name == BUNDLED:
        from spkd.teachers.bundled import FOLDER

        folder, where = FOLDER, BUNDLED
    else:
        folder = Path(config.weights or STUDENT)
        where = str(folder)
    if (folder / DESCRIPTION).is_file():
        Description.read(folder / DESCRIPTION).part(config.dimension, where)


def load_model(config: ModelConfig, device: torch.device) -> Teacher:
    """Model that `spkd eval` scores: the student in a folder, or else a teacher.

    Args:
        config: settings, whose `name` is the folder or the teacher family.
    Raises:
        UsageError, SpkdError: as load_teacher.
    """
    return load_teacher(resolved(config), device)


def resolved(config: ModelConfig) -> ModelConfig:
    """Settings of a model by its family: those of a student by the family checkpoint, with its folder as weights."""
    from spkd.students.description import DESCRIPTION

    folder = config.name
    if folder == BUNDLED:  # not what happens to lie in the current folder
        return config
    if folder in TEACHERS:
        # A folder may have the name of a family: whoever names weights or settings of the family means that.
        is_plain = config.weights is None and config.settings == TEACHERS.settings(folder)()
        if not is_plain or not (Path(folder) / DESCRIPTION).is_file():
            return config
    return replace(config, name=CHECKPOINT, weights=folder, settings=None)


__all__ = ["check_model", "load_model", "load_teacher", "resolved"]
