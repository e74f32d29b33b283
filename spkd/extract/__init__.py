"""Teachers and the runner that feeds them."""

from __future__ import annotations

import torch

from spkd.config import TEACHERS, TeacherConfig
from spkd.errors import UsageError, did_you_mean
from spkd.extract.teacher import Teacher


def load_teacher(config: TeacherConfig, device: torch.device) -> Teacher:
    """The teacher of a family, with its weights, on a device.

    Raises:
        UsageError: unknown family, missing weights or packages. SpkdError: damaged weights.
    """
    match config.name:
        case "dvector":
            from spkd.extract.dvector import DVector

            return DVector(config.weights, device)
        case "wavlm" | "hubert" | "wav2vec2":
            from spkd.extract.ssl import SSL

            return SSL(config.name, config.weights, config.layer, device)
        case "checkpoint":
            from spkd.extract.checkpoint import CheckpointTeacher

            return CheckpointTeacher(config.weights, device)
        case "none":
            from spkd.extract.none import NoTeacher

            return NoTeacher()
    raise UsageError(f"teacher={config.name}{did_you_mean(config.name, TEACHERS)}")


__all__ = ["Teacher", "load_teacher"]
