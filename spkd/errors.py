"""The one family of errors a user is meant to read: printed as a single line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpkdError(Exception):
    """Something failed that the user can mend. Exit code 1."""

    exit_code = 1


class UsageError(SpkdError):
    """The command itself was wrong (unknown key, bad value). Exit code 2."""

    exit_code = 2


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` naming the valid word nearest to `word`, or a few choices when none is near."""
    choices = sorted(valid)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; valid: {', '.join(choices)}" if 0 < len(choices) <= 12 else ""
