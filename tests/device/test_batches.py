"""Batches on a pretended GPU: codes are decoded there, and constants are there from the beginning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spkd import config
from spkd.cache import Cache
from spkd.cache.codec import Coded, fit, make_codec
from spkd.device import sent
from spkd.outputs.head import Head
from spkd.registry import CODECS
from spkd.students import Checkpoint, build, save_student
from spkd.train import trainer
from spkd.train.loading import BatchLoader
from spkd.train.settings import TrainConfig
from spkd.train.step import Optimisation
from tests.conftest import CommandLine
from tests.device.pretended import GPU, NoWaits, gpu, real

NAMES = {"pqMx8": "pq4x8", "pqMx4": "pq4x4", "opqMx8": "opq4x8", "opqMx4": "opq4x4", "topkK": "topk3"}
NAMES |= {"rqMxB": "rq4x8", "lsqMxB": "lsq4x6"}
KEYS = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6", "device=cpu", "cache=c"]
KEYS += ["loss=[contrastive,kld]", "loss.kld.logits=prototypes", "mining.negatives=2", "class_means=true"]


@pytest.mark.parametrize("name", CODECS)
def test_codes_are_decoded_on_the_device(name: str) -> None:
    values = np.random.RandomState(0).randn(300, 16).astype(np.float32)
    codec = make_codec(NAMES.get(name, name), 16)
    fit("t", codec, values)
    stored = torch.from_numpy(codec.encode(values[:6])).unflatten(0, (2, 3))
    with gpu(waits=True):
        on_gpu = sent(stored, GPU)
        codec.decode(on_gpu)  # places the learnt parameters
        with NoWaits():
            decoded = codec.decode(on_gpu)
            if isinstance(codec, Coded):
                assert codec.codes(on_gpu).device == GPU
    assert (decoded.device, decoded.shape) == (GPU, (2, 3, 16))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_head_stays_on_the_device(kind: str) -> None:
    layer = (torch.randn(8, 6), torch.randn(8))
    head = Head(torch.randn(10, 8), list("abcde"), 9.0, kind, None if kind == "cosine" else torch.randn(10), layer)
    with gpu(waits=True):
        embedding = sent(torch.randn(3, 6), GPU)
        head.logits(embedding)
        with NoWaits():
            assert head.logits(embedding).device == GPU


@pytest.fixture
def cached(spkd: CommandLine, corpus: Path) -> None:
    torch.manual_seed(0)
    save_student(Path("t"), Checkpoint(build("tiny", channels=16, embedding=8).eval()))
    given = ["teacher=checkpoint", "teacher.weights=t", "fbank=true", "cache=c", "device=cpu"]
    spkd.once("c", "extract", *given, f"manifest={corpus / 'manifest.csv'}")


@pytest.mark.usefixtures("cached")
def test_constants_are_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "resolve", lambda name: torch.device("meta"))
    monkeypatch.setattr(trainer, "count_macs", lambda network: 0)  # it runs the network, which takes values
    run = trainer.build(trainer.checked(config.load(TrainConfig, KEYS, environ={})), Path("out"))
    tensors: list[Any] = [run.loader.class_means, run.task.logits and run.task.logits.prototypes]
    tensors += [run.optimisation.first_bad, *run.module.state_dict().values()]
    assert all(values.device.type == "meta" for values in tensors)
    assert not run.task.cache.members[0].pinned
    monkeypatch.setattr(trainer, "resolve", lambda name: torch.device("cuda"))
    # Prototypes are made, and then moved: on a machine without CUDA this ends there.
    monkeypatch.setattr(trainer, "teacher_logits", lambda *_: None)
    assert trainer.checked(config.load(TrainConfig, [*KEYS[:-4], "loss=mse"], environ={})).cache.members[0].pinned


@pytest.mark.usefixtures("cached")
def test_a_batch_of_a_run_reaches_its_step_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer.build(trainer.checked(config.load(TrainConfig, [*KEYS, "optim.lr=0.01"], environ={})), Path("out"))
    host, loader = run.loader.batches[0], run.loader
    assert loader.class_means is not None
    assert loader.logits is not None
    stored = Cache.stored

    def read(*given: Any) -> Any:
        with real():
            return stored(*given)

    monkeypatch.setattr(Cache, "stored", read)
    with gpu():
        run.module.to(GPU)
        logits = replace(loader.logits, prototypes=sent(loader.logits.prototypes, GPU))
        on_gpu: BatchLoader = replace(loader, logits=logits, class_means=sent(loader.class_means, GPU))
        batch = on_gpu.on_device(host.pin_memory(), 0, 0, GPU)
        assert batch.inputs.negatives is not None
        terms = Optimisation(run.config, run.module, GPU).step(0, [batch])
    assert all(term.device == GPU for term in terms.values())


@pytest.mark.usefixtures("cached")
def test_a_run_on_the_cpu_pins_no_memory_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer.build(trainer.checked(config.load(TrainConfig, KEYS, environ={})), Path("out"))
    empty = torch.empty

    def pin(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")  # as where others have filled the GPU

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "empty", lambda *a, **given: pin() if given.get("pin_memory") else empty(*a, **given))
    assert len(list(run.loader.batches_from(0, 2, run.config, run.device))) == 2
