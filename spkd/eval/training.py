"""Summary of the training of a student, for reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spkd.students.curves import read_curves
from spkd.teachers.checkpoint import CheckpointTeacher


@dataclass(frozen=True)
class TrainingSummary:
    """Summary of the training of a student.

    Attributes:
        batch_size: number of views in one step; None where it is not known.
        steps: number of steps done; None where it is not known.
        last_terms: mean of each loss term over the last steps.
    """

    losses: tuple[str, ...]
    teachers: tuple[str, ...]
    batch_size: int | None = field(metadata={"low": 1})
    steps: int | None = field(metadata={"low": 0})
    last_terms: dict[str, float]
    settings: dict[str, Any]
    curves: dict[str, tuple[tuple[int, float], ...]]

    @classmethod
    def of(cls, student: CheckpointTeacher) -> TrainingSummary:
        training, facts = student.training, student.training.facts
        return cls(
            tuple(facts.losses),
            facts.teacher_families,
            facts.batch_size,
            training.steps,
            training.last_terms,
            training.settings,
            read_curves(student.folder),
        )
