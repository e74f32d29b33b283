"""Codecs: conversion of a target's numbers to the columns stored on disk, and back to numbers on the training device.

Their names are in spkd.registry.CODECS. With `+zstd` after the name, every chunk is also compressed: this is smaller
where many values are zero, and read an order of magnitude slower. FAISS learns the codebooks and writes the codes;
decoding needs torch alone.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.faiss_library import load_faiss
from spkd.registry import CODECS

ZSTD = "+zstd"
TEMPERATURES = (1.0, 2.0, 4.0)
MOST_PARTS = 64  # most codebooks of an additive codec
BEAM = 16  # rows of codes that a residual encoding keeps from one codebook to the next
TURNS, CHANGES = 16, 4  # local searches of an encoding, and codes changed before each; as FAISS's
LARGEST = 1e15  # largest value of a codec that learns: FAISS sums squares of differences in float32
FLOATS = {2: torch.float16, 4: torch.float32}
Parameters = dict[str, np.ndarray]


class Codec(ABC):
    """Base class of codecs. Stored rows are (n, columns) of `dtype`; the numbers that they stand for are (n, dim).

    Attributes:
        dim: numbers in a row.
        columns: columns of a stored row.
        dtype: type of the stored columns.
        training_rows: number of rows that `fit` uses; 0 where nothing is learnt.
        least_rows: smallest number of rows that `fit` accepts.
        lossless: whether the values read are the values written, up to the rounding of floats.
        most_lost: largest error of rows read back, over their own length; more means that the numbers are too small for
            it. None where there is no such limit.
        only: the only target that it may be used for; None where all may use it.
        parameters: the learnt arrays, by name; the cache keeps them.
    """

    dtype: np.dtype = np.dtype("u1")
    training_rows = 0
    least_rows = 0
    lossless = False
    most_lost: float | None = None
    only: str | None = None

    def __init__(self, dim: int) -> None:
        self.dim = self.columns = dim
        self.parameters: Parameters = {}
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    def fit(self, values: np.ndarray) -> None:  # noqa: B027  (most learn nothing)
        """Learn `parameters` from rows (n, dim)."""

    @abstractmethod
    def encode(self, values: np.ndarray) -> np.ndarray:
        """(n, dim) float32 -> (n, columns)."""

    @abstractmethod
    def decode(self, stored: Tensor) -> Tensor:
        """(..., columns) -> (..., dim) on the same device; float32, or the stored dtype where nothing is coded."""

    def _on(self, device: torch.device, name: str) -> Tensor:
        if (name, device) not in self._tensors:
            self._tensors[name, device] = torch.from_numpy(self.parameters[name]).to(device)
        return self._tensors[name, device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": {}}


class Float16(Codec):
    """The numbers themselves, rounded to half precision: 2 bytes each."""

    dtype: np.dtype = np.dtype("<f2")
    lossless = True
    most_lost = 0.01

    def encode(self, values: np.ndarray) -> np.ndarray:
        # An overflow becomes infinite, which the writer refuses. torch rounds as numpy does, 2.5 times faster.
        return torch.from_numpy(np.ascontiguousarray(values)).to(FLOATS[self.dtype.itemsize]).numpy()

    def decode(self, stored: Tensor) -> Tensor:
        return stored


class Float32(Float16):
    """The numbers themselves, 4 bytes each."""

    dtype: np.dtype = np.dtype("<f4")


class AsStored(Codec):
    """Codec of rows that are already encoded, to copy a cache."""

    def __init__(self, columns: int, dtype: np.dtype) -> None:
        super().__init__(columns)
        self.dtype = dtype

    def encode(self, values: np.ndarray) -> np.ndarray:
        return values

    def decode(self, stored: Tensor) -> Tensor:
        return stored


class Int8(Codec):
    """8-bit integers with a scale per row: D + 2 bytes.

    A row is stored as round(z / s), with z = (x - mean) / sqrt(sd) by channel and s = max|z| / 127 over the row. s
    follows as two bytes.

    A scale of x itself would spend its 8 bits on the few channels that are 15 times larger than the rest in most
    teachers. Division by sd would let channels after a ReLU that are rarely active set the scale of the whole row.
    Division by sqrt(sd) lies between the two. On real embeddings it is nearly as good as the scale of x itself, which
    is the best there; on real frames it is better than both (benchmarks/cache_codecs.py).
    """

    dtype = np.dtype("i1")
    training_rows = 2048
    least_rows = 2
    most_lost = 0.5

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.columns = dim + 2

    def fit(self, values: np.ndarray) -> None:
        wide = values.astype(np.float64)
        spread = np.sqrt(wide.std(0))
        spread[spread == 0] = spread.max() or 1.0
        self.parameters = {"mean": wide.mean(0).astype(np.float32), "spread": spread.astype(np.float32)}

    def encode(self, values: np.ndarray) -> np.ndarray:
        z = (values - self.parameters["mean"]) / self.parameters["spread"]
        # Rounded up to float16, so that no value exceeds 127; a row at the mean needs a scale that is not zero.
        scale = np.abs(z).max(1, keepdims=True) / 127.0 * (1 + 2.0**-10)
        scale = np.maximum(scale, 2.0**-14).astype("<f2")
        codes = np.rint(z / scale.astype(np.float32)).clip(-127, 127).astype("i1")
        return np.concatenate([codes, scale.view("i1")], 1)

    def decode(self, stored: Tensor) -> Tensor:
        scale = stored[..., self.dim :].contiguous().view(torch.float16).float()
        z = stored[..., : self.dim].float() * scale
        return z * self._on(stored.device, "spread") + self._on(stored.device, "mean")


class Scalar(Codec):
    """Base class of codecs by FAISS's ScalarQuantizer: x = low + span * (code + 1/2) / (2^bits - 1) per channel.

    Codes are packed from the lowest bit.
    """

    training_rows = 4096
    least_rows = 2
    bits: int

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.columns = (dim * self.bits + 7) // 8

    def _quantiser(self) -> Any:
        faiss = load_faiss(f"codec sq{self.bits}")
        kind = {8: faiss.ScalarQuantizer.QT_8bit, 6: faiss.ScalarQuantizer.QT_6bit, 4: faiss.ScalarQuantizer.QT_4bit}
        return faiss.ScalarQuantizer(self.dim, kind[self.bits])

    def fit(self, values: np.ndarray) -> None:
        quantiser = self._quantiser()
        quantiser.train(np.ascontiguousarray(values, np.float32))
        low, span = load_faiss(f"codec sq{self.bits}").vector_to_array(quantiser.trained).reshape(2, self.dim)
        self.parameters = {"low": low.copy(), "span": span.copy()}

    def encode(self, values: np.ndarray) -> np.ndarray:
        quantiser = self._quantiser()
        trained = np.concatenate([self.parameters["low"], self.parameters["span"]])
        load_faiss(f"codec sq{self.bits}").copy_array_to_vector(trained, quantiser.trained)
        return quantiser.compute_codes(np.ascontiguousarray(values, np.float32))

    def decode(self, stored: Tensor) -> Tensor:
        step = (unpack(stored, self.bits, self.dim).float() + 0.5) / (2**self.bits - 1)
        return self._on(stored.device, "low") + step * self._on(stored.device, "span")


class Scalar8(Scalar):
    """Scalar quantisation with 8 bits: D bytes."""

    bits = 8


class Scalar6(Scalar):
    """Scalar quantisation with 6 bits: 0.75 D bytes."""

    bits = 6


class Scalar4(Scalar):
    """Scalar quantisation with 4 bits: D / 2 bytes."""

    bits = 4


class Coded(Codec):
    """Base class of codecs that store a row as codes, packed from the lowest bit.

    Attributes:
        name: name of the codec, for messages.
        parts: number of codes in a row (M).
        bits: bits of a code (B).
        classes: number of values of a code, 2^B.
    """

    def __init__(self, name: str, dim: int, parts: int, bits: int) -> None:
        super().__init__(dim)
        self.name, self.parts, self.bits = name, parts, bits
        self.columns, self.classes = parts * bits // 8, 2**bits
        self.training_rows, self.least_rows = 40 * self.classes, self.classes

    def codes(self, stored: Tensor) -> Tensor:
        """(..., columns) -> (..., parts) integers below `classes`."""
        return unpack(stored, self.bits, self.parts)


class Product(Coded):
    """Base class of codecs by FAISS's ProductQuantizer.

    The vector is divided into `parts` sub-vectors, and each is replaced by the nearest of 2^bits centroids. Optimised
    product quantisation (OPQ: Ge et al., CVPR 2013) learns an orthogonal rotation that is applied first.

    Args:
        parts: number of sub-vectors (M).
    """

    bits: int
    rotated = False

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__(f"{'o' * self.rotated}pq{parts}x{self.bits}", dim, parts, self.bits)
        if dim % parts or (parts * self.bits) % 8:
            raise UsageError(f"codec {self.name}: {dim} channels do not divide into {parts} parts of whole bytes")

    def _quantiser(self) -> Any:
        return load_faiss(f"codec {self.name}").ProductQuantizer(self.dim, self.parts, self.bits)

    def fit(self, values: np.ndarray) -> None:
        faiss, quantiser = load_faiss(f"codec {self.name}"), self._quantiser()
        values = np.ascontiguousarray(values, np.float32)
        if self.rotated:
            rotation = faiss.OPQMatrix(self.dim, self.parts)
            rotation.niter, rotation.pq = 10, self._quantiser()
            rotation.train(values)
            self.parameters["rotation"] = faiss.vector_to_array(rotation.A).reshape(self.dim, self.dim).copy()
            values = values @ self.parameters["rotation"].T
        quantiser.train(values)
        shape = (self.parts, self.classes, self.dim // self.parts)
        self.parameters["centroids"] = faiss.vector_to_array(quantiser.centroids).reshape(shape).copy()

    def encode(self, values: np.ndarray) -> np.ndarray:
        quantiser = self._quantiser()
        load_faiss(f"codec {self.name}").copy_array_to_vector(self.parameters["centroids"].ravel(), quantiser.centroids)
        values = values @ self.parameters["rotation"].T if self.rotated else values
        return quantiser.compute_codes(np.ascontiguousarray(values, np.float32))

    def decode(self, stored: Tensor) -> Tensor:
        codes = self.codes(stored).long()
        part = torch.arange(self.parts, device=stored.device)
        values = self._on(stored.device, "centroids")[part, codes].flatten(-2)
        return values @ self._on(stored.device, "rotation") if self.rotated else values


class Product8(Product):
    """Product quantisation with 8 bits per sub-vector: M bytes."""

    bits = 8


class Product4(Product):
    """Product quantisation with 4 bits per sub-vector: M / 2 bytes."""

    bits = 4


class RotatedProduct8(Product8):
    """Product quantisation with 8 bits per sub-vector, after a learnt rotation: M bytes."""

    rotated = True


class RotatedProduct4(Product4):
    """Product quantisation with 4 bits per sub-vector, after a learnt rotation: M / 2 bytes."""

    rotated = True


class Additive(Coded):
    """Base class of codecs by FAISS's additive quantisers: a row is the sum of one entry of each codebook.

    Args:
        parts: number of codebooks (M).
        bits: bits of a code (B); each codebook has 2^B entries.
    """

    kind: str

    def __init__(self, dim: int, parts: int, bits: int) -> None:
        super().__init__(f"{self.kind}{parts}x{bits}", dim, parts, bits)
        if bits > 8 or parts > MOST_PARTS or (parts * bits) % 8:
            raise UsageError(
                f"codec {self.name}: give at most {MOST_PARTS} codes of at most 8 bits, in whole bytes; "
                f"e.g. {self.kind}8x8"
            )
        self._encoder: Any = None

    @abstractmethod
    def _quantiser(self) -> Any:
        """FAISS's quantiser, without codebooks."""

    def fit(self, values: np.ndarray) -> None:
        faiss, quantiser = load_faiss(f"codec {self.name}"), self._quantiser()
        quantiser.train(np.ascontiguousarray(values, np.float32))
        shape = (self.parts, self.classes, self.dim)
        self.parameters, self._encoder = {"codebooks": faiss.vector_to_array(quantiser.codebooks).reshape(shape)}, None

    def _trained(self) -> Any:
        """FAISS's quantiser with these codebooks."""
        quantiser = self._quantiser()
        load_faiss(f"codec {self.name}").copy_array_to_vector(self.parameters["codebooks"].ravel(), quantiser.codebooks)
        quantiser.is_trained = True
        return quantiser

    def decode(self, stored: Tensor) -> Tensor:
        shape, first = stored.shape[:-1], torch.arange(self.parts, device=stored.device) * self.classes
        entries = self.codes(stored).long() + first
        books = self._on(stored.device, "codebooks").flatten(0, 1)
        return embedding_bag(entries.flatten(0, -2), books, mode="sum").reshape(*shape, self.dim)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_encoder": None}


