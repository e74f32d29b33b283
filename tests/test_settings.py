"""Every key of every command: it changes what a user can see, or it is refused. `python -m tests.test_settings` lists
them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from spkd import cli
from spkd.config import Key, component_keys, keys
from spkd.corpus.manifest import Manifest
from spkd.corpus.manifest import build as build_manifest
from spkd.demo.synthesis import speaker, utterance
from spkd.eval.settings import CalibrateConfig, EmbedConfig, EvalConfig
from spkd.export.settings import ExportConfig
from spkd.extract.settings import CacheExportConfig, ExtractConfig, VerifyConfig
from spkd.mapping.settings import MapConfig
from spkd.networks.network import Network
from spkd.students import Checkpoint, build, save_student
from spkd.teachers.base import EmbeddingModel
from spkd.train import resume
from spkd.train.settings import ClusterConfig, TrainConfig
from spkd.voices.settings import EnrolVoiceConfig, IdentifyVoiceConfig, VerifyVoiceConfig
from tests.conftest import TINY_SSL, served
from tests.corpus.test_remote import Ranges
from tests.export.npm import write_package
from tests.teachers.test_wespeaker import save_wespeaker, weights_of

onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("faiss")


@dataclass(frozen=True)
class Context:
    """Arguments that put keys in use, or that leave them without use.

    Attributes:
        arguments: of the command. M stands for the folder of materials.
        acts: key -> value that changes what is seen; further arguments may follow.
        watched: key of speed alone -> value, and what is observed instead of results; see `Watch`.
        inert: key -> value, of keys that have no effect here.
        file: content of spkd.yaml.
        constants: places of the code that are made smaller: module.name -> value.
    """

    arguments: str
    acts: dict[str, str] = field(default_factory=dict)
    watched: dict[str, tuple[str, str]] = field(default_factory=dict)
    inert: dict[str, str] = field(default_factory=dict)
    file: str = ""
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A command with its contexts; in the first one, no component but the defaults is in use."""

    name: str
    schema: type
    contexts: dict[str, Context]

    def keys(self) -> dict[str, Key]:
        return {k.name: k for k in (*keys(self.schema), *component_keys(self.schema))}


# Modules of converters, which are not run here.
CONVERTERS = (
    *("executorch", "executorch.backends", "executorch.backends.xnnpack", "executorch.backends.xnnpack.partition"),
    *("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch.exir", "coremltools"),
)

# Families of foreign models, with the setting of each that changes what it gives.
FAMILIES = {
    **{name: {"layer": "1"} for name in ("wavlm", "hubert", "wav2vec2", "data2vec", "w2v_bert")},
    **{name: {"input": "sherpa"} for name in ("wespeaker", "3d_speaker")},
    "onnx": {"input": "3d-speaker", "outputs.embedding": "other"},
}


def family_contexts(arguments: str, section: str, only: str = "") -> dict[str, Context]:
    """A context for each family of models with settings of its own.

    Args:
        arguments: of the command.
        section: of the model's keys: teacher, model or enrol.model.
        only: the only family.
    """
    found = {}
    for name in [only] if only else FAMILIES:
        own = FAMILIES[name]
        chosen = (
            f"{arguments} {section}={name.replace('_', '-')} {section}.weights=M/{name}{'.onnx' * (name == 'onnx')}"
        )
        acts = {f"{section}.{name}.{key}": value for key, value in own.items()}
        of_torch = {f"{section}.precision": "bf16", f"{section}.compile": "true"} if name == "onnx" else {}
        found[f"{section}={name}"] = Context(chosen, acts, inert=of_torch)
    return found


def model_contexts(arguments: str) -> dict[str, Context]:
    """Contexts of the keys of a model that is scored."""
    own = Context(
        f"{arguments} model=checkpoint model.weights=M/teacher",
        {"model.weights": "M/second", "model.precision": "bf16", "model.dimension": "3", "device": "cuda:15"},
        {"model.compile": ("true", "compiled"), "batch_size": ("1", "batches"), "workers": ("1", "threads")},
    )
    return {"model": own, **family_contexts(arguments, "model")}


def enrolment_contexts(arguments: str, more: str) -> dict[str, Context]:
    """Contexts of the keys of the enrolment side's model; the test side has another of the same space."""
    own = Context(
        f"{arguments} {more} model=M/teacher enrol.model=checkpoint enrol.model.weights=M/second",
        {"enrol.model.weights": "M/teacher", "enrol.model.precision": "bf16", "enrol.model.dimension": "3"},
        {"enrol.model.compile": ("true", "compiled")},
    )
    found = {"enrol.model": own}
    for name, context in family_contexts(arguments, "model").items():
        ((of_family, enrolment),) = family_contexts(context.arguments, "enrol.model", name.partition("=")[2]).items()
        found[of_family] = replace(enrolment, arguments=f"{enrolment.arguments} {more}")
    return found


def fetch_context(arguments: str) -> dict[str, Context]:
    """A context of the keys of copies of what is elsewhere, which are among the files that a command leaves."""
    acts = {"fetch.cache": "elsewhere", "fetch.limit": "0.000001"}
    return {"fetch": Context(f"{arguments} manifest=M/elsewhere.csv fetch.cache=copies", acts)}


TEACHER = "teacher=checkpoint teacher.weights=M/teacher"
EXTRACT = f"{TEACHER} manifest=M/manifest.csv"
AUGMENTED = {
    "noise": ("synthetic", {"noise_prob": "1", "snr": "[-20,-10]"}),
    "rir": ("M/rir", {"rir_prob": "1"}),
    "coders": ("[g711]", {"coder_prob": "1"}),
}


def augmentation_contexts(arguments: str, section: str) -> dict[str, Context]:
    return {
        f"{section}.{name}": Context(
            f"{arguments} {section}.{name}={value}", {f"{section}.{key}": other for key, other in more.items()}
        )
        for name, (value, more) in AUGMENTED.items()
    }


EXTRACTION = Command(
    "extract",
    ExtractConfig,
    {
        "base": Context(
            EXTRACT,
            {
                "manifest": "M/others.csv",
                "cache": "elsewhere",
                "teacher.weights": "M/second",
                "teacher.precision": "bf16",
                "teacher.dimension": "3",
                "teacher.targets": "[embedding,frames]",
                "view.plan": "crops:2,0.3",
                "view.speeds": "[0.9]",
                "view.formants": "[1.1]",
                "view.noise": "synthetic",
                "view.rir": "M/rir view.rir_prob=1",
                "view.coders": "[g711]",
                "view.vad": "M/segments",
                "fbank": "true",
                "wave": "true",
                "storage.codec": "float32",
                "storage.codecs.embedding": "float32",
                "storage.unit_views": "2",
                "storage.unit_seconds": "1",
                "min_seconds": "0.55",
                "device": "cuda:15",
                "engine": "ray",
            },
            {
                "teacher.compile": ("true", "compiled"),
                "batch_size": ("1", "batches"),
                "workers": ("3", "threads"),
            },
            {
                "view.noise_prob": "0.1",
                "view.snr": "[0,1]",
                "view.rir_prob": "0.1",
                "view.coder_prob": "0.1",
                "view.seed": "1",
                "features": "sherpa",
                "processes": "3",
                "fetch.limit": "3",
            },
            constants={"sys.modules.ray": None},
        ),
        **fetch_context(TEACHER),
        "no teacher": Context("manifest=M/manifest.csv", {"teacher.name": "none"}),
        "teacher=none": Context(
            "teacher=none manifest=M/manifest.csv",
            {"features": "sherpa"},
            inert={
                "teacher.weights": "M/teacher",
                "teacher.precision": "bf16",
                "teacher.compile": "true",
                "teacher.dimension": "3",
                "teacher.targets": "[frames]",
            },
        ),
        "crops": Context(f"{EXTRACT} view=crops:2,0.3", {"view.seed": "1"}),
        "job array": Context(f"{EXTRACT} --slurm-script", {"processes": "3"}),
        **augmentation_contexts(EXTRACT, "view"),
        **family_contexts("manifest=M/manifest.csv", "teacher"),
    },
)

