"""Arrays in NumPy's .npy format, read without pickle, and with every claim of their headers checked."""

from __future__ import annotations

import io
import math
import tokenize

import numpy as np


def parse(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file; a read-only view of these bytes.

    Raises:
        ValueError: not an .npy file, an array of objects, or another number of bytes than the header claims.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0 of the format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=10_000)
    except (SyntaxError, TypeError, tokenize.TokenError, RecursionError) as error:
        raise ValueError(f"not an .npy header ({str(error)[:80]})") from error
    if dtype.hasobject or fortran or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"not an array of numbers in C order ({dtype}, {shape})")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{dtype} {str(shape)[:40]} is not what follows its header")
    return np.frombuffer(data, dtype, math.prod(shape), file.tell()).reshape(shape)
