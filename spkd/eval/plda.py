"""Two-covariance PLDA (Brümmer and de Villiers, "The speaker partitioning problem", Odyssey 2010)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spkd.errors import SpkdError
from spkd.eval.pairs import Side
from spkd.files.text import counted

ITERATIONS = 20  # iterations of EM
FLAT = 1e-9  # fraction of the largest within-speaker variance: directions with less (such as dead units) are left out


@dataclass(frozen=True)
class PLDA:
    """PLDA model x = y + e: y ~ N(mean, between) of each speaker, e ~ N(0, within) of each utterance.

    Attributes:
        mean: (D,) mean of the speakers.
        between: (D, D) covariance between speakers.
        within: (D, D) covariance within speakers.
    """

    mean: np.ndarray
    between: np.ndarray
    within: np.ndarray

    @cached_property
    def _diagonal(self) -> tuple[np.ndarray, np.ndarray]:
        """Projection that diagonalises both covariances.

        Returns:
            (D, R) projection after which `within` is the identity and `between` is diagonal; R is the rank of `within`.
            (R,) diagonal of `between`.
        """
        whitening = _directions(self.within, scaled=True)
        values, vectors = np.linalg.eigh(whitening.T @ self.between @ whitening)
        return whitening @ vectors, np.maximum(values, 0.0)

    def sides(self, enrolment: np.ndarray, test: np.ndarray) -> tuple[Side, Side]:
        """Sides whose scores are log p(both | one speaker) - log p(both | two speakers).

        Args:
            enrolment: (N, D) vectors.
            test: (M, D) vectors.
        """
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
        """Model of maximum likelihood, by EM that starts from the moments.

        Args:
            vectors: (N, D) vectors.
            speaker: (N,) number of the speaker of each, from 0.
        Raises:
            SpkdError: too few utterances for a covariance within speakers.
        """
        data = vectors.astype(np.float64)
        counts = np.bincount(speaker)
        size, width = data.shape
        if size - len(counts) <= width:
            raise SpkdError(
                f"{source}: {counted(size, 'utterance')} of {counted(len(counts), 'speaker')} are too few for a "
                f"covariance of {width} dimensions within speakers; PLDA needs more than {width + len(counts):,}"
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
            means: (S, D) mean of the vectors of each speaker.
            counts: (S,) number of utterances of each speaker.
            scatter: (D, D) scatter of the utterances around the means of their speakers.
        """
        expected = np.empty_like(means)
        between, within = np.zeros_like(scatter), scatter.copy()
        for count in np.unique(counts):
            has_count = counts == count
            # The posterior of y given `count` utterances; this form lets `between` be of low rank.
            gain = np.linalg.solve(self.between + self.within / count, self.between).T
            covariance = self.between - gain @ self.between
            expected[has_count] = self.mean + (means[has_count] - self.mean) @ gain.T
            left = means[has_count] - expected[has_count]
            between += has_count.sum() * covariance
            within += count * (left.T @ left + has_count.sum() * covariance)
        centre = expected.mean(0)
        around = expected - centre
        return PLDA(centre, (between + around.T @ around) / len(means), within / counts.sum())


def _directions(covariance: np.ndarray, scaled: bool = False) -> np.ndarray:
    """Orthogonal directions (D, R) in which a covariance (D, D) is not nearly 0; scaled: to unit variance."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > FLAT * values[-1]
    return vectors[:, kept] / np.sqrt(values[kept]) if scaled else vectors[:, kept]
