from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from spkd.corpus import view as view_module
from spkd.corpus.audio import SAMPLE_RATE, AudioError, change_speed
from spkd.corpus.augment import coloured_noise, mix
from spkd.corpus.formants import shift_formants
from spkd.corpus.loader import MOST_SAMPLES, ViewLoader, batched, iterate_batches, stream_batches
from spkd.corpus.manifest import Manifest, Utterance
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewCard, ViewPlan, source_samples
from spkd.errors import SpkdError, UsageError
from spkd.files.schema import record
from spkd.outputs.features import fbank


def fake(*seconds: float) -> Manifest:
    return Manifest(tuple(Utterance(f"u{i}", f"{i}.wav", "s", s) for i, s in enumerate(seconds)))


def test_full_is_one_view_per_utterance_and_speed() -> None:
    views = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0])).views(fake(1.8, 3.6))
    assert views.utterance.tolist() == [0, 0, 1, 1]
    assert views.samples.tolist() == [32_000, 28_800, 64_000, 57_600]
    assert views.start.tolist() == [0] * 4


def test_windows_cover_what_fits_and_short_utterances_give_one() -> None:
    views = ViewPlan.parse(ViewConfig(plan="windows:1/0.5")).views(fake(2.2, 0.7))
    assert views.utterance.tolist() == [0, 0, 0, 1]
    assert views.start.tolist() == [0, 8000, 16_000, 0]
    assert views.samples.tolist() == [16_000, 16_000, 16_000, 11_200]


@given(st.lists(st.floats(0.2, 30.0), min_size=1, max_size=20), st.integers(0, 2**40))
def test_crops_lie_inside_their_utterance(seconds: list[float], seed: int) -> None:
    manifest = fake(*seconds)
    views = ViewPlan.parse(ViewConfig(plan="crops:3,2", speeds=[0.9, 1.0, 1.1], seed=seed)).views(manifest)
    assert len(views) == 3 * len(seconds)
    total = np.array([round(s * SAMPLE_RATE) for s in seconds])[views.utterance]
    span = source_samples(views.samples, views.speed)
    assert (views.start >= 0).all()
    assert ((views.start + span <= total) | (views.start == 0)).all()
    assert (views.samples == 32_000).all()


def test_adding_utterances_changes_no_other_view() -> None:
    plan = ViewPlan.parse(ViewConfig(plan="crops:4,1", speeds=[0.9, 1.1]))
    few, many = plan.views(fake(3, 4)), plan.views(fake(3, 4, 5))
    for name, column in few.columns().items():
        assert np.array_equal(column, many.columns()[name][:8])


@pytest.mark.parametrize("plan", ["full", "full:3", "crops:2,1.5", "windows:1/0.5"])
def test_views_are_the_same_whatever_is_planned_together(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [Utterance(f"u{n}", "", [None, "a", "b"][n % 3], 0.5 + n) for n in range(11)]
    config = ViewConfig(plan=plan, speeds=[0.9, 1.0, 1.1])
    together = ViewPlan.parse(config).views(Manifest(listed)).columns()
    monkeypatch.setattr(view_module, "AT_ONCE", 3)
    for name, values in ViewPlan.parse(config).views(Manifest(listed)).columns().items():
        np.testing.assert_array_equal(values, together[name], strict=True)
    assert len(ViewPlan.parse(config).views(Manifest(())).utterance) == 0


def test_crop_positions_speeds_and_seeds_are_spread() -> None:
    views = ViewPlan.parse(ViewConfig(plan="crops:500,1", speeds=[0.9, 1.1])).views(fake(11.0))
    assert 200 < (views.speed < 1).sum() < 300
    assert abs(views.start.mean() / SAMPLE_RATE - 5.0) < 0.5
    assert len(np.unique(views.seed)) == 500


@pytest.mark.parametrize("plan", ["half", "crops:2", "crops:0,2", "windows:2/0", "crops:1,0.01", "full:0"])
def test_bad_plans(plan: str) -> None:
    with pytest.raises(UsageError, match=r"view\.plan"):
        ViewPlan.parse(ViewConfig(plan=plan))


@pytest.mark.parametrize("factors", [[], [0.1], [1.0, 1.0], [1.005]])
@pytest.mark.parametrize("name", ["speeds", "formants"])
def test_bad_factors(name: str, factors: list[float]) -> None:
    with pytest.raises(UsageError, match=rf"view\.{name}"):
        ViewPlan.parse(ViewConfig(**{name: factors}))  # type: ignore[arg-type]


def test_full_is_one_view_per_speed_and_formant_factor() -> None:
    views = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0], formants=[0.9, 1.0, 1.1])).views(fake(1.8))
    pairs = list(zip(views.speed.round(2).tolist(), views.formants.round(2).tolist(), strict=True))
    assert pairs == [(np.float32(s), np.float32(f)) for s in (0.9, 1.0) for f in (0.9, 1.0, 1.1)]
    assert len(np.unique(views.seed)) == 6


