"""`spkd doctor` over planted packages: modules that fail as they are imported, and metadata of other versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

import pytest

START = "from spkd.cli import main; main()"
# Needed by the command line itself, so that nothing runs without them.
OF_THE_COMMAND_LINE = {"typer", "rich", "pyyaml", "packaging", "spkd"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


def doctor(folder: Path, *arguments: str, **variables: str) -> Done:
    """The command, with the modules and metadata of a folder before those that are installed."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", START, "doctor", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def plant(folder: Path, name: str, version: str, files: Mapping[str, str]) -> None:
    """Install a package by hand: its files and its metadata."""
    for file, text in files.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def plant_all(folder: Path, text: str, **others: str) -> list[str]:
    """Every package that spkd itself needs, with one text as its module."""
    names = {line.partition(";")[0] for line in requires("spkd") or () if "extra ==" not in line}
    names = {name.rstrip("0123456789.,<>=!~ ") for name in names}
    assert {"torch", "numpy", "zarr"} <= names
    planted = sorted(name for name in names if name.lower() not in OF_THE_COMMAND_LINE)
    for name in planted:
        module = name.replace("-", "_")
        plant(folder, name, "99.1", {f"{module}/__init__.py": others.get(module, text)})
    return planted


def test_every_package_that_fails_is_named_and_nothing_is_a_traceback(tmp_path: Path) -> None:
    planted = plant_all(
        tmp_path,
        "print('a line of a package'); raise RuntimeError('planted, in /home/ann/lib')",
        h5py="import os; os.kill(os.getpid(), 11)",
        scipy="import sys; sys.exit(3)",
    )
    done = doctor(tmp_path, "--json", USER="ann")
    assert (done.code, done.err) == (1, "")
    found = json.loads(done.out)
    assert found["ok"] is False
    for name in planted:
        [problem] = [each for each in found["problems"] if each.startswith(f"{name} 99.1 cannot be imported")]
        reason = {"h5py": "SIGSEGV", "scipy": "SystemExit: 3"}.get(name, "RuntimeError: planted, in /home/USER/lib")
        assert reason in problem
        assert f'pip install --force-reinstall --no-deps "{name}==99.1"' in problem
    assert "/ann" not in done.out
    text = doctor(tmp_path)
    assert text.code == 1
    assert text.out.count("broken: ") == len(found["problems"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("transformers", "4.57.0", "transformers 4.57.0 is installed, and transformers>=5 is needed"),
        ("silero-vad", "6.2.2", "silero-vad 6.2.2 is installed, and silero-vad>=6.2.3 is needed"),
        ("torch", "2.10.0", "torch 2.10.0 is installed, and torch>=2.11 is needed"),
    ],
)
def test_versions_below_the_limits_of_the_project(tmp_path: Path, name: str, version: str, expected: str) -> None:
    plant_all(tmp_path, "")
    for info in tmp_path.glob(f"{name}-*.dist-info"):
        (info / "METADATA").unlink()
        (info / "RECORD").unlink()
        info.rmdir()
    plant(tmp_path, name, version, {f"{name.replace('-', '_')}/__init__.py": ""})
    problems = json.loads(doctor(tmp_path, "--json").out)["problems"]
    assert f'{expected}: pip install -U "{expected.split()[-3]}"' in problems


@pytest.mark.slow
def test_packages_that_do_not_go_together(tmp_path: Path) -> None:
    plant_all(tmp_path, "")
    (tmp_path / "torch-99.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    plant(tmp_path, "torchaudio", "2.11.1", {"torchaudio/__init__.py": ""})
    for name in ("faiss-cpu", "faiss-gpu"):
        plant(tmp_path, name, "1.14.2", {"faiss/__init__.py": ""})
    problems = json.loads(doctor(tmp_path, "--json").out)["problems"]
    assert (
        'torch 2.12.0 is installed beside torchaudio, and torch>=2.13 is needed: pip install -U "torch>=2.13"'
        in problems
    )
    [faiss] = [each for each in problems if each.startswith("faiss-cpu and faiss-gpu are installed")]
    assert "pip uninstall faiss-cpu faiss-gpu" in faiss


@pytest.mark.slow
def test_what_is_missing_is_named_with_what_uses_it_and_how_to_install_it(tmp_path: Path) -> None:
    """In an interpreter that sees spkd's metadata, and none of the packages of its extras."""
    code = (
        "import sys, importlib.metadata as m\n"
        "whole = m.distribution\n"
        "def found(name):\n"
        "    hidden = ('transformers', 'litert-torch', 'ray', 'av', 'faiss-cpu', 'faiss-gpu')\n"
        "    if name.lower() in hidden: raise m.PackageNotFoundError(name)\n"
        "    return whole(name)\n"
        "m.distribution = found\n"
        "every = m.distributions\n"
        "m.distributions = lambda: [d for d in every() if not (d.name or '').startswith('faiss')]\n" + START
    )
    plant_all(tmp_path, "")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, "doctor", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    missing = json.loads(done.stdout)["missing"]
    assert missing["teachers"]["install"] == 'pip install "spkd[teachers]"'
    assert {"teacher=wavlm", "teacher=w2v-bert"} <= set(missing["teachers"]["used_by"])
    assert missing["litert"]["used_by"] == ["to=litert"]
    assert missing["ray"]["used_by"] == ["engine=ray"]
    assert "m4a" in missing["codecs"]["used_by"][0]
    has_driver = Path("/proc/driver/nvidia/version").is_file()  # each brings the same module: one is offered
    assert ("gpu" in missing, "cpu" in missing) == (has_driver, not has_driver)


@pytest.mark.slow
def test_this_environment_works(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json")
    found = json.loads(done.out)
    assert (done.code, found["ok"], found["problems"]) == (0, True, [])
    assert found["devices"][0] == "cpu"
    assert 1 <= found["machine"]["cores"]["usable"] <= os.cpu_count()
    assert {"a product of matrices on each device", "locks on files in the current folder"} <= set(found["works"])
    assert list(tmp_path.iterdir()) == []