VERIFICATION = Command(
    "cache verify",
    VerifyConfig,
    {
        "base": Context(
            f"M/full --live 2 {EXTRACT}",
            {
                "manifest": "M/others.csv",
                "teacher.name": "none",
                "teacher.weights": "M/second",
                "teacher.precision": "bf16",
                "teacher.dimension": "3",
                "device": "cuda:15",
            },
            {"teacher.compile": ("true", "compiled")},
            {"view.noise": "M/noise", "view.rir": "M/rir"},
        ),
        "noise": Context(f"M/augmented --live 2 {EXTRACT} view.rir=M/rir", {"view.noise": "M/noise"}),
        "rir": Context(f"M/augmented --live 2 {EXTRACT} view.noise=M/noise", {"view.rir": "M/rir"}),
        **fetch_context(f"M/full --live 2 {EXTRACT}"),
        **{
            name: Context(
                f"M/of_{name.removeprefix('teacher=')} --live 2 {context.arguments}", context.acts, inert=context.inert
            )
            for name, context in family_contexts("manifest=M/manifest.csv", "teacher").items()
        },
    },
)

CACHE_EXPORT = Command(
    "cache export",
    CacheExportConfig,
    {
        "base": Context(
            "M/full tars --audio manifest=M/manifest.csv",
            {"manifest": "M/others.csv"},
            inert={"view.noise": "M/noise", "view.rir": "M/rir"},
        ),
        **fetch_context("M/full tars --audio"),
        "noise": Context("M/augmented tars --audio manifest=M/manifest.csv view.rir=M/rir", {"view.noise": "M/noise"}),
        "rir": Context("M/augmented tars --audio manifest=M/manifest.csv view.noise=M/noise", {"view.rir": "M/rir"}),
    },
)

TRAIN = (
    "batch_size=4 steps=2 crop=0.4 optim=sgd optim.lr=0.1 optim.warmup=0 student=tiny student.channels=4 "
    "student.embedding=6 loggers=[]"
)
LABELS = {"margin": "0.5", "margin_warmup": "[0,1]", "scale": "10"}
TEACHER_LOGITS = {
    **LABELS,
    "temperature": "2",
    "kd_warmup": "1",
    "teacher_margin": "0.5",
    "logits": "prototypes",
}
MEMO = (
    "loss=memo loss.memo.partner=tiny loss.memo.partner_channels=4 loss.memo.prototypes=16 loss.memo.hidden=8 "
    "loss.memo.bottleneck=4 loss.memo.locals=1 loss.memo.local_crop=0.3 steps=3"
)
NO_EMBEDDINGS_MINED = {
    "mining.neighbours": "8",
    "mining.embeddings": "student",
    "mining.refresh": "7",
    "mining.nprobe": "8",
    "mining.floor": "0.5",
}


def of_loss(name: str, values: dict[str, str]) -> dict[str, str]:
    return {f"loss.{name}.{key}": value for key, value in values.items()}


