"""Registries of components that are chosen by name: losses, students, teachers, codecs, formats, settings and others.

A new component needs a file and one line here. Help, choices, hints and errors of the command line come from these
lists. A component is imported when it is first used. Installed packages add losses, students and teachers by entry
points of the groups `spkd.losses`, `spkd.students` and `spkd.teachers`:

    [project.entry-points."spkd.losses"]
    huber = "my_package.huber:Huber"
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from spkd.errors import SpkdError, UsageError, did_you_mean, first_line, listed
from spkd.progress import log


@dataclass
class NoSettings:
    """Settings of a component without settings."""


class Registry(Mapping[str, Any]):
    """Registry of classes by name, which are imported on first use.

    Args:
        key: the setting that chooses one, for errors.
        group: group of the entry points that add to it; "" where none may.
        ours: name -> "module:Class", or name -> ("module:Class", "module:Settings"). The second form gives the settings
            in a module that is quick to import, for `--help`; there, "" stands for no settings. In the first form, the
            settings are the attribute `Settings` of the class.
    """

    def __init__(self, key: str, group: str, ours: Mapping[str, str | tuple[str, str]]) -> None:
        self.key, self.ours, self._group = key, ours, group

    @cached_property
    def _points(self) -> list[EntryPoint]:
        return list(dict.fromkeys(entry_points(group=self._group))) if self._group else []

    @property
    def _added(self) -> list[str]:
        return list(dict.fromkeys(point.name for point in self._points if point.name not in self.ours))

    def _like(self, name: str) -> list[EntryPoint]:
        """Entry points whose settings have the same keys as those of a name: of this name, or of one spelt alike."""
        return [point for point in self._points if section_of(point.name) == section_of(name)]

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
            UsageError: there is no class of this name.
            SpkdError: the class of an installed package cannot be imported, or the name is not its own.
        """
        if name in self.ours:
            line = self.ours[name]
            return _imported(line if isinstance(line, str) else line[0])
        if name not in self._added:
            raise UsageError(f"{self.key}={name}{did_you_mean(name, self)}")
        points, ours = self._like(name), self.named(name)
        if ours in self.ours:
            raise self.unusable(name, f"spkd's own {ours} has the same keys; it needs another name")
        if len(points) > 1:
            raise self.unusable(name, "several have this name; one of them needs another")
        if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
            raise self.unusable(name, "its name may hold letters, digits, - and _ only")
        try:
            return points[0].load()
        except (Exception, SystemExit) as error:  # code of another package
            reason = f"{points[0].value} cannot be imported ({type(error).__name__}: {first_line(error)})"
            raise self.unusable(name, reason) from error

    def unusable(self, name: str, reason: str) -> SpkdError:
        """Error of a component of an installed package that cannot be used."""
        packages = [_package(point) for point in self._like(name)]
        return SpkdError(f"{self.key}={name} of the package {listed(packages)}: {reason}")

    def note_namesakes(self, name: str) -> None:
        """Log a note, once, where an installed package adds a component of the name of one of ours."""
        if name in self.ours and (points := self._like(name)):
            packages = listed([_package(point) for point in points])
            _note(f"{self.key}={name} is spkd's own; that of the package {packages} is not used")

    def settings(self, name: str) -> type:
        """Dataclass of the settings of a component.

        Raises:
            UsageError: there is no component of this name.
            SpkdError: the class of an installed package cannot be imported, or its settings are no dataclass of keys.
        """
        line = self.ours.get(name)
        if isinstance(line, tuple):
            return _imported(line[1]) if line[1] else NoSettings
        kind: Any = getattr(self[name], "Settings", NoSettings)
        if name not in self.ours and (problem := _no_settings(kind)):
            raise self.unusable(name, f"its Settings {problem}")
        return kind

    def named(self, section: str) -> str | None:
        """Name of the component to which a section of settings belongs, such as one-step for `one_step`.

        Returns:
            None where there is no such component.
        """
        return next((name for name in self if section_of(name) == section_of(section)), None)


def section_of(name: str) -> str:
    """Name of the section of a component's settings, such as `one_step` for one-step."""
    return name.replace("-", "_").lower()


