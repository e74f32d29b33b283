"""Back-ends: cosine or PLDA scores of embeddings, with or without normalisation by a cohort (AS-norm)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spkd.errors import SpkdError, UsageError
from spkd.eval.calibration import PLAIN
from spkd.eval.cohort import Cohort, normalised, speaker_means
from spkd.eval.pairs import Side, Statistics, as_norm, cohort_statistics, score_pairs
from spkd.eval.plda import PLDA
from spkd.eval.settings import ScoringConfig
from spkd.files.text import counted
from spkd.progress import log

# The deviation of n normal scores has a relative standard error of 1 / sqrt(2 (n - 1)): 24 % for 10, 7 % for 100.
LEAST_SCORES, FEW_SCORES = 10, 100  # FEW_SCORES also applies to the embeddings whose mean is subtracted
ALIKE = 1e-6  # deviation of cohort scores, relative to their mean, that rounding alone causes


@dataclass(frozen=True)
class Backend:
    """Scores of pairs of vectors: cosines or PLDA, with or without normalisation by a cohort.

    Attributes:
        means: means subtracted from the vectors of the enrolment and of the test side; None: no means are subtracted.
        plda: PLDA model; None for cosines.
        cohorts: prepared vectors of the cohort as enrolment and as test side, for AS-norm; None without.
        top: number of the highest cohort scores that AS-norm uses.
        how: description of each step, in sentences.
        notes: limits of the scores that a reader has to know, in sentences.
    """

    means: tuple[np.ndarray, np.ndarray] | None
    plda: PLDA | None
    cohorts: tuple[np.ndarray, np.ndarray] | None
    top: int
    how: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: ScoringConfig, cohorts: tuple[Cohort, Cohort] | None) -> Backend:
        """Back-end that the settings describe.

        Args:
            cohorts: cohort as embedded for the enrolment and for the test side; None without.
        Raises:
            UsageError: a cohort without labels for PLDA, or too small for AS-norm.
            SpkdError: a cohort too small for PLDA.
        """
        # Centring.
        name, moved = config.cohort.source, config.subtract_mean or config.backend == "plda"
        means = None if cohorts is None or not moved else (cohorts[0].vectors.mean(0), cohorts[1].vectors.mean(0))
        how = [
            f"The mean of the {len(cohorts[1].vectors):,} embeddings of {cohorts[1].known_as} is subtracted from every "
            "embedding."
            if means is not None and cohorts is not None
            else PLAIN[0],
            PLAIN[1],
        ]
        notes = list(cohorts[1].remarks) if cohorts is not None else []
        if means is not None and cohorts is not None:
            notes += _notes_on_mean(len(cohorts[1].vectors), str(name))
        self = cls(means, None, None, config.cohort.top, ())
        # Scores: PLDA or cosines.
        if config.backend == "plda" and cohorts is not None:
            if not cohorts[1].labelled:
                raise UsageError(f"cohort={name}: PLDA is trained on speaker labels, and some utterances have none")
            speaker = cohorts[1].speaker
            plda = PLDA.train(self.prepared(cohorts[1].vectors, 1), speaker, f"cohort={name}")
            self = replace(self, plda=plda)
            how.append(
                "A score is the log-likelihood ratio of a two-covariance PLDA (EM, 20 iterations) trained on "
                f"{counted(len(speaker), 'utterance')} of {counted(int(speaker.max()) + 1, 'speaker')} of "
                f"{cohorts[1].known_as}."
            )
        else:
            how.append(PLAIN[2])
        # Normalisation of scores by the cohort.
        if config.norm == "as-norm" and cohorts is not None:
            averaged = config.cohort.average and cohorts[1].labelled
            if config.cohort.average and not averaged:
                log(f"note: {name} has utterances without speaker: cohort embeddings are not averaged")
            prepared = [self.prepared(cohort.vectors, side) for side, cohort in enumerate(cohorts)]
            if averaged:
                prepared = [speaker_means(v, c.speaker) for v, c in zip(prepared, cohorts, strict=True)]
            self = replace(self, cohorts=(prepared[0], prepared[1]))
            size, kind = len(prepared[0]), "speaker means" if averaged else "embeddings"
            notes += _check_size(min(self.top, size), kind, str(name))
            how.append(
                f"AS-norm: each side normalises by mean and deviation of its {min(self.top, size):,} highest scores "
                f"with {size:,} {kind} of {cohorts[1].known_as}, and the two are averaged."
            )
        return replace(self, how=tuple(how), notes=tuple(notes))

    def prepared(self, vectors: np.ndarray, side: int) -> np.ndarray:
        """Unit vectors (N, D) of the enrolment (0) or test (1) side, centred where the settings ask for it."""
        return normalised(vectors if self.means is None else vectors - self.means[side])

    def score(
        self, enrolment: np.ndarray, test: np.ndarray, i: np.ndarray, j: np.ndarray
    ) -> tuple[np.ndarray, tuple[Statistics, Statistics] | None]:
        """Scores of pairs of prepared vectors.

        Args:
            enrolment: (N, D) vectors.
            test: (M, D) vectors.
            i: (T,) row in `enrolment` of each pair.
            j: (T,) row in `test` of each pair.
        Returns:
            (T,) scores.
            Cohort statistics of both sides; None without AS-norm.
        """
        left, right = self._sides(enrolment, test)
        scores = score_pairs(left, right, i, j)
        if self.cohorts is None:
            return scores, None
        of_enrolment = cohort_statistics(left, self._sides(enrolment, self.cohorts[1])[1], self.top)
        of_test = cohort_statistics(right, self._sides(self.cohorts[0], test)[0], self.top)
        for mean, deviation in (of_enrolment, of_test):
            if (alike := deviation <= ALIKE * np.maximum(np.abs(mean), 1.0)).any():
                raise SpkdError(
                    f"norm=as-norm: the scores of {int(alike.sum()):,} of {len(alike):,} embeddings with the cohort do "
                    "not differ; its utterances are copies of one another; take a cohort of many speakers"
                )
        return as_norm(scores, of_enrolment, of_test, i, j), (of_enrolment, of_test)

    def _sides(self, enrolment: np.ndarray, test: np.ndarray) -> tuple[Side, Side]:
        return (Side(enrolment), Side(test)) if self.plda is None else self.plda.sides(enrolment, test)


def _check_size(scores: int, kind: str, source: str) -> list[str]:
    """Notes on a small cohort.

    Args:
        scores: number of the scores from which AS-norm takes mean and deviation for each side.
    """
    if scores < LEAST_SCORES:
        raise UsageError(
            f"norm=as-norm: mean and deviation of {scores} cohort scores ({kind} of {source}) are chance; it takes at "
            f"least {LEAST_SCORES} (more speakers in cohort=, cohort.average=false, a higher cohort.top)"
        )
    if scores >= FEW_SCORES:
        return []
    error = 100 / (2 * (scores - 1)) ** 0.5
    return [
        f"AS-norm takes mean and deviation of {scores} cohort scores only ({kind} of {source}): the deviation has a "
        f"standard error of {error:.0f} %, where {FEW_SCORES} scores have 7 %."
    ]


def _notes_on_mean(count: int, source: str) -> list[str]:
    """Notes on the mean of a small cohort."""
    return (
        [f"The mean that is subtracted is that of {counted(count, 'embedding')} only ({source})."]
        if count < FEW_SCORES
        else []
    )
