"""Map from the embeddings of one model to those of another, and the folder that keeps it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional

from spkd.corpus.people import People
from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest
from spkd.files.atomic import write_bytes, write_json
from spkd.files.reading import MOST_OF_WEIGHTS, read_bytes, read_json
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.mapping.settings import MOST_HIDDEN
from spkd.outputs.teacher_card import TeacherCard
from spkd.version import __version__
from spkd.voiceprint import Voiceprint

FORMAT = Format("spkd_map", 1, "a map", "make one with `spkd map OLD_CACHE NEW_CACHE`")
DESCRIPTION, WEIGHTS = "map.json", "map.safetensors"
MOST_WIDTH = 65_536  # numbers in an embedding
HEADER = 1 << 16  # most bytes of the description in the file of weights
AT_ONCE = 1 << 16  # embeddings that are mapped together


class MapNetwork(torch.nn.Module):
    """Network of a map: a linear layer, and beside it one hidden layer where `hidden` is not 0.

        y = A x + b + V gelu(U x + c),   x = the embedding divided by its length.

    Args:
        old: numbers in an embedding of the old model.
        new: numbers in one of the new model.
        hidden: width of the hidden layer.
    """

    def __init__(self, old: int, new: int, hidden: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(old, new)
        if hidden:
            self.inner, self.outer = torch.nn.Linear(old, hidden), torch.nn.Linear(hidden, new)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Mapped embeddings (N, new), of any length, from embeddings (N, old) of any length."""
        units = functional.normalize(embeddings, dim=1)
        mapped: Tensor = self.linear(units)
        return mapped + self.outer(functional.gelu(self.inner(units))) if hasattr(self, "inner") else mapped


@dataclass(frozen=True)
class Model:
    """One of the two models of a map.

    Attributes:
        card: its description on the card of the cache.
        vad: what found the speech of the cache's views; None where they are of whole utterances.
        width: numbers in an embedding.
    """

    card: TeacherCard
    vad: str | None
    width: int

    @property
    def digest(self) -> str:
        """Digest by which voiceprints know their model, as of `SpeakerModel.digest`."""
        return self.card.model_digest(self.vad)

    @property
    def name(self) -> str:
        """Phrase that names it."""
        return named(self.card)

    def is_of(self, card: TeacherCard) -> bool:
        """Whether a model gives the same embeddings, by its description."""
        return self.card.model_digest(None) == card.model_digest(None)

    def to_json(self) -> dict[str, Any]:
        return {"model": self.card.to_json(), "vad": self.vad, "width": self.width}

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Model:
        """A model from parsed JSON. Raises SpkdError: it is none."""
        plain = record(_PlainModel, tree, where)
        return cls(TeacherCard.from_json(plain.model, where), plain.vad, plain.width)


def named(card: TeacherCard) -> str:
    """Phrase that names a model: family, source and the beginning of the digest of its weights."""
    return f"{card.family} {card.source.partition(' (')[0]} ({card.weights_sha256[:12]})"


@dataclass(frozen=True)
class _PlainModel:
    model: dict[str, Any]
    vad: str | None
    width: int = field(metadata={"low": 1, "high": MOST_WIDTH})


