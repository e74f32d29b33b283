"""Views: the stretches of audio that a teacher and its students take as input.

A view is a stretch of an utterance at a speed, with its formants moved by a factor, and with an augmentation seed.
These are decided before extraction, from the manifest and the plan alone, by a counter-based hash of (utterance id,
view number, seed). So further utterances in a manifest never change the views of the others.
"""

from __future__ import annotations

import itertools
import re
import shlex
import zlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.augment import SYNTHETIC, VERSIONS, Augmentation, AugmentationCard
from spkd.corpus.columns import NONE as UNKNOWN
from spkd.corpus.formants import FORMULAS
from spkd.corpus.formants import VERSION as FORMANTS_VERSION
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import AS_IT_IS, ViewConfig
from spkd.corpus.vad.base import SEGMENTS, VADCard
from spkd.errors import SpkdError, UsageError
from spkd.files.spool import AT_ONCE, Spool

# Columns of a table of views, with their types.
VIEW_COLUMNS = {"utterance": "i4", "start": "i8", "samples": "i4", "speed": "f4", "seed": "u4", "formants": "f4"}


@dataclass(frozen=True)
class Views:
    """A table of N views; all arrays (N,).

    Attributes:
        utterance: index of the utterance in the manifest.
        start: first sample within the utterance, at 16 kHz.
        samples: length after the change of speed.
    """

    utterance: np.ndarray
    start: np.ndarray
    samples: np.ndarray
    speed: np.ndarray
    seed: np.ndarray
    formants: np.ndarray

    def __len__(self) -> int:
        return len(self.utterance)

    def __getitem__(self, views: np.ndarray | slice) -> Views:
        return Views(*(column[views] for column in self.columns().values()))

    def columns(self) -> dict[str, np.ndarray]:
        """Name of each column -> its values (N,)."""
        return {name: getattr(self, name) for name in VIEW_COLUMNS}


