"""model.json: description of a student, of its training and of the speakers it was trained on, without its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

from spkd.corpus.people import People
from spkd.errors import SpkdError, UsageError, did_you_mean, listed
from spkd.files import digest
from spkd.files.reading import parse_json, read_bytes, read_json
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.registry import STUDENTS

FORMAT = Format("spkd_model", 1, "a checkpoint", "update spkd to read it")
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
# Record of a folder that spkd exported for WeSpeaker: digests of its files, and of the student's weights.
EXPORT_RECORD, EXPORT_KEY = "export.json", "spkd_export"
EXPORT = Format(EXPORT_KEY, 1, "a record of an export", "export the student again")
# In the record beside an exported file: whether its calibration is that of the student's folder, or another.
CALIBRATION_OF, STUDENT, OTHER = "calibration_of", "student", "other"
EARLIER = "model.earlier.safetensors"  # weights that model.json describes while new ones are written


def beside(exported: Path) -> Path:
    """Path of the description of an exported model: model.onnx -> model.onnx.json."""
    return exported.with_name(f"{exported.name}.json")


@dataclass(frozen=True)
class Best:
    """Lowest EER (%) of the validations, and the number of steps after which it was measured."""

    valid_eer_percent: float
    step: int = field(metadata={"low": 0})


@dataclass(frozen=True)
class RunFacts:
    """Settings of a run that pages and cards show.

    Attributes:
        losses: settings of each loss, by name.
        batch_size: number of views in one step; None where it is not known.
        vad: what found the speech of the caches' views, with its version; () where views are of whole utterances.
    """

    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    teacher_families: tuple[str, ...] = ()
    batch_size: int | None = field(default=None, metadata={"low": 1})
    vad: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: dict[str, Any]) -> RunFacts:
        """Facts from the settings that identify a run. Raises SpkdError where they are not those of a run."""
        return record(cls, {name: settings[name] for name in cls.__dataclass_fields__ if name in settings}, "settings")


@dataclass(frozen=True)
class Training:
    """Training of a student.

    Attributes:
        settings: settings that identify the run.
        steps: number of steps done; None for a student that spkd did not train.
        last_terms: mean of each loss term over the last steps.
        valid_eer_percent: validation EER (%) of this student, where it was saved as the best.
        valid_trials: digest of the trials that chose this student as the best; "" where none did.
        valid_people: speakers and utterances of these trials.
        reports: reports of the losses on the run, by name.
        people: speakers and utterances of its caches, and of the training of the student that it began as.
        teacher_people: people that their teachers were trained on, as far as spkd trained them.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = field(default=None, metadata={"low": 0})
    last_terms: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    valid_eer_percent: float | None = None
    valid_trials: str = ""
    valid_people: People = field(default_factory=People)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    people: People = field(default_factory=People)
    teacher_people: People = field(default_factory=People)

    @property
    def people_with_teachers(self) -> People:
        """People of whom a student of this model learns indirectly: its own, and those of its teachers."""
        return self.people.with_those_of(self.teacher_people)

    @cached_property
    def facts(self) -> RunFacts:
        """Settings for pages and cards. Raises SpkdError where the settings are not those of a run."""
        return RunFacts.of(self.settings)


@dataclass(frozen=True)
class Description:
    """Content of model.json.

    Attributes:
        network: name of the network in the registry of students.
        features: description of its input features.
        classes: names of the speakers of its classifier.
        scale: scale of the classifier's logits.
        nested: sizes at which the embedding is usable by its first numbers alone; (): the whole.
    """

    network: str
    settings: dict[str, Any]
    features: dict[str, Any]
    weights_sha256: str
    classes: list[str] = field(default_factory=list)
    scale: float = field(default=1.0, metadata={"positive": True})
    training: Training = field(default_factory=Training)
    version: str = ""
    nested: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes at which the embedding can be used, the whole last."""
        return self.nested or (self.settings.get("embedding", 0),)

    def part(self, dimension: int | None, where: str) -> int | None:
        """Size of the part of the embedding that a user asks for; None for the whole.

        Args:
            dimension: number of numbers; None: all.
            where: folder of the student, for the message.
        Raises:
            UsageError: the embedding is not usable at this size.
        """
        if dimension is not None and (isinstance(dimension, bool) or not isinstance(dimension, Integral)):
            raise UsageError(f"dimension={dimension!r}: expected a whole number, or None for all")
        if dimension is None or dimension == self.sizes[-1]:
            return None
        if dimension not in self.sizes:
            sizes = listed([str(size) for size in self.sizes])
            more = "" if self.nested else "; it was trained without student.nested, so that a part of it means nothing"
            raise UsageError(f"dimension={dimension}: the embedding of {where} has {sizes} numbers{more}")
        return int(dimension)

    @property
    def digests(self) -> dict[str, int | None]:
        """Digest that stands for the model at each size, with the size; that of the whole is of the weights, None."""
        parts = {digest_of_part(self.weights_sha256, size): size for size in self.nested[:-1]}
        return {self.weights_sha256: None, **parts}

    def to_json(self) -> dict[str, Any]:
        return FORMAT.seal(asdict(self))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Description:
        """Read a description from the bytes of its file. Raises SpkdError: damaged, or of another format."""
        return FORMAT.open(parse_json(data, where), where, _checked)

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read a description from its file. Raises as `parse`."""
        return cls.parse(read_bytes(path), str(path))


def digest_of_part(weights_sha256: str, size: int) -> str:
    """Digest that stands for a model of which the first numbers of the embedding are taken, as its weights' does for
    the whole: scores, calibrations, voices and caches of the two have nothing in common."""
    return digest.of_tree({"weights": weights_sha256, "dimension": size})


def training_of(folder: Path, weights_sha256: object) -> Training | None:
    """Training of the student in a folder; None where there is no student, or one of other weights."""
    if not (folder / DESCRIPTION).is_file():
        return None
    description = Description.read(folder / DESCRIPTION)
    return description.training if description.weights_sha256 == weights_sha256 else None


def record_of_export(weights: Path) -> dict[str, Any] | None:
    """Content of the record beside a file of weights that spkd exported for WeSpeaker; None where spkd did not.

    Its keys are `student`, the digest of the student's weights, and `features`, the toolkit whose fbank it takes.

    Raises:
        SpkdError: the record is damaged, or a file beside it is not the one that it describes.
    """
    path = weights.parent / EXPORT_RECORD
    if not path.is_file():
        return None
    tree = read_json(path)
    if not isinstance(tree, dict) or EXPORT_KEY not in tree:
        return None
    content = EXPORT.open(tree, str(path), lambda content, _: content)
    if weights.name not in content["sha256"]:
        return None
    for name, value in content["sha256"].items():
        file = weights.parent / name
        if not file.is_file() or digest.of_file(file) != value:
            raise SpkdError(
                f"{file}: not the file that {EXPORT_RECORD} describes: damaged, or trained further; then remove "
                f"{EXPORT_RECORD}, and name the features ({content['features']}) by the setting `input`"
            )
    return content


def _checked(content: dict[str, Any], where: str) -> Description:
    description = record(Description, content, where)
    network, training = description.network, description.training
    if network not in STUDENTS:
        raise SpkdError(f"{where}: unknown network {network!r}{did_you_mean(network, STUDENTS)}")
    training.people.check(f"{where}: training")
    training.teacher_people.check(f"{where}: training")
    training.valid_people.check(f"{where}: training")
    try:
        _ = training.facts
    except SpkdError as error:
        raise SpkdError(f"{where}: training: {error}") from error
    return description
