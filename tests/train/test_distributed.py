"""Ranks that share a run come to what one process does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spkd.corpus.manifest import Manifest
from spkd.errors import UsageError
from spkd.registry import LOSSES
from spkd.students import load_student
from spkd.train.checks import check_ranks
from spkd.train.distributed import ProcessGroup, is_of_connection, ranks_of
from spkd.train.settings import TrainConfig
from tests.conftest import save_teacher
from tests.processes import ON_LOOPBACK, SERVER, Running, apart, command, free_port, lose, machines
from tests.train.ranks import (
    NORMALISED,
    environment,
    join,
    steps,
    train_elsewhere,
    values_of,
    wait_for_the_first,
)

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=8", "crop=0.6", "device=cpu"]
DINO = ["loss.memo.locals=1", "loss.memo.local_crop=0.4", "loss.memo.prototypes=32"]
DINO += ["loss.memo.hidden=16", "loss.memo.bottleneck=8"]
MEMO = [*DINO, "loss=memo", "loss.memo.partner=tiny", "loss.memo.partner_channels=8"]
SSL = ["loss=one-step", "loss.one_step.targets=[frames]"]
SSL += ["student=ssl", "student.ssl.layers=1", "student.ssl.adapters=4"]
PARTLY = "cache=partly"  # of its utterances 4 in 18 have a speaker
RUNS = {
    "contrastive": ["loss=contrastive", "mining.negatives=2"],
    "contrastive and aam, partly labelled": ["loss=[contrastive,aam]", PARTLY],
    "ntxent": ["loss=ntxent"],
    "ntxent with positives": ["loss=ntxent", "mining.positives=3", "mining.floor=-1"],
    "relational, cosine, mse": ["loss=[relational,cosine,mse]", "accumulate=2"],
    "kld": ["loss=kld"],
    "kld, partly labelled": ["loss=kld", PARTLY],
    "nontarget": ["loss=nontarget", "loss.nontarget.logits=prototypes"],
    "trkd": ["loss=trkd"],
    "multilevel": [
        "loss=multilevel",
        "loss.multilevel.levels={frames: frames, embedding: embedding}",
        *("loss.multilevel.concat=[embedding]", "student=ecapa"),
    ],
    "codebook": ["loss=codebook", "cache=coded", "loss.codebook.levels={frames: frames, embedding: embedding}"],
    "aam, divided": ["loss=aam", "loss.aam.sharded=true"],
    "aam, divided, partly labelled": ["loss=aam", "loss.aam.sharded=true", "loss.aam.subcentres=3", PARTLY],
    "one-step": SSL,
    "one-step, softmax": [*SSL, "loss.one_step.classifier=softmax"],
    "one-step, divided": [*SSL, "loss.one_step.aam.sharded=true"],
    "memo": MEMO,
    "memo with a teacher": [*MEMO, "loss.memo.teacher_weight=1", "mining.negatives=2"],
    "dino and contrastive": [*DINO, "loss=[memo,contrastive]", "loss.memo.partner=none", "mining.positives=2"],
    "nested": [
        "loss=[contrastive,aam,ntxent,kld,multilevel]",
        "loss.multilevel.levels={frames: frames, embedding: embedding}",
        *("student.nested=[2,4,8]", "mining.negatives=2"),
    ],
    "nested, short crops, divided": [
        *("loss=[cosine,aam]", "loss.aam.sharded=true", "student.nested=[4,8]", "student.nested_crops=[0.3,0.6]"),
        *("seed=1", "accumulate=2"),
    ],
    "2-d": ["loss=cosine", "student=resnet34", "student.channels=8"],
}
MAIN = "from spkd.cli import main; main()"


@pytest.fixture
def cached(spkd: Callable, corpus: Path, tmp_path: Path) -> Callable:
    """cache, of all speakers; the function that extracts others."""
    classes = [f"spk{s}{speed}" for s in range(6) for speed in ("@0.90", "")]
    save_teacher(tmp_path / "teacher", 12, classes, 9.0)

    def extract(manifest: str, cache: str, *settings: str) -> None:
        given = ["teacher=checkpoint", "teacher.weights=teacher", "fbank=true", "wave=true", "view.speeds=[0.9,1.0]"]
        targets = "teacher.targets=[embedding,frames,logits]"
        spkd("extract", *given, targets, f"manifest={manifest}", f"cache={cache}", *settings).ok()

    extract(str(corpus / "manifest.csv"), "cache")
    return extract


def last_of(keys: list[str]) -> list[str]:
    """Of keys that are given several times the last."""
    return list({key.partition("=")[0]: key for key in keys}.values())


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients of a step in one vector."""
    return torch.cat([value.float().flatten() for key, value in found.items() if key.startswith("gradient.")])


