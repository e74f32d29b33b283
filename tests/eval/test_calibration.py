from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spkd.errors import SpkdError, UsageError
from spkd.eval.calibration import PLAIN, Calibration, System, TrainedOn, fit

ON = TrainedOn("dev.txt", "0" * 64, 10, 20, ("ann", "bob"))


def calibration(**changes: object) -> Calibration:
    given_ = {
        "features": ("score",),
        "weights": (2.0,),
        "offset": -1.0,
        "p_target": 0.05,
        "system": System(("a" * 64,), 1, PLAIN),
        "trained_on": ON,
        "thresholds": {"eer": 0.3},
        "results": {"cllr": 0.2},
    }
    return Calibration(**(given_ | changes))  # type: ignore[arg-type]


@settings(deadline=None)  # the first example imports scikit-learn
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.01, 0.05, 0.5]))
def test_no_other_weights_are_better_and_scikit_learns_are_no_worse(seed: int, width: int, p_target: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    random = np.random.RandomState(seed % 2**32)
    labels = np.repeat([1, 0], [80, 150])
    columns = np.stack([random.normal(size=230) + labels * random.rand() for _ in range(width)], 1)
    share, prior = np.where(labels == 1, p_target / 80, (1 - p_target) / 150), np.log(p_target / (1 - p_target))

    def objective(weights: np.ndarray, offset: float) -> float:
        signed = np.where(labels == 1, -1, 1) * (columns @ weights + offset + prior)
        return float(share @ np.logaddexp(0, signed))

    weights, offset = fit(list(columns.T), labels, p_target)
    found = objective(weights, offset)
    theirs = linear.LogisticRegression(C=1e9, tol=1e-12, max_iter=10_000)
    theirs.fit(columns, labels, sample_weight=share * 230)
    assert found == pytest.approx(objective(theirs.coef_[0], theirs.intercept_[0] - prior), rel=1e-3)
    for _ in range(20):
        moved = objective(weights + 0.01 * random.normal(size=width), offset + 0.01 * random.normal())
        assert moved >= found * (1 - 1e-3)  # a ridge keeps weights finite


def test_gaussian_scores_get_the_ratio_of_their_densities() -> None:
    random = np.random.RandomState(0)
    scores = np.concatenate([random.normal(3, 1, 200_000), random.normal(0, 1, 200_000)])
    weights, offset = fit([scores], np.repeat([1, 0], 200_000), 0.5)
    assert abs(weights[0] - 3.0) < 0.05  # log N(s; 3, 1) - log N(s; 0, 1) = 3 s - 4.5
    assert abs(offset + 4.5) < 0.1


def test_a_list_that_can_be_separated_gives_finite_weights() -> None:
    weights, offset = fit([np.array([0.0, 0.1, 0.9, 1.0])], np.array([0, 0, 1, 1]), 0.05)
    assert np.isfinite(weights).all()
    assert np.isfinite(offset)
    assert weights[0] > 0


def test_one_kind_of_trial_is_refused() -> None:
    with pytest.raises(ValueError, match="both target and non-target"):
        fit([np.zeros(3)], np.ones(3, int), 0.5)


def test_it_is_an_affine_map_and_comes_back_from_disk(tmp_path: Path) -> None:
    one = calibration(features=("score", "duration.low"), weights=(2.0, 0.5))
    assert one({"score": np.array([1.0, 2.0]), "duration.low": np.array([4.0, 0.0])}).tolist() == [3.0, 3.0]
    assert one.quality == ("duration",)
    one.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == one


def test_another_system_and_the_same_speakers_are_refused() -> None:
    one = calibration()
    one.check(System(("a" * 64,), 1, PLAIN), {"carl"}, {"u2"}, "other", "c.json")
    with pytest.raises(SpkdError, match=r"c.json: trained on dev.txt, 1 of whose speakers are tested here \(bob\)"):
        one.check(System(("a" * 64,), 1, PLAIN), {"bob", "carl"}, set(), "other", "c.json")
    with pytest.raises(SpkdError, match=r"c.json: trained on this very list"):
        one.check(System(("a" * 64,), 1, PLAIN), {"carl"}, set(), one.trained_on.sha256, "c.json")
    for other in (System(("b" * 64,), 1, PLAIN), System(("a" * 64,), 2, PLAIN), System(("a" * 64,), 1, PLAIN[1:])):
        with pytest.raises(SpkdError, match="scores of another system"):
            one.check(other, set(), set(), "other", "c.json")


def test_what_goes_with_a_student_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration().save(path)
    assert Calibration.of_student(path, "a" * 64).weights == (2.0,)
    with pytest.raises(SpkdError, match="of other weights"):
        Calibration.of_student(path, "b" * 64)
    calibration(features=("score", "enrolments"), weights=(1.0, 1.0)).save(path)
    with pytest.raises(UsageError, match="takes more than the cosine"):
        Calibration.of_student(path, "a" * 64)


@pytest.mark.parametrize(
    "change", [{"spkd_calibration": 9}, {"weights": [1.0, 2.0]}, {"offset": "x"}, {"system": 3}, {"thresholds": None}]
)
def test_damage_is_a_line(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(calibration().to_json() | change))
    with pytest.raises(SpkdError, match="c.json"):
        Calibration.load(path)
    with pytest.raises(UsageError, match="no calibration"):
        Calibration.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"features": ("score", "score"), "weights": (1.0, 1.0)}, "a feature is twice there"),
        ({"features": ("score", "loudness"), "weights": (1.0, 1.0)}, "unknown feature 'loudness'"),
        ({"features": ("duration.low",)}, "a score is not"),
        ({"thresholds": {}}, "it lacks the threshold at the EER"),
        ({"results": {}}, "or Cllr"),
    ],
)
def test_a_sealed_record_that_no_calibration_has_is_refused(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    calibration(**changes).save(tmp_path / "c.json")
    with pytest.raises(SpkdError, match=expected):
        Calibration.load(tmp_path / "c.json")
