"""What each student costs: parameters, and multiply-accumulates per second of speech.

Then what those of about the same size cost on a processor, and why: forward and backward pass of 64 crops of 2 s on one
core, in float32 and in bfloat16, and an embedding of 4 s. Shapes of ReDimNet2 follow, from the authors' B0 to the
student, each with one thing changed. CPU time, of which other processes take little part, the least of several rounds.

    python benchmarks/students.py

Prints tables and, as its last line, one JSON object; keeps it in benchmarks/results/students.json, from which
tables.py makes the tables of docs/students.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import record
import torch

from spkd.networks.network import Network, count_macs, count_parameters
from spkd.networks.redimnet import ReDimNet2
from spkd.networks.toolkits.redimnet import AuthorsReDimNet, Shape, StageShape
from spkd.students import build

WIDTHS = {
    "xvector": (256, 512),
    "etdnn": (208, 512),
    "ecapa": (128, 512, 1024),
    "resnet34": (16, 32),
    "campplus": (64, 128),
    "redimnet2": (12, 16, 20),
    "ssl": (192, 768),
    "tiny": (64, 96),
}
TIMED = (
    ("xvector", 170),
    ("xvector", 210),
    ("ecapa", 96),
    ("tiny", 160),
    ("tiny", 208),
    ("redimnet2", 12),
    ("redimnet2", 16),
)
LONG = 4.0  # seconds of a step that is not repeated
BATCH, CROP, UTTERANCE = 64, 198, 398  # crops of a step; frames of a crop of 2 s and of an utterance of 4 s


def shapes() -> dict[str, Shape]:
    """Shapes of ReDimNet2: the authors' B0 at 80 bands, and what leads from it to the student."""
    first = Shape(80, 12, b0(40, 20, 2), "basic_resnet", "conv+att", 1, True, 64, True, True)
    ours = ReDimNet2().shape
    last = replace(ours.stages[-1], bands=1)
    return {
        "B0 of the authors": first,
        "... strided at the first layer (20 bands, 25 frames a second)": replace(
            first, stem=ours.stem, channels=16, stages=b0(10, 5, 1)
        ),
        "... and of four stages, two of them with 1-d blocks": replace(ours, divisor=1, compressed=True),
        "the student: dense 2-d convolutions": ours,
        "... with ConvNeXt blocks": replace(ours, block="convnext_like", divisor=1),
        "... with one convolution beside the attention": replace(ours, context="att"),
        "... without layers over time in the 1-d blocks": replace(ours, context="fc"),
        "... with 10 bands of twice as many channels": replace(
            ours, stem=(8, 4), channels=32, stages=(*ours.stages[:-1], last)
        ),
    }


def b0(first: int, last: int, bands: int) -> tuple[StageShape, ...]:
    """Stages of the authors' B0, with other reductions, and another stride over the bands in the last."""
    strides = [(1, 1, 2, 2), (2, 1, 3, 1), (1, 2, 4, 1), (2, 1, 5, 1), (1, 2, 4, 1), (bands, 1, 3, 1)]
    return tuple(StageShape(*stage, first if number < 4 else last) for number, stage in enumerate(strides))


def timed(network: Network, rounds: int, batch: int) -> dict[str, Any]:
    """Parameters, time of a step in both precisions (ms), and time of a second of speech (ms)."""
    crops, whole = torch.randn(batch, CROP, 80), torch.randn(1, UTTERANCE, 80)

    def step(halved: bool) -> float:
        begin = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            embedding = network(crops)["embedding"]
        embedding.float().square().mean().backward()
        return time.process_time() - begin

    def embed() -> float:
        begin = time.process_time()
        with torch.inference_mode():
            network(whole)
        return time.process_time() - begin

    network.train()
    steps = []
    for halved in (False, True):
        taken = [step(halved)]
        while len(taken) <= rounds and taken[0] < LONG:
            taken.append(step(halved))
        steps.append(min(taken))
    network.eval()
    return {
        "parameters": count_parameters(network),
        "step_ms": round(1000 * steps[0], 1),
        "step_bf16_ms": round(1000 * steps[1], 1),
        "speech_ms": round(1000 * min(embed() for _ in range(3 * rounds)) * 100 / UTTERANCE, 2),
    }


def time_table(rows: Iterable[dict[str, Any]]) -> str:
    """A table of times in docs/students.md."""
    lines = ["| | parameters | step, fp32 | step, bf16 | a second of speech |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.2f} M | {row['step_ms']:.0f} ms | "
            f"{row['step_bf16_ms']:.0f} ms | {row['speech_ms']:.2f} ms |"
        )
    return "\n".join(lines)


def table(result: dict) -> str:
    """The table of docs/students.md."""
    lines = ["| student | channels | parameters | MACs per second of speech |", "|---|---|---|---|"]
    for row in result["students"]:
        lines.append(
            f"| `{row['student']}` | {row['channels']}{' (default)' if row['default'] else ''} | "
            f"{row['parameters'] / 1e6:.2f} M | {row['macs_per_second'] / 1e6:.0f} M |"
        )
    return "\n".join(lines)


def main() -> None:
    options = record.options(__doc__)
    options.add_argument("--students", nargs="+", default=list(WIDTHS))
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--crops", type=int, default=BATCH, help="crops of a step")
    given = record.parse(options, students=["xvector", "tiny"], seconds=1.0, rounds=1, crops=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in given.students:
        for channels in WIDTHS[name]:
            network = build(name, channels=channels, embedding=192).eval()
            row = {"student": name, "channels": channels, "default": channels == network.default_channels}
            row |= {
                "parameters": count_parameters(network),
                "macs_per_second": count_macs(network, given.seconds) / given.seconds,
            }
            rows.append(row)
            print(
                f"{name:9} {channels:5} {row['parameters'] / 1e6:7.2f} M parameters"
                f" {row['macs_per_second'] / 1e6:8.1f} M MACs/s"
            )
    compared = {
        f"`{name}`, {channels} channels": build(name, channels=channels, embedding=192) for name, channels in TIMED
    }
    steps, variants = [], []
    for found, networks in ((steps, compared), (variants, shapes())):
        for name, made in networks.items():
            network = made if isinstance(made, Network) else AuthorsReDimNet(made, 192)
            found.append({"name": name} | timed(network, given.rounds, given.crops))
            print(found[-1], flush=True)
            if given.tiny:
                break
    result = {"students": rows, "embedding": 192, "seconds": given.seconds, "crops": given.crops}
    result |= {"steps": steps, "shapes": variants}
    record.keep("students", result, given.tiny)


if __name__ == "__main__":
    main()
