"""Damaged and odd input of every kind through the real commands: does any end in a traceback, a hang or a crash?

Every input is a copy of something valid (manifests of five dialects, audio of five kinds, trial lists, caches, their
exports and pulled copies, copies on a web server, student and teacher folders, maps, voices, checkpoints, training
states, records of runs, files of vectors, settings) with one change: flipped, lost, repeated or random bytes; an odd
value in the place of a field; a pipe, a socket, a device, an endless file, a folder or a loop of links in the place of
a file; parts of files of torch, NumPy, gzip and YAML that stand for gigabytes or name code; and for caches also odd
values behind checksums that were made to match. A command that reads it then runs in a process of its own, under a
limit of time and of memory.

    python benchmarks/fuzz.py --inputs 3000 --seed 0

Prints a table and, as its last line, one JSON object: `clean` inputs were refused with a message, `accepted` ones ended
with exit code 0. `tracebacks` counts unexpected failures too, `hangs` what took over a minute, `crashes` what a signal
ended or the memory limit stopped, `ran` what ran code of its input. Each of the four keeps its input and output below
--work. The object is kept in
benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.server
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import wave
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import record
import soundfile
import torch
import transformers

import spkd.cache.exchange.hdf5
import spkd.cache.exchange.merge
import spkd.cache.exchange.remote
import spkd.cache.exchange.tars
import spkd.eval.run
import spkd.extract.run
import spkd.train.trainer  # noqa: F401  imported before the processes are forked, as those above
from spkd import config
from spkd.cache.folder import CARD, COMPLETE, commit_path
from spkd.cli import main as spkd_main
from spkd.demo.synthesis import speaker, utterance
from spkd.eval.settings import EvalConfig
from spkd.extract.settings import ExtractConfig
from spkd.files import digest
from spkd.files.sealed import self_digest
from spkd.networks.toolkits.recognise import SPEECHBRAIN_XVECTOR
from spkd.networks.toolkits.resnet import ResNet
from spkd.networks.toolkits.xvector import SpeechBrainXVector
from spkd.students import Checkpoint, build, save_student
from spkd.train.settings import TrainConfig

HERE = Path(__file__).parent
MARK = "RAN"  # folder that code in an input makes
SECONDS = 60.0  # of one command, after which it hangs
MEMORY = 12 * 2**30  # address space of one command
SPEAKERS, UTTERANCES, LENGTH = 3, 3, 0.8
SMALL = ["steps=2", "batch_size=4", "student.channels=8", "student.embedding=6", "crop=0.3", "device=cpu"]
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**18, -(10**30), 1e308, float("nan"), float("inf"), 0.5, "", "x", "nan"),
    *("../../etc/passwd", "/dev/zero", "\x00", "\x1b[2J", "é\u2028", "[/x]", "=1+1", "$\\frac{$", "a" * 5000),
    *([], {}, [[]], [None], {"a": {"b": []}}, [1] * 5000),
]
Chance = random.Random


@dataclass(frozen=True)
class Case:
    """One kind of input.

    Attributes:
        files: what may be changed, as patterns below the workspace.
        commands: command lines that read it; one is chosen.
        reseal: gives a changed cache matching checksums.
        replaced: chance that a file is replaced by something that is no file.
    """

    files: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    reseal: Callable[[Path], None] | None = None
    replaced: float = 0.06


def once(*arguments: str) -> tuple[str, ...]:
    """Arguments of which each key is given once: the last of them."""
    keys = [argument.partition("=")[0] for argument in arguments]
    return tuple(a for i, a in enumerate(arguments) if "=" not in a or keys[i] not in keys[i + 1 :])


def extract(*more: str) -> tuple[str, ...]:
    return once("extract", "teacher=none", "cache=new", "view=crops:2,0.4", *more)


def train(*more: str) -> tuple[str, ...]:
    return once("train", "--loss", "cosine", *SMALL, *more)


TRAIN_SSL = tuple(  # a student of init's own width
    argument
    for argument in train("cache=cache", "out=run2", "student=ssl", "student.init=wavlm", "manifest=manifest.csv")
    if not argument.startswith("student.channels=")
)


def evaluate(*more: str) -> tuple[str, ...]:
    return once("eval", "trials.txt", "manifest=manifest.csv", "device=cpu", "bootstrap=5", *more)


def reseal(root: Path) -> None:
    """Let every digest of a cache fit what lies there now."""
    path = root / COMPLETE
    for part in filter(Path.is_file, (root / CARD, *root.glob("commits/*.json"))):
        with contextlib.suppress(ValueError, OSError):
            if isinstance(changed := json.loads(part.read_bytes()), dict):
                part.write_text(json.dumps(changed | {"check": self_digest(changed)}))
    tree = json.loads(path.read_bytes())
    tree["card"] = json.loads((root / CARD).read_bytes())
    tree["sha256"] = {n: digest.of_file(root / n) if (root / n).is_file() else v for n, v in tree["sha256"].items()}
    units = range(len(tree["commits_sha256"]) // 64)
    commits = [commit_path(root, unit) for unit in units]
    tree["commits_sha256"] = "".join(digest.of_file(path) if path.is_file() else "0" * 64 for path in commits)
    path.write_text(json.dumps(tree | {"check": self_digest(tree)}))


WITH_TEACHER = (
    *("teacher=checkpoint", "teacher.weights=student", "teacher.targets=[frames,embedding,logits]"),
    *("fbank=true", "storage.unit_views=4"),
)
CACHE_COMMANDS = (
    ("cache", "info", "cache"),
    ("cache", "ls", "."),
    ("cache", "verify", "cache"),
    ("cache", "export", "cache", "new.h5"),
    ("cache", "export", "cache", "newtars"),
    ("cache", "push", "cache", "pushed"),
    ("cache", "pull", "cache", "pulled"),
    ("cache", "pull", "http://127.0.0.1:{port}/{place}/cache", "pulled"),
    ("cache", "merge", "cache", "other", "merged"),
    train("cache=cache", "out=run2"),
    extract("manifest=manifest.csv", "cache=cache", *WITH_TEACHER, "storage.codecs={frames: float16+zstd}"),
)
MODEL_COMMANDS = (
    evaluate("model=student", "out=new"),
    train("cache=cache", "out=run2", "student.init=student"),
    ("export", "student", "to=pt2", "out=new.pt2"),
    extract("manifest=manifest.csv", "teacher=wavlm", "teacher.weights=wavlm"),
    TRAIN_SSL,
    extract("manifest=manifest.csv", "teacher=wespeaker", "teacher.weights=wespeaker"),
    extract("manifest=manifest.csv", "teacher=speechbrain", "teacher.weights=speechbrain"),
    extract("manifest=manifest.csv", "teacher=onnx", "teacher.weights=model.onnx", "teacher.onnx.input=kaldi"),
    ("cache", "catalogue", ".", "--out", "new.html"),
)
RUN_COMMANDS = (
    ("train", "--from", "finished", "out=again", "device=cpu"),
    train("cache=cache", "out=finished", "steps=4", "save_every=2"),
    train("cache=cache", "out=run", "steps=4", "save_every=2"),
    ("report", "evaluation", "again=evaluation", "--bootstrap", "5", "--out", "new"),
)
EVERY = ("cache/*.json", "cache/**/*.json", "cache/plan/*", "cache/*.safetensors", "cache/*/c/*/0")
CASES = {
    "manifest csv": Case(
        ("manifest.csv",), (extract("manifest=manifest.csv", "fbank=true"), evaluate("model=student"))
    ),
    "manifest jsonl": Case(("manifest.jsonl",), (extract("manifest=manifest.jsonl", "fbank=true"),)),
    "manifest tsv": Case(("manifest.tsv",), (extract("manifest=manifest.tsv", "fbank=true"),)),
    "manifest lhotse": Case(
        ("cuts.jsonl", "cuts.jsonl.gz"),
        (extract("manifest=cuts.jsonl", "fbank=true"), extract("manifest=cuts.jsonl.gz", "fbank=true")),
    ),
    "manifest kaldi": Case(("kaldi/*",), (extract("manifest=kaldi", "fbank=true"),)),
    "audio": Case(
        ("audio/*/*",),
        (
            ("manifest", "audio", "--out", "new.csv"),
            extract("manifest=manifest.csv", "fbank=true"),
            extract("manifest=manifest.csv", "fbank=true", "view=full", "view.noise=audio"),
            evaluate("model=student"),
        ),
    ),
    "trials": Case(("trials.txt",), (evaluate("model=student"),)),
    "scores": Case(
        ("evaluation/scores.txt",), (("eval", "--scores", "evaluation/scores.txt", "out=new", "bootstrap=5"),)
    ),
    "enrolment map": Case(("map.txt",), (evaluate("model=student", "enrol.map=map.txt"),)),
    "calibration": Case(
        ("calibration.json", "student/calibration.json"),
        (
            ("eval", "--scores", "evaluation/scores.txt", "calibration=calibration.json", "out=new", "bootstrap=5"),
            ("export", "student", "to=pt2", "out=new.pt2"),
        ),
    ),
    "map": Case(
        ("map/*",),
        (
            evaluate("model=newer", "enrol.model=student", "enrol.map_by=map"),
            ("voices", "voices.json", "--map", "map", "--out", "new.json"),
            ("map", "cache", "newer-cache", "steps=2", "hidden=4"),
        ),
    ),
    "voices": Case(
        ("voices.json",),
        (
            ("voices", "voices.json"),
            ("identify", "audio/s0/0.wav", "model=student", "device=cpu"),
            ("voices", "voices.json", "--map", "map", "--out", "new.json"),
        ),
    ),
    "evaluation": Case(
        ("evaluation/*", "student/model.json"),
        (
            ("report", "evaluation", "again=evaluation", "--bootstrap", "5", "--out", "new"),
            ("cache", "catalogue", ".", "--out", "new.html"),
        ),
    ),
    "cohort": Case(
        ("others/*.json", "others/plan/*", "others/embedding/c/*/0", "others.csv"),
        (
            evaluate("model=student", "norm=as-norm", "cohort=others"),
            evaluate("model=student", "subtract_mean=true", "cohort=others.csv"),
        ),
    ),
    "cache": Case(EVERY, CACHE_COMMANDS),
    "cache resealed": Case(
        ("cache/*.json", "cache/commits/*.json", "cache/plan/*"), CACHE_COMMANDS, lambda root: reseal(root / "cache")
    ),
    "cache coded": Case(
        ("coded/codec.safetensors", "coded/*/c/*/0", "coded/card.json"),
        (("cache", "verify", "coded"), ("cache", "export", "coded", "new.h5"), train("cache=coded", "out=run2")),
    ),
    "claim": Case(
        ("part/claims/*", "part/commits/*", "part/card.json"),
        (extract("manifest=manifest.csv", "cache=part", "fbank=true", "storage.unit_views=4"),),
    ),
    "hdf5": Case(("cache.h5",), (("cache", "import", "cache.h5", "new"),)),
    "tars": Case(
        ("tars/*",),
        (("cache", "import", "tars", "new"), train("cache=tars", "out=run2"), ("cache", "push", "tars", "pushed")),
    ),
    "student": Case(
        ("student/*",), (evaluate("model=student"), train("cache=cache", "out=run2", "student.init=student"))
    ),
    "checkpoint": Case(
        ("weights.pt",), (train("cache=cache", "out=run2", "student=xvector", "student.init=weights.pt"),)
    ),
    "side files of models": Case(
        ("student/*", "wavlm/*", "wespeaker/*", "speechbrain/*", "model.onnx"), MODEL_COMMANDS, replaced=1.0
    ),
    "side files of caches": Case(
        ("cache/*", "cache/plan/*", "cache/commits/*", "cache/embedding/zarr.json", "pulled/*", "tars/*", "part/*/*"),
        (
            *CACHE_COMMANDS,
            ("cache", "pull", "cache", "pulled"),
            ("cache", "verify", "pulled"),
            ("cache", "import", "tars", "new"),
            ("cache", "catalogue", ".", "--out", "new.html"),
            extract("manifest=manifest.csv", "cache=part", "fbank=true", "storage.unit_views=4"),
        ),
        replaced=1.0,
    ),
    "side files of runs": Case(
        ("run/*", "finished/*", "evaluation/*", "calibration.json", "kaldi/*", "vectors.*", "spkd.yaml"),
        (
            *RUN_COMMANDS,
            extract("manifest=kaldi", "fbank=true"),
            ("report", "evaluation", "--bootstrap", "5", "--out", "new"),
            ("eval", "--scores", "evaluation/scores.txt", "calibration=calibration.json", "out=new", "bootstrap=5"),
            ("cache", "import", "vectors.scp", "new", "--manifest", "manifest.csv"),
            ("cache", "import", "vectors.npy", "new", "--manifest", "manifest.csv"),
        ),
        replaced=1.0,
    ),
    "records of a run": Case(("finished/run.json", "finished/run.yaml", "finished/log.jsonl"), RUN_COMMANDS),
    "record of a pull": Case(
        ("pulled/pulled.json", "pulled/*.json"),
        (
            ("cache", "pull", "cache", "pulled"),
            ("cache", "pull", "http://127.0.0.1:{port}/{place}/cache", "pulled", "--limit", "1"),
            ("cache", "verify", "pulled"),
            train("cache=pulled", "out=run2"),
        ),
    ),
    "spkd.yaml": Case(
        ("spkd.yaml",),
        (extract("manifest=manifest.csv", "cache=new2"), train("cache=cache", "out=run2"), evaluate("model=student")),
    ),
    "gzip": Case(
        ("*.gz",),
        (
            extract("manifest=manifest.csv.gz", "fbank=true"),
            extract("manifest=cuts.jsonl.gz", "fbank=true"),
            ("eval", "trials.txt.gz", *evaluate("model=student", "out=new")[2:]),
            ("eval", "--scores", "scores.txt.gz", "out=new", "bootstrap=5"),
        ),
    ),
    "transformers": Case(
        ("wavlm/*",),
        (
            extract("manifest=manifest.csv", "teacher=wavlm", "teacher.weights=wavlm"),
            TRAIN_SSL,
        ),
    ),
    "wespeaker": Case(
        ("wespeaker/*",),
        (
            extract("manifest=manifest.csv", "teacher=wespeaker", "teacher.weights=wespeaker"),
            evaluate("model=wespeaker", "model.weights=wespeaker"),
        ),
    ),
    "3d-speaker": Case(
        ("wespeaker/avg_model.pt",),
        (extract("manifest=manifest.csv", "teacher=3d-speaker", "teacher.weights=wespeaker/avg_model.pt"),),
    ),
    "speechbrain": Case(
        ("speechbrain/*",), (extract("manifest=manifest.csv", "teacher=speechbrain", "teacher.weights=speechbrain"),)
    ),
    "onnx": Case(
        ("model.onnx",),
        (
            extract("manifest=manifest.csv", "teacher=onnx", "teacher.weights=model.onnx", "teacher.onnx.input=kaldi"),
            (
                "embed",
                "manifest.csv",
                "model=onnx",
                "model.weights=model.onnx",
                "model.onnx.input=kaldi",
                "out=new.npy",
                "device=cpu",
            ),
        ),
    ),
    "vectors": Case(
        ("vectors.*",),
        (
            ("cache", "import", "vectors.ark", "new", "--manifest", "manifest.csv"),
            ("cache", "import", "vectors.scp", "new", "--manifest", "manifest.csv"),
            ("cache", "import", "vectors.npy", "new", "--manifest", "manifest.csv"),
        ),
    ),
    "training state": Case(("run/*",), (train("cache=cache", "out=run", "steps=4", "save_every=2"),)),
    "settings file": Case(
        ("settings.yaml",),
        (
            extract("--config", "settings.yaml", "manifest=manifest.csv"),
            train("--config", "settings.yaml", "cache=cache"),
        ),
    ),
    "settings": Case(
        (), (extract("manifest=manifest.csv"), train("cache=cache", "out=run2"), evaluate("model=student"))
    ),
}


# --- the valid inputs -------------------------------------------------------------------------------------------------


def make_cohort(root: Path) -> None:
    """others.csv and its cache: a cohort of ten speakers that no trial has."""
    rows = []
    for s in range(10):
        soundfile.write(root / "audio" / f"other{s}.wav", utterance(speaker(100 + s), 1000 + s, LENGTH), 16_000)
        rows.append(f"other{s},audio/other{s}.wav,other{s},{LENGTH}\n")
    (root / "others.csv").write_text("id,path,speaker,duration\n" + "".join(rows))
    run(root, extract("manifest=others.csv", "cache=others", *WITH_TEACHER))


def make_map(root: Path) -> None:
    """Another student, a map to it with its calibration, and a voice of the first student."""
    save_student(root / "newer", Checkpoint(build("xvector", channels=8, embedding=4).eval()))
    newer = ("teacher=checkpoint", "teacher.weights=newer", "teacher.targets=[embedding]")
    run(root, extract("manifest=manifest.csv", "cache=newer-cache", *newer))
    run(root, ("map", "cache", "newer-cache", "steps=2", "hidden=4"))
    both = ("model=newer", "enrol.model=student", "enrol.map_by=map", "device=cpu")
    run(root, ("calibrate", "trials.txt", "manifest=manifest.csv", *both, "force=true"))
    run(root, ("enrol", "ann", "audio/s0/0.wav", "model=student", "device=cpu"))


def make(root: Path) -> None:
    """Everything of which copies are changed; made by the commands themselves where one makes it."""
    root.mkdir(parents=True)
    rows = []
    for s in range(SPEAKERS):
        (root / "audio" / f"s{s}").mkdir(parents=True)
        for u in range(UTTERANCES):
            samples = utterance(speaker(s), 10 * s + u, LENGTH)
            suffix, subtype = [("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", "VORBIS"), ("wav", "FLOAT")][(s + u) % 4]
            path = root / "audio" / f"s{s}" / f"{u}.{suffix}"
            if (s, u) == (1, 1):
                path = path.with_suffix(".m4a")
                write_aac(path, samples)
                rows.append((f"s{s}/{u}", str(path.relative_to(root)), f"s{s}", LENGTH))
                continue
            soundfile.write(path, samples, [16_000, 8_000, 44_100][u], subtype=subtype)
            rows.append((f"s{s}/{u}", str(path.relative_to(root)), f"s{s}", soundfile.info(path).duration))
    texts = {
        "manifest.csv": "id,path,speaker,duration\n" + "".join(f"{i},{p},{s},{d}\n" for i, p, s, d in rows),
        "manifest.tsv": "id\tpath\tspeaker\tduration\n" + "".join(f"{i}\t{p}\t{s}\t{d}\n" for i, p, s, d in rows),
        "manifest.jsonl": "".join(
            json.dumps({"id": i, "audio_filepath": p, "duration": d, "speaker": s, "offset": 0}) + "\n"
            for i, p, s, d in rows
        ),
        "cuts.jsonl": "".join(json.dumps(cut(*row)) + "\n" for row in rows),
        "trials.txt": "".join(f"{int(a[2] == b[2])} {a[0]} {b[0]}\n" for a in rows for b in rows if a[0] < b[0]),
        "dev.txt": "".join(f"d{a} d{b} {0.1 * (a + b) % 1} {int(a == b)}\n" for a in range(5) for b in range(5)),
        "map.txt": "".join(f"{i} {j}\n" for i, _, s, _ in rows for j, _, other, _ in rows if s == other),
        "settings.yaml": "view: crops:2,0.4\nfbank: true\nsteps: 2\nloss: {names: [cosine]}\nout: run2\n",
        "spkd.yaml": "extract: {workers: 1}\ntrain: {optim: {lr: 0.01}}\neval: {bootstrap: 5}\n",
        "kaldi/wav.scp": "".join(f"{i} {p}\n" for i, p, _, _ in rows),
        "kaldi/utt2spk": "".join(f"{i} {s}\n" for i, _, s, _ in rows),
        "kaldi/segments": "".join(f"{i} {i} 0.1 0.7\n" for i, _, _, _ in rows),
    }
    (root / "kaldi").mkdir()
    for name, text in texts.items():
        (root / name).write_text(text)
    for name in ("manifest.csv", "cuts.jsonl", "trials.txt"):
        (root / f"{name}.gz").write_bytes(gzip.compress(texts[name].encode()))
    torch.manual_seed(0)
    network = build("xvector", channels=8, embedding=6).eval()
    save_student(root / "student", Checkpoint(network, torch.randn(SPEAKERS, 6), ["s0", "s1", "s2"], 30.0))
    torch.save(network.state_dict(), root / "weights.pt")
    tiny = transformers.WavLMConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    transformers.WavLMModel(tiny).save_pretrained(root / "wavlm")
    make_toolkits(root)
    run(root, extract("manifest=manifest.csv", "cache=cache", *WITH_TEACHER, "storage.codecs={frames: float16+zstd}"))
    for suffix in ("ark", "npy"):
        run(root, ("embed", "manifest.csv", "model=student", f"out=vectors.{suffix}", "device=cpu"))
    run(root, evaluate("model=student", "out=evaluation", "bootstrap=5"))
    make_cohort(root)
    run(root, ("calibrate", "trials.txt", "manifest=manifest.csv", "model=student", "force=true"))
    run(root, ("calibrate", "--scores", "dev.txt", "out=calibration.json", "force=true"))
    make_map(root)
    scp = root / "vectors.scp"
    scp.write_text(scp.read_text().replace(f"{root.resolve()}/", ""))
    for digests in root.glob("vectors.*.sha256"):  # which would refuse every change
        digests.unlink()
    run(
        root,
        extract(
            "manifest=manifest.csv", "cache=coded", *WITH_TEACHER, "storage.codecs={frames: int8+zstd, embedding: sq4}"
        ),
    )
    (root / "other.csv").write_text(texts["manifest.csv"].replace("\ns", "\nother-s"))
    run(root, extract("manifest=other.csv", "cache=other", *WITH_TEACHER, "storage.codecs={frames: float16+zstd}"))
    run(root, extract("manifest=manifest.csv", "cache=part", "fbank=true", "storage.unit_views=4"))
    (root / "part" / COMPLETE).unlink()
    (root / "part" / "commits" / "1.json").unlink()
    owner = {"host": "elsewhere", "pid": 1, "started": "1", "namespace": "n", "worker": "w"}
    (root / "part" / "claims").mkdir(exist_ok=True)
    (root / "part" / "claims" / "1").write_text(json.dumps(owner))
    os.utime(root / "part" / "claims" / "1", (0, 0))
    run(root, ("cache", "export", "cache", "cache.h5"))
    run(root, ("cache", "export", "cache", "tars"))
    run(root, ("cache", "pull", "cache", "pulled"))
    run(root, train("cache=cache", "out=finished", "steps=4", "save_every=2"))
    (root / "scores.txt.gz").write_bytes(gzip.compress((root / "evaluation" / "scores.txt").read_bytes()))
    (root / "wavlm" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    run(root, train("cache=cache", "out=run", "steps=4", "save_every=2"), stop_at="run/state.json")


def make_toolkits(root: Path) -> None:
    """Models of other toolkits, small, with random weights."""
    (root / "wespeaker").mkdir()
    (root / "speechbrain").mkdir()
    network = ResNet(18, 8, 12).eval()
    torch.save({f"module.{n}": v for n, v in network.state_dict().items()}, root / "wespeaker" / "avg_model.pt")
    (root / "wespeaker" / "config.yaml").write_text(
        "model: ResNet18\nmodel_args: {feat_dim: 80, embed_dim: 12, pooling_func: TSTP}\n"
        "dataset_args: {resample_rate: 16000, fbank_args: {num_mel_bins: 80, frame_length: 25, frame_shift: 10}}\n"
    )
    xvector = SpeechBrainXVector((8, 8, 8, 8, 12), 6, 24).state_dict()
    for pattern, replacement in (*SPEECHBRAIN_XVECTOR, (r"^project\.", "blocks.16.w.")):
        xvector = {re.sub(pattern, replacement, n): v for n, v in xvector.items()}
    torch.save(xvector, root / "speechbrain" / "embedding_model.ckpt")
    (root / "speechbrain" / "hyperparams.yaml").write_text(
        "sample_rate: 16000\nn_mels: 24\nx: !new:a.B\n  c: 1\n"
        "compute_features: !new:speechbrain.lobes.features.Fbank\n  n_mels: !ref <n_mels>\n"
        "mean_var_norm: !new:speechbrain.processing.features.InputNormalization\n"
        "  norm_type: sentence\n  std_norm: False\n"
        "embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector\n  in_channels: !ref <n_mels>\n"
    )
    torch.save({"weight": torch.randn(3, 6)}, root / "speechbrain" / "classifier.ckpt")
    (root / "speechbrain" / "label_encoder.txt").write_text("'a' => 0\n'b' => 1\n'c' => 2\n==========\n")

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.network(features)["embedding"]

    free = {"x": {0: "B", 1: "T"}, "emb": {0: "B"}}
    torch.onnx.export(
        Graph().eval().requires_grad_(False), (torch.randn(2, 60, 80),), str(root / "model.onnx"),
        input_names=["x"], output_names=["emb"], dynamic_axes=free, dynamo=False,
    )  # fmt: skip


def write_aac(path: Path, samples: np.ndarray) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        fifo = av.AudioFifo()
        fifo.write(frame)
        while (part := fifo.read(1024, partial=True)) is not None:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


def cut(name: str, path: str, who: str, seconds: float) -> dict[str, Any]:
    """A Lhotse cut."""
    rate = soundfile.info(HERE / path).samplerate if (HERE / path).is_file() else 16_000
    recording = {
        "id": name,
        "sources": [{"type": "file", "channels": [0], "source": path}],
        "sampling_rate": rate,
        "num_samples": round(seconds * rate),
        "duration": seconds,
    }
    supervision = {"id": name, "recording_id": name, "start": 0, "duration": seconds, "channel": 0, "speaker": who}
    head = {"id": name, "start": 0, "duration": seconds, "channel": 0, "type": "MonoCut"}
    return head | {"supervisions": [supervision], "recording": recording}


def run(root: Path, command: tuple[str, ...], stop_at: str | None = None) -> None:
    """Run a command that must succeed; or kill it once it has written a file."""
    process = start(root, command, root / "log.txt")
    while stop_at and not (root / stop_at).exists():
        time.sleep(0.002)
    if stop_at:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if status and not stop_at:
        raise SystemExit(f"spkd {' '.join(command)} failed: {(root / 'log.txt').read_text()}")
    (root / "log.txt").unlink()


# --- changes ----------------------------------------------------------------------------------------------------------


def change(path: Path, chance: Chance, replaced: float) -> str:
    """Change one file. Returns how."""
    kinds: list[Callable[[Path, Chance], None]] = [change_bytes, change_bytes, change_bytes]
    if path.suffix in (".json", ".jsonl") or path.parent.name == "claims":
        kinds = [change_tree, change_tree, change_tree, change_bytes, nest]
    elif path.suffix in (".csv", ".tsv", ".txt", ".yaml") or path.parent.name == "kaldi":
        kinds = [change_field, change_field, change_field, change_bytes]
    elif path.suffix in (".npz", ".npy"):
        kinds = [change_arrays, change_bytes, swell_arrays] if path.suffix == ".npz" else [change_bytes, swell_arrays]
    elif path.suffix in (".pt", ".ckpt"):
        kinds = [change_bytes, change_torch, change_torch]
    elif path.suffix == ".gz":
        kinds = [change_bytes, change_gzip, change_gzip]
    elif path.suffix == ".ark":
        kinds = [change_bytes, change_ark]
    elif path.suffix == ".h5":
        kinds = [change_bytes, change_bytes, change_hdf5]
    elif path.suffix == ".wav":
        kinds = [change_bytes, change_samples]
    if path.suffix == ".yaml":
        kinds.append(swell_yaml)
    chosen = replace if chance.random() < replaced else chance.choice(kinds)
    chosen(path, chance)
    return chosen.__name__


def change_bytes(path: Path, chance: Chance) -> None:
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data)) if data else 0
    if chance.random() < 0.5:  # headers matter as much as the rest
        at = min(at, chance.randrange(256))
    size = chance.choice([1, 2, 4, 8, 64, 1000])
    match chance.randrange(7):
        case 0 | 1:
            for _ in range(chance.choice([1, 1, 4, 20])):
                if data:
                    data[(at + chance.randrange(size)) % len(data)] ^= 1 << chance.randrange(8)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + size]
        case 4:
            data[at : at + size] = bytes(chance.choice([0, 255]) for _ in range(1)) * min(size, len(data) - at)
        case 5:
            data[at:at] = chance.randbytes(size)
        case 6:
            data[at:at] = data[at : at + size] * chance.choice([1, 50])
    path.write_bytes(data)


def change_tree(path: Path, chance: Chance) -> None:
    """An odd value, or none, in a random place of a JSON document or of one of its lines."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    which = chance.randrange(len(lines))
    tree = {"": json.loads(lines[which])}
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = chance.choice(places)
    if isinstance(node, dict) and chance.random() < 0.15 and key:
        del node[key]
    else:
        node[key] = chance.choice(ODD)
    lines[which] = json.dumps(tree[""], ensure_ascii=chance.random() < 0.5)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")


