"""Cores that may be used: affinity, quotas of control groups, and what the command line makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spkd import cores
from tests.processes import half_a_core


def written(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/job/step\n", {"job/cpu.max": "50000 100000\n", "job/step/cpu.max": "max 100000\n"}, 1),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2),  # a container that sees its own group as the root
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000", "cpu,cpuacct/a/cpu.cfs_period_us": "50000"},
            8,
        ),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 32),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 32),
        ("9:memory:/a\n", {"memory/a/cpu.max": "100000 100000"}, 32),
    ],
)
def test_a_quota_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], expected: int
) -> None:
    written(tmp_path, {"own": own})
    written(tmp_path / "groups", files)
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setattr(cores, "CORES", tmp_path / "cores")
    assert cores.usable() == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == (None if expected == 32 else str(expected))


def give_cores(monkeypatch: pytest.MonkeyPatch, count: int, of_task: str) -> None:
    """Let this process run on so many cores, of which a task of Slurm may use some."""
    monkeypatch.setattr(cores, "_by_quota", lambda: cores.NO_QUOTA)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", of_task)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(("of_task", "expected"), [("4", 4), ("64", 32), ("", 32), ("0", 32)])
def test_a_task_of_slurm_uses_its_cores(monkeypatch: pytest.MonkeyPatch, of_task: str, expected: int) -> None:
    """Where the cluster lets every task of a job run on all cores of the job."""
    give_cores(monkeypatch, 32, of_task)
    assert cores.usable() == expected
    cores.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == (None if expected == 32 else str(expected))


@pytest.mark.parametrize(("of_task", "threads"), [("3", "3"), ("4", None), ("6", None), ("8", None)])
def test_threads_are_as_many_as_the_cores_of_hardware_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_task: str, threads: str | None
) -> None:
    """On four cores of two threads each, of which torch takes four by itself."""
    for core in range(8):
        written(tmp_path, {f"cpu{core}/topology/thread_siblings_list": f"{core % 4},{core % 4 + 4}\n"})
    monkeypatch.setattr(cores, "CORES", tmp_path)
    give_cores(monkeypatch, 8, of_task)
    cores.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(("of_task", "threads"), [("5", "5"), ("7", "7"), ("8", None)])
def test_a_share_of_more_than_half_limits_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_task: str, threads: str | None
) -> None:
    """On eight cores of one thread each, of which torch takes eight."""
    monkeypatch.setattr(cores, "CORES", tmp_path)
    give_cores(monkeypatch, 8, of_task)
    cores.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_without_affinity_and_groups_as_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.usable() == os.cpu_count()


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_by_quota", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, value in (("OMP_NUM_THREADS", "5"), ("GOMP_SPINCOUNT", "7")):
        monkeypatch.setenv(name, value)
    cores.limit_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["GOMP_SPINCOUNT"]) == ("5", "7")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cores.limit_threads()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.slow
def test_torch_has_as_many_threads_as_its_control_group_has_cores() -> None:
    """The numbers of the kernel: a process of half a core, on a machine of several, as the command line starts it."""
    code = """
from spkd import cores
cores._of_hardware = lambda: 8
cores.limit_threads()
import torch
print(cores.usable(), torch.get_num_threads())
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    with half_a_core() as group:
        if group is None:
            pytest.skip("control groups cannot be made here")
        entered = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        done = subprocess.run(
            [*entered, sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    assert (done.stdout, done.returncode) == ("1 1\n", 0), done.stderr
