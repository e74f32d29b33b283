from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from spkd.errors import SpkdError
from spkd.eval.pairs import score_pairs
from spkd.eval.plda import PLDA
from tests.conftest import HAS_SPEECHBRAIN

WIDTH = 5


def model(seed: int) -> PLDA:
    random = np.random.RandomState(seed)
    one, other = random.normal(size=(2, WIDTH, WIDTH))
    return PLDA(random.normal(size=WIDTH), one @ one.T, other @ other.T + np.eye(WIDTH))


def drawn(true: PLDA, seed: int, speakers: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    speaker = np.repeat(np.arange(speakers), random.randint(1, most + 1, speakers))
    centres = random.multivariate_normal(true.mean, true.between, speakers)
    return centres[speaker] + random.multivariate_normal(np.zeros(WIDTH), true.within, len(speaker)), speaker


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_ratios_of_densities(seed: int) -> None:
    plda, random = model(seed), np.random.RandomState(seed)
    a, b = random.normal(size=(2, 6, WIDTH))
    total, mean = plda.between + plda.within, np.concatenate([plda.mean, plda.mean])
    same = np.block([[total, plda.between], [plda.between, total]])
    apart = np.block([[total, np.zeros_like(total)], [np.zeros_like(total), total]])
    both = np.concatenate([a, b], 1)
    expected = multivariate_normal(mean, same).logpdf(both) - multivariate_normal(mean, apart).logpdf(both)
    found = score_pairs(*plda.sides(a, b), np.arange(6), np.arange(6))
    assert np.abs(found - expected).max() < 1e-9


THEIRS = """
import sys
import numpy as np
from speechbrain.processing import PLDA_LDA as theirs

given = np.load(sys.argv[1])

def packed(vectors, name):
    ids, none = np.array([f"{name}{i}" for i in range(len(vectors))], dtype=object), np.array([None] * len(vectors))
    return theirs.StatObject_SB(ids, ids, none, none, np.ones((len(vectors), 1)), vectors.copy())

sides = packed(given["a"], "e"), packed(given["b"], "t")
ndx = theirs.Ndx(models=sides[0].modelset, testsegs=sides[1].modelset)
np.save(sys.argv[2], theirs.fast_PLDA_scoring(*sides, ndx, given["mean"], given["factor"], given["within"]).scoremat)
"""


@pytest.mark.slow  # it imports speechbrain
@pytest.mark.skipif(not HAS_SPEECHBRAIN, reason="needs speechbrain")
def test_scores_are_speechbrains(tmp_path: Path) -> None:
    """In a process of its own: what speechbrain imports lazily breaks those that look at all modules."""
    plda, random = model(0), np.random.RandomState(1)
    a, b = random.normal(size=(4, WIDTH)), random.normal(size=(3, WIDTH))
    factor = np.linalg.cholesky(plda.between)
    np.savez(tmp_path / "in.npz", a=a, b=b, mean=plda.mean, factor=factor, within=plda.within)
    subprocess.run([sys.executable, "-c", THEIRS, tmp_path / "in.npz", tmp_path / "out.npy"], check=True)
    i, j = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)
    found = score_pairs(*plda.sides(a, b), i, j)
    assert np.abs(found - np.load(tmp_path / "out.npy").ravel()).max() < 1e-9


def likelihood(plda: PLDA, data: np.ndarray, speaker: np.ndarray) -> float:
    total = 0.0
    for one in np.unique(speaker):
        mine = data[speaker == one]
        count = len(mine)
        covariance = np.kron(np.ones((count, count)), plda.between) + np.kron(np.eye(count), plda.within)
        total += multivariate_normal(np.tile(plda.mean, count), covariance, allow_singular=True).logpdf(mine.ravel())
    return total


def test_every_step_of_training_raises_the_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    data, speaker = drawn(model(3), 0, 40, 5)
    reached = []
    for steps in (0, 1, 2, 5, 20):
        monkeypatch.setattr("spkd.eval.plda.ITERATIONS", steps)
        reached.append(likelihood(PLDA.train(data, speaker), data, speaker))
    assert np.diff(reached).min() > 0


def test_training_finds_what_the_data_were_drawn_from() -> None:
    true = model(1)
    found = PLDA.train(*drawn(true, 0, 3000, 8))
    for name in ("between", "within"):
        expected = getattr(true, name)
        assert np.linalg.norm(getattr(found, name) - expected) < 0.1 * np.linalg.norm(expected)


def test_directions_without_any_variance_change_nothing() -> None:
    """Units of a network that are always zero."""
    data, speaker = drawn(model(2), 0, 60, 5)
    wide = np.concatenate([data, np.zeros((len(data), 2)), np.full((len(data), 1), 3.0)], 1)
    one, other = PLDA.train(data, speaker), PLDA.train(wide, speaker)
    i, j = np.arange(20), np.arange(20, 40)
    expected = score_pairs(*one.sides(data, data), i, j)
    assert np.abs(score_pairs(*other.sides(wide, wide), i, j) - expected).max() < 1e-8


def test_too_few_utterances_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpkdError, match="6 utterances of 3 speakers are too few for a covariance of 5 dimensions"):
        PLDA.train(np.random.RandomState(0).normal(size=(6, 5)), np.array([0, 0, 1, 1, 2, 2]), "cohort=x")
