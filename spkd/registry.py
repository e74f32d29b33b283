"""What can be chosen by name: losses, students, teachers, codecs. Adding one is a file and one line here.

The command line's help, choices, "did you mean" and error texts come from these lists. Nothing is imported until it is
used. Installed packages add their own losses, students and teachers by entry points of the groups `spkd.losses`,
`spkd.students` and `spkd.teachers`:

    [project.entry-points."spkd.losses"]
    huber = "my_package.huber:Huber"
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from spkd.errors import SpkdError, UsageError, did_you_mean


class Registry(Mapping[str, Any]):
    """Classes by name, imported on first use.

    Args:
        key: the setting that chooses one, for error texts.
        group: of the entry points that add to it; "" where nothing may be added.
        ours: name -> "module:Class".
    """

    def __init__(self, key: str, group: str, ours: dict[str, str]) -> None:
        self.key, self.ours, self._group = key, ours, group

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        found = {point.name: point for point in entry_points(group=self._group)} if self._group else {}
        return {name: point for name, point in found.items() if name not in self.ours}

    def __iter__(self) -> Iterator[str]:
        yield from self.ours
        yield from self._added

    def __len__(self) -> int:
        return len(self.ours) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return name in self.ours or name in self._added

    def __getitem__(self, name: str) -> Any:
        """The class of a name.

        Raises:
            UsageError: there is none of this name. SpkdError: an installed package's class cannot be imported.
        """
        if name in self.ours:
            module, _, attribute = self.ours[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name not in self._added:
            raise UsageError(f"{self.key}={name}{did_you_mean(name, self)}")
        try:
            return self._added[name].load()
        except Exception as error:  # code of another package
            raise SpkdError(
                f"{self.key}={name}: {self._added[name].value} cannot be imported ({type(error).__name__}: {error})"
            ) from error


LOSSES = Registry(
    "loss",
    "spkd.losses",
    {
        "aam": "spkd.train.losses.aam:AAM",
        "cosine": "spkd.train.losses.regression:Cosine",
        "mse": "spkd.train.losses.regression:MSE",
        "contrastive": "spkd.train.losses.contrastive:Contrastive",
        "relational": "spkd.train.losses.relational:Relational",
        "ntxent": "spkd.train.losses.ntxent:NTXent",
        "kld": "spkd.train.losses.logits:KLD",
        "nontarget": "spkd.train.losses.logits:NonTarget",
        "trkd": "spkd.train.losses.logits:Triage",
        "multilevel": "spkd.train.losses.multilevel:MultiLevel",
        "one-step": "spkd.train.losses.onestep:OneStep",
        "memo": "spkd.train.losses.memo:MeMo",
    },
)

STUDENTS = Registry(
    "student",
    "spkd.students",
    {
        "xvector": "spkd.networks.xvector:XVector",
        "etdnn": "spkd.networks.etdnn:ETDNN",
        "ecapa": "spkd.networks.ecapa:ECAPA",
        "resnet34": "spkd.networks.resnet:ResNet34",
        "campplus": "spkd.networks.campplus:CAMPPlus",
        "ssl": "spkd.networks.ssl:SSLStudent",
        "tiny": "spkd.networks.tiny:Tiny",
    },
)

TEACHERS = Registry(
    "teacher",
    "spkd.teachers",
    {
        "dvector": "spkd.teachers.dvector:DVector",
        "wavlm": "spkd.teachers.ssl:WavLM",
        "hubert": "spkd.teachers.ssl:HuBERT",
        "wav2vec2": "spkd.teachers.ssl:Wav2Vec2",
        "data2vec": "spkd.teachers.ssl:Data2Vec",
        "w2v-bert": "spkd.teachers.ssl:W2VBert",
        "wespeaker": "spkd.teachers.wespeaker:WeSpeaker",
        "3d-speaker": "spkd.teachers.three_d_speaker:ThreeDSpeaker",
        "speechbrain": "spkd.teachers.speechbrain:SpeechBrain",
        "onnx": "spkd.teachers.onnx:ONNX",
        "checkpoint": "spkd.teachers.checkpoint:CheckpointTeacher",
        "none": "spkd.teachers.none:NoTeacher",
    },
)

# A capital letter in a codec's name is a number that the user chooses.
CODECS = Registry(
    "codec",
    "",
    {
        "float16": "spkd.cache.codec:Float16",
        "float32": "spkd.cache.codec:Float32",
        "int8": "spkd.cache.codec:Int8",
        "sq8": "spkd.cache.codec:Scalar8",
        "sq6": "spkd.cache.codec:Scalar6",
        "sq4": "spkd.cache.codec:Scalar4",
        "pqMx8": "spkd.cache.codec:Product8",
        "pqMx4": "spkd.cache.codec:Product4",
        "opqMx8": "spkd.cache.codec:RotatedProduct8",
        "opqMx4": "spkd.cache.codec:RotatedProduct4",
        "topkK": "spkd.cache.codec:TopK",
    },
)
