"""Settings of frozen models: those of all families, and those of single families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from spkd.config import Chooser, component, key
from spkd.registry import TEACHERS, section_of

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cuda", "mps", "cpu", *(f"cuda:{i}" for i in range(16)))
INPUTS = ("auto", "kaldi", "sherpa", "wespeaker", "3d-speaker", "nemo", "waveform")
CHECKPOINT = "checkpoint"  # family of students trained by spkd
STUDENT = "student"  # folder that `spkd train` writes by default
BUNDLED = "bundled"  # the student that comes with spkd


@dataclass
class TransformersSettings:
    """Settings of WavLM, HuBERT, wav2vec 2.0, data2vec and w2v-BERT."""

    layer: int | None = key(
        None, "hidden layer pooled into the embedding (default: the speaker head, else the last)", low=0, high=1000
    )


@dataclass
class FrontEndSettings:
    """Settings of the models of a toolkit whose files may lack a description of their input."""

    input: str = key("auto", "features that the model takes, where its file does not say it", INPUTS)


@dataclass
class ONNXSettings(FrontEndSettings):
    outputs: dict[str, str] = key({}, "names in the graph of embedding and frames, where they are not clear")


@dataclass
class ModelConfig(Chooser):
    """Settings of a frozen model.

    Attributes:
        SECTION: section of a command's settings that they are, for messages.
    """

    SECTION: ClassVar[str] = "teacher"

    name: str = key("dvector", "teacher family; none stores only features, for training without a teacher", TEACHERS)
    weights: str | None = key(
        None,
        "weights: a file, a folder or a hub id; default: dvector takes the installed resemblyzer package, wavlm "
        "microsoft/wavlm-base-plus-sv, hubert, wav2vec2, data2vec and w2v-bert public large models, checkpoint "
        "./student",
    )
    precision: str = key("fp32", "of the model's matrix products and convolutions (fp16: on a GPU)", PRECISIONS)
    compile: bool = key(False, "compile the model (torch.compile): slow to start, faster on a GPU")
    dimension: int | None = key(
        None,
        "numbers of the embedding, the first ones, that are taken of a student trained with student.nested (default: "
        "all)",
        low=1,
        high=65_536,
    )
    settings: Any = component(TEACHERS)

    @property
    def label(self) -> str:
        """Its name, with the dimension where that is given, for records."""
        return self.name if self.dimension is None else f"{self.name}, dimension={self.dimension}"

    def unused(self) -> dict[str, str]:
        if self.name == "none":
            return dict.fromkeys(("weights", "precision", "compile", "dimension"), "teacher=none runs no model")
        if self.name == BUNDLED:
            return {"weights": f"{self.SECTION}={BUNDLED} has weights of its own"}
        if self.name == "onnx" and self.weights is not None:  # else a student may be in a folder of that name
            return dict.fromkeys(("precision", "compile"), "onnxruntime runs the graph as it is")
        return {}


@dataclass
class TeacherConfig(ModelConfig):
    """Settings of the teacher of an extraction."""

    targets: list[str] = key(["embedding"], "targets to store, e.g. [embedding,frames.layer8]; see --targets")

    def unused(self) -> dict[str, str]:
        reasons = super().unused()
        if self.name == "none":
            reasons["targets"] = "teacher=none has none; fbank=true and wave=true store features"
        return reasons


@dataclass
class ScoredModelConfig(ModelConfig):
    """Settings of the model that embeds the utterances of trials: a student or a teacher."""

    SECTION: ClassVar[str] = "model"

    name: str = key(STUDENT, "folder of a student, or a teacher family (then see model.weights)")
    settings: Any = component(TEACHERS, otherwise=CHECKPOINT)

    def unused(self) -> dict[str, str]:
        return super().unused() if self.name in TEACHERS else {"weights": f"{self.name} is the folder of a student"}


@dataclass
class OptionalModelConfig(ScoredModelConfig):
    """Settings of a model that need not be named."""

    name: str | None = key(None, "")  # type: ignore[assignment]

    def unused(self) -> dict[str, str]:
        if self.name is None:
            names = ("weights", "precision", "compile", "dimension", *map(section_of, TEACHERS))
            return dict.fromkeys(names, f"no {self.SECTION} is set")
        return super().unused()


@dataclass
class EnrolModelConfig(OptionalModelConfig):
    """Settings of the model of the enrolment side."""

    SECTION: ClassVar[str] = "enrol.model"

    name: str | None = key(
        None,
        "another model for the enrolment side, with embeddings of the same space, as a student's own teacher, or that "
        "are mapped to it (enrol.map_by)",
    )


@dataclass
class VoiceModelConfig(OptionalModelConfig):
    """Settings of the model of voices."""

    name: str | None = key(
        None,
        f"folder of a student, or a teacher family (default: ./{STUDENT} where it is there, otherwise {BUNDLED}, the "
        "small model that comes with spkd)",
    )

    def chosen(self) -> ScoredModelConfig:
        """Settings of the model in use."""
        if self.name is None:
            return ScoredModelConfig(STUDENT if Path(STUDENT).exists() else BUNDLED)
        return ScoredModelConfig(self.name, self.weights, self.precision, self.compile, self.dimension, self.settings)