def _no_settings(kind: Any) -> str | None:
    """Phrase that says why a class cannot be the settings of a component; None where it can."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return "are no dataclass"
    try:
        # A class without the decorator may inherit fields, but has none of its own.
        bare = [base for base in kind.__mro__[:-1] if "__dataclass_fields__" not in vars(base)]
        if any(map(_attributes, bare)):
            return "are no dataclass"
        hints = get_type_hints(kind)
    except Exception as error:  # code of another package
        return f"cannot be read ({type(error).__name__}: {first_line(error)})"
    fields = [f for f in dataclasses.fields(kind) if f.init and not dataclasses.is_dataclass(hints[f.name])]
    methods = {"unused"}.union(*({n for n, value in vars(base).items() if callable(value)} for base in kind.__mro__))
    for field in fields:
        if "meaning" not in field.metadata:
            return f"have the field {field.name}, which spkd.config.key did not make"
        if field.name in methods:
            return f"have the field {field.name}, which is the name of a method"
    return None


def _attributes(kind: type) -> list[str]:
    """Names that a class defines, but for methods."""
    own = [name for name, value in vars(kind).items() if not (name.startswith("__") or callable(value))]
    return [*own, *inspect.get_annotations(kind)]


def _package(point: EntryPoint) -> str:
    """Name of the package that an entry point is of."""
    return point.dist.name if point.dist is not None else point.module


@functools.cache
def _note(text: str) -> None:
    log(f"note: {text}")


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def plug_ins() -> tuple[str, ...]:
    """Names of the modules of installed packages that add components."""
    groups = ("spkd.losses", "spkd.students", "spkd.teachers")
    return tuple(
        {point.value.partition(":")[0].partition(".")[0] for name in groups for point in entry_points(group=name)}
    )


LOSSES = Registry(
    "loss",
    "spkd.losses",
    {
        "aam": ("spkd.train.losses.aam:AAM", "spkd.train.losses.settings:AAMSettings"),
        "cosine": ("spkd.train.losses.regression:Cosine", "spkd.train.losses.settings:LossSettings"),
        "mse": ("spkd.train.losses.regression:MSE", "spkd.train.losses.settings:LossSettings"),
        "contrastive": ("spkd.train.losses.contrastive:Contrastive", "spkd.train.losses.settings:ContrastiveSettings"),
        "relational": ("spkd.train.losses.relational:Relational", "spkd.train.losses.settings:LossSettings"),
        "ntxent": ("spkd.train.losses.ntxent:NTXent", "spkd.train.losses.settings:NTXentSettings"),
        "kld": ("spkd.train.losses.logits:KLD", "spkd.train.losses.settings:LabelSettings"),
        "nontarget": ("spkd.train.losses.logits:NonTarget", "spkd.train.losses.settings:NonTargetSettings"),
        "trkd": ("spkd.train.losses.logits:Triage", "spkd.train.losses.settings:TriageSettings"),
        "multilevel": ("spkd.train.losses.multilevel:MultiLevel", "spkd.train.losses.settings:MultiLevelSettings"),
        "codebook": ("spkd.train.losses.codebook:Codebook", "spkd.train.losses.settings:CodebookSettings"),
        "one-step": ("spkd.train.losses.onestep:OneStep", "spkd.train.losses.settings:OneStepSettings"),
        "memo": ("spkd.train.losses.memo:MeMo", "spkd.train.losses.settings:MeMoSettings"),
    },
)

STUDENTS = Registry(
    "student",
    "spkd.students",
    {
        "xvector": ("spkd.networks.xvector:XVector", ""),
        "etdnn": ("spkd.networks.etdnn:ETDNN", ""),
        "ecapa": ("spkd.networks.ecapa:ECAPA", ""),
        "resnet34": ("spkd.networks.resnet:ResNet34", ""),
        "campplus": ("spkd.networks.campplus:CAMPPlus", ""),
        "redimnet2": ("spkd.networks.redimnet:ReDimNet2", ""),
        "ssl": ("spkd.networks.ssl:SSLStudent", "spkd.networks.settings:SSLSettings"),
        "tiny": ("spkd.networks.tiny:Tiny", ""),
    },
)

TEACHERS = Registry(
    "teacher",
    "spkd.teachers",
    {
        "dvector": ("spkd.teachers.dvector:DVector", ""),
        "wavlm": ("spkd.teachers.ssl:WavLM", "spkd.teachers.settings:TransformersSettings"),
        "hubert": ("spkd.teachers.ssl:HuBERT", "spkd.teachers.settings:TransformersSettings"),
        "wav2vec2": ("spkd.teachers.ssl:Wav2Vec2", "spkd.teachers.settings:TransformersSettings"),
        "data2vec": ("spkd.teachers.ssl:Data2Vec", "spkd.teachers.settings:TransformersSettings"),
        "w2v-bert": ("spkd.teachers.ssl:W2VBert", "spkd.teachers.settings:TransformersSettings"),
        "wespeaker": ("spkd.teachers.wespeaker:WeSpeaker", "spkd.teachers.settings:FrontEndSettings"),
        "3d-speaker": ("spkd.teachers.three_d_speaker:ThreeDSpeaker", "spkd.teachers.settings:FrontEndSettings"),
        "redimnet": ("spkd.teachers.redimnet:ReDimNetTeacher", ""),
        "speechbrain": ("spkd.teachers.speechbrain:SpeechBrain", ""),
        "onnx": ("spkd.teachers.onnx:ONNX", "spkd.teachers.settings:ONNXSettings"),
        "checkpoint": ("spkd.teachers.checkpoint:CheckpointTeacher", ""),
        "bundled": ("spkd.teachers.bundled:BundledTeacher", ""),
        "none": ("spkd.teachers.none:NoTeacher", ""),
    },
)

OPTIMISERS = Registry(
    "optim",
    "",
    {
        "adamw": ("spkd.train.optim:make_adamw", ""),
        "sgd": ("spkd.train.optim:make_sgd", "spkd.train.settings:SGDSettings"),
    },
)

SAMPLERS = Registry(
    "sampler",
    "",
    {
        "shuffled": ("spkd.train.samplers:shuffled", ""),
        "speakers": ("spkd.train.samplers:by_speaker", "spkd.train.settings:SpeakersSettings"),
        "lengths": ("spkd.train.samplers:by_length", ""),
        "shares": ("spkd.train.samplers:by_shares", "spkd.train.settings:SharesSettings"),
        "hard": ("spkd.train.samplers:by_neighbours", "spkd.train.settings:HardSettings"),
    },
)

EXPORTS = Registry(
    "to",
    "",
    {
        "onnx": ("spkd.export.onnx:ONNX", "spkd.export.settings:ONNXSettings"),
        "onnx-int8": ("spkd.export.int8:ONNXInt8", "spkd.export.settings:Int8Settings"),
        "pt2": ("spkd.export.pt2:PT2", ""),
        "litert": ("spkd.export.litert:LiteRT", "spkd.export.settings:LiteRTSettings"),
        "pte": ("spkd.export.pte:PTE", "spkd.export.settings:LongestSettings"),
        "coreml": ("spkd.export.coreml:CoreML", "spkd.export.settings:LongestSettings"),
        "ort": ("spkd.export.ort:ORT", ""),
        "wespeaker": ("spkd.export.wespeaker:WeSpeaker", ""),
        "web": ("spkd.export.web:Web", "spkd.export.settings:WebSettings"),
    },
)

# Detectors of speech. A name that is none of them is a file of segments.
DETECTORS = Registry(
    "vad",
    "",
    {
        "silero": ("spkd.corpus.vad.silero:Silero", ""),
        "energy": ("spkd.corpus.vad.energy:Energy", ""),
    },
)

# Settings of the commands: the sections of a settings file.
COMMANDS = Registry(
    "command",
    "",
    {
        "extract": "spkd.extract.settings:ExtractConfig",
        "train": "spkd.train.settings:TrainConfig",
        "cluster": "spkd.train.settings:ClusterConfig",
        "eval": "spkd.eval.settings:EvalConfig",
        "calibrate": "spkd.eval.settings:CalibrateConfig",
        "embed": "spkd.eval.settings:EmbedConfig",
        "map": "spkd.mapping.settings:MapConfig",
        "export": "spkd.export.settings:ExportConfig",
        "enrol": "spkd.voices.settings:EnrolVoiceConfig",
        "verify": "spkd.voices.settings:VerifyVoiceConfig",
        "identify": "spkd.voices.settings:IdentifyVoiceConfig",
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
        "rqMxB": "spkd.cache.codec:Residual",
        "lsqMxB": "spkd.cache.codec:LocalSearch",
        "topkK": "spkd.cache.codec:TopK",
    },
)

# Layouts of corpora on disk. The first that is detected is taken; `folder` always is.
LAYOUTS = Registry(
    "layout",
    "",
    {
        "3d-speaker": "spkd.corpus.layouts.three_d_speaker:ThreeDSpeaker",
        "common-voice": "spkd.corpus.layouts.common_voice:CommonVoice",
        "voxceleb": "spkd.corpus.layouts.voxceleb:VoxCeleb",
        "librispeech": "spkd.corpus.layouts.librispeech:LibriSpeech",
        "cnceleb": "spkd.corpus.layouts.cnceleb:CNCeleb",
        "sitw": "spkd.corpus.layouts.sitw:SITW",
        "sdsv": "spkd.corpus.layouts.sdsv:SdSV",
        "ffsvc": "spkd.corpus.layouts.ffsvc:FFSVC",
        "folder": "spkd.corpus.layouts.folder:Folder",
    },
)

# Readers of manifests. The first that recognises a file reads it.
MANIFEST_READERS = Registry(
    "manifest",
    "",
    {
        "several": "spkd.corpus.manifests.several:Several",
        "parquet-paths": "spkd.corpus.manifests.parquet_paths:ParquetPaths",
        "containers": "spkd.corpus.manifests.containers:Containers",
        "kaldi": "spkd.corpus.manifests.kaldi:KaldiFolder",
        "audiofolder": "spkd.corpus.manifests.audiofolder:AudioFolder",
        "lhotse-shar": "spkd.corpus.manifests.lhotse_shar:SharFolder",
        "lhotse": "spkd.corpus.manifests.lhotse:LhotseCuts",
        "wespeaker": "spkd.corpus.manifests.wespeaker:WeSpeaker",
        "speechbrain-json": "spkd.corpus.manifests.speechbrain:SpeechBrainJSON",
        "tarred-nemo": "spkd.corpus.manifests.tarred_nemo:TarredNeMo",
        "json-lines": "spkd.corpus.manifests.json_lines:JSONLines",
        "speechbrain": "spkd.corpus.manifests.speechbrain:SpeechBrainTable",
        "3d-speaker": "spkd.corpus.manifests.three_d_speaker:ThreeDSpeaker",
        "common-voice": "spkd.corpus.manifests.common_voice:CommonVoice",
        "table": "spkd.corpus.manifests.table:Table",
        "speaker-paths": "spkd.corpus.manifests.paths:SpeakerPathList",
        "paths": "spkd.corpus.manifests.paths:PathList",
    },
)

# Kinds of containers of audio. The first that recognises a file reads it.
CONTAINERS = Registry(
    "container",
    "",
    {
        "tar": "spkd.corpus.containers.tar:Tar",
        "zip": "spkd.corpus.containers.zip:Zip",
        "ark": "spkd.corpus.containers.ark:KaldiArchive",
        "parquet": "spkd.corpus.containers.parquet:Parquet",
    },
)

# Formats of trial lists and of score files, tried in this order.
TRIAL_FORMATS = Registry(
    "format",
    "",
    {
        "nist": "spkd.eval.trial_formats.nist:NIST",
        "sdsv": "spkd.eval.trial_formats.sdsv:SdSV",
        "nist-key": "spkd.eval.trial_formats.nist_key:NISTKey",
        "nist-ndx": "spkd.eval.trial_formats.nist_ndx:NISTIndex",
        "espnet": "spkd.eval.trial_formats.espnet:ESPnet",
        "voxceleb": "spkd.eval.trial_formats.voxceleb:VoxCeleb",
        "kaldi": "spkd.eval.trial_formats.kaldi:Kaldi",
        "plain": "spkd.eval.trial_formats.plain:Plain",
    },
)

SCORE_FORMATS = Registry(
    "score format",
    "",
    {
        "nist": "spkd.eval.score_formats.nist:NISTScores",
        "espnet": "spkd.eval.score_formats.espnet:ESPnetScores",
        "speechbrain": "spkd.eval.score_formats.speechbrain:SpeechBrainScores",
        "wespeaker": "spkd.eval.score_formats.wespeaker:WeSpeakerScores",
        "wespeaker-norm": "spkd.eval.score_formats.wespeaker:WeSpeakerNorm",
        "wespeaker-factors": "spkd.eval.score_formats.wespeaker:WeSpeakerFactors",
        "labelled": "spkd.eval.score_formats.labelled:LabelledScores",
        "kaldi": "spkd.eval.score_formats.kaldi:KaldiScores",
        "voxsrc": "spkd.eval.score_formats.voxsrc:VoxSRCScores",
    },
)