@dataclass(frozen=True)
class ViewCard:
    """Description of a view plan on the card of a cache.

    Attributes:
        plan: the setting view.plan.
        seed: the setting view.seed.
        formants_version: version of the formula that moves formants; 1 where formants are not moved.
        vad: what found the speech of which views are taken; None where they are of whole utterances.
    """

    plan: str
    speeds: tuple[float, ...] = field(metadata={"low": 0.5, "high": 2.0})
    seed: int
    augmentation: AugmentationCard
    formants: tuple[float, ...] = field(default=(1.0,), metadata={"low": 0.5, "high": 2.0})
    formants_version: int = field(default=1, metadata={"low": 1, "high": 1000})
    vad: VADCard | None = None

    @property
    def arguments(self) -> str:
        """Arguments of `spkd extract` that give this plan and this detector of speech, for a shell."""
        names = {None: "", SEGMENTS: " view.vad=FILE"}
        detector = None if self.vad is None else self.vad.detector
        return f"view.plan={shlex.quote(self.plan)}{names.get(detector, f' view.vad={detector}')}"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; formants only where they are moved, and the detector where there is one."""
        tree = asdict(self)
        if self.vad is None:
            del tree["vad"]
        tree["augmentation"] = self.augmentation.to_json()
        if self.formants == (1.0,):
            del tree["formants"], tree["formants_version"]
        return tree


@dataclass(frozen=True)
class ViewPlan:
    """Plan of the views of each utterance, and of their augmentation.

    Attributes:
        kind: full, drawn (`full:COUNT`), windows or crops.
        seconds: length of a window or crop (s); 0 for whole utterances.
        hop: hop of the windows (s); 0 for other kinds.
        count: number of views of each utterance, for drawn and crops; 1 for other kinds.
        seed: seed of everything that is drawn.
        formants_version: version of the formula that moves formants.
        vad: as of `ViewCard`; the manifest of the views has the speech that was found.
    """

    kind: str
    seconds: float
    hop: float
    count: int
    speeds: tuple[float, ...]
    formants: tuple[float, ...]
    augmentation: Augmentation
    seed: int
    formants_version: int = FORMANTS_VERSION
    vad: VADCard | None = None

    @classmethod
    def parse(cls, config: ViewConfig) -> ViewPlan:
        """The plan of settings: `full`, `full:COUNT`, `windows:SECONDS/HOP` or `crops:COUNT,SECONDS`; without `vad`.

        Raises:
            UsageError: another form, lengths that are not positive, or a factor outside 0.5-2 or finer than 0.01.
        """
        if AS_IT_IS.fullmatch(config.plan):
            config = replace(config, plan="full", speeds=[1.0], formants=[1.0])
        # Check the factors.
        for name, factors in (("speeds", config.speeds), ("formants", config.formants)):
            for factor in factors:
                if not 0.5 <= factor <= 2.0 or abs(factor * 100 - round(factor * 100)) > 1e-6:
                    raise UsageError(f"view.{name}: {factor} is not between 0.5 and 2 in steps of 0.01")
            if not factors or len(set(factors)) < len(factors):
                raise UsageError(f"view.{name}: give each factor once, at least one")
        # Read the form of the plan.
        number = r"([0-9]+(?:\.[0-9]+)?)"
        windows = re.fullmatch(rf"windows:{number}/{number}", config.plan)
        crops = re.fullmatch(rf"crops:([0-9]+),{number}", config.plan)
        several = re.fullmatch(r"full:([0-9]+)", config.plan)
        if config.plan == "full":
            kind, seconds, hop, count = "full", 0.0, 0.0, 1
        elif several:
            kind, seconds, hop, count = "drawn", 0.0, 0.0, int(several[1])
        elif windows:
            kind, seconds, hop, count = "windows", float(windows[1]), float(windows[2]), 1
        elif crops:
            kind, seconds, hop, count = "crops", float(crops[2]), 0.0, int(crops[1])
        else:
            raise UsageError(
                f"view.plan={config.plan}: expected full, full:COUNT, windows:SECONDS/HOP or crops:COUNT,SECONDS"
            )
        if count < 1 or (kind in ("windows", "crops") and seconds < 0.1) or (kind == "windows" and hop <= 0):
            raise UsageError(f"view.plan={config.plan}: at least one view of at least 0.1 s")
        speeds, formants = tuple(config.speeds), tuple(config.formants)
        return cls(kind, seconds, hop, count, speeds, formants, Augmentation.of(config), config.seed)

    @property
    def text(self) -> str:
        """The plan as the setting view.plan."""
        return {
            "full": "full",
            "drawn": f"full:{self.count}",
            "windows": f"windows:{self.seconds:.10g}/{self.hop:.10g}",
            "crops": f"crops:{self.count},{self.seconds:.10g}",
        }[self.kind]

    @property
    def note(self) -> str:
        """Sentence on views that are bound to be equal, since there are more of them than factors; "" where not."""
        different = len({(1.0, 1.0), *itertools.product(self.speeds, self.formants)})
        if self.kind != "drawn" or self.augmentation.is_used or self.count <= different:
            return ""
        return f"view={self.text}: no more than {different} of the {self.count} views of an utterance are different"

    def card(self) -> ViewCard:
        return ViewCard(
            self.text,
            tuple(float(s) for s in self.speeds),
            self.seed,
            self.augmentation.card(),
            tuple(float(f) for f in self.formants),
            1 if self.formants == (1.0,) else self.formants_version,
            self.vad,
        )

    @classmethod
    def from_card(cls, card: ViewCard, noise: str | None, rir: str | None) -> ViewPlan:
        """The plan of a cache, with the folders of this machine.

        Args:
            noise: folder of noise; None where there is none.
            rir: folder of room impulse responses; None where there is none.
        Raises:
            SpkdError: the views were augmented with the audio of other folders, or their formants were moved, or they
                were augmented, by a version of the formula that is not here.
        """
        used = card.augmentation
        if card.formants != (1.0,):
            _check_version("formants were moved", card.formants_version, FORMULAS)
        _check_version("views were augmented", used.version, VERSIONS)
        plan = cls.parse(
            ViewConfig(
                plan=card.plan,
                speeds=list(card.speeds),
                formants=list(card.formants),
                seed=card.seed,
                noise=SYNTHETIC if used.noise == SYNTHETIC else noise if used.noise else None,
                rir=rir if used.rir else None,
                noise_prob=used.noise_prob,
                rir_prob=used.rir_prob,
                snr=list(used.snr),
                coders=list(used.coders),
                coder_prob=used.coder_prob,
            )
        ).as_in(card)
        plan = replace(plan, vad=card.vad)
        if plan.card() != card:
            raise SpkdError(
                "the cache's views were augmented with audio that is not the one given; give noise=FOLDER and "
                "rir=FOLDER, the same folders as at extraction, or extract with fbank=true, which needs no audio"
            )
        return plan

    def as_in(self, card: ViewCard) -> ViewPlan:
        """This plan by the versions of the formulas that a cache has, as far as they are here."""
        plan = self
        if card.formants_version in FORMULAS:
            plan = replace(plan, formants_version=card.formants_version)
        if card.augmentation.has_versions and card.augmentation.version in VERSIONS:
            plan = replace(plan, augmentation=replace(plan.augmentation, version=card.augmentation.version))
        return plan

    def views(self, manifest: Manifest) -> Views:
        """The views of every utterance, in the order of the manifest.

        Args:
            manifest: the utterances, all measured.
        """
        columns = manifest.utterances
        made = {name: Spool(kind) for name, kind in VIEW_COLUMNS.items()}
        # Factors are drawn for each speaker: all utterances of a speaker have the same pseudo-speakers.
        speakers = np.append(_checksums(columns.speakers), np.uint64(0))  # the last for unknown ones
        for first in range(0, len(manifest), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            total = np.rint(np.nan_to_num(columns.duration[some]) * SAMPLE_RATE).astype(np.int64)
            ids, speaker = _checksums(manifest.ids[some]), columns.speaker[some]
            views = self._views_of(total, ids, np.where(speaker == UNKNOWN, ids, speakers[speaker]))
            for name, values in replace(views, utterance=views.utterance + np.int32(first)).columns().items():
                made[name].add(values)
        return Views(**{name: each.array() for name, each in made.items()})

    def _views_of(self, total: np.ndarray, ids: np.ndarray, speakers: np.ndarray) -> Views:
        """The views of some utterances, which are counted from the first of them.

        Args:
            total: (N,) samples of each utterance.
            ids: (N,) key of each utterance.
            speakers: (N,) key of each utterance's speaker.
        """
        if self.kind in ("drawn", "crops"):
            utterance = np.repeat(np.arange(len(total), dtype=np.int32), self.count)
            number = np.tile(np.arange(self.count, dtype=np.uint64), len(total))
            keys = (speakers if self.kind == "drawn" else ids)[utterance]
            speed = self._drawn(self.speeds, keys, number, 0)
            formants = self._drawn(self.formants, keys, number, 3)
            if self.kind == "drawn":
                samples = (total[utterance] / _exact(speed)).astype(np.int32)
                start = np.zeros(len(utterance), np.int64)
            else:
                samples = np.full(len(utterance), round(self.seconds * SAMPLE_RATE), np.int32)
                room = np.maximum(total[utterance] - source_samples(samples, speed), 0) + 1
                start = (_hash(ids[utterance], number, self.seed, 1) % room.astype(np.uint64)).astype(np.int64)
        else:
            # Views for each pair of a speed and a formant factor; lengths and hops count after the change of speed.
            # length_at: (utterances, pairs) length of each utterance at each pair; count: number of its windows.
            pairs = [(s, f) for s in self.speeds for f in self.formants]
            speeds, factors = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
            length, hop = round(self.seconds * SAMPLE_RATE), round(self.hop * SAMPLE_RATE)
            length_at = (total[:, None] / _exact(speeds)).astype(np.int64)
            count = np.ones_like(length_at) if self.kind == "full" else np.maximum((length_at - length) // hop + 1, 1)
            # utterance, which: (N,) row and column in these tables of each view, repeated for each window.
            utterance, which = (i.astype(np.int32) for i in np.nonzero(np.ones_like(length_at)))
            repeats = count[utterance, which]
            utterance, which = np.repeat(utterance, repeats), np.repeat(which, repeats)
            # number: (N,) of each window within its utterance and pair.
            first = np.repeat(np.cumsum(repeats) - repeats, repeats)
            number = (np.arange(len(utterance)) - first).astype(np.uint64)
            speed, formants = speeds[which], factors[which]
            whole = length_at[utterance, which]
            samples = (whole if self.kind == "full" else np.minimum(whole, length)).astype(np.int32)
            start = source_samples(number.astype(np.int64) * hop, speed)
            number = number * np.uint64(len(speeds)) + which.astype(np.uint64)
        seed = (_hash(ids[utterance], number, self.seed, 2) >> np.uint64(32)).astype(np.uint32)
        return Views(utterance, start, samples, speed, seed, formants)

    def _drawn(self, factors: tuple[float, ...], ids: np.ndarray, number: np.ndarray, purpose: int) -> np.ndarray:
        """(N,): a random factor for each view; the first view of `full:COUNT` has 1.

        Args:
            ids: (N,) key of each view: of its utterance, or of its speaker.
            number: (N,) number of each view within its utterance.
            purpose: number that separates independent draws.
        """
        choice = np.array(factors, np.float32)[_hash(ids, number, self.seed, purpose) % np.uint64(len(factors))]
        return np.where((number == 0) & (self.kind == "drawn"), np.float32(1.0), choice)


def _checksums(texts: Collection[str]) -> np.ndarray:
    """(N,) CRC-32 of each text."""
    return np.fromiter((zlib.crc32(text.encode()) for text in texts), np.uint64, len(texts))


def _check_version(what: str, version: int, known: Collection[int]) -> None:
    if version not in known:
        here = " and ".join(map(str, known))
        raise SpkdError(
            f"the cache's {what} by version {version} of the formula, here there is {here}: extract again, or extract "
            "with fbank=true, which needs no audio"
        )


def unused_folders(cards: Iterable[ViewCard], prefix: str = "") -> dict[str, str]:
    """Settings that name a folder of audio with which no view was augmented, with the reason."""
    used = [card.augmentation for card in cards]
    found = {}
    if all(augmentation.noise in (None, SYNTHETIC) for augmentation in used):
        found[f"{prefix}noise"] = "the cache's views have no noise of a folder"
    if all(augmentation.rir is None for augmentation in used):
        found[f"{prefix}rir"] = "the cache's views have no reverberation"
    return found


def source_samples(samples: np.ndarray | int, speed: np.ndarray | float) -> np.ndarray:
    """Number of samples of an utterance at 16 kHz that give a view of some length.

    Args:
        samples: length of the view, or (N,) lengths.
        speed: factor of the speed, or (N,) factors.
    """
    return np.rint(samples * _exact(speed)).astype(np.int64)


def _exact(speed: np.ndarray | float) -> np.ndarray:
    """Speeds as exact hundredths, which float32 holds only approximately."""
    return np.rint(np.asarray(speed, np.float64) * 100) / 100


def _hash(ids: np.ndarray, number: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """(N,): 64 random bits per row, by three rounds of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        ids: (N,) key of each view: of its utterance, or of its speaker.
        number: (N,) number of each view within its utterance.
        seed: the setting view.seed.
        purpose: number that separates independent draws.
    """
    with np.errstate(over="ignore"):
        state = np.full(len(ids), (seed * 8 + purpose) % 2**64, np.uint64)
        for key in (ids, number, np.zeros_like(number)):
            state = state + key + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
