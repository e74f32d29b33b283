"""Metrics, PLDA scores and calibration against brute force, scikit-learn and SpeechBrain, over 100 score sets.

Sets are random (Gaussian, heavy-tailed, with ties, unbalanced), and real: the teacher's cosines on the
lists of librispeech-mini and speechocean-mini, whole and by subsets of their speakers.

    python benchmarks/metrics_agree.py --data DIR --teacher FILE

DIR holds librispeech-mini and speechocean-mini, FILE is the weights of the d-vector.

Prints, as its last line, one JSON object; keeps it in benchmarks/results/metrics_agree.json. `max_difference` is the
largest absolute difference of what has one definition; `defined_otherwise` is how far others' definitions of the EER
are from ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import record
import torch

from spkd.corpus.manifest import Manifest
from spkd.eval.calibration import fit
from spkd.eval.metrics import Point, act_dcf, cllr, curve, eer, min_cllr, min_dcf
from spkd.eval.pairs import score_pairs
from spkd.eval.plda import PLDA
from spkd.eval.score import score
from spkd.eval.settings import EvalConfig
from spkd.eval.speakers import numbered
from spkd.eval.trials import read
from spkd.teachers import load_teacher
from spkd.teachers.settings import ModelConfig, ScoredModelConfig

HERE = Path(__file__).parent
POINTS = (Point(0.01), Point(0.05), Point(0.01, 10.0, 1.0))
LISTS = (
    ("librispeech-mini", "trials-test-other.txt", "test-other.csv"),
    ("librispeech-mini", "trials-test-short.txt", "test-short.csv"),
    ("speechocean-mini", "trials-test.txt", "test.csv"),
)
Scores = tuple[np.ndarray, np.ndarray]


def random_set(seed: int) -> Scores:
    random = np.random.RandomState(seed)
    count = int(10 ** random.uniform(1.5, 3.5))
    labels = (random.rand(count) < random.choice([0.02, 0.1, 0.5])).astype(np.int8)
    labels[:2] = 0, 1
    noise = random.normal(size=count) if seed % 2 else random.standard_t(2, count)
    scores = noise + labels * random.uniform(0, 4)
    return (np.round(scores, 1) if seed % 3 == 0 else scores), labels


def real_sets(data: Path, teacher: str) -> list[Scores]:
    """Each list whole, and by 12 random halves of its speakers."""
    model = load_teacher(ModelConfig("dvector", teacher), torch.device("cpu"))
    found = []
    for folder, trials, manifest in LISTS:
        listed, audio = read(data / folder / trials), Manifest.load(data / folder / manifest)
        scored = score(EvalConfig(model=ScoredModelConfig("dvector")), model, audio, listed)
        assert scored.trials.label is not None
        enrolment, test, _ = scored.speakers()
        left, right = numbered(scored.trials, enrolment, test)
        scores, labels = scored.scores[0].astype(np.float64), scored.trials.label
        found.append((scores, labels))
        for seed in range(12):
            speakers = np.random.RandomState(seed).rand(max(left.max(), right.max()) + 1) < 0.5
            kept = speakers[left] & speakers[right]
            if 0 < labels[kept].sum() < kept.sum():
                found.append((scores[kept], labels[kept]))
    return found


def brute_force(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric by its definition, threshold by threshold."""
    targets, others = scores[labels == 1], scores[labels == 0]
    thresholds = [np.inf, *sorted(set(scores.tolist()), reverse=True)]
    miss = np.array([(targets < t).mean() for t in thresholds])
    false_alarm = np.array([(others >= t).mean() for t in thresholds])
    found = {}
    for k in range(1, len(thresholds)):
        if false_alarm[k] >= miss[k]:
            before, after = miss[k - 1] - false_alarm[k - 1], false_alarm[k] - miss[k]
            found["eer"] = miss[k - 1] + (miss[k] - miss[k - 1]) * before / (before + after)
            break
    for point in POINTS:
        blind = min(point.c_miss * point.p_target, point.c_false_alarm * (1 - point.p_target))
        costs = point.c_miss * point.p_target * miss + point.c_false_alarm * (1 - point.p_target) * false_alarm
        found[f"min_dcf_{point.name}"] = costs.min() / blind
        bayes = np.log(point.c_false_alarm / point.c_miss * (1 - point.p_target) / point.p_target)
        cost = point.c_miss * point.p_target * (targets < bayes).mean()
        cost += point.c_false_alarm * (1 - point.p_target) * (others >= bayes).mean()
        found[f"act_dcf_{point.name}"] = cost / blind
    bits = np.logaddexp(0, -targets).mean() + np.logaddexp(0, others).mean()
    found["cllr"] = bits / 2 / np.log(2)
    return found


