"""One cache filled by ranks of torchrun, by actors of Ray, and by a job array: the same cache comes out."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spkd.cache import Cache
from spkd.device import resolve
from spkd.errors import SpkdError
from spkd.extract.ranks import Rank, Work, merged
from tests.conftest import save_teacher
from tests.processes import ON_LOOPBACK, apart, free_port, lose, machines

RUN = "from spkd.cli import main; main()"


@pytest.fixture
def keys(corpus: Path, tmp_path: Path) -> list[str]:
    save_teacher(tmp_path / "teacher")
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


def test_the_work_of_ranks_goes_without_the_files_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "workers"
    Work("run", 1, 5, 0.1, 2.0, 0.5).save(tmp_path)
    (folder / "thesis.json").write_text("{}")
    assert [work.views for work in merged(tmp_path, "run")] == [5]
    assert [path.name for path in folder.iterdir()] == ["thesis.json"]
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(SpkdError, match="workers: a symbolic link"):
        Work("run", 1, 5, 0.1, 2.0, 0.5).save(tmp_path)


@pytest.mark.slow
def test_ranks_of_torchrun_make_the_same_cache(spkd: Callable, keys: list[str]) -> None:
    spkd("extract", *keys, "cache=alone").ok()
    out, err = torchrun(*keys, "cache=both").communicate(timeout=120)
    assert "54 views by " in out, err
    assert out.count("complete") == 1
    assert equal("alone", "both")
    assert not Path("both/workers").exists()


@pytest.mark.slow
def test_a_killed_rank_costs_its_uncommitted_unit_alone(spkd: Callable, keys: list[str]) -> None:
    spkd("extract", *keys, "cache=alone").ok()
    running = torchrun(*keys, "cache=both")
    while not list(Path("both/commits").glob("*.json")) if Path("both/commits").is_dir() else True:
        time.sleep(0.01)
        assert running.poll() is None, running.stderr and running.stderr.read()
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[0]), signal.SIGKILL)
    running.wait(60)
    before = {p.name: p.read_bytes() for p in Path("both/commits").glob("*.json")}
    spkd("extract", *keys, "cache=both").ok()
    assert all((Path("both/commits") / name).read_bytes() == data for name, data in before.items())
    assert equal("alone", "both")


@pytest.mark.slow
def test_two_machines_make_the_same_cache_and_one_may_be_lost(spkd: Callable, keys: list[str]) -> None:
    """The other takes over what it had not committed; the same commands find nothing left to do."""
    spkd("extract", *keys, "cache=alone").ok()
    first, second = machines(ON_LOOPBACK, "extract", *keys, "cache=mended")
    while not list(Path("mended").glob("commits/*.json")):
        time.sleep(0.01)
        assert first.poll() is None, first.communicate()
    lose(first)
    assert second.wait(timeout=300) == 0, second.communicate()
    assert equal("alone", "mended")
    before = {path: path.stat().st_mtime_ns for path in Path("mended").glob("commits/*.json")}
    for machine in machines(ON_LOOPBACK, "extract", *keys, "cache=mended"):
        assert machine.wait(timeout=300) == 0, machine.communicate()
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_actors_of_ray_make_the_same_cache(spkd: Callable, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    spkd("extract", *keys, "cache=alone").ok()
    done = spkd("extract", *keys, "cache=many", "engine=ray", "processes=2").ok()
    assert "2 actors" in done.out
    assert "54 views by " in done.out
    assert equal("alone", "many")


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two raylets, as of two machines, each with a CPU."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    for name, value in (("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"), ("RAY_raylet_start_wait_time_s", "300")):
        monkeypatch.setenv(name, value)
    each = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=each)
    try:
        cluster.second = cluster.add_node(**each)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_two_raylets_make_the_same_cache_and_one_may_be_lost(spkd: Callable, keys: list[str], raylets: Any) -> None:
    """With more actors than places: the third, and the one of the lost raylet, wait for a place."""

    def by_ray(cache: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RUN, "extract", *keys, f"cache={cache}", "engine=ray", "processes=3"]
        environment = os.environ | {"RAY_ADDRESS": raylets.address}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    spkd("extract", *keys, "cache=alone").ok()
    out, err = by_ray("both").communicate(timeout=300)
    assert "3 actors, each with one CPU" in out, err
    assert "54 views by " in out  # on a fast machine, of one actor alone
    assert equal("alone", "both")
    running = by_ray("mended")
    while not list(Path("mended").glob("commits/*.json")):
        time.sleep(0.01)
        assert running.poll() is None, running.communicate()
    raylets.remove_node(raylets.second, allow_graceful=False)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert equal("alone", "mended")


@pytest.mark.slow
def test_two_machines_with_networks_of_their_own_make_the_same_cache(spkd: Callable, keys: list[str]) -> None:
    """By torchrun, and by the actors of a Ray cluster."""
    pytest.importorskip("ray")
    spkd("extract", *keys, "cache=alone").ok()
    raylet = (str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1")
    with apart() as (head, other), contextlib.ExitStack() as stack:
        for machine in machines((head, other), "extract", *keys, "cache=both"):
            assert machine.wait(timeout=300) == 0, machine.communicate()
        port = free_port()
        variables = {"RAY_ADDRESS": f"{head.address}:{port}", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        for machine, more in (
            (head, ("--head", f"--port={port}", "--include-dashboard=false")),
            (other, (f"--address={head.address}:{port}",)),
        ):
            store = "--object-store-memory=80000000"
            started = machine.start(*raylet, store, f"--node-ip-address={machine.address}", *more)
            stack.callback(started.communicate)
            stack.callback(started.terminate)
        driver = head._replace(variables={**head.variables, **variables})
        given = ["extract", *keys, "cache=by-ray", "engine=ray", "processes=2"]
        out, err = driver.start(sys.executable, "-c", RUN, *given).communicate(timeout=300)
        assert "2 actors, each with one CPU" in out, err
    assert equal("alone", "both")
    assert equal("alone", "by-ray")


def test_a_job_array_for_slurm(spkd: Callable, keys: list[str], tmp_path: Path) -> None:
    done = spkd("extract", *keys, "cache=c", "processes=5", "workers=3", "--slurm-script").ok()
    lines = done.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=0-4" in lines
    assert "#SBATCH --cpus-per-task=4" in lines
    assert f"#SBATCH --chdir={tmp_path}" in lines
    assert not any("--gres" in line for line in lines)
    assert lines[-1].startswith('srun --cpus-per-task="$SLURM_CPUS_PER_TASK" spkd extract teacher=checkpoint')
    assert "--slurm-script" not in lines[-1]
    assert "processes=" not in lines[-1]
    assert "'teacher.targets=[embedding,frames]'" in lines[-1]
    (tmp_path / "job.sh").write_text(done.out)
    assert subprocess.run(["bash", "-n", "job.sh"], check=False).returncode == 0
    assert "--gres=gpu:1" in spkd("extract", "--slurm-script").out
    assert "--gres" not in spkd("extract", "teacher=none", "--slurm-script").out
    assert "--gres=gpu:1" in spkd("extract", "teacher=none", "--also", "teacher=dvector cache=d", "--slurm-script").out
    assert "teacher=none runs no model" in spkd("extract", "teacher=none", "device=cpu", "--slurm-script").err
    done = spkd("extract", "manifest=https://bob:hunter2@host/m.csv", "teacher=none", "--slurm-script")
    assert (done.code, done.out, "hunter2" in done.err) == (2, "", False)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("device=cuda:3", "device=cuda:3: a task has one GPU of those of its machine, which Slurm chooses; "),
        ("device=mps", "device=mps: a task has one GPU of those of its machine, which Slurm chooses; "),
        ("engine=ray", "engine=ray starts actors of its own; tasks share the cache without it"),
    ],
)
def test_what_no_task_of_a_job_array_can_do_is_refused(spkd: Callable, keys: list[str], key: str, reason: str) -> None:
    done = spkd("extract", *keys, "cache=c", key, "--slurm-script")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"error: --slurm-script: {reason}")


def test_a_job_array_in_a_folder_of_any_name(
    spkd: Callable, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b'; touch $(touch ran) #"
    (folder / "bin").mkdir(parents=True)
    monkeypatch.chdir(folder)
    name = "cache=it's; touch ran $(touch ran)"
    done = spkd("extract", *keys, name, "--slurm-script").ok()
    assert shlex.split(next(line for line in done.out.splitlines() if "--chdir" in line)[len("#SBATCH ") :]) == [
        f"--chdir={folder}"
    ]
    Path("bin/srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > given\n')
    Path("bin/srun").chmod(0o755)
    Path("job.sh").write_text(done.out)
    environ = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3"}  # as sbatch sets it
    subprocess.run(["bash", "job.sh"], env=environ, check=True)
    assert Path("given").read_text().splitlines() == ["--cpus-per-task=3", "spkd", "extract", *keys, name]
    assert not Path("ran").exists()
    done = spkd("extract", *keys, "cache=a\n#SBATCH --x", "--slurm-script")
    assert (done.code, "has line ends or control characters" in done.err) == (2, True)
    folder = tmp_path / "a\ntouch ran\n#"
    folder.mkdir()
    monkeypatch.chdir(folder)
    done = spkd("extract", *keys, "--slurm-script")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


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


@pytest.mark.parametrize(
    ("environ", "visible", "numbers"),
    [
        ({}, 8, [None]),
        ({"SLURM_LOCALID": "{}"}, 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # srun -n 8 on one node
        ({"SLURM_LOCALID": "{}"}, 1, [0, 0, 0]),  # srun --gpus-per-task=1: each task sees its own alone
        ({"SLURM_LOCALID": "{}"}, 2, [0, 1, 0, 1]),  # more tasks than GPUs
        ({"SLURM_LOCALID": "0", "LOCAL_RANK": "{}"}, 4, [0, 1, 2, 3]),  # srun torchrun
        ({"SLURM_LOCALID": ""}, 4, [None]),
    ],
)
def test_every_process_of_a_launcher_takes_its_own_gpu(
    environ: dict[str, str], visible: int, numbers: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for place, number in enumerate(numbers):
        for name, value in environ.items():
            monkeypatch.setenv(name, value.format(place))
        assert resolve("auto") == resolve("cuda") == torch.device("cuda" if number is None else f"cuda:{number}")
        assert resolve("cuda:0") == torch.device("cuda:0")
        assert resolve("cpu") == torch.device("cpu")
