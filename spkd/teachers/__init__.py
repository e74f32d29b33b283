"""Teachers: frozen models, one file per family. `spkd extract` runs them, and `spkd eval` scores them."""

from __future__ import annotations

from pathlib import Path

import torch

from spkd.config import ModelConfig
from spkd.registry import TEACHERS
from spkd.teachers.base import Teacher


def load_teacher(config: ModelConfig, device: torch.device) -> Teacher:
    """The teacher of a family, with its weights, on a device.

    Raises:
        UsageError: unknown family, missing weights or packages. SpkdError: damaged weights.
    """
    teacher: Teacher = TEACHERS[config.name].load(config, device)
    return teacher


def load_model(name: str, weights: str | None, layer: int | None, device: torch.device) -> Teacher:
    """What `spkd eval` scores: a student's folder, whatever it is called, or else a teacher family.

    Raises:
        UsageError, SpkdError: as load_teacher.
    """
    if name in TEACHERS and not (Path(name) / "model.json").is_file():
        return load_teacher(ModelConfig(name, weights, layer), device)
    return load_teacher(ModelConfig("checkpoint", name), device)


__all__ = ["Teacher", "load_model", "load_teacher"]
