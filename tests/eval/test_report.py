"""report.json, calibration.json, and what reads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.errors import SpkdError
from spkd.eval.calibration import Calibration
from spkd.eval.report import FORMAT, Report
from spkd.students.curves import log_line
from tests.eval.students import save_untrained
from tests.eval.test_calibration import calibration
from tests.foreign import FOREIGN, changed


@pytest.fixture
def report(spkd: Callable, corpus: Path, tmp_path: Path) -> dict:
    """The tree of eval/report.json, of a student that leaves nothing out."""
    save_untrained(tmp_path / "student", corpus)
    log = "".join(log_line(step, {"aam": 1.0}) for step in (0, 20))
    (tmp_path / "student" / "log.jsonl").write_text(log)
    audio = f"manifest={corpus / 'manifest.csv'}"
    spkd("eval", corpus / "trials.txt", audio, "bootstrap=10", "worst=1", "by=[speaker]").ok()
    return json.loads(Path("eval/report.json").read_text())


def test_every_changed_value_is_a_line_that_names_file_and_field(report: dict) -> None:
    again = json.loads(json.dumps(Report.read("eval").to_json()))
    assert again == report
    count, path = 0, Path("eval/report.json")
    for field, damaged in changed(report):
        with pytest.raises(SpkdError) as caught:
            Report.parse(json.dumps(damaged).encode(), str(path))
        message = str(caught.value)
        assert message.startswith(f"{path}: "), field
        assert len(message.splitlines()) == 1, field
        count += 1
    assert count > 80 * len(FOREIGN)


def test_values_that_fit_are_shown_whatever_they_are(spkd: Callable, report: dict) -> None:
    """A report with a digest of its own: huge numbers and odd texts are no traceback on any page."""
    content = {name: value for name, value in report.items() if name not in ("spkd_report", "digest")}
    huge = {name: 100.0 if "percent" in name else 1e308 for name in content["results"]}
    odd = content | {
        "results": huge,
        "intervals": {"eer_percent": [0, 100], "min_dcf_0.01": [0, 1e308]},
        "models": [content["models"][0] | {"parameters": 2**62, "bytes": 2**62, "real_time_factor": 1e-300}],
        "training": content["training"] | {"curves": {"$x": [[0, -1e308], [2**62, 1e308]]}},
        "how": ["<b>\x1b[31m"],
        "notes": ["|"],
    }
    Path("eval/report.json").write_text(json.dumps(FORMAT.seal(odd)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = spkd("report", "eval", "again=eval", "--bootstrap", 5)
    assert done.code == 0, done.err
    assert "&lt;b&gt;" in Path("comparison/comparison.html").read_text()
    spkd("cache", "catalogue", ".").ok()


def test_values_that_no_evaluation_has_are_refused(report: dict) -> None:
    """Even with a digest of their own."""
    content = {name: value for name, value in report.items() if name not in ("spkd_report", "digest")}
    for name, key, value, expected in (
        ("results", "eer_percent", -5.0, "eer_percent is -5"),
        ("results", "eer_percent", 101.0, "eer_percent is 101"),
        ("results", "min_dcf_0.01", -0.1, "min_dcf_0.01 is -0.1"),
        ("intervals", "eer_percent", [-5, 3], "eer_percent is -5"),
        ("intervals", "eer_percent", [30, 20], "the interval of eer_percent ends before it begins"),
    ):
        odd = content | {name: content[name] | {key: value}}
        with pytest.raises(SpkdError, match=expected):
            Report.parse(json.dumps(FORMAT.seal(odd)).encode(), "report.json")


def test_every_changed_value_of_a_calibration_is_a_line(tmp_path: Path) -> None:
    tree = json.loads(json.dumps(calibration().to_json()))
    path = tmp_path / "calibration.json"
    for field, damaged in changed(tree):
        path.write_text(json.dumps(damaged))
        with pytest.raises(SpkdError) as caught:
            Calibration.load(path)
        assert str(caught.value).startswith(f"{path}: "), field
        assert len(str(caught.value).splitlines()) == 1, field