def nest(path: Path, chance: Chance) -> None:
    """Nested deep, or a number of many digits."""
    path.write_text("[" * 200_000 if chance.random() < 0.5 else '{"format": ' + "9" * 10_000 + "}")


def change_field(path: Path, chance: Chance) -> None:
    """An odd value in the place of a field; or another encoding, line end or separator."""
    data = path.read_bytes()
    match chance.randrange(8):
        case 0:
            data = data.replace(b"\n", chance.choice([b"\r", b"\r\n", b"\n\n", b"\x00\n", "\u2028".encode()]))
        case 1:
            data = chance.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"# note\n", b"\n"]) + data
        case 2:
            data = data.replace(b",", chance.choice([b";", b"\t", b", ", b" ", b'"', b",,"]))
        case _:
            lines = data.split(b"\n")
            which = chance.randrange(len(lines))
            comma = next((c for c in (b",", b"\t", b" ", b":") if c in lines[which]), b",")
            fields = lines[which].split(comma)
            odd = str(chance.choice(ODD)).encode("utf-8", "surrogatepass")
            fields[chance.randrange(len(fields))] = chance.choice([odd, odd, odd, b"\xe9\xff", b"a" * 200_000, b'"'])
            lines[which] = comma.join(fields)
            data = b"\n".join(lines)
    path.write_bytes(data)


