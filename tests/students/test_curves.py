from __future__ import annotations

import math
from pathlib import Path

import pytest

from spkd.errors import SpkdError
from spkd.students.curves import MOST_POINTS, log_line, read_curves, read_log


def test_curves_are_read_and_what_is_no_point_is_skipped(tmp_path: Path) -> None:
    lines: list[tuple[object, dict[str, object]]] = [(step, {"aam": step / 2, "lr": 1}) for step in (0, 20)]
    lines += [(40, {"aam": math.nan, "lr": math.inf}), ("x", {"aam": 1}), (True, {"aam": 1}), (10**30, {"aam": 1})]
    lines += [(None, {"aam": 1}), (60, {"aam": "x", "lr": True})]
    text = "".join(log_line(step, values) for step, values in lines)  # type: ignore[arg-type]
    (tmp_path / "log.jsonl").write_text(text + '{"step": 80, "aa')
    assert read_curves(tmp_path) == {"aam": ((0, 0.0), (20, 10.0)), "lr": ((0, 1.0), (20, 1.0))}


def test_long_curves_are_thinned_and_no_log_has_none(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    (tmp_path / "log.jsonl").write_text("".join(log_line(step, {"a": 1}) for step in range(10_000)))
    assert MOST_POINTS <= len(read_curves(tmp_path)["a"]) < 2 * MOST_POINTS


@pytest.mark.parametrize("line", ["[1]", "{", "", '{"step": 20, "aam": 1}', '{"step": 20, "aam": 1.5, "check": "0"}'])
def test_a_changed_line_is_named(tmp_path: Path, line: str) -> None:
    path, lines = tmp_path / "log.jsonl", [log_line(step, {"aam": step / 3}) for step in (0, 20, 40)]
    path.write_text("".join(lines))
    assert read_log(path) == [{"step": step, "aam": step / 3} for step in (0, 20, 40)]
    for number in (2, 3):
        path.write_text("".join([*lines[: number - 1], f"{line}\n", *lines[number:]]))
        with pytest.raises(SpkdError, match=f"log.jsonl:{number}: damaged"):
            read_curves(tmp_path)
        # What lies behind the place from which a run goes on is of no importance.
        size = sum(map(len, lines[: number - 1]))
        assert [entry["step"] for entry in read_log(path, size)] == [0, 20][: number - 1]
    path.write_text(lines[0])
    with pytest.raises(SpkdError, match="log.jsonl: damaged .lines are missing"):
        read_log(path, len(lines[0]) + 1)
    assert read_log(tmp_path / "nothing", 100) == []


def test_every_flipped_bit_is_found_or_changes_no_value(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = "".join(log_line(step, {"aam": 0.1 + step, "lr": 1e-3}) for step in (0, 20)).encode()
    path.write_bytes(good)
    expected, found = read_curves(tmp_path), 0
    for at in range(8 * len(good)):
        path.write_bytes(good[: at // 8] + bytes([good[at // 8] ^ 1 << at % 8]) + good[at // 8 + 1 :])
        try:
            read = read_curves(tmp_path)
        except SpkdError:
            found += 1
            continue
        assert read == expected, at
    assert found > 7 * len(good)
