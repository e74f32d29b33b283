"""A speaker model in Python: `spkd.load("student").verify("a.wav", "b.wav")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE, AudioError, decode, resample
from spkd.corpus.loader import batched
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError
from spkd.eval.calibration import FILE, Calibration
from spkd.files.atomic import parse_json
from spkd.hub import download, upload
from spkd.outputs.target import EMBEDDING
from spkd.students.checkpoint import DESCRIPTION
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig

Audio = str | Path | np.ndarray | Tensor
BATCH, WASTE = 32, 0.2  # waveforms in one batch, and the most padding where the model takes views of different length


@dataclass(frozen=True)
class Verification:
    """Whether two recordings are of one speaker.

    Attributes:
        same: the decision, `ratio >= threshold`.
        score: cosine of the embeddings.
        ratio: log-likelihood ratio (natural logarithm).
        threshold: that was used.
    """

    same: bool
    score: float
    ratio: float
    threshold: float


class SpeakerModel:
    """A model that gives speaker embeddings, with the calibration that travels with it.

    Attributes:
        name: the folder, the file or the hub id.
        calibration: of the cosine of two embeddings; None where the model has none.
        dim: numbers in an embedding.

    Example:
        >>> model = spkd.load("student")  # doctest: +SKIP
        >>> model.embed(["a.wav", "b.wav"]).shape
        (2, 192)
        >>> model.verify("a.wav", "b.wav").same
        True
    """

    def __init__(self, teacher: Teacher, name: str, calibration: Calibration | None = None) -> None:
        if EMBEDDING not in teacher.targets:
            raise UsageError(f"{name}: gives no embeddings")
        self.name, self.calibration, self._teacher = name, calibration, teacher
        self.dim = teacher.targets[EMBEDDING].dim

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str = "auto", revision: str | None = None, token: str | None = None
    ) -> SpeakerModel:
        """Load a student's folder, an ONNX file that `spkd export` wrote, or a model of the Hugging Face hub.

        Args:
            source: a path, or USER/NAME on the hub.
            device: as the setting of that name: auto, cpu, cuda:N ...
            revision, token: for the hub: a branch, a tag or a commit, and the access token of a private model.
        Raises:
            UsageError: none there. SpkdError: damaged, or the hub does not answer.
        """
        path, where = Path(source), resolve(device)
        if path.suffix == ".onnx" and path.is_file():
            teacher = load_teacher(ModelConfig("onnx", str(path)), where)
            return cls(teacher, str(source), _of_onnx(path))
        if not (path / DESCRIPTION).is_file():
            if path.exists() or str(source).count("/") != 1:
                raise UsageError(f"{source}: no student there ({DESCRIPTION}), no .onnx file, and no hub id USER/NAME")
            path = download(str(source), revision, token)
        teacher = load_teacher(ModelConfig("checkpoint", str(path)), where)
        found, weights = path / FILE, teacher.card().weights_sha256
        return cls(teacher, str(source), Calibration.of_student(found, weights) if found.is_file() else None)

    def embed(self, audio: Audio | Sequence[Audio], sample_rate: int = SAMPLE_RATE) -> np.ndarray:
        """Embeddings as the model gives them: (D,) of one recording, (N, D) of a list.

        Args:
            audio: paths, or waveforms (samples,) in [-1, 1].
            sample_rate: of waveforms (Hz).
        Raises:
            SpkdError: a recording that cannot be used, with the reason.
        """
        if isinstance(audio, str | Path | np.ndarray | Tensor) and not (hasattr(audio, "ndim") and audio.ndim == 2):
            return self.embed([audio], sample_rate)[0]
        waves = [self._wave(one, sample_rate) for one in audio]  # type: ignore[union-attr]
        embeddings = np.empty((len(waves), self.dim), np.float32)
        lengths = np.array([len(wave) for wave in waves], np.int64)
        for group in batched(np.arange(len(waves)), lengths, BATCH, WASTE if self._teacher.takes_lengths else 0.0):
            counts = torch.from_numpy(lengths[group])
            batch = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(waves[index]) for index in group], True)
            given = counts if len(counts.unique()) > 1 else None
            embeddings[group] = self._teacher.extract(batch, [EMBEDDING], lengths=given)[EMBEDDING]
        return embeddings

    def score(self, one: Audio, other: Audio, sample_rate: int = SAMPLE_RATE) -> float:
        """Cosine of the embeddings of two recordings."""
        return self._cosine(*self.embed([one, other], sample_rate))

    def verify(
        self, one: Audio, other: Audio, threshold: str | float = "eer", sample_rate: int = SAMPLE_RATE
    ) -> Verification:
        """Whether two recordings are of one speaker.

        Args:
            threshold: a name in `calibration.thresholds` (`eer`, `min_dcf_0.01`, `false_alarm_0.01`, ...), or a
                log-likelihood ratio.
        Raises:
            UsageError: the model has no calibration, or none of this name. SpkdError: as `embed`.
        """
        if self.calibration is None:
            raise UsageError(
                f"{self.name}: has no calibration; make one with `spkd calibrate`, then load the model again"
            )
        known = self.calibration.thresholds
        if isinstance(threshold, str) and threshold not in known:
            raise UsageError(f"threshold={threshold!r}: {self.name} has {', '.join(known)}")
        limit = known[threshold] if isinstance(threshold, str) else float(threshold)
        score = self.score(one, other, sample_rate)
        ratio = float(self.calibration({"score": np.array([score])})[0])
        return Verification(ratio >= limit, score, ratio, limit)

    def push_to_hub(
        self,
        name: str,
        evaluations: Sequence[str | Path] = (),
        licence: str = "",
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload a student with a model card: error rates, licence, teachers, fingerprints of the caches.

        Args:
            name: USER/NAME. evaluations: folders that `spkd eval` wrote, whose error rates the card shows.
            licence: an identifier of the hub, such as apache-2.0.
        Returns:
            The address of the model.
        Raises:
            UsageError: not a student's folder, or huggingface_hub is missing. SpkdError: the hub refuses.
        """
        if not (Path(self.name) / DESCRIPTION).is_file():
            raise UsageError(f"{self.name}: only the folder of a student can be pushed")
        return upload(Path(self.name), name, evaluations, licence, private, token)

    def _wave(self, audio: Audio, sample_rate: int) -> np.ndarray:
        """A waveform (samples,) at 16 kHz that is long enough for the model."""
        if isinstance(audio, str | Path):
            try:
                wave = decode(str(audio)).wave
            except AudioError as error:
                raise SpkdError(str(error)) from error
        else:
            wave = np.asarray(audio.cpu() if isinstance(audio, Tensor) else audio, np.float32)
            if wave.ndim != 1 or not len(wave) or not np.isfinite(wave).all():
                raise SpkdError(f"expected a waveform (samples,) of finite numbers, got the shape {wave.shape}")
            wave = resample(wave, sample_rate, SAMPLE_RATE)
        least, most = self._teacher.min_samples, self._teacher.max_samples
        if len(wave) < least or (most is not None and len(wave) > most):
            limit = f"at least {least / SAMPLE_RATE:g} s" + (f", at most {most / SAMPLE_RATE:.0f} s" if most else "")
            raise SpkdError(f"{len(wave) / SAMPLE_RATE:.2f} s of audio; {self.name} takes {limit}")
        return wave

    @staticmethod
    def _cosine(one: np.ndarray, other: np.ndarray) -> float:
        a, b = one.astype(np.float64), other.astype(np.float64)
        return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))


def _of_onnx(path: Path) -> Calibration | None:
    """The calibration within an ONNX file that spkd wrote."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get("spkd_calibration")
    return None if text is None else Calibration.from_json(parse_json(text, str(path)), str(path))


def load(
    source: str | Path, device: str = "auto", revision: str | None = None, token: str | None = None
) -> SpeakerModel:
    """`SpeakerModel.from_pretrained`."""
    return SpeakerModel.from_pretrained(source, device, revision, token)
