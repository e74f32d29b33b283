"""Teachers: frozen models, one file per family. `spkd extract` runs them, and `spkd eval` scores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkd.errors import SpkdError, first_line
from spkd.registry import TEACHERS
from spkd.teachers.settings import ModelConfig

if TYPE_CHECKING:
    import torch

    from spkd.teachers.base import Teacher

TYPES = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}


def load_teacher(config: ModelConfig, device: torch.device) -> Teacher:
    """Teacher of a family, with its weights, on a device.

    Raises:
        UsageError: unknown family, missing weights or packages.
        SpkdError: damaged weights.
    """
    import torch

    teacher: Teacher = TEACHERS[config.name].load(config, device)
    own = asdict(config.settings)
    teacher.own_settings = {name: own[name] for name in own if name not in teacher.on_card}
    lower = TYPES[config.precision]
    teacher.precision = None if lower is None else getattr(torch, lower)
    if config.compile:
        teacher.forward = _compiled(teacher.forward)  # type: ignore[method-assign]
    return teacher


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forward function that is compiled when it is first called. Raises SpkdError where that fails."""
    import torch

    fast = torch.compile(forward)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return fast(*arguments, **named)
        except SpkdError:
            raise
        except Exception as error:  # the compiler raises many kinds
            raise SpkdError(f"compile=true: {first_line(error)}; run without it") from error

    return call


def load_model(config: ModelConfig, device: torch.device) -> Teacher:
    """Model that `spkd eval` scores: the student in a folder, or else a teacher.

    Args:
        config: settings, whose `name` is the folder or the teacher family.
        device: device of the model.
    Raises:
        UsageError, SpkdError: as load_teacher.
    """
    from spkd.students.description import DESCRIPTION

    if config.name in TEACHERS:
        # A folder may have the name of a family: whoever names weights or settings of the family means that.
        is_plain = config.weights is None and config.settings == TEACHERS.settings(config.name)()
        if not is_plain or not (Path(config.name) / DESCRIPTION).is_file():
            return load_teacher(config, device)
    return load_teacher(ModelConfig("checkpoint", config.name, config.precision, config.compile), device)


__all__ = ["load_model", "load_teacher"]
