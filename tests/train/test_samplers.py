from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spkd.cache import Cache, CacheSource
from spkd.corpus.manifest import Manifest
from spkd.errors import UsageError
from spkd.outputs.features import FBANK
from spkd.registry import SAMPLERS
from spkd.train.batches import BatchContent, CropPlan, InputSource, StepBatches, ViewOrder
from spkd.train.caches import open_caches
from spkd.train.labels import Groups, Labels
from spkd.train.mining import NONE, Neighbours
from spkd.train.samplers import SamplerContext, make_order
from spkd.train.settings import HardSettings, SamplerConfig, SharesSettings, SpeakersSettings
from tests.conftest import CommandLine, save_teacher


@pytest.fixture
def cache(spkd: CommandLine, corpus: Path) -> Cache:
    spkd.once("cache", "extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "view.speeds=[0.9,1.0]")
    return Cache.open("cache")


def ordered(
    cache: CacheSource, batch: int, seed: int = 0, name: str = "speakers", settings: Any = None
) -> Callable[[int], np.ndarray]:
    order = make_order(SamplerConfig(name, settings), SamplerContext(cache, batch, seed))
    assert order is not None
    return order


@pytest.mark.parametrize("settings", [{"name": "speakers"}, {"name": "lengths"}, {"settings": SpeakersSettings(3)}])
def test_orders_are_functions_of_seed_and_epoch(cache: Cache, settings: dict) -> None:
    one, again, other = (ordered(cache, 6, seed, **settings) for seed in (0, 0, 1))
    assert np.array_equal(one(1), again(1))
    assert not np.array_equal(one(0), one(1))
    assert not np.array_equal(one(0), other(0))


def test_batches_of_speakers_have_as_many_views_of_each(cache: Cache) -> None:
    order = ordered(cache, 6, settings=SpeakersSettings(3))(0)
    assert sorted(order.tolist()) == list(range(36))  # six views of each speaker: nothing to fill up
    for batch in order.reshape(-1, 6):
        assert np.bincount(cache.speaker(batch)).max() == 3
        assert np.array_equal(np.unique(cache.speaker(batch[:3])), cache.speaker(batch[:1]))
    filled = ordered(cache, 8, settings=SpeakersSettings(4))(0)
    assert len(filled) == 48
    assert set(filled.tolist()) == set(range(36))


def test_batches_of_lengths_are_cropped_to_their_shortest_view(cache: Cache) -> None:
    order = ordered(cache, 6, name="lengths")
    samples = cache.plan.views.samples
    spread = [np.ptp(samples[batch]) for batch in order(0).reshape(-1, 6)]
    assert np.mean(spread) < 0.5 * np.ptp(samples)
    content = BatchContent(cache, Labels.of(cache), InputSource(FBANK))
    batches = StepBatches(content, ViewOrder(order, 6), CropPlan((5.0,), to_shortest=True), 0)
    for step in range(6):
        shortest = samples[batches.order.views(step)].min()
        assert batches[step].crops[0]["fbank"].shape[1] == FBANK.num_frames(int(shortest) // 160 * 160)


def test_every_batch_has_its_share_of_each_corpus(spkd: Callable, corpus: Path) -> None:
    every = Manifest.load(corpus / "manifest.csv").utterances
    for name, some in (("a", every[:12]), ("b", every[12:])):
        Manifest(some).save(f"{name}.csv")
        spkd("extract", "teacher=none", f"manifest={name}.csv", f"cache={name}").ok()
    both = open_caches(["a", "b"])
    order = ordered(both, 4, name="shares", settings=SharesSettings([0.25, 0.75]))
    batches = order(0).reshape(-1, 4)
    assert len(batches) == 12  # one pass over the first corpus, six over the second
    assert ((batches < 12).sum(1) == 1).all()
    assert sorted(batches[:, 0].tolist()) == list(range(12))
    assert np.bincount(order(1)[order(1) >= 12], minlength=18)[12:].tolist() == [6] * 6
    for wrong in ([], [1.0], [0.5, 0.6], [0.01, 0.99]):
        with pytest.raises(UsageError, match=r"sampler\.shares"):
            ordered(both, 4, name="shares", settings=SharesSettings(wrong))


def test_hard_batches_are_views_and_their_neighbours(cache: Cache) -> None:
    labels = Labels.of(cache)
    instances = Groups.of(labels.instance, cache.usable_views)
    neighbours = np.stack([(np.arange(36) + 1) % 36, (np.arange(36) + 2) % 36], 1).astype(np.int32)
    neighbours[5] = NONE
    table = Neighbours(neighbours, instances)
    order = make_order(SamplerConfig("hard", HardSettings(3)), SamplerContext(cache, 6, 0, table))
    assert order is not None
    for lead, *others in order(0).reshape(-1, 3).tolist():
        own = instances.group[lead]
        if own != 5:
            assert {(int(instances.group[view]) - own) % 36 for view in others} <= {1, 2}
    assert len(order(0)) == 36


@pytest.mark.parametrize(
    "views",
    [4, 6],
)
def test_groups_that_do_not_fill_a_batch_are_refused(cache: Cache, views: int) -> None:
    with pytest.raises(UsageError, match="is no multiple"):
        ordered(cache, 6, settings=SpeakersSettings(views))


@pytest.mark.parametrize("sampler", ["speakers", "lengths", "hard"])
def test_every_sampler_trains_and_continues_exactly(spkd: Callable, extraction: list[str], sampler: str) -> None:
    save_teacher(Path("teacher"), 12)
    spkd(*extraction, "fbank=true", "view.speeds=[0.9,1.0]").ok()
    small = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6", f"sampler={sampler}"]
    small += ["optim.schedule=constant"]
    small += ["sampler.hard.group=2", "mining.neighbours=4"] if sampler == "hard" else []
    spkd("train", "--loss", "cosine", *small, "steps=9", "out=whole").ok()
    spkd("train", "--loss", "cosine", *small, "steps=5", "out=part").ok()
    spkd("train", "--loss", "cosine", *small, "steps=9", "out=part").ok()
    assert Path("whole/model.safetensors").read_bytes() == Path("part/model.safetensors").read_bytes()


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_order_is_the_same_in_processes_that_are_not_forked(
    spkd: Callable, cache: Cache, corpus: Path, sampler: str
) -> None:
    """It is sent to them by pickle."""
    source: CacheSource = cache
    if sampler == "shares":
        every = Manifest.load(corpus / "manifest.csv").utterances
        for name, some in (("a", every[:12]), ("b", every[12:])):
            Manifest(some).save(f"{name}.csv")
            spkd("extract", "teacher=none", f"manifest={name}.csv", f"cache={name}").ok()
        source = open_caches(["a", "b"])
    instances = Groups.of(Labels.of(cache).instance, cache.usable_views)
    table = Neighbours(np.arange(36, dtype=np.int32)[:, None] - 1, instances)
    settings = {"shares": SharesSettings([0.5, 0.5]), "speakers": SpeakersSettings(3), "hard": HardSettings(2)}
    config = SamplerConfig(sampler, settings.get(sampler))
    order = make_order(config, SamplerContext(source, 6, 0, table))
    there = pickle.loads(pickle.dumps(order))
    for epoch in (0, 1):
        assert np.array_equal(np.asarray(there(epoch)), np.asarray(order(epoch)))
