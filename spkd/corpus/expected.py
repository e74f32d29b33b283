"""States of containers when their manifest was read, since places within a changed one lead elsewhere."""

from __future__ import annotations

import os

from spkd.files.reading import State

_states: dict[str, str] = {}  # container -> its state as a text; forked processes have them, too


def state_text(state: State) -> str:
    """State of a container as manifests keep it: `SIZE@TIME`, in bytes and in ns."""
    return f"{state[0]}@{state[1]}"


def expect(container: str, state: str) -> None:
    """Refuse reading of a container from now on where its state is another.

    Args:
        container: its path or URL.
        state: as of `state_text`.
    """
    _states[_key(container)] = state


def states() -> dict[str, str]:
    """Containers with their states, as `expect` takes them; for a process that is not forked from this one."""
    return dict(_states)


def forget(container: str) -> None:
    """Read a container as it is, as it is indexed anew."""
    _states.pop(_key(container), None)


def check(container: str, state: State | None) -> None:
    """Check the state of a container that is to be read. Raises ValueError: it has changed."""
    if state is None or (then := _states.get(_key(container))) is None:
        return
    if then != state_text(state):
        raise ValueError(
            f"its container has changed since it was indexed ({then} then, {state_text(state)} now: bytes and ns); "
            "index it again (spkd manifest)"
        )


def _key(container: str) -> str:
    return container if "://" in container else os.path.abspath(container)