@pytest.mark.slow
def test_two_ranks_are_one_process_for_every_loss(cached: Callable, corpus: Path, tmp_path: Path) -> None:
    """In float32 up to rounding. In half precision two ranks may be no further from one process than the type is from
    float32: another shape of a batch rounds other sums."""
    assert set(LOSSES) <= {loss for keys in RUNS.values() for loss in re.findall(r"[\w-]+", " ".join(keys))}
    every = Manifest.load(corpus / "manifest.csv").utterances
    some = [replace(utterance, speaker=None) if i % 5 else utterance for i, utterance in enumerate(every)]
    Manifest(tuple(some)).save("partly.csv")
    cached("partly.csv", "partly")
    cached(str(corpus / "manifest.csv"), "coded", "storage.codecs={frames: rq4x4, embedding: lsq4x2}")
    runs = {name: last_of([*SMALL, "optim.clip=0", *keys]) for name, keys in RUNS.items()}
    (alone,), ranks = (steps(world, runs, ["fp32", "bf16", "fp16"], tmp_path / f"of{world}") for world in (1, 2))
    for name, one in alone.items():
        run, precision = name.rsplit(", ", 1)
        first, second = (rank[name] for rank in ranks)
        assert one.keys() == first.keys()
        assert all(torch.equal(first[key], second[key]) for key in one if not key.startswith("term.")), name
        exact = flat(alone[f"{run}, fp32"])
        # Of a ReLU whose input is 0 but for rounding, the gradient may be 1 or 0: of one value of a few channels, that
        # is some thousandths of the gradient of `2-d`.
        near = 1e-2 if run == "2-d" else 1e-3
        allowed = near * exact.norm() if precision == "fp32" else (flat(one) - exact).norm()
        assert (flat(first) - flat(one)).norm() < allowed, name
        for key, expected in one.items() if precision == "fp32" else ():
            value = first[key]
            if key.startswith("term."):
                value = (value + second[key]) / 2
            # Some gradients are zero but for rounding: of a bias before a batch-norm, or of one that adds the same to
            # all logits of a softmax. Those of biases before the pooling are small differences of large sums.
            most = near * exact.abs().max() if key.startswith("gradient.") else 1e-5 * expected.abs().max()
            assert (value - expected).abs().max() <= most, (name, key)
    # As torch.nn.SyncBatchNorm: the batch-norm of the whole batch, in float32, rounded once.
    joined = {key: torch.cat([rank["batch-norm"][key] for rank in ranks]) for key in ranks[0]["batch-norm"]}
    for kind, shape in NORMALISED:
        for type_ in (torch.float32, torch.bfloat16, torch.float16):
            norm, name = kind(shape[1]), f"{kind.__name__} {type_}"
            expected = norm(values_of(kind, shape, type_).float()).detach()
            step = torch.finfo(type_).eps if type_ is not torch.float32 else 1e-5
            assert joined[name].dtype == type_
            assert torch.allclose(joined[name].float(), expected, rtol=step, atol=1e-5), name
            for kept, statistic in (("mean", norm.running_mean), ("var", norm.running_var)):
                assert torch.allclose(ranks[0]["batch-norm"][f"{name} {kept}"], statistic, rtol=1e-5), (name, kept)


