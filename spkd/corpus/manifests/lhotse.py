"""Lhotse's cuts as JSON lines, with an utterance for each supervision, as of `CutSet.trim_to_supervisions`.

Supervisions are read with the recordings that are beside them under a like name (`x_supervisions_train.jsonl.gz`,
`x_recordings_train.jsonl.gz`), and cuts of Lhotse Shar with the tar of their shard.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from spkd.corpus.address import is_elsewhere
from spkd.corpus.manifests.fields import PATH, names_of
from spkd.corpus.manifests.json_lines import JSONLines
from spkd.corpus.manifests.reader import Source
from spkd.corpus.manifests.relative import place_of
from spkd.corpus.manifests.tars import addresses
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError

NO_DATA = (".json", ".nodata", ".nometa")  # members of Lhotse Shar beside the audio
NO_AUDIO = ("MixedCut", "PaddingCut")
CUT_KEYS = ("id", "start", "duration", "channel", "supervisions", "recording", "type")
NAMES = names_of(("id", "path", "speaker", "start", "duration", "channel"), "cut")
SUPERVISION_KEYS = ("id", "recording_id", "start", "duration", "channel", "speaker")


class LhotseCuts(JSONLines):
    """Reader of MonoCut, MultiCut and DataCut with a recording in files or in a tar.

    Attributes:
        without: number of cuts of Lhotse Shar that have no recording.
    """

    describes = "lhotse's cuts (.jsonl)"

    def __init__(self, source: Source, columns: Sequence[str]) -> None:
        super().__init__(source, columns)
        self.without = 0
        self._places: dict[str, str] = {}

    @classmethod
    def recognises(cls, source: Source) -> bool:
        first = source.first_object
        cut = "recording" in first or "tracks" in first or str(first.get("type")).endswith("Cut")
        # Supervisions or recordings alone are refused later, with the command of lhotse that makes cuts of them.
        supervision = "recording_id" in first and not any(name in first for name in PATH)
        return cut or supervision or ("sources" in first and "sampling_rate" in first)

    def utterances(self) -> Iterator[Utterance]:
        pairs, seen = [], set[tuple[str, str]]()
        for where, row in self._cuts():
            for cut, made in self._of_cut(row, where):
                if (cut, made.id) in seen:  # at once, since a short gzipped file could repeat a cut without end
                    raise SpkdError(f"{where}: the cut {cut!r} is there twice")
                seen.add((cut, made.id))
                pairs.append((cut, made))
        # A supervision that several windows of a recording share has several utterances, named by cut and supervision.
        times = Counter(made.id for _, made in pairs)
        cut_into = sum(1 for cut, made in pairs if made.id != cut)
        if cut_into:
            self.notes.append(f"utterances that are one of several supervisions of a cut: {cut_into:,}")
        for cut, made in pairs:
            is_unique = times[made.id] == 1 or made.id == cut
            yield made if is_unique else replace(made, id=f"{cut}-{made.id}")

    def _cuts(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """File and line of each cut, and the cut; a supervision with its recording is one."""
        path = _recordings_of(self.source.path)
        if "recording_id" not in self.source.first_object or path is None:
            yield from self.rows()
            return
        recordings: dict[str, Mapping[str, Any]] = {}
        for where, row in JSONLines(Source(path), ()).rows():
            if recordings.setdefault(str(row.get("id")), row) is not row:
                raise SpkdError(f"{where}: the recording {str(row.get('id'))[:80]!r} is there twice")
        self.notes.append(f"supervisions of the recordings in {path.name}")
        for where, row in self.rows():
            if (recording := recordings.get(str(row.get("recording_id")))) is None:
                raise SpkdError(f"{where}: recording {str(row.get('recording_id'))[:80]!r} is not in {path}")
            cut = {name: row.get(name) for name in ("id", "start", "duration", "channel")}
            cut["channel"] = 0 if cut["channel"] is None else cut["channel"]
            yield where, cut | {"recording": recording, "supervisions": [row | {"start": 0.0}]}

    def _place(self, path: str, where: str) -> str:
        """A file where it is: Lhotse writes paths as they were given, mostly relative to the folder of the recipe."""
        # Absolute, as readers put relative ones behind the folder of the manifest.
        if path not in self._places:
            self._places[path] = os.path.abspath(place_of(path, self.source.folder, where, above=True))
        return self._places[path]

    @cached_property
    def _members(self) -> dict[str, str]:
        """Id of each cut of this shard -> address of its audio.

        Raises:
            SpkdError: there is no tar beside the cuts, or nothing of it can be read.
        """
        if (tar := shar_tar(self.source.path)) is None:
            raise SpkdError(f"{self.source.path}: no recording.*.tar of this shard beside it")
        return {name.rpartition(".")[0]: at for name, at in addresses(tar).items() if not name.endswith(NO_DATA)}

    def _of_cut(self, cut: Mapping[str, Any], where: str) -> list[tuple[str, Utterance]]:
        """Pairs of the id of a cut and one of its utterances."""
        if "recording" not in cut and shar_tar(self.source.path) is not None:
            self.without += 1
            return []
        if cut.get("type") in NO_AUDIO or "tracks" in cut:
            raise SpkdError(f"{where}: a mixed or padded cut; write its audio first (lhotse: cuts.save_audios(FOLDER))")
        if "recording" not in cut:
            raise SpkdError(
                f"{where}: no cut with a recording; make cuts of recordings and supervisions first "
                "(lhotse cut simple -r RECORDINGS -s SUPERVISIONS CUTS)"
            )
        try:
            supervisions = cut.get("supervisions") or [{}]
            made = [self._of_supervision(cut, item, len(supervisions), where) for item in supervisions]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise SpkdError(f"{where}: not a Lhotse cut ({str(error)[:80]!r} is missing or of another type)") from error
        self.unused.update(key for key, value in cut.items() if key not in CUT_KEYS and value not in (None, {}, []))
        return [(str(cut["id"]), each) for each in made]

    def _of_supervision(
        self, cut: Mapping[str, Any], supervision: Mapping[str, Any], count: int, where: str
    ) -> Utterance:
        # The part of the supervision that lies within the cut, counted from the start of the cut.
        start, duration = _finite(cut["start"]), _finite(cut["duration"])
        first = max(0.0, _finite(supervision.get("start", 0.0)))
        last = min(duration, _finite(supervision.get("start", 0.0)) + _finite(supervision.get("duration", duration)))
        if last <= first:
            raise SpkdError(f"{where}: supervision {str(supervision.get('id'))[:80]!r} lies outside of its cut")
        channel = _channels(supervision.get("channel"), cut.get("channel", 0), where)
        path, place = self._file(cut, channel, where)
        further = {**(cut.get("custom") or {}), **(supervision.get("custom") or {}), **supervision}
        self.unused.update(
            key
            for key, value in supervision.items()
            if key not in (*SUPERVISION_KEYS, *self.columns) and value not in (None, {}, [])
        )
        row = {name: further.get(name) for name in self.columns} | {
            "id": cut["id"] if count == 1 else supervision["id"],
            "path": path,
            "speaker": supervision.get("speaker"),
            "start": start + first,
            "duration": last - first,
            "channel": place,
        }
        return self.utterance(row, NAMES, where)

    def _file(self, cut: Mapping[str, Any], channel: Any, where: str) -> tuple[str, int | None]:
        """Audio of a channel, and the position of the channel in it; None for all channels of the file.

        Args:
            channel: a channel, or a list of channels.
        """
        recording = cut["recording"]
        if recording.get("transforms"):
            raise SpkdError(
                f"{where}: a recording with transforms ({str(recording['transforms'])[:60]}); write its audio first "
                "(lhotse: cuts.save_audios(FOLDER))"
            )
        channel = channel[0] if isinstance(channel, list) and len(channel) == 1 else channel
        sources = recording["sources"]
        source = next((s for s in sources if channel in s.get("channels", [0])), sources[0])
        path = source["source"]
        if source["type"] == "shar":
            if (path := self._members.get(str(cut["id"]))) is None:
                raise SpkdError(f"{where}: the cut {str(cut['id'])[:80]!r} is not in the tar of its shard")
        elif source["type"] != "file":
            raise SpkdError(f"{where}: cut with a {source['type']!r} source; only files and Lhotse Shar can be read")
        elif not is_elsewhere(path):
            path = self._place(path, where)
        channels = source.get("channels", [0])
        if isinstance(channel, list) and sorted(channel) != sorted(channels):
            raise SpkdError(f"{where}: a cut of several channels ({channel}); choose one, or all of its recording")
        if isinstance(channel, list) or len(channels) == 1:
            return path, None
        return path, channels.index(channel)


def shar_tar(cuts: Path) -> Path | None:
    """Tar with the recordings of a shard; None where there is none.

    Args:
        cuts: its cuts, such as cuts.000001.jsonl.gz.
    """
    name = cuts.name.removesuffix(".gz").removesuffix(".jsonl")
    tar = cuts.with_name(f"recording{name.removeprefix('cuts')}.tar")
    return tar if name.startswith("cuts") and tar.is_file() else None


def _recordings_of(supervisions: Path) -> Path | None:
    """File with the recordings of supervisions, as lhotse names both; None where there is none."""
    path = supervisions.with_name(supervisions.name.replace("supervisions", "recordings"))
    return path if path != supervisions and path.is_file() else None


def _channels(supervised: Any, of_cut: Any, where: str) -> Any:
    """The channels of a supervision.

    Args:
        supervised: the supervision's field `channel`.
        of_cut: the cut's field `channel`.
    """
    if supervised is None or of_cut is None:
        return of_cut
    wanted = supervised if isinstance(supervised, list) else [supervised]
    if not set(wanted) <= set(of_cut if isinstance(of_cut, list) else [of_cut]):
        raise SpkdError(f"{where}: a supervision of channel {supervised} in a cut of channel {of_cut}; correct one")
    return wanted[0] if len(wanted) == 1 else wanted


def _finite(value: Any) -> float:
    """A field of a cut as a finite number. Raises ValueError where it is not one."""
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is not finite")
    return float(value)
