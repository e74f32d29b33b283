"""Arrays made piece by piece against those of NumPy, in memory and in files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkd.errors import SpkdError
from spkd.files import spool
from spkd.files.spool import Spool, numbers_in, spooled, stretches

PIECES = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=8)


@given(PIECES, st.sampled_from([0, 9, 1 << 22]))
def test_it_is_all_pieces_one_after_the_other(pieces: list[list[int]], in_memory: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "IN_MEMORY", in_memory)
        made, pairs = Spool(np.int32), Spool("<i8", (2,))
        for number, piece in enumerate(pieces, 1):
            made.add(np.array(piece, np.int64))
            pairs.add(np.array([piece, piece], np.int64).T.reshape(-1, 2))
            if number % 2:  # it grows after it was looked at
                assert made.array().tolist() == [n for each in pieces[:number] for n in each]
        both = [n for each in pieces for n in each]
        assert len(made) == len(both)
        assert made.array().tolist() == both
        assert made.array().dtype == np.int32
        assert pairs.array().tolist() == [[each, each] for each in both]
        assert spooled(np.int64, map(np.array, pieces)).tolist() == both


@given(st.lists(st.booleans(), max_size=20))
def test_numbers_of_a_mask(chosen: list[bool]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "AT_ONCE", 3)
        mask = np.array(chosen, bool)
        pieces = list(numbers_in(mask))
        assert [n for piece in pieces for n in piece.tolist()] == np.flatnonzero(mask).tolist()
        assert [len(piece) for piece in stretches(mask)] == [min(3, len(mask) - n) for n in range(0, len(mask), 3)]


def test_no_folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(SpkdError, match=r"none: no temporary file can be written \(No such file.*TMPDIR"):
        Spool(np.int32).add(np.arange(3))