TRAINING = Command(
    "train",
    TrainConfig,
    {
        "base": Context(
            f"{TRAIN} cache=M/full loss=contrastive loss.contrastive.ceiling=2",
            {
                "cache": "M/second_cache",
                "class_means": "true",
                "out": "elsewhere",
                "student.name": "xvector",
                "student.channels": "6",
                "student.embedding": "4",
                "student.nested": "[3,6]",
                "student.init": "M/teacher",
                "loss.names": "[cosine]",
                "loss.contrastive.temperature": "0.5",
                "loss.contrastive.ceiling": "-1",
                "mining.negatives": "2",
                "optim.name": "adamw",
                "optim.lr": "0.01",
                "optim.final_lr": "0.01",
                "optim.schedule": "constant",
                "optim.swa_fraction": "0.9",
                "optim.weight_decay": "0.5",
                "optim.warmup": "5",
                "optim.clip": "0.001",
                "optim.sgd.nesterov": "false",
                "mask.frames": "0",
                "mask.bands": "0",
                "crop": "0.3",
                "batch_size": "3",
                "steps": "3",
                "accumulate": "2",
                "large_margin.steps": "1",
                "valid.trials": "M/others.txt valid.manifest=M/others.csv",
                "sampler.name": "lengths",
                "precision": "bf16",
                "loggers": "[tensorboard]",
                "seed": "1",
                "device": "cuda:15",
            },
            {
                "compile": ("true", "compiled"),
                "channels_last": ("true", "memory formats"),
                "save_every": ("1", "saved"),
            },
            {
                "teachers": "average",
                "finetune_cache": "[M/again]",
                "manifest": "M/manifest.csv",
                "noise": "M/noise",
                "rir": "M/rir",
                "workers": "1",
                "large_margin.margin": "0.1",
                "large_margin.crop": "0.5",
                "large_margin.lr": "0.1",
                "large_margin.final_lr": "0.1",
                "valid.manifest": "M/others.csv",
                "valid.vad": "energy",
                "valid.every": "3",
                "valid.patience": "3",
                "augment.noise_prob": "0.1",
                "augment.snr": "[0,1]",
                "augment.rir_prob": "0.1",
                "augment.coder_prob": "0.1",
                "loss.weights.cosine": "0.5",
                "student.nested_crops": "[0.3,0.4]",
                **NO_EMBEDDINGS_MINED,
            },
        ),
        "nested": Context(
            f"{TRAIN} cache=M/full loss=cosine student.nested=[3,6] steps=4", {"student.nested_crops": "[0.2,0.4]"}
        ),
        "epochs": Context(
            "cache=M/full loss=contrastive",
            {"epochs": "3"},
            file="train:\n  " + TRAIN.replace("=", ": ").replace(" ", "\n  ").replace(":\n  ", ": "),
        ),
        "two losses": Context(
            f"{TRAIN} cache=M/full loss=[contrastive,cosine] loss.contrastive.ceiling=0.9",
            {"loss.weights.cosine": "0.5", "loss.final_weights.cosine": "0.5"},
            inert={"labels": "M/labels.csv"},
        ),
        "two teachers": Context(f"{TRAIN} cache=[M/full,M/second_cache] loss=cosine", {"teachers": "average"}),
        "no schedule, no clipping": Context(
            f"{TRAIN} cache=M/full loss=cosine optim.schedule=constant optim.clip=0",
            inert={"optim.final_lr": "0.01", "optim.clip_by": "tensor"},
        ),
        "clipping": Context(f"{TRAIN} cache=M/full loss=cosine optim.clip=0.01", {"optim.clip_by": "tensor"}),
        "no features": Context(
            f"{TRAIN} cache=M/bare loss=cosine",
            {"manifest": "M/manifest.csv"},
        ),
        "audio": Context(
            f"{TRAIN} cache=M/bare loss=cosine manifest=M/manifest.csv workers=0",
            {
                "student.features": "sherpa",
                "augment.noise": "synthetic augment.noise_prob=1",
                "augment.rir": "M/rir augment.rir_prob=1",
                "augment.coders": "[g711] augment.coder_prob=1",
                "augment.speeds": "[1.2]",
            },
            {"workers": ("1", "loaders")},
            {"noise": "M/noise", "rir": "M/rir", "fetch.cache": "copies", "fetch.limit": "3"},
        ),
        **fetch_context(f"{TRAIN} cache=M/bare loss=cosine workers=0"),
        **augmentation_contexts(f"{TRAIN} cache=M/bare loss=cosine manifest=M/manifest.csv workers=0", "augment"),
        "noise": Context(
            f"{TRAIN} cache=M/augmented loss=cosine manifest=M/manifest.csv workers=0 rir=M/rir", {"noise": "M/noise"}
        ),
        "rir": Context(
            f"{TRAIN} cache=M/augmented loss=cosine manifest=M/manifest.csv workers=0 noise=M/noise", {"rir": "M/rir"}
        ),
        "mining": Context(
            f"{TRAIN} cache=M/full loss=contrastive loss.contrastive.ceiling=2 mining.negatives=1 steps=5 ",
            {"mining.neighbours": "1", "mining.embeddings": "student mining.refresh=1"},
            inert={"mining.floor": "0.5", "mining.refresh": "7", "mining.nprobe": "8"},
        ),
        "mining by the student": Context(
            f"{TRAIN} cache=M/full loss=contrastive loss.contrastive.ceiling=2 mining.negatives=1 steps=5 "
            "mining.embeddings=student",
            {"mining.refresh": "1"},
        ),
        "mining in lists": Context(
            f"{TRAIN} cache=M/full loss=contrastive loss.contrastive.ceiling=2 mining.negatives=1 mining.neighbours=1 "
            "mining.nprobe=4",
            watched={"mining.nprobe": ("1", "lists")},
            constants={"spkd.train.mining.EXACT": 0},
        ),
        "further crops": Context(f"{TRAIN} cache=M/full loss=ntxent", {"mining.positives": "2"}),
        "positives": Context(
            f"{TRAIN} cache=M/full loss=ntxent mining.positives=2 mining.floor=-1",
            {"mining.floor": "1", "loss.ntxent.temperature": "0.5"},
            inert={"mining.neighbours": "8", "mining.refresh": "7"},
        ),
        "large margin": Context(
            f"{TRAIN} cache=M/full loss=aam large_margin.steps=2 large_margin.crop=0.4",
            {
                "large_margin.crop": "0.3",
                "large_margin.margin": "0.1",
                "large_margin.lr": "0.5",
                "large_margin.final_lr": "0.5",
            },
        ),
        "validation": Context(
            f"{TRAIN} cache=M/full loss=cosine optim.lr=1e-9 optim.final_lr=1e-9 steps=4 valid.trials=M/others.txt "
            "valid.manifest=M/others.csv valid.every=1",
            {
                "valid.manifest": "M/manifest.csv",
                "valid.vad": "M/segments",
                "valid.every": "2",
                "valid.patience": "1",
            },
        ),
        "sampler=speakers": Context(
            f"{TRAIN} cache=M/full loss=cosine sampler=speakers", {"sampler.speakers.views": "1"}
        ),
        "sampler=shares": Context(
            f"{TRAIN} cache=[M/full,M/others_cache] loss=cosine sampler=shares sampler.shares.shares=[0.5,0.5]",
            {"sampler.shares.shares": "[0.25,0.75]"},
            inert={"teachers": "average"},
        ),
        "sampler=hard": Context(f"{TRAIN} cache=M/full loss=cosine sampler=hard", {"sampler.hard.group": "2"}),
        "student=ssl": Context(
            f"{TRAIN} cache=M/full loss=cosine student=ssl student.channels=16",
            {"student.ssl.layers": "1", "student.ssl.adapters": "2"},
            inert={"student.features": "sherpa", "mask.bands": "3"},
        ),
        "aam": Context(
            f"{TRAIN} cache=M/full loss=aam",
            {**of_loss("aam", {**LABELS, "subcentres": "2"}), "labels": "M/labels.csv"},
            inert={"class_means": "true", "mining.negatives": "2", "mining.positives": "2"},
        ),
        "no margin": Context(
            f"{TRAIN} cache=M/full loss=aam loss.aam.margin=0", inert={"loss.aam.margin_warmup": "[0,1]"}
        ),
        "more ranks than classes": Context(
            f"{TRAIN} cache=M/full loss=aam",
            {"loss.aam.sharded": "true"},
            constants={"spkd.train.losses.aam.world": lambda: type("Ranks", (), {"world": 99})},
        ),
        "kld": Context(f"{TRAIN} cache=M/full loss=kld", of_loss("kld", TEACHER_LOGITS)),
        "nontarget": Context(
            f"{TRAIN} cache=M/full loss=nontarget", of_loss("nontarget", {**TEACHER_LOGITS, "gamma": "0.5"})
        ),
        "trkd": Context(
            f"{TRAIN} cache=M/full loss=trkd",
            of_loss("trkd", {**TEACHER_LOGITS, "gamma": "0.5", "cutoff": "[0.3,0.3]"}),
        ),
        "multilevel": Context(
            f"{TRAIN} cache=M/full loss=multilevel",
            of_loss(
                "multilevel",
                {
                    "levels.frames": "frames",
                    "concat": "[stats]",
                    "distance": "mse",
                    "level_weights.embedding": "0.5",
                },
            ),
        ),
        "codebook": Context(
            f"{TRAIN} cache=M/coded loss=codebook",
            of_loss("codebook", {"levels.embedding": "embedding", "hop": "0"}),
            inert={"student.nested": "[3,6]"},
        ),
        "one-step without frames": Context(
            f"{TRAIN} cache=M/full loss=one-step student=ssl student.channels=16 student.ssl.adapters=2",
            {"loss.one_step.targets": "[frames]"},
        ),
        "one-step": Context(
            f"{TRAIN} cache=M/full loss=one-step student=ssl student.channels=16 student.ssl.adapters=2 "
            "loss.one_step.targets=[frames]",
            {
                "finetune_cache": "[M/again]",
                **of_loss(
                    "one_step",
                    {
                        "distance": "mse",
                        "cosine": "0.1",
                        "time_reduction": "sum",
                        "weight": "0.5",
                        "linear_decay": "true",
                        "finetune_weight": "0.5",
                        "classifier": "softmax",
                        **{f"aam.{key}": value for key, value in LABELS.items()},
                        "aam.subcentres": "2",
                    },
                ),
            },
        ),
        "one-step on more ranks than classes": Context(
            f"{TRAIN} cache=M/full loss=one-step student=ssl student.channels=16 student.ssl.adapters=2 "
            "loss.one_step.targets=[frames]",
            {"loss.one_step.aam.sharded": "true"},
            constants={"spkd.train.losses.aam.world": lambda: type("Ranks", (), {"world": 99})},
        ),
        "one-step, plain": Context(
            f"{TRAIN} cache=M/full loss=one-step student=ssl student.channels=16 loss.one_step.targets=[frames] "
            "loss.one_step.finetune_weight=0 loss.one_step.distance=mse",
            inert={
                "finetune_cache": "[M/again]",
                "loss.one_step.cosine": "0.1",
                "loss.one_step.time_reduction": "sum",
                "loss.one_step.classifier": "softmax",
                "loss.one_step.aam.margin": "0.1",
                "loss.one_step.aam.scale": "3",
            },
        ),
        "memo": Context(
            f"{TRAIN} cache=M/full {MEMO}",
            of_loss(
                "memo",
                {
                    "partner": "none",
                    "partner_channels": "6",
                    "locals": "2",
                    "local_crop": "0.2",
                    "prototypes": "12",
                    "hidden": "6",
                    "bottleneck": "3",
                    "student_temperature": "0.5",
                    "teacher_temperature": "[0.5,0.5]",
                    "teacher_temperature_warmup": "1",
                    "centre": "0.1",
                    "momentum": "[0.1,0.1]",
                    "frozen_prototypes": "1",
                    "cross_weight": "0.1",
                    "contrastive_weight": "0.1",
                    "teacher_weight": "1",
                },
            ),
        ),
        "memo, stopped": Context(
            f"{TRAIN} cache=M/full {MEMO}",
            {"loss.memo.dynamic_stop": "false"},
            constants={
                **{f"spkd.train.losses.memo.{name}": value for name, value in (("PROBE", 1), ("PATIENCE", -1))},
                "spkd.train.losses.memo.EARLIEST": 0.1,
                "spkd.train.log.LOG_EVERY": 1,
            },
        ),
        "memo with the teacher": Context(
            f"{TRAIN} cache=M/full {MEMO} loss.memo.teacher_weight=1 loss.memo.ceiling=2",
            of_loss("memo", {"frozen_temperature": "0.5", "ceiling": "-1"}),
        ),
        "memo, plain": Context(
            f"{TRAIN} cache=M/full loss=memo loss.memo.partner=none loss.memo.prototypes=16 loss.memo.hidden=8 "
            "loss.memo.bottleneck=4 loss.memo.locals=0 loss.memo.contrastive_weight=0 "
            "loss.memo.teacher_temperature=[0.1,0.1]",
            inert=of_loss(
                "memo",
                {
                    "partner_channels": "6",
                    "cross_weight": "0.5",
                    "local_crop": "0.2",
                    "dynamic_stop": "false",
                    "frozen_temperature": "0.5",
                    "ceiling": "0.5",
                    "teacher_temperature_warmup": "0.5",
                },
            ),
        ),
    },
)