def change_arrays(path: Path, chance: Chance) -> None:
    """An odd number in an array of the plan; or an array of another length, type or shape, or none."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = chance.choice(sorted(arrays))
    values = arrays[name]
    odd = chance.choice([-1, 0, 10**6, 2**31 - 1, -(2**31)])
    match chance.randrange(6):
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = values[: len(values) // 2] if values.ndim else np.zeros((0,))
        case 2:
            arrays[name] = (
                values.astype(chance.choice(["f8", "i1", "S3", "c8"]), casting="unsafe")
                if values.dtype.kind != "U"
                else values[None]
            )
        case _:
            changed = values.copy().reshape(-1)
            if len(changed):
                with np.errstate(all="ignore"):
                    changed[chance.randrange(len(changed))] = np.array(odd).astype(values.dtype)
            arrays[name] = changed.reshape(values.shape)
    np.savez(path, **arrays)


def change_hdf5(path: Path, chance: Chance) -> None:
    with h5py.File(path, "r+") as file:
        names = sorted(file.keys())
        match chance.randrange(3):
            case 0:
                del file[chance.choice(names)]
            case 1:
                name = chance.choice(names)
                del file[name]
                file.create_dataset(name, (10**12,), chunks=(1 << 16,), dtype="f2")
            case 2:
                key = chance.choice(sorted(file.attrs))
                file.attrs[key] = chance.choice([-1, "x", "{}", "[" * 10_000, np.nan])


def change_samples(path: Path, chance: Chance) -> None:
    """Speech that is none: silence, NaN, a constant, integer scale, very loud; or another rate, or no samples."""
    n = chance.choice([0, 1, 10, 16_000])
    match chance.randrange(5):
        case 0:
            soundfile.write(
                path, np.full(n, chance.choice([0.0, 1.0, np.nan, 3e4, 1e38, np.inf])), 16_000, subtype="FLOAT"
            )
        case 1:
            soundfile.write(
                path,
                0.1 * np.random.RandomState(0).randn(16_000),
                chance.choice([1, 11, 22_255, 192_000, 655_350]),
                subtype="FLOAT",
            )
        case 2:
            soundfile.write(path, 0.1 * np.random.RandomState(0).randn(16_000, chance.choice([2, 8, 60])), 16_000)
        case _:
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(chance.choice([1, 2, 3, 4]))
                file.setframerate(16_000)
                file.writeframes(chance.randbytes(9600))


def replace(path: Path, chance: Chance) -> None:
    """Something else in the place of a file."""
    path.unlink()
    match chance.randrange(8):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.write_bytes(b"")
        case 5:
            with open(path, "wb") as file:
                file.truncate(1 << chance.choice([33, 42]))
        case 6:
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)  # shorter than the path, for which a socket has little room


def swell_arrays(path: Path, chance: Chance) -> None:
    """Arrays of objects, arrays that claim gigabytes, or compressed members."""
    out = io.BytesIO()
    shape = chance.choice([(1 << 34, 4), (1 << 40,), (-1, 4), (10**30,)])
    match chance.randrange(3):
        case 0:
            np.save(out, np.array([Marked()] * 9, object), allow_pickle=True)
        case 1:
            header = f"{{'descr': '<f4', 'fortran_order': {chance.random() < 0.5}, 'shape': {shape}, }}\n".encode()
            out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
        case 2:
            np.save(out, np.zeros(1 << 24))
    if path.suffix == ".npy":
        path.write_bytes(out.getvalue())
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[chance.choice(sorted(members))] = out.getvalue()
    with zipfile.ZipFile(path, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


class Marked:
    """An object whose unpickling makes a folder, which `judge` looks for."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (MARK,)


