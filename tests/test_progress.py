from __future__ import annotations

import os
import pty
import sys

import pytest

from spkd import progress


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.track("working", 10, "views", done=4) as bar:
        bar.advance(3, "loss 0.5")
    out = capsys.readouterr().out
    assert out.startswith("working: 7/10 views, ")
    assert "views/s" in out
    assert "loss 0.5" in out


def test_short_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("working", 2) as bar:
        bar.advance(2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("show", ["progress.log(text)", "list(progress.track(text, 1).__enter__().advance(1) or ())"])
def test_no_secret_and_nothing_that_a_terminal_would_obey_is_shown(show: str) -> None:
    code = f"from spkd import progress\ntext = 'pulling from http://bob:SEC RET@host/x\\x1b[2K'\n{show}\n"
    shown = in_terminal([sys.executable, "-c", code])
    assert "http://***@host/x\\x1b" in shown
    assert "RET" not in shown


def test_a_terminal_shows_a_bar_and_the_note() -> None:
    """In a real pseudo-terminal, from a process of its own."""
    code = (
        "from spkd import progress\n"
        "with progress.track('training', 10, 'views') as bar:\n"
        "    for _ in range(10): bar.advance(1, 'loss 0.5')\n"
    )
    shown = in_terminal([sys.executable, "-c", code])
    for text in ("training", "10/10", "views/s", "loss 0.5"):
        assert text in shown


def in_terminal(command: list[str]) -> str:
    """What a command writes to a terminal."""
    found: list[bytes] = []
    child, descriptor = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, os.environ | {"TERM": "xterm", "COLUMNS": "120"})
    while True:
        try:
            if not (data := os.read(descriptor, 65_536)):
                break
        except OSError:  # the other end is closed
            break
        found.append(data)
    os.waitpid(child, 0)
    return b"".join(found).decode()
