"""model.json: description of a student, of its training and of the speakers it was trained on, without its weights."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from spkd.errors import SpkdError, did_you_mean
from spkd.files.atomic import parse_json, read_bytes
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.registry import STUDENTS

FORMAT = Format("spkd_model", 1, "a checkpoint", "update spkd to read it")
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
DIGEST_BYTES = 6  # bytes of the digest of a name: in one of 600 sets of a million names, two share a digest
MOST_NAMES = 10_000  # digests of a set: 80 kB of text


@dataclass(frozen=True)
class Names:
    """Set of names, stored as digests: membership of a name can be tested, but names cannot be listed.

    Of a large set only the lowest digests are kept, which are a random sample of it.

    Attributes:
        count: number of names.
        digests: lowest digests in rising order, base64.
    """

    count: int = field(metadata={"low": 0})
    digests: str = ""

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        digests = sorted({_digest(name) for name in names})
        return cls(len(digests), _encoded(digests))

    @cached_property
    def kept(self) -> list[bytes]:
        """Digests as bytes. Raises SpkdError where they are damaged."""
        try:
            data = base64.b64decode(self.digests, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SpkdError(f"damaged (digests of names: {error})") from error
        digests = [data[first : first + DIGEST_BYTES] for first in range(0, len(data), DIGEST_BYTES)]
        if len(data) % DIGEST_BYTES or len(digests) != min(self.count, MOST_NAMES):
            raise SpkdError(f"damaged (digests of {len(digests)} names, {self.count} are counted)")
        return digests

    @property
    def is_sample(self) -> bool:
        """Whether only a sample of the names is kept, so that some are not recognised."""
        return self.count > MOST_NAMES

    def shared(self, names: Iterable[str]) -> list[str]:
        """Names that belong to the set, sorted."""
        if not self.count:
            return []
        known = set(self.kept)
        return sorted(name for name in set(names) if _digest(name) in known)

    def with_those_of(self, other: Names) -> Names:
        """Union of two sets. Where one is a sample, its count is the sum of both, as if the sets were disjoint."""
        digests = sorted({*self.kept, *other.kept})
        count = self.count + other.count if self.is_sample or other.is_sample else len(digests)
        return Names(count, _encoded(digests))


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:DIGEST_BYTES]


def _encoded(digests: list[bytes]) -> str:
    return base64.b64encode(b"".join(digests[:MOST_NAMES])).decode()


@dataclass(frozen=True)
class People:
    """Speakers and utterances that a student was trained on.

    Attributes:
        speakers: names of the speakers.
        utterances: ids of the utterances.
    """

    speakers: Names = Names(0)
    utterances: Names = Names(0)

    def with_those_of(self, other: People) -> People:
        return People(self.speakers.with_those_of(other.speakers), self.utterances.with_those_of(other.utterances))


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
        caches: fingerprints of the caches.
        teacher_families: families of the caches' teachers.
        batch_size: number of views in one step; None where it is not known.
    """

    losses: dict[str, Any] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    teacher_families: tuple[str, ...] = ()
    batch_size: int | None = field(default=None, metadata={"low": 1})


@dataclass(frozen=True)
class Training:
    """Training of a student.

    Attributes:
        settings: settings that identify the run.
        steps: number of steps done; None for a student that spkd did not train.
        last_terms: mean of each loss term over the last steps.
        best: best validation.
        valid_eer_percent: validation EER (%) of this student, where it was saved as the best.
        valid_trials: digest of the trials that chose this student as the best; "" where none did.
        reports: reports of the losses on the run, by name.
        people: speakers and utterances of the training data.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = field(default=None, metadata={"low": 0})
    last_terms: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    valid_eer_percent: float | None = None
    valid_trials: str = ""
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    people: People = field(default_factory=People)

    @cached_property
    def facts(self) -> RunFacts:
        """Settings for pages and cards. Raises SpkdError where the settings are not those of a run."""
        known = {name: self.settings[name] for name in RunFacts.__dataclass_fields__ if name in self.settings}
        return record(RunFacts, known, "settings")


@dataclass(frozen=True)
class Description:
    """Content of model.json.

    Attributes:
        network: name of the network in the registry of students.
        settings: settings of the network.
        features: description of its input features.
        weights_sha256: digest of the file of weights.
        classes: names of the speakers of its classifier.
        scale: scale of the classifier's logits.
        training: description of the training.
        version: version of spkd that wrote it.
    """

    network: str
    settings: dict[str, Any]
    features: dict[str, Any]
    weights_sha256: str
    classes: list[str] = field(default_factory=list)
    scale: float = field(default=1.0, metadata={"positive": True})
    training: Training = field(default_factory=Training)
    version: str = ""

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


def _checked(content: dict[str, Any], where: str) -> Description:
    description = record(Description, content, where)
    network, training = description.network, description.training
    if network not in STUDENTS:
        raise SpkdError(f"{where}: unknown network {network!r}{did_you_mean(network, STUDENTS)}")
    try:
        _ = training.facts, training.people.speakers.kept, training.people.utterances.kept
    except SpkdError as error:
        raise SpkdError(f"{where}: training: {error}") from error
    return description