EVAL = "M/trials.txt model=M/teacher manifest=M/manifest.csv"
OF_NOTHING = {
    "model.name": "M/teacher",
    "batch_size": "3",
    "workers": "1",
    "min_seconds": "0.2",
    "vad": "energy",
    "fetch.cache": "copies",
    "device": "cpu",
    "enrol.model.name": "M/second",
    "enrol.map_by": "M/map",
    "backend": "plda",
    "subtract_mean": "true",
    "norm": "as-norm",
    "cohort.source": "M/others.csv",
}
OF_MODEL = {"model.precision": "bf16", "model.compile": "true", "model.dimension": "3"}
SCORING_ACTS = {
    "model.name": "M/second",
    "min_seconds": "0.55",
    "vad": "M/segments",
    "manifest": "M/others.csv",
    "format": "kaldi",
    "enrol.map": "M/map.txt",
    "enrol.model.name": "M/second",
    "backend": "plda cohort=M/others.csv",
    "subtract_mean": "true cohort=M/others.csv",
    "norm": "as-norm cohort=M/others.csv",
}
SCORING_INERT = {
    "fetch.limit": "3",
    "model.weights": "M/teacher",
    "cohort.source": "M/others.csv",
    "cohort.average": "false",
    "cohort.top": "10",
    "enrol.model.weights": "M/teacher",
    "enrol.model.precision": "bf16",
    "enrol.model.compile": "true",
    "enrol.map_by": "M/map",
    "enrol.model.dimension": "3",
}


def scoring_contexts(more: str) -> dict[str, Context]:
    return {
        **fetch_context(f"{EVAL} {more}"),
        "no cohort": Context(f"{EVAL} {more} norm=as-norm", {"cohort.source": "M/others.csv"}),
        "one model": Context(f"{EVAL} {more}", inert={"enrol.model.name": "M/teacher/"}),
        "two models": Context(f"{EVAL} {more} enrol.model=M/second", {"enrol.map_by": "M/map"}),
        "plda": Context(f"{EVAL} {more} backend=plda cohort=M/others.csv", inert={"subtract_mean": "true"}),
        "cohort": Context(
            f"{EVAL} {more} norm=as-norm cohort=M/others.csv",
            {"cohort.average": "false"},
        ),
        "cohort of utterances": Context(
            f"{EVAL} {more} norm=as-norm cohort=M/others.csv cohort.average=false", {"cohort.top": "10"}
        ),
        **model_contexts(f"M/trials.txt manifest=M/manifest.csv {more}"),
        **enrolment_contexts("M/trials.txt manifest=M/manifest.csv", more),
    }


EVALUATION = Command(
    "eval",
    EvalConfig,
    {
        "base": Context(
            f"{EVAL} bootstrap=20",
            {
                **SCORING_ACTS,
                "out": "elsewhere",
                "calibration": "M/calibration.json",
                "points": "[0.1]",
                "false_accept": "[0.1]",
                "by": "[duration]",
                "bootstrap": "0",
                "worst": "1",
                "audio": "true",
                "seed": "1",
            },
            inert={**SCORING_INERT, "llr": "true"},
        ),
        "no intervals, no list": Context(f"{EVAL} bootstrap=0 worst=0", inert={"seed": "1", "audio": "true"}),
        "scores": Context(
            "--scores M/scores.txt bootstrap=0",
            {"llr": "true"},
            inert={**OF_NOTHING, **OF_MODEL, "audio": "true"},
        ),
        **scoring_contexts("bootstrap=0 worst=0"),
    },
)

