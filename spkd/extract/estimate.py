"""Estimate of the cost of an extraction: bytes, hours and money."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from spkd.cache.codec import make_codec
from spkd.cache.layout import HEADER, chunk_bytes, chunk_rows, index_length
from spkd.cache.plan import Plan
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.loader import WaveBatch
from spkd.corpus.manifest import Manifest, measure, note_left_out
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.find import speech_alone
from spkd.corpus.view import ViewPlan
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError
from spkd.extract.run import fitting
from spkd.extract.settings import EstimateConfig
from spkd.extract.targets import chosen_targets, extract_targets
from spkd.files.text import counted, format_bytes
from spkd.outputs.features import FEATURES
from spkd.outputs.target import Target
from spkd.progress import log
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher

CODECS = ("float32", "float16", "int8", "sq4", "pq64x8")  # shown in addition to the chosen one
CALIBRATION = 5.0  # s for which the teacher is timed
LENGTHS = 5  # number of lengths of views at which the teacher is timed


@dataclass(frozen=True)
class Estimate:
    """Cost of an extraction.

    Attributes:
        hours: duration of all views together (h).
        bytes: name of each target -> name of each codec that fits its width, the chosen one first -> bytes.
        seconds: time of the teacher alone (s).
        device: device on which the teacher was timed.
    """

    views: int
    hours: float
    units: int
    targets: list[Target]
    bytes: dict[str, dict[str, int]]
    seconds: float
    device: str

    @property
    def total(self) -> int:
        """Bytes of the cache."""
        return sum(self.bytes[target.name][target.codec] for target in self.targets)

    def lines(self, hour: float, terabyte: float) -> Iterator[str]:
        """The estimate for people.

        Args:
            hour: price of an hour of this machine.
            terabyte: price of a terabyte stored for a month.
        """
        yield f"{counted(self.views, 'view')}, {self.hours:,.1f} hours of audio, {counted(self.units, 'unit')}"
        for target in self.targets:
            sizes = (f"{codec} {format_bytes(size)}" for codec, size in self.bytes[target.name].items())
            yield f"{target.name:20} {'   '.join(sizes)}"
        month, hours = self.total / 1e12 * terabyte, self.seconds / 3600
        yield f"cache as set         {format_bytes(self.total)}: {month:,.2f} a month at {terabyte:g} per TB"
        price = f"{hours * hour:,.2f} at {hour:g} an hour (decoding not counted)"
        yield f"teacher on {self.device:9} {hours:,.2f} h: {price}"


def estimate(config: EstimateConfig) -> Estimate:
    """Plan an extraction, and time the teacher on noise of the views' lengths.

    No audio is read where the manifest has all durations; a detector of speech is not run.

    Raises:
        UsageError: an unknown target or codec, or a view longer than a unit.
        SpkdError: no utterance can be read.
    """
    device = resolve(config.device)
    teacher = load_teacher(config.teacher, device)
    targets, view_plan = chosen_targets(config, teacher), ViewPlan.parse(config.view)
    manifest, unreadable = measure(Manifest.load(config.manifest))
    finder = finder_of(config.view.vad)
    if finder is not None and finder.is_costly:
        log(f"note: view.vad={config.view.vad} leaves silence out: with it, the cache is smaller than estimated here")
    elif finder is not None:
        manifest, silent = speech_alone(manifest, finder)
        unreadable |= silent
    manifest, too_long = fitting(manifest, config)
    note_left_out(manifest, unreadable | too_long)
    if not len(manifest):
        raise SpkdError(f"{manifest.source}: no utterance can be read")
    plan = Plan.make(manifest, view_plan.views(manifest), config.storage.unit_views, config.storage.unit_seconds)
    sizes = {
        target.name: {
            name: _bytes(plan, target.stored_as(name))
            for name in dict.fromkeys((target.codec, *CODECS))
            if _fits(name, target)
        }
        for target in targets
    }
    seconds = _teacher_seconds(teacher, targets, plan.views.samples, config.batch_size)
    hours = float(plan.views.samples.sum(dtype=np.int64)) / SAMPLE_RATE / 3600
    return Estimate(len(plan.views), hours, plan.units, targets, sizes, seconds, device.type)


def _fits(name: str, target: Target) -> bool:
    try:
        make_codec(name, target.dim)
    except UsageError:
        return False
    return True


def _bytes(plan: Plan, target: Target) -> int:
    """Size of all shards: whole chunks, header and index of each. Compression is not taken into account."""
    counts = target.num_frames(plan.views.samples)
    per_unit = np.add.reduceat(counts, plan.first[:-1])
    chunks = -(-per_unit // chunk_rows(target))
    overhead = HEADER + index_length(target, plan.shard_rows(target))
    return int(chunks.sum() * chunk_bytes(target) + plan.units * overhead)


def _teacher_seconds(teacher: Teacher, targets: list[Target], samples: np.ndarray, batch_size: int) -> float:
    """Time of the teacher for all views (s), measured at a few lengths of views, and interpolated between them.

    Args:
        samples: (views,) lengths of the views.
    """
    lengths = np.unique(np.quantile(samples, np.linspace(0.02, 0.98, LENGTHS)).astype(np.int64))
    lengths = np.maximum(lengths, teacher.min_samples)
    asked = [target for target in targets if target.name not in FEATURES or not teacher.targets]
    cost = []
    for length in lengths:
        noise = 0.1 * torch.randn(batch_size, int(length), generator=torch.Generator().manual_seed(0))
        batch = WaveBatch(np.arange(batch_size), noise)
        extract_targets(teacher, batch, asked)  # the first call allocates and tunes
        turns, start = 0, time.perf_counter()
        while turns < 1 or time.perf_counter() - start < CALIBRATION / len(lengths):
            extract_targets(teacher, batch, asked)  # ends on the CPU, so it is finished when it returns
            turns += 1
        cost.append((time.perf_counter() - start) / turns / batch_size)
    return float(np.interp(samples, lengths, cost).sum())
