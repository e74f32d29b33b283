"""Export of a cache to one HDF5 file, and import.

    /                    attributes spkd_cache = 1, card (JSON), rejected (JSON), digests (JSON, of /files and /targets)
    /targets/NAME        (rows, columns) as stored, all views one after the other; attributes of the target
    /offsets/NAME        (views + 1,) first row of every view
    /views/...           utterance, start (samples), samples, speed, seed
    /utterance, /speaker ids; the speaker of each utterance ("" where unknown)
    /files/NAME          plans, head and codebook of the cache as bytes

Data have HDF5's own checksum (fletcher32), so that any tool detects damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from spkd.cache.exchange.transfer import Metadata, building, check_names, checked, rejections
from spkd.cache.folder import parse_card
from spkd.cache.layout import blank, row_format
from spkd.cache.plan import UNLABELLED
from spkd.cache.read import Cache
from spkd.errors import FULL, SpkdError, UsageError, of_system
from spkd.files import digest
from spkd.files.atomic import remove_abandoned, writing
from spkd.files.reading import MOST_BYTES, holes, parse_json
from spkd.files.sealed import CHECK
from spkd.outputs.target import Target
from spkd.progress import track

EXPORT_FORMAT = 1
CHUNK_BYTES = 1 << 20
LARGEST_CHUNK = 1 << 28  # bytes that a chunk of an imported file may have after decompression
LARGEST_FILE = 1 << 32  # bytes of a plan, a head or a codebook
MOST_RATIO, SMALL = 100, 1 << 20  # most bytes of a dataset for each byte that is stored; as many as any may have


def export_hdf5(cache: Cache, path: Path) -> None:
    """Write a cache as one HDF5 file, atomically. Raises SpkdError: the cache is damaged."""
    plan, small = cache.plan, Metadata.of(cache)
    speakers = [*plan.speakers, ""]
    digests = {f"files/{name}": digest.of_bytes(data) for name, data in small.files.items()}
    with writing(path) as whole, _written(whole) as (file, check_disk):
        file.attrs["spkd_cache"] = EXPORT_FORMAT
        file.attrs["card"] = json.dumps(cache.card.to_json())
        file.attrs["rejected"] = json.dumps(cache.rejected)
        for name, data in small.files.items():
            file[f"files/{name}"] = np.frombuffer(data, np.uint8)
        for name, column in plan.views.columns().items():
            file[f"views/{name}"] = np.asarray(column)
        text = h5py.string_dtype()
        file.create_dataset("utterance", data=list(plan.utterances), dtype=text)
        assert UNLABELLED == -1  # the last of `speakers`
        file.create_dataset("speaker", data=[speakers[i] for i in np.asarray(plan.speaker)], dtype=text)
        with track("writing HDF5", plan.units * len(cache.targets), "shards") as bar:
            checks = checked(cache)
            for target in cache.targets.values():
                digests[f"targets/{target.name}"] = _export_target(cache, target, file, checks, check_disk)
                bar.advance(plan.units)
        file.attrs["digests"] = json.dumps(digests | {CHECK: _check(file, digests)})


class _Disk(io.RawIOBase):
    """File for libhdf5 of which no call fails: where one does, libhdf5 crashes, or leaves out what it could not write.

    Attributes:
        error: the first error of a call, or interruption, behind which nothing is written.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._place, self._end = file, 0, 0  # bytes
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error, if there is one."""
        if self.error is not None:
            raise self.error

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        if self.error is None:
            try:
                self._file.seek(self._place)
                call(*arguments)
            except BaseException as error:
                self.error = error

    def write(self, data: Any) -> int:
        self._try(self._file.write, data)
        self._place += len(data)
        self._end = max(self._end, self._place)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        self._try(self._file.readinto, buffer)  # type: ignore[attr-defined]
        self._place += len(buffer)
        return len(buffer)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._end}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def truncate(self, size: int | None = None) -> int:
        self._end = self._place if size is None else size
        self._try(self._file.truncate, self._end)
        return self._end

    def flush(self) -> None:
        self._try(self._file.flush)


@contextlib.contextmanager
def _written(whole: BinaryIO) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """A new HDF5 file, and the function that raises the first error of the disk, as the end of the block does."""
    disk = _Disk(whole)
    try:
        with h5py.File(disk, "w") as file:
            yield file, disk.check
    finally:
        disk.check()  # in the place of what libhdf5 makes of it


def _check(file: h5py.File, digests: Mapping[str, str]) -> str:
    """Digest over the attributes of a file and the digests of its other content."""
    return digest.of_tree({**digests, **{name: _attribute(file, name) for name in ("card", "rejected")}})


def _export_target(
    cache: Cache,
    target: Target,
    file: h5py.File,
    check: Callable[[int, Target], None],
    check_disk: Callable[[], None],
) -> str:
    """Write a target of every view. Returns the SHA-256 of the rows of all usable views, one after the other."""
    counts = target.num_frames(cache.plan.views.samples)
    ends = np.cumsum(counts)
    columns, dtype = row_format(target)
    height = _chunk_rows(target, int(ends[-1]))
    data = file.create_dataset(
        f"targets/{target.name}", (int(ends[-1]), columns), dtype, chunks=(height, columns), fletcher32=True
    )
    for name, value in target.to_json().items():
        data.attrs[name] = h5py.Empty("f4") if value is None else value
    file[f"offsets/{target.name}"] = np.concatenate([[0], ends])
    state = hashlib.sha256()
    for unit in range(cache.plan.units):
        check(unit, target)
        check_disk()
        views = np.array(cache.plan.unit(unit))
        kept = cache.are_usable(views)
        usable = cache.ragged(views[kept], target.name)
        state.update(usable.values.numpy().tobytes())
        values = iter(usable.pieces())
        data[int(ends[views[0]] - counts[views[0]]) : int(ends[views[-1]])] = np.concatenate(
            [next(values) if k else _nothing(target, int(counts[v])) for v, k in zip(views, kept, strict=True)]
        )
    return state.hexdigest()


def _chunk_rows(target: Target, rows: int) -> int:
    columns, dtype = row_format(target)
    return max(min(CHUNK_BYTES // (columns * dtype.itemsize), rows), 1)


def _nothing(target: Target, count: int) -> np.ndarray:
    columns, dtype = row_format(target)
    return np.frombuffer(blank(target, count), dtype).reshape(count, columns)


def import_hdf5(path: Path, root: Path) -> None:
    """Make a cache from an HDF5 file that `export_hdf5` wrote, atomically.

    The file is read in a separate process, because libhdf5 may crash on a damaged file.

    Raises:
        UsageError: no such file.
        SpkdError: not HDF5, of a newer format, damaged, or with arrays of other shapes than in its card.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    command = [sys.executable, "-P", "-c", "from spkd.cache.exchange.hdf5 import main; main()", str(path), str(root)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
        try:
            message = child.communicate()[1].decode(errors="replace").strip()
        except BaseException:
            child.terminate()
            raise
    if child.returncode < 0:
        remove_abandoned(root.parent, [root.name])
        raise SpkdError(f"{path}: damaged (libhdf5 crashed on it)")
    if child.returncode:
        raise SpkdError(message.splitlines()[-1] if message else f"{path}: cannot be imported")


def main() -> None:
    """Main function of the process that `import_hdf5` starts; its arguments are the file and the new cache."""
    path, root = map(Path, sys.argv[1:])
    try:
        _import(path, root)
    except SpkdError as error:
        named = str(error) if str(error).startswith(f"{root}: ") else f"{path}: {error}"
        sys.exit(" ".join(named.split()))
    except MemoryError:
        sys.exit(f"{path}: damaged, or more than fits into memory")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        if isinstance(error, OSError) and (error.errno in FULL or error.filename):  # of the new cache
            sys.exit(of_system(error))
        sys.exit(f"{path}: damaged, or not an export of a cache ({' '.join(str(error).split())[:200]})")


def _import(path: Path, root: Path) -> None:
    with h5py.File(path, "r") as file:
        if file.attrs.get("spkd_cache") != EXPORT_FORMAT:
            raise SpkdError(f"not an export of a cache in format {EXPORT_FORMAT}")
        card = parse_card(_attribute(file, "card"), "card")
        rejected = rejections(parse_json(_attribute(file, "rejected"), "rejected"))
        check_names(names := _file_names(file), card)
        small = Metadata(card, {n: _bytes(file, f"files/{n}") for n in names})
        with building(root, small) as builder, track("reading HDF5", builder.plan.units, "units") as bar:
            states = {target.name: hashlib.sha256() for target in card.targets}
            data = {target.name: _target(file, target, builder.plan.views.samples) for target in card.targets}
            for unit in builder.units():
                usable = [view for view in builder.plan.unit(unit) if view not in rejected]
                builder.write(unit, rejected, _views(data, usable, states))
                bar.advance(1)
            found = {f"files/{name}": digest.of_bytes(content) for name, content in small.files.items()}
            found |= {f"targets/{name}": state.hexdigest() for name, state in states.items()}
            if parse_json(_attribute(file, "digests"), "digests") != found | {CHECK: _check(file, found)}:
                raise SpkdError("damaged (its content is not that of its digests)")


def _attribute(file: h5py.File, name: str) -> str:
    """A text attribute of a file, of limited size."""
    if file.attrs.get_id(name).get_storage_size() > MOST_BYTES:
        raise SpkdError(f"its attribute {name} is too large")
    value = file.attrs[name]
    if not isinstance(value, str):
        raise SpkdError(f"its attribute {name} is no text")
    return value


def _bytes(file: h5py.File, name: str) -> bytes:
    """Content of a file of the cache that the HDF5 file keeps as bytes."""
    data = _dataset(file, name)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size > LARGEST_FILE:
        raise SpkdError(f"/{name}: {data.dtype} {data.shape} is no file of a cache")
    with open(file.filename, "rb") as whole:  # libhdf5 counts as stored what is a hole of a sparse file
        stored = os.path.getsize(file.filename) - holes(whole)
    if data.size > SMALL + MOST_RATIO * stored:
        raise SpkdError(f"/{name}: {data.size:,} bytes, in a file of which {stored:,} are stored")
    values: bytes = data[:].tobytes()
    return values


def _views(
    data: dict[str, tuple[h5py.Dataset, np.ndarray]], views: list[int], states: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Number and arrays of each view; what is read is added to the hash of its target in `states`."""
    for view in views:
        arrays = {name: rows[int(first[view]) : int(first[view + 1])] for name, (rows, first) in data.items()}
        for name, values in arrays.items():
            states[name].update(values)
        yield view, arrays


def _file_names(file: h5py.File) -> list[str]:
    names: list[str] = []
    file["files"].visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    return names


def _target(file: h5py.File, target: Target, samples: np.ndarray) -> tuple[h5py.Dataset, np.ndarray]:
    """The dataset of a target, and (views + 1,) the first row of every view."""
    data = _dataset(file, f"targets/{target.name}")
    offsets = np.concatenate([[0], np.cumsum(target.num_frames(samples))])
    (columns, dtype), shape = row_format(target), (int(offsets[-1]),)
    if data.shape != (*shape, columns) or data.dtype != dtype:
        raise SpkdError(f"/targets/{target.name}: {data.dtype} {data.shape}, not {dtype} {(*shape, columns)}")
    return data, offsets


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset that lies in this file; a link or an external dataset could read other files of the machine."""
    node: Any = file
    for part in name.split("/"):
        if not isinstance(node, h5py.Group) or not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise SpkdError(f"/{name}: missing, or a link")
        node = node[part]
    if not isinstance(node, h5py.Dataset) or node.external is not None or node.is_virtual:
        raise SpkdError(f"/{name}: not a dataset of this file")
    if node.nbytes > SMALL + MOST_RATIO * node.id.get_storage_size():
        raise SpkdError(f"/{name}: {node.nbytes:,} bytes, of which {node.id.get_storage_size():,} are stored")
    if node.chunks is not None and math.prod(node.chunks) * node.dtype.itemsize > LARGEST_CHUNK:
        raise SpkdError(f"/{name}: chunks of {node.chunks} are too large")
    return node