CALIBRATION = Command(
    "calibrate",
    CalibrateConfig,
    {
        "base": Context(
            f"{EVAL} out=c.json force=true",
            {
                **SCORING_ACTS,
                "out": "d.json",
                "quality": "[duration]",
                "p_target": "0.5",
                "force": "false",
            },
            inert=SCORING_INERT,
        ),
        "scores": Context(
            "--scores M/scores.txt out=c.json force=true",
            inert={**OF_NOTHING, **OF_MODEL},
        ),
        **scoring_contexts("out=c.json force=true"),
    },
)

EMBEDDING = Command(
    "embed",
    EmbedConfig,
    {
        "base": Context(
            "M/manifest.csv model=M/teacher",
            {"model.name": "M/second", "out": "e.ark", "min_seconds": "0.55", "vad": "M/segments"},
            inert={"model.weights": "M/teacher", "fetch.limit": "3"},
        ),
        "fetch": Context(
            "M/elsewhere.csv model=M/teacher fetch.cache=copies",
            {"fetch.cache": "elsewhere", "fetch.limit": "0.000001"},
        ),
        **model_contexts("M/manifest.csv"),
    },
)

OF_DESCRIPTION = {"calibration": "M/calibration.json", "url": "https://example.org", "licence": "MIT"}
EXPORT = Command(
    "export",
    ExportConfig,
    {
        "base": Context(
            "M/teacher out=model.onnx",
            {
                "to": "pt2",
                "out": "other.onnx",
                "waveform": "true",
                "model.dimension": "3",
                **OF_DESCRIPTION,
                "trials": "M/trials.txt trials_manifest=M/manifest.csv",
                "onnx.lengths": "true",
            },
            inert={"trials_manifest": "M/manifest.csv"},
        ),
        "trials": Context("M/teacher out=model.onnx trials=M/trials.txt", {"trials_manifest": "M/manifest.csv"}),
        "wespeaker": Context(
            "M/resnet34 to=wespeaker out=w",
            {"url": OF_DESCRIPTION["url"], "licence": OF_DESCRIPTION["licence"]},
            inert={
                "calibration": OF_DESCRIPTION["calibration"],
                "waveform": "true",
                "trials": "M/trials.txt",
            },
        ),
        "web": Context(
            "M/teacher to=web out=page web.runtime=M/runtime",
            {"web.runtime": "M/newer_runtime", "web.seconds": "2"},
            inert={"waveform": "true", "trials": "M/trials.txt"},
        ),
        "int8 without speech": Context(
            "M/teacher to=onnx-int8 out=model.onnx", {"onnx_int8.manifest": "M/long.csv onnx_int8.speech=10"}
        ),
        "int8": Context(
            "M/teacher to=onnx-int8 out=model.onnx onnx_int8.manifest=M/long.csv", {"onnx_int8.speech": "10"}
        ),
        "pt2": Context("M/teacher to=pt2 out=model.pt2", inert={"trials": "M/trials.txt"}),
        "student of the waveform": Context("M/ssl to=pt2 out=model.pt2", inert={"waveform": "true"}),
        "litert": Context(
            "M/teacher to=litert out=model.tflite",
            watched={"litert.seconds": ("2", "examples")},
            inert={"trials": "M/trials.txt"},
        ),
        "pte": Context(
            "M/teacher to=pte out=model.pte",
            watched={"pte.seconds": ("2", "traced")},
            inert={"trials": "M/trials.txt"},
        ),
        "coreml": Context(
            "M/teacher to=coreml out=model.mlpackage",
            watched={"coreml.seconds": ("2", "traced")},
            inert={"trials": "M/trials.txt"},
        ),
        "ort": Context("M/teacher to=ort out=model.ort", OF_DESCRIPTION, inert={"trials": "M/trials.txt"}),
    },
)


def voice_contexts(arguments: str, more: dict[str, str]) -> dict[str, Context]:
    """Contexts of a command of voices, whose other model than the calibrated student has voices of its own."""
    own = Context(
        f"{arguments} model=checkpoint model.weights=M/teacher voices=M/voices_none.json",
        {"model.weights": "M/second", "model.precision": "bf16", "model.dimension": "3", "device": "cuda:15"},
        {"model.compile": ("true", "compiled")},
    )
    base = Context(
        f"{arguments} model=M/calibrated voices=M/voices_none.json",
        {"model.name": "M/second", "vad": "energy", **more},
        inert={"model.weights": "M/teacher"} | ({"map_by": "M/map"} if "threshold" in more else {}),
    )
    return {"base": base, "model": own, **family_contexts(f"{arguments} voices=M/voices_none.json", "model")}


def voices_of(arguments: str) -> str:
    """Name of the file with voices of the model that arguments name."""
    family = re.search(r" model=([\w-]+)", arguments)
    of_student = family is None or family[1] in ("M", "checkpoint")
    return "voices_teacher" if of_student else f"voices_{family[1].replace('-', '_')}"


ONE, OTHER = "M/audio_long/spk20/u0.flac", "M/audio_long/spk21/u1.flac"
ENROLMENT = Command(
    "enrol",
    EnrolVoiceConfig,
    {
        name: replace(context, arguments=context.arguments.replace("M/voices_none.json", "v.json"))
        for name, context in voice_contexts(f"ann {ONE}", {"voices": "w.json"}).items()
    },
)
VOICE_VERIFICATION = Command(
    "verify",
    VerifyVoiceConfig,
    {
        # Two recordings, which need no voices.
        **{
            name: replace(
                context,
                arguments=context.arguments.replace(" voices=M/voices_none.json", ""),
                inert=context.inert | {"voices": "M/mapped.json"},
            )
            for name, context in voice_contexts(f"{ONE} {OTHER}", {"threshold": "-1000"}).items()
        },
        "mapped": Context(
            f"ann {OTHER} model=M/teacher voices=M/mapped.json", {"map_by": "M/map", "voices": "M/trials.txt"}
        ),
    },
)
IDENTIFICATION = Command(
    "identify",
    IdentifyVoiceConfig,
    {
        name: replace(context, arguments=context.arguments.replace("voices_none", voices_of(context.arguments)))
        for name, context in voice_contexts(OTHER, {"voices": "M/trials.txt", "threshold": "-1000"}).items()
    }
    | {"mapped": Context(f"{OTHER} model=M/teacher voices=M/mapped.json", {"map_by": "M/map"})},
)

MAPPING = Command(
    "map",
    MapConfig,
    {
        "base": Context(
            "M/second_cache M/full hidden=64 steps=100",
            {"out": "elsewhere", "hidden": "0", "steps": "1", "held_out": "0.5", "views": "5", "seed": "1"},
        )
    },
)

CLUSTERING = Command(
    "cache cluster",
    ClusterConfig,
    {
        "base": Context(
            "M/full similarity=0.9",
            {"centres": "3", "speakers": "2", "similarity": "-1", "smallest": "2"},
            inert={"seed": "3"},
        ),
        "k-means": Context("M/full centres=4 similarity=1", {"seed": "3"}),
        "a number": Context("M/full speakers=2", inert={"similarity": "0.5", "seed": "3"}),
    },
)

