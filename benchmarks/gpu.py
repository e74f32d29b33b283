"""Everything that wants a GPU, in one call: does it say what the CPU says, does it repeat itself, and how fast is it?

    python benchmarks/gpu.py

Needs `.[gpu,teachers]`, but no data and no download: synthetic speech (spkd.demo), a WavLM with random weights. Prints,
and keeps in benchmarks/results/gpu.json:
- extract: cosines between what the teacher outputs on the GPU and on the CPU, least over all views and frames;
- train: per loss the relative difference of its mean over the last steps between the two, and whether the same command
  gives the same student twice on the GPU;
- eval: greatest difference of a score;
- speed: hours of audio that a WavLM of base (95 M parameters) input_features in an hour, and views a second that train
  a student (ECAPA-TDNN, 512 channels, contrastive), both without starting up;
- mining: `mining.py`, whose index is on the GPU where faiss-gpu sees one;
- extract_overhead: `extract_overhead.py`, with WavLM-Large's shape in bf16 on a GPU.

`--device cpu` compares the CPU with itself: a rehearsal of the script, of which nothing is kept.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import record
import soundfile
import torch
import transformers

from spkd import config
from spkd.cache import Cache
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.manifest import Manifest, build
from spkd.demo.synthesis import speaker, utterance
from spkd.eval import score as scoring
from spkd.eval import trials
from spkd.eval.settings import EvalConfig
from spkd.extract.recheck import compare
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig, VerifyConfig
from spkd.teachers import load_teacher
from spkd.teachers.settings import TeacherConfig
from spkd.train.settings import TrainConfig
from spkd.train.trainer import train

HERE = Path(__file__).parent
SPEAKERS, UTTERANCES, SECONDS = 24, 4, 3.0
SHAPES = {
    "small": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192},
    "base": {},
}
TARGETS = "teacher.targets=[embedding,frames.layer2]"
XVECTOR = ("student=xvector", "student.channels=64")
TINY_MEMO = ("loss.memo.partner=tiny", "loss.memo.prototypes=256", "loss.memo.hidden=64", "loss.memo.bottleneck=32")
RUNS = {
    "aam": XVECTOR,
    "cosine": XVECTOR,
    "mse": XVECTOR,
    "relational": XVECTOR,
    "contrastive": XVECTOR,
    "contrastive mined": (*XVECTOR, "mining.negatives=8", "mining.neighbours=16"),
    "ntxent": XVECTOR,
    "kld": XVECTOR,
    "nontarget": XVECTOR,
    "multilevel": (*XVECTOR, "loss.multilevel.levels={embedding: embedding, frames: frames.layer2}"),
    "memo": (*XVECTOR, *TINY_MEMO, "loss.memo.locals=1", "loss.memo.local_crop=1.0"),
    "one-step": (
        *("student=ssl", "student.channels=48", "student.ssl.adapters=8", "batch_size=16"),
        "loss.one_step.targets=[frames.layer2]",
    ),
}
STEPS = 20


@dataclass(frozen=True)
class Load:
    """What the speeds are measured on. speeds: views of each utterance; batch, short, long: of two trainings."""

    speeds: int
    batch: int
    short: int
    long: int


LOADS = {"cuda": Load(speeds=25, batch=256, short=20, long=120), "cpu": Load(speeds=1, batch=8, short=2, long=4)}


def prepare(work: Path, tiny: bool) -> None:
    """The corpus, its trials and the two teachers."""
    for s, u in itertools.product(range(3 if tiny else SPEAKERS), range(UTTERANCES)):
        folder = work / "audio" / f"speaker{s:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{u}.flac", utterance(speaker(s), 100 * s + u, SECONDS), SAMPLE_RATE)
    manifest, _, _ = build(work / "audio", "folder")
    manifest.save(work / "manifest.csv")
    pairs = itertools.combinations(manifest, 2)
    (work / "trials.txt").write_text("".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs))
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        transformers.WavLMModel(transformers.WavLMConfig(**SHAPES["small"] if tiny else shape)).save_pretrained(
            work / name
        )


def settings_of(work: Path, shape: str, device: str, *more: str) -> ExtractConfig:
    given = [
        *("teacher=wavlm", f"teacher.weights={work / shape}", f"manifest={work / 'manifest.csv'}"),
        *(f"cache={work / f'{shape}-{device}'}", f"device={device}", *more),
    ]
    return config.load(ExtractConfig, given, environ={})


def extracted(settings: ExtractConfig) -> float:
    """Fill a cache; the seconds it took once the teacher was loaded."""
    teacher = load_teacher(settings.teacher, torch.device(settings.device))
    manifest = Manifest.load(settings.manifest)
    start = time.perf_counter()
    extract(settings, teacher, manifest)
    return time.perf_counter() - start


def least_cosines(settings: ExtractConfig, device: str) -> dict[str, float]:
    """Per target the least cosine between a cache and its teacher's outputs on another device."""
    cache, teacher = Cache.open(settings.cache), load_teacher(settings.teacher, torch.device(device))
    live = VerifyConfig(settings.manifest, settings.teacher, device=device)
    found = compare(cache, teacher, Manifest.load(settings.manifest), live, len(cache.usable_views))
    return {one.target: round(one.least, 7) for one in found}


