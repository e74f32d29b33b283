"""Work of the commands `spkd enrol`, `spkd verify` and `spkd identify`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from spkd.config import without_unused
from spkd.corpus.address import parse
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.eval.calibration import FILE, Calibration
from spkd.files.atomic import check_writable
from spkd.files.schema import NUMBER
from spkd.files.text import counted
from spkd.mapping.embedding_map import load_map
from spkd.model import DOUBT, SpeakerModel, Verification, open_model, way_to_calibrate_map
from spkd.teachers import check_model
from spkd.teachers.settings import BUNDLED
from spkd.voiceprint import Voiceprint
from spkd.voices.settings import EnrolVoiceConfig, IdentifyVoiceConfig, VerifyVoiceConfig
from spkd.voices.store import Voices, changing, check_name, check_no_link

Verifying = TypeVar("Verifying", bound=VerifyVoiceConfig)
STRICTER = "false_alarm_0.01"  # threshold for many voices
DECISIONS = {True: "the same speaker", False: "different speakers", None: "no decision"}


def enrol(name: str, recordings: Sequence[str], config: EnrolVoiceConfig) -> Iterator[str]:
    """Enrol a person in the file of voices. Lines that say what is kept.

    Args:
        recordings: paths of the recordings.
    Raises:
        UsageError: no recordings, a name that cannot be one, or one that is enrolled with other recordings; voices of
            another model.
        SpkdError: a recording cannot be used, or holds too little sound.
    """
    check_name(name)
    if Path(name).is_file():
        raise UsageError(f"enrol {name}: a file has this name; name the person first: `spkd enrol NAME AUDIO...`")
    if not recordings:
        raise UsageError(f"enrol {name}: name one recording or several")
    path = Path(config.voices)
    check_no_link(path)
    model = _opened(config)
    made = model.enrol(list(recordings))
    with changing(path) as voices:
        voices.check_model(model.digest, model.label)
        if name in voices:
            # The same command again, as after a power cut, finds its own work.
            if not _is_same(voices[name], made):
                raise UsageError(f"{path}: {name} is enrolled; `spkd voices --remove {name}` first")
            made = voices[name]
        else:
            replace(voices, prints={**voices.prints, name: made}).save()
    first, *remarks = lines_of_voice(name, made)
    yield from (f"{path}: {first}", *remarks)
    if any(DOUBT in remark for remark in made.remarks):
        yield f"  if so, `spkd voices {shlex.quote(str(path))} --remove {shlex.quote(name)}`, and enrol {name} again"
    yield _model_line(model)


def remove(name: str, path: Path) -> None:
    """Remove a person from a file of voices. Raises UsageError: no such file or voice."""
    Voices.load(path)
    with changing(path) as voices:
        voices[name]
        replace(voices, prints={each: voices.prints[each] for each in voices.prints if each != name}).save()


def map_voices(path: Path, folder: str, out: Path) -> Iterator[str]:
    """Write the voices of a file, mapped to another model, into a new file. Lines that say what is there.

    Args:
        folder: folder of the map.
    Raises:
        UsageError: no such file or map, voices of another model than the map takes, or another file there.
        SpkdError: the file or the map is damaged.
    """
    voices, the_map = Voices.load(path), load_map(folder)
    if not len(voices):
        raise UsageError(f"{path}: holds no voices")
    try:
        mapped = {name: the_map.map_voiceprint(each) for name, each in voices.items()}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    check_writable(out)
    with changing(out) as there:
        # The same command again, as after a power cut, finds its own work.
        if len(there) and dict(there) != mapped:
            raise UsageError(f"{out}: holds other voices; choose another file (--out FILE)")
        replace(there, prints=mapped).save()
    yield f"{out}: {counted(len(mapped), 'voice')}, mapped from {the_map.old.name} to {the_map.new.name}"
    try:
        Calibration.of_map(Path(folder) / FILE, the_map)
    except SpkdError:
        yield f"  no decision on them without a calibration of the map: {way_to_calibrate_map(folder)}"


def verify(first: str, second: str, config: VerifyVoiceConfig) -> Iterator[str]:
    """Verify two sides, each the path of a recording or the name of a voice. Lines that say the result.

    Raises:
        UsageError: a side is neither, or as of `SpeakerModel.verify`.
        SpkdError: as of `SpeakerModel.verify`.
    """
    voices = _voices_for(first, second, Path(config.voices))
    one, two = _side(first, voices), _side(second, voices)
    config = _in_use(config, [side for side in (one, two) if isinstance(side, Voiceprint)])
    model = _opened(config)
    if reason := model.why_undecided(one, two):
        score = model.score(one, two)
        yield f"{first}, {second}: no decision, as {reason[0]}"
        yield f"  cosine {score:.6f}; {reason[1]}"
        return
    yield from lines_of(first, second, model.verify(one, two, _threshold(config.threshold)), config.threshold)
    yield f"  {_model_line(model)}"


def identify(recordings: Sequence[str], config: IdentifyVoiceConfig) -> Iterator[str]:
    """Lines that name the voice of each recording.

    Args:
        recordings: paths of the recordings.
    Raises:
        UsageError: no recordings, no voices, or as of `SpeakerModel.identify`.
        SpkdError: no recording, or not every one, can be used; the others were identified before.
    """
    if not recordings:
        raise UsageError("identify: name one recording or several")
    voices = Voices.load(config.voices)
    config = _in_use(config, voices.values())
    model, failed = _opened(config), 0
    for recording in recordings:
        try:
            yield from _identified(recording, voices, model, config)
        except UsageError:
            raise
        except SpkdError as error:
            failed += 1
            yield f"{recording}: left out ({str(error).removeprefix(f'{recording}: ')})"
    if len(voices) > 1 and config.threshold == VerifyVoiceConfig.threshold:
        yield (
            f"note: among {len(voices):,} voices a stranger is taken for one of them up to {len(voices):,} times as "
            f"often as by one voice; threshold={STRICTER} is stricter"
        )
    yield _model_line(model)
    if failed:
        raise SpkdError(f"{failed} of {counted(len(recordings), 'recording')} could not be used")


def _identified(recording: str, voices: Voices, model: SpeakerModel, config: IdentifyVoiceConfig) -> Iterator[str]:
    """Lines that name the voice of a recording. Raises as `identify`."""
    if reason := next(filter(None, (model.why_undecided(each) for each in voices.values())), None):
        scores = {name: model.score(each, recording) for name, each in voices.items()}
        ranked = sorted(scores, key=lambda name: -scores[name])[:3]
        shown = ", ".join(f"{name} {scores[name]:.3f}" for name in ranked)
        yield f"{recording}: no decision, as {reason[0]} (cosines: {shown})"
        return
    found = model.identify(recording, voices, _threshold(config.threshold))
    names = list(found.results)
    best = found.results[names[0]]
    shown = ", ".join(f"{name} {found.results[name].ratio:.2f}" for name in names[:3])
    if best.same is None:
        yield f"{recording}: no decision"
    else:
        whom = found.name or "nobody enrolled"
        yield f"{recording}: {whom} (log-likelihood ratios: {shown}; threshold {best.threshold:.2f})"
    yield from (f"  {remark}" for remark in best.remarks)


def lines_of(first: str, second: str, result: Verification, threshold: str) -> Iterator[str]:
    """The result of a verification in words."""
    yield f"{first}, {second}: {DECISIONS[result.same]}"
    if result.same is None:  # what was measured of such recordings says nothing
        yield from (f"  {remark}" for remark in result.remarks)
        return
    times = _rounded(math.exp(min(abs(result.ratio), 700.0)))
    whom = "one person as from two" if result.ratio >= 0 else "two people as from one"
    likely = f"a cosine of {result.score:.3f} is {times} times as likely from {whom}"
    yield f"  log-likelihood ratio {result.ratio:.2f}: {likely}"
    yield f"  threshold {result.threshold:.2f} ({threshold}){_meaning(threshold)}"
    yield from (f"  {remark}" for remark in result.remarks)


def lines_of_voice(name: str, made: Voiceprint) -> Iterator[str]:
    """A voice in a line, and its remarks in a line each."""
    of = f", mapped by {made.mapped_by[:12]}" if made.mapped_by else ""
    yield f"{name}: {counted(made.recordings, 'recording')}, {made.seconds:.1f} s, enrolled {made.enrolled}{of}"
    yield from (f"  {remark}" for remark in made.remarks)


def _rounded(number: float) -> str:
    """A number of 1 or more with three digits that count: 1.93, 1,930, 1.9e+12."""
    if number >= 1e9:
        return f"{number:.1e}"
    return f"{number:.3g}" if number < 100 else f"{float(f'{number:.3g}'):,.0f}"


def _meaning(threshold: str) -> str:
    """Meaning of a threshold of a calibration, by its name, as the end of a line; "" of a number."""
    name, _, value = threshold.rpartition("_")
    if threshold == "eer":
        return ": refuses as large a share of the pairs of one person as it accepts of the pairs of two"
    if name == "false_alarm":
        return f": accepts {100 * float(value):g} % of the pairs of two people"
    if name == "min_dcf":
        return f": has the least detection cost where {100 * float(value):g} % of the pairs are of one person"
    return ""


def _is_same(one: Voiceprint, other: Voiceprint) -> bool:
    """Whether two voiceprints are of the same recordings: other days and the last bits of a device may differ."""
    return one.recordings == other.recordings and bool(np.abs(one.embedding - other.embedding).max() < 1e-5)


def _in_use(config: Verifying, prints: Iterable[Voiceprint]) -> Verifying:
    """Settings without the file of voices where none of them is used, and without the map where none was mapped.
    Raises UsageError where these were typed."""
    used = list(prints)
    unused = {} if any(each.mapped_by for each in used) else {"map_by": "no voice here was mapped"}
    return without_unused(config, unused if used else unused | {"voices": "both sides are recordings"})


def _opened(config: EnrolVoiceConfig) -> SpeakerModel:
    chosen = config.model.chosen()
    check_model(chosen)
    map_by = config.map_by if isinstance(config, VerifyVoiceConfig) else None
    return open_model(chosen, resolve(config.device), vad=config.vad, map_by=map_by)


def _model_line(model: SpeakerModel) -> str:
    """The model that was used, in a line."""
    if model.card:
        return f"model: {BUNDLED}, a small demonstration that comes with spkd (model=FOLDER: a student of yours)"
    return f"model: {model.label}"


def _voices_for(first: str, second: str, path: Path) -> Voices:
    """Voices of a file that two sides may name. Raises SpkdError: it is damaged, and a side is no file."""
    try:
        return Voices.at(path)
    except SpkdError:
        if Path(first).exists() and Path(second).exists():
            return Voices(path, {})
        raise


def _side(text: str, voices: Voices) -> str | Voiceprint:
    """A recording or a voice. Raises UsageError: neither, or both."""
    if text in voices:
        if Path(text).exists():
            raise UsageError(f"{text}: a voice in {voices.path} and a file here; write ./{text} for the file")
        return voices[text]
    if not Path(text).exists() and parse(text) is None:  # else an address within a container, or a URL
        hint = did_you_mean(text, voices) if len(voices) else ""
        raise UsageError(f"{text}: no such file, and no voice in {voices.path}{hint}")
    return text


def _threshold(text: str) -> str | float:
    """The name of a threshold, or a number."""
    if not NUMBER.fullmatch(text):
        return text
    try:
        return float(text)
    except ValueError:
        return text