class Residual(Additive):
    """Residual quantisation (Chen, Guan and Wang, Sensors 2010): M B / 8 bytes.

    Each codebook is learnt from what the ones before it leave. Encoding is a beam search.
    """

    kind = "rq"

    def __init__(self, dim: int, parts: int, bits: int) -> None:
        super().__init__(dim, parts, bits)
        # FAISS clusters in the rows' principal components, of which there are fewer than rows.
        self.least_rows = max(self.least_rows, dim + 1)

    def _quantiser(self) -> Any:
        quantiser = load_faiss(f"codec {self.name}").ResidualQuantizer(self.dim, self.parts, self.bits)
        quantiser.use_beam_LUT = 1  # distances from tables of products of the codebooks
        return quantiser

    def encode(self, values: np.ndarray) -> np.ndarray:
        if self._encoder is None:
            self._encoder = self._trained()
            self._encoder.max_beam_size = BEAM
            self._encoder.compute_codebook_tables()
        return self._encoder.compute_codes(np.ascontiguousarray(values, np.float32))


class LocalSearch(Additive):
    """Quantisation with codebooks learnt together, by local search (LSQ++: Martinez et al., ECCV 2018): M B / 8 bytes.

    Encoding improves codes one codebook at a time, then changes some of them and improves again. FAISS's own encoding
    changes random codes of each row, so that the codes of a row depend on the rows beside it; here all rows change by
    the same list.
    """

    kind = "lsq"

    def _quantiser(self) -> Any:
        return load_faiss(f"codec {self.name}").LocalSearchQuantizer(self.dim, self.parts, self.bits)

    def encode(self, values: np.ndarray) -> np.ndarray:
        place = load_faiss(f"codec {self.name}").swig_ptr
        if self._encoder is None:
            between = np.empty((self.parts, self.parts, self.classes, self.classes), np.float32)
            quantiser = self._trained()
            quantiser.compute_binary_terms(place(between))
            self._encoder = quantiser, between
        (quantiser, between), books = self._encoder, self.parameters["codebooks"]
        rows, part, random = np.ascontiguousarray(values, np.float32), np.arange(self.parts), np.random.RandomState(0)
        best, least = np.zeros((len(rows), self.parts), np.int32), np.full(len(rows), np.inf, np.float32)
        alone = np.empty((self.parts, len(rows), self.classes), np.float32)
        quantiser.compute_unary_terms(place(rows), place(alone), len(rows))
        for turn in range(TURNS):
            # All codes are changed in the first turn, then some of the best ones.
            changed = random.permutation(self.parts)[: CHANGES if turn else None]
            codes = best.copy()
            codes[:, changed] = random.randint(0, self.classes, len(changed))
            quantiser.icm_encode_step(place(codes), place(alone), place(between), len(rows), quantiser.icm_iters)
            error = np.square(rows - books[part, codes].sum(1)).sum(1)
            better = error < least
            best[better], least[better] = codes[better], error[better]
        return pack(best, self.bits)


