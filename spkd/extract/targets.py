"""Choice of the targets of an extraction, and their computation for a batch of views."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from torch import Tensor

from spkd.cache.codec import make_codec
from spkd.config import without_unused
from spkd.corpus.loader import WaveBatch
from spkd.errors import UsageError, bracketed, did_you_mean
from spkd.extract.settings import ContentConfig
from spkd.outputs.features import FBANKS, FEATURES, WAVE, input_features
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.teachers.base import Teacher

Outputs = dict[str, np.ndarray]


def targets_of_pass(configs: Sequence[ContentConfig], teachers: Sequence[Teacher]) -> list[list[Target]]:
    """The targets of every teacher of one pass; a typed codec has to act for one of those that it was typed for.

    Arguments and errors as of `chosen_targets`, for each teacher.
    """
    found = [unused_codecs(config, teacher) for config, teacher in zip(configs, teachers, strict=True)]

    def acts(name: str, config: ContentConfig) -> bool:
        where = config.given[name].where if name in config.given else None
        having = [i for i, other in enumerate(configs) if name in other.given and other.given[name].where == where]
        return any(name not in found[i] for i in having)

    nowhere = [
        {name: reason for name, reason in unused.items() if not acts(name, config)}
        for config, unused in zip(configs, found, strict=True)
    ]
    return [chosen_targets(*each) for each in zip(configs, teachers, nowhere, strict=True)]


def chosen_targets(config: ContentConfig, teacher: Teacher, unused: Mapping[str, str] | None = None) -> list[Target]:
    """The targets to store, with their codecs, as the settings ask; features on request, or where there is no teacher.

    Logits of a teacher with a head are stored only if a codec is named for them. Otherwise the embedding and the head
    are stored, from which they follow exactly.

    Args:
        unused: settings of codecs that are refused where they were typed; None: those of `unused_codecs`.
    Raises:
        UsageError: an unknown target or codec, a codec that is for other targets, or a typed codec that has no effect.
    """
    targets = _without_codecs(config, teacher)
    storage = without_unused(config, unused_codecs(config, teacher) if unused is None else unused).storage
    targets = [target.stored_as(storage.codecs.get(target.name, storage.codec)) for target in targets]
    for target in targets:
        codec = make_codec(target.codec, target.dim)
        if codec.only not in (None, target.name):
            raise UsageError(f"storage: {target.codec} is for {codec.only}, not for {target.name}")
    return targets


def _without_codecs(config: ContentConfig, teacher: Teacher) -> list[Target]:
    """The targets to store, without their codecs; as `chosen_targets`."""
    # The teacher's targets.
    names, chosen = config.teacher.targets if teacher.targets else [], config.storage.codecs
    for name in names:
        if name not in teacher.targets:
            hint = bracketed("teacher.targets", name) or did_you_mean(name, teacher.targets)
            raise UsageError(
                f"teacher={teacher.family} has no target {name!r}{hint} (it has {', '.join(teacher.targets)})"
            )
    follows = LOGITS in names and teacher.head is not None and LOGITS not in chosen
    stored = [name for name in dict.fromkeys(names) if name != LOGITS or not follows]
    if follows and EMBEDDING not in stored:
        stored.append(EMBEDDING)
    # Features in addition.
    targets = [teacher.targets[name] for name in stored]
    targets += [FBANKS[config.features]] if config.fbank or not (teacher.targets or config.wave) else []
    targets += [WAVE] if config.wave else []
    if not targets:
        raise UsageError("teacher.targets: name at least one target")
    return targets


def unused_codecs(config: ContentConfig, teacher: Teacher) -> dict[str, str]:
    """Settings of codecs that have no effect for a teacher, with the reasons. Arguments as of `chosen_targets`."""
    chosen = config.storage.codecs
    stored = [target.name for target in _without_codecs(config, teacher)]
    unused = {
        f"storage.codecs{{{name}}}": f"no target {name!r} is stored{_stored_by(name, teacher, stored)}"
        for name in chosen
        if name not in stored
    }
    if all(name in chosen for name in stored):
        unused["storage.codec"] = "every target has a codec of its own (storage.codecs)"
    return unused


def _stored_by(name: str, teacher: Teacher, stored: list[str]) -> str:
    """Hint for a target that is not stored: the setting that stores it, or the target with the nearest name."""
    kind = next((kind for kind, target in FBANKS.items() if target.name == name), None)
    if name == WAVE.name:
        return "; wave=true stores it"
    if kind is not None:
        return f"; fbank=true{'' if kind == 'kaldi' else f' features={kind}'} stores it"
    if name in teacher.targets:
        return f"; teacher.targets=[{','.join([*(n for n in stored if n not in FEATURES), name])}] stores it"
    return did_you_mean(name, {*stored, *teacher.targets})


def extract_targets(
    teacher: Teacher, batch: WaveBatch, targets: Collection[Target], halves: Collection[str] = ()
) -> Outputs:
    """Targets of a batch of views: outputs of the teacher, and features.

    Args:
        halves: names of the targets to return as float16.
    Returns:
        Name of each target -> (B, D) at utterance level or (B, T, D) at frame level, float32 or float16. Frames of the
        padding are undefined.
    """
    return begin_targets(teacher, batch, targets, halves)()


def begin_targets(
    teacher: Teacher, batch: WaveBatch, targets: Collection[Target], halves: Collection[str] = ()
) -> Callable[[], Outputs]:
    """Begin to compute what `extract_targets` gives, with its arguments. Returns the function that waits for it."""
    names = [t.name for t in targets if t.name not in FEATURES]
    kinds = [target for target in targets if target.name in FEATURES]
    finish = teacher.begin(batch.waves, names, halves, batch.lengths)

    def finish_all() -> Outputs:
        features = batch.features or {
            name: values.numpy() for name, values in features_of(batch.waves, kinds, batch.lengths).items()
        }
        return finish() | {kind.name: features[kind.name] for kind in kinds}

    return finish_all


def features_of(waves: Tensor, kinds: Collection[Target], lengths: Tensor | None = None) -> dict[str, Tensor]:
    """The chosen input features of waveforms, by name; arguments as of `input_features`."""
    return {kind.name: input_features(kind, waves, lengths) for kind in kinds}
