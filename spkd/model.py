"""A speaker model in Python: `spkd.load("student").verify("a.wav", "b.wav")`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkd.config import Given, keys
from spkd.corpus.audio import FULL_SCALE, SAMPLE_RATE, AudioError, decode, remark_on, resample
from spkd.corpus.quality import Remark, remarks_on
from spkd.corpus.vad import detector_of
from spkd.corpus.vad.base import NONE, Detector, joined
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.eval.calibration import FILE, Calibration, file_of
from spkd.eval.embed import notes_on_vad
from spkd.files.reading import parse_json
from spkd.hub import download, upload
from spkd.mapping.embedding_map import load_map
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.registry import TEACHERS
from spkd.students.description import DESCRIPTION
from spkd.teachers import load_teacher, resolved
from spkd.teachers.base import Teacher
from spkd.teachers.bundled import model_card
from spkd.teachers.checkpoint import CheckpointTeacher
from spkd.teachers.onnx_file import CALIBRATION, is_exported
from spkd.teachers.settings import BUNDLED, CHECKPOINT, ModelConfig
from spkd.voiceprint import Voiceprint

Audio = str | Path | np.ndarray | Tensor | Sequence[float]


LEAST_PEAK = 1e-3  # of full scale: wider integers than 16 bits with a lower peak hold samples of another type
MOST_CHANNELS = 64  # most channels of a waveform (samples, channels), as soundfile gives it
DOUBT = "may be of another speaker"  # in remarks on enrolments


@dataclass(frozen=True)
class Verification:
    """Result of the verification of two recordings, or of a recording and a voiceprint.

    Attributes:
        same: the decision whether one speaker spoke both, `ratio >= threshold`. None, which is no acceptance, where a
            recording holds too little sound, or no speech, for a decision; `remarks` says which.
        score: cosine of the embeddings; of a voiceprint of several recordings, the mean of the cosines with them.
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
class Identification:
    """Result of the search of a recording's speaker among voiceprints.

    Attributes:
        name: name of the most similar voice; None where none reaches the threshold, or no decision could be made.
        results: name of each voice -> its verification, the most similar first.
    """

    name: str | None
    results: Mapping[str, Verification]


@dataclass(frozen=True)
class _Side:
    """One side of a verification.

    Attributes:
        embedding: (D,) float64, of length 1; of several recordings, the mean of theirs.
        mapped_by: fingerprint of the map by which it came from another model; "" where it did not.
        remarks: problems of its quality.
        decides: whether a decision can be made with it.
    """

    embedding: np.ndarray
    remarks: tuple[str, ...]
    decides: bool
    mapped_by: str = ""


@dataclass(frozen=True)
class _Recording:
    """A recording, ready for the model.

    Attributes:
        wave: (samples,), float32, 16 kHz.
        remark: what makes speech unlikely in it, as in `spkd.corpus.audio.Decoded`; usually "".
        has_speech: whether a detector of speech chose it.
    """

    wave: np.ndarray
    remark: str
    has_speech: bool = False

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLE_RATE

    def remarks(self) -> list[Remark]:
        """Problems of its quality."""
        return remarks_on(self.wave, self.remark, self.has_speech)


