"""A cache as WebDataset tar shards, audio and targets side by side; back again; and as a stream to train from.

    index.json              card, rejected views, digests of everything, its own digest
    plan/0.npz, ...         small files of the cache
    000000.tar              unit 0: for every view ROW (nine digits)
        ROW.json            utterance, speaker, start (samples), samples, speed, seed
        ROW.flac            what the teacher heard, 16 kHz, 16 bit (where a manifest is given)
        ROW.TARGET.npy      (rows, columns) as stored

Any WebDataset reader takes the tars. Nothing read from one is executed or written under a name that it chose.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from spkd.audio import SAMPLE_RATE
from spkd.cache.contents import Crop, OneTeacher
from spkd.cache.layout import row
from spkd.cache.plan import Plan
from spkd.cache.read import Cache
from spkd.cache.remote import Place, digest_as_told, patiently, send
from spkd.cache.target import FEATURES, Target, features
from spkd.cache.transfer import Small, all_units, building, read_card, rejections
from spkd.cache.write import record_check
from spkd.errors import SpkdError
from spkd.files import write_bytes, write_json
from spkd.progress import track
from spkd.view import Player

INDEX = "index.json"
FORMAT = 1
BLOCK = 4  # tars in memory, among whose views a stream shuffles
Sample = dict[str, np.ndarray]


def tar_name(unit: int) -> str:
    return f"{unit:06d}.tar"


def export(cache: Cache, folder: Path, player: Player | None) -> None:
    """Write a cache as tars, one for each unit; with a player, the audio of every view beside its targets. The same
    call continues an interrupted export."""
    folder.mkdir(parents=True, exist_ok=True)
    small, digests = Small.of(cache), {}
    for name, data in small.files.items():
        write_bytes(folder / name, data)
    with track("writing tars", cache.plan.units, "tars") as bar:
        for unit in range(cache.plan.units):
            path = folder / tar_name(unit)
            if not path.is_file():
                write_bytes(path, _tar(cache, unit, player))
            digests[path.name] = _digest_of(path)
            bar.advance(1)
    index: dict[str, Any] = {
        "spkd_webdataset": FORMAT,
        "card": cache.card,
        "rejected": {str(view): reason for view, reason in cache.rejected.items()},
        "audio": player is not None,
        "small": {name: hashlib.sha256(data).hexdigest() for name, data in small.files.items()},
        "tars": digests,
    }
    write_json(folder / INDEX, index | {"check": record_check(index)})


def _tar(cache: Cache, unit: int, player: Player | None) -> bytes:
    """The same unit always gives the same bytes."""
    from webdataset import TarWriter

    out, plan = io.BytesIO(), cache.plan
    served = np.array([view for view in plan.unit(unit) if cache.served[view]], np.int64)
    targets = {name: cache.ragged(served, name).pieces() for name in cache.targets}
    with TarWriter(out, mtime=0, user="spkd", group="spkd", encoder=False) as writer:
        for i, view in enumerate(served.tolist()):
            utterance = int(plan.views.utterance[view])
            speaker = int(plan.speaker[utterance])
            described = {
                "utterance": plan.utterances[utterance],
                "speaker": plan.speakers[speaker] if speaker >= 0 else None,
                **{name: column[view].item() for name, column in plan.views.columns().items() if name != "utterance"},
            }
            sample: dict[str, Any] = {"__key__": f"{view:09d}", "json": json.dumps(described).encode()}
            if player is not None:
                audio = io.BytesIO()
                soundfile.write(audio, player(view).clip(-1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                sample["flac"] = audio.getvalue()
            for name, pieces in targets.items():
                array = io.BytesIO()
                np.save(array, pieces[i], allow_pickle=False)
                sample[f"{name}.npy"] = array.getvalue()
            writer.write(sample)
    return out.getvalue()


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def push(folder: Path, url: str) -> int:
    """Copy an export to a place, and read back what arrived. The same call continues after an interruption.

    Returns:
        Bytes of the tars.
    Raises:
        SpkdError: as remote.send, or a damaged export.
    """
    index = Export(str(folder)).index
    digests = {**index["small"], **index["tars"]}
    send(folder, url, list(digests), lambda name: digest_as_told(folder / name, digests[name]), INDEX)
    return sum((folder / name).stat().st_size for name in index["tars"])


class Export:
    """An export somewhere: its index, and its tars, checked as they are read."""

    def __init__(self, url: str) -> None:
        """Raises SpkdError: none there, of a newer format, or damaged."""
        self.place, where = Place.of(url), f"{url}/{INDEX}"
        data = self.place.read(INDEX)
        if data is None:
            raise SpkdError(f"{where}: missing; no WebDataset export of a cache")
        try:
            index = json.loads(data)
        except ValueError as error:
            raise SpkdError(f"{where}: damaged, not valid JSON ({error})") from error
        if not isinstance(index, dict) or "spkd_webdataset" not in index:
            raise SpkdError(f"{where}: not the index of an export")
        if index["spkd_webdataset"] != FORMAT:
            raise SpkdError(f"{where}: format {index['spkd_webdataset']}, this spkd reads {FORMAT}; update spkd")
        if index.get("check") != record_check(index):
            raise SpkdError(f"{where}: damaged (it does not fit its own digest)")
        self.url, self.index = url, index
        self.card = read_card(json.dumps(index["card"]), where)
        self.targets = [Target.from_card(target) for target in self.card["targets"]]
        self.rejected = rejections(index["rejected"])

    def small(self) -> Small:
        """The small files, checked."""
        files = {}
        for name, digest in self.index["small"].items():
            data = self.place.read(name)
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                raise SpkdError(f"{self.url}/{name}: {'missing' if data is None else 'damaged'}")
            files[name] = data
        return Small(self.card, files)

    def unit(self, unit: int, names: Sequence[str]) -> Iterator[tuple[int, Sample]]:
        """Rows and stored arrays of the views of one tar, once its digest was found right.

        Raises:
            SpkdError: it is missing or damaged, or a member is not what an export holds.
        """
        name = tar_name(unit)
        where = f"{self.url}/{name}"
        data = self.place.read(name)
        if data is None:
            raise SpkdError(f"{where}: missing")
        if hashlib.sha256(data).hexdigest() != self.index["tars"].get(name):
            raise SpkdError(f"{where}: damaged, or of another export (digest differs from {INDEX})")
        return read_tar(io.BytesIO(data), where, {t.name for t in self.targets}, names)


def read_tar(file: IO[bytes], where: str, known: set[str], names: Sequence[str]) -> Iterator[tuple[int, Sample]]:
    """Samples of a tar: (row, arrays by target); the audio, where asked for, as "audio", (samples,) float32.

    Raises:
        SpkdError: a member with another name than an export gives (absolute, with `..`, a pickle), or that is no
            regular file, or an array that cannot be read without pickle; or the tar is cut short.
    """
    allowed = re.compile(rf"(\d{{9}})\.(?:json|flac|({'|'.join(re.escape(name) for name in sorted(known))})\.npy)")
    current, sample = -1, Sample()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                found = allowed.fullmatch(member.name)
                if found is None or not member.isreg():
                    kind = "" if member.isreg() else " (not a regular file)"
                    raise SpkdError(f"{where}: member {member.name!r}{kind} has no place in an export; nothing is read")
                if int(found[1]) != current:
                    if current >= 0:
                        yield current, sample
                    current, sample = int(found[1]), Sample()
                body = tar.extractfile(member)
                assert body is not None
                if found[2] in names:
                    sample[found[2]] = np.lib.format.read_array(io.BytesIO(body.read()), allow_pickle=False)
                elif member.name.endswith(".flac") and "audio" in names:
                    sample["audio"] = soundfile.read(io.BytesIO(body.read()), dtype="float32")[0]
    except (tarfile.TarError, ValueError, EOFError, soundfile.LibsndfileError) as error:
        raise SpkdError(f"{where}: damaged ({' '.join(str(error).split())})") from error
    if current >= 0:
        yield current, sample


def load(url: str, root: Path) -> None:
    """Make a cache from an export; it appears whole or not at all.

    Raises:
        SpkdError: a missing or damaged file, or one that holds what no export holds.
    """
    export_ = Export(url)
    names = [target.name for target in export_.targets]
    with building(root, export_.small()) as sink, track("reading tars", sink.plan.units, "tars") as bar:
        for unit in all_units(sink):
            where = f"{url}/{tar_name(unit)}"
            samples = list(export_.unit(unit, names))
            missing = [name for _, sample in samples for name in names if name not in sample]
            if missing:
                raise SpkdError(f"{where}: lacks {missing[0]} of a view")
            try:
                sink.write(unit, export_.rejected, iter(samples))
            except SpkdError as error:
                raise SpkdError(f"{where}: {error}") from error
            bar.advance(1)


class Stream(OneTeacher):
    """An export to train from, wherever it lies: tars are read whole, a block of them at a time, ahead of need.

    Views are shuffled among the tars of a block, and the tars among the blocks, so `order` is known before anything
    is read and a run resumes at any step.
    """

    def __init__(self, url: str) -> None:
        self._export = Export(url)
        small, self._folder = self._export.small(), tempfile.TemporaryDirectory(prefix="spkd-stream-")
        root = Path(self._folder.name)
        plan = Plan.join(small.plans(root))
        super().__init__(root, url, self._export.card, plan, self._export.rejected)
        self._has_audio = bool(self._export.index["audio"])
        self._blocks: list[list[int]] = []
        self._loaded: dict[tuple[int, tuple[str, ...]], Future[dict[int, Sample]]] = {}
        self._reader = ThreadPoolExecutor(BLOCK, "stream reader")

    @property
    def names(self) -> list[str]:
        """As of any cache; features also where they have to be computed from the audio."""
        return [*super().names, *(name for name in FEATURES if self._has_audio and name not in self.targets)]

    def target(self, name: str) -> Target:
        return FEATURES[name] if name in FEATURES else super().target(name)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        random = np.random.RandomState((seed * 7_919 + epoch) % 2**32)
        units = random.permutation(self.plan.units).tolist()
        self._blocks = [units[i : i + BLOCK] for i in range(0, len(units), BLOCK)]
        order = []
        for block in self._blocks:
            rows = np.concatenate([np.array(self.plan.unit(unit), np.int64) for unit in block])
            order.append(random.permutation(rows[self.served[rows]]))
        return np.concatenate(order)

    def stored(self, rows: np.ndarray, names: Sequence[str], crop: Crop | None = None) -> dict[str, Tensor]:
        self.check(rows)
        sources = self._computed(names)
        sources += self.sources([name for name in names if name not in sources])
        units = self.plan.unit_of[rows].tolist()
        asked = tuple(sources)
        self._expect(sorted(set(units)), asked)
        samples = [self._loaded[unit, asked].result()[int(view)] for unit, view in zip(units, rows, strict=True)]
        batch = {}
        for name in sources:
            target = self.targets.get(name) or FEATURES[name].stored_as("float32")
            counts = target.rows(self.plan.views.samples[rows])
            height, skip = self.stretch(target, counts, crop)
            picked = [
                sample[name][(at + np.arange(height)) % count]
                for sample, at, count in zip(samples, skip.tolist(), counts.tolist(), strict=True)
            ]
            stacked = torch.from_numpy(np.stack(picked))
            batch[name] = stacked[:, 0] if target.hop is None else stacked
        return batch

    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        computed = {name: values for name, values in stored.items() if name in self._computed(stored)}
        rest = {name: values for name, values in stored.items() if name not in computed}
        return super().decode(rest, [name for name in names if name not in computed]) | computed

    def _computed(self, names: Iterable[str]) -> list[str]:
        """Which of `names` do not lie in the tars but follow from the audio."""
        return [name for name in names if name in FEATURES and name not in self.targets]

    def _expect(self, units: list[int], names: tuple[str, ...]) -> None:
        """Begin to read these targets of the blocks of these units and of the next one; forget everything else."""
        wanted: list[int] = []
        for i, block in enumerate(self._blocks):
            if set(block) & set(units):
                wanted += [u for b in self._blocks[i : i + 2] for u in b]
        keys = [(unit, names) for unit in dict.fromkeys([*units, *wanted])]
        for key in self._loaded.keys() - keys:
            del self._loaded[key]
        for key in keys:
            if key not in self._loaded:
                self._loaded[key] = self._reader.submit(self._read, *key)

    def _read(self, unit: int, names: tuple[str, ...]) -> dict[int, Sample]:
        computed = self._computed(names)
        asked = [name for name in names if name in self.targets] + (["audio"] if computed else [])
        found = {}
        for view, sample in patiently(lambda: list(self._export.unit(unit, asked)), self.name):
            if computed:
                wave = torch.from_numpy(sample.pop("audio"))[None]
                sample |= {name: features(FEATURES[name], wave)[0].numpy() for name in computed}
            for name in asked:
                if name != "audio" and (name not in sample or sample[name].shape[1:] != (row(self.targets[name])[0],)):
                    raise SpkdError(f"{self.name}/{tar_name(unit)}: {name} of view {view} is missing or misshapen")
            found[view] = sample
        return found
