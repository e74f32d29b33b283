"""Choices by name: ours, and those of installed packages, through the real commands."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from spkd.config import key, load
from spkd.errors import SpkdError, UsageError
from spkd.registry import CODECS, LOSSES, STUDENTS, TEACHERS, Registry, plug_ins
from spkd.train.settings import TrainConfig

PLUGIN = {
    "mine/__init__.py": "",
    "mine/huber.py": '''
from dataclasses import dataclass
from torch.nn.functional import huber_loss
from spkd.config import key
from spkd.train.losses.regression import Cosine

@dataclass
class Settings:
    delta: float = key(1.0, "where the square becomes linear", positive=True)

class Huber(Cosine):
    """mean of huber(P s - t)."""
    Settings = Settings
    learns_from = "`embedding`"
    def __init__(self, settings, context):
        super().__init__(settings, context)
        self.delta = settings.delta
    def forward(self, student, inputs):
        return huber_loss(self.project(student["embedding"]), inputs.targets["embedding"], delta=self.delta)

class Plain(Huber):
    class Settings:
        delta = 1.0

@dataclass
class Unmeant:
    delta: float = 1.0

class Bare(Huber):
    Settings = Unmeant

@dataclass
class Shadowing:
    contrasts: bool = key(True, "the name of a method that settings of losses have")

class Shadow(Huber):
    Settings = Shadowing
''',
    "mine/models.py": """
from dataclasses import dataclass
import torch
from spkd.config import key
from spkd.outputs.teacher_card import TeacherCard
from spkd.outputs.features import MELS
from spkd.networks.network import Network, describe, statistics
from spkd.outputs.target import Target
from spkd.teachers.base import Teacher

@dataclass
class MeanSettings:
    kernel: int = key(1, "frames that a convolution sees", low=1, high=9)