class SpeakerModel:
    """Model that gives speaker embeddings, with its calibration.

    Recordings are paths, or waveforms (samples,) as arrays, tensors or lists: numbers in [-1, 1], or integers at the
    full scale of their type. A waveform (samples, channels), as soundfile reads it, is averaged over its channels.

    Attributes:
        name: the folder, the file or the hub id.
        calibration: calibration of the cosine of two embeddings; None where the model has none.
        map_calibration: calibration of the cosine of a voiceprint that a map brought from another model with an
            embedding of this one, and the fingerprint of the map before it; None where none is given.
        dim: numbers in an embedding.
        card: of the model that comes with spkd: what it was trained on, error rates, licences (Markdown); otherwise "".

    Example:
        >>> model = spkd.load("student")  # doctest: +SKIP
        >>> model.embed(["a.wav", "b.wav"]).shape
        (2, 192)
        >>> model.verify("a.wav", "b.wav").same
        True
    """

    def __init__(
        self,
        model: Teacher,
        name: str,
        calibration: Calibration | None = None,
        detector: Detector | None = None,
        card: str = "",
        map_calibration: tuple[str, Calibration] | None = None,
    ) -> None:
        if EMBEDDING not in model.targets:
            raise UsageError(f"{name}: gives no embeddings")
        self.name, self.calibration, self._model, self._detector = name, calibration, model, detector
        self.card, self.map_calibration = card, map_calibration
        self.dim = model.targets[EMBEDDING].dim

    @property
    def digest(self) -> str:
        """Digest of what decides on its embeddings: the weights, the settings under which they run, and the speech."""
        return self._model.described().model_digest(None if self._detector is None else str(self._detector.card))

    @property
    def part(self) -> int | None:
        """Number of numbers of a student's embedding, the first ones, that are taken; None: all."""
        return self._model.part if isinstance(self._model, CheckpointTeacher) else None

    @property
    def label(self) -> str:
        """Its name, with the dimension where a part of the embedding is taken."""
        return self.name if self.part is None else f"{self.name}, dimension={self.part}"

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

    def score(self, first: Audio | Voiceprint, second: Audio | Voiceprint, sample_rate: int = SAMPLE_RATE) -> float:
        """Cosine of the embeddings of two recordings; of a voiceprint, the mean of the cosines with its recordings.

        Args:
            first: a recording, or a voiceprint of this model.
            second: another one.
            sample_rate: sampling rate of waveforms (Hz).
        Raises:
            UsageError: as of `embed`, or a voiceprint of another model.
            SpkdError: as of `embed`.
        """
        names = _names_of([first, second], ["the first recording", "the second recording"])
        one, two = self._sides(dict(zip(names, [first, second], strict=True)), sample_rate)
        return float(one.embedding @ two.embedding)

    def enrol(self, recordings: Audio | Sequence[Audio], sample_rate: int = SAMPLE_RATE) -> Voiceprint:
        """Voiceprint of a person, from one recording or several.

        Where there are several recordings and the model has a calibration, each is compared with the others: one that
        the threshold at equal error rates would reject is named in the remarks; of two, both are.

        Args:
            recordings: a recording, or a list of recordings.
            sample_rate: sampling rate of waveforms (Hz).
        Raises:
            UsageError: as of `embed`, or a recording is there twice.
            SpkdError: as of `embed`; or a recording holds too little sound or no speech, as of `verify`.
        """
        several = [recordings] if _is_one(recordings) else recordings
        if not isinstance(several, Sequence) or isinstance(several, str | bytes) or not several:
            raise UsageError(f"expected recordings (paths or waveforms) or a list of them, got {_what(recordings)}")
        read = [self._recording(audio, sample_rate) for audio in several]
        names = _names_of(several, [f"recording {number}" for number in range(1, len(several) + 1)])
        for number, recording in enumerate(read):
            for name, earlier in zip(names, read[:number], strict=False):
                if np.array_equal(recording.wave, earlier.wave):
                    raise UsageError(f"{names[number]}: is the same as {name}; each recording counts once")
        remarks = []
        for name, recording in zip(names, read, strict=True):
            for remark in recording.remarks():
                if not remark.is_minor:
                    raise SpkdError(f"{name}: {remark.text}")
                remarks.append(f"{name}: {remark.text}")
        units = _units(self._model.embed([recording.wave for recording in read]))
        remarks += self._doubts(units, names)
        mean, seconds = units.mean(0).astype(np.float32), sum(recording.seconds for recording in read)
        return Voiceprint(mean, self.digest, len(read), seconds, date.today().isoformat(), tuple(remarks))

    def _doubts(self, units: np.ndarray, names: Sequence[str]) -> Iterator[str]:
        """Remarks on the recordings that are unlike the others.

        Args:
            units: (N, D) embeddings of length 1.
            names: names of the recordings in remarks.
        """
        limit = None if self.calibration is None else self.calibration.thresholds.get("eer")
        if self.calibration is None or limit is None or len(units) < 2:
            return
        if len(units) == 2:
            if self.calibration({"score": np.array([units[0] @ units[1]])})[0] < limit:
                yield f"{names[0]}, {names[1]}: one {DOUBT}"
            return
        for number, unit in enumerate(units):
            others = np.delete(units, number, 0).mean(0)
            if self.calibration({"score": np.array([unit @ others])})[0] < limit:
                yield f"{names[number]}: {DOUBT}"

    def verify(
        self,
        first: Audio | Voiceprint,
        second: Audio | Voiceprint,
        threshold: str | float = "eer",
        sample_rate: int = SAMPLE_RATE,
    ) -> Verification:
        """Decide whether one speaker spoke two recordings, or is the person of a voiceprint.

        No decision is made (`same` is None) where a recording holds less than half a second above -55 dB of full scale,
        where its channels cancel each other, where it is mostly a constant offset, or where no speech is found
        (`spkd.corpus.quality`); `remarks` says which. Clipping and much silence are remarks alone.

        Args:
            first: a recording, or a voiceprint of this model.
            second: another one.
            threshold: a name in `calibration.thresholds` (`eer`, `min_dcf_0.01`, `false_alarm_0.01`, ...), or a
                log-likelihood ratio.
            sample_rate: sampling rate of waveforms (Hz).
        Raises:
            UsageError: the model has no calibration, or none of the map by which a voiceprint came from another model;
                one with another `vad`, or no threshold of this name; a voiceprint of another model; or as of `embed`.
            SpkdError: as of `embed`.
        """
        calibration = self._calibration(first, second)
        limit = self._limit(threshold, calibration)
        names = _names_of([first, second], ["the first recording", "the second recording"])
        one, two = self._sides(dict(zip(names, [first, second], strict=True)), sample_rate)
        return _decided(one, two, limit, calibration)

    def identify(
        self,
        recording: Audio,
        voices: Mapping[str, Voiceprint],
        threshold: str | float = "eer",
        sample_rate: int = SAMPLE_RATE,
    ) -> Identification:
        """Find the speaker of a recording among voiceprints.

        Each voice is verified by itself, so that the more voices there are, the more often a stranger is taken for one
        of them: with N voices up to N times the false alarms of the threshold.

        Args:
            recording: the recording.
            voices: name of each voice -> its voiceprint, by this model.
            threshold: as of `verify`.
            sample_rate: sampling rate of a waveform (Hz).
        Raises:
            UsageError: as of `verify`, or there are no voices.
            SpkdError: as of `embed`.
        """
        if not isinstance(voices, Mapping):
            raise UsageError(f"expected voices as a mapping of names to voiceprints, got {_what(voices)}")
        if not voices:
            raise UsageError("no voices to choose from; enrol some first")
        calibrations = [self._calibration(each) for each in voices.values()]
        limits = [self._limit(threshold, each) for each in calibrations]
        tested, *enrolled = self._sides(
            dict(zip(_names_of([recording], ["the recording"]), [recording], strict=True))
            | dict(enumerate(voices.values())),
            sample_rate,
        )
        found = {
            name: _decided(side, tested, limit, calibration)
            for name, side, limit, calibration in zip(voices, enrolled, limits, calibrations, strict=True)
        }
        # Scores of mapped voices and of others are not comparable; their ratios are.
        is_mixed = len({side.mapped_by for side in enrolled}) > 1
        ranked = dict(sorted(found.items(), key=lambda item: -(item[1].ratio if is_mixed else item[1].score)))
        best = next(iter(ranked))
        return Identification(best if ranked[best].same else None, ranked)

    def why_undecided(self, *sides: Audio | Voiceprint) -> tuple[str, str] | None:
        """Reason for which no decision can be made between two sides, or of one, and the way to one; None: it can.

        Args:
            sides: recordings and voiceprints of this model.
        """
        mapped = [side.mapped_by for side in sides if isinstance(side, Voiceprint) and side.mapped_by]
        if len(mapped) > 1:
            return "both were mapped from another model", "compare a voice with a recording"
        if mapped and (self.map_calibration is None or self.map_calibration[0] != mapped[0]):
            name = f"the map {mapped[0][:12]}"
            return (
                f"no calibration of {name} is given",
                f"give it (map_by=MAP), or {way_to_calibrate_map('MAP', self.name)}",
            )
        if not mapped and self.calibration is None:
            return f"{self.name} has no calibration", self.way_to_calibrate()
        return None

    def _calibration(self, *sides: Audio | Voiceprint) -> Calibration:
        """Calibration of the scores of two sides, or of one with a recording. Raises UsageError: there is none."""
        if reason := self.why_undecided(*sides):
            why = reason[0].removeprefix(f"{self.name} ")
            raise UsageError(f"{self.name}: {why}; {reason[1]}; `score` needs none, and gives the cosine")
        is_mapped = any(isinstance(side, Voiceprint) and side.mapped_by for side in sides)
        found = self.map_calibration[1] if is_mapped and self.map_calibration is not None else self.calibration
        assert found is not None
        return found

    def _limit(self, threshold: str | float, calibration: Calibration) -> float:
        """Least log-likelihood ratio of an acceptance. Raises UsageError as `verify` does."""
        here = "" if self._detector is None else str(self._detector.card)
        if calibration.system.vad != here:
            raise UsageError(
                f"{self.name}: calibrated with vad={calibration.system.vad or NONE}, and loaded with "
                f"vad={here or NONE}; load it with vad={calibration.system.vad or NONE}, or calibrate it with "
                f"vad={here or NONE}"
            )
        known = calibration.thresholds
        if isinstance(threshold, str) and threshold not in known:
            raise UsageError(
                f"threshold={threshold!r}: {self.name} has {', '.join(known)}{calibration.lacks(threshold)}"
            )
        is_number = isinstance(threshold, Real) and not isinstance(threshold, bool) and math.isfinite(threshold)
        if not isinstance(threshold, str) and not is_number:
            raise UsageError(f"threshold={threshold!r}: give a number, or one of {', '.join(known)}")
        return known[threshold] if isinstance(threshold, str) else float(threshold)

    def _sides(self, given: Mapping[Any, Audio | Voiceprint], sample_rate: int) -> list[_Side]:
        """Sides of verifications, whose recordings are embedded together.

        Args:
            given: what a remark on a recording begins with -> the recording; any key -> a voiceprint.
        Raises:
            UsageError: a voiceprint of another model, or of another width.
        """
        prints = {name: each for name, each in given.items() if isinstance(each, Voiceprint)}
        if any(len(each.embedding) != self.dim for each in prints.values() if each.model == self.digest):
            raise UsageError(f"a voiceprint of {self.label} has not {self.dim} numbers: damaged, or not made by spkd")
        if prints and {each.model for each in prints.values()} != {self.digest}:
            raise UsageError(
                f"a voiceprint of another model than {self.label}; enrol the person again with it, or map the "
                "voiceprint (`spkd map`, then spkd.load_map)"
            )
        recordings = {name: self._recording(each, sample_rate) for name, each in given.items() if name not in prints}
        embedded = self._model.embed([recording.wave for recording in recordings.values()])
        sides = {
            name: _Side(each.embedding.astype(np.float64), (), True, each.mapped_by) for name, each in prints.items()
        }
        for (name, recording), unit in zip(recordings.items(), _units(embedded), strict=True):
            remarks = recording.remarks()
            named = tuple(f"{name}: {remark.text}" for remark in remarks)
            sides[name] = _Side(unit, named, all(remark.is_minor for remark in remarks))
        return [sides[name] for name in given]

    def way_to_calibrate(self) -> str:
        """Phrase that says how this model gets a calibration, which a student's folder and an exported file keep."""
        if is_exported(Path(self.name)):
            command = f"spkd calibrate TRIALS model=onnx model.weights={shlex.quote(self.name)} manifest=FILE"
            return f"make one with `{command}` (labelled trials of other speakers), then load the model again"
        if not (Path(self.name) / DESCRIPTION).is_file():
            return "a calibration is that of a student in its folder, which export and push take along"
        part = "" if self.part is None else f" model.dimension={self.part}"
        command = f"spkd calibrate TRIALS model={shlex.quote(self.name)}{part} manifest=FILE"
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
        if self.card:
            raise UsageError(f"{BUNDLED}: comes with spkd, and is not yours to push; train a student of your own")
        if not (Path(self.name) / DESCRIPTION).is_file():
            raise UsageError(f"{self.name}: only the folder of a student can be pushed")
        return upload(Path(self.name), name, evaluations, licence, private, token)

    def _recording(self, audio: object, sample_rate: int) -> _Recording:
        """Read a recording, and check that its length suits the model."""
        if not _is_one(audio):
            is_turned = isinstance(audio, np.ndarray | Tensor) and audio.ndim == 2 and audio.shape[0] <= MOST_CHANNELS
            hint = "; of (channels, samples), as torchaudio gives, give the transpose" if is_turned else ""
            raise UsageError(f"expected a path or a waveform (samples,), got {_what(audio)}{hint}")
        if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | np.integer) or sample_rate < 1:
            raise UsageError(f"sample_rate={sample_rate!r}: give the rate of the waveform in Hz, such as 16000")
        if isinstance(audio, str | Path):
            try:
                decoded = decode(str(audio))
            except AudioError as error:
                raise SpkdError(str(error)) from error
            wave, remark = decoded.wave, decoded.remark
        else:
            samples = _samples(audio)
            wave = samples.mean(1)
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
        return _Recording(wave, remark, self._detector is not None and self._detector.finds_speech)