def change_torch(path: Path, chance: Chance) -> None:
    """A tensor that none can be, objects, another layout of the file, changed pickles, or compressed parts."""
    state = torch.load(path, weights_only=True)
    name = chance.choice(sorted(state))
    odd = [
        *(torch.ones(1).expand(1 << 20, 1 << 20), torch.eye(3).to_sparse(), torch.ones(3, device="meta")),
        *(
            torch.ones(0),
            torch.ones(3, dtype=torch.complex64),
            torch.full(state[name].shape, math.nan),
            Marked(),
            {},
            [],
        ),
        *(torch.nn.Parameter(torch.ones(2)), torch.ones(2).to(torch.float8_e4m3fn), "x", 10**30, [[[]]] * 100_000),
    ]
    match chance.randrange(5):
        case 0 | 1:
            state[name] = chance.choice(odd)
            torch.save(state, path, _use_new_zipfile_serialization=chance.random() < 0.7)
        case 2:
            state = chance.choice(
                [{name: state}, {0: state[name]}, [state], {("a",): 1}, {name.upper(): state[name]}, odd]
            )
            torch.save(state, path)
        case 3:
            torch.save(state, path, _use_new_zipfile_serialization=False)
            change_bytes(path, chance)
        case 4:
            with zipfile.ZipFile(path) as archive:
                members = {info.filename: archive.read(info) for info in archive.infolist()}
            pickled = next(n for n in members if n.endswith("data.pkl"))
            data = bytearray(members[pickled])
            for _ in range(chance.choice([1, 3, 10])):
                data[chance.randrange(len(data))] = chance.randrange(256)
            members[pickled] = bytes(data)
            with zipfile.ZipFile(path, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
                for member, content in members.items():
                    archive.writestr(member, content)


def change_gzip(path: Path, chance: Chance) -> None:
    """A list changed before it is compressed; or one that stands for gigabytes, several members, one within another."""
    text = gzip.decompress(path.read_bytes())
    match chance.randrange(5):
        case 0 | 1:
            plain = path.with_name(f"changed.{path.stem}")
            plain.write_bytes(text)
            change_field(plain, chance)
            path.write_bytes(gzip.compress(plain.read_bytes()))
        case 2:
            lines = text.splitlines(keepends=True)
            unit = chance.choice([lines[-1], b"x", b"\n", b" "])
            path.write_bytes(gzip.compress(text) + gzip.compress(unit * ((1 << 22) // len(unit))) * 400)
        case 3:
            path.write_bytes(gzip.compress(gzip.compress(text)))
        case 4:
            path.write_bytes(gzip.compress(text) + chance.choice([b"\0" * 100, b"x", gzip.compress(text)]))


def change_ark(path: Path, chance: Chance) -> None:
    """Another kind or size in the header of an entry; or an entry that is something else."""
    data = path.read_bytes()
    at = data.find(b"\0BFV ")
    odd = [b"\0BCM2 ", b"\0BFM ", b"\0BDV ", b"\0BXX ", b"PKL" + pickle.dumps(Marked()), b"AUDIO", b" [ 1 2", b" [ 1 ]"]
    sizes = [-1, 0, 1, 2**31 - 1, -(2**31)]
    if chance.random() < 0.5:
        path.write_bytes(data[:at] + chance.choice(odd) + data[at + 5 :])
    else:
        path.write_bytes(data[: at + 6] + struct.pack("<i", chance.choice(sizes)) + data[at + 10 :])


def swell_yaml(path: Path, chance: Chance) -> None:
    """Aliases and merges that stand for gigabytes, deep nesting, code, and names that are no text, as a value."""
    levels = [f"&a0 {chance.choice(['[x]', '{x: y}'])}"]
    merge = chance.random() < 0.5
    for i in range(1, 10):
        inner = ", ".join([f"*a{i - 1}"] * 9)
        levels.append(f"&a{i} " + (f"{{<<: [{inner}]}}" if merge else f"[{inner}]"))
    aliases = "".join(f"b{i}: {level}\n" for i, level in enumerate(levels))
    deep = "[" * 50_000
    code = f"!!python/object/apply:os.mkdir [{MARK}]"
    key, _, _ = path.read_text().partition(":")
    odd = [f"{aliases}{key}: *a9\n", f"{key}: {deep}\n", f"{key}: {code}\n", f"? {code}\n: x\n", f"{key}: &a [*a]\n"]
    odd += [
        f"{key}: !new:os.mkdir [{MARK}]\n",
        "1: 2\n",
        f"{key}: !!binary x\n",
        f"{key}: !!set {{x}}\n",
        "- x\n",
        "---\n---\n",
    ]
    path.write_text(chance.choice([path.read_text(), ""]) + chance.choice(odd))


def odd_setting(command: tuple[str, ...], chance: Chance) -> tuple[str, ...]:
    schema = {"extract": ExtractConfig, "train": TrainConfig, "eval": EvalConfig}[command[0]]
    key = chance.choice(sorted(key.name for key in config.keys(schema)))
    value = chance.choice(
        [*ODD, "1e400", "[", "{", "${x}", "${oc.env:HOME}", "???", "2024-13-45", "1_000", "!!python/x", "a: b"]
    )
    if key in ("device", "steps", "save_every", "batch_size") and value in (2**31, 2**63, 10**18, 1e308):
        value = -1  # a long run is what was asked for
    return once(*command, f"{key}={value}".replace("\x00", "\\0"))


# --- running ----------------------------------------------------------------------------------------------------------


def start(folder: Path, command: tuple[str, ...], log: Path) -> int:
    """Fork a process that runs spkd as its command line would."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        sys.argv = ["spkd", *command]
        try:
            spkd_main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def check_valid(work: Path, port: int, kinds: list[str]) -> None:
    """Every command must accept the unchanged input: else nothing is tried behind its first refusal."""
    for kind in kinds:
        for command in CASES[kind].commands:
            shutil.copytree(work / "valid", work / "0")
            run(work / "0", placed(command, port, 0))
            shutil.rmtree(work / "0")


def placed(command: tuple[str, ...], port: int, number: int) -> tuple[str, ...]:
    return tuple(part.format(port=port, place=number) if part.startswith("http:") else part for part in command)


def judge(status: int, text: str, hung: bool, folder: Path) -> str:
    if hung:
        return "hangs"
    if any(folder.rglob(MARK)):
        return "ran"
    if os.WIFSIGNALED(status) or "not enough memory" in text:
        return "crashes"
    if "Traceback" in text or "unexpected failure" in text or os.WEXITSTATUS(status) not in (0, 1, 2):
        return "tracebacks"
    return "clean" if os.WEXITSTATUS(status) else "accepted"


@dataclass
class Running:
    number: int
    case: str
    how: str
    command: tuple[str, ...]
    folder: Path
    deadline: float


def begin(number: int, seed: int, kinds: list[str], work: Path, port: int) -> tuple[int, Running]:
    """Make one input and start its command."""
    chance = random.Random(f"{seed}-{number}")
    name = chance.choice(kinds)
    case = CASES[name]
    folder = work / f"{number}"
    shutil.copytree(work / "valid", folder)
    if case.files:
        found = sorted(path for pattern in case.files for path in folder.glob(pattern) if path.is_file())
        path = chance.choice(found)
        how = f"{change(path, chance, case.replaced)} {path.relative_to(folder)}"
        # A command that names the file or its folder, where there is one.
        named = path.relative_to(folder).parts[0]
        command = chance.choice([c for c in case.commands if named in " ".join(c)] or case.commands)
    else:
        how, command = "setting", odd_setting(chance.choice(case.commands), chance)
    if case.reseal and (folder / "cache" / CARD).is_file():
        try:
            case.reseal(folder)
        except (OSError, ValueError, RecursionError, TypeError):
            how += " (not resealed)"
    command = placed(command, port, number)
    process = start(folder, command, work / f"{number}.log")
    return process, Running(number, name, how, command, folder, time.monotonic() + SECONDS)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> tuple[int, int]:
    """A web server of a folder in a process of its own: its number and port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    process = os.fork()
    if not process:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        threading.Thread(target=server.serve_forever).start()
        signal.pause()
    server.server_close()
    return process, server.server_port


def main() -> None:
    options = record.options(__doc__, "fuzz")
    options.add_argument("--inputs", type=int, default=3000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    options.add_argument("--kinds", nargs="+", default=list(CASES), choices=list(CASES), help="of input")
    options.add_argument("--processes", type=int, default=os.cpu_count())
    given = record.parse(options, inputs=12, kinds=["manifest csv", "onnx", "settings"])
    work = given.work
    shutil.rmtree(work, ignore_errors=True)
    make(work / "valid")
    server, port = serve(work)
    count: Counter[str] = Counter()
    by_case: Counter[tuple[str, str]] = Counter()
    running: dict[int, Running] = {}
    todo = iter(range(given.first, given.first + given.inputs))
    began = time.monotonic()
    try:
        check_valid(work, port, given.kinds)
        while True:
            while len(running) < given.processes and (number := next(todo, None)) is not None:
                process, one = begin(number, given.seed, given.kinds, work, port)
                running[process] = one
            if not running:
                break
            for process, one in list(running.items()):
                done, status = os.waitpid(process, os.WNOHANG)
                hung = not done and time.monotonic() > one.deadline
                if hung:
                    os.killpg(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                if not done and not hung:
                    continue
                del running[process]
                log = work / f"{one.number}.log"
                text = log.read_text(errors="replace")
                verdict = judge(status, text, hung, one.folder)
                count[verdict] += 1
                by_case[one.case, verdict] += 1
                if verdict in ("clean", "accepted"):
                    shutil.rmtree(one.folder)
                    log.unlink()
                else:
                    print(
                        f"{verdict} {one.number}: {one.case}, {one.how}: "
                        f"spkd {' '.join(one.command)[:300]}\n  {text[-300:]}",
                        flush=True,
                    )
            time.sleep(0.002)
    finally:
        os.kill(server, signal.SIGKILL)
    verdicts = ("clean", "accepted", "tracebacks", "hangs", "crashes", "ran")
    print(f"{'input':16} " + " ".join(f"{verdict:>10}" for verdict in verdicts))
    for name in given.kinds:
        print(f"{name:16} " + " ".join(f"{by_case[name, verdict]:10}" for verdict in verdicts))
    result = {"tried": sum(count.values())} | {verdict: count[verdict] for verdict in verdicts}
    result |= {"seed": given.seed, "seconds": round(time.monotonic() - began)}
    record.keep("fuzz", result, given.tiny or bool(given.first) or given.kinds != list(CASES))


if __name__ == "__main__":
    main()
