"""Our shards against zarr-python, the conformance oracle."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spkd.cache import (
    Cache,
    Card,
    Crop,
    Part,
    Plan,
    UnitWriter,
    claim_units,
    finalize,
    initialise,
    verify,
)
from spkd.cache.codec import make_codec
from spkd.cache.folder import load_card
from spkd.cache.layout import expect_shards
from spkd.corpus.manifest import Manifest, Utterance
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan, Views
from spkd.errors import SpkdError
from spkd.outputs.head import HeadCard
from spkd.outputs.target import Target
from spkd.outputs.teacher_card import TeacherCard
from tests import processes

FRAMES = Target("frames", 5, 160, 400)


def make_plan(lengths: list[int], unit_views: int = 1024, unit_seconds: float = 1280.0) -> tuple[Manifest, Plan]:
    """One view per utterance of the given length (samples)."""
    manifest = Manifest(tuple(Utterance(f"u{i}", f"{i}.wav", f"s{i % 2}", n / 16_000) for i, n in enumerate(lengths)))
    count = len(lengths)
    views = Views(
        np.arange(count, dtype=np.int32),
        np.zeros(count, np.int64),
        np.array(lengths, np.int32),
        np.ones(count, np.float32),
        np.zeros(count, np.uint32),
        np.ones(count, np.float32),
    )
    return manifest, Plan.make(manifest, views, unit_views, unit_seconds)


def make_card(targets: list[Target], manifest: Manifest, plan: Plan, head: HeadCard | None = None) -> Card:
    """The card of one part."""
    teacher = TeacherCard("test", "0" * 64, "MIT", "src", "none")
    part = Part(manifest.digest, len(manifest), 0.1, len(plan.views), plan.units)
    views = ViewPlan.parse(ViewConfig()).card()
    return Card(teacher, tuple(targets), views, 0.0, plan.unit_views, plan.unit_seconds, head, None, (part,))


def start(root: Path, targets: list[Target], manifest: Manifest, plan: Plan) -> Card:
    """An empty cache of one part. Returns its card."""
    made = make_card(targets, manifest, plan)
    initialise(root, made, [plan])
    return made


def writer_of(root: Path, plan: Plan, unit: int) -> UnitWriter:
    card = load_card(root)
    return UnitWriter(root, card, plan, unit, {t.name: make_codec(t.codec, t.dim) for t in card.targets})


def write(
    root: Path, lengths: list[int], targets: list[Target], reject: tuple[int, ...] = (), **units: float
) -> dict[str, list[np.ndarray]]:
    """A complete cache of random values. Returns what was written, per target and view: (rows, dim)."""
    manifest, plan = make_plan(lengths, **units)  # type: ignore[arg-type]
    random = np.random.RandomState(len(lengths))
    made = start(root, targets, manifest, plan)
    types = {t.name: t.codec.removesuffix("+zstd") for t in targets}
    values = {
        t.name: [random.randn(int(t.num_frames(n)), t.dim).astype(types[t.name]) for n in lengths] for t in targets
    }
    for unit in claim_units(root, plan.units):
        writer = writer_of(root, plan, unit)
        for row in random.permutation(list(plan.unit(unit))):
            if row in reject:
                writer.reject(int(row), "bad")
                continue
            for target in targets:
                value = values[target.name][row]
                writer.put(target.name, [int(row)], value if target.hop is None else value[None])
        writer.commit()
    assert finalize(root, made, plan)
    return values


lengths = st.lists(st.integers(100, 9000), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths,
    st.integers(1, 20),
    st.sampled_from([0.6, 2.0, 1280.0]),
    st.sampled_from(["float16", "float32", "float16+zstd", "float32+zstd"]),
    st.sampled_from([(None, 0), (160, 400), (320, 400), (160, 0), (12_800, 25_440)]),
    st.integers(1, 9),
)
def test_zarr_python_reads_what_we_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    unit_views: int,
    unit_seconds: float,
    stored_as: str,
    rate: tuple[int | None, int],
    dim: int,
) -> None:
    root = tmp_path_factory.mktemp("cache") / "c"
    target = Target("t", dim, rate[0], rate[1], stored_as)
    values = write(root, lengths, [target], unit_views=unit_views, unit_seconds=unit_seconds)["t"]
    cache = Cache.open(root)
    every = np.arange(len(cache))
    first, count = cache.plan.places(target, every)
    rows = cache.plan.shard_rows(target)
    oracle = zarr.open_group(root, mode="r")["t"]
    assert isinstance(oracle, zarr.Array)
    for i, expected in enumerate(values):
        start = int(cache.plan.units_of(every)[i]) * rows + int(first[i])
        stored = np.asarray(oracle[start : start + int(count[i])])
        assert stored.dtype == expected.dtype
        assert np.array_equal(stored, expected)
        ours = cache.batch(np.array([i]), ["t"])["t"].numpy()[0]
        assert np.array_equal(ours, expected[0] if target.hop is None else expected)
    assert verify(root) == []


def test_missing_rows_read_as_nan_never_as_zeros(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 5, [FRAMES], reject=(2,), unit_views=3)
    oracle = zarr.open_group(tmp_path / "c", mode="r")["frames"]
    assert isinstance(oracle, zarr.Array)
    everything = np.asarray(oracle[:])
    per_view = int(FRAMES.num_frames(4000))
    assert np.isfinite(everything).all(1).sum() == 4 * per_view
    assert np.isnan(everything[~np.isfinite(everything).all(1)]).all()


@given(lengths, st.integers(1, 20), st.sampled_from([0.6, 2.0]))
def test_units_hold_every_view_once_and_fit_their_shards(
    lengths: list[int], unit_views: int, unit_seconds: float
) -> None:
    _, plan = make_plan(lengths, unit_views, unit_seconds)
    assert [row for unit in range(plan.units) for row in plan.unit(unit)] == list(range(len(lengths)))
    for target in (FRAMES, Target("e", 2), Target("m", 2, 160, 0)):
        first, count = plan.places(target, np.arange(len(plan.views)))
        for unit in range(plan.units):
            rows = plan.unit(unit)
            ends = np.cumsum(count[rows.start : rows.stop])
            assert first[rows.start : rows.stop].tolist() == [0, *ends[:-1].tolist()]
            assert ends[-1] <= plan.shard_rows(target)


def test_plans_survive_the_disk(tmp_path: Path) -> None:
    manifest = Manifest((Utterance("ü/1", "", "ß", 1.0), Utterance("2", "", None, 1.0)))
    _, plan = make_plan([16_000, 16_000])
    plan = Plan.make(manifest, plan.views, 1, 2.0)
    plan.save(tmp_path, 0)
    before = (tmp_path / "plan" / "0.npz").read_bytes()
    loaded = Plan.load(tmp_path, make_card([FRAMES], manifest, plan))
    assert (loaded.utterances, loaded.speakers, loaded.speaker.tolist()) == (["ü/1", "2"], ["ß"], [0, -1])
    assert (loaded.units, loaded.unit_views, loaded.unit_seconds) == (2, 1, 2.0)
    loaded.save(tmp_path, 0)
    assert (tmp_path / "plan" / "0.npz").read_bytes() == before


def test_a_view_longer_than_a_unit_is_refused() -> None:
    with pytest.raises(SpkdError, match=r"u1: 2 s in one view; raise storage\.unit_seconds"):
        make_plan([16_000, 32_000], 10, 1.5)


def test_crops_take_the_matching_frames_and_go_on_at_the_beginning(tmp_path: Path) -> None:
    values = write(tmp_path / "c", [4000, 8000, 2000], [FRAMES])["frames"]
    cache = Cache.open(tmp_path / "c")
    outputs = cache.batch(np.array([1, 0, 2]), ["frames"], Crop(np.array([1600, 320, 0]), 3200))["frames"].numpy()
    height = int(FRAMES.num_frames(3200))
    assert np.array_equal(outputs[0], values[1][10 : 10 + height])
    assert np.array_equal(outputs[1], values[0][2 : 2 + height])
    assert np.array_equal(outputs[2], values[2][np.arange(height) % len(values[2])])
    with pytest.raises(SpkdError, match="need a crop"):
        cache.batch(np.array([0, 1]), ["frames"])


def test_a_crop_beyond_the_last_window_has_the_last_row(tmp_path: Path) -> None:
    wide = Target("wide", 4, 160, 160_000)
    values = write(tmp_path / "c", [170_000], [wide])["wide"][0]
    outputs = Cache.open(tmp_path / "c").batch(np.array([0]), ["wide"], Crop(np.array([160_000]), 3200))["wide"][0, 0]
    assert np.array_equal(outputs.numpy(), values[-1])


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0")
    running = processes.Running(expect_shards, [tmp_path / "0"], FRAMES, 1024)
    _, err = running.communicate(60)
    assert running.returncode == 0, err
