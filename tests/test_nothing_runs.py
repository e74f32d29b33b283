"""Whatever lies in a folder, a cache or a checkout, no command runs any of it: it is planted there, and leaves no mark.

What is planted makes a file or a folder whose name begins with MARK.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spkd.cache.folder import COMPLETE, CompletionRecord
from spkd.files.atomic import write_json
from spkd.students import Checkpoint, build, save_student
from tests import processes

MARK = "RAN"
ROOT = Path(__file__).parents[1]
NAME = f"it's; touch {MARK}0; $(touch {MARK}1) `touch {MARK}2` -x #"  # of the folder in which commands are given
# Modules that spkd, its libraries, or a Python that starts would import if the current folder were on their path.
MODULES = (
    *("aiohttp", "conftest", "fsspec", "h5py", "json", "matplotlib", "multiprocessing", "numpy", "onnx", "onnxruntime"),
    *("ray", "resource", "runpy", "safetensors", "scipy", "sitecustomize", "socket", "soundfile", "spkd", "torch"),
    *("transformers", "usercustomize", "webdataset", "yaml"),
)
SMALL = ["student=tiny", "student.channels=8", "student.embedding=6", "steps=2", "batch_size=4", "crop=0.5"]
MODEL = ["manifest=m.csv", "model=student", "device=cpu"]
# Commands that read and write everything, each from what those before it left.
QUICK = (
    ("manifest", "audio", "--out", "m.csv"),
    ("extract", "teacher=none", "manifest=m.csv", "cache=features"),
    ("train", "--loss", "aam", "cache=features", "out=student", *SMALL),
    ("cache", "export", "features", "x.h5"),
    ("cache", "import", "x.h5", "from-h5"),
)
FURTHER = (
    *QUICK,
    ("eval", "trials.txt", *MODEL, "out=evaluation", "bootstrap=5"),
    ("report", "evaluation", "--out", "comparison", "--bootstrap", "5"),
    ("extract", "teacher=checkpoint", "teacher.weights=student", "manifest=m.csv", "cache=cache", "fbank=true"),
    ("train", "--loss", "cosine", "cache=cache", "out=second", *SMALL),
    ("calibrate", "trials.txt", *MODEL, "force=true"),
    ("embed", "m.csv", "model=student", "out=v.ark", "device=cpu"),
    ("export", "student", "to=onnx", "out=student.onnx"),
    ("extract", "teacher=onnx", "teacher.weights=student.onnx", "manifest=m.csv", "cache=from-onnx"),
    ("extract", "teacher=none", "manifest=m.csv", "cache=by-ray", "engine=ray", "processes=1"),
    ("extract", "teacher=none", "--slurm-script"),
    ("cache", "info", "cache"),
    ("cache", "ls", "."),
    ("cache", "verify", "cache", "--live", "2", "teacher=checkpoint", "teacher.weights=student", "manifest=m.csv"),
    ("cache", "estimate", "teacher=checkpoint", "teacher.weights=student", "manifest=m.csv"),
    ("cache", "catalogue", ".", "--out", "page.html"),
    ("cache", "push", "cache", "pushed"),
    ("cache", "pull", "pushed", "pulled"),
    ("cache", "export", "cache", "tars"),
    ("cache", "import", "tars", "from-tars"),
    ("train", "--loss", "cosine", "cache=tars", "out=third", *SMALL),
    ("cache", "import", "v.scp", "from-scp", "--manifest", "m.csv"),
    ("demo", "--out", "demo"),
)


def plant(folder: Path, mark: Path) -> None:
    """Put into a folder what Python, git and matplotlib would run if they looked there."""
    touch = f"open({str(mark)!r} + __name__, 'w')\n"
    for name in (*MODULES, "evil"):
        (folder / f"{name}.py").write_text(touch)
    (folder / "evil.pth").write_text(f"import os; os.mkdir({str(mark)!r} + 'pth')\n")
    package = folder / "evil-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    groups = (
        "spkd.losses",
        "spkd.students",
        "spkd.teachers",
        "fsspec.specs",
        "torch.backends",
        "torch_dynamo_backends",
    )
    (package / "entry_points.txt").write_text("".join(f"[{group}]\naam = evil:Evil\n" for group in groups))
    (folder / "matplotlibrc").write_text("backend: module://evil\ntext.usetex: True\n")
    # The layout of a bare repository among the files, as a clone brings it.
    for inner in ("objects", "refs", "hooks", "tree"):
        (folder / inner).mkdir()
    (folder / "HEAD").write_text("ref: refs/heads/main\n")
    settings = f'repositoryformatversion = 0\nbare = false\nworktree = tree\nfsmonitor = "touch {mark}git; false"\n'
    (folder / "config").write_text(f"[core]\n{settings}")
    for hook in ("post-index-change", "fsmonitor-watchman", "reference-transaction"):
        (folder / "hooks" / hook).write_text(f"#!/bin/sh\ntouch {mark}hook\n")
        (folder / "hooks" / hook).chmod(0o755)


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    """A folder with audio and trials in which everything is planted."""
    root = tmp_path / NAME
    shutil.copytree(corpus, root)
    plant(root, tmp_path / MARK)
    return root


def marks(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob(f"{MARK}*"))


@pytest.mark.slow
def test_what_lies_in_the_current_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    for command in QUICK:
        running = processes.spkd(*command, cwd=folder)
        out, err = running.communicate()
        assert running.returncode == 0, (command, out, err)
        assert not marks(tmp_path), command


@pytest.mark.slow
def test_what_lies_in_the_current_folder_is_not_run_by_any_command(folder: Path, tmp_path: Path) -> None:
    """The installed command, in a new process each time."""
    pytest.importorskip("ray")
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    env.pop("PYTHONSAFEPATH", None)
    script = Path(sys.executable).with_name("spkd")
    for command in FURTHER:
        done = subprocess.run([script, *command], cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert not marks(tmp_path), command


class Marked:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (f"{MARK}pickle",)


def objects() -> bytes:
    """An array of such objects, as NumPy pickles it."""
    data = io.BytesIO()
    np.save(data, np.array([Marked()] * 18, object), allow_pickle=True)
    return data.getvalue()


def torch_file() -> bytes:
    """Weights beside such an object, as torch pickles them."""
    data = io.BytesIO()
    torch.save({"weight": torch.ones(2), "more": Marked()}, data)
    return data.getvalue()


def archive(content: bytes) -> bytes:
    """A plan's file with an array of such objects."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in ("utterance", "start", "samples", "speed", "seed", "formants", "unit", "first", "utterances"):
            file.writestr(f"{name}.npy", content)
    return data.getvalue()