def torchrun(arguments: list[str], tmp_path: Path) -> subprocess.Popen:
    (tmp_path / "main.py").write_text(MAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command, piped = [*launcher, "train", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=piped, stderr=piped, text=True)


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_two_ranks_of_torchrun_train_one_student_and_continue_exactly(tmp_path: Path) -> None:
    arguments = ["--loss", "contrastive", *SMALL, "steps=40", "save_every=10"]
    out, error = torchrun([*arguments, "out=whole"], tmp_path).communicate(timeout=120)
    assert (tmp_path / "whole" / "model.safetensors").is_file(), error
    assert out.count("parameters; mean of the last steps") == 1
    running = torchrun([*arguments, "out=cut"], tmp_path)
    while not (tmp_path / "cut" / "state.json").is_file():
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = running.communicate(timeout=120)
    assert running.returncode
    assert "Traceback" not in "".join(line for line in error.splitlines() if line.startswith("error:"))
    torchrun([*arguments, "out=cut"], tmp_path).communicate(timeout=120)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [0, 20]
    assert load_student(tmp_path / "whole").training.steps == 40


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("network", [partial(nullcontext, ON_LOOPBACK), apart], ids=["loopback", "apart"])
def test_two_machines_train_one_student_and_one_may_be_lost(tmp_path: Path, network: Callable) -> None:
    """As two ranks of one machine do. The rank that stays ends with advice, and the same commands continue."""
    arguments, port = ["train", "--loss", "contrastive", *SMALL, "steps=40", "save_every=10"], free_port()
    ranks = [Running(command, *arguments, "out=whole", env=environment(number, 2, port)) for number in range(2)]
    for rank in ranks:
        _, error = rank.communicate(timeout=300)
        assert rank.returncode == 0, error
    with network() as joined:
        first, second = machines(joined, *arguments, "out=lost")
        while not (tmp_path / "lost" / "state.json").is_file():
            time.sleep(0.01)
            assert first.poll() is None, first.communicate()
        lose(second)
        _, error = first.communicate(timeout=300)
        assert "error: another rank has ended; start the same command again" in error
        assert first.returncode
        for machine in machines(joined, *arguments, "out=lost"):
            _, error = machine.communicate(timeout=300)
            assert machine.returncode == 0, error
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "lost" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_divided_classes_are_one_classifier_on_disk(spkd: Callable, tmp_path: Path) -> None:
    """Saved by two ranks, finished by one process, and the other way round: as if never divided."""

    def run(ranks: int, out: str, *more: str) -> None:
        given = [*arguments, f"out={out}", *more, *(["loss.aam.sharded=true"] if ranks > 1 else [])]
        error = spkd("train", *given).err if ranks == 1 else torchrun(given, tmp_path).communicate(timeout=120)[1]
        assert (tmp_path / out / "model.safetensors").is_file(), error

    arguments = ["--loss", "aam", *SMALL, "save_every=4", "optim.clip=0.5"]
    arguments += ["optim.schedule=constant", "optim.warmup=0"]
    for name, first, then in (("a", 2, 1), ("b", 1, 2)):
        run(first, name, "steps=8")
        run(then, name, "steps=12")
    a, b = (load_student(tmp_path / name) for name in "ab")
    assert a.classes == b.classes
    assert a.training.steps == b.training.steps == 12
    assert a.head is not None
    assert b.head is not None
    assert a.head.shape == (len(a.classes), 8)
    assert torch.cosine_similarity(a.head, b.head).min() > 0.999


@pytest.mark.parametrize("size", [7, 2])
def test_what_cannot_be_divided_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="of all ranks together, so a multiple of 2"):
        check_ranks(ProcessGroup(0, 2), TrainConfig(batch_size=size))


@pytest.mark.parametrize("changed", [{"RANK": None}, {"RANK": "x"}, {"MASTER_ADDR": None}, {"MASTER_PORT": "x"}])
def test_ranks_that_do_not_know_how_to_meet_are_refused(
    changed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | changed
    for name, value in given.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="start them with torchrun"), ranks_of(torch.device("cpu")):
        pass


