"""Plans that somebody changed and signed anew are refused, with the reason."""

from __future__ import annotations

import copy
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spkd.cache.plan import Plan, SpeechColumns
from spkd.corpus.vad.base import VADCard
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


def of_speech(**columns: list[int]) -> Plan:
    """The plan with two stretches of speech in each utterance, and changed columns of these."""
    speech = {"end": range(2, 13, 2), "whole": [2000] * 6, "first": [0, 4000] * 6, "last": [2000, 6000] * 6} | columns
    made = {
        name: np.array(values, np.int64 if name in ("end", "whole") else np.int32) for name, values in speech.items()
    }
    return replace(PLAN, speech=SpeechColumns(**made))


def test_the_speech_of_a_plan_is_read_as_it_was_saved(tmp_path: Path) -> None:
    card = replace(CARD, views=replace(CARD.views, vad=VADCard("energy")))
    read = Plan.read(saved(of_speech(), tmp_path), card, 0, "p")
    assert read.speech is not None
    assert [read.speech.stretches(number) for number in range(6)] == [[(0, 2000), (4000, 6000)]] * 6
    joined = Plan.join([read, replace(read, utterances=[f"v{number}" for number in range(6)])])
    assert joined.speech is not None
    assert [joined.speech.stretches(number) for number in range(12)] == [[(0, 2000), (4000, 6000)]] * 12
    with pytest.raises(SpkdError, match="p: damaged .it has the speech of utterances, or lacks it"):
        Plan.read(saved(of_speech(), tmp_path), CARD, 0, "p")
    with pytest.raises(SpkdError, match="p: damaged .it has the speech of utterances, or lacks it"):
        Plan.read(saved(PLAN, tmp_path), card, 0, "p")


@pytest.mark.parametrize(
    "changed",
    [
        of_speech(end=[2, 4, 6, 8, 10]),
        of_speech(end=[2, 4, 4, 8, 10, 12]),
        of_speech(end=[2, 4, 6, 8, 10, 10**12]),
        of_speech(end=[2, 4, 6, 8, 10, 11]),
        of_speech(whole=[2000] * 5),
        of_speech(first=[-1, 4000] * 6),
        of_speech(first=[0, 1999] * 6),
        of_speech(last=[0, 6000] * 6),
        of_speech(last=[2000, 6000] * 5),
    ],
    ids=range(9),
)
def test_speech_that_no_utterances_have(tmp_path: Path, changed: Plan) -> None:
    card = replace(CARD, views=replace(CARD.views, vad=VADCard("energy")))
    with pytest.raises(SpkdError, match="p: damaged .its stretches of speech are not those of its utterances"):
        Plan.read(saved(changed, tmp_path), card, 0, "p")


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
