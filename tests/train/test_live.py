from __future__ import annotations

from collections import deque

from spkd.train.live import SHOWN, LiveView, sparkline


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value() -> None:
    assert sparkline(deque([0.0, 7.0, 3.5])) == "▁█▅"
    assert sparkline(deque([2.0, 2.0])) == "▁▁"


def test_rows_hold_the_last_value_and_its_course() -> None:
    view = LiveView()
    for step in range(2 * SHOWN):
        view.add({"contrastive": 4.0 / (step + 1), "lr": 0.002})
    view.add({"valid_eer_percent": 3.25})
    view.speed = "500 utterances/s"
    rows = view.rows()
    assert [row[0] for row in rows] == ["contrastive", "lr", "valid_eer_percent", "speed"]
    assert rows[0][1] == "0.05"
    assert len(rows[0][2]) == SHOWN
    assert rows[2][1:] == ("3.25", "▁")
    assert rows[3][1] == "500 utterances/s"
