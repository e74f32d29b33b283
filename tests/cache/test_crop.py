"""Rows of crops: the middle of each row's window is known from where the row lies, computed here sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

from spkd.cache import Crop, Rows
from spkd.outputs.features import FBANK, FBANKS, WAVE
from spkd.outputs.target import Target


@pytest.mark.parametrize("kind", [FBANK, FBANKS["sherpa"], WAVE], ids=lambda kind: kind.name)
@pytest.mark.parametrize("grid", [160, 1280])
def test_input_features_are_exactly_those_of_the_crop_and_repeated_views_begin_again_at_one_length(
    kind: Target, grid: int
) -> None:
    samples = np.array([48_000, 48_077, 19_300, 16_000, 900, 401, 160])
    start = np.array([0, 12_800, 0, 0, 0, 0, 0])
    crop = Crop(start, 32_000, grid)
    rows = Rows.of(kind, samples, crop)
    assert rows.height == kind.num_frames(32_000)
    for view, numbers in enumerate(rows.numbers):
        period = int(crop.period(samples)[view])
        if samples[view] >= 32_000:
            assert numbers.tolist() == [start[view] // 160 + i for i in range(rows.height)]
        else:
            assert numbers.tolist() == [(160 * i % period) // 160 for i in range(rows.height)]
            assert period % (grid if samples[view] > 1280 + 400 else 160) == 0
            assert numbers.max() < kind.num_frames(int(samples[view]))


@pytest.mark.parametrize(
    ("hop", "window"), [(160, 0), (320, 400), (1280, 400), (320, 2640), (12_800, 25_440), (200, 512)]
)
def test_rows_of_whole_views_have_their_middles_around_the_crops(hop: int, window: int) -> None:
    target, views = Target("t", 1, hop, window), np.full(300, 100_123)
    crop = Crop(np.arange(300) * 160, 32_000)
    rows = Rows.of(target, views, crop)
    assert rows.follow
    middles = rows.numbers * hop + window / 2
    offset = (middles[:, 0] + middles[:, -1]) / 2 - crop.start - 16_000
    last = target.num_frames(100_123) - 1
    free = (rows.numbers[:, 0] > 0) & (rows.numbers[:, -1] < last)  # not held by an end of the view
    assert np.abs(offset[free]).max() <= hop / 2
    assert rows.numbers.min() >= 0
    assert rows.numbers.max() <= last


def test_a_crop_that_runs_over_the_end_goes_on_at_the_beginning() -> None:
    numbers = Rows.of(FBANK, np.array([4000]), Crop(np.array([2400]), 3200)).numbers[0]
    assert numbers.tolist() == [(15 + i) % 23 for i in range(18)]
