"""Coverage of the 95 % confidence intervals, and size of the paired test, on simulated trial lists.

Embeddings of a speaker are a mean and Gaussian noise whose size is the speaker's own (some speakers are hard), scores
are cosines, turned into log-likelihood ratios by one affine map for all lists. Speakers of balanced lists have 4
utterances (6 where there are 10 speakers); those of unbalanced lists 3 to 40, most of them few. The true values are
those of a list of thousands of other speakers. The second system has embeddings that are correlated with the first's,
and the same true values: 5 % of the lists should reject it. The same intervals by percentiles of the resampled values
are printed too, and, at 30 speakers and where it is installed, that of the EER by the package confidence-intervals
(Ferrer and Riera), which resamples the speakers of the enrolment side.

    pip install confidence-intervals      # optional
    python benchmarks/interval_coverage.py

Prints, as its last line, one JSON object of shares (`eer_coverage_30`: balanced lists of 30 speakers); keeps it in
benchmarks/results/interval_coverage.json. `--tiny` runs in seconds and keeps nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import record

from spkd.eval.bootstrap import SpeakerTrials, compare, interval, resample, resampled_curves
from spkd.eval.calibration import fit
from spkd.eval.metrics import Metric, curve, metrics_of

DIM = 24  # of embeddings
CORRELATION = 0.7  # of the two systems
NON_TARGETS = 6000  # of a list, at most
NAMES = {
    "eer_percent": "eer",
    "min_dcf_0.01": "min_dcf",
    "min_dcf_0.05": "min_dcf_0.05",
    "act_dcf_0.01": "act_dcf",
    "cllr": "cllr",
    "min_cllr": "min_cllr",
}


@dataclass(frozen=True)
class World:
    """Where lists come from.

    Attributes:
        suffix: of the names in the JSON object. balanced: whether speakers have equally many utterances.
        spread: standard deviation of the logarithm of speakers' noise. noise: its median, where means have 1.
    """

    suffix: str
    balanced: bool
    spread: float
    noise: float

    def utterances(self, random: np.random.RandomState, speakers: int) -> np.ndarray:
        """How many each speaker has (S,)."""
        if self.balanced:
            return np.full(speakers, 6 if speakers <= 10 else 4)
        return np.minimum(2 + random.geometric(0.2, speakers), 40)

    def draw(
        self, random: np.random.RandomState, speakers: int, non_targets: int
    ) -> tuple[list[np.ndarray], SpeakerTrials]:
        """Cosines (N,) of two systems, and the trials."""
        of = np.repeat(np.arange(speakers), self.utterances(random, speakers))
        mean, hard, noise = random.randn(speakers, DIM), random.randn(speakers), random.randn(len(of), DIM)
        rest = np.sqrt(1 - CORRELATION**2)
        other_hard = CORRELATION * hard + rest * random.randn(speakers)
        other_noise = CORRELATION * noise + rest * random.randn(len(of), DIM)
        i, j = np.triu_indices(len(of), 1)
        target = of[i] == of[j]
        kept = np.concatenate([np.flatnonzero(target), random.permutation(np.flatnonzero(~target))[:non_targets]])
        i, j = i[kept], j[kept]
        scores = []
        for size, shape in ((hard, noise), (other_hard, other_noise)):
            rows = mean[of] + (self.noise * np.exp(self.spread * size))[of, None] * shape
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            scores.append((rows[i] * rows[j]).sum(1))
        return scores, SpeakerTrials(of[i], of[j], target[kept].astype(np.int8))


WORLDS = (World("", True, 0.35, 0.62), World("_unbalanced", False, 0.25, 0.66))


def population(world: World, metrics: Sequence[Metric], lists: int) -> tuple[np.ndarray, float, dict[str, float]]:
    """Weight and offset of the log-likelihood ratios, and the true values."""
    random = np.random.RandomState(99)
    parts = [world.draw(random, 300, 60_000) for _ in range(lists)]
    scores = np.concatenate([systems[0] for systems, _ in parts])
    labels = np.concatenate([trials.labels for _, trials in parts])
    weights, offset = fit([scores], labels, 0.05)
    at = curve(weights[0] * scores + offset, labels)
    return weights[0], offset, {metric.key: metric.compute(at) for metric in metrics}


def published(scores: np.ndarray, trials: SpeakerTrials, metric: Metric, count: int) -> tuple[float, float] | None:
    """The interval of the package confidence-intervals; None where it is not installed."""
    try:
        from confidence_intervals import evaluate_with_conf_int
    except ImportError:
        return None

    def value(labels: np.ndarray, samples: np.ndarray) -> float:
        return metric.compute(curve(samples, labels))

    _, limits = evaluate_with_conf_int(scores, value, trials.labels, trials.enrolment, num_bootstraps=count, alpha=5)
    return limits


def coverage(world: World, speakers: int, lists: int, resamplings: int, population_lists: int) -> dict[str, float]:
    """Shares of the lists whose intervals hold the true value, and that reject an equal system."""
    metrics = [metric for metric in metrics_of(llr=True) if metric.key in NAMES]
    weight, offset, truth = population(world, metrics, population_lists)
    held: dict[str, list[bool]] = {}

    def note(name: str, is_held: bool) -> None:
        held.setdefault(f"{name}_{speakers}{world.suffix}", []).append(bool(is_held))

    for number in range(lists):
        cosines, trials = world.draw(np.random.RandomState(1000 + number), speakers, NON_TARGETS)
        scores = [weight * some + offset for some in cosines]
        curve_of = resampled_curves(scores[0], trials)
        observed = np.array([metric.compute(curve_of(np.ones(speakers))) for metric in metrics])
        values = resample(
            lambda d, of=curve_of: np.array([m.compute(of(d)) for m in metrics]), trials, resamplings, number
        )
        for metric, value, drawn in zip(metrics, observed.tolist(), values.T, strict=True):
            name, true = NAMES[metric.key], truth[metric.key]
            limits = interval(metric, value, drawn, trials)
            note(f"{name}_coverage", limits is not None and limits[0] <= true <= limits[1])
            low, high = np.quantile(drawn, [0.025, 0.975])
            note(f"{name}_percentile_coverage", low <= true <= high)
        if speakers == 30 and (limits := published(scores[0], trials, metrics[0], resamplings)) is not None:
            note("eer_package_coverage", limits[0] <= truth["eer_percent"] <= limits[1])
        note("paired_rejects", compare(scores[0], scores[1], trials, metrics[0], resamplings, number).p < 0.05)
    return {name: round(float(np.mean(some)), 3) for name, some in held.items()}


def table(result: dict) -> str:
    """The table of docs/evaluation.md."""
    lines = ["| speakers | EER | minDCF(0.01) | Cllr | min Cllr | equal systems that differ by p < 0.05 |"]
    lines.append("|---|---|---|---|---|---|")
    counts = [key.rpartition("_")[2] for key in result if key.startswith("paired_rejects_")]
    for count in filter(str.isdigit, counts):
        cells = []
        for name in ("eer", "min_dcf", "cllr", "min_cllr"):
            ours, percentile = (result[f"{name}_{kind}_{count}"] for kind in ("coverage", "percentile_coverage"))
            cells.append(f"{100 * ours:.0f} % ({100 * percentile:.0f})")
        lines.append(f"| {count} | {' | '.join(cells)} | {100 * result[f'paired_rejects_{count}']:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    options = record.options(__doc__)
    options.add_argument("--lists", type=int, default=400, help="simulated lists of each size")
    options.add_argument("--resamplings", type=int, default=200)
    options.add_argument("--speakers", type=int, nargs="+", default=[10, 30, 60, 200])
    given = record.parse(options, lists=3, resamplings=20, speakers=[10])
    result: dict[str, object] = {"lists": given.lists, "resamplings": given.resamplings}
    for world in WORLDS:
        for speakers in given.speakers:
            start = time.perf_counter()
            found = coverage(world, speakers, given.lists, given.resamplings, 1 if given.tiny else 20)
            result |= found
            print(
                f"{speakers} speakers, {'' if world.balanced else 'un'}balanced ({time.perf_counter() - start:.0f} s)"
            )
            for name, share in found.items():
                print(f"  {name:42} {100 * share:5.1f} %", flush=True)
    record.keep("interval_coverage", result, given.tiny)


if __name__ == "__main__":
    main()