@dataclass(frozen=True)
class TrainedOn:
    """What a map was trained on, and how well it does.

    Attributes:
        old: fingerprint of the old model's cache.
        new: fingerprint of the new model's cache.
        views: number of the views that were used.
        speakers: number of their speakers, or utterances where there are no labels.
        kept_aside: number of the speakers that were kept aside.
        before: mean cosine of the old with the new embedding of one view, over the speakers kept aside; None where
            they differ in width.
        after: that of the mapped with the new embedding.
        others: that of the mapped with new embeddings of other speakers.
        steps: number of the step whose weights are kept.
        seed: the setting `seed`.
    """

    old: str
    new: str
    views: int = field(metadata={"low": 2})
    speakers: int = field(metadata={"low": 2})
    kept_aside: int = field(metadata={"low": 1})
    before: float | None = field(metadata={"low": -1.001, "high": 1.001})
    after: float = field(metadata={"low": -1.001, "high": 1.001})
    others: float = field(metadata={"low": -1.001, "high": 1.001})
    steps: int = field(metadata={"low": 0})
    seed: int = field(metadata={"low": 0})


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Map from the embeddings of an old model to those of a new one, as `spkd map` makes it.

    Attributes:
        old: the old model.
        new: the new model.
        hidden: width of the hidden layer; 0: none.
        people: people it was trained on.
        fingerprint: digest of both models and of the weights.

    Example:
        >>> the_map = spkd.load_map("map")  # doctest: +SKIP
        >>> the_map.map(old_embeddings).shape  # of length 1, in the space of the new model
        (2, 192)
    """

    old: Model
    new: Model
    hidden: int
    trained_on: TrainedOn
    people: People
    network: MapNetwork
    fingerprint: str

    @classmethod
    def of(
        cls, old: Model, new: Model, hidden: int, trained_on: TrainedOn, people: People, network: MapNetwork
    ) -> EmbeddingMap:
        """Map of a network, with its fingerprint."""
        weights = digest.of_tensors(network.state_dict())
        name = digest.of_tree({"old": old.digest, "new": new.digest, "weights": weights})
        return cls(old, new, hidden, trained_on, people, network.eval(), name)

    @property
    def name(self) -> str:
        """Phrase that identifies it wherever it lies."""
        return f"the map {self.fingerprint[:12]}"

    def map(self, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings in the space of the new model.

        Args:
            embeddings: (N, D_old) or (D_old,) of any length but 0.
        Returns:
            (N, D_new) or (D_new,) float32, of length 1.
        Raises:
            UsageError: embeddings of another width, or that are zeros or not finite.
        """
        given = np.asarray(embeddings, np.float64)
        rows = given[None] if given.ndim == 1 else given
        if rows.ndim != 2 or rows.shape[1] != self.old.width:
            raise UsageError(f"{self.name}: takes embeddings (N, {self.old.width}), got {given.shape}")
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(length) & (length > 0)).all():
            raise UsageError(f"{self.name}: an embedding of zeros, or one that is not finite")
        mapped = np.empty((len(rows), self.new.width), np.float32)
        with torch.inference_mode():
            for first in range(0, len(rows), AT_ONCE):
                units = rows[first : first + AT_ONCE] / length[first : first + AT_ONCE]
                piece = self.network(torch.from_numpy(units.astype(np.float32)))
                mapped[first : first + AT_ONCE] = functional.normalize(piece, dim=1).numpy()
        return mapped[0] if given.ndim == 1 else mapped

    def map_voiceprint(self, voiceprint: Voiceprint) -> Voiceprint:
        """Voiceprint for the new model. Its mean keeps its length, by which its recordings agree with one another.

        Raises:
            UsageError: a voiceprint of another model than the old one, or one that was mapped already.
        """
        if voiceprint.model != self.old.digest:
            raise UsageError(f"{self.name}: takes voiceprints of {self.old.name}, got one of another model")
        if voiceprint.mapped_by:
            raise UsageError(
                f"{self.name}: takes voiceprints of recordings, got one that was mapped from another model"
            )
        length = np.linalg.norm(voiceprint.embedding.astype(np.float64))
        mean = (length * self.map(voiceprint.embedding)).astype(np.float32)
        return replace(voiceprint, embedding=mean, model=self.new.digest, mapped_by=self.fingerprint)

    def check_models(self, old: TeacherCard, new: TeacherCard, where: str) -> None:
        """Check that it maps from one model to another. Raises UsageError: it is of others.

        Args:
            where: the setting that names it, for the error.
        """
        for known, given, side in ((self.old, old, "enrol.model"), (self.new, new, "model")):
            if not known.is_of(given):
                raise UsageError(f"{where}: maps from {self.old.name} to {self.new.name}, and {side} is {named(given)}")

    def save(self, folder: Path) -> None:
        """Write both files of a folder: the description first, by which `spkd map` knows a folder for its own."""
        data = save_tensors({name: value.contiguous() for name, value in self.network.state_dict().items()})
        content = {
            "old": self.old.to_json(),
            "new": self.new.to_json(),
            "hidden": self.hidden,
            "trained_on": asdict(self.trained_on),
            "people": asdict(self.people),
            "fingerprint": self.fingerprint,
            "weights_sha256": digest.of_bytes(data),
            "version": __version__,
        }
        write_json(folder / DESCRIPTION, FORMAT.seal(content))
        write_bytes(folder / WEIGHTS, data)


@dataclass(frozen=True)
class _Description:
    """Fields of map.json."""

    old: dict[str, Any]
    new: dict[str, Any]
    hidden: int = field(metadata={"low": 0, "high": MOST_HIDDEN})
    trained_on: TrainedOn
    people: People
    fingerprint: str
    weights_sha256: str
    version: str


def load_map(folder: str | Path) -> EmbeddingMap:
    """Read a map that `spkd map` made.

    Args:
        folder: the folder of map.json and map.safetensors.
    Raises:
        UsageError: the folder holds no map.
        SpkdError: the map is damaged, or of another format.
    """
    folder = Path(folder)
    path, weights = folder / DESCRIPTION, folder / WEIGHTS
    if not path.is_file():
        made = f"spkd map OLD_CACHE NEW_CACHE out={shlex.quote(str(folder))}"
        raise UsageError(f"{folder}: no map ({DESCRIPTION}, {WEIGHTS}); make one with `{made}`")
    described = FORMAT.open(read_json(path), str(path), lambda content, where: record(_Description, content, where))
    described.people.check(f"{path}: people")
    old, new = (
        Model.from_json(tree, f"{path}: {side}") for side, tree in (("old", described.old), ("new", described.new))
    )
    with torch.device("meta"):  # without memory: a damaged width could ask for more than there is
        expected = MapNetwork(old.width, new.width, described.hidden).state_dict()
    most = min(MOST_OF_WEIGHTS, 4 * sum(values.numel() for values in expected.values()) + HEADER)
    data = read_bytes(weights, most)
    if digest.of_bytes(data) != described.weights_sha256:
        raise SpkdError(
            f"{weights}: damaged (it is not the file that {DESCRIPTION} describes), or its writing was cut off; run "
            "the same `spkd map` again"
        )
    try:
        tensors = load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise SpkdError(f"{weights}: damaged ({first_line(error)})") from error
    shapes = ({name: (value.shape, value.dtype) for name, value in some.items()} for some in (tensors, expected))
    if next(shapes) != next(shapes):
        raise SpkdError(f"{weights}: damaged or of another map (its tensors are not those of {path})")
    if not all(value.isfinite().all() for value in tensors.values()):
        raise SpkdError(f"{weights}: some of its weights are not finite")
    network = MapNetwork(old.width, new.width, described.hidden)
    network.load_state_dict(tensors)
    made_map = EmbeddingMap.of(old, new, described.hidden, described.trained_on, described.people, network)
    if made_map.fingerprint != described.fingerprint:
        raise SpkdError(f"{path}: damaged (its fingerprint is not that of its models and weights)")
    return made_map
