"""Which targets an extraction stores, and how they are computed of a batch of views."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from spkd.cache.codec import make_codec
from spkd.corpus.loader import WaveBatch
from spkd.errors import UsageError, did_you_mean
from spkd.extract.settings import ExtractConfig
from spkd.outputs.features import FBANKS, FEATURES, WAVE, input_features
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.teachers.base import Teacher

Outputs = dict[str, np.ndarray]


def chosen_targets(config: ExtractConfig, teacher: Teacher) -> list[Target]:
    """The targets to store: those asked for, under the asked codecs, and features on request (or without teacher).

    Logits of a teacher with a head are not stored unless a codec is named for them: the embedding and the head are,
    from which they follow exactly.

    Raises:
        UsageError: an unknown target or codec, or a codec that is not for this target.
    """
    names, chosen = config.teacher.targets if teacher.targets else [], config.storage.codecs
    for name in names:
        if name not in teacher.targets:
            raise UsageError(
                f"teacher={teacher.family} has no target {name!r}{did_you_mean(name, teacher.targets)} "
                f"(it has {', '.join(teacher.targets)})"
            )
    follows = LOGITS in names and teacher.head is not None and LOGITS not in chosen
    stored = [name for name in dict.fromkeys(names) if name != LOGITS or not follows]
    if follows and EMBEDDING not in stored:
        stored.append(EMBEDDING)
    targets = [teacher.targets[name] for name in stored]
    targets += [FBANKS[config.features]] if config.fbank or not (teacher.targets or config.wave) else []
    targets += [WAVE] if config.wave else []
    if not targets:
        raise UsageError("teacher.targets: name at least one target")
    for name in chosen:
        if name not in [t.name for t in targets]:
            raise UsageError(f"storage.codecs: no target {name!r} is stored{did_you_mean(name, [*names, *FEATURES])}")
    targets = [target.stored_as(chosen.get(target.name, config.storage.codec)) for target in targets]
    for target in targets:
        codec = make_codec(target.codec, target.dim)
        if codec.only not in (None, target.name):
            raise UsageError(f"storage: {target.codec} is for {codec.only}, not for {target.name}")
    return targets


def extract_targets(
    teacher: Teacher, batch: WaveBatch, targets: Collection[Target], halves: Collection[str] = ()
) -> Outputs:
    """All `targets` of a batch of views, (B, D) or (B, T, D): the teacher's outputs, and features where they are among
    them. float32, or float16 those in `halves`. Frames that come from padding are undefined."""
    names = [t.name for t in targets if t.name not in FEATURES]
    outputs = teacher.extract(batch.waves, names, halves, batch.lengths)
    kinds = [target for target in targets if target.name in FEATURES]
    return outputs | {kind.name: input_features(kind, batch.waves, batch.lengths).numpy() for kind in kinds}
