"""The network of silero-vad against the package's own function over its TorchScript model."""

from __future__ import annotations

import hashlib
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import numpy as np
import pytest
import torch

from spkd.corpus.vad.silero import Silero
from spkd.demo.synthesis import speaker, utterance
from spkd.errors import UsageError


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    """Synthetic speech between pauses with a little noise; the last is noise alone."""
    random, made = np.random.RandomState(0), []
    for number in range(4):
        parts = [utterance(speaker(number), 10 * number + part, 1.0) for part in range(2)]
        quiet = [1e-3 * random.randn(length) for length in (4000, 12_345, 3001)]
        made.append(np.concatenate([quiet[0], parts[0], quiet[1], parts[1], quiet[2]]).astype(np.float32))
    return [*made, (1e-3 * random.randn(20_000)).astype(np.float32)]


def test_stretches_are_those_of_the_packages_own_function(waves: list[np.ndarray]) -> None:
    silero_vad = pytest.importorskip("silero_vad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated
        model = silero_vad.load_silero_vad()
    detector = Silero()
    found = [detector.detect(wave) for wave in waves]
    for wave, stretches in zip(waves, found, strict=True):
        theirs = silero_vad.get_speech_timestamps(torch.from_numpy(wave), model, sampling_rate=16_000)
        assert stretches == [(each["start"], each["end"]) for each in theirs]
    assert found[-1] == []
    assert all(len(stretches) > 1 for stretches in found[:3])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(detector.detect, waves * 3)) == found * 3


def test_the_card_names_version_and_weights() -> None:
    pytest.importorskip("silero_vad")
    card = Silero().card
    weights = (files("silero_vad.data") / "silero_vad_16k_sequence.onnx").read_bytes()
    assert card.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert str(card).startswith("silero 6.")
    assert card.parameters["threshold"] == 0.5


def test_torch_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("silero_vad")
    for name in [name for name in sys.modules if name.split(".")[0] == "silero_vad"]:
        monkeypatch.delitem(sys.modules, name)  # it sets the number where it is imported
    torch.set_num_threads(2)
    Silero()
    assert torch.get_num_threads() == 2


def test_without_the_package_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(UsageError, match=r"vad=silero needs silero-vad: pip install 'spkd\[vad\]'"):
        Silero()
