"""Everything that wants a GPU, in one call: does it say what the CPU says, does it repeat itself, and how fast is it?

    python benchmarks/gpu.py

Needs `.[gpu,teachers]`, but no data and no download: synthetic speech (spkd.demo), WavLMs with random weights. Takes
some minutes on a GPU. Prints, and keeps in benchmarks/results/gpu.json:
- extract_least_cosine: between what the teacher outputs on the GPU and on the CPU, least over all views and frames;
- losses and students: per loss, and per student, the relative difference of the mean of its terms over the last steps
  between the two, and for losses whether the same command gives the same student twice on the GPU;
- ways: the same between fp32 and each other way to train on the GPU: half precision, compiled, from CUDA graphs, ...;
- ddp_of_one: the greatest relative difference of a gradient where one process trains as the only rank;
- eval_greatest_difference: of a score;
- wavlm_hours_per_hour: hours of audio that a WavLM of base, and one of large in bf16, extract in an hour; and
  wavlm_large_forward: hours that its forward passes alone take, and their share of the speed of a large matrix product;
- views_per_second: that train a student, from best-mini (x-vector, 64 channels) and best (ECAPA-TDNN, 512 channels);
- mining: `mining.py`, whose index is on the GPU where faiss-gpu sees one;
- extract_overhead: `extract_overhead.py` on the device.
What fails is kept as its error, and the rest goes on. Speeds are without starting up.

`--device cpu` compares the CPU with itself: a rehearsal of the script, of which nothing is kept.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import operations
import record
import soundfile
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
from spkd.registry import STUDENTS
from spkd.teachers import load_teacher
from spkd.teachers.settings import TeacherConfig
from spkd.train.distributed import share_over_ranks
from spkd.train.settings import TrainConfig
from spkd.train.trainer import train

HERE = Path(__file__).parent
SPEAKERS, UTTERANCES, SECONDS = 24, 4, 3.0
SHAPES = {
    "small": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192},
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
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
WIDTHS = {"resnet34": 8, "campplus": 32, "ssl": 48}
WAYS: dict[str, tuple[str, ...]] = {
    "bf16": ("precision=bf16",),
    "fp16": ("precision=fp16",),
    "compiled": ("compile=true",),
    "graphs": ("compile=reduce-overhead",),
    "graphs in bf16, accumulated": ("compile=reduce-overhead", "precision=bf16", "accumulate=2"),
    "channels last": ("student=resnet34", "student.channels=8", "channels_last=true"),
    "averaged": ("optim.swa_fraction=0.5",),
}
OF_A_GPU = ("fp16",)
SPEEDS = {
    "best-mini": ("student=xvector", "student.channels=64"),
    "best-mini, graphs": ("student=xvector", "student.channels=64", "compile=reduce-overhead"),
    "best": ("student=ecapa", "student.channels=512"),
    "best, graphs": ("student=ecapa", "student.channels=512", "compile=reduce-overhead"),
    "best, graphs in bf16": ("student=ecapa", "student.channels=512", "compile=reduce-overhead", "precision=bf16"),
}


@dataclass(frozen=True)
class Load:
    """What the speeds are measured on.

    Attributes:
        crops: views of each utterance.
        batch: views in a step.
        short: steps of the first of two trainings.
        long: steps of the second.
        forwards: forward passes over `batch` views of two seconds.
        side: rows of the matrices of the large product.
    """

    crops: int
    batch: int
    short: int
    long: int
    forwards: int
    side: int


LOADS = {
    "cuda": Load(crops=100, batch=256, short=20, long=120, forwards=30, side=8192),
    "cpu": Load(crops=1, batch=8, short=2, long=4, forwards=1, side=256),
}


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
        print(f"loss {name:18} {found[name]}", flush=True)
    return found


def relative_difference(one: dict[str, float], other: dict[str, float]) -> float:
    return round(max(abs(other[term] - one[term]) / abs(one[term]) for term in one), 6)


def compare_students(work: Path, device: str, students: Sequence[str]) -> dict[str, float]:
    """Relative difference between the CPU and the device for each student."""
    found = {}
    for name in students:
        given = (f"student={name}", f"student.channels={WIDTHS.get(name, 16)}", "batch_size=8", "steps=5", "crop=1.0")
        here, there = (trained(work, "cosine", where, "student", *given) for where in ("cpu", device))
        found[name] = relative_difference(here, there)
        print(f"student {name:10} {found[name]}", flush=True)
    return found


def compare_ways(work: Path, device: str, ways: Sequence[str]) -> dict[str, object]:
    """Relative difference between fp32 and other ways to train on the device; of one that fails, the error."""
    found: dict[str, object] = {}
    for name in ways:
        if device == "cpu" and name in OF_A_GPU:
            continue
        given = (*XVECTOR, *WAYS[name], "batch_size=8", f"steps={STEPS}")
        plain = [key for key in given if not key.startswith(("precision", "compile", "channels_last", "optim"))]
        one = trained(work, "contrastive", device, "plain", *plain)
        found[name] = attempt(lambda given=given, one=one: relative_difference(
            one, trained(work, "contrastive", device, "way", *given)
        ))  # fmt: skip
        print(f"way {name:28} {found[name]}", flush=True)
    return found


def attempt(call: Callable[[], object]) -> object:
    """What a call returns, or the last line of its error: time on a GPU is rare, and the rest goes on."""
    try:
        return call()
    except Exception as error:
        traceback.print_exc()
        return f"error: {' '.join(str(error).split())[:200]}"


def ddp_of_one(device: str) -> float:
    """Greatest relative difference of a gradient where one process trains as the only rank, from training alone."""
    options, gradients = operations.settings("best-mini"), []
    torch.manual_seed(0)
    alone, targets = operations.module_of(options)
    with torch.device(device):
        batch = operations.batch_of(options, alone.network, targets)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for is_rank in (False, True):
            module = copy.deepcopy(alone).to(device).train()
            connected: torch.nn.Module = module
            if is_rank:
                share_over_ranks(module, len(batch.crops[0]))
                connected = DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)
            total, _ = connected(batch.crops, batch.inputs, None)
            total.backward()
            gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    finally:
        dist.destroy_process_group()
    greatest = max(float(one.abs().max()) for one in gradients[0])
    return max(float((one - other).abs().max()) for one, other in zip(*gradients, strict=True)) / greatest


def scores(work: Path, device: str) -> np.ndarray:
    settings = config.load(
        EvalConfig, [f"manifest={work / 'manifest.csv'}", f"device={device}", f"out={work / 'eval'}"], environ={}
    )
    teacher = load_teacher(TeacherConfig("checkpoint", str(work / "on-cpu")), torch.device(device))
    listed = trials.read(work / "trials.txt")
    return scoring.score(settings, teacher, Manifest.load(settings.manifest), listed).scores[0]


def extraction_speed(work: Path, device: str, shape: str) -> int:
    """Hours of audio that the teacher takes in an hour."""
    more = (f"view=crops:{LOADS[device].crops},2.0", "workers=8", *(["teacher.precision=bf16"] * (shape == "large")))
    settings = settings_of(work, shape, device, *more)
    seconds = extracted(settings)
    return round(np.sum(Cache.open(settings.cache).plan.views.samples) / SAMPLE_RATE / seconds)


def seconds_of(device: str, call: Callable[[], object], times: int) -> float:
    """Mean seconds of a call on the device, after one that is not timed."""
    for count in (1, times):
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


class Multiplications(TorchDispatchMode):
    """Mode that counts the operations of matrix products and convolutions on floating-point numbers.

    torch's FlopCounterMode, whose formulas these are, fails in layers with parametrisations.
    """

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, formula = func(*args, **(kwargs or {})), flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def forward_speed(work: Path, device: str) -> dict[str, float]:
    """Hours that the forward passes of WavLM-Large's shape in bf16 take in an hour, and their share of the peak.

    The device's peak is measured: a product of large matrices in bf16.
    """
    load = LOADS[device]
    teacher = load_teacher(TeacherConfig("wavlm", str(work / "large"), "bf16"), torch.device(device))
    waves = 0.1 * torch.randn(load.batch, 2 * SAMPLE_RATE)
    if device == "cuda":
        waves = waves.pin_memory()
    with Multiplications() as counter:
        teacher.extract(waves, ["embedding"])
    seconds = seconds_of(device, lambda: teacher.extract(waves, ["embedding"]), load.forwards)
    matrix = torch.randn(load.side, load.side, device=device, dtype=torch.bfloat16)
    of_product = seconds_of(device, lambda: matrix @ matrix, load.forwards)
    peak = 2 * load.side**3 / of_product
    return {
        "hours_per_hour": round(2 * load.batch / seconds),
        "tflops": round(counter.flops / seconds / 1e12, 2),
        "share_of_peak": round(counter.flops / seconds / peak, 3),
    }


def training_speed(work: Path, device: str, student: Sequence[str]) -> int:
    """Views a second: the difference of a long and a short run, so that starting up does not count."""
    load, seconds = LOADS[device], []
    for steps in (load.short, load.long):
        start = time.perf_counter()
        trained(work, "contrastive", device, "speed", *student, f"batch_size={load.batch}", f"steps={steps}")
        seconds.append(time.perf_counter() - start)
    return round(load.batch * (load.long - load.short) / max(seconds[1] - seconds[0], 1e-3))


def beside(device: str, name: str) -> object:
    """The result of another benchmark on the device."""
    scripts: dict[str, list[str]] = {"mining": [], "extract_overhead": ["--device", "cuda", "--rounds", "3"]}
    command = [sys.executable, str(HERE / f"{name}.py"), *(scripts[name] if device == "cuda" else ["--tiny"])]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(printed.stdout.splitlines()[-1])


def main() -> None:
    options = record.options(__doc__, "gpu")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--losses", nargs="*", default=list(RUNS), choices=list(RUNS))
    options.add_argument("--students", nargs="*", default=list(STUDENTS), choices=list(STUDENTS))
    options.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options.add_argument("--speeds", nargs="*", default=list(SPEEDS), choices=list(SPEEDS))
    options.add_argument("--beside", nargs="*", default=["mining", "extract_overhead"], help="other benchmarks")
    few = {"losses": ["cosine"], "students": ["tiny"], "ways": ["bf16"], "speeds": ["best-mini"]}
    given = record.parse(options, device="cpu", **few)
    device, work = given.device, given.work
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch sees; --device cpu rehearses the script")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    prepare(work, given.tiny)

    small = settings_of(work, "small", "cpu", TARGETS, "fbank=true", "wave=true")
    extracted(small)
    checks: dict[str, Callable[[], object]] = {
        "extract_least_cosine": lambda: least_cosines(small, device),
        "losses": lambda: compare_training(work, device, given.losses, given.tiny),
        "students": lambda: compare_students(work, device, given.students),
        "ways": lambda: compare_ways(work, device, given.ways),
        "ddp_of_one": lambda: ddp_of_one(device),
        "eval_greatest_difference": lambda: round(float(np.abs(scores(work, "cpu") - scores(work, device)).max()), 7),
        "wavlm_large_forward": lambda: forward_speed(work, device),
        "wavlm_hours_per_hour": lambda: {shape: extraction_speed(work, device, shape) for shape in ("base", "large")},
        "views_per_second": lambda: {
            name: attempt(lambda name=name: training_speed(work, device, SPEEDS[name])) for name in given.speeds
        },
        **{name: lambda name=name: beside(device, name) for name in given.beside},
    }
    result: dict[str, object] = {"device": device}
    for name, check in checks.items():
        start = time.perf_counter()
        result[name] = attempt(check)
        print(f"{name} ({time.perf_counter() - start:.0f} s): {result[name]}", flush=True)
    record.keep("gpu", result, given.tiny or device == "cpu")


if __name__ == "__main__":
    main()
