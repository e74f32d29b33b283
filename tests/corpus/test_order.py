"""The order in which audio in containers is loaded."""

import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from spkd.corpus import order, stored
from spkd.corpus.columns import Columns
from spkd.corpus.loader import ViewLoader, iterate_batches
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.order import by_place
from spkd.corpus.settings import ViewConfig
from spkd.corpus.utterance import Utterance
from spkd.corpus.view import ViewPlan

PLACES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), unique=True, min_size=1, max_size=30)


@given(PLACES, st.integers(1, 200))
def test_each_container_is_gone_through_once(places: list[tuple[str, int]], reach: int) -> None:
    """Members of 10 bytes each, 11 apart, in any order: groups follow one another in each container."""
    utterances = [Utterance(f"{c}{n}", f"/{c}.tar#{11 * n}+10.wav") for c, n in places]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "REACH", reach)
        groups = by_place(Columns.of(utterances), np.arange(len(places)))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(places)))
    ends: dict[str, int] = {}
    names = [places[place][0] for group in groups for place in group.tolist()]
    assert sum(a != b for a, b in pairwise([*names, ""])) == len(set(names))
    for group in groups:
        taken = 0
        for name in {places[place][0] for place in group.tolist()}:
            inside = [places[place][1] for place in group.tolist() if places[place][0] == name]
            assert 11 * min(inside) >= ends.get(name, 0)
            ends[name] = 11 * max(inside) + 10
            taken += ends[name] - 11 * min(inside)
        assert taken <= reach or len(group) == 1


def test_files_are_one_group_in_their_order() -> None:
    made = Columns.of([Utterance(f"{n}", f"/a#b/{n}#.wav") for n in range(5)])
    assert [group.tolist() for group in by_place(made, np.array([4, 1, 2]))] == [[0, 1, 2]]


def test_tars_of_any_lengths_are_read_once_and_give_the_same_audio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, listed, files = np.random.RandomState(0), [], []
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for member in range(12):
                wave = 0.1 * noise.normal(size=noise.randint(4000, 16_000))
                soundfile.write(tmp_path / f"{number}-{member}.wav", wave, 16_000)
                tar.add(tmp_path / f"{number}-{member}.wav", f"{member}.wav")
        with tarfile.open(tmp_path / f"{number}.tar") as tar:
            for info in tar:
                name = f"{number}-{info.name}"
                listed.append(Utterance(name, f"{tmp_path}/{number}.tar#{info.offset_data}+{info.size}.wav"))
                files.append(Utterance(name, str(tmp_path / name)))
    mixed = noise.permutation(24).tolist()
    plan = ViewPlan.parse(ViewConfig())

    def loaded(utterances: list[Utterance]) -> dict[int, bytes]:
        manifest = measure(Manifest(utterances[number] for number in mixed))[0]
        views = ViewLoader(manifest, plan.views(manifest), plan)
        places.clear()
        batches = list(iterate_batches(views, np.arange(24), 4, 1, lambda *_: pytest.fail("rejected"), mixed=True))
        lengths = {int(v): int(n) for b in batches for v, n in zip(b.views, views.views.samples[b.views], strict=True)}
        waves = {int(view): wave for b in batches for view, wave in zip(b.views, b.waves, strict=True)}
        return {view: waves[view][: lengths[view]].numpy().tobytes() for view in lengths}

    places: list[tuple[int, int]] = []
    original = stored.Opened.read

    def read(self: stored.Opened, offset: int, length: int) -> bytes:
        places.append((id(self), offset))
        return original(self, offset, length)

    monkeypatch.setattr(stored.Opened, "read", read)
    expected = loaded(files)
    monkeypatch.setattr(order, "REACH", 1)  # each member by itself, whatever its length
    assert loaded(listed) == expected
    assert len({file for file, _ in places}) == 2
    assert [file for file, _ in places] == sorted((file for file, _ in places), key=[f for f, _ in places].index)
    assert all(a < b for (one, a), (two, b) in pairwise(places) if one == two)