def trained(work: Path, loss: str, device: str, out: str, *settings: str) -> dict[str, float]:
    """Train one student; the means of its terms over the last steps."""
    shutil.rmtree(work / out, ignore_errors=True)
    given = [f"cache={work / 'small-cpu'}", f"out={work / out}", f"device={device}", "crop=2.0", *settings]
    return train(config.load(TrainConfig, [f"loss={loss}", *given], environ={})).terms


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def compare_training(work: Path, device: str, losses: Sequence[str], tiny: bool) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for name in losses:
        loss, common = name.split()[0], (*RUNS[name], f"steps={STEPS}", *(["batch_size=8"] if tiny else []))
        here = trained(work, loss, "cpu", "on-cpu", *common)
        there = trained(work, loss, device, "first", *common)
        trained(work, loss, device, "second", *common)
        difference = max(abs(there[term] - here[term]) / abs(here[term]) for term in here)
        found[name] = {"relative_difference": round(difference, 6), "repeats": same(work / "first", work / "second")}
        print(f"train {name:18} {found[name]}", flush=True)
    return found


def scores(work: Path, device: str) -> np.ndarray:
    settings = config.load(
        EvalConfig, [f"manifest={work / 'manifest.csv'}", f"device={device}", f"out={work / 'eval'}"], environ={}
    )
    teacher = load_teacher(TeacherConfig("checkpoint", str(work / "on-cpu")), torch.device(device))
    listed = trials.read(work / "trials.txt")
    return scoring.score(settings, teacher, Manifest.load(settings.manifest), listed).scores[0]


def extraction_speed(work: Path, device: str) -> float:
    """Hours of audio that the teacher takes in an hour."""
    speeds = [round(float(speed), 4) for speed in np.linspace(0.9, 1.1, LOADS[device].speeds)]
    settings = settings_of(work, "base", device, f"view.speeds={speeds}", "workers=8")
    seconds = extracted(settings)
    return np.sum(Cache.open(settings.cache).plan.views.samples) / SAMPLE_RATE / seconds


def training_speed(work: Path, device: str) -> float:
    """Views a second: the difference of a long and a short run, so that starting up does not count."""
    load, seconds = LOADS[device], []
    student = ("student=ecapa", "student.channels=512", f"batch_size={load.batch}")
    for steps in (load.short, load.long):
        start = time.perf_counter()
        trained(work, "contrastive", device, "speed", *student, f"steps={steps}")
        seconds.append(time.perf_counter() - start)
    return load.batch * (load.long - load.short) / (seconds[1] - seconds[0])


def main() -> None:
    options = record.options(__doc__, "gpu")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--losses", nargs="+", default=list(RUNS), choices=list(RUNS))
    given = record.parse(options, device="cpu", losses=["cosine"])
    device, work = given.device, given.work
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch sees; --device cpu rehearses the script")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    prepare(work, given.tiny)

    small = settings_of(work, "small", "cpu", TARGETS, "fbank=true", "wave=true")
    extracted(small)
    result: dict[str, object] = {"device": device, "extract_least_cosine": least_cosines(small, device)}
    print(f"extract {result['extract_least_cosine']}", flush=True)
    result["train"] = compare_training(work, device, given.losses, given.tiny)
    difference = np.abs(scores(work, "cpu") - scores(work, device)).max()
    result |= {
        "eval_greatest_difference": round(float(difference), 7),
        "wavlm_base_hours_per_hour": round(extraction_speed(work, device)),
        "ecapa_views_per_second": round(training_speed(work, device)),
    }
    scripts: dict[str, list[str]] = {"mining": [], "extract_overhead": ["--device", "cuda", "--wavlm-large"]}
    for name, more in scripts.items():
        command = [sys.executable, str(HERE / f"{name}.py"), *(more if device == "cuda" else ["--tiny"])]
        printed = subprocess.run(command, check=True, capture_output=True, text=True)
        result[name] = json.loads(printed.stdout.splitlines()[-1])
    record.keep("gpu", result, given.tiny or device == "cpu")


if __name__ == "__main__":
    main()