@pytest.mark.usefixtures("cached")
def test_tasks_of_srun_do_not_train_one_beside_the_other(spkd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    done = spkd("train", "loss=cosine", *SMALL, "steps=1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: srun starts this command in 2 tasks, and each would train the student alone; ")
    assert not Path("student").exists()
    # One task of a job of several; the shell of sbatch, which is in no step.
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    spkd("train", "loss=cosine", *SMALL, "steps=1", "out=one").ok()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    spkd("train", "loss=cosine", *SMALL, "steps=1", "out=batch").ok()


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_waits_for_others_can_be_interrupted(tmp_path: Path, number: int) -> None:
    """The first waits for another one that never comes, and another one for a first that never answers."""
    given = ["train", "loss=cosine", *SMALL, "steps=1"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        port = silent.getsockname()[1] if number else free_port()
        running = Running(command, *given, cwd=tmp_path, env=environment(number, 2, port))
        if number:
            silent.accept()
        else:
            wait_for_a_server(port)
        running.send_signal(signal.SIGTERM)
        _, error = running.communicate(20)
    assert (running.returncode, error.count("\n")) == (130, 1)
    assert error.startswith("error: interrupted;")


def wait_for_a_server(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_ranks_wait_for_the_first() -> None:
    store, happened = dist.HashStore(), []

    def rank(number: int) -> None:
        ranks = ProcessGroup(number, 2, store)
        for _ in range(2):
            with ranks.first_alone():
                if ranks.is_first:
                    time.sleep(0.2)
                    happened.append("done")
            happened.append("goes on")
            assert ranks.exchanged(f"text {number}") == ["text 0", "text 1"]
        with pytest.raises(ValueError if ranks.is_first else RuntimeError):
            fail(ranks)

    def fail(ranks: ProcessGroup) -> None:
        with ranks.first_alone():
            if ranks.is_first:
                raise ValueError("damaged")

    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(rank, number) for number in (0, 1)]:
            ended.result()
    assert happened == ["done", "goes on", "goes on"] * 2


@pytest.mark.slow
def test_ranks_wait_for_the_first_longer_than_a_collective_operation_lasts(tmp_path: Path) -> None:
    """Mining and validation are the first rank's alone, and may take hours."""
    mp.start_processes(
        wait_for_the_first, (free_port(), 3.0, str(tmp_path / "rank")), nprocs=2, start_method=SERVER.get_start_method()
    )
    assert [(tmp_path / f"rank.{number}").read_text() for number in (0, 1)] == ["7", "7"]
    failed = [(tmp_path / f"rank.{number}.failed").read_text() for number in (0, 1)]
    assert failed[0] == "damaged"
    assert is_of_connection(RuntimeError(failed[1]))
    assert (tmp_path / "rank.1.late").is_file()  # the same wait in a collective operation


@pytest.mark.usefixtures("cached")
def test_ranks_of_machines_that_share_no_folder_are_refused(tmp_path: Path) -> None:
    port, keys = free_port(), ["--loss", "cosine", *SMALL, "steps=2", f"cache={tmp_path / 'cache'}", "out=runs/student"]
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    ranks = [
        Running(train_elsewhere, *keys, cwd=tmp_path / folder, env=environment(number, 2, port))
        for number, folder in enumerate(("one", "other"))
    ]
    for rank in ranks:
        _, error = rank.communicate()
        assert rank.returncode == 1
        assert "runs/student: is another folder for 1 of 2 ranks (rank 1 on " in error
    assert not list(tmp_path.glob("one/*"))
    assert not list(tmp_path.glob("other/*"))


def test_ranks_of_other_runs_are_refused(cached: Callable, corpus: Path) -> None:
    """As machines with other settings files, environments or copies of the cache start them."""
    Manifest(Manifest.load(corpus / "manifest.csv").utterances[:12]).save("partly.csv")
    cached("partly.csv", "partly")
    keys = ["train", "--loss", "aam", *SMALL, "steps=2"]
    settings = ["optim.lr=0.01", "loss.aam.sharded=true", "save_every=7"]
    differing = ["optim.lr: 0.002 there, 0.01 now", "loss.aam.sharded: false there, true now"]
    differing += ["save_every: 500 there, 7 now"]
    for own, differences in ((settings, differing), ([PARTLY], ["fingerprints of cache: "])):
        port = free_port()
        ranks = [
            Running(command, *keys, *more, env=environment(number, 2, port)) for number, more in enumerate(([], own))
        ]
        for rank in ranks:
            _, error = rank.communicate()
            assert rank.returncode == 2, error
            assert "rank 1 has other settings or caches than the first (" in error
            assert all(difference in error for difference in differences)
    assert not Path("student").exists()


def test_ranks_on_devices_of_other_kinds_are_refused() -> None:
    """They would wait for each other in collective operations of two kinds."""
    port = free_port()
    ranks = [Running(join, kind, env=environment(number, 2, port)) for number, kind in enumerate(("cpu", "cuda"))]
    for rank in ranks:
        _, error = rank.communicate()
        assert "UsageError: device: the first rank has cpu, and rank 1 has cuda; name a device that all" in error
