"""Plans that somebody changed and signed anew are refused, with the reason."""

from __future__ import annotations

import copy
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spkd.cache.plan import Plan
from spkd.errors import SpkdError

from .test_layout import FRAMES, make_card, make_plan

MANIFEST, PLAN = make_plan([4000] * 6, unit_views=2)
CARD = make_card([FRAMES], MANIFEST, PLAN)


def saved(plan: Plan, folder: Path) -> bytes:
    plan.save(folder, 0)
    return (folder / "plan" / "0.npz").read_bytes()


def with_views(**columns: object) -> Plan:
    return replace(PLAN, views=replace(PLAN.views, **columns))  # type: ignore[arg-type]


def test_a_plan_is_read_as_it_was_saved(tmp_path: Path) -> None:
    read = Plan.read(saved(PLAN, tmp_path), CARD, 0, "p")
    assert read.utterances == PLAN.utterances
    assert all(
        np.array_equal(a, b) for a, b in zip(read.views.columns().values(), PLAN.views.columns().values(), strict=True)
    )


@pytest.mark.parametrize(
    "changed",
    [
        with_views(samples=np.full(6, -4000, np.int32)),
        with_views(samples=np.full(6, 2**31 - 1, np.int32)),
        with_views(utterance=np.full(6, 10**6, np.int32)),
        with_views(utterance=np.full(6, -5, np.int32)),
        with_views(utterance=np.arange(6, dtype=np.int32)[::-1].copy()),
        with_views(speed=np.full(6, np.nan, np.float32)),
        with_views(start=np.full(6, -1, np.int64)),
        with_views(samples=np.full(6, 4000, np.int64)),
        replace(PLAN, utterances=["u0"] * 6),
        replace(PLAN, speaker=np.full(6, 999, np.int32)),
        replace(PLAN, first=np.array([0, 4, 2, 6])),
        replace(PLAN, first=np.array([0, 2, 4, 10**12])),
        replace(PLAN, unit_views=10**9),
        make_plan([4000] * 5, unit_views=2)[1],
    ],
    ids=range(14),
)
def test_a_plan_with_values_that_no_plan_has(tmp_path: Path, changed: Plan) -> None:
    with pytest.raises(SpkdError, match=r"^p: damaged \("):
        Plan.read(saved(changed, tmp_path), CARD, 0, "p")


def test_archives_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    good = saved(PLAN, tmp_path)
    bomb = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for member in source.infolist():
            out.writestr(member.filename, source.read(member))
        out.writestr("more.npy", b"\0" * 10_000_000)
    shared = io.BytesIO()
    with zipfile.ZipFile(shared, "w") as out:
        out.writestr("a.npy", b"\0" * 1000)
        for i in range(9):
            out.filelist.append(copied := copy.copy(out.filelist[0]))
            copied.filename = f"{i}.npy"
    for data in (bomb.getvalue(), shared.getvalue(), good[:-30], good[:100], b"", b"PK"):
        with pytest.raises(SpkdError, match=r"^p: damaged"):
            Plan.read(data, CARD, 0, "p")


@pytest.mark.parametrize("name", ["unit", "utterances", "utterances_end", "speakers", "first", "samples"])
@pytest.mark.parametrize("kind", ["f4", "c8", "S3", "i1", "m8[s]", "V8"])
def test_columns_of_another_type_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    with np.load(io.BytesIO(saved(PLAN, tmp_path))) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays[name] = np.zeros(arrays[name].shape, kind)
    changed = io.BytesIO()
    np.savez(changed, **arrays)
    with pytest.raises(SpkdError, match=r"^p: damaged \("):
        Plan.read(changed.getvalue(), CARD, 0, "p")