EXTRACT = ("extract", "manifest=manifest.csv", "teacher=none")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replan(root: Path) -> None:
    """Name another view plan in the records of a cache."""
    record = CompletionRecord.load(root)
    views = replace(record.card.views, plan=f"full; touch {MARK}2")
    write_json(root / COMPLETE, replace(record, card=replace(record.card, views=views)).to_json())


# Damage to a cache, and a command whose error then names another one.
ADVICE: dict[str, tuple[Callable[[Path], object], Callable[[str], tuple[str, ...]]]] = {
    "export": (lambda root: flip(root / "fbank/c/0/0"), lambda root: ("cache", "export", root, "c.h5")),
    "extract": (
        lambda root: (flip(root / "plan/0.npz"), shutil.copy("few.csv", "manifest.csv")),
        lambda root: (*EXTRACT, f"cache={root}"),
    ),
    "info": (shutil.rmtree, lambda root: ("cache", "info", root)),
    "stream": (lambda root: root, lambda root: ("train", "--loss", "aam", f"cache=file://{root}")),
    "targets": (replan, lambda root: ("train", "--loss", "cosine", f"cache={root}", *SMALL)),
    "option": (lambda root: root, lambda root: ("manifest", f"out={root}.csv")),
}


@pytest.mark.parametrize("name", ADVICE)
def test_a_command_that_an_error_advises_can_be_pasted(
    spkd: Callable, valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A shell takes the odd name of a folder, or what a cache says of itself, as one word of it."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / f"it's; touch {MARK}0; $(touch {MARK}1) #"
    shutil.copytree(valid / "cache", root)
    shutil.copy(valid / "manifest.csv", "manifest.csv")
    Path("few.csv").write_text("".join(Path("manifest.csv").read_text().splitlines(keepends=True)[:9]))
    shutil.copytree(valid / "audio", "audio")
    change, command = ADVICE[name]
    change(root)
    error = spkd(*command(str(root))).err
    advised = re.findall(r"`(spkd [^`]*)`|(?:it: |write )((?:spkd|--).*?)(?: \(its targets|$)", error)
    pasted = next(filter(None, (given for pair in advised for given in pair if MARK in given)))
    said = subprocess.run(["sh", "-c", f"print() {{ printf '%s\\n' \"$@\"; }}; print {pasted}"], capture_output=True)
    assert not marks(tmp_path)
    assert f"touch {MARK}" in said.stdout.decode()


YAML = f"!!python/object/apply:os.mkdir [{MARK}yaml]\n"
# File, content, command that reads it.
PAYLOADS = {
    "spkd.yaml": ("spkd.yaml", f"cache: {YAML}", EXTRACT),
    "spkd.yaml, code": ("spkd.yaml", f"? {YAML}: x\n", EXTRACT),
    "spkd.yaml, chain": ("spkd.yaml", "cache: 'reference::file://refs.json'\n", ("train", "--loss", "cosine")),
    "spkd.yaml, engine": ("spkd.yaml", "extract: {engine: ray}\n", EXTRACT),
    "--config": ("s.yaml", f"cache: {YAML}", (*EXTRACT, "--config", "s.yaml")),
    "--from": ("run/run.yaml", f"train: {{manifest: {YAML.strip()}}}", ("train", "--from", "run")),
    "npy": ("v.npy", objects(), ("cache", "import", "v.npy", "new", "--manifest", "manifest.csv")),
    "ark": (
        "v.ark",
        b"a PKL" + pickle.dumps(Marked()),
        ("cache", "import", "v.ark", "new", "--manifest", "manifest.csv"),
    ),
    "scp": ("v.scp", f"a touch {MARK} |\n", ("cache", "import", "v.scp", "new", "--manifest", "manifest.csv")),
    "wav.scp": ("data/wav.scp", f"a touch {MARK} |\n", ("extract", "manifest=data", "cache=new")),
    "path": ("p.csv", f"utt,path\na,|touch {MARK}\n", ("extract", "manifest=p.csv", "teacher=none")),
    "plan": ("cache/plan/0.npz", archive(objects()), ("cache", "info", "cache")),
    "plan, read": ("cache/plan/0.npz", archive(objects()), ("train", "--loss", "aam", "cache=cache", *SMALL)),
    "tars": ("tars/index.json", pickle.dumps(Marked()), ("cache", "import", "tars", "new")),
    "student": ("student/model.safetensors", pickle.dumps(Marked()), ("eval", "trials.txt", "manifest=manifest.csv")),
    "3d-speaker": ("w.pt", torch_file(), (*EXTRACT, "teacher=3d-speaker", "teacher.weights=w.pt")),
    "joblib": ("w.pt", pickle.dumps(Marked()), (*EXTRACT, "teacher=3d-speaker", "teacher.weights=w.pt")),
    "dvector": ("w.pt", torch_file(), (*EXTRACT, "teacher=dvector", "teacher.weights=w.pt")),
    "redimnet": ("w.pt", torch_file(), (*EXTRACT, "teacher=redimnet", "teacher.weights=w.pt")),
    "wespeaker": ("w/config.yaml", f"model: {YAML}", (*EXTRACT, "teacher=wespeaker", "teacher.weights=w")),
    "wespeaker, weights": ("w/avg_model.pt", torch_file(), (*EXTRACT, "teacher=wespeaker", "teacher.weights=w")),
    "speechbrain": (
        "w/hyperparams.yaml",
        f"a: {YAML}b: !new:os.mkdir [{MARK}new]\nc: !apply:os.mkdir [{MARK}apply]\nd: !include:/dev/zero\n",
        (*EXTRACT, "teacher=speechbrain", "teacher.weights=w"),
    ),
    "speechbrain, weights": (
        "w/embedding_model.ckpt",
        torch_file(),
        (*EXTRACT, "teacher=speechbrain", "teacher.weights=w"),
    ),
    "student.init": (
        "w.pt",
        torch_file(),
        ("train", "--loss", "aam", "cache=cache", "out=new", "student=xvector", "student.init=w.pt", *SMALL[3:]),
    ),
    "calibration": ("c.json", pickle.dumps(Marked()), ("eval", "--scores", "scores.txt", "calibration=c.json")),
    "report": ("evaluation/report.json", pickle.dumps(Marked()), ("report", "evaluation")),
    "state": (
        "run/state.json",
        pickle.dumps(Marked()),
        ("train", "--loss", "aam", "cache=cache", "out=run", *SMALL),
    ),
}


@pytest.fixture(scope="module")
def valid(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest, trials, scores, a cache, a student, and models of toolkits."""
    root = tmp_path_factory.mktemp("valid") / "folder"
    shutil.copytree(corpus, root)
    running = processes.spkd("extract", "teacher=none", "manifest=manifest.csv", "cache=cache", cwd=root)
    running.communicate()
    assert running.returncode == 0
    (root / "w").mkdir()
    (root / "w" / "config.yaml").write_text("model: ResNet18\nmodel_args: {feat_dim: 80, embed_dim: 12}\n")
    (root / "w" / "hyperparams.yaml").write_text("sample_rate: 16000\n")
    network = build("tiny", channels=8, embedding=6).eval()
    for name in ("avg_model.pt", "embedding_model.ckpt"):
        torch.save(network.state_dict(), root / "w" / name)
    save_student(root / "student", Checkpoint(network))
    (root / "scores.txt").write_text("a b 0.5 1\nc d 0.1 0\n")
    return root


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_a_file_holds_is_not_run(
    spkd: Callable, valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, content, command = PAYLOADS[name]
    shutil.copytree(valid, tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("cache/plan/0.bin").unlink()  # which would stand for the plan
    done = spkd(*command)
    assert not marks(tmp_path)
    assert done.code in (1, 2), done.out
    assert done.err.startswith("error: ")
    assert Path(path).parts[0] in done.err  # it was read
    assert done.err.count("\n") == 1
