"""What a terminal shows of a run beside its progress: loss terms and their course, learning rate, speed, validation."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

LEVELS = "▁▂▃▄▅▆▇█"
SHOWN = 40  # values of a course


@dataclass
class LiveView:
    """The values of a run as they are logged.

    Attributes:
        courses: of each value, the last ones.
        speed: of the run, in a line; "" while it is not known.
    """

    courses: dict[str, deque[float]] = field(default_factory=dict)
    speed: str = ""

    def add(self, values: Mapping[str, float]) -> None:
        """Values that were logged."""
        for name, value in values.items():
            self.courses.setdefault(name, deque(maxlen=SHOWN)).append(value)

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, last value and course of each, and the speed."""
        shown = [(name, f"{course[-1]:.4g}", sparkline(course)) for name, course in self.courses.items()]
        return [*shown, *([("speed", self.speed, "")] if self.speed else [])]


def sparkline(values: deque[float]) -> str:
    """A course in one line of text, from its lowest value to its highest."""
    low, high = min(values), max(values)
    if not high > low:
        return LEVELS[0] * len(values)
    return "".join(LEVELS[round((value - low) / (high - low) * (len(LEVELS) - 1))] for value in values)
