"""A speaker model in Python: `spkd.load("student").verify("a.wav", "b.wav")`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spkd.config import Given, keys
from spkd.corpus.audio import FULL_SCALE, SAMPLE_RATE, AudioError, decode, remark_on, resample
from spkd.corpus.vad import detector_of
from spkd.corpus.vad.base import NONE, Detector, joined
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.eval.calibration import FILE, Calibration
from spkd.eval.embed import notes_on_vad
from spkd.files.reading import parse_json
from spkd.hub import download, upload
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.registry import DETECTORS, TEACHERS
from spkd.students.description import DESCRIPTION
from spkd.teachers import load_teacher, resolved
from spkd.teachers.base import EmbeddingModel
from spkd.teachers.onnx_file import CALIBRATION, is_exported
from spkd.teachers.settings import CHECKPOINT, ModelConfig

Audio = str | Path | np.ndarray | Tensor | Sequence[float]


FRAME = 320  # samples (20 ms) of a frame whose level is measured
LEAST_LEVEL = -55.0  # dB of full scale: a quieter frame holds no speech
LEAST_SECONDS = 0.5  # s of louder frames that a decision needs
LEAST_PEAK = 1e-3  # of full scale: wider integers than 16 bits with a lower peak hold samples of another type
MOST_CHANNELS = 64  # most channels of a waveform (samples, channels), as soundfile gives it
CLIPPED = "are clipped"  # start of the only remark with which a decision is still made


@dataclass(frozen=True)
class Verification:
    """Result of the verification of two recordings.

    Attributes:
        same: the decision whether one speaker spoke both, `ratio >= threshold`. None, which is no acceptance, where a
            recording holds too little sound for a decision; `remarks` says which.
        score: cosine of the embeddings.
        ratio: log-likelihood ratio (natural logarithm).
        threshold: the threshold of the decision.
        remarks: problems of the quality of either recording, as phrases; usually ().
    """

    same: bool | None
    score: float
    ratio: float
    threshold: float
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Recording:
    """A recording, ready for the model.

    Attributes:
        wave: (samples,), float32, 16 kHz.
        remark: what makes speech unlikely in it, as in `spkd.corpus.audio.Decoded`; usually "".
    """

    wave: np.ndarray
    remark: str

    def remarks(self) -> list[str]:
        """Problems of its quality, as phrases."""
        frames = self.wave[: len(self.wave) // FRAME * FRAME].reshape(-1, FRAME)
        # Limited to 1e-10 of full scale, which is less than any recorder can write.
        level = 20 * np.log10(np.maximum((frames - self.wave.mean()).std(1), 1e-10))
        seconds = float((level >= LEAST_LEVEL).sum()) * FRAME / SAMPLE_RATE
        remarks = [f"its samples {self.remark}"] if self.remark else []
        if seconds < LEAST_SECONDS:
            remarks.append(
                f"only {seconds:.2f} s are louder than {LEAST_LEVEL:g} dB of full scale; a decision takes "
                f"{LEAST_SECONDS:g} s"
            )
        return remarks


class SpeakerModel:
    """Model that gives speaker embeddings, with its calibration.

    Recordings are paths, or waveforms (samples,) as arrays, tensors or lists: numbers in [-1, 1], or integers at the
    full scale of their type. A waveform (samples, channels), as soundfile reads it, is averaged over its channels.

    Attributes:
        name: the folder, the file or the hub id.
        calibration: calibration of the cosine of two embeddings; None where the model has none.
        dim: numbers in an embedding.

    Example:
        >>> model = spkd.load("student")  # doctest: +SKIP
        >>> model.embed(["a.wav", "b.wav"]).shape
        (2, 192)
        >>> model.verify("a.wav", "b.wav").same
        True
    """

    def __init__(
        self,
        model: EmbeddingModel,
        name: str,
        calibration: Calibration | None = None,
        detector: Detector | None = None,
    ) -> None:
        if EMBEDDING not in model.targets:
            raise UsageError(f"{name}: gives no embeddings")
        self.name, self.calibration, self._model, self._detector = name, calibration, model, detector
        self.dim = model.targets[EMBEDDING].dim

    def __repr__(self) -> str:
        calibrated = "calibrated" if self.calibration is not None else "no calibration"
        return f"SpeakerModel({self.name!r}, dim={self.dim}, {calibrated})"

    def embed(self, audio: Audio | Sequence[Audio], sample_rate: int = SAMPLE_RATE) -> np.ndarray:
        """Embeddings as the model gives them, without normalisation.

        Args:
            audio: one recording, a list of recordings, or an array (N, samples) of recordings.
            sample_rate: sampling rate of waveforms (Hz).
        Returns:
            (D,) of one recording; (N, D) of several.
        Raises:
            UsageError: the argument is not a recording.
            SpkdError: a recording cannot be used.
        """
        if _is_one(audio):
            return self._model.embed([self._recording(audio, sample_rate).wave])[0]
        several = isinstance(audio, Sequence) and not isinstance(audio, str | bytes)
        if not several and not (isinstance(audio, np.ndarray | Tensor) and audio.ndim == 2):
            raise UsageError(f"expected recordings (paths or waveforms) or a list of them, got {_what(audio)}")
        recordings = [self._recording(item, sample_rate) for item in audio]  # type: ignore[union-attr]
        return self._model.embed([recording.wave for recording in recordings])

    def score(self, first: Audio, second: Audio, sample_rate: int = SAMPLE_RATE) -> float:
        """Cosine of the embeddings of two recordings.

        Args:
            first: a recording.
            second: another recording.
            sample_rate: sampling rate of waveforms (Hz).
        Raises:
            UsageError: as of `embed`.
            SpkdError: as of `embed`.
        """
        return self._cosine(*self._model.embed([self._recording(side, sample_rate).wave for side in (first, second)]))

    def verify(
        self, first: Audio, second: Audio, threshold: str | float = "eer", sample_rate: int = SAMPLE_RATE
    ) -> Verification:
        """Decide whether one speaker spoke two recordings.

        No decision is made (`same` is None) where a recording holds less than half a second above -55 dB of full scale,
        where its channels cancel each other, or where it is mostly a constant offset; `remarks` says which.

        Args:
            first: a recording.
            second: another recording.
            threshold: a name in `calibration.thresholds` (`eer`, `min_dcf_0.01`, `false_alarm_0.01`, ...), or a
                log-likelihood ratio.
            sample_rate: sampling rate of waveforms (Hz).
        Raises:
            UsageError: the model has no calibration, one with another `vad`, or no threshold of this name; or as of
                `embed`.
            SpkdError: as of `embed`.
        """
        # The threshold.
        here = "" if self._detector is None else str(self._detector.card)
        if self.calibration is not None and self.calibration.system.vad != here:
            raise UsageError(
                f"{self.name}: calibrated with vad={self.calibration.system.vad or NONE}, and loaded with "
                f"vad={here or NONE}; load it with the same, or calibrate it with this one"
            )
        if self.calibration is None:
            raise UsageError(
                f"{self.name}: has no calibration; {self._way_to_calibrate()}; `score` needs none, and gives the cosine"
            )
        known = self.calibration.thresholds
        if isinstance(threshold, str) and threshold not in known:
            raise UsageError(
                f"threshold={threshold!r}: {self.name} has {', '.join(known)}{self.calibration.lacks(threshold)}"
            )
        if not isinstance(threshold, str | Real) or threshold != threshold:
            raise UsageError(f"threshold={threshold!r}: give a number, or one of {', '.join(known)}")
        limit = known[threshold] if isinstance(threshold, str) else float(threshold)
        # The ratio.
        sides = {"first": self._recording(first, sample_rate), "second": self._recording(second, sample_rate)}
        score = self._cosine(*self._model.embed([side.wave for side in sides.values()]))
        ratio = float(self.calibration({"score": np.array([score])})[0])
        # The decision, unless a recording is too poor.
        remarks = [(name, remark) for name, side in sides.items() for remark in side.remarks()]
        decided = all(remark.startswith(f"its samples {CLIPPED}") for _, remark in remarks)
        named = tuple(f"the {name} recording: {remark}" for name, remark in remarks)
        return Verification(ratio >= limit if decided else None, score, ratio, limit, named)

    def _way_to_calibrate(self) -> str:
        """Phrase that says how this model gets a calibration, which a student's folder and an exported file keep."""
        if is_exported(Path(self.name)):
            command = f"spkd calibrate TRIALS model=onnx model.weights={shlex.quote(self.name)} manifest=FILE"
            return f"make one with `{command}` (labelled trials of other speakers), then load the model again"
        if not (Path(self.name) / DESCRIPTION).is_file():
            return "a calibration is that of a student in its folder, which export and push take along"
        command = f"spkd calibrate TRIALS model={shlex.quote(self.name)} manifest=FILE"
        return f"make one with `{command}` (labelled trials of other speakers), then load the model again"

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
            name: USER/NAME.
            evaluations: folders that `spkd eval` wrote of this student, whose error rates the card shows.
            licence: an identifier of the hub, such as apache-2.0; "" where it is not stated.
            private: whether a new model is private.
            token: access token; None uses that of the machine.
        Returns:
            Address of the model.
        Raises:
            UsageError: the model is not the folder of a student, an evaluation is of other weights, or huggingface_hub
                is missing.
            SpkdError: the hub refuses it.
        """
        if not (Path(self.name) / DESCRIPTION).is_file():
            raise UsageError(f"{self.name}: only the folder of a student can be pushed")
        return upload(Path(self.name), name, evaluations, licence, private, token)

    def _recording(self, audio: object, sample_rate: int) -> _Recording:
        """Read a recording, and check that its length suits the model."""
        if not _is_one(audio):
            raise UsageError(f"expected a path or a waveform (samples,), got {_what(audio)}")
        if isinstance(audio, str | Path):
            try:
                decoded = decode(str(audio))
            except AudioError as error:
                raise SpkdError(str(error)) from error
            wave, remark = decoded.wave, decoded.remark
        else:
            samples = _samples(audio)
            wave = samples.mean(1)
            if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | np.integer) or sample_rate < 1:
                raise UsageError(f"sample_rate={sample_rate!r}: give the rate of the waveform in Hz, such as 16000")
            if not len(wave) or not np.isfinite(wave).all():
                raise SpkdError(f"expected a waveform (samples,) of finite numbers, got {_what(audio)}")
            if (peak := float(np.abs(wave).max())) > FULL_SCALE:
                raise SpkdError(f"a waveform of numbers up to {peak:.6g}: at integer scale; divide them by 32768")
            remark = remark_on(wave, samples)
            wave = resample(np.ascontiguousarray(wave), int(sample_rate), SAMPLE_RATE)
        if self._detector is not None:
            stretches = self._detector.detect(np.ascontiguousarray(wave, np.float32))
            if not stretches:
                raise SpkdError(f"no speech in a recording of {len(wave) / SAMPLE_RATE:.2f} s ({self._detector.card})")
            wave = joined(wave, stretches)
        least, most = self._model.min_samples, self._model.max_samples
        if len(wave) < least or (most is not None and len(wave) > most):
            limit = f"at least {least / SAMPLE_RATE:g} s" + (f", at most {most / SAMPLE_RATE:.0f} s" if most else "")
            raise SpkdError(f"{len(wave) / SAMPLE_RATE:.2f} s of audio; {self.name} takes {limit}")
        return _Recording(wave, remark)

    @staticmethod
    def _cosine(first: np.ndarray, second: np.ndarray) -> float:
        a, b = first.astype(np.float64), second.astype(np.float64)
        return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))


def _is_one(audio: object) -> bool:
    """Whether an argument is one recording, rather than several, or something else."""
    if isinstance(audio, np.ndarray | Tensor):
        return audio.ndim == 1 or (audio.ndim == 2 and audio.shape[1] <= MOST_CHANNELS < audio.shape[0])
    if isinstance(audio, Sequence) and not isinstance(audio, str | bytes):
        return len(audio) > 0 and all(isinstance(number, Real) for number in audio)
    return isinstance(audio, str | Path)


def _samples(audio: object) -> np.ndarray:
    """An array, tensor or list as a waveform (samples, channels), float32, full scale at 1."""
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = audio.float().numpy() if audio.is_floating_point() else audio.numpy()
    given = np.asarray(audio)
    if isinstance(audio, np.ndarray) and given.dtype.kind in "iu":
        limits = np.iinfo(given.dtype)
        middle = (limits.max + 1) // 2 if given.dtype.kind == "u" else 0  # zero level of unsigned audio
        given = (given.astype(np.float64) - middle) / (middle or limits.max + 1)
        peak = float(np.abs(given).max(initial=0.0))
        if limits.bits > 16 and 0 < peak < LEAST_PEAK:
            raise UsageError(
                f"a waveform of {limits.dtype} numbers up to {peak * (limits.max + 1):.0f}, far below the full scale "
                "of that type: give it in the type of the recording, such as int16"
            )
    elif given.dtype.kind not in "iuf":
        raise UsageError(f"expected a waveform of real numbers, got {_what(audio)}")
    given = given.astype(np.float32)
    return given[:, None] if given.ndim == 1 else given


def _what(audio: object) -> str:
    """Phrase that describes an argument, for errors."""
    if isinstance(audio, np.ndarray | Tensor):
        return f"an array of the shape {tuple(audio.shape)} and type {audio.dtype}"
    if isinstance(audio, Sequence) and not isinstance(audio, str | bytes):
        return f"a {type(audio).__name__} of {len(audio)}"
    return f"a {type(audio).__name__}" if audio is not None else "None"


def _of_onnx(path: Path) -> Calibration | None:
    """The calibration in an ONNX file that spkd wrote; None where there is none."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(CALIBRATION)
    if text is None:
        return None
    calibration = Calibration.from_json(parse_json(text, str(path)), str(path))
    calibration.check_plain(f"{path}: its calibration")
    return calibration


