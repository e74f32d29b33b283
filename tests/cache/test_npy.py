from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkd.cache import npy


def saved(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "|i1", "|u1", "<i8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_arrays_are_read_as_numpy_wrote_them(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    found = npy.parse(saved(values))
    assert found.dtype == values.dtype
    assert np.array_equal(found, values)


GOOD = saved(np.arange(6.0))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        GOOD.replace(b"(6,)", b"(9" + b"9" * 13 + b",)")[: len(GOOD)],
        saved(np.array([{"a": 1}], object)),
        saved(np.asfortranarray(np.ones((2, 3)))),
        GOOD.replace(b"'descr'", b"__import"),
        GOOD.replace(b"\x01\x00v", b"\x09\x00v", 1),
    ],
)
def test_what_is_no_such_array(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        npy.parse(data)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_any_changed_byte_gives_an_array_or_a_value_error(place: int, value: int) -> None:
    data = bytearray(GOOD)
    data[place] = value
    with contextlib.suppress(ValueError):
        assert npy.parse(bytes(data)).nbytes <= len(data)
