"""What every kind of cache offers to training: a folder of shards, a stream of tars, several of them together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from spkd.cache.card import Card
from spkd.cache.codebook import Codebook
from spkd.cache.codec import make_codec
from spkd.cache.crop import Crop, Rows
from spkd.cache.folder import CODEC, HEAD
from spkd.cache.plan import UNLABELLED, Plan
from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.view import ViewPlan
from spkd.errors import SpkdError, did_you_mean
from spkd.outputs.head import STORED, Head
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.seeding import Purpose, random_state


class CacheSource(ABC):
    """Targets of one or several teachers over one or several manifests.

    Attributes:
        name: where it is, for messages.
        plan: views, utterances and speakers.
        rejected: views left out, with the reason.
        random_access: whether any views may be asked for at any time; else only in the order of `order`.
    """

    name: str
    plan: Plan
    rejected: dict[int, str]
    random_access: bool = True

    def __len__(self) -> int:
        return len(self.plan.views)

    @cached_property
    def is_usable(self) -> np.ndarray:
        """(views,): whether a view can be served, as all but the rejected can."""
        usable = np.ones(len(self), bool)
        usable[list(self.rejected)] = False
        return usable

    @cached_property
    def usable_views(self) -> np.ndarray:
        """The views that can be served."""
        return np.flatnonzero(self.is_usable)

    def speaker(self, views: np.ndarray) -> np.ndarray:
        """(B,): speaker of each view, as an index in plan.speakers; -1 where it has no label."""
        return self.plan.speaker[self.plan.views.utterance[views]]

    @property
    def labelled(self) -> bool:
        """Whether every view has a speaker label."""
        return bool((self.plan.speaker != UNLABELLED).all())

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """`usable_views` in the order of one epoch: every view once, shuffled; a function of the arguments."""
        return self.usable_views[_permutation(len(self.usable_views), seed, epoch)]

    @property
    def corpora_views(self) -> list[np.ndarray]:
        """The views of each corpus."""
        return [np.arange(len(self))]

    @property
    @abstractmethod
    def members(self) -> list[SingleCache]:
        """The caches this is made of."""

    @abstractmethod
    def manifest(self, manifest: Manifest) -> Manifest:
        """The utterances of the plan, in its order, picked from a manifest: to load the views' audio again.

        Raises:
            SpkdError: one is missing there, or is another than at extraction.
        """

    def view_loader(self, manifest: Manifest, noise: str | None, rir: str | None) -> ViewLoader:
        """A loader of the views' waveforms from the audio of a manifest and this machine's folders of noise and
        responses.

        Raises:
            SpkdError: another manifest or another augmentation than at extraction, or caches of different view plans.
        """
        picked = self.manifest(measure(manifest)[0])
        views = self.members[0].card.views
        if any(member.card.views != views for member in self.members):
            raise SpkdError(
                f"{self.name}: the caches were extracted with different view plans; extract with fbank=true"
            )
        return ViewLoader(picked, self.plan.views, ViewPlan.from_card(views, noise, rir).augmentation)

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
    def stored(self, views: np.ndarray, names: Sequence[str], crop: Crop | None = None) -> dict[str, Tensor]:
        """A batch of views as it is stored, for `decode`: (B, columns) or (B, T, columns)."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """`names` of a batch that `stored` gave, on the device where it is now: (B, D) or (B, T, D)."""


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return random_state(Purpose.ORDER, seed, epoch).permutation(count)


class SingleCache(CacheSource):
    """A source that one card describes, with head and codebook in a folder.

    Attributes:
        card: the description.
        targets: stored targets by name.
        root: the folder of head and codebook.
    """

    def __init__(self, root: Path, name: str, card: Card, plan: Plan, rejected: dict[int, str]) -> None:
        self.root, self.name, self.card, self.plan, self.rejected = root, name, card, plan, rejected
        self.targets = {target.name: target for target in card.targets}

    @property
    def fingerprint(self) -> str:
        return self.card.fingerprint

    @property
    def names(self) -> list[str]:
        """Stored targets, and logits where they follow from embedding and head."""
        return [*self.targets, *([LOGITS] if self.card.head and LOGITS not in self.targets else [])]

    def target(self, name: str) -> Target:
        if name == LOGITS and LOGITS not in self.targets and self.head is not None:
            return Target(LOGITS, len(self.head.classes))
        return self.targets[name]

    @cached_property
    def head(self) -> Head | None:
        """The teacher's classifier, where it has one."""
        described = self.card.head
        if described is None or described.kind == STORED:
            return None
        return Head.load(
            self.root / HEAD, described, self.targets[EMBEDDING].dim if EMBEDDING in self.targets else None
        )

    @cached_property
    def codebook(self) -> Codebook:
        """The codecs of the targets, with what they learnt.

        Raises:
            SpkdError: its file is missing, damaged or of another cache.
        """
        found = Codebook.load(self.root, self.card.targets)
        if found is None and self.card.codecs is None:
            found = Codebook({t.name: make_codec(t.codec, t.dim) for t in self.targets.values()}, {})
        if found is None or found.digest != self.card.codecs:
            raise SpkdError(f"{self.root / CODEC}: missing, or of another cache")
        return found

    @property
    def members(self) -> list[SingleCache]:
        return [self]

    def manifest(self, manifest: Manifest) -> Manifest:
        parts = self.card.pick_parts(self.plan.utterances, manifest)
        if parts is None:
            raise SpkdError(f"{self.name}: extracted from another manifest than {manifest.source} (digests differ)")
        return Manifest(tuple(u for part in parts for u in part), manifest.source)

    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        decoded = {name: self.codebook.codecs[name].decode(values) for name, values in stored.items()}
        if LOGITS in names and LOGITS not in decoded:
            assert self.head is not None
            decoded[LOGITS] = self.head.logits(decoded[EMBEDDING])
        return {name: decoded[name] for name in names}

    def check(self, views: np.ndarray) -> None:
        """Raises SpkdError where a view was rejected."""
        if self.rejected and not self.is_usable[views].all():
            view = int(views[~self.is_usable[views]][0])
            raise SpkdError(f"{self.name}: view {view} was rejected ({self.rejected[view]})")

    def sources(self, names: Sequence[str]) -> list[str]:
        """The stored targets from which `names` follow.

        Raises:
            SpkdError: one is not in this cache.
        """
        for name in names:
            if name not in self.names:
                raise SpkdError(f"{self.name}: no target {name!r} in this cache{did_you_mean(name, self.names)}")
        return list(dict.fromkeys(name if name in self.targets else EMBEDDING for name in names))

    def rows(self, target: Target, views: np.ndarray, crop: Crop | None) -> Rows:
        """Which rows of a target are served of each view.

        Raises:
            SpkdError: views of different lengths without a crop.
        """
        samples = self.plan.views.samples[views]
        if target.hop is not None and crop is not None:
            return Rows.of(target, samples, crop)
        counts = np.asarray(target.num_frames(samples))
        if (counts != counts[0]).any():
            raise SpkdError(f"target {target.name}: views of different lengths need a crop")
        return Rows(np.zeros_like(counts), counts, int(counts[0]))
