"""Two-covariance PLDA (Brümmer and de Villiers, "The speaker partitioning problem", Odyssey 2010)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spkd.errors import SpkdError
from spkd.eval.pairs import Side

ITERATIONS = 20  # of EM
FLAT = 1e-9  # of the largest variance within speakers: directions with less (units that are always 0) are left out


@dataclass(frozen=True)
class PLDA:
    """x = y + e: a speaker's vector y ~ N(mean, between), and e ~ N(0, within) of each utterance.

    Attributes:
        mean: (D,).
        between, within: (D, D).
    """

    mean: np.ndarray
    between: np.ndarray
    within: np.ndarray

    @cached_property
    def _diagonal(self) -> tuple[np.ndarray, np.ndarray]:
        """A projection (D, R) after which `within` is the identity and `between` diagonal, and that diagonal (R,); R is
        the rank of `within`."""
        whitening = _directions(self.within, scaled=True)
        values, vectors = np.linalg.eigh(whitening.T @ self.between @ whitening)
        return whitening @ vectors, np.maximum(values, 0.0)

    def sides(self, enrolment: np.ndarray, test: np.ndarray) -> tuple[Side, Side]:
        """Vectors (N, D) and (M, D) so that the score of a pair is the logarithm of the ratio of p(both | one speaker)
        and p(both | two speakers)."""
        projection, ratio = self._diagonal
        slope = ratio / (1 + 2 * ratio)
        curvature = -0.5 * ratio**2 / ((1 + ratio) * (1 + 2 * ratio))
        constant = 0.5 * float((np.log1p(ratio) - 0.5 * np.log1p(2 * ratio)).sum())

        def side(vectors: np.ndarray, scale: np.ndarray | float) -> Side:
            moved = (vectors - self.mean) @ projection
            offset = (moved**2) @ curvature + constant
            return Side((moved * scale).astype(vectors.dtype), offset.astype(vectors.dtype))

        return side(enrolment, slope), side(test, 1.0)

    @classmethod
    def train(cls, vectors: np.ndarray, speaker: np.ndarray, source: str = "plda") -> PLDA:
        """Maximum likelihood by EM, from the moments.

        Args:
            vectors: (N, D). speaker: (N,) of each, counted from 0.
        Raises:
            SpkdError: too few utterances for a covariance within speakers.
        """
        data = vectors.astype(np.float64)
        counts = np.bincount(speaker)
        size, width = data.shape
        if size - len(counts) <= width:
            raise SpkdError(
                f"{source}: {size:,} utterances of {len(counts):,} speakers are too few for a covariance of {width} "
                f"dimensions within speakers; PLDA needs more than {width + len(counts):,}"
            )
        means = np.zeros((len(counts), width))
        np.add.at(means, speaker, data)
        means /= counts[:, None]
        rest = data - means[speaker]
        scatter = rest.T @ rest
        kept = _directions(scatter)
        centre, means, scatter = means.mean(0), (means - means.mean(0)) @ kept, kept.T @ scatter @ kept
        model = cls(np.zeros(kept.shape[1]), means.T @ means / len(means), scatter / (size - len(counts)))
        for _ in range(ITERATIONS):
            model = model._improved(means, counts, scatter)
        return cls(centre + kept @ model.mean, kept @ model.between @ kept.T, kept @ model.within @ kept.T)

    def _improved(self, means: np.ndarray, counts: np.ndarray, scatter: np.ndarray) -> PLDA:
        """One step of EM.

        Args:
            means: (S, D) of speakers. counts: (S,) of their utterances. scatter: (D, D) of utterances around the means
                of their speakers.
        """
        expected = np.empty_like(means)
        between, within = np.zeros_like(scatter), scatter.copy()
        for count in np.unique(counts):
            one = counts == count
            # The posterior of y given `count` utterances; this form lets `between` be of low rank.
            gain = np.linalg.solve(self.between + self.within / count, self.between).T
            covariance = self.between - gain @ self.between
            expected[one] = self.mean + (means[one] - self.mean) @ gain.T
            left = means[one] - expected[one]
            between += one.sum() * covariance
            within += count * (left.T @ left + one.sum() * covariance)
        centre = expected.mean(0)
        around = expected - centre
        return PLDA(centre, (between + around.T @ around) / len(means), within / counts.sum())


def _directions(covariance: np.ndarray, scaled: bool = False) -> np.ndarray:
    """Orthogonal directions (D, R) in which a covariance (D, D) is not flat; scaled: of unit variance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > FLAT * values[-1]
    return vectors[:, kept] / np.sqrt(values[kept]) if scaled else vectors[:, kept]