def test_drawn_views_begin_with_the_utterance_as_it_is() -> None:
    speeds, formants = [0.8, 0.9, 1.1, 1.2], [0.85, 0.95, 1.05, 1.15]
    config = ViewConfig(plan="full:200", speeds=speeds, formants=formants, seed=3)
    views = ViewPlan.parse(config).views(fake(2.0, 3.0))
    assert len(views) == 400
    first = views[np.array([0, 200])]
    assert first.speed.tolist() == first.formants.tolist() == [1.0, 1.0]
    assert first.samples.tolist() == [32_000, 48_000]
    rest = views[slice(1, 200)]
    assert sorted(set(rest.speed.round(2))) == [np.float32(s) for s in speeds]
    assert len({*zip(rest.speed.tolist(), rest.formants.tolist(), strict=True)}) == 16  # independent of one another
    assert not views.start.any()
    assert ViewPlan.parse(config).text == "full:200"


def test_the_utterances_of_a_speaker_are_drawn_as_the_same_pseudo_speakers() -> None:
    rows = [("a", "s"), ("b", "s"), ("c", "t"), ("d", None), ("e", None)]
    manifest = Manifest(tuple(Utterance(u, f"{u}.wav", s, 2.0) for u, s in rows))
    config = ViewConfig(plan="full:6", speeds=[0.8, 0.9, 1.1, 1.2], formants=[0.85, 0.95, 1.05, 1.15])
    views = ViewPlan.parse(config).views(manifest)
    pseudo_speakers = [
        list(zip(*(c[6 * i : 6 * i + 6] for c in (views.speed, views.formants)), strict=True)) for i in range(5)
    ]
    assert pseudo_speakers[0] == pseudo_speakers[1]
    assert all(pseudo_speakers[i] != pseudo_speakers[j] for i, j in ((0, 2), (0, 3), (3, 4)))
    assert len(np.unique(views.seed)) == len(views)


def test_cards_without_other_formants_are_as_before_there_were_any() -> None:
    tree = ViewPlan.parse(ViewConfig()).card().to_json()
    assert "formants" not in tree
    assert "formants_version" not in tree
    assert "coders" not in tree["augmentation"]
    tree = ViewPlan.parse(ViewConfig(formants=[0.9], coders=["gsm"])).card().to_json()
    assert tree["formants"] == (0.9,)
    assert tree["formants_version"] == 3
    assert "version" not in tree["augmentation"]  # noise and reverberation have one
    assert tree["augmentation"]["coders"] == ("gsm",)


def test_formants_of_another_version_of_the_formula_are_not_repeated() -> None:
    card = ViewPlan.parse(ViewConfig(formants=[0.9])).card()
    for version in (1, 4):
        with pytest.raises(SpkdError, match=f"version {version} of the formula, here there is 2 and 3: extract again"):
            ViewPlan.from_card(dataclasses.replace(card, formants_version=version), None, None)
    noisy = ViewPlan.parse(ViewConfig(noise="synthetic")).card()
    newer = dataclasses.replace(noisy, augmentation=dataclasses.replace(noisy.augmentation, version=3))
    with pytest.raises(SpkdError, match="views were augmented by version 3 of the formula, here there is 1 and 2"):
        ViewPlan.from_card(newer, None, None)
    tree = {name: value for name, value in card.to_json().items() if name != "formants_version"}
    assert record(ViewCard, json.loads(json.dumps(tree)), "card.json").formants_version == 1


def test_views_of_earlier_versions_of_the_formulas_are_repeated(manifest: Manifest) -> None:
    """A card as it was written before noise and reverberation had versions."""
    now = ViewPlan.parse(ViewConfig(formants=[0.9], noise="synthetic", noise_prob=1.0))
    tree = now.card().to_json() | {"formants_version": 2}
    del tree["augmentation"]["version"]
    card = record(ViewCard, json.loads(json.dumps(tree)), "card.json")
    then = ViewPlan.from_card(card, None, None)
    assert then.card() == card
    assert then.card().to_json() == tree
    assert now.as_in(card).card() == card
    views = now.views(manifest)
    source, _ = soundfile.read(manifest[0].path, dtype="float32")
    random = np.random.RandomState(int(views.seed[0]))
    random.random_sample(2)
    decibel = random.uniform(5.0, 20.0)
    expected = mix(shift_formants(source, 0.9, 2), coloured_noise(random, len(source)), decibel)
    assert np.array_equal(ViewLoader(manifest, views, then)(0), expected)
    assert not np.array_equal(ViewLoader(manifest, views, now)(0), expected)