COMMANDS = (
    *(EXTRACTION, VERIFICATION, CACHE_EXPORT, CLUSTERING, TRAINING, EVALUATION, CALIBRATION, EMBEDDING, EXPORT),
    *(ENROLMENT, VOICE_VERIFICATION, IDENTIFICATION, MAPPING),
)


def make_materials(root: Path, address: str) -> None:
    """Corpora, models and caches that the contexts name, small.

    Args:
        address: at which the folder is served.
    """
    for name, numbers, seconds in (
        ("manifest", range(4), 0.5),
        ("others", range(10, 16), 0.4),
        ("long", (20, 21), 3.0),
    ):
        for s, u in itertools.product(numbers, range(6 if name == "long" else 2)):
            path = root / f"audio_{name}" / f"spk{s}" / f"u{u}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, utterance(speaker(s), 100 * s + u, seconds + 0.1 * u), 16_000)
        made, _, _ = build_manifest(root / f"audio_{name}", "folder")
        made.save(root / f"{name}.csv")
        pairs = list(itertools.combinations(made, 2))
        lines = (f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs)
        (root / {"manifest": "trials.txt"}.get(name, f"{name}.txt")).write_text("".join(lines))
        with (root / "segments").open("a") as file:
            file.writelines(f"{one.id} 0.0 0.31\n" for one in made)
        if name == "manifest":
            away = (replace(one, path=one.path.replace(str(root), address)) for one in made)
            Manifest(away).save(root / "elsewhere.csv")
            ids = [one.id for one in made]
            (root / "map.txt").write_text(
                "".join(f"{a} {a} {b}\n" for a, b in zip(ids, ids[1:] + ids[:1], strict=True))
            )
            lines = (f"{one.id},{number % 3}\n" for number, one in enumerate(made))
            (root / "labels.csv").write_text("".join(["utt,speaker\n", *lines]))
            scores = np.random.RandomState(0).randn(len(pairs))
            rows = zip(pairs, scores, strict=True)
            (root / "scores.txt").write_text(
                "".join(f"{a.id} {b.id} {x:.3f} {('non', '')[a.speaker == b.speaker]}target\n" for (a, b), x in rows)
            )
    random = np.random.RandomState(0)
    for name, decay in (("noise", 1e9), ("rir", 100.0)):
        (root / name).mkdir()
        wave = 0.1 * random.randn(4000) * np.exp(-np.arange(4000) / decay)
        soundfile.write(root / name / "x.wav", wave, 16_000)
    for seed, name in enumerate(("teacher", "second")):
        torch.manual_seed(seed)
        head = torch.randn(4, 6), [f"spk{s}" for s in range(4)], 20.0
        network = _centred(build("tiny", channels=4, embedding=6).eval(), root)
        network.nested = (3, 6)
        save_student(root / name, Checkpoint(network, *head))
    shutil.copytree(root / "teacher", root / "calibrated")
    write_package(root / "runtime", "1.30.0")
    write_package(root / "newer_runtime", "1.31.0")
    save_student(root / "resnet34", Checkpoint(build("resnet34", embedding=4).eval()))
    save_student(root / "ssl", Checkpoint(build("ssl", channels=16, embedding=4).eval()))
    _make_families(root)
    every = f"{EXTRACT} fbank=true wave=true teacher.targets=[embedding,frames,stats,logits]"
    augmented = "view=crops:1,0.4 view.noise=M/noise view.noise_prob=1 view.rir=M/rir view.rir_prob=1"
    for given in (
        f"extract {every} cache=M/full",
        f"extract {every} cache=M/again view=crops:2,0.4",
        f"extract {EXTRACT} cache=M/second_cache fbank=true teacher.weights=M/second",
        f"extract {EXTRACT} cache=M/others_cache fbank=true manifest=M/others.csv",
        f"extract {EXTRACT} cache=M/bare",
        f"extract {EXTRACT} cache=M/augmented {augmented}",
        f"extract {every.removesuffix(',logits]')}] cache=M/coded storage.codecs.frames=rq4x2 "
        "storage.codecs.embedding=lsq4x2",
        *(
            f"extract {context.arguments} cache=M/of_{name.removeprefix('teacher=')}"
            for name, context in family_contexts("manifest=M/manifest.csv", "teacher").items()
        ),
        "calibrate M/others.txt manifest=M/others.csv model=M/teacher out=M/calibration.json force=true",
        "calibrate M/others.txt manifest=M/others.csv model=M/calibrated force=true",
        *(
            f"enrol ann {context.arguments.replace(OTHER, ONE).replace('identify ', '')}"
            for name, context in IDENTIFICATION.contexts.items()
            if name not in ("base", "mapped")
        ),
        "map M/second_cache M/full out=M/map",
        "calibrate M/others.txt manifest=M/others.csv model=M/teacher enrol.model=M/second enrol.map_by=M/map "
        "force=true",
        f"enrol ann {ONE} model=M/second voices=M/voices_second.json",
        "voices M/voices_second.json --map M/map --out M/mapped.json",
    ):
        with contextlib.chdir(root):
            code, out, err = run_command(given.replace("M/", f"{root}/").split())
        assert code == 0, f"{given}: {out}{err}"


def _centred(network: Network, root: Path) -> Network:
    """A network whose embeddings differ; those of fresh weights are nearly parallel."""
    waves = [soundfile.read(path, dtype="float32")[0] for path in sorted(root.glob("audio_manifest/*/u0.flac"))]
    with torch.no_grad():
        found = torch.cat([network(network.features(torch.from_numpy(wave)[None]))["embedding"] for wave in waves])
        network.get_submodule("project").bias -= found.mean(0)  # type: ignore[operator]
    return network


def _make_families(root: Path) -> None:
    """A tiny model of each family, as its own library saves it."""
    torch.manual_seed(0)
    sizes: dict[str, tuple[type, dict[str, Any]]] = {
        "wavlm": (transformers.WavLMConfig, {}),
        "hubert": (transformers.HubertConfig, {}),
        "wav2vec2": (transformers.Wav2Vec2Config, {}),
        "data2vec": (transformers.Data2VecAudioConfig, {"num_conv_pos_embeddings": 5}),
        "w2v_bert": (transformers.Wav2Vec2BertConfig, {"feature_projection_input_dim": 160}),
    }
    for name, (kind, own) in sizes.items():
        transformers.AutoModel.from_config(kind(**TINY_SSL | own)).save_pretrained(root / name)
    for name in ("wavlm", "hubert", "wav2vec2", "data2vec"):
        settings = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True}
        (root / name / "preprocessor_config.json").write_text(json.dumps(settings))
    save_wespeaker(root / "wespeaker", "ReDimNetB0")
    (root / "3d_speaker").mkdir()
    torch.save(weights_of("3d-speaker", "ResNet"), root / "3d_speaker" / "model.ckpt")
    helper, random = onnx.helper, np.random.RandomState(0)
    weights = [
        onnx.numpy_helper.from_array(random.randn(80, 6).astype(np.float32), name) for name in ("one", "another")
    ]
    squares = helper.make_node("Mul", ["x", "x"], ["squares"])
    mean = helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[1], keepdims=0)
    products = [helper.make_node("MatMul", ["mean", w], [out]) for w, out in (("one", "embs"), ("another", "other"))]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [squares, mean, *products],
        "graph",
        [value("x", 1, ["B", "T", 80])],
        [value(name, 1, ["B", 6]) for name in ("embs", "other")],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model.metadata_props.add(key="framework", value="wespeaker")
    onnx.save(model, str(root / "onnx.onnx"))


