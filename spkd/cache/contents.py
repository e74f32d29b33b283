"""What every kind of cache offers to a reader: a folder of shards, a stream of tars, several of them together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from spkd.cache import card as cards
from spkd.cache import codebook as codebooks
from spkd.cache import codec as codecs
from spkd.cache.codebook import Codebook
from spkd.cache.head import STORED, Head
from spkd.cache.plan import UNLABELLED, Plan
from spkd.cache.target import EMBEDDING, LOGITS, Target
from spkd.errors import SpkdError, did_you_mean
from spkd.manifest import Manifest, measure
from spkd.view import Player, ViewPlan


class Crop(NamedTuple):
    """A stretch of each view of a batch: first sample (B,) and one length for all, both at 16 kHz."""

    start: np.ndarray
    samples: int


class Contents(ABC):
    """What one teacher said of one manifest under one view plan, wherever it lies.

    Attributes:
        name: where, for messages. plan: views, utterances and speakers. rejected: views left out, with the reason.
    """

    name: str
    plan: Plan
    rejected: dict[int, str]

    def __len__(self) -> int:
        return len(self.plan.views)

    @cached_property
    def served(self) -> np.ndarray:
        """(views,): whether a view can be served, as all but the rejected can."""
        served = np.ones(len(self), bool)
        served[list(self.rejected)] = False
        return served

    @cached_property
    def rows(self) -> np.ndarray:
        """The views that can be served."""
        return np.flatnonzero(self.served)

    def speaker(self, rows: np.ndarray) -> np.ndarray:
        """(B,): speaker of each view, as a row in plan.speakers; -1 where it has no label."""
        return self.plan.speaker[self.plan.views.utterance[rows]]

    @property
    def labelled(self) -> bool:
        """Whether every view has a speaker label."""
        return bool((self.plan.speaker != UNLABELLED).all())

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """`rows` in the order of one epoch: every view once, shuffled. The same arguments give the same order."""
        return self.rows[_permutation(len(self.rows), seed, epoch)]

    @property
    @abstractmethod
    def members(self) -> list[OneTeacher]:
        """The caches this is made of."""

    @abstractmethod
    def manifest(self, manifest: Manifest) -> Manifest:
        """The utterances of the plan, in its order, picked from a manifest: to hear the views again.

        Raises:
            SpkdError: one is missing there, or another than at extraction.
        """

    def player(self, manifest: Manifest, noise: str | None, rir: str | None) -> Player:
        """What plays the views again from the audio of a manifest and this machine's folders of noise and responses.

        Raises:
            SpkdError: another manifest or another augmentation than at extraction, or corpora heard under different
                view plans.
        """
        picked = self.manifest(measure(manifest)[0])
        views = self.members[0].card["views"]
        if any(member.card["views"] != views for member in self.members):
            raise SpkdError(f"{self.name}: the corpora were heard under different view plans; extract with fbank=true")
        return Player(picked, self.plan.views, ViewPlan.from_card(views, noise, rir).augmentation)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of what is served."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Targets that are served."""

    @abstractmethod
    def target(self, name: str) -> Target:
        """A target as it is served: its width and rate."""

    def dim(self, name: str) -> int:
        """Width of a target."""
        return self.target(name).dim

    @abstractmethod
    def stored(self, rows: np.ndarray, names: Sequence[str], crop: Crop | None = None) -> dict[str, Tensor]:
        """A batch of views as it is kept, for `decode`: (B, columns) or (B, T, columns)."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """`names` of a batch that `stored` gave, on the device where it lies now: (B, D) or (B, T, D)."""


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.RandomState((seed * 7_919 + epoch) % 2**32).permutation(count)


class OneTeacher(Contents):
    """Contents that a card describes, with head and codebook in a folder.

    Attributes:
        card: the description. targets: stored targets by name. root: the folder of the small files.
    """

    def __init__(self, root: Path, name: str, card: dict[str, Any], plan: Plan, rejected: dict[int, str]) -> None:
        self.root, self.name, self.card, self.plan, self.rejected = root, name, card, plan, rejected
        self.targets = {t["name"]: Target.from_card(t) for t in card["targets"]}

    @property
    def fingerprint(self) -> str:
        return str(self.card["fingerprint"])

    @property
    def names(self) -> list[str]:
        """Stored targets, and logits where they follow from embedding and head."""
        return [*self.targets, *([LOGITS] if self.card["head"] and LOGITS not in self.targets else [])]

    def target(self, name: str) -> Target:
        if name == LOGITS and LOGITS not in self.targets and self.head is not None:
            return Target(LOGITS, len(self.head.classes))
        return self.targets[name]

    @cached_property
    def head(self) -> Head | None:
        """The teacher's classifier, where it has one."""
        described = self.card["head"]
        return None if described is None or described["kind"] == STORED else Head.load(self.root, described)

    @cached_property
    def codebook(self) -> Codebook:
        """The codecs of the targets, with what they learnt.

        Raises:
            SpkdError: its file is missing, damaged or of another cache.
        """
        found = codebooks.load(self.root, list(self.targets.values()))
        if found is None and self.card["codecs"] is None:
            found = Codebook({t.name: codecs.make(t.codec, t.dim) for t in self.targets.values()}, {})
        if found is None or found.digest != self.card["codecs"]:
            raise SpkdError(f"{self.root / codebooks.FILE}: missing, or of another cache")
        return found

    @property
    def members(self) -> list[OneTeacher]:
        return [self]

    def manifest(self, manifest: Manifest) -> Manifest:
        parts = cards.pick_parts(self.card, self.plan.utterances, manifest)
        if parts is None:
            raise SpkdError(f"{self.name}: extracted from another manifest than {manifest.source} (digests differ)")
        return Manifest(tuple(u for part in parts for u in part), manifest.source)

    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        said = {name: self.codebook.codecs[name].decode(values) for name, values in stored.items()}
        if LOGITS in names and LOGITS not in said:
            assert self.head is not None
            said[LOGITS] = self.head.logits(said[EMBEDDING])
        return {name: said[name] for name in names}

    def check(self, rows: np.ndarray) -> None:
        """Raises SpkdError where a view was rejected."""
        if self.rejected and not self.served[rows].all():
            row = int(rows[~self.served[rows]][0])
            raise SpkdError(f"{self.name}: view {row} was rejected ({self.rejected[row]})")

    def sources(self, names: Sequence[str]) -> list[str]:
        """The stored targets from which `names` follow.

        Raises:
            SpkdError: one is not in this cache.
        """
        for name in names:
            if name not in self.names:
                raise SpkdError(f"{self.name}: no target {name!r} in this cache{did_you_mean(name, self.names)}")
        return list(dict.fromkeys(name if name in self.targets else EMBEDDING for name in names))

    def stretch(self, target: Target, counts: np.ndarray, crop: Crop | None) -> tuple[int, np.ndarray]:
        """How many rows of a target each view gives, and the first of them within the view (B,).

        Raises:
            SpkdError: views of different lengths without a crop.
        """
        if target.hop is None:
            return 1, np.zeros_like(counts)
        if crop is not None:
            # A crop may start beyond the last row of a target whose windows are longer than the crop.
            return target.count(crop.samples), crop.start // target.hop % counts
        if (counts != counts[0]).any():
            raise SpkdError(f"target {target.name}: views of different lengths need a crop")
        return int(counts[0]), np.zeros_like(counts)