def test_formants_are_moved_after_the_speed(manifest: Manifest) -> None:
    plan = ViewPlan.parse(ViewConfig(speeds=[1.1], formants=[0.9]))
    views = plan.views(manifest)
    source, _ = soundfile.read(manifest[0].path, dtype="float32")
    source = source[: int(source_samples(int(views.samples[0]), 1.1))]
    expected = shift_formants(change_speed(source, 1.1), 0.9)[: views.samples[0]]
    assert np.array_equal(ViewLoader(manifest, views, plan)(0), expected)


def test_the_card_gives_the_same_plan_and_refuses_other_noise(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / f"{name}.wav", np.ones(10), 16_000)
    plan = ViewPlan.parse(ViewConfig(plan="crops:2,1", noise=str(tmp_path / "a"), noise_prob=0.5, snr=[1, 2], seed=4))
    assert ViewPlan.from_card(plan.card(), str(tmp_path / "a"), None).card() == plan.card()
    for wrong in (str(tmp_path / "b"), None):
        with pytest.raises(SpkdError, match="same folders"):
            ViewPlan.from_card(plan.card(), wrong, None)


def test_loading_cuts_speeds_and_augments(manifest: Manifest) -> None:
    plan = ViewPlan.parse(ViewConfig(plan="crops:2,0.5", speeds=[1.1], noise="synthetic", noise_prob=1.0))
    views = plan.views(manifest)
    loader = ViewLoader(manifest, views, plan, 0.1)
    row = 7
    source, _ = soundfile.read(manifest[int(views.utterance[row])].path, dtype="float32")
    start = int(views.start[row])
    clean = change_speed(source[start : start + int(source_samples(8000, 1.1))], 1.1)[:8000]
    wave = loader(row)
    assert np.array_equal(wave, plan.augmentation(clean, int(views.seed[row])))
    assert np.array_equal(wave, loader(row))


def test_a_view_longer_than_its_utterance_repeats_it(manifest: Manifest) -> None:
    views = ViewPlan.parse(ViewConfig(plan="crops:1,5")).views(manifest)
    wave = ViewLoader(manifest, views, ViewPlan.parse(ViewConfig()), 0.1)(0)
    period = round((manifest[0].duration or 0) * SAMPLE_RATE)
    assert len(wave) == 80_000
    assert np.array_equal(wave[:1000], wave[period : period + 1000])


def test_a_file_a_little_shorter_than_its_manifest_ends_in_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.linspace(0.1, 0.5, 16_000), 16_000, subtype="FLOAT")
    source, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    manifest = Manifest((Utterance("a", str(tmp_path / "a.wav"), "s", 1.08),))
    plan = ViewPlan.parse(ViewConfig())
    wave = ViewLoader(manifest, plan.views(manifest), plan, 0.1)(0)
    assert np.array_equal(wave, np.concatenate([source, np.zeros(1280, np.float32)]))


def test_a_file_shorter_than_its_manifest_or_the_minimum_is_refused(manifest: Manifest) -> None:
    longer = Manifest(tuple(dataclasses.replace(u, duration=9.0) for u in manifest))
    plan = ViewPlan.parse(ViewConfig())
    with pytest.raises(AudioError, match="before its manifest says"):
        ViewLoader(longer, plan.views(longer), plan, 0.1)(0)
    with pytest.raises(AudioError, match="too short"):
        ViewLoader(manifest, plan.views(manifest), plan, 10.0)(0)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (4, 3), (100, 2)])
def test_every_view_is_loaded_once_in_batches_of_one_length(manifest: Manifest, batch_size: int, workers: int) -> None:
    broken = Manifest((*manifest.utterances[:3], Utterance("gone", "/none.wav", "s", 1.0), *manifest.utterances[3:]))
    plan = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0], formants=[1.1], noise="synthetic"))
    views = plan.views(broken)
    loader = ViewLoader(broken, views, plan, 0.1)
    rejected: dict[int, AudioError] = {}
    seen = []
    for batch in iterate_batches(loader, np.arange(len(views)), batch_size, workers, rejected.__setitem__):
        assert len(batch.views) <= batch_size
        for row, wave in zip(batch.views, batch.waves, strict=True):
            assert np.array_equal(wave.numpy(), loader(int(row)))
        seen += batch.views.tolist()
    assert sorted(seen + list(rejected)) == list(range(len(views)))
    assert {view: error.reason for view, error in rejected.items()} == {6: "no such file", 7: "no such file"}


