"""One cache filled by ranks of torchrun, by actors of Ray, and by a job array: the same cache comes out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spkd.cache import Cache
from spkd.extract.ranks import Rank
from spkd.students import Checkpoint, build, save_student

RUN = "from spkd.cli import main; main()"


@pytest.fixture
def keys(corpus: Path, tmp_path: Path) -> list[str]:
    save_student(tmp_path / "teacher", Checkpoint(build("xvector", channels=16, embedding=8).eval()))
    return [
        "teacher=checkpoint", "teacher.weights=teacher", "teacher.targets=[embedding,frames]",
        f"manifest={corpus / 'manifest.csv'}", "storage.unit_views=2", "view=crops:3,0.7", "view.noise=synthetic",
        "device=cpu",
    ]  # fmt: skip


def equal(one: str, other: str) -> bool:
    """Whether two caches hold the same, but for the rounding of another number of threads."""
    a, b = Cache.open(one), Cache.open(other)
    views = a.usable_views
    return a.fingerprint == b.fingerprint and all(
        np.allclose(a.ragged(views, name).values.float(), b.ragged(views, name).values.float(), rtol=2e-3, atol=2e-3)
        for name in a.targets
    )


def torchrun(*arguments: str) -> subprocess.Popen:
    script = Path("rank.py")
    script.write_text(RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", str(script)]
    return subprocess.Popen(
        [*launch, "extract", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_ranks_of_torchrun_make_the_same_cache(spkd: Callable, keys: list[str]) -> None:
    assert spkd("extract", *keys, "cache=alone").code == 0
    out, err = torchrun(*keys, "cache=both").communicate(timeout=120)
    assert "54 views by " in out, err
    assert out.count("complete") == 1
    assert equal("alone", "both")
    assert not Path("both/workers").exists()


def test_a_killed_rank_costs_its_uncommitted_unit_alone(spkd: Callable, keys: list[str]) -> None:
    assert spkd("extract", *keys, "cache=alone").code == 0
    running = torchrun(*keys, "cache=both")
    while not list(Path("both/commits").glob("*.json")) if Path("both/commits").is_dir() else True:
        time.sleep(0.01)
        assert running.poll() is None, running.stderr and running.stderr.read()
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[0]), signal.SIGKILL)
    running.wait(60)
    before = {p.name: p.read_bytes() for p in Path("both/commits").glob("*.json")}
    done = spkd("extract", *keys, "cache=both")
    assert done.code == 0, done.err
    assert all((Path("both/commits") / name).read_bytes() == data for name, data in before.items())
    assert equal("alone", "both")


@pytest.mark.slow
def test_actors_of_ray_make_the_same_cache(spkd: Callable, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    assert spkd("extract", *keys, "cache=alone").code == 0
    done = spkd("extract", *keys, "cache=many", "engine=ray", "processes=2")
    assert done.code == 0, done.err
    assert "2 actors" in done.out
    assert "54 views by " in done.out
    assert equal("alone", "many")


def test_a_job_array_for_slurm(spkd: Callable, keys: list[str], tmp_path: Path) -> None:
    done = spkd("extract", *keys, "cache=c", "processes=5", "workers=3", "--slurm-script")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=0-4" in lines
    assert "#SBATCH --cpus-per-task=4" in lines
    assert f"#SBATCH --chdir={tmp_path}" in lines
    assert not any("--gres" in line for line in lines)
    assert lines[-1].startswith("srun spkd extract teacher=checkpoint")
    assert "--slurm-script" not in lines[-1]
    assert "processes=" not in lines[-1]
    assert "'teacher.targets=[embedding,frames]'" in lines[-1]
    (tmp_path / "job.sh").write_text(done.out)
    assert subprocess.run(["bash", "-n", "job.sh"], check=False).returncode == 0
    assert "--gres=gpu:1" in spkd("extract", "--slurm-script").out
    assert "--gres" not in spkd("extract", "teacher=none", "--slurm-script").out
    assert "--gres=gpu:1" in spkd("extract", "teacher=none", "--also", "teacher=dvector cache=d", "--slurm-script").out
    assert "teacher=none runs no model" in spkd("extract", "teacher=none", "device=cpu", "--slurm-script").err


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, Rank(1, 4, "x")),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_JOB_ID": "7"}, Rank(2, 3, "7")),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_ARRAY_TASK_ID": "5"}, None),
        ({"RANK": "one", "WORLD_SIZE": "4"}, None),
    ],
)
def test_the_launcher_is_detected(environ: dict[str, str], rank: Rank | None) -> None:
    assert Rank.launched(environ) == rank
