"""What extraction costs beside the teacher: its speed over a bare loop of forwards over the same batches in memory.

Teachers are real networks with random weights: WavLM's convolutions with two transformer layers, and a ResNet34. The
corpus is synthetic speech in FLAC files. Crops are decoded, reverberated and mixed with noise; `full` views are whole
utterances of different length. Rounds of extraction and bare loop alternate in one process; ratios are medians. The
codecs' calibration, 32 views once for a cache of any size, is done before the first round and not timed.

    python benchmarks/extract_overhead.py [--device cuda] [--wavlm-large]

--wavlm-large also times WavLM-Large's shape in bf16 (for a GPU): hours of audio per hour. Prints a table and, as its
last line, one JSON object; keeps it in benchmarks/results/extract_overhead.json (with a GPU: ..._gpu.json).
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import record
import soundfile
import torch

from spkd import config
from spkd.corpus.loader import iterate_batches
from spkd.corpus.manifest import Manifest, build
from spkd.corpus.view import ViewPlan
from spkd.demo.synthesis import speaker, utterance
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.extract.targets import chosen_targets, extract_targets
from spkd.students import Checkpoint, save_student
from spkd.students import build as build_network
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher

HERE = Path(__file__).parent
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
         "feat_extract_norm": "layer", "do_stable_layer_norm": True}  # fmt: skip


def corpus(work: Path, utterances: int) -> Manifest:
    """FLAC files of 2 to 6 s, and room impulse responses beside them."""
    audio = work / "audio"
    if not audio.is_dir():
        random = np.random.RandomState(0)
        for i in range(utterances):
            folder = audio / f"spk{i % 8}"
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{i}.flac", utterance(speaker(i % 8), i, random.uniform(2, 6)), 16_000)
        (work / "rir").mkdir()
        (work / "noise").mkdir()
        for i in range(4):
            decay = np.exp(-np.arange(8000) / 1500) * random.standard_normal(8000)
            soundfile.write(work / "rir" / f"{i}.wav", 0.3 * decay / np.abs(decay).max(), 16_000)
            soundfile.write(work / "noise" / f"{i}.wav", 0.1 * random.standard_normal(16_000 * 20), 16_000)
    return build(audio, "folder")[0]


def save_wavlm(folder: Path, **shape: object) -> Path:
    import transformers

    if not folder.is_dir():
        torch.manual_seed(0)
        transformers.WavLMModel(transformers.WavLMConfig(**shape)).save_pretrained(folder)
    return folder


def save_resnet(folder: Path) -> Path:
    if not folder.is_dir():
        torch.manual_seed(0)
        save_student(folder, Checkpoint(build_network("resnet34", channels=32, embedding=256).eval()))
    return folder


def settings(work: Path, view: list[str], keys: list[str]) -> ExtractConfig:
    noisy = [f"view.noise={work / 'noise'}", f"view.rir={work / 'rir'}", "view.noise_prob=1", "view.rir_prob=1"]
    more = noisy if view[0].startswith("view=crops") else []
    return config.load(ExtractConfig, [*keys, *view, *more, f"cache={work / 'cache'}"], environ={})


def empty(root: Path) -> None:
    """Leave nothing of a cache but its card, plan and calibrated codecs."""
    (root / "COMPLETE.json").unlink()
    shutil.rmtree(root / "commits")
    for folder in root.glob("*/c"):
        shutil.rmtree(folder)


def bare_loop(teacher: Teacher, manifest: Manifest, given: ExtractConfig) -> tuple[list, list]:
    """The batches of an extraction, in memory, and the targets."""
    plan = ViewPlan.parse(given.view)
    views = plan.views(manifest)
    loader = teacher.view_loader(manifest, views, plan, 0.3)
    numbers = np.arange(len(views))
    batches = iterate_batches(loader, numbers, given.batch_size, given.workers, print, teacher.takes_lengths)
    return list(batches), chosen_targets(given, teacher)


def measure(work: Path, name: str, keys: list[str], view: list[str], rounds: int, manifest: Manifest) -> dict:
    given = settings(work, view, keys)
    device = torch.device(given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(given.teacher, device)
    batches, targets = bare_loop(teacher, manifest, given)
    seconds = sum(float(b.lengths.sum() if b.lengths is not None else b.waves.numel()) for b in batches) / 16_000
    extract_targets(teacher, batches[0], targets)
    ratios, speeds = [], []
    with contextlib.redirect_stdout(io.StringIO()):
        extract(given, teacher, manifest)
    for _ in range(rounds):
        empty(work / "cache")
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            extract(given, teacher, manifest)
        whole = time.perf_counter() - start
        start = time.perf_counter()
        for batch in batches:
            extract_targets(teacher, batch, targets)
        ratios.append((time.perf_counter() - start) / whole)
        speeds.append(seconds / whole)
    shutil.rmtree(work / "cache", ignore_errors=True)
    row = {
        "name": name, "view": view[0].removeprefix("view="), "audio_seconds": round(seconds),
        "ratio_to_forward_only": round(statistics.median(ratios), 3), "least": round(min(ratios), 3),
        "most": round(max(ratios), 3), "hours_per_hour": round(statistics.median(speeds)),
    }  # fmt: skip
    print(f"{name:<14} {row['view']:<12} {row['ratio_to_forward_only']:>7} ({row['least']}..{row['most']})"
          f" {row['hours_per_hour']:>8} hours per hour", flush=True)  # fmt: skip
    return row


def main() -> None:
    options = record.options(__doc__, "extract_overhead")
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--utterances", type=int, default=32)
    options.add_argument("--views", nargs="+", default=["crops:2,2.0", "full"])
    options.add_argument("--wavlm-large", action="store_true")
    given = record.parse(options, rounds=1, utterances=2, views=["crops:1,0.5"])
    given.work.mkdir(parents=True, exist_ok=True)
    manifest = corpus(given.work, given.utterances)
    common = [f"device={given.device}", "workers=2"]
    wavlm = save_wavlm(given.work / "wavlm", hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=512)  # fmt: skip
    resnet = save_resnet(given.work / "resnet")
    teachers = {
        "WavLM-shaped": ["teacher=wavlm", f"teacher.weights={wavlm}", *common],
        "ResNet34": ["teacher=checkpoint", f"teacher.weights={resnet}", *common],
    }
    print(f"{'teacher':<14} {'views':<12} ratio of extraction's speed to that of the forwards alone")
    rows = [
        measure(given.work, name, keys, [f"view={view}"], given.rounds, manifest)
        for name, keys in teachers.items()
        for view in given.views
    ]
    if given.wavlm_large:
        large = save_wavlm(given.work / "wavlm-large", **LARGE)
        keys = ["teacher=wavlm", f"teacher.weights={large}", "teacher.precision=bf16", "teacher.targets=[embedding]"]
        rows.append(
            measure(given.work, "WavLM-Large", [*keys, *common, "workers=8"], ["view=crops:8,3.0"], 3, manifest)
        )
    worst = min(row["ratio_to_forward_only"] for row in rows)
    report = {"ratio_to_forward_only": worst, "rows": rows, "rounds": given.rounds}
    suffix = "" if given.device == "cpu" else "_gpu"
    record.keep(f"extract_overhead{suffix}", report, given.tiny)


if __name__ == "__main__":
    main()