class Watch:
    """What speed alone depends on, while a command runs.

    Attributes:
        seen: what is watched -> the values, in order.
    """

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {}

    def note(self, name: str, value: Any) -> None:
        self.seen.setdefault(name, []).append(value)

    @contextlib.contextmanager
    def __call__(self, constants: dict[str, Any]) -> Iterator[None]:
        """Watch the code that the block runs, with other constants in it."""
        note, patch = self.note, pytest.MonkeyPatch()
        begin, save, to, loader = EmbeddingModel.begin, resume.save, torch.nn.Module.to, torch.utils.data.DataLoader
        faiss = pytest.importorskip("faiss")
        factory = faiss.index_factory

        def watched_begin(model: Any, waves: torch.Tensor, *given: Any, **named: Any) -> Any:
            note("batches", len(waves))
            return begin(model, waves, *given, **named)

        def watched_save(out: Path, module: Any, optimiser: Any, miner: Any, step: int, *given: Any) -> None:
            note("saved", step)
            save(out, module, optimiser, miner, step, *given)

        def watched_to(module: Any, *given: Any, **named: Any) -> Any:
            note("memory formats", str(named.get("memory_format")))
            return to(module, *given, **named)

        def watched_compile(called: Any = None, *_: Any, **__: Any) -> Any:
            note("compiled", True)
            return called

        def watched_loader(*given: Any, **named: Any) -> Any:
            note("loaders", named["num_workers"])
            return loader(*given, **named | {"num_workers": 0})

        def watched_pool(workers: int, *given: Any, **named: Any) -> ThreadPoolExecutor:
            note("threads", workers)
            return ThreadPoolExecutor(workers, *given, **named)

        class Index:
            """An index whose number of lists to look into is seen."""

            def __init__(self, dim: int) -> None:
                object.__setattr__(self, "_index", factory(dim, "Flat", faiss.METRIC_INNER_PRODUCT))

            def __getattr__(self, name: str) -> Any:
                return getattr(self._index, name)

            def __setattr__(self, name: str, value: Any) -> None:
                note("lists", value)

        converter = ModuleType("litert_torch")

        def convert(model: Any, examples: tuple[torch.Tensor]) -> None:
            note("examples", examples[0].shape[1])
            raise ValueError("this converter converts nothing")

        converter.convert = convert  # type: ignore[attr-defined]

        def traced_alone(_: Any, seconds: float) -> None:
            note("traced", seconds)
            raise ValueError("this graph is not traced")

        with patch.context() as patched:
            # Times and pages are not compared: they would cost half of the walk.
            patched.setattr("spkd.eval.efficiency.real_time_factor", lambda *_, **__: 1.0)
            patched.setattr("spkd.export.base.REPEATS", 1)
            patched.setattr("spkd.train.record.write_page", lambda *_: None)
            patched.setattr(EmbeddingModel, "begin", watched_begin)
            patched.setattr(resume, "save", watched_save)
            patched.setattr("spkd.train.mining.set_nprobe", lambda _, lists: note("lists", lists))
            patched.setattr(torch.nn.Module, "to", watched_to)
            patched.setattr(torch, "compile", watched_compile)
            patched.setattr(torch.nn.Module, "compile", watched_compile)
            patched.setattr("spkd.train.loading.DataLoader", watched_loader)
            patched.setattr("spkd.corpus.loader.ThreadPoolExecutor", watched_pool)
            patched.setattr(faiss, "index_factory", lambda dim, *_: Index(dim))
            patched.setitem(sys.modules, "litert_torch", converter)
            for module in CONVERTERS:
                patched.setitem(sys.modules, module, MagicMock())
            patched.setattr("spkd.export.pte.traced_alone", traced_alone)
            patched.setattr("spkd.export.coreml.traced_alone", traced_alone)
            for name, value in constants.items():
                if name.startswith("sys.modules."):
                    patched.setitem(sys.modules, name.removeprefix("sys.modules."), value)
                else:
                    patched.setattr(name, value)
            yield


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """The real command line in this process: exit code, standard output, standard error."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["spkd", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


@dataclass(frozen=True)
class Observed:
    """A command that has run.

    Attributes:
        code: exit code. out: standard output. err: standard error.
        results: what a user gets: files by name, with the digest of what in them depends on more than the settings'
            own words; and lines on the terminal.
        records: settings as files hold them.
        watched: see Watch.
    """

    code: int
    out: str
    err: str
    results: dict[str, str]
    records: dict[str, str]
    watched: dict[str, list[Any]]


ECHOES = ("card.json", "model.json", "run.json", "run.yaml", "report.json", "train.html", "report.html", "index.json")
OF_STORAGE = ("zarr.json", ".npz", "codec.safetensors", "COMPLETE.json", "verified.json", "verified.log")
# Times, and the digest that covers them.
WRITTEN = re.compile(r'\d{4}-\d\d-\d\dT[\d:.]+Z?|"check": "\w+"')
TIMED = re.compile(r"real-time factor \S+")
REPORTED = ("results", "intervals", "metrics", "trials", "breakdown", "worst", "rejected", "notes")
KEPT = ("steps", "last_terms", "best", "reports")  # of the training in model.json


def observe(command: Command, context: Context, more: str, materials: Path, folder: Path, file: str = "") -> Observed:
    """Run a command in a new folder."""
    folder.mkdir(parents=True)
    given = f"{command.name} {context.arguments} {more}".replace("M/", f"{materials}/").split()
    text = (context.file + file).replace("M/", f"{materials}/")
    if text:
        (folder / "spkd.yaml").write_text(text)
    watch = Watch()
    with contextlib.chdir(folder), watch(context.constants):
        code, out, err = run_command(given)
    assert "unexpected failure" not in err, err
    results, records = {}, {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"events\.out.*", "events", str(path.relative_to(folder)))
        if path.is_file() and name != "spkd.yaml":
            results[name] = hashlib.sha256(_content(path)).hexdigest()
            if path.name in ("model.json", "run.yaml", "card.json"):
                records[name] = WRITTEN.sub("", path.read_text())
    if command.name in ("cache verify", "export", "verify", "identify") or "--slurm-script" in given:
        results["standard output"] = TIMED.sub("", out)
    results["error"] = "" if code == 0 else err
    results["exit code"] = str(code)
    return Observed(code, out, err, results, records, watch.seen)


def _content(path: Path) -> bytes:
    """What a file holds besides settings, times and places."""
    if path.name == "model.safetensors":
        weights = load_file(path)
        return b"".join(name.encode() + weights[name].numpy().tobytes() for name in sorted(weights))
    if path.name == "model.json":
        training = json.loads(path.read_text())["training"]
        return json.dumps({name: training.get(name) for name in KEPT}).encode()
    if path.name == "report.json":
        report = json.loads(path.read_text())
        return json.dumps({name: report.get(name) for name in REPORTED}).encode()
    if path.name == "c.json":
        calibration = json.loads(path.read_text())
        return json.dumps({k: v for k, v in calibration.items() if k not in ("p_target", "system")}).encode()
    if path.suffix == ".ort":  # onnxruntime writes tables of names in no order
        return str(path.stat().st_size).encode()
    if path.name.endswith(".ort.json"):
        about = json.loads(path.read_text())
        return json.dumps({k: v for k, v in about.items() if k != "sha256"}).encode()
    if path.name == "report.html":
        return str(path.read_text().count("<audio")).encode()
    if path.name == "log.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps([{k: v for k, v in line.items() if k not in ("lr", "check")} for line in lines]).encode()
    is_echo = (
        path.name in ECHOES
        or path.name.endswith(OF_STORAGE)
        or path.parent.name in ("commits", "claims", "tensorboard")
    )
    return b"" if is_echo else path.read_bytes()


def another_value(k: Key) -> str:
    """A value that a key takes and that is not its default."""
    if k.kind.startswith("dict"):
        return "{x: 1}"
    if k.kind.startswith("list"):
        return "[0.25,0.5]" if "float" in k.kind else "[x]"
    if k.choices:
        return next(choice for choice in k.choices if choice != k.default)
    if isinstance(k.default, bool):
        return str(not k.default).lower()
    if "float" in k.kind or "int" in k.kind:
        return str(k.default / 2 if isinstance(k.default, float) and k.default else (k.default or 0) + 1)
    return "x"


def inert_keys(command: Command, name: str) -> dict[str, str]:
    """Keys without effect in a context, with a value of each; in the first one all those of components that are not
    in use."""
    context = command.contexts[name]
    if name != next(iter(command.contexts)):
        return context.inert
    unused = {k.name: another_value(k) for k in component_keys(command.schema) if k.name not in context.acts}
    return {**unused, **context.inert}


def differing(context: Context, base: Observed, name: str, seen: Observed) -> bool:
    """Whether a key changed what it is said to change."""
    if name in context.watched:
        what = context.watched[name][1]
        return base.watched.get(what) != seen.watched.get(what)
    return base.results != seen.results


def as_file(command: Command, values: dict[str, str]) -> str:
    """Values as a settings file has them."""
    lines = "".join(f"  {name}: {value}\n" for name, value in values.items())
    return f"\n{command.schema.COMMAND}:\n{lines}"  # type: ignore[attr-defined]


def without_effect(command: Command, name: str, materials: Path, folder: Path) -> list[str]:
    """Keys of a context that do not change what they are said to change."""
    context = command.contexts[name]
    base = observe(command, context, "", materials, folder / "base")
    values = {**context.acts, **{k: value for k, (value, _) in context.watched.items()}}
    return [
        f"{k}={value}"
        for k, value in values.items()
        if not differing(context, base, k, observe(command, context, f"{k}={value}", materials, folder / k))
    ]


def accepted(command: Command, name: str, materials: Path, folder: Path) -> list[str]:
    """What is wrong with how a context treats the keys without effect: none is accepted where it is typed, and none
    changes or is recorded where it comes from a file."""
    context, values, wrong = command.contexts[name], inert_keys(command, name), []
    for k, value in values.items():
        seen = observe(command, context, f"{k}={value}", materials, folder / k)
        refused = seen.code == 2 and len(seen.err.splitlines()) == 1 and k in seen.err
        if not refused or set(seen.results) > {"standard output", "error", "exit code"}:
            wrong.append(f"{k}={value}: {seen.code} {seen.err}")
    base = observe(command, context, "", materials, folder / "base")
    left_out = observe(command, context, "", materials, folder / "left_out", as_file(command, values))
    notes = "\n".join(line for line in (left_out.out + left_out.err).splitlines() if line.startswith("note: spkd.yaml"))
    wrong += [f"{k}: no note" for k in values if not re.search(rf"[ .]{re.escape(k)}[,:]", notes)]
    changed = {k for k in (*base.results, *left_out.results) if base.results.get(k) != left_out.results.get(k)}
    changed |= {k for k in base.records if base.records[k] != left_out.records.get(k)}
    if changed - {"standard output"}:
        wrong.append(f"a file changes {sorted(changed)}: {left_out.err}")
    return wrong


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("materials")
    with served(root, type("Kept", (Ranges,), {"asked": []})) as address:
        make_materials(root, address)
        yield root


EACH = [(command, name) for command in COMMANDS for name in command.contexts]
ACTING = [(c, n) for c, n in EACH if c.contexts[n].acts or c.contexts[n].watched]
INERT = [(c, n) for c, n in EACH if inert_keys(c, n)]


def named(value: object) -> str:
    return value.name if isinstance(value, Command) else str(value)


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_every_key_is_tried(command: Command) -> None:
    tried = {k for context in command.contexts.values() for k in (*context.acts, *context.watched)}
    every = command.keys()
    parts = {k: f"{k}." for k in every if isinstance(every[k].default, dict)}  # items of mappings stand for them
    missing = [k for k in every if k not in tried and not any(t.startswith(parts.get(k, "\n")) for t in tried)]
    assert not missing


@pytest.mark.slow  # two minutes of one core
@pytest.mark.parametrize(("command", "name"), ACTING, ids=named)
def test_a_key_that_is_in_use_acts(command: Command, name: str, materials: Path, tmp_path: Path) -> None:
    assert not without_effect(command, name, materials, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), INERT, ids=named)
def test_a_key_without_effect_is_refused_or_left_out(
    command: Command, name: str, materials: Path, tmp_path: Path
) -> None:
    assert not accepted(command, name, materials, tmp_path)


def table() -> Iterator[str]:
    """How every key of every command is treated: where it acts, and where it is refused."""
    for command in COMMANDS:
        every, contexts = command.keys(), command.contexts.items()
        refused = {k for name in command.contexts for k in inert_keys(command, name)}
        watched = {k for _, context in contexts for k in context.watched}
        yield f"{command.name}: {len(every)} keys act; {len(refused & set(every))} of them are refused where not in use"
        for k in every:
            where = next((n for n, c in contexts if any(t == k or t.startswith(f"{k}.") for t in c.acts)), "")
            where = where or next((n for n, c in contexts if k in c.watched), "")
            seen = f" (seen: {command.contexts[where].watched[k][1]})" if k in watched else ""
            yield f"  {k}: acts in {where!r}{seen}{'; refused where not in use' if k in refused else ''}"


if __name__ == "__main__":
    print("\n".join(table()))
