"""Interface of caches for training: a folder of shards, a stream of tars, or several caches together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from spkd.cache.card import Card
from spkd.cache.codebook import Codebook
from spkd.cache.codec import Coded, make_codec
from spkd.cache.crop import Crop, Rows
from spkd.cache.folder import CODEC, HEAD
from spkd.cache.lazy import all_but, picked, shuffled
from spkd.cache.plan import Plan, with_speech
from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.view import ViewPlan
from spkd.errors import SpkdError, did_you_mean
from spkd.files.text import counted
from spkd.outputs.head import STORED, Head
from spkd.outputs.target import CODES, EMBEDDING, LOGITS, Target


class CacheSource(ABC):
    """Base class of sources of targets, of one or several teachers over one or several manifests.

    Attributes:
        name: path or URL, for messages.
        rejected: number of each view left out -> the reason.
        random_access: whether any view may be read at any time. If not, views are read in the order of `order`.
        pinned: whether batches are read into pinned memory, from which a GPU copies on its own.
        shared: whether a worker of torch's loader reads batches into shared memory, in which the loader passes them.
    """

    name: str
    plan: Plan
    rejected: dict[int, str]
    random_access: bool = True
    pinned: bool = False
    shared: bool = True

    def __len__(self) -> int:
        return len(self.plan.views)

    @cached_property
    def rejected_views(self) -> np.ndarray:
        """Numbers of the views that were left out, ascending."""
        return np.array(sorted(self.rejected), np.int64)

    def are_usable(self, views: np.ndarray) -> np.ndarray:
        """(B,): whether a view can be read, which is true of all that were not rejected."""
        return ~np.isin(views, self.rejected_views)

    @property
    def usable_views(self) -> np.ndarray:
        """Numbers of the views that can be read, ascending; not an array, but indexed like one (`lazy.Lazy`)."""
        return all_but(len(self), self.rejected_views)

    def speaker(self, views: np.ndarray) -> np.ndarray:
        """Speakers of views.

        Args:
            views: (B,) numbers of the views.
        Returns:
            (B,) index in plan.speakers; -1 where a view has no label.
        """
        return self.plan.speaker[self.plan.views.utterance[views]]

    @property
    def labelled(self) -> bool:
        """Whether every view has a speaker label."""
        return self.plan.tables.labelled

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """`usable_views` in the order of one epoch: every view once, shuffled; a pure function of the arguments.

        It is indexed like an array.
        """
        return picked(self.usable_views, _shuffled(len(self.usable_views), seed, epoch))

    @property
    def corpora_views(self) -> list[np.ndarray]:
        """Numbers of the views of each corpus."""
        return [np.arange(len(self))]

    @property
    @abstractmethod
    def members(self) -> list[SingleCache]:
        """The caches that the source consists of."""

    @abstractmethod
    def manifest(self, manifest: Manifest) -> Manifest:
        """The utterances of the plan, in its order, picked from a manifest, to load the audio of the views again.

        Raises:
            SpkdError: an utterance is missing there, or differs from that of the extraction.
        """

    def view_loader(self, manifest: Manifest, noise: str | None, rir: str | None) -> ViewLoader:
        """A loader of the waveforms of the views.

        Args:
            noise: folder of noise on this machine; None where there is none.
            rir: folder of room impulse responses on this machine; None where there is none.
        Raises:
            SpkdError: another manifest or another augmentation than at extraction, or caches of different view plans.
        """
        picked = self.manifest(measure(manifest)[0])
        views = self.members[0].card.views
        if any(member.card.views != views for member in self.members):
            raise SpkdError(
                f"{self.name}: the caches were extracted with different view plans; extract with fbank=true"
            )
        return ViewLoader(picked, self.plan.views, ViewPlan.from_card(views, noise, rir))

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the content."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the targets that can be read."""

    @abstractmethod
    def target(self, name: str) -> Target:
        """A target as it is read, with its width and rate."""

    def dim(self, name: str) -> int:
        return self.target(name).dim

    @abstractmethod
    def stored(self, views: np.ndarray, names: Sequence[str], crop: Crop | None = None) -> dict[str, Tensor]:
        """A batch of views as it is stored, for `decode`.

        Args:
            views: (B,) numbers of the views.
            crop: the stretch of every frame-level target to read.
        Returns:
            (B, columns) at utterance level, (B, T, columns) at frame level.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """The targets of a batch that `stored` gave, on the device where the batch is.

        Returns:
            (B, D) at utterance level, (B, T, D) at frame level.
        """


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return shuffled(count, seed, epoch)


class SingleCache(CacheSource):
    """Base class of sources that one card describes.

    Attributes:
        targets: name -> stored target.
        root: folder of the head and the codebook.
    """

    def __init__(self, root: Path, name: str, card: Card, plan: Plan, rejected: dict[int, str]) -> None:
        self.root, self.name, self.card, self.plan, self.rejected = root, name, card, plan, rejected
        self.targets = {target.name: target for target in card.targets}

    @cached_property
    def fingerprint(self) -> str:
        return self.card.fingerprint(self.rejected)

    @property
    def names(self) -> list[str]:
        """Names of the targets that can be read.

        These are the stored ones, logits where they follow from embedding and head, and the codes of targets whose
        codec stores codes.
        """
        return [
            *self.targets,
            *([LOGITS] if self.card.head and LOGITS not in self.targets else []),
            *self._codes,
        ]

    @cached_property
    def _codes(self) -> dict[str, Target]:
        """Codes of the targets whose codec stores codes, by name: integers below the codec's `classes`."""
        found = {}
        for name, target in self.targets.items():
            codec = make_codec(target.codec, target.dim)
            if isinstance(codec, Coded):
                found[name + CODES] = replace(target, name=name + CODES, dim=codec.parts)
        return found

    def target(self, name: str) -> Target:
        if name == LOGITS and LOGITS not in self.targets and self.head is not None:
            return Target(LOGITS, len(self.head.classes))
        return self.targets[name] if name in self.targets else self._codes[name]

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
        """The codecs of the targets, with their learnt parameters.

        Raises:
            SpkdError: its file is missing, damaged or of another cache.
        """
        codebook = Codebook.load(self.root, self.card.targets)
        if codebook is None and self.card.codecs is None:
            codebook = Codebook({t.name: make_codec(t.codec, t.dim) for t in self.targets.values()}, {})
        if codebook is None or codebook.digest != self.card.codecs:
            raise SpkdError(f"{self.root / CODEC}: missing, or of another cache")
        return codebook

    @property
    def members(self) -> list[SingleCache]:
        return [self]

    def manifest(self, manifest: Manifest) -> Manifest:
        parts = self.card.pick_parts(self.plan.utterances, with_speech(manifest, self.plan))
        if parts is None:
            missing = [name for name in self.plan.utterances if name not in manifest.index_of]
            reason = (
                f"lacks {len(missing):,} of {counted(len(self.plan.utterances), 'utterance')} ({missing[0]})"
                if missing
                else "has other speakers, starts, durations or channels"
            )
            raise SpkdError(f"{self.name}: extracted from another manifest than {manifest.source}, which {reason}")
        return Manifest.join(parts, manifest.source)

    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        codecs = self.codebook.codecs
        # What is asked for as codes alone is not decoded.
        asked = set(names) | ({EMBEDDING} if LOGITS in names and LOGITS not in stored else set())
        decoded = {name: codecs[name].decode(values) for name, values in stored.items() if name in asked}
        if LOGITS in names and LOGITS not in decoded:
            assert self.head is not None
            decoded[LOGITS] = self.head.logits(decoded[EMBEDDING])
        for name in self._codes.keys() & set(names):
            base = name.removesuffix(CODES)
            decoded[name] = cast(Coded, codecs[base]).codes(stored[base])
        return {name: decoded[name] for name in names}

    def check(self, views: np.ndarray) -> None:
        """Check that no view was rejected. Raises SpkdError where one was."""
        if self.rejected and not self.are_usable(views).all():
            view = int(views[~self.are_usable(views)][0])
            raise SpkdError(f"{self.name}: view {view} was rejected ({self.rejected[view]})")

    def sources(self, names: Sequence[str]) -> list[str]:
        """Names of the stored targets from which the targets `names` are computed.

        Raises:
            SpkdError: one of them is not in this cache.
        """
        for name in names:
            if name not in self.names:
                raise SpkdError(f"{self.name}: no target {name!r} in this cache{did_you_mean(name, self.names)}")
        computed = {LOGITS: EMBEDDING} | {name: name.removesuffix(CODES) for name in self._codes}
        return list(dict.fromkeys(name if name in self.targets else computed[name] for name in names))

    def rows(self, target: Target, views: np.ndarray, crop: Crop | None) -> Rows:
        """The rows of a target to read of each view.

        Args:
            views: (B,) numbers of the views.
            crop: the crop of each view; None takes whole views.
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