class TopK(Codec):
    """Codec of logits: the `k` largest (float16) with their classes, and the log-sum-exp of all others (float32).

    Decoding gives each of the others the same logit, lse - log(C - k), with C the number of classes. At temperature 1
    this keeps the probabilities of the k classes and the total of the others. At higher temperatures all probabilities
    change; the card holds the resulting KL divergence.

    Args:
        dim: number of classes (C).
        k: number of logits kept.
    """

    only = "logits"

    def __init__(self, dim: int, k: int) -> None:
        super().__init__(dim)
        if not 1 <= k < dim:
            raise UsageError(f"codec topk{k}: k must be between 1 and {dim - 1}, for {dim} classes")
        self.k, self.index = k, np.dtype("<u2" if dim <= 2**16 else "<u4")
        self.columns = k * (2 + self.index.itemsize) + 4

    def encode(self, values: np.ndarray) -> np.ndarray:
        classes = np.argpartition(values, -self.k, axis=1)[:, -self.k :]
        largest = np.take_along_axis(values, classes, 1).astype("<f2")
        rest = values.astype(np.float64)
        np.put_along_axis(rest, classes, -np.inf, 1)
        top = rest.max(1, keepdims=True)
        tail = (np.log(np.exp(rest - top).sum(1, keepdims=True)) + top).astype("<f4")
        return np.concatenate([largest.view("u1"), classes.astype(self.index).view("u1"), tail.view("u1")], 1)

    def decode(self, stored: Tensor) -> Tensor:
        shape, stored = stored.shape[:-1], stored.reshape(-1, self.columns)
        values, classes, tail = stored.split([2 * self.k, self.index.itemsize * self.k, 4], 1)
        largest = values.contiguous().view(torch.float16).float()
        # torch before 2.12 lacks most arithmetic on unsigned integers: widen through the signed kind of that size.
        signed = torch.int16 if self.index.itemsize == 2 else torch.int32
        where = classes.contiguous().view(signed).long() & (2 ** (8 * self.index.itemsize) - 1)
        even = tail.contiguous().view(torch.float32) - float(np.log(self.dim - self.k))
        logits = even.expand(-1, self.dim).scatter(1, where, largest)
        return logits.reshape(*shape, self.dim)


