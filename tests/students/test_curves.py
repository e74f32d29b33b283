from __future__ import annotations

import json
from pathlib import Path

from spkd.students.curves import MOST_POINTS, read_curves


def test_curves_are_read_and_what_is_no_point_is_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "aam": step / 2, "lr": 1}) for step in (0, 20)]
    odd = [
        '{"step": 40, "aam": NaN, "lr": Infinity}',
        '{"step": "x", "aam": 1}',
        '{"step": true, "aam": 1}',
        "[1]",
        "{",
    ]
    odd += ['{"step": 1' + "0" * 30 + ', "aam": 1}', '{"aam": 1}', '{"step": 60, "aam": "x", "lr": true}']
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, *odd]))
    assert read_curves(tmp_path) == {"aam": ((0, 0.0), (20, 10.0)), "lr": ((0, 1.0), (20, 1.0))}


def test_long_curves_are_thinned_and_no_log_has_none(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {step}, "a": 1}}\n' for step in range(10_000)))
    assert MOST_POINTS <= len(read_curves(tmp_path)["a"]) < 2 * MOST_POINTS