def test_no_thread_decodes_any_more_when_batches_are_left(manifest: Manifest) -> None:
    """A process that is forked then would have the locks that such a thread holds."""
    plan = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0, 1.1]))
    views, before = plan.views(manifest), set(threading.enumerate())
    batches = iterate_batches(ViewLoader(manifest, views, plan), np.arange(len(views)), 1, 4, pytest.fail)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert not set(threading.enumerate()) - before


def test_threads_that_load_compute_features_on_a_core_each(manifest: Manifest) -> None:
    plan = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0, 1.1]))
    views = plan.views(manifest)
    loader, before = ViewLoader(manifest, views, plan), torch.get_num_threads()
    threads = set()

    def features(wave: torch.Tensor) -> dict[str, torch.Tensor]:
        threads.add(torch.get_num_threads())
        return {"fbank": fbank(wave)}

    groups = [(0, np.arange(len(views)))]
    for _, batch in stream_batches(loader, groups, 8, 2, pytest.fail, mixed=True, features=features):
        if batch is None:
            continue
        assert batch.cores > 0
        for row, wave in enumerate(batch.waves):
            length = len(wave) if batch.lengths is None else int(batch.lengths[row])
            alone = fbank(wave[None, :length])[0].numpy()
            assert np.array_equal(batch.features["fbank"][row, : len(alone)], alone)
            assert not batch.features["fbank"][row, len(alone) :].any()
    assert threads == {1}
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


def test_views_of_similar_length_share_a_batch_where_they_may(manifest: Manifest) -> None:
    plan = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0, 1.1]))
    views = plan.views(manifest)
    loader = ViewLoader(manifest, views, plan, 0.1)
    numbers = np.arange(len(views))
    mixed = list(iterate_batches(loader, numbers, 32, 2, pytest.fail, mixed=True))
    assert len(mixed) < len(list(iterate_batches(loader, numbers, 32, 2, pytest.fail)))
    assert sorted(view for batch in mixed for view in batch.views) == list(range(len(views)))
    padded = 0
    for batch in mixed:
        lengths = [batch.waves.shape[1]] * len(batch.views) if batch.lengths is None else batch.lengths.tolist()
        assert min(lengths) >= 0.8 * max(lengths)
        padded += len(set(lengths)) > 1
        for view, wave, length in zip(batch.views, batch.waves, lengths, strict=True):
            assert np.array_equal(wave[:length].numpy(), loader(int(view)))
            assert not wave[length:].any()
    assert padded


@given(st.lists(st.integers(400, 20_000_000), max_size=60), st.integers(1, 9), st.sampled_from([0.0, 0.2]))
def test_batches_are_bounded(lengths: list[int], batch_size: int, waste: float) -> None:
    samples = np.array(lengths, np.int64)
    found = batched(np.arange(len(samples)), samples, batch_size, waste)
    assert sorted(i for batch in found for i in batch) == list(range(len(samples)))
    for batch in found:
        assert 1 <= len(batch) <= batch_size
        assert samples[batch].min() >= (1 - waste) * samples[batch].max() - 1e-6
        assert len(batch) == 1 or len(batch) * samples[batch].max() <= MOST_SAMPLES


def test_loading_goes_on_across_groups(manifest: Manifest) -> None:
    """The next group is asked for while views of the one before are still to be taken."""
    plan = ViewPlan.parse(ViewConfig())
    views = plan.views(manifest)
    loader = ViewLoader(manifest, views, plan, 0.1)
    asked = []

    def groups() -> Iterator[tuple[int, np.ndarray]]:
        for group, part in enumerate(np.array_split(np.arange(len(views)), 4)):
            asked.append(group)
            yield group, part

    order = []
    for group, batch in stream_batches(loader, groups(), 4, 2, pytest.fail):
        order.append((group, batch is None))
        if len(order) == 1:
            assert asked[-1] >= 1
    assert [group for group, _ in order] == sorted(group for group, _ in order)
    assert [group for group, ended in order if ended] == [0, 1, 2, 3]