def ours(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    at = curve(scores, labels)
    found = {"eer": eer(at)[0], "cllr": cllr(at)}
    for point in POINTS:
        found[f"min_dcf_{point.name}"], found[f"act_dcf_{point.name}"] = min_dcf(at, point)[0], act_dcf(at, point)
    return found


def scikit_learn(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Differences of the curve, and of min Cllr, from scikit-learn's."""
    from sklearn.isotonic import isotonic_regression
    from sklearn.metrics import roc_curve

    at = curve(scores, labels)
    false_alarm, hit, _ = roc_curve(labels, scores, drop_intermediate=False)
    order = np.lexsort((labels, scores))
    levels, place = np.unique(scores[order], return_inverse=True)
    weights = np.where(labels == 1, 1 / labels.sum(), 1 / (1 - labels).sum())[order]
    mass = np.bincount(place, weights)
    share = np.bincount(place, weights * labels[order]) / mass
    posterior = isotonic_regression(share, sample_weight=mass)[place]
    with np.errstate(divide="ignore"):
        bits = -np.log2(np.where(labels[order] == 1, posterior, 1 - posterior))
    expected = (bits[labels[order] == 1].mean() + bits[labels[order] == 0].mean()) / 2
    return {
        "curve": max(np.abs(at.false_alarm - false_alarm).max(), np.abs(at.miss - (1 - hit)).max()),
        "min_cllr": abs(min_cllr(at) - expected),
        "levels": float(len(levels) != len(at.threshold) - 1),
    }


def speechbrain_metrics(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Difference of minDCF(0.01) from SpeechBrain's, and of the EER as it defines it."""
    from speechbrain.utils.metric_stats import EER, minDCF

    positive, negative = (torch.from_numpy(scores[labels == k]) for k in (1, 0))
    theirs, _ = minDCF(positive, negative, c_miss=1.0, c_fa=1.0, p_target=0.01)
    at = curve(scores, labels)
    rate, _ = EER(positive, negative)
    return abs(min_dcf(at, Point(0.01))[0] * 0.01 - float(theirs)), abs(eer(at)[0] - float(rate))


def speechbrain_plda(seed: int) -> float:
    """Largest difference of PLDA's scores from SpeechBrain's."""
    from speechbrain.processing import PLDA_LDA as theirs

    random, width = np.random.RandomState(seed), 6
    speaker = np.repeat(np.arange(20), 6)
    data = random.normal(size=(20, width))[speaker] + random.normal(size=(len(speaker), width))
    plda = PLDA.train(data, speaker)
    a, b = random.normal(size=(5, width)), random.normal(size=(7, width))

    def packed(vectors: np.ndarray, name: str) -> object:
        ids, none = np.array([f"{name}{i}" for i in range(len(vectors))], dtype=object), np.array([None] * len(vectors))
        return theirs.StatObject_SB(ids, ids, none, none, np.ones((len(vectors), 1)), vectors.copy())

    ndx = theirs.Ndx(models=np.array([f"e{i}" for i in range(5)]), testsegs=np.array([f"t{i}" for i in range(7)]))
    values, vectors = np.linalg.eigh(plda.between)
    factor = vectors * np.sqrt(np.maximum(values, 0))
    expected = theirs.fast_PLDA_scoring(packed(a, "e"), packed(b, "t"), ndx, plda.mean, factor, plda.within).scoremat
    found = score_pairs(*plda.sides(a, b), np.repeat(np.arange(5), 7), np.tile(np.arange(7), 5))
    return float(np.abs(found - expected.ravel()).max())


def calibration_difference(scores: np.ndarray, labels: np.ndarray) -> float:
    """How much lower an independent minimiser gets the calibration's objective (relative)."""
    from scipy.optimize import minimize

    scaled = (scores - scores.mean()) / scores.std()
    weights, offset = fit([scaled], labels, 0.05)
    prior, sign = np.log(0.05 / 0.95), np.where(labels == 1, -1.0, 1.0)
    share = np.where(labels == 1, 0.05 / labels.sum(), 0.95 / (1 - labels).sum())

    def objective(theta: np.ndarray) -> float:
        return float(share @ np.logaddexp(0, sign * (theta[0] * scaled + theta[1] + prior))) + 5e-7 * theta[0] ** 2

    found = objective(np.array([weights[0], offset]))
    best = minimize(objective, [weights[0], offset], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-15}).fun
    return max(found - best, 0.0) / best


def main() -> None:
    options = record.options(__doc__, "metrics_agree", data=True)
    options.add_argument("--sets", type=int, default=100, help="random and real ones together")
    given = record.parse(options, sets=3)
    sets = real_sets(given.data, str(given.teacher))
    real = len(sets)
    sets += [random_set(seed) for seed in range(given.sets - real)]
    worst: dict[str, float] = {}
    otherwise = []
    for number, (scores, labels) in enumerate(sets):
        expected, found = brute_force(scores, labels), ours(scores, labels)
        differences = {f"brute force: {key}": abs(found[key] - value) for key, value in expected.items()}
        differences |= {f"scikit-learn: {key}": value for key, value in scikit_learn(scores, labels).items()}
        cost, rate = speechbrain_metrics(scores, labels)
        differences["speechbrain: minDCF"] = cost
        differences["speechbrain: PLDA"] = speechbrain_plda(number)
        differences["minimiser: calibration"] = calibration_difference(scores, labels)
        otherwise.append(rate)
        for key, value in differences.items():
            worst[key] = max(worst.get(key, 0.0), float(value))
    for key, value in worst.items():
        print(f"{key:32} {value:.2e}")
    result = {
        "sets": len(sets),
        "real_sets": real,
        "max_difference": max(worst.values()),
        "differences": worst,
        "defined_otherwise": {"speechbrain: EER, the mean of both rates at one threshold": max(otherwise)},
    }
    record.keep("metrics_agree", result, given.tiny)


if __name__ == "__main__":
    main()
