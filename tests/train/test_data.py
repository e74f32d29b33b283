from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spkd.cache import FBANK, WAVE, Cache, Crop
from spkd.manifest import Manifest
from spkd.train.data import Classes, Listening, Steps, mask
from spkd.view import Player, ViewPlan


@pytest.fixture
def cache(spkd: Callable, corpus: Path) -> Cache:
    done = spkd(
        "extract",
        "teacher=none",
        f"manifest={corpus / 'manifest.csv'}",
        "view.speeds=[0.9,1.0]",
        "view.noise=synthetic",
        "storage.codec=float32",
    )
    assert done.code == 0, done.err
    return Cache.open("cache")


def test_a_speaker_at_another_speed_is_another_class(cache: Cache) -> None:
    classes = Classes.of(cache)
    assert classes.names[:4] == ["spk0@0.90", "spk0", "spk1@0.90", "spk1"]
    assert classes.label.tolist() == [0, 1] * 3 + [2, 3] * 3 + [4, 5] * 3 + [6, 7] * 3 + [8, 9] * 3 + [10, 11] * 3
    assert len(np.unique(classes.voice)) == 36


def test_every_epoch_sees_every_view_once_in_its_own_order(cache: Cache) -> None:
    steps = Steps(cache, [], Classes.of(cache), Listening(FBANK, None, (0.5,)), 6, 3)
    epochs = [np.concatenate([steps.rows(e * 6 + i) for i in range(6)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(36)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert np.array_equal(
        steps.rows(8), Steps(cache, [], Classes.of(cache), Listening(FBANK, None, (0.5,)), 6, 3).rows(8)
    )


def test_cached_features_are_those_of_the_replayed_audio(cache: Cache, corpus: Path) -> None:
    manifest = Manifest.load(corpus / "manifest.csv")
    plan = ViewPlan.from_card(cache.card["views"], None, None)
    player = Player(manifest, cache.plan.views, plan.augmentation)
    for crop in (0.5, 1.6):  # 1.6 s: longer than some views
        cached = Steps(cache, [], Classes.of(cache), Listening(FBANK, None, (crop,)), 9, 0)[4]
        played = Steps(cache, [], Classes.of(cache), Listening(FBANK, player, (crop,)), 9, 0)[4]
        assert cached["fbank"].shape == played["fbank"].shape
        assert torch.allclose(cached["fbank"], played["fbank"], atol=1e-3)
        assert torch.equal(cached["label"], played["label"])


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


def test_further_crops_are_of_the_same_voice(spkd: Callable, corpus: Path) -> None:
    manifest = f"manifest={corpus / 'manifest.csv'}"
    done = spkd(
        "extract", "teacher=none", manifest, "view=crops:4,0.8", "view.speeds=[0.9,1.0]", "wave=true", "fbank=true"
    )
    assert done.code == 0, done.err
    cache = Cache.open("cache")
    classes = Classes.of(cache)
    steps = Steps(cache, [], classes, Listening(WAVE, None, (0.4, 0.4, 0.2)), 12, 0)
    other = 0
    for step in range(6):
        batch = steps[step]
        rows = batch["rows"].numpy()
        whole = {int(row): cache.batch(np.array([row]), ["wave"])["wave"][0] for row in cache.rows}
        for crop, length in (("wave", 40), ("crop1:wave", 40), ("crop2:wave", 20)):
            assert batch[crop].shape == (12, length, 160)
            for row, heard in zip(rows, batch[crop].float(), strict=True):
                same = np.flatnonzero(classes.voice == classes.voice[row])
                places = [
                    v for v in same for i in range(80 - length + 1) if torch.equal(whole[int(v)][i : i + length], heard)
                ]
                assert places, "a crop of another voice"
                other += places[0] != row
        assert torch.equal(batch["crop1:wave"], steps[step]["crop1:wave"])
    assert other > 12  # augmented otherwise


def test_the_other_path_passes_over_labelled_views_alone(cache: Cache) -> None:
    classes = Classes.of(cache)
    some = Classes(classes.names, np.where(np.arange(36) % 3 == 0, classes.label, -1), classes.voice)
    steps = Steps(cache, [], some, Listening(FBANK, None, (0.5,)), 5, 3, labelled=True)
    assert sorted(np.concatenate([steps.rows(i) for i in range(2)]).tolist()) != list(range(10))
    seen = {row for i in range(12) for row in steps.rows(i).tolist()}
    assert seen <= set(range(0, 36, 3))
    assert len(seen) >= 10


def test_the_waveform_is_cached_to_the_sample(spkd: Callable, corpus: Path) -> None:
    manifest = f"manifest={corpus / 'manifest.csv'}"
    assert spkd("extract", "teacher=none", manifest, "wave=true", "storage.codec=float32").code == 0
    cache = Cache.open("cache")
    assert cache.names == ["wave"]
    player = cache.player(Manifest.load(corpus / "manifest.csv"), None, None)
    crop = Crop(np.array([3200, 160]), 8000)
    said = cache.batch(np.array([2, 7]), ["wave"], crop)["wave"]
    for row, start, heard in zip((2, 7), (3200, 160), said, strict=True):
        assert np.array_equal(heard.reshape(-1).numpy(), player(row)[start : start + 8000])
