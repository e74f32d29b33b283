"""Export of a cache to WebDataset tars, with audio and targets of every view, and import.

    index.json              card, rejected views, digests of everything, its own digest
    plan/0.npz, ...         metadata files of the cache
    000000.tar              unit 0: for every view VIEW (nine digits)
        VIEW.json           utterance, speaker, start (samples), samples, speed, seed
        VIEW.flac           the view's waveform, 16 kHz, 16 bit (where a manifest is given), divided by the `scale` of
                            VIEW.json where that is there: noise and reverberation may exceed full scale
        VIEW.TARGET.npy     (rows, columns) as stored

Any WebDataset reader can read the tars. On import, nothing from a tar is executed, and no file name of a tar is used
to write a file.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

from spkd.cache import npy
from spkd.cache.card import Card
from spkd.cache.exchange.transfer import Metadata, building, checked, rejections
from spkd.cache.folder import CARD, COMPLETE, most_bytes
from spkd.cache.layout import row_bytes
from spkd.cache.plan import Plan
from spkd.cache.read import Cache
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.loader import ViewLoader
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.files.atomic import check_holds_no_other, check_no_links, writable_folder, write_bytes, write_json
from spkd.files.reading import holds, parse_json
from spkd.files.remote_folder import LARGEST_RECORD, RemoteFolder, checked_digest, send
from spkd.files.sealed import CHECK, self_digest
from spkd.progress import track

INDEX = "index.json"
EXPORT_FORMAT = 1
MEMBER = 4096  # bytes for header, padding, .npy header and description of a tar's member
AUDIO, SCALE = "audio", "scale"
LARGEST_SCALE = 1e6
Sample = dict[str, np.ndarray]


def tar_name(unit: int) -> str:
    return f"{unit:06d}.tar"


def export_tars(cache: Cache, folder: Path, loader: ViewLoader | None) -> None:
    """Write a cache as tars, one for each unit. The same call continues an interrupted export.

    Args:
        loader: loader of the audio, to write every view's audio next to its targets; None writes none.
    Raises:
        SpkdError: the cache is damaged, or the folder holds something else, or files of others.
    """
    check_holds_no_other(folder, "an export of a cache")
    small, digests, check = Metadata.of(cache), {}, checked(cache)
    earlier = _names_of_earlier(cache.card, str(folder)) or set()

    def check_replaces_none(name: str, data: bytes) -> None:
        path = folder / name
        if name not in earlier and os.path.lexists(path) and not holds(path, data):
            reason = f"no {INDEX} beside it names it"
            raise UsageError(f"{path}: would be replaced ({reason}); choose another folder, or remove it")

    check_no_links(folder, {Path(name).parent for name in small.files})
    for name, data in small.files.items():
        check_replaces_none(name, data)
    writable_folder(folder)
    for name, data in small.files.items():
        write_bytes(folder / name, data)
    with track("writing tars", cache.plan.units, "tars") as bar:
        for unit in range(cache.plan.units):
            for target in cache.targets.values():
                check(unit, target)
            path, data = folder / tar_name(unit), _tar(cache, unit, loader)
            digests[path.name] = digest.of_bytes(data)
            check_replaces_none(path.name, data)
            if not holds(path, data):
                write_bytes(path, data)
            bar.advance(1)
    index: dict[str, Any] = {
        "spkd_webdataset": EXPORT_FORMAT,
        "card": cache.card.to_json(),
        "rejected": {str(view): reason for view, reason in cache.rejected.items()},
        "audio": loader is not None,
        "small": {name: digest.of_bytes(data) for name, data in small.files.items()},
        "tars": digests,
    }
    write_json(folder / INDEX, index | {CHECK: self_digest(index)})


def _names_of_earlier(card: Card, url: str) -> set[str] | None:
    """Names of the files of an earlier export of a cache, perhaps before it grew; None where there is no export.

    Raises:
        UsageError: there is the export of another cache, or a file that is none, or damaged.
    """
    if RemoteFolder.of(url).read(INDEX, LARGEST_RECORD) is None:
        return None
    try:
        export = Export(url)
    except SpkdError as error:
        raise UsageError(f"{error}; it would be replaced: choose another folder, or remove it") from error
    if export.card.identity != card.identity and not export.card.grows_to(card):
        raise UsageError(f"{export.url}: holds the export of another cache; choose another folder")
    return {*export.index["small"], *export.index["tars"]}


def _tar(cache: Cache, unit: int, loader: ViewLoader | None) -> bytes:
    """Content of the tar of a unit; the same unit always gives the same bytes."""
    from webdataset import TarWriter

    out, plan = io.BytesIO(), cache.plan
    views = np.array(plan.unit(unit))
    usable = views[cache.are_usable(views)]
    targets = {name: cache.ragged(usable, name).pieces() for name in cache.targets}
    with TarWriter(out, mtime=0, user="spkd", group="spkd", encoder=False) as writer:
        for i, view in enumerate(usable.tolist()):
            utterance = int(plan.views.utterance[view])
            speaker = int(plan.speaker[utterance])
            described = {
                "utterance": plan.utterances[utterance],
                "speaker": plan.speakers[speaker] if speaker >= 0 else None,
                **{name: column[view].item() for name, column in plan.views.columns().items() if name != "utterance"},
            }
            audio = io.BytesIO()
            if loader is not None:
                wave = loader(view)
                if (peak := float(np.abs(wave).max(initial=0.0))) > 1:
                    described[SCALE] = peak
                soundfile.write(audio, wave / max(peak, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            sample: dict[str, Any] = {"__key__": f"{view:09d}", "json": json.dumps(described).encode()}
            if loader is not None:
                sample["flac"] = audio.getvalue()
            for name, pieces in targets.items():
                array = io.BytesIO()
                np.save(array, pieces[i], allow_pickle=False)
                sample[f"{name}.npy"] = array.getvalue()
            writer.write(sample)
    return out.getvalue()


def push_tars(folder: Path, url: str) -> int:
    """Copy an export to a place, and read the copy back. The same call continues after an interruption.

    Returns:
        Bytes of the tars.
    Raises:
        UsageError: as of `remote_folder.send`.
        SpkdError: as of `remote_folder.send`, a damaged export, or a place that holds a cache or another export.
    """
    export, place = Export(str(folder)), RemoteFolder.of(url)
    index = export.index
    for name in (CARD, COMPLETE):
        if place.size(name) is not None:
            raise UsageError(f"{place.url}: holds a teacher cache ({name}); choose another place")
    is_continued = _names_of_earlier(export.card, url) is not None
    digests = {**index["small"], **index["tars"]}
    digests[INDEX] = digest.of_file(folder / INDEX)
    files = {name: folder / name for name in digests}
    stages = (digests.keys() - {INDEX}, [INDEX])
    send(files, url, lambda name: checked_digest(folder / name, digests[name]), stages, is_continued)
    return sum((folder / name).stat().st_size for name in index["tars"])


class Export:
    """Reader of an export. Every file is checked as it is read.

    Attributes:
        url: its URL as the user wrote it, without credentials.
        index: content of its index.json.
        rejected: number of each rejected view -> the reason.
    Raises:
        UsageError: no export there.
        SpkdError: of a newer format, or damaged.
    """

    def __init__(self, url: str) -> None:
        self.place = RemoteFolder.of(url)
        url, where = self.place.url, f"{self.place.url}/{INDEX}"
        data = self.place.read(INDEX, LARGEST_RECORD)
        if data is None:
            raise UsageError(f"{where}: missing; no WebDataset export of a cache")
        index = parse_json(data, where)
        if not isinstance(index, dict) or "spkd_webdataset" not in index:
            raise SpkdError(f"{where}: not the index of an export")
        if index["spkd_webdataset"] != EXPORT_FORMAT:
            raise SpkdError(
                f"{where}: format {str(index['spkd_webdataset'])[:20]}, this spkd reads {EXPORT_FORMAT}; update spkd"
            )
        if index.get(CHECK) != self_digest(index):
            raise SpkdError(f"{where}: damaged (it does not match its own digest)")
        if not all(isinstance(index.get(name), dict) for name in ("rejected", "small", "tars")):
            raise SpkdError(f"{where}: damaged (digests or rejected views are missing)")
        self.url, self.index = url, index
        self.card = Card.from_json(index.get("card"), where)
        self.rejected = rejections(index["rejected"])

    def metadata(self) -> Metadata:
        """The metadata files, checked."""
        files, most = {}, most_bytes(self.card)
        for name, expected in self.index["small"].items():
            if not re.fullmatch(r"plan/\d+\.npz|\w+\.safetensors", name):
                raise SpkdError(f"{self.url}/{INDEX}: {name[:80]!r}: no file of a cache")
            data = self.place.read(name, most)
            if data is None or digest.of_bytes(data) != expected:
                raise SpkdError(f"{self.url}/{name}: {'missing' if data is None else 'damaged'}")
            files[name] = data
        return Metadata(self.card, files)

    def unit(self, unit: int, plan: Plan, names: Sequence[str]) -> Iterator[tuple[int, Sample]]:
        """The views of one tar, after a check of its digest.

        Yields:
            Number of each view, and its stored arrays.
        Raises:
            SpkdError: the tar is missing or damaged, or a member is not what an export holds.
        """
        name = tar_name(unit)
        where = f"{self.url}/{name}"
        data = self.place.read(name, _largest_tar(self.card, plan, unit))
        if data is None:
            raise SpkdError(f"{where}: missing")
        if digest.of_bytes(data) != self.index["tars"].get(name):
            raise SpkdError(f"{where}: damaged, or of another export (digest differs from {INDEX})")
        return read_tar(io.BytesIO(data), where, {t.name for t in self.card.targets}, names)


def _largest_tar(card: Card, plan: Plan, unit: int) -> int:
    """Most bytes that the tar of a unit may have."""
    views = plan.unit(unit)
    samples = plan.views.samples[views.start : views.stop].astype(np.int64)
    size = len(views) * (len(card.targets) + 3) * MEMBER + 4 * int(samples.sum()) + (1 << 20)
    return size + sum(int(t.num_frames(samples).sum()) * row_bytes(t) for t in card.targets)


def read_tar(file: IO[bytes], where: str, known: set[str], names: Sequence[str]) -> Iterator[tuple[int, Sample]]:
    """Read the samples of a tar.

    Args:
        known: names of all targets that the tar may hold.
        names: names of the targets to read; AUDIO reads the FLAC file as its bytes (uint8), and SCALE beside it.
    Yields:
        Number of each view, and its arrays by target.
    Raises:
        SpkdError: a member with another name than an export gives (absolute, with `..`, a pickle), a member that is
            not a regular file, a view twice, an array that cannot be read without pickle, or a truncated tar.
    """
    allowed = re.compile(rf"(\d{{9}})\.(?:json|flac|({'|'.join(re.escape(name) for name in sorted(known))})\.npy)")
    current, sample, done = -1, Sample(), set[int]()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                # Refuse a member whose name or kind no export has.
                match = allowed.fullmatch(member.name)
                regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                if match is None or not regular:
                    kind = "" if regular else " (not a regular file)"
                    raise SpkdError(
                        f"{where}: member {member.name[:80]!r}{kind} has no place in an export; nothing is read"
                    )
                # The first member of a view ends the sample of the view before.
                if int(match[1]) != current:
                    if current >= 0:
                        yield current, sample
                    done.add(current)
                    current, sample = int(match[1]), Sample()
                # Read the member, if it is asked for.
                name = match[2] or (AUDIO if member.name.endswith(".flac") else "")
                if current in done or name in sample:
                    raise SpkdError(f"{where}: damaged (view {current} is there twice)")
                body = tar.extractfile(member)
                assert body is not None
                if member.name.endswith(".json") and AUDIO in names:
                    sample[SCALE] = np.array(_scale(parse_json(body.read(), where), where))
                if name in names:
                    data = body.read()
                    sample[name] = np.frombuffer(data, np.uint8) if name == AUDIO else npy.parse(data)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise SpkdError(f"{where}: damaged ({' '.join(str(error).split())[:200]})") from error
    if current >= 0:
        yield current, sample


def _scale(described: Any, where: str) -> float:
    """Number by which the audio of a view is multiplied. Raises SpkdError where it is none."""
    scale = described.get(SCALE, 1.0) if isinstance(described, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale <= LARGEST_SCALE:
        raise SpkdError(f"{where}: damaged (the scale of a view is {str(scale)[:40]})")
    return float(scale)


def import_tars(url: str, root: Path) -> None:
    """Make a cache from an export, atomically.

    Raises:
        SpkdError: a missing or damaged file, or a file with content that no export has.
    """
    export = Export(url)
    names = [target.name for target in export.card.targets]
    with building(root, export.metadata()) as builder, track("reading tars", builder.plan.units, "tars") as bar:
        for unit in builder.units():
            where = f"{export.url}/{tar_name(unit)}"
            samples = list(export.unit(unit, builder.plan, names))
            missing = [name for _, sample in samples for name in names if name not in sample]
            if missing:
                raise SpkdError(f"{where}: lacks {missing[0]} of a view")
            try:
                builder.write(unit, export.rejected, iter(samples))
            except SpkdError as error:
                raise SpkdError(f"{where}: {error}") from error
            bar.advance(1)
