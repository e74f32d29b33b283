"""Silero VAD (Silero Team, github.com/snakers4/silero-vad), a recurrent network with its weights in its package."""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.vad.base import Detector, Stretches, VADCard
from spkd.errors import UsageError
from spkd.files import digest

WEIGHTS = "silero_vad_16k_sequence.onnx"
# Defaults of `get_speech_timestamps`, which are given to it, so that they are what the card says.
PARAMETERS = {"threshold": 0.5, "min_speech_duration_ms": 250, "min_silence_duration_ms": 100, "speech_pad_ms": 30}


class Silero(Detector):
    """Detector by the network of the package silero-vad, in ONNX Runtime on one thread of the CPU.

    Raises:
        UsageError: the package, or ONNX Runtime, is missing.
    """

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        try:
            import onnxruntime  # noqa: F401  # the package imports it where it is used first
            from silero_vad import SileroVADSequence, get_speech_timestamps_sequence
        except ImportError as error:
            raise UsageError(f"vad=silero needs silero-vad: pip install 'spkd[vad]' ({error})") from error
        finally:
            torch.set_num_threads(threads)  # the package sets it to 1 for the whole process
        self._timestamps = get_speech_timestamps_sequence
        weights = Path(str(files("silero_vad.data") / WEIGHTS))
        self._model = SileroVADSequence(str(weights))
        parameters = {name: float(value) for name, value in PARAMETERS.items()}
        self.card = VADCard("silero", version("silero-vad"), digest.of_file(weights), parameters)

    def detect(self, wave: np.ndarray) -> Stretches:
        found = self._timestamps(wave, self._model, sampling_rate=SAMPLE_RATE, **PARAMETERS)
        return [(int(each["start"]), int(each["end"])) for each in found]
