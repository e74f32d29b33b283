"""Training from WebDataset tars, local or remote, with prefetching.

Each tar is read whole. The tars of the current block and of the next one are in memory.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from spkd.cache.crop import Crop
from spkd.cache.exchange.tars import AUDIO, SCALE, Export, Sample, tar_name
from spkd.cache.layout import row_format
from spkd.cache.plan import Plan
from spkd.cache.source import SingleCache
from spkd.errors import SpkdError
from spkd.files.remote_folder import patiently
from spkd.outputs.features import FEATURES, input_features
from spkd.outputs.target import Target
from spkd.seeding import Purpose, random_state

BLOCK = 4  # tars whose views are shuffled together


class Stream(SingleCache):
    """Stream of the views of an export.

    The tars are shuffled and divided into blocks; the views are shuffled within each block. So `order` is known before
    anything is read, and a run can resume at any step.
    """

    random_access = False

    def __init__(self, url: str) -> None:
        self._export = Export(url)
        self._folder = tempfile.TemporaryDirectory(prefix="spkd-stream-")
        root = Path(self._folder.name)
        plan = Plan.join(self._export.metadata().plans(root))
        super().__init__(root, self._export.url, self._export.card, plan, self._export.rejected)
        self._has_audio = bool(self._export.index["audio"])
        self._blocks: list[list[int]] = []
        self._loaded: dict[tuple[int, tuple[str, ...]], Future[dict[int, Sample]]] = {}
        self._readers: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process reads for itself. The folder remains that of the process that made it, which removes it.
        return {**self.__dict__, "_folder": None, "_loaded": {}, "_readers": None}

    @property
    def names(self) -> list[str]:
        """Names of the targets that can be read, including features that are computed from the audio."""
        return [*super().names, *(name for name in FEATURES if self._has_audio and name not in self.targets)]

    def target(self, name: str) -> Target:
        return FEATURES[name] if name in FEATURES else super().target(name)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        random = random_state(Purpose.ORDER, seed, epoch)
        units = random.permutation(self.plan.units).tolist()
        self._blocks = [units[i : i + BLOCK] for i in range(0, len(units), BLOCK)]
        order = []
        for block in self._blocks:
            views = np.concatenate([np.array(self.plan.unit(unit), np.int64) for unit in block])
            order.append(random.permutation(views[self.are_usable(views)]))
        return np.concatenate(order)

    def stored(self, views: np.ndarray, names: Sequence[str], crop: Crop | None = None) -> dict[str, Tensor]:
        self.check(views := np.asarray(views))
        sources = self._computed(names)
        sources += self.sources([name for name in names if name not in sources])
        units = self.plan.units_of(views).tolist()
        asked = tuple(sources)
        self._expect(sorted(set(units)), asked)
        samples = [self._loaded[unit, asked].result()[int(view)] for unit, view in zip(units, views, strict=True)]
        batch = {}
        for name in sources:
            target = self.targets.get(name) or FEATURES[name].stored_as("float32")
            rows = self.rows(target, views, crop).numbers
            picked = [sample[name][numbers] for sample, numbers in zip(samples, rows, strict=True)]
            stacked = torch.from_numpy(np.stack(picked))
            batch[name] = stacked[:, 0] if target.hop is None else stacked
        return batch

    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        computed = {name: values for name, values in stored.items() if name in self._computed(stored)}
        rest = {name: values for name, values in stored.items() if name not in computed}
        return super().decode(rest, [name for name in names if name not in computed]) | computed

    def _computed(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not in the tars, and are computed from the audio."""
        return [name for name in names if name in FEATURES and name not in self.targets]

    def _expect(self, units: list[int], names: tuple[str, ...]) -> None:
        """Start to read the block of some units and the block after it, and drop everything else that was read."""
        if self._readers is None or self._readers[0] != os.getpid():  # threads do not outlive a fork
            self._loaded, self._readers = {}, (os.getpid(), ThreadPoolExecutor(BLOCK, "stream reader"))
        wanted: list[int] = []
        for i, block in enumerate(self._blocks):
            if set(block) & set(units):
                wanted += [u for b in self._blocks[i : i + 2] for u in b]
        keys = [(unit, names) for unit in dict.fromkeys([*units, *wanted])]
        for key in self._loaded.keys() - keys:
            del self._loaded[key]
        for key in keys:
            if key not in self._loaded:
                self._loaded[key] = self._readers[1].submit(self._read, *key)

    def _read(self, unit: int, names: tuple[str, ...]) -> dict[int, Sample]:
        computed = self._computed(names)
        asked = [name for name in names if name in self.targets] + ([AUDIO] if computed else [])
        samples: dict[int, Sample] = {}
        for view, sample in patiently(lambda: list(self._export.unit(unit, self.plan, asked)), self.name):
            where = f"{self.name}/{tar_name(unit)}"
            if view not in self.plan.unit(unit):
                raise SpkdError(f"{where}: view {view} does not belong here")
            if computed:
                scale = float(sample.pop(SCALE, np.array(1.0)))
                wave = self._audio(view, sample.pop(AUDIO, None), where) * scale
                sample |= {name: input_features(FEATURES[name], wave)[0].numpy() for name in computed}
            for name in set(asked) - {AUDIO}:
                (columns, dtype), target = row_format(self.targets[name]), self.targets[name]
                expected = (target.num_frames(int(self.plan.views.samples[view])), columns)
                if name not in sample or sample[name].shape != expected or sample[name].dtype != dtype:
                    raise SpkdError(f"{where}: {name} of view {view} is missing or misshapen")
            samples[view] = sample
        return samples

    def _audio(self, view: int, flac: np.ndarray | None, where: str) -> Tensor:
        """Waveform of one view.

        Args:
            flac: (bytes,) its FLAC file; None where the tar has none.
        Returns:
            (1, samples), float32.
        """
        samples = int(self.plan.views.samples[view])
        try:
            if flac is None:
                raise ValueError("no audio")
            with soundfile.SoundFile(io.BytesIO(flac.tobytes())) as file:
                wave = file.read(samples, dtype="float32")
            if wave.shape != (samples,):
                raise ValueError(f"{wave.shape} samples where {samples} are expected")
        except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
            raise SpkdError(f"{where}: the audio of view {view} is damaged ({error})") from error
        return torch.from_numpy(wave)[None]
