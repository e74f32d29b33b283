"""Why some claims do not hold in papers.py: what the data and the teacher show about it.

Needs the caches and students that papers.py left in its working folder.

    python benchmarks/papers_why.py --data DIR --teacher FILE

Prints, and keeps in benchmarks/results/papers_why.json:
- spread: cosines between the teacher's embeddings of different recordings of the training speech, and of the same
  speaker's, in their own voice;
- pull: the gradient of `contrastive` on a student whose outputs are exactly the teacher's, with the
  batch alone and with mined negatives (0 would leave it where it is), and how much the two losses fall short of 0;
- frames: how much of the teacher's frames the 15 fbank frames in an x-vector's sight determine linearly (R^2 on other
  speakers), beside the same for the mean over the view from the mean fbank;
- confusion: how many of the classes of the x-vector teacher are in the confusion set of TRKD;
- sessions: EER of students on target trials across recording sessions and in another language (arabic-commands-mini,
  which was in no training). The test lists compare pieces of one recording or of one session, as positives of NT-Xent
  do;
- disturbed: EER on test-short as it is, in babble and measured rooms (which were in no training), through a telephone's
  coder and with another voice, of the students whose views had noise, coders or another voice.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import record
import soundfile
import torch
from commands import spkd
from papers import BEST_MINI, LISTS, LONGEST, TINY, Study, prepared, run, training_options
from torch.nn.functional import normalize

from spkd import config
from spkd.cache import Cache, Crop
from spkd.corpus.audio import SAMPLE_RATE, decode
from spkd.corpus.augment import Augmentation
from spkd.corpus.manifest import Manifest, Utterance
from spkd.train.batches import BatchContent, InputSource
from spkd.train.labels import Labels
from spkd.train.losses.base import LossContext, LossInputs
from spkd.train.losses.contrastive import CEILING, Contrastive, ContrastiveSettings
from spkd.train.losses.logits import confusion_set
from spkd.train.mining import Miner
from spkd.train.settings import MiningConfig, TrainConfig
from spkd.train.trainer import checked

HERE = Path(__file__).parent
CONTEXT = 15  # frames that reach one frame of the x-vector before pooling
RIDGE = 10.0
CUTOFFS = (0.99, 0.9, 0.8)
DISTURBED = ("views_speeds", "views_noise", "views_coders", "views_mixed")
ACROSS = (f"untaught_{LONGEST}", "label_free_ntxent", BEST_MINI)


def spread(cache: Cache) -> dict[str, dict[str, float]]:
    """Quantiles of cosines between recordings in their own voice."""
    views = natural(cache)
    outputs = normalize(cache.batch(views, ["embedding"])["embedding"].float(), dim=-1)
    speaker = torch.from_numpy(cache.speaker(views))
    same = speaker[:, None] == speaker
    itself = torch.eye(len(views), dtype=torch.bool)
    found = {}
    for name, chosen in (("same_speaker", same & ~itself), ("different_speakers", ~same)):
        values = torch.quantile((outputs @ outputs.mT)[chosen][:1_000_000], torch.tensor([0.05, 0.5, 0.95]))
        found[name] = {f"cosine_{q}": round(float(v), 3) for q, v in zip((5, 50, 95), values, strict=True)}
    return found


def natural(cache: Cache) -> np.ndarray:
    """The views that are as recorded."""
    columns, usable = cache.plan.views, cache.usable_views
    return usable[np.isclose(columns.speed[usable], 1.0) & np.isclose(columns.formants[usable], 1.0)]


def pull(cache: Cache, batches: int) -> dict[str, dict[str, float]]:
    """Gradient of contrastive, tangential to the sphere, at a student that equals the teacher; mean over batches."""
    labels = Labels.of(cache)
    content = BatchContent(cache, labels, InputSource(cache.target("fbank")))
    miner = Miner(content, MiningConfig(negatives=16), CEILING, crop=2.0)
    levels = {"embedding": cache.target("embedding")}
    loss = Contrastive(ContrastiveSettings(), LossContext(levels, levels, 1))
    found: dict[str, list[tuple[float, float]]] = {"batch": [], "batch and mined": []}
    order = cache.order(0, 0)
    for i in range(batches):
        views = order[np.arange(64) + (i * 64) % max(len(order) - 64, 1)]
        teacher = normalize(cache.batch(views, ["embedding"])["embedding"].float(), dim=-1)
        drawn = miner.negatives(views, 0, i)
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
    views = natural(cache)[::3]
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


def confusion(folder: Path) -> dict[str, int]:
    """Classes of the teacher, and the median size of the confusion set at several cut-offs."""
    given = ["loss=trkd", "loss.trkd.logits=head", f"cache={folder}"]
    task = checked(config.load(TrainConfig, given, environ={}))
    assert task.logits is not None
    views = task.cache.usable_views[::20]
    logits = task.cache.batch(views, ["logits"])["logits"].float()
    label = torch.from_numpy(task.logits.label[views])
    sizes = {f"at_{cutoff}": confusion_set(logits, label, cutoff).sum(1).median() for cutoff in CUTOFFS}
    return {"classes": logits.shape[1], **{name: int(size) for name, size in sizes.items()}}


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


def eer(study: Study, manifest: Path, trials: Path, out: str, *model: str) -> float:
    """EER (%) of one model on one list of trials."""
    spkd(
        study.work,
        study.threads,
        "eval",
        str(trials),
        f"manifest={manifest}",
        f"out={out}/{trials.stem}",
        "bootstrap=0",
        *model,
    )
    report = json.loads((study.work / out / trials.stem / "report.json").read_text())
    return round(report["results"]["eer_percent"], 2)


def eers(
    study: Study, methods: Sequence[str], manifest: Path, trials: Path, seeds: int, condition: str = ""
) -> dict[str, list[float]]:
    """EER (%) of the teacher and of students by method."""
    teacher = "model=dvector", f"model.weights={study.weights}"
    found = {"teacher": [eer(study, manifest, trials, f"teacher-eval{condition}", *teacher)]}
    for method in methods:
        folders = [study.folder(method, seed) for seed in range(seeds)]
        names = [folder for folder in folders if (study.work / folder / "model.json").is_file()]
        if names:
            found[method] = [eer(study, manifest, trials, f"{name}-eval{condition}", f"model={name}") for name in names]
    return found


def sessions(study: Study, seeds: int) -> dict[str, list[float]]:
    """EER (%) across recording sessions."""
    manifest, trials = study.data / "arabic-commands-mini" / "train.csv", study.work / "trials-across-sessions.txt"
    across_sessions(trials, recordings(manifest))
    return eers(study, ACROSS, manifest, trials, seeds)


def disturbed(study: Study, seeds: int) -> dict[str, dict[str, list[float]]]:
    """EER (%) by condition of the tested speech."""
    manifest, trials = (study.data / path for path in LISTS["test_short"])
    noise = study.data / "noise"
    babble = Augmentation(str(noise / "babble"), 1.0, (5.0, 15.0), str(noise / "rir_sample"), 1.0)
    conditions = {
        "clean": Augmentation(),
        "babble_and_rooms": babble,
        "telephone": Augmentation(coders=("gsm",), coder_prob=1.0),
        "another_voice": Augmentation(str(study.data / "speechocean-mini" / "audio" / "test"), 1.0, (0.0, 10.0)),
    }
    found = {}
    for name, augmentation in conditions.items():
        folder = study.work / f"test-short-{name}"
        folder.mkdir(exist_ok=True)
        rows = []
        for number, row in enumerate(Manifest.load(manifest).utterances):
            path = folder / f"{row.id}.wav"
            soundfile.write(path, augmentation(decode(row.path).wave, number), SAMPLE_RATE, "FLOAT")
            rows.append(Utterance(row.id, str(path), row.speaker, row.duration))
        Manifest(tuple(rows)).save(folder / "manifest.csv")
        found[name] = eers(study, DISTURBED, folder / "manifest.csv", trials, seeds, f"-{name}")
    return found


def main() -> None:
    options = training_options(__doc__, "papers")
    options.add_argument("--batches", type=int, default=50, help="over which gradients are averaged")
    given = record.parse(options, **TINY, batches=2)
    study = prepared(given)
    if given.tiny:
        run(study, given.methods, given.seeds, given.jobs)
    cache = Cache.open(study.work / "voices")
    result: dict[str, object] = {"spread": spread(cache), "pull": pull(cache, given.batches), "frames": frames(cache)}
    result["confusion"] = confusion(study.work / "xvector")
    result["sessions_eer"] = sessions(study, given.seeds)
    result["disturbed_eer"] = disturbed(study, given.seeds)
    record.keep("papers_why", result, given.tiny)


if __name__ == "__main__":
    main()