def _decided(first: _Side, second: _Side, limit: float, calibration: Calibration) -> Verification:
    """Verification of two sides by a calibration of their scores."""
    score = float(first.embedding @ second.embedding)
    ratio = float(calibration({"score": np.array([score])})[0])
    same = ratio >= limit if first.decides and second.decides else None
    return Verification(same, score, ratio, limit, (*first.remarks, *second.remarks))


def way_to_calibrate_map(folder: str, model: str = "NEW_MODEL") -> str:
    """Phrase that says how a map gets a calibration, which its folder keeps."""
    given = f"model={shlex.quote(model)} enrol.model=OLD_MODEL enrol.map_by={shlex.quote(folder)} manifest=FILE"
    return f"make one with `spkd calibrate TRIALS {given}` (labelled trials of other speakers)"


def _names_of(recordings: Sequence[object], otherwise: Sequence[str]) -> list[str]:
    """Names of recordings in remarks: the paths of files, unless two are the same, and else what is given."""
    paths = [str(each) for each in recordings if isinstance(each, str | Path)]
    if len(set(paths)) < len(paths):
        return list(otherwise)
    return [
        str(each) if isinstance(each, str | Path) else name for each, name in zip(recordings, otherwise, strict=True)
    ]


def _units(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings (N, D) divided by their lengths, float64."""
    values = embeddings.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


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
    source: str | Path = "bundled",
    device: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    weights: str | Path | None = None,
    vad: str = "none",
    map_by: str | Path | None = None,
    dimension: int | None = None,
    **settings: Any,
) -> SpeakerModel:
    """Load a speaker model: a student, an ONNX file, or a teacher.

    Args:
        source: folder of a student, an ONNX file, USER/NAME on the Hugging Face hub, or a teacher family, as
            `model=` of `spkd eval` takes it; by default the small model that comes with spkd, a demonstration.
        device: auto, cpu, mps, cuda or cuda:N.
        revision: a branch, a tag or a commit on the hub, of a student.
        token: access token of a student that is private on the hub.
        weights: weights of a teacher family, as `model.weights`: a file, a folder or a hub id.
        vad: detector of the speech that is taken of each recording, as of `spkd eval`: none, silero or energy.
        map_by: folder of a map to this model (`spkd map`), whose calibration decides on voiceprints that it brought
            from another model.
        dimension: numbers of the embedding, the first ones, that are taken of a student trained with student.nested;
            None: all. Calibration and voiceprints are those of this dimension.
        settings: settings of the teacher family, such as layer=9 of wavlm or input="nemo" of an ONNX file;
            `spkd eval --help` lists them (`model.wavlm.layer`).
    Returns:
        The model: `embed`, `score`, `verify`, `enrol`, `identify`, `push_to_hub`.
    Raises:
        UsageError: there is no model, or a wrong argument.
        SpkdError: the model or the map is damaged, or the hub does not answer.
    """
    name, path, where = str(source), Path(source), resolve(device)
    # An ONNX file, or a teacher. As in `spkd eval`, the folder of a student may have the name of a family.
    if path.suffix == ".onnx" and path.is_file():
        if weights is not None:
            raise UsageError(f"weights={str(weights)!r}: {name} holds its own")
        onnx = ModelConfig("onnx", name, dimension=dimension, settings=_settings("onnx", settings))
        return open_model(onnx, where, name, vad, map_by)
    if name == BUNDLED and isinstance(source, str) and weights is not None:
        raise UsageError(f"weights={str(weights)!r}: {BUNDLED} has weights of its own")
    if name in TEACHERS and not (name == BUNDLED and isinstance(source, Path)):
        file = None if weights is None else str(weights)
        teacher = resolved(ModelConfig(name, file, dimension=dimension, settings=_settings(name, settings)))
        if teacher.name == name:
            return open_model(teacher, where, name, vad, map_by)
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
    return open_model(ModelConfig(CHECKPOINT, str(path), dimension=dimension), where, name, vad, map_by)


def open_model(
    config: ModelConfig,
    device: torch.device,
    name: str | None = None,
    vad: str = NONE,
    map_by: str | Path | None = None,
) -> SpeakerModel:
    """Speaker model of the settings of a frozen model, with the calibration that goes with it.

    A note says where it was trained on other speech than it is given.

    Args:
        config: settings; of a student, `name` is its folder.
        name: name for messages; None: the file or folder of the weights, or else the family.
        vad: as of `load`.
        map_by: as of `load`.
    Raises:
        UsageError: as of load_teacher, the model gives no embeddings, there is no such detector, or no map to it.
        SpkdError: as of load_teacher, or the calibration or the map is damaged.
    """
    detector = detector_of(vad)
    chosen = resolved(config) if config.name != CHECKPOINT else config
    model = load_teacher(chosen, device)
    calibration = None
    if chosen.name == "onnx" and chosen.weights is not None:
        calibration = _of_onnx(Path(chosen.weights))
    elif isinstance(model, CheckpointTeacher) and (file := model.folder / file_of(model.part)).is_file():
        calibration = Calibration.of_student(file, model.weights_sha256)
    if calibration is not None and (acting := _acting(chosen)):
        log(f"note: {name or chosen.weights}: its calibration is not of the scores with {acting}, and is not used")
        calibration = None
    for note in notes_on_vad([model], vad):
        log(f"note: {note}")
    card = model_card() if chosen.name == BUNDLED else ""
    made = SpeakerModel(model, name or chosen.weights or chosen.name, calibration, detector, card)
    if map_by is not None:
        made.map_calibration = _of_map(Path(map_by), made)
    return made


def _of_map(folder: Path, model: SpeakerModel) -> tuple[str, Calibration]:
    """Fingerprint of a map to a model, and the calibration beside it. Raises UsageError: it is to another, or none."""
    the_map = load_map(folder)
    if the_map.new.digest != model.digest:
        raise UsageError(f"map_by={folder}: maps to {the_map.new.name}, not to {model.name}")
    if not (folder / FILE).is_file():
        raise UsageError(f"map_by={folder}: has no calibration; {way_to_calibrate_map(str(folder), model.name)}")
    return the_map.fingerprint, Calibration.of_map(folder / FILE, the_map)


def _acting(config: ModelConfig) -> str:
    """Settings with which a model gives other scores than by itself, as text; "" where there are none."""
    usual = {} if config.settings is None else asdict(type(config.settings)())
    given = {} if config.settings is None else asdict(config.settings)
    acting = {name: value for name, value in given.items() if value != usual[name]}
    if config.precision != ModelConfig().precision:
        acting["precision"] = config.precision
    return ", ".join(f"{name}={value}" for name, value in acting.items())


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
