"""Where the table of papers.py goes against its papers: what the data and the teacher show about it.

Needs the caches and students that papers.py left in its working folder.

    python benchmarks/papers_why.py --data DIR --teacher FILE

Prints, and keeps in benchmarks/results/papers_why.json:
- spread: cosines between the teacher's embeddings of different recordings of each corpus, and its share of an epoch;
- pull: the gradient of `contrastive` on a student whose outputs are exactly the teacher's, with the
  batch alone and with mined negatives (0 would leave it where it is), and how much the two losses fall short of 0;
- frames: how much of the teacher's frames the 15 fbank frames in an x-vector's sight determine linearly (R^2 on other
  speakers), beside the same for the mean over the view from the mean fbank;
- sessions: EER of students on target trials across recording sessions (arabic-commands-mini, which was not in their
  training). The test lists compare pieces of one recording or of one session, as NT-Xent's positives do;
- unlabelled: what unlabelled speech does for speech of its own kind. EER across sessions of 10 Arabic speakers, of
  students that learned by `contrastive` with all the unlabelled speech except theirs (trained here), and without any.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from machine import describe
from papers import STEPS, XVECTOR, extract
from spine import spkd
from torch.nn.functional import normalize

from spkd.cache import Cache, Crop
from spkd.config import MiningConfig
from spkd.train.batches import InputSource
from spkd.train.labels import Labels
from spkd.train.losses import LossContext, LossInputs
from spkd.train.losses.contrastive import CEILING, Contrastive, ContrastiveSettings
from spkd.train.mining import Miner

HERE = Path(__file__).parent
CORPORA = ("libri", "unlabelled", "arabic")
CONTEXT = 15  # frames that reach one frame of the x-vector before pooling
RIDGE = 10.0
METHODS = ("no_teacher", "ntxent", "contrastive", "best")


def spread(caches: dict[str, Cache]) -> dict[str, dict[str, float]]:
    """Quantiles of cosines between recordings at their own speed."""
    found = {}
    total = sum(len(cache.usable_views) for cache in caches.values())
    for name, cache in caches.items():
        views = cache.usable_views[np.isclose(cache.plan.views.speed[cache.usable_views], 1.0)]
        outputs = normalize(cache.batch(views, ["embedding"])["embedding"].float(), dim=-1)
        cosine = (outputs @ outputs.mT)[~torch.eye(len(outputs), dtype=torch.bool)].numpy()
        quantiles = np.quantile(cosine, [0.05, 0.5, 0.95])
        found[name] = {f"cosine_{q}": round(float(v), 3) for q, v in zip((5, 50, 95), quantiles, strict=True)}
        found[name]["share_of_views"] = round(len(cache.usable_views) / total, 3)
    return found


def pull(cache: Cache, batches: int = 50) -> dict[str, dict[str, float]]:
    """Gradient of contrastive, tangential to the sphere, at a student that equals the teacher; mean over batches."""
    labels = Labels.of(cache)
    source = InputSource(cache.target("fbank"), None, (2.0,))
    miner = Miner(cache, labels, source, MiningConfig(negatives=16), CEILING)
    levels = {"embedding": cache.target("embedding")}
    loss = Contrastive(ContrastiveSettings(), LossContext(levels, levels, 1))
    found: dict[str, list[tuple[float, float]]] = {"batch": [], "batch and mined": []}
    order = cache.order(0, 0)
    for i in range(batches):
        views = order[np.arange(64) + (i * 64) % (len(order) - 64)]
        teacher = normalize(cache.batch(views, ["embedding"])["embedding"].float(), dim=-1)
        drawn = miner.draw(views, 0, i)
        hard = cache.batch(drawn.views.ravel(), ["embedding"])["embedding"].float().unflatten(0, drawn.views.shape)
        usable = torch.from_numpy(drawn.found)
        instance = torch.from_numpy(labels.instance[views])
        for name, mined in (("batch", {}), ("batch and mined", {"negatives": hard, "is_negative": usable})):
            student = teacher.clone().requires_grad_()
            value = loss({"embedding": student}, LossInputs({"embedding": teacher}, instance, instance, **mined))
            (gradient,) = torch.autograd.grad(value * len(views), student)
            tangent = gradient - (gradient * teacher).sum(-1, keepdim=True) * teacher
            found[name].append((tangent.norm(dim=-1).mean().item(), value.item()))
    miner.close()
    return {
        name: {
            "gradient": round(statistics.mean(g for g, _ in values), 3),
            "loss": round(statistics.mean(v for _, v in values), 3),
        }
        for name, values in found.items()
    }


def determined(inputs: np.ndarray, outputs: np.ndarray, held_out: np.ndarray) -> float:
    """R^2 of a ridge regression on the held-out rows."""
    x = np.concatenate([inputs, np.ones((len(inputs), 1))], 1).astype(np.float64)
    a, b = x[~held_out], outputs[~held_out].astype(np.float64)
    weights = np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ b)
    rest = outputs[held_out] - x[held_out] @ weights
    centred = outputs[held_out] - b.mean(0)
    return round(float(1 - (rest**2).sum() / (centred**2).sum()), 3)


def frames(cache: Cache, target: str = "frames.layer3") -> dict[str, float]:
    views = cache.usable_views[np.isclose(cache.plan.views.speed[cache.usable_views], 1.0)]
    windows, states, of = [], [], []
    for view in views:
        outputs = cache.batch(np.array([view]), ["fbank", target], Crop(np.array([0]), 48_000))
        fbank, state = outputs["fbank"][0].float().numpy(), outputs[target][0].float().numpy()
        fbank = fbank - fbank.mean(0)
        places = np.random.RandomState(view).randint(60, len(fbank) - CONTEXT, 60)
        windows += [fbank[p - CONTEXT // 2 : p + CONTEXT // 2 + 1].ravel() for p in places]
        states += [state[p + 1] for p in places]  # centred on the same 10 ms
        of += [view] * len(places)
    held_out = np.isin(np.array(of), views[::4])
    found = {"r2_of_a_frame_from_its_context": determined(np.array(windows), np.array(states), held_out)}
    pooled = cache.batch(views, ["stats"])["stats"].float().numpy()
    means = []
    for view in views:
        fbank = cache.ragged(np.array([view]), "fbank").values.float().numpy()
        means.append(np.concatenate([fbank.mean(0), fbank.std(0)]))
    found["r2_of_statistics_from_fbank_statistics"] = determined(
        np.array(means), pooled, np.isin(np.arange(len(views)), np.arange(0, len(views), 4))
    )
    return found


def recordings(labels: Path) -> list[tuple[str, str, str]]:
    """Utterance, speaker and recording round of the Arabic corpus."""
    with open(labels, newline="") as source:
        return [(row["utt"], row["speaker"], row["utt"].split("-")[2]) for row in csv.DictReader(source)]


def across_sessions(path: Path, rows: list[tuple[str, str, str]], most: int = 3000) -> None:
    """Write trials whose target pairs come from different recording rounds."""
    pairs: dict[int, list[str]] = {0: [], 1: []}
    for i, (a, speaker, round_) in enumerate(rows):
        for b, other, theirs in rows[i + 1 :]:
            if speaker != other or round_ != theirs:
                pairs[int(speaker == other)].append(f"{int(speaker == other)} {a} {b}\n")
    random = np.random.RandomState(0)
    chosen = [
        pairs[kind][k] for kind in (1, 0) for k in random.permutation(len(pairs[kind]))[: most * (1 + 3 * (1 - kind))]
    ]
    path.write_text("".join(chosen))


def eer(work: Path, trials: str, out: str, *model: str) -> float:
    """EER (%) of one model on trials of the Arabic corpus."""
    spkd(work, 1, "eval", f"{trials}.txt", "manifest=arabic.csv", f"out={out}/{trials}", "bootstrap=0", *model)
    report = json.loads((work / out / trials / "report.json").read_text())
    return round(report["results"]["eer_percent"], 2)


def of_students(work: Path, trials: str, method: str, seeds: int) -> list[float]:
    """`eer` of the students of one method."""
    names = [f"{method}-{seed}" for seed in range(seeds)]
    return [eer(work, trials, f"{name}-eval", f"model={name}") for name in names]


def sessions(work: Path, rows: list[tuple[str, str, str]], seeds: int) -> dict[str, list[float]]:
    """EER (%) of students across recording sessions, by method; the trials of both test lists are within sessions."""
    trials = "trials-across-sessions"
    across_sessions(work / f"{trials}.txt", rows)
    return {method: of_students(work, trials, method, seeds) for method in METHODS}


def unlabelled(work: Path, weights: Path, rows: list[tuple[str, str, str]], seeds: int) -> dict[str, list[float]]:
    """EER (%) across sessions of Arabic speakers who were in no training, of students that were given all unlabelled
    speech but theirs, and of those that were given none."""
    speakers = sorted({speaker for _, speaker, _ in rows})
    given = set(speakers[: (len(speakers) + 1) // 2])
    with open(work / "arabic.csv", newline="") as source:
        lines = list(csv.DictReader(source))
    speaker_of = {utt: speaker for utt, speaker, _ in rows}
    with open(work / "arabic_half.csv", "w", newline="") as out:
        half = csv.DictWriter(out, lines[0], lineterminator="\n")
        half.writeheader()
        half.writerows(line for line in lines if speaker_of[line["utt"]] in given)
    extract(work, weights, "arabic_half", work / "arabic_half.csv")
    trials = "trials-unseen"
    across_sessions(work / f"{trials}.txt", [row for row in rows if row[1] not in given])
    settings = ("cache=[libri,unlabelled,arabic_half]", *XVECTOR, f"steps={STEPS}")

    def train(seed: int) -> None:
        spkd(work, 1, "train", "--loss", "contrastive", *settings, f"seed={seed}", f"out=unlabelled-{seed}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(seeds)))
    rows_of = {"contrastive_unlabelled": "unlabelled"} | {
        name: name for name in ("contrastive", "ntxent", "no_teacher")
    }
    found = {row: of_students(work, trials, method, seeds) for row, method in rows_of.items()}
    found["teacher"] = [eer(work, trials, "teacher-eval", "model=dvector", f"weights={weights}")]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="the folder librispeech-mini")
    options.add_argument("--teacher", type=Path, required=True, help="weights of the GE2E d-vector")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--work", type=Path, default=HERE / "work" / "papers")
    given = options.parse_args()
    work = given.work.resolve()
    caches = {name: Cache.open(work / name) for name in CORPORA}
    result = {"spread": spread(caches), "pull": pull(caches["libri"]), "frames": frames(caches["libri"])}
    rows = recordings(given.data.resolve().parent / "arabic-commands-mini" / "train.csv")
    result["sessions_eer"] = sessions(work, rows, given.seeds)
    result["unlabelled_eer"] = unlabelled(work, given.teacher.resolve(), rows, given.seeds)
    result["machine"] = describe()
    (HERE / "results" / "papers_why.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