def load(
    source: str | Path,
    device: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    weights: str | Path | None = None,
    vad: str = NONE,
    **settings: Any,
) -> SpeakerModel:
    """Load a speaker model: a student, an ONNX file, or a teacher.

    Args:
        source: folder of a student, an ONNX file, USER/NAME on the Hugging Face hub, or a teacher family, as
            `model=` of `spkd eval` takes it.
        device: auto, cpu, mps, cuda or cuda:N.
        revision: a branch, a tag or a commit on the hub, of a student.
        token: access token of a student that is private on the hub.
        weights: weights of a teacher family, as `model.weights`: a file, a folder or a hub id.
        vad: detector of the speech that is taken of each recording, as of `spkd eval`: none, silero or energy.
        settings: settings of the teacher family, such as layer=9 of wavlm or input="nemo" of an ONNX file;
            `spkd eval --help model` lists them.
    Returns:
        The model, with `embed`, `score`, `verify` and `push_to_hub`.
    Raises:
        UsageError: there is no model, or a wrong argument.
        SpkdError: the model is damaged, or the hub does not answer.
    """
    if vad != NONE and vad not in DETECTORS:
        raise UsageError(f"vad={vad!r}: {NONE}, {', '.join(DETECTORS)}{did_you_mean(vad, DETECTORS)}")
    name, path, where = str(source), Path(source), resolve(device)
    # An ONNX file, or a teacher. As in `spkd eval`, the folder of a student may have the name of a family.
    if path.suffix == ".onnx" and path.is_file():
        if weights is not None:
            raise UsageError(f"weights={str(weights)!r}: {name} holds its own")
        onnx = ModelConfig("onnx", name, settings=_settings("onnx", settings))
        return _loaded(load_teacher(onnx, where), name, _of_onnx(path), vad)
    if name in TEACHERS:
        file = None if weights is None else str(weights)
        teacher = resolved(ModelConfig(name, file, settings=_settings(name, settings)))
        if teacher.name == name:
            return _loaded(load_teacher(teacher, where), name, None, vad)
    # A student.
    given = ({} if weights is None else {"weights": weights}) | settings
    if given:
        argument, value = next(iter(given.items()))
        raise UsageError(f"{argument}={value!r}: no argument for a student; it is one of a teacher family")
    if not (path / DESCRIPTION).is_file():
        if path.exists() or name.count("/") != 1:
            raise UsageError(
                f"{name}: no student there ({DESCRIPTION}), no .onnx file, no teacher family and no hub id USER/NAME"
                f"{did_you_mean(name, TEACHERS)}"
            )
        path = download(name, revision, token)
    student = load_teacher(ModelConfig(CHECKPOINT, str(path)), where)
    calibration = path / FILE
    of_student = Calibration.of_student(calibration, student.weights_sha256) if calibration.is_file() else None
    return _loaded(student, name, of_student, vad)


def _loaded(model: EmbeddingModel, name: str, calibration: Calibration | None, vad: str) -> SpeakerModel:
    """A loaded model, with a note where it was trained on other speech than it is given."""
    for note in notes_on_vad([model], vad):
        log(f"note: {note}")
    return SpeakerModel(model, name, calibration, None if vad == NONE else detector_of(vad))


def _settings(family: str, given: dict[str, Any]) -> Any:
    """Settings of a teacher family. Raises UsageError for a name or a value that it does not take."""
    kind = TEACHERS.settings(family)
    known = {k.name: k for k in keys(kind)}
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{name}={value!r}: no setting of {family}{did_you_mean(name, known)}")
    return kind(
        **{name: known[name].read(Given(f"load({name}={value!r})", value, True)) for name, value in given.items()}
    )
