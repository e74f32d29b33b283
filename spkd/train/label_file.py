"""Labels of utterances from a file, which take the place of those of the manifests."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from spkd.cache import CacheSource
from spkd.cache.plan import UNLABELLED
from spkd.corpus.manifests.fields import stands_for_unknown
from spkd.errors import SpkdError, UsageError, first_few
from spkd.files.atomic import writing
from spkd.files.packed import PackedTexts
from spkd.files.text import MOST, counted, read_lines
from spkd.progress import log

UTTERANCE, SPEAKER = "utt", "speaker"


def write_labels(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write a file of labels, gzipped where its name ends in .gz.

    Args:
        rows: id of each utterance, and the name of its speaker.
    """
    with writing(path) as file, contextlib.ExitStack() as stack:
        zipped = path.suffix.lower() == ".gz"
        binary = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0)) if zipped else file
        text = io.TextIOWrapper(cast(BinaryIO, binary), "utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([UTTERANCE, SPEAKER])
        writer.writerows(rows)
        text.detach()


def read_labels(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, utterance and speaker of each row of a file of labels; the speaker is "" where it is not known.

    Raises:
        UsageError: the file is missing.
        SpkdError: it is no table with the columns utt and speaker, or a row has another number of cells, or no id.
    """
    if path.is_dir():
        raise UsageError(f"labels={path}: a folder; name a file with the columns {UTTERANCE},{SPEAKER}")
    if not path.is_file():
        raise UsageError(f"labels={path}: no such file; `spkd cache cluster CACHE --out {path}` makes one")
    reader = csv.reader((f"{line}\n" for line in read_lines(path, most=MOST)), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if header.count(UTTERANCE) != 1 or header.count(SPEAKER) != 1:
            raise SpkdError(f"{path}:1: expected the columns {UTTERANCE},{SPEAKER}")
        if others := [repr(name) for name in header if name not in (UTTERANCE, SPEAKER)]:
            log(f"note: {path}: columns not used: {first_few(others)}")
        utterance, speaker = header.index(UTTERANCE), header.index(SPEAKER)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header) or not cells[utterance].strip():
                what = counted(len(header), "column") if len(cells) != len(header) else "an id"
                raise SpkdError(f"{path}:{reader.line_num}: expected {what}")
            yield reader.line_num, cells[utterance].strip(), unicodedata.normalize("NFC", cells[speaker].strip())
    except csv.Error as error:
        raise SpkdError(f"{path}:{reader.line_num}: not a table ({error})") from error


def put_labels(path: str, caches: Sequence[CacheSource]) -> None:
    """Give the utterances of caches the speakers of a file; those that it lacks have none.

    Speakers of one name are one, in whatever cache. A note says how many utterances have a label.

    Raises:
        UsageError: the file is missing, or names no utterance of the caches.
        SpkdError: it is malformed, or names an utterance twice.
    """
    places = [PackedTexts.of(cache.plan.utterances).places for cache in caches]
    numbers = [np.full(len(cache.plan.utterances), UNLABELLED, np.int32) for cache in caches]
    seen = [np.zeros(len(cache.plan.utterances), bool) for cache in caches]
    found: dict[str, int] = {}
    others, example = 0, ""
    for line, utterance, speaker in read_labels(Path(path)):
        held = [(k, place[utterance]) for k, place in enumerate(places) if utterance in place]
        if not held:
            others, example = others + 1, example or utterance
        for k, at in held:
            if seen[k][at]:
                raise SpkdError(f"{path}:{line}: {utterance!r} has a label already; give each utterance one")
            seen[k][at] = True
            if speaker and not stands_for_unknown(speaker):
                numbers[k][at] = found.setdefault(speaker, len(found))
    name = " + ".join(cache.name for cache in caches)
    if not found:
        lacking = f"names no utterance of {name} (it has {example!r})" if others else "holds no labels"
        raise UsageError(f"labels={path}: {lacking}; cluster the embeddings of the same utterances")
    for cache, number in zip(caches, numbers, strict=True):
        used = set(np.unique(number).tolist())
        names = sorted(who for who, n in found.items() if n in used)
        to_sorted = np.full(len(found) + 1, UNLABELLED, np.int32)  # the last for UNLABELLED
        to_sorted[[found[who] for who in names]] = np.arange(len(names))
        cache.plan = cache.plan.relabelled(names, to_sorted[number])
    without = sum(int((number == UNLABELLED).sum()) for number in numbers)
    size = sum(map(len, numbers))
    text = f"labels={path}: {counted(size - without, 'utterance')} of {counted(len(found), 'speaker')}"
    text += f"; {without:,} of {size:,} in {name} have no label there" if without else ""
    log(text + (f"; {others:,} of its utterances are not in {name}" if others else ""))
