"""Choice of the targets of an extraction, and their computation for a batch of views."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from spkd.cache.codec import make_codec
from spkd.config import without_unused
from spkd.corpus.loader import WaveBatch
from spkd.errors import UsageError, did_you_mean
from spkd.extract.settings import ExtractConfig
from spkd.outputs.features import FBANKS, FEATURES, WAVE, input_features
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.teachers.base import Teacher

Outputs = dict[str, np.ndarray]


def chosen_targets(config: ExtractConfig, teacher: Teacher) -> list[Target]:
    """The targets to store, with their codecs, as the settings ask; features on request, or where there is no teacher.

    Logits of a teacher with a head are stored only if a codec is named for them. Otherwise the embedding and the head
    are stored, from which they follow exactly.

    Args:
        config: settings of the extraction.
        teacher: the teacher.
    Raises:
        UsageError: an unknown target or codec, a codec that is for other targets, or a typed codec that has no effect.
    """
    # The teacher's targets.
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
    # Features in addition.
    targets = [teacher.targets[name] for name in stored]
    targets += [FBANKS[config.features]] if config.fbank or not (teacher.targets or config.wave) else []
    targets += [WAVE] if config.wave else []
    if not targets:
        raise UsageError("teacher.targets: name at least one target")
    # The codecs.
    unused = {
        f"storage.codecs{{{name}}}": f"no target {name!r} is stored{did_you_mean(name, [*names, *FEATURES])}"
        for name in chosen
        if name not in [target.name for target in targets]
    }
    if all(target.name in chosen for target in targets):
        unused["storage.codec"] = "every target has a codec of its own (storage.codecs)"
    storage = without_unused(config, unused).storage
    targets = [target.stored_as(storage.codecs.get(target.name, storage.codec)) for target in targets]
    for target in targets:
        codec = make_codec(target.codec, target.dim)
        if codec.only not in (None, target.name):
            raise UsageError(f"storage: {target.codec} is for {codec.only}, not for {target.name}")
    return targets


def extract_targets(
    teacher: Teacher, batch: WaveBatch, targets: Collection[Target], halves: Collection[str] = ()
) -> Outputs:
    """Targets of a batch of views: outputs of the teacher, and features.

    Args:
        teacher: the teacher.
        batch: the views.
        targets: the targets.
        halves: names of the targets to return as float16.
    Returns:
        Name of each target -> (B, D) at utterance level or (B, T, D) at frame level, float32 or float16. Frames of the
        padding are undefined.
    """
    names = [t.name for t in targets if t.name not in FEATURES]
    outputs = teacher.extract(batch.waves, names, halves, batch.lengths)
    kinds = [target for target in targets if target.name in FEATURES]
    return outputs | {kind.name: input_features(kind, batch.waves, batch.lengths).numpy() for kind in kinds}
