"""Codecs against FAISS and against their formulas written out in float64."""

from __future__ import annotations

import pickle

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from spkd.cache import codec as codecs
from spkd.errors import SpkdError, UsageError


def vectors(count: int = 600, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Correlated channels with an offset each, and two that are much larger than the rest."""
    random = np.random.RandomState(seed)
    values = random.randn(count, 6) @ random.randn(6, dim) + random.randn(dim)
    values[:, :2] *= 15
    return values.astype(np.float32)


def fitted(name: str, values: np.ndarray) -> codecs.Codec:
    codec = codecs.make_codec(name, values.shape[1])
    codecs.fit("t", codec, values)
    return codec


def test_int8_is_the_formula() -> None:
    values = vectors()
    codec = fitted("int8", values)
    x = values.astype(np.float64)
    z = (x - x.mean(0)) / np.sqrt(x.std(0))
    stored = codec.encode(values)
    assert stored.dtype == np.int8
    assert stored.shape == (600, 18)
    scale = stored[:, 16:].copy().view(np.float16).astype(np.float64)
    assert np.allclose(scale[:, 0], np.abs(z).max(1) / 127, rtol=3e-3)
    back = codec.decode(torch.from_numpy(stored)).double().numpy()
    assert (np.abs((back - x.mean(0)) / np.sqrt(x.std(0)) - z) <= scale / 2 * 1.02 + 1e-5).all()
    assert codecs.error(codec, values)["cosine_min"] > 0.999


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_int8_loses_less_than_a_plain_scale_and_than_standardising(power: float) -> None:
    """Of dense vectors with large channels the first loses much, of sparse ones the second."""
    random = np.random.RandomState(0)
    sparse = np.maximum(random.randn(2000, 64) - 1.5 - 0.03 * np.arange(64), 0).astype(np.float32)
    values = sparse if power else vectors(2000)
    codec, other = fitted("int8", values[:1000]), fitted("int8", values[:1000])
    deviation = values[:1000].std(0)
    other.parameters["spread"] = np.where(deviation > 0, deviation**power, 1.0).astype(np.float32)
    assert codecs.error(codec, values[1000:])["relative_mse"] < 0.7 * codecs.error(other, values[1000:])["relative_mse"]


def test_int8_bears_channels_that_are_rarely_active() -> None:
    random = np.random.RandomState(0)
    values = np.maximum(random.randn(1000, 64) - 2 - 0.02 * np.arange(64), 0).astype(np.float32)
    values[:, 0] += 0.5
    assert (values[:, 63] > 0).mean() < 0.01
    codec = fitted("int8", values[:500])
    assert codecs.error(codec, values[500:])["cosine_min"] > 0.999


def test_errors_are_the_formulas() -> None:
    values = vectors(50)
    codec = fitted("sq4", values)
    x, y = values.astype(np.float64), codecs.decoded(codec, values).astype(np.float64)
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    described = codecs.error(codec, values)
    assert described["cosine_mean"] == pytest.approx(cosine.mean())
    assert described["cosine_min"] == pytest.approx(cosine.min())
    assert described["relative_mse"] == pytest.approx(((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def test_int8_bears_rows_at_the_mean_and_constant_channels() -> None:
    values = np.ones((10, 4), np.float32)
    values[1:, 0] = np.arange(9)
    codec = fitted("int8", values)
    assert np.allclose(codecs.decoded(codec, values), values, atol=0.05)
    assert np.allclose(codecs.decoded(codec, values.mean(0, keepdims=True)), values.mean(0), atol=1e-3)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_scalar_codes_are_those_of_faiss(bits: int) -> None:
    values = vectors(dim=13 if bits == 8 else 12)
    codec = fitted(f"sq{bits}", values)
    kind = {4: faiss.ScalarQuantizer.QT_4bit, 6: faiss.ScalarQuantizer.QT_6bit, 8: faiss.ScalarQuantizer.QT_8bit}[bits]
    reference = faiss.ScalarQuantizer(values.shape[1], kind)
    reference.train(values)
    codes = reference.compute_codes(values)
    assert np.array_equal(codec.encode(values), codes)
    assert np.allclose(codec.decode(torch.from_numpy(codes)), reference.decode(codes), atol=1e-4)


@pytest.mark.parametrize("name", ["pq4x4", "pq4x8", "pq8x8", "opq4x4", "opq8x4"])
def test_product_codes_are_those_of_faiss(name: str) -> None:
    values = vectors()
    codec = fitted(name, values)
    assert isinstance(codec, codecs.Product)
    reference = faiss.ProductQuantizer(16, codec.parts, codec.bits)
    faiss.copy_array_to_vector(codec.parameters["centroids"].ravel(), reference.centroids)
    turned = values @ codec.parameters["rotation"].T if codec.rotated else values
    codes = reference.compute_codes(np.ascontiguousarray(turned))
    assert codes.shape[1] == codec.columns
    assert np.array_equal(codec.encode(values), codes)
    expected = reference.decode(codes) @ (codec.parameters["rotation"] if codec.rotated else np.eye(16))
    assert np.allclose(codec.decode(torch.from_numpy(codes)), expected, atol=1e-3)
    if codec.rotated:
        assert np.allclose(codec.parameters["rotation"] @ codec.parameters["rotation"].T, np.eye(16), atol=1e-4)


@pytest.mark.parametrize("name", ["rq4x8", "rq2x4", "rq8x5", "lsq4x8", "lsq4x6"])
def test_additive_codes_are_read_as_faiss_reads_them(name: str) -> None:
    """FAISS decodes them to the same vectors, and its own encoding has no smaller error."""
    values = vectors(1200)
    codec = fitted(name, values)
    assert isinstance(codec, codecs.Additive)
    kind = {"rq": faiss.ResidualQuantizer, "lsq": faiss.LocalSearchQuantizer}[codec.kind]
    reference = kind(16, codec.parts, codec.bits)
    faiss.copy_array_to_vector(codec.parameters["codebooks"].ravel(), reference.codebooks)
    reference.is_trained = True
    stored = codec.encode(values)
    assert (stored.shape, stored.dtype) == ((1200, codec.columns), np.uint8)
    back = codec.decode(torch.from_numpy(stored)).numpy()
    assert np.allclose(back, reference.decode(stored), atol=1e-4)
    assert np.allclose(codec.decode(torch.from_numpy(stored).unflatten(0, (4, 300))).numpy().reshape(1200, 16), back)
    if codec.kind == "rq":
        reference.compute_codebook_tables()
        reference.max_beam_size = codecs.BEAM
    theirs = reference.decode(reference.compute_codes(values))
    assert np.square(back - values).sum() < 1.05 * np.square(theirs - values).sum()
    books = codec.parameters["codebooks"].astype(np.float64)
    codes = codec.codes(torch.from_numpy(stored)).numpy()
    assert codes.max() < codec.classes == books.shape[1]
    assert np.allclose(books[np.arange(codec.parts), codes].sum(1), back, atol=1e-4)


@pytest.mark.parametrize("name", ["rq4x8", "lsq4x8"])
def test_additive_codes_of_a_row_do_not_depend_on_its_neighbours(name: str) -> None:
    """But where two choices are equally good up to the rounding of a matrix product."""
    values = np.random.RandomState(0).randn(3000, 16).astype(np.float32)
    codec = fitted(name, values)
    values = values[:60]
    whole = codec.encode(values)
    again = pickle.loads(pickle.dumps(codec))
    assert np.array_equal(again.encode(values), whole)
    parts = np.concatenate([codec.encode(values[i : i + 7]) for i in range(0, 60, 7)])
    for other in (parts, codec.encode(values[::-1])[::-1]):
        assert (other == whole).all(1).mean() > 0.96
        left, same = (np.square(codec.decode(torch.tensor(s.copy())).numpy() - values).sum(1) for s in (whole, other))
        assert np.allclose(left, same, rtol=1e-4)


def test_sums_of_entries_are_nearer_than_parts_of_vectors() -> None:
    """Of vectors whose channels depend on one another, in the same bytes."""
    random = np.random.RandomState(0)
    values = (random.randn(3000, 6) @ random.randn(6, 32)).astype(np.float32)
    product, *additive = (codecs.error(fitted(n, values), values)["relative_mse"] for n in ("pq4x8", "rq4x8", "lsq4x8"))
    assert max(additive) < 0.7 * product


@given(st.integers(1, 9), st.sampled_from([3, 4, 5, 6, 8]), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_codes_are_packed_from_the_lowest_bit(count: int, bits: int, seed: int) -> None:
    codes = np.random.RandomState(seed).randint(0, 2**bits, (3, count))
    bit = (codes[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(bit.reshape(3, -1).astype(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(codecs.unpack(torch.from_numpy(packed), bits, count).numpy(), codes)
    if count * bits % 8 == 0:
        assert np.array_equal(codecs.pack(codes, bits), packed)


@pytest.mark.parametrize("classes", [9, 70_000])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(classes: int) -> None:
    logits = (8 * np.random.RandomState(0).randn(5, classes)).astype(np.float32)
    codec = codecs.make_codec("topk4", classes)
    back = codecs.decoded(codec, logits).astype(np.float64)
    order = np.argsort(-logits, 1)
    for row, read, best in zip(logits.astype(np.float64), back, order[:, :4], strict=True):
        rest = np.delete(row, best)
        assert np.allclose(read[best], row[best], rtol=1e-3)
        assert np.allclose(np.delete(read, best), logsumexp(rest) - np.log(len(rest)), atol=1e-4)
        assert np.isclose(logsumexp(read), logsumexp(row), atol=2e-2)


def test_divergence_is_the_formula() -> None:
    random = np.random.RandomState(1)
    a, b = random.randn(7, 11), random.randn(7, 11)
    for t in (1.0, 2.0, 4.0):
        p, q = log_softmax(a / t, 1), log_softmax(b / t, 1)
        assert np.isclose(codecs.divergence(a, b)[f"kl_t{t:g}"], (np.exp(p) * (p - q)).sum(1).mean())


def test_errors_are_ordered_as_the_bytes() -> None:
    values = vectors(2000)
    cosine = [codecs.error(fitted(n, values), values)["cosine_mean"] for n in ("float32", "sq8", "sq6", "sq4")]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] == pytest.approx(1.0, abs=1e-12)
    rotated, plain = (codecs.error(fitted(n, values), values)["relative_mse"] for n in ("opq4x4", "pq4x4"))
    assert 0.0 < rotated < 1.0
    assert 0.0 < plain < 1.0


@pytest.mark.parametrize(
    ("name", "dim", "expected"),
    [
        ("floot16", 4, "did you mean 'float16'"),
        ("pq3x8", 16, "do not divide into 3 parts"),
        ("pq1x4", 16, "whole bytes"),
        ("rq3x4", 16, "codec rq3x4: give at most 64 codes of at most 8 bits, in whole bytes; e.g. rq8x8"),
        ("lsq8x9", 16, "codec lsq8x9: give at most 64 codes of at most 8 bits, in whole bytes; e.g. lsq8x8"),
        ("rq65x8", 16, "at most 64 codes"),
        ("topk4", 4, "k must be between 1 and 3"),
        ("int8+zst", 4, "codec 'int8\\+zst'"),
    ],
)
def test_codecs_that_do_not_exist_or_fit(name: str, dim: int, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        codecs.make_codec(name, dim)


@pytest.mark.parametrize("name", ["sq8", "pq4x8", "opq4x8", "rq4x4", "lsq4x4"])
def test_values_whose_squares_exceed_float32_are_refused(name: str) -> None:
    with pytest.raises(SpkdError, match=r"target t: values up to \de\+2\d are too large for its codec; choose float32"):
        codecs.fit("t", codecs.make_codec(name, 16), 1e20 * vectors(600))


@pytest.mark.parametrize("name", ["rq4x2", "rq2x4", "lsq4x2", "rq1x8"])
def test_the_fewest_rows_that_an_additive_codec_accepts(name: str) -> None:
    codec = codecs.make_codec(name, 16)
    codecs.fit("t", codec, vectors(codec.least_rows))
    assert codecs.error(codec, vectors(300))["cosine_mean"] > 0.3


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(SpkdError, match=r"target t: its codec is learnt from at least 256 rows, and the views give 10"):
        codecs.fit("t", codecs.make_codec("pq4x8", 16), vectors(10))