class Mean(Network):
    Settings = MeanSettings
    default_channels = 8
    def __init__(self, channels=8, embedding=192, kernel=1):
        super().__init__()
        self.settings = {"channels": channels, "embedding": embedding, "kernel": kernel}
        self.levels = describe(channels, {"stats": 2 * channels, "embedding": embedding})
        self.one = torch.nn.Conv1d(MELS, channels, kernel, padding=kernel // 2)
        self.two = torch.nn.Linear(2 * channels, embedding)
    def run(self, features):
        frames = self.one(features)
        stats = statistics(frames)
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": self.two(stats)}

@dataclass
class EnergySettings:
    power: float = key(2.0, "exponent of the waveform", positive=True)

class Energy(Teacher):
    family = "energy"
    Settings = EnergySettings
    def __init__(self, power):
        self.power = power
        self.targets = {"embedding": Target("embedding", 2)}
    @classmethod
    def load(cls, config, device):
        return cls(config.settings.power)
    def card(self):
        return TeacherCard(self.family, "0", "MIT", "mine", "none")
    def forward(self, waves, names):
        return {"embedding": torch.stack([waves.abs().pow(self.power).mean(-1) + 1e-3, waves.abs().mean(-1)], 1)}
""",
    "mine-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n",
    "mine-1.0.dist-info/entry_points.txt": (
        "[spkd.losses]\nhuber = mine.huber:Huber\nbroken = mine.nothing:Loss\n"
        "plain = mine.huber:Plain\nbare = mine.huber:Bare\nshadow = mine.huber:Shadow\ntwice = mine.huber:Huber\n"
        "weights = mine.huber:Huber\nONE_STEP = mine.huber:Huber\naam = mine.nothing:Loss\n"
        "[spkd.students]\nmean = mine.models:Mean\n"
        "[spkd.teachers]\nenergy = mine.models:Energy\n"
    ),
    "other-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n",
    "other-1.0.dist-info/entry_points.txt": "[spkd.losses]\ntwice = other.huber:Huber\n",
}

COMMANDS = """
import json, sys
from spkd.cli import main

failed = 0
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["spkd", *arguments]
    try:
        main()
    except SystemExit as exit_:
        failed += bool(exit_.code)
sys.exit(failed)
"""


@pytest.mark.parametrize("registry", [LOSSES, STUDENTS, TEACHERS, CODECS])
def test_every_name_can_be_imported(registry: Registry) -> None:
    for name in registry.ours:
        assert isinstance(registry[name], type)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"student=xvektor; did you mean 'xvector'\?"):
        STUDENTS["xvektor"]


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("broken", "nowhere.at_all:Loss", "spkd.losses")
    monkeypatch.setattr("spkd.registry.entry_points", lambda group: [point])
    with pytest.raises(
        SpkdError, match=r"loss=broken of the package nowhere.at_all: nowhere.at_all:Loss cannot be imported"
    ):
        Registry("loss", "spkd.losses", {})["broken"]
    assert plug_ins() == ("nowhere",)


@dataclass
class GatedSettings:
    maxNorm: float = key(1.0, "largest norm of a gradient")
    Shares: dict[str, float] = key({}, "share of each gate")


class Gated:
    Settings = GatedSettings


def test_capitals_in_a_packages_keys_are_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("Gated", f"{__name__}:Gated", "spkd.students")
    monkeypatch.setattr("spkd.registry.entry_points", lambda group: [point] if group == "spkd.students" else [])
    monkeypatch.delitem(STUDENTS.__dict__, "_points", raising=False)
    variables = {"SPKD_STUDENT": "Gated", "SPKD_STUDENT__GATED__MAXNORM": "0.5", "SPKD_STUDENT__GATED__SHARES__A": "2"}
    try:
        settings = load(TrainConfig, [], environ=variables).student.settings
    finally:
        STUDENTS.__dict__.pop("_points", None)
    assert settings == GatedSettings(0.5, {"a": 2.0})


@pytest.mark.slow
def test_an_installed_package_adds_a_loss_a_student_and_a_teacher(corpus: Path, tmp_path: Path) -> None:
    for name, text in PLUGIN.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"}

    def run(*commands: list[str]) -> subprocess.CompletedProcess[str]:
        """In one process, as starting takes longer than the commands; it ends with the number of those that failed."""
        command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    manifest = f"manifest={corpus / 'manifest.csv'}"
    small = ["student=mean", "student.embedding=6", "steps=4", "batch_size=4", "crop=0.5"]
    done = run(
        ["extract", "teacher=energy", "teacher.energy.power=3", manifest, "fbank=true"],
        ["train", "--loss", "huber", "loss.huber.delta=0.5", "student.mean.kernel=3", *small],
        ["eval", str(corpus / "trials.txt"), manifest],
        ["train", "--losses"],
        ["train", "--loss", "aam", "loss.aam.scale=20", *small, "out=ours"],
    )
    assert done.returncode == 0, done.stderr
    assert "huber: learns from" in done.stdout
    assert "broken: cannot be used: loss=broken of the package mine: mine.nothing:Loss cannot be" in done.stdout
    assert "weights: cannot be used" in done.stdout
    assert "note: loss=aam is spkd's own; that of the package mine is not used\n" in done.stdout
    assert json.loads((tmp_path / "student" / "model.json").read_text())["settings"]["kernel"] == 3
    done = run(
        ["train", "--loss", "huber", "loss.huber.dalta=1", *small, "out=x"],
        ["train", "--loss", "huber", "loss.huber.delta=0", *small, "out=x"],
        ["train", "--loss", "broken", *small, "out=x"],
        ["train", "--loss", "huber", "student.mean.kernal=3", *small, "out=x"],
        ["extract", "teacher=energy", "teacher.energy.power=2", manifest, "fbank=true"],
        *(["train", "--loss", name, *small] for name in ("plain", "bare", "shadow", "twice", "weights", "ONE_STEP")),
    )
    assert done.returncode == 11
    for line, error in zip(
        done.stderr.splitlines(),
        (
            "did you mean 'loss.huber.delta'",
            "must be positive",
            "mine.nothing:Loss cannot be imported",
            "did you mean 'student.mean.kernel'",
            "holds a cache of another teacher",
            "loss=plain of the package mine: its Settings are no dataclass",
            "loss=bare of the package mine: its Settings have the field delta, which spkd.config.key did not make",
            "loss=shadow of the package mine: its Settings have the field contrasts, which is the name of a method",
            "loss=twice of the package mine and other: several have this name; one of them needs another",
            "loss=weights of the package mine: loss.weights is a key of spkd; it needs another name",
            "loss=ONE_STEP of the package mine: spkd's own one-step has the same keys; it needs another name",
        ),
        strict=True,
    ):
        assert error in line
