"""Utterances in columns against a list of objects."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkd.corpus.columns import Columns, Filled
from spkd.corpus.manifest import Manifest
from spkd.corpus.utterance import Speech, Utterance
from spkd.files import spool

SECONDS = st.floats(0, 1e6)
PATHS = st.builds("".join, st.lists(st.sampled_from(["a", "ü", "/", "#", "1536+32044.flac", "s3://", "."]), max_size=6))
SPEECH = st.builds(
    lambda edges, whole: Speech(tuple(zip(edges[::2], edges[1::2], strict=False)), whole),
    st.lists(st.integers(0, 2**33), unique=True, max_size=7).map(sorted),
    SECONDS,
)
UTTERANCES = st.lists(
    st.builds(
        Utterance,
        id=st.text(max_size=4),
        path=PATHS,
        speaker=st.none() | st.sampled_from(["ann", "ben", "ü"]),
        duration=st.none() | SECONDS,
        start=SECONDS,
        channel=st.none() | st.integers(0, 1023),
        attributes=st.sampled_from([(), (("gender", "f"),), (("gender", "m"), ("age", "40"))]),
        speech=st.none() | SPEECH,
    ),
    max_size=12,
    unique_by=lambda u: u.id,
)


@given(UTTERANCES, st.data(), st.booleans())
def test_they_are_a_list_of_utterances(listed: list[Utterance], data: st.DataObject, are_mapped: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if are_mapped:
            patch.setattr(spool, "IN_MEMORY", 0)
            patch.setattr(spool, "AT_ONCE", 3)
        check_list(listed, data)


def check_list(listed: list[Utterance], data: st.DataObject) -> None:
    made = Columns.of(iter(listed))
    assert list(made) == listed
    assert made == listed
    assert [made[i] for i in range(len(listed))] == listed
    assert list(made.paths()) == [u.path for u in listed]
    assert pickle.loads(pickle.dumps(made)) == listed
    assert made[1:-1] == tuple(listed[1:-1])
    assert Columns.join([Columns.of(listed[:4]), Columns.of([]), Columns.of(listed[4:])]) == listed
    filled = Filled()
    for start in range(0, len(listed), 5):
        filled.add(listed[start : start + 5])
        assert filled.columns() == listed[: start + 5]
    numbers = data.draw(st.lists(st.integers(0, len(listed) - 1), max_size=9)) if listed else []
    assert made.take(np.array(numbers, np.int64)) == [listed[number] for number in numbers]
    mask = data.draw(st.lists(st.booleans(), min_size=len(listed), max_size=len(listed)))
    assert made.take(np.array(mask, bool)) == [u for u, wanted in zip(listed, mask, strict=True) if wanted]
    names = {"ann": None, "ben": "ü", "ü": "ü"}
    renamed = [u if u.speaker is None else dataclasses.replace(u, speaker=names[u.speaker]) for u in listed]
    assert made.speaking([names[name] for name in made.speakers]) == renamed


@given(UTTERANCES, st.lists(st.text(max_size=4), max_size=4))
def test_a_manifest_is_one_of_a_list(listed: list[Utterance], wanted: list[str]) -> None:
    manifest = Manifest(listed)
    place = {u.id: index for index, u in enumerate(listed)}
    assert {name: manifest.index_of[name] for name in place} == place
    assert len(manifest.index_of) == len(place)
    assert manifest.speakers == sorted({u.speaker for u in listed if u.speaker is not None})
    total = 0.0
    for u in listed:
        total += u.duration or 0.0
    assert manifest.seconds == total
    picked = manifest.pick(wanted) if len(set(wanted)) == len(wanted) else None
    if picked is not None:
        assert list(picked) == [listed[place[name]] for name in wanted]
    elif len(set(wanted)) == len(wanted):
        assert not set(wanted) <= set(place)
    assert manifest.pick([u.id for u in listed]) is manifest
    assert list(Manifest.join([manifest, Manifest(())], "")) == listed
