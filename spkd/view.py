"""Views: what the teacher heard, and how to hear it again.

A view is a stretch of an utterance at a speed under an augmentation seed. All of it is decided before
extraction, from the manifest and the plan alone, by a counter-based hash of (utterance id, view number, seed):
adding utterances to a manifest never changes the views of the others.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spkd.audio import SAMPLE_RATE, SLACK, AudioError, Decoded, change_speed, decode
from spkd.augment import Augmentation
from spkd.config import ViewConfig
from spkd.errors import SpkdError, UsageError
from spkd.manifest import Manifest


@dataclass(frozen=True)
class Views:
    """A table of views, one row each; all arrays (N,).

    utterance: row in the manifest. start: first sample of the source at 16 kHz. samples: length of what is
    heard, after the speed change. speed: factor. seed: of the augmentation.
    """

    utterance: np.ndarray
    start: np.ndarray
    samples: np.ndarray
    speed: np.ndarray
    seed: np.ndarray

    def __len__(self) -> int:
        return len(self.utterance)

    def __getitem__(self, rows: np.ndarray | slice) -> Views:
        return Views(*(column[rows] for column in self.columns().values()))

    def columns(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("utterance", "start", "samples", "speed", "seed")}


@dataclass(frozen=True)
class ViewPlan:
    """Which views each utterance gives, and what may happen to them."""

    kind: str  # full | windows | crops
    seconds: float
    hop: float
    count: int
    speeds: tuple[float, ...]
    augmentation: Augmentation
    seed: int

    @classmethod
    def parse(cls, config: ViewConfig) -> ViewPlan:
        """From settings: `full`, `windows:SECONDS/HOP` or `crops:COUNT,SECONDS`.

        Raises:
            UsageError: another form, lengths that are not positive, or a speed outside 0.5-2 or finer than 0.01.
        """
        for speed in config.speeds:
            if not 0.5 <= speed <= 2.0 or abs(speed * 100 - round(speed * 100)) > 1e-6:
                raise UsageError(f"view.speeds: {speed} is not between 0.5 and 2 in steps of 0.01")
        if not config.speeds or len(set(config.speeds)) < len(config.speeds):
            raise UsageError("view.speeds: give each speed once, at least one")
        number = r"(\d+(?:\.\d+)?)"
        windows = re.fullmatch(rf"windows:{number}/{number}", config.plan)
        crops = re.fullmatch(rf"crops:(\d+),{number}", config.plan)
        if config.plan == "full":
            kind, seconds, hop, count = "full", 0.0, 0.0, 1
        elif windows:
            kind, seconds, hop, count = "windows", float(windows[1]), float(windows[2]), 1
        elif crops:
            kind, seconds, hop, count = "crops", float(crops[2]), 0.0, int(crops[1])
        else:
            raise UsageError(f"view.plan={config.plan}: expected full, windows:SECONDS/HOP or crops:COUNT,SECONDS")
        if count < 1 or (kind != "full" and seconds < 0.1) or (kind == "windows" and hop <= 0):
            raise UsageError(f"view.plan={config.plan}: at least one view of at least 0.1 s")
        augmentation = Augmentation(
            config.noise,
            config.noise_prob,
            config.snr,
            config.rir,
            config.rir_prob,
        )
        return cls(kind, seconds, hop, count, tuple(config.speeds), augmentation, config.seed)

    @property
    def text(self) -> str:
        return {
            "full": "full",
            "windows": f"windows:{self.seconds:.10g}/{self.hop:.10g}",
            "crops": f"crops:{self.count},{self.seconds:.10g}",
        }[self.kind]

    def card(self) -> dict[str, object]:
        return {
            "plan": self.text,
            "speeds": list(self.speeds),
            "seed": self.seed,
            "augmentation": self.augmentation.card(),
        }

    @classmethod
    def from_card(cls, card: dict, noise: str | None, rir: str | None) -> ViewPlan:
        """The plan of a cache, with this machine's folders for its noise and impulse responses.

        Raises:
            SpkdError: the cache's views were augmented from a folder that is not the one given.
        """
        said = card["augmentation"]
        plan = cls.parse(
            ViewConfig(
                plan=card["plan"],
                speeds=card["speeds"],
                seed=card["seed"],
                noise="synthetic" if said["noise"] == "synthetic" else noise if said["noise"] else None,
                rir=rir if said["rir"] else None,
                noise_prob=said["noise_prob"],
                rir_prob=said["rir_prob"],
                snr=said["snr"],
            )
        )
        if plan.card() != card:
            raise SpkdError(
                "the cache's views were augmented with audio that is not the one given; give noise=FOLDER and "
                "rir=FOLDER, the same folders as at extraction, or extract with fbank=true, which needs no audio"
            )
        return plan

    def views(self, manifest: Manifest) -> Views:
        """The views of every utterance, in the manifest's order (durations must be known)."""
        total = np.array([round((u.duration or 0.0) * SAMPLE_RATE) for u in manifest], np.int64)
        ids = np.array([zlib.crc32(u.id.encode()) for u in manifest], np.uint64)
        speeds = np.array(self.speeds, np.float32)
        if self.kind == "crops":
            utterance = np.repeat(np.arange(len(manifest), dtype=np.int32), self.count)
            number = np.tile(np.arange(self.count, dtype=np.uint64), len(manifest))
            speed = speeds[_hash(ids[utterance], number, self.seed, 0) % np.uint64(len(speeds))]
            samples = np.full(len(utterance), round(self.seconds * SAMPLE_RATE), np.int32)
            room = np.maximum(total[utterance] - source_samples(samples, speed), 0) + 1
            start = (_hash(ids[utterance], number, self.seed, 1) % room.astype(np.uint64)).astype(np.int64)
        else:
            length, hop = round(self.seconds * SAMPLE_RATE), round(self.hop * SAMPLE_RATE)
            # One view per speed, lengths and hops counted after the speed change.
            heard = (total[:, None] / _exact(speeds)).astype(np.int64)
            count = np.ones_like(heard) if self.kind == "full" else np.maximum((heard - length) // hop + 1, 1)
            utterance, which = (i.astype(np.int32) for i in np.nonzero(np.ones_like(heard)))
            repeats = count[utterance, which]
            utterance, which = np.repeat(utterance, repeats), np.repeat(which, repeats)
            first = np.repeat(np.cumsum(repeats) - repeats, repeats)
            number = (np.arange(len(utterance)) - first).astype(np.uint64)
            speed = speeds[which]
            whole = heard[utterance, which]
            samples = (whole if self.kind == "full" else np.minimum(whole, length)).astype(np.int32)
            start = source_samples(number.astype(np.int64) * hop, speed)
            number = number * np.uint64(len(speeds)) + which.astype(np.uint64)
        seed = (_hash(ids[utterance], number, self.seed, 2) >> np.uint64(32)).astype(np.uint32)
        return Views(utterance, start, samples, speed, seed)


def source_samples(samples: np.ndarray | int, speed: np.ndarray | float) -> np.ndarray:
    """How many 16 kHz samples of the source are heard as `samples` samples at a speed."""
    return np.rint(samples * _exact(speed)).astype(np.int64)


def _exact(speed: np.ndarray | float) -> np.ndarray:
    """Speeds are hundredths; float32 holds them only nearly."""
    return np.rint(np.asarray(speed, np.float64) * 100) / 100


def _hash(ids: np.ndarray, number: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """64 random bits per row: three rounds of splitmix64 (Steele, Lea and Flood 2014) over the key's parts."""
    with np.errstate(over="ignore"):
        state = np.full(len(ids), (seed * 8 + purpose) % 2**64, np.uint64)
        for part in (ids, number, np.zeros_like(number)):
            state = state + part + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


class Player:
    """Plays views of a manifest: decode, cut, change speed, augment.

    Args:
        min_seconds: shorter utterances are refused. tell: told once that audio is resampled, and once that channels
            are averaged.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        augmentation: Augmentation,
        min_seconds: float = 0.0,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.manifest, self.views = manifest, views
        self._augment, self._min_seconds = augmentation, min_seconds
        self._tell, self._told = tell, set[str]()

    def __call__(self, row: int) -> np.ndarray:
        """The waveform (samples,) of one view, float32.

        A view longer than its utterance hears the utterance repeated, as is usual in the field.

        Raises:
            AudioError: the file is unusable, shorter than its manifest says, or shorter than the minimum.
        """
        views = self.views
        utterance = self.manifest[int(views.utterance[row])]
        start, samples = int(views.start[row]), int(views.samples[row])
        speed, planned = float(views.speed[row]), round((utterance.duration or 0.0) * SAMPLE_RATE)
        if planned < self._min_seconds * SAMPLE_RATE:
            raise AudioError(utterance.path, f"too short ({planned / SAMPLE_RATE:.2f} s < {self._min_seconds:g} s)")
        span = min(int(source_samples(samples, speed)), planned - start)
        decoded = decode(utterance.path, utterance.start + start / SAMPLE_RATE, span / SAMPLE_RATE)
        if len(decoded.wave) < span - SLACK * SAMPLE_RATE:
            raise AudioError(
                utterance.path, f"ends {(span - len(decoded.wave)) / SAMPLE_RATE:.2f} s before its manifest says"
            )
        wave = np.resize(change_speed(decoded.wave, round(speed, 2)), samples)
        self._notice(decoded)
        return self._augment(wave, int(views.seed[row]))

    def _notice(self, decoded: Decoded) -> None:
        notes = {
            "rate": decoded.rate != SAMPLE_RATE and f"audio at {decoded.rate} Hz is resampled to {SAMPLE_RATE} Hz",
            "channels": decoded.channels > 1 and f"audio with {decoded.channels} channels is averaged to one",
        }
        for kind, note in notes.items():
            if note and self._tell is not None and kind not in self._told:
                self._told.add(kind)
                self._tell(f"note: {note} (told once)")


@dataclass(frozen=True)
class Batch:
    """Views of equal length: their rows (B,) and waveforms (B, samples)."""

    rows: np.ndarray
    waves: Tensor


def play(
    player: Player,
    rows: np.ndarray,
    batch_size: int,
    workers: int,
    rejected: Callable[[int, str], None],
) -> Iterator[Batch]:
    """Waveforms of the views in `rows`, decoded ahead by `workers` threads, batched by exact length.

    Only views of one length share a batch: padding changes what many teachers say.

    Args:
        rejected: told (row, reason) of every view that cannot be played.
    """
    lengths = player.views.samples[rows]
    order = np.argsort(lengths, kind="stable")
    groups = np.split(rows[order], np.flatnonzero(np.diff(lengths[order])) + 1) if len(rows) else []
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]

    def one(row: int) -> np.ndarray | str:
        try:
            return player(row)
        except AudioError as error:
            return error.reason

    def collect(batch: np.ndarray, played: Sequence[Future]) -> Batch | None:
        kept, waves = [], []
        for row, future in zip(batch, played, strict=True):
            result = future.result()
            if isinstance(result, str):
                rejected(int(row), result)
            else:
                kept.append(row)
                waves.append(torch.from_numpy(np.ascontiguousarray(result)))
        return Batch(np.array(kept), torch.stack(waves)) if kept else None

    pool = ThreadPoolExecutor(max(workers, 1))
    pending: deque[tuple[np.ndarray, list[Future]]] = deque()
    ahead = 0
    try:
        for batch in batches:
            pending.append((batch, [pool.submit(one, int(row)) for row in batch]))
            ahead += len(batch)
            while ahead > 2 * batch_size:
                done = pending.popleft()
                ahead -= len(done[0])
                if (result := collect(*done)) is not None:
                    yield result
        for done in pending:
            if (result := collect(*done)) is not None:
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