def unpack(stored: Tensor, bits: int, count: int) -> Tensor:
    """(..., bytes) uint8 -> (..., count) codes of `bits` bits each, packed from the lowest bit."""
    if bits == 8:
        return stored
    position = torch.arange(count, device=stored.device) * bits
    padded = torch.nn.functional.pad(stored, (0, 1)).int()
    first = position // 8
    wide = padded[..., first] | (padded[..., first + 1] << 8)
    return (wide >> (position % 8)) & (2**bits - 1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, count) codes of `bits` bits each -> (n, bytes) uint8, from the lowest bit; count * bits are whole bytes."""
    each = codes[..., None] >> np.arange(bits) & 1
    return np.packbits(each.astype(bool).reshape(len(codes), -1), axis=1, bitorder="little")


def compressed(name: str) -> bool:
    """Whether a codec of this name also compresses its chunks."""
    return name.endswith(ZSTD)


def make_codec(name: str, dim: int) -> Codec:
    """The codec of a name, not fitted yet.

    Args:
        name: a name of spkd.registry.CODECS with its numbers, such as `topk64`, with or without `+zstd`.
    Raises:
        UsageError: no such codec, or one that does not fit the dimension.
    """
    base = name.removesuffix(ZSTD)
    for known in CODECS:
        # A capital letter in a registered name is a number that the user chooses.
        if match := re.fullmatch(re.sub("[A-Z]", r"([1-9][0-9]{0,5})", known), base):
            return CODECS[known](dim, *map(int, match.groups()))
    raise UsageError(f"codec {name!r}{did_you_mean(name, CODECS)} (each also with {ZSTD})")


def fit(name: str, codec: Codec, values: np.ndarray) -> None:
    """Fit the codec of a target.

    Args:
        values: (n, dim) rows of the target.
    Raises:
        SpkdError: too few rows, or values whose squares exceed float32.
    """
    if codec.training_rows and (largest := float(np.abs(values).max(initial=0.0))) > LARGEST:
        raise SpkdError(f"target {name}: values up to {largest:.0e} are too large for its codec; choose float32")
    if len(values) < codec.least_rows:
        raise SpkdError(
            f"target {name}: its codec is learnt from at least {codec.least_rows} rows, and the views give "
            f"{len(values)}; choose another codec"
        )
    codec.fit(values[: max(codec.training_rows, 1)])


def error(codec: Codec, values: np.ndarray) -> dict[str, float]:
    """Error of a codec on rows (n, dim).

    Returns:
        Mean and lowest cosine between a row and the same row read back, and the mean squared error relative to the
        rows' variance.
    """
    back = decoded(codec, values).astype(np.float64)
    values, cosine = values.astype(np.float64), cosines(values, back)
    variance = max(float(values.var(0).mean()), 1e-30)
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "relative_mse": float(((values - back) ** 2).mean()) / variance,
    }


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine (n,) of each row of one (n, dim) with the same row of the other, in float64; 1 where both are zeros."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    zeros = (norms[0] == 0) & (norms[1] == 0)
    return np.where(zeros, 1.0, (a * b).sum(1) / np.maximum(norms[0] * norms[1], 1e-30))


def lost(codec: Codec, values: np.ndarray) -> float:
    """Error of rows (n, dim) read back, over the rows: the root of the sum of squares of each; 0 for rows of zeros.

    Of a codec that learns, and so the mean of the rows too, it is over their differences from the mean.
    """
    error = decoded(codec, values).astype(np.float64) - values
    length = float(np.linalg.norm(values - values.mean(0, np.float64) if codec.training_rows else values))
    return float(np.linalg.norm(error)) / length if length else 0.0


def divergence(logits: np.ndarray, read: np.ndarray) -> dict[str, float]:
    """Mean KL(softmax(logits / T) || softmax(read / T)) in nats, at the temperatures 1, 2 and 4.

    Args:
        logits: (n, classes) the teacher's logits.
        read: (n, classes) the logits that the cache gives.
    """
    p, q = torch.from_numpy(logits).double(), torch.from_numpy(read).double()
    result = {}
    for t in TEMPERATURES:
        a, b = (p / t).log_softmax(1), (q / t).log_softmax(1)
        result[f"kl_t{t:g}"] = max(float((a.exp() * (a - b)).sum(1).mean()), 0.0)
    return result


def decoded(codec: Codec, values: np.ndarray) -> np.ndarray:
    """Rows (n, dim) encoded and decoded again, float32."""
    return codec.decode(torch.from_numpy(codec.encode(values))).float().numpy()
