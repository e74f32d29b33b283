from __future__ import annotations

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
