from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spkd.cache import Cache, Crop
from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest
from spkd.corpus.view import ViewPlan
from spkd.outputs.features import FBANK, WAVE
from spkd.train.batches import BatchContent, CropPlan, InputSource, StepBatches, ViewOrder
from spkd.train.labels import Labels
from spkd.train.samplers import shuffled_views
from spkd.train.specaugment import mask
from tests.conftest import CommandLine


@pytest.fixture
def cache(spkd: CommandLine, corpus: Path) -> Cache:
    spkd.once(
        "cache",
        "extract",
        "teacher=none",
        f"manifest={corpus / 'manifest.csv'}",
        "view.speeds=[0.9,1.0]",
        "view.noise=synthetic",
        "storage.codec=float32",
    )
    return Cache.open("cache")


def of(cache: Cache, source: InputSource, crops: tuple[float, ...], size: int, seed: int) -> StepBatches:
    """Batches of all views, shuffled."""
    content = BatchContent(cache, Labels.of(cache), source)
    return StepBatches(content, ViewOrder(shuffled_views(cache, seed), size), CropPlan(crops), seed)


def test_a_speaker_at_another_speed_is_another_class(cache: Cache) -> None:
    labels = Labels.of(cache)
    assert labels.names[:4] == ["spk0@0.90", "spk0", "spk1@0.90", "spk1"]
    assert list(labels.label) == [0, 1] * 3 + [2, 3] * 3 + [4, 5] * 3 + [6, 7] * 3 + [8, 9] * 3 + [10, 11] * 3
    assert len(np.unique(labels.instance)) == 36


def test_a_speaker_with_other_formants_is_another_class(spkd: Callable, corpus: Path) -> None:
    given = ["teacher=none", f"manifest={corpus / 'manifest.csv'}", "view.speeds=[0.9,1.0]", "view.formants=[1.0,1.1]"]
    spkd("extract", *given).ok()
    labels = Labels.of(Cache.open("cache"))
    assert labels.names[:4] == ["spk0@0.90", "spk0@0.90,1.10", "spk0", "spk0@1.00,1.10"]
    assert labels.label[:12].tolist() == [0, 1, 2, 3] * 3
    assert len(np.unique(labels.instance)) == 72


def test_every_epoch_sees_every_view_once_in_its_own_order(cache: Cache) -> None:
    steps = of(cache, InputSource(FBANK), (0.5,), 6, 3).order
    epochs = [np.concatenate([steps.views(e * 6 + i) for i in range(6)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(36)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert np.array_equal(steps.views(8), of(cache, InputSource(FBANK), (0.5,), 6, 3).order.views(8))


def test_cached_features_are_those_of_the_audio(cache: Cache, corpus: Path) -> None:
    manifest = Manifest.load(corpus / "manifest.csv")
    plan = ViewPlan.from_card(cache.card.views, None, None)
    loader = ViewLoader(manifest, cache.plan.views, plan)
    for crop in (0.5, 1.6):  # 1.6 s: longer than some views
        cached = of(cache, InputSource(FBANK), (crop,), 9, 0)[4]
        loaded = of(cache, InputSource(FBANK, loader), (crop,), 9, 0)[4]
        assert cached.crops[0]["fbank"].shape == loaded.crops[0]["fbank"].shape
        assert torch.allclose(cached.crops[0]["fbank"], loaded.crops[0]["fbank"], atol=1e-3)
        assert torch.equal(cached.label, loaded.label)


def test_masks_hide_one_stretch_of_time_and_one_of_bands() -> None:
    features = torch.randn(50, 100, 80)
    masked = mask(features, 20, 10, torch.Generator().manual_seed(0))
    mean = features.mean(1, keepdim=True).expand_as(features)
    changed = masked != features
    assert torch.allclose(masked[changed], mean[changed], atol=0.2)
    whole_frames, whole_bands = changed.all(2).sum(1), changed.all(1).sum(1)
    assert 5 < whole_frames.float().mean() < 13
    assert whole_frames.max() < 20
    assert 2.5 < whole_bands.float().mean() < 6.5
    assert torch.equal(mask(features, 0, 0, torch.Generator()), features)
    assert torch.equal(masked, mask(features, 20, 10, torch.Generator().manual_seed(0)))


def test_further_crops_are_of_the_same_view(spkd: Callable, corpus: Path) -> None:
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd(
        "extract", "teacher=none", manifest, "view=crops:4,0.8", "view.speeds=[0.9,1.0]", "wave=true", "fbank=true"
    ).ok()
    cache = Cache.open("cache")
    labels = Labels.of(cache)
    steps = of(cache, InputSource(WAVE), (0.4, 0.4, 0.2), 12, 0)
    other = 0
    for step in range(6):
        batch = steps[step]
        views = batch.views.numpy()
        whole = {int(row): cache.batch(np.array([row]), ["wave"])["wave"][0] for row in cache.usable_views}
        for crop, length in enumerate((40, 40, 20)):
            assert batch.crops[crop]["wave"].shape == (12, length, 160)
            for view, values in zip(views, batch.crops[crop]["wave"].float(), strict=True):
                same = np.flatnonzero(labels.instance == labels.instance[view])
                places = [
                    v
                    for v in same
                    for i in range(80 - length + 1)
                    if torch.equal(whole[int(v)][i : i + length], values)
                ]
                assert places, "a crop of another instance"
                other += places[0] != view
        assert torch.equal(batch.crops[1]["wave"], steps[step].crops[1]["wave"])
    assert other > 12  # augmented otherwise


def test_the_other_path_passes_over_labelled_views_alone(cache: Cache) -> None:
    steps = ViewOrder(shuffled_views(cache, 3, np.arange(36) % 3 == 0), 5)
    assert sorted(np.concatenate([steps.views(i) for i in range(2)]).tolist()) != list(range(10))
    seen = {row for i in range(12) for row in steps.views(i).tolist()}
    assert seen <= set(range(0, 36, 3))
    assert len(seen) >= 10


def test_the_waveform_is_cached_to_the_sample(spkd: Callable, corpus: Path) -> None:
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd("extract", "teacher=none", manifest, "wave=true", "storage.codec=float32").ok()
    cache = Cache.open("cache")
    assert cache.names == ["wave"]
    loader = cache.view_loader(Manifest.load(corpus / "manifest.csv"), None, None)
    crop = Crop(np.array([3200, 160]), 8000)
    outputs = cache.batch(np.array([2, 7]), ["wave"], crop)["wave"]
    for view, start, values in zip((2, 7), (3200, 160), outputs, strict=True):
        assert np.array_equal(values.reshape(-1).numpy(), loader(view)[start : start + 8000])
