"""Settings: one dataclass per command; `key=value` overrides, environment, YAML files and recipes fill them.

Precedence, lowest first: the defaults here, a recipe, `spkd.yaml` (or `--config FILE`), environment variables
`SPKD_<KEY>` (dots as double underscores: `SPKD_TEACHER__WEIGHTS`), `key=value` on the command line.
A section given a plain value sets its first key: `teacher=wavlm` is `teacher.name=wavlm`.

The type of a key decides how its text is read: `cache=010` and `cache=no` are the folders `010` and `no`. Nothing in a
value is looked up elsewhere: `${...}` stays as it is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.files.schema import convert
from spkd.registry import CODECS, LOSSES, STUDENTS, TEACHERS

Schema = TypeVar("Schema")
RECIPES = Path(__file__).parent / "recipes"
PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cuda", "mps", "cpu", *(f"cuda:{i}" for i in range(16)))
EXPORTS = ("onnx", "onnx-int8", "torchscript", "litert", "wespeaker")
FEATURES = ("kaldi", "sherpa", "wespeaker", "3d-speaker")
INPUTS = ("auto", "kaldi", "sherpa", "wespeaker", "3d-speaker", "nemo", "waveform")
CODER_NAMES = ("g711", "gsm", "opus", "mp3", "vorbis")
MAX_SEED = 2**40
MANIFEST = "manifest.csv"
MAX_YAML = 1 << 20  # bytes of a settings file


def key(
    default: Any,
    meaning: str,
    choices: Iterable[str] = (),
    low: float | None = None,
    high: float | None = None,
    positive: bool = False,
) -> Any:
    """A dataclass field with its meaning (shown by --help) and, where closed, its choices or its range.

    Args:
        low, high: the least and the greatest number allowed (of each item, in lists and dicts). positive: above 0.
    """
    limits = {"low": low, "high": high, "positive": positive, "choices": tuple(choices)}
    metadata = {"meaning": meaning, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    return field(default_factory=kind)


@dataclass
class ModelConfig:
    """A frozen model: what `spkd eval` and `spkd cache verify --live` load, too."""

    name: str = key("dvector", "teacher family; none stores only features, for training without a teacher", TEACHERS)
    weights: str | None = key(
        None,
        "weights: a file, a folder or a hub id; default: dvector takes the installed resemblyzer package, wavlm "
        "microsoft/wavlm-base-plus-sv, hubert, wav2vec2, data2vec and w2v-bert public large models, checkpoint "
        "./student",
    )
    layer: int | None = key(
        None,
        "hidden layer of a transformers model pooled into the embedding (default: its speaker head, else the last)",
        low=0,
        high=1000,
    )
    input: str = key(
        "auto",
        "what a model of a toolkit takes, where its file does not say it: a toolkit's fbank, or waveform",
        INPUTS,
    )
    outputs: dict[str, str] = key({}, "onnx: names in the graph of embedding and frames, where they are not clear")
    precision: str = key("fp32", "of the model's matrix products and convolutions", PRECISIONS)
    compile: bool = key(False, "compile the model (torch.compile): slow to start, faster on a GPU")


@dataclass
class TeacherConfig(ModelConfig):
    targets: list[str] = key(["embedding"], "targets to store, e.g. [embedding,frames.layer8]; see --targets")


@dataclass
class ViewConfig:
    plan: str = key(
        "full",
        "views of each utterance: full | full:COUNT (whole: as it is, and COUNT - 1 times with a speed and a formant "
        "factor drawn for its speaker) | windows:SECONDS/HOP | crops:COUNT,SECONDS",
    )
    speeds: list[float] = key(
        [1.0], "speed factors; full and windows make one view per speed, crops draw one each", low=0.5, high=2.0
    )
    formants: list[float] = key(
        [1.0],
        "factors by which formants move without the pitch; with speeds: other voices, pitch and formants apart; full "
        "and windows make one view per speed and factor",
        low=0.5,
        high=2.0,
    )
    noise: str | None = key(
        None, "additive noise: a folder of audio files, or 'synthetic' (coloured noise, no data needed)"
    )
    noise_prob: float = key(0.6, "probability that noise is added to a view, where noise is set", low=0, high=1)
    snr: list[float] = key([5.0, 20.0], "lowest and highest signal-to-noise ratio (dB)", low=-100, high=100)
    rir: str | None = key(None, "reverberation: a folder of room impulse responses")
    rir_prob: float = key(0.3, "probability that a view is reverberated, where rir is set", low=0, high=1)
    coders: list[str] = key(
        [], "transmission: telephone (g711, gsm), opus, mp3, vorbis, of which each view takes one", CODER_NAMES
    )
    coder_prob: float = key(0.5, "probability that a view is transmitted, where coders are set", low=0, high=1)
    seed: int = key(0, "seed of crop positions, speeds and augmentation", low=0, high=MAX_SEED)


@dataclass
class StorageConfig:
    codec: str = key(
        "float16", f"how targets are stored: {', '.join(CODECS)} (M parts, K classes); NAME+zstd compresses besides"
    )
    codecs: dict[str, str] = key({}, "targets stored otherwise, e.g. {frames.layer8: int8, logits: topk64}")
    unit_views: int = key(
        1024, "most views in one unit (the piece that one worker fills and commits)", low=1, high=10**6
    )
    unit_seconds: float = key(1280.0, "most audio in one unit (s)", low=0.1, high=134_000)


@dataclass
class ExtractConfig:
    manifest: str = key(MANIFEST, "manifest of the audio (CSV, JSONL or Kaldi folder)")
    cache: str = key("cache", "folder of the teacher cache")
    teacher: TeacherConfig = section(TeacherConfig)
    view: ViewConfig = section(ViewConfig)
    fbank: bool = key(False, "also store 80-mel fbank of every view, which most students take: training needs no audio")
    features: str = key("kaldi", "whose fbank fbank=true stores; as student.features", FEATURES)
    wave: bool = key(False, "also store the samples of every view, for students that take the waveform (ssl)")
    storage: StorageConfig = section(StorageConfig)
    batch_size: int = key(
        32,
        "views in one teacher batch; of different length only where padding does not change what the teacher gives",
        low=1,
        high=100_000,
    )
    workers: int = key(2, "threads that decode and augment", low=1, high=1024)
    min_seconds: float = key(0.3, "shorter utterances are rejected (s)", low=0, high=100_000)
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)
    engine: str = key(
        "auto", "auto: this process, or a rank of torchrun or srun; ray: actors of a Ray cluster", ("auto", "ray")
    )
    processes: int = key(
        0, "actors of engine=ray, or tasks of --slurm-script (0: by the GPUs, or the CPUs)", low=0, high=100_000
    )


@dataclass
class AugmentationFolders:
    noise: str | None = key(None, "folder of the noise with which the cache's views were augmented")
    rir: str | None = key(None, "folder of the impulse responses of the cache's views")


@dataclass
class VerifyConfig:
    """What `spkd cache verify --live` needs to run the teacher again; the `extract:` section of a file fills it."""

    manifest: str = key(MANIFEST, "manifest of the audio, as at extraction")
    teacher: ModelConfig = section(ModelConfig)
    view: AugmentationFolders = section(AugmentationFolders)
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)


@dataclass
class CacheExportConfig:
    """What `spkd cache export --audio` needs to load the audio; the `extract:` section of a file fills it."""

    manifest: str = key(MANIFEST, "manifest of the audio, as at extraction")
    view: AugmentationFolders = section(AugmentationFolders)


@dataclass
class StudentConfig:
    name: str = key("xvector", "architecture", STUDENTS)
    channels: int | None = key(None, "width (default: the architecture's own)", low=1, high=65_536)
    embedding: int = key(192, "embedding dimension", low=1, high=65_536)
    layers: int = key(2, "ssl: transformer layers", low=1, high=1000)
    adapters: int = key(
        0, "ssl: width of the adapters parallel to the feed-forward layers, for one-step (0: none)", low=0, high=65_536
    )
    features: str = key(
        "kaldi",
        "fbank that the student takes: sherpa for phones (sherpa-onnx computes it), wespeaker or 3d-speaker for "
        "weights of these toolkits",
        FEATURES,
    )
    init: str | None = key(
        None,
        "initial weights: a student trained by spkd, a state dictionary of the same architecture, or, for ssl, a "
        "transformers model (folder or hub id)",
    )


@dataclass
class OptimConfig:
    name: str = key("adamw", "optimiser", ("adamw", "sgd"))
    lr: float = key(2e-3, "peak learning rate", positive=True, high=1e12)
    final_lr: float = key(1e-5, "learning rate at the last step", positive=True, high=1e12)
    schedule: str = key(
        "cosine",
        "decay of the learning rate; a run with constant can be continued with more steps",
        ("cosine", "exponential", "constant"),
    )
    swa_fraction: float = key(
        0.0, "last fraction of the run whose weights are averaged into the student (0: none)", low=0, high=1
    )
    weight_decay: float = key(0.02, "weight decay", low=0, high=1e6)
    warmup: int = key(100, "steps of linear warm-up", low=0, high=10**9)
    clip: float = key(3.0, "largest gradient norm (0: no clipping)", low=0, high=1e12)
    clip_by: str = key(
        "network",
        "what is clipped to that norm: all gradients of a network together, or each tensor",
        ("network", "tensor"),
    )
    nesterov: bool = key(True, "Nesterov momentum, for sgd")


class Given(NamedTuple):
    """A value as a user wrote it. where: for error texts. command_line: not from a file, which several runs share."""

    where: str
    value: Any
    command_line: bool


DEFAULT_AAM_WEIGHT = 0.3  # as in the recipe best-mini


@dataclass
class LossConfig:
    """The losses of a run. Each declares its own settings, `loss.NAME.KEY`; see spkd.train.losses.settings_of."""

    names: list[str] = key(
        [],
        f"losses to add up, as --loss: {', '.join(LOSSES)} (default: contrastive, and where views have a speaker "
        f"label aam besides, at weight {DEFAULT_AAM_WEIGHT})",
    )
    weights: dict[str, float] = key({}, "weight of each loss, e.g. loss.weights.aam=0.5 (default 1)", low=0, high=1e9)
    sections: dict[str, dict[str, Given]] = field(default_factory=dict, metadata={"hidden": True})
    final_weights: dict[str, float] = key(
        {}, "weight at the end of the run, reached linearly from loss.weights (default: constant)", low=0, high=1e9
    )


@dataclass
class MiningConfig:
    negatives: int = key(
        0, "hard negatives of each view, mined from the whole cache, for contrastive (0: none)", low=0, high=65_536
    )
    neighbours: int = key(64, "nearest instances from which they are drawn", low=1, high=65_536)
    positives: int = key(
        0,
        "SSPS: further crops (ntxent, memo) come from one of so many nearest instances in other utterances "
        "(0: from the same instance)",
        low=0,
        high=65_536,
    )
    floor: float = key(
        0.7, "positives: least cosine of such an instance; where none is so near, the same one serves", low=-1, high=1
    )
    embeddings: str = key("teacher", "whose embeddings are searched", ("teacher", "student"))
    refresh: int = key(500, "embeddings=student: steps between two searches, done in the background", low=1, high=10**9)
    nprobe: int = key(
        32, "lists that are searched where the index is approximate (above 100,000 instances)", low=1, high=65_536
    )


@dataclass
class MaskConfig:
    frames: int = key(20, "widest time mask (frames of 10 ms; 0: none)", low=0, high=10**6)
    bands: int = key(10, "widest frequency mask (mel bands; 0: none)", low=0, high=80)


@dataclass
class LargeMarginConfig:
    """Large-margin fine-tuning (Thienpondt et al., ICASSP 2021): a second phase on longer crops. Its values are
    WeSpeaker's."""

    steps: int = key(0, "steps of fine-tuning after the others, with longer crops and a larger margin (0: none)", low=0)
    crop: float = key(6.0, "its student crop (s)", low=0.05, high=100_000)
    margin: float = key(0.5, "its angular margin (rad), for losses that have one", low=0, high=3.14)
    lr: float = key(1e-4, "its first learning rate", positive=True, high=1e12)
    final_lr: float = key(2.5e-5, "its last learning rate, reached exponentially", positive=True, high=1e12)


@dataclass
class ValidConfig:
    trials: str | None = key(None, "trial list that is scored during training, of speakers of its own")
    manifest: str | None = key(None, "manifest of its audio")
    every: int = key(500, "steps between two validations", low=1, high=10**9)
    patience: int = key(0, "validations without a lower EER after which training ends (0: never)", low=0, high=10**6)


@dataclass
class SamplerConfig:
    name: str = key(
        "shuffled",
        "which views share a batch: any; per_speaker views of each of its speakers; views of similar length, whose "
        "crop is as long as the shortest; a share of each corpus; or groups of neighbours",
        ("shuffled", "speakers", "lengths", "shares", "hard"),
    )
    per_speaker: int = key(2, "sampler=speakers: views of each speaker", low=1, high=10**6)
    shares: list[float] = key([], "sampler=shares: of each corpus of cache=[a,b], e.g. [0.5,0.5]", low=0, high=1)
    group: int = key(4, "sampler=hard: a view and its neighbours among mining.neighbours", low=2, high=10**6)


@dataclass
class AugmentConfig:
    """Fresh augmentation of the student's input, beside the teacher's cached targets; it needs the audio (manifest)."""

    noise: str | None = key(None, "noise added afresh in every epoch: a folder of audio files, or 'synthetic'")
    noise_prob: float = key(0.6, "probability that noise is added", low=0, high=1)
    snr: list[float] = key([5.0, 20.0], "lowest and highest signal-to-noise ratio (dB)", low=-100, high=100)
    rir: str | None = key(None, "reverberation: a folder of room impulse responses")
    rir_prob: float = key(0.3, "probability that a view is reverberated", low=0, high=1)
    coders: list[str] = key([], "transmission, of which each view takes one", CODER_NAMES)
    coder_prob: float = key(0.5, "probability that a view is transmitted", low=0, high=1)
    speeds: list[float] = key([1.0], "speed factors, of which one is drawn; no frame targets", low=0.5, high=2.0)

    @property
    def is_used(self) -> bool:
        return self.noise is not None or self.rir is not None or bool(self.coders) or self.speeds != [1.0]


@dataclass
class TrainConfig:
    cache: list[str] = key(
        ["cache"],
        "folder of the teacher cache; several ([a,b]): other corpora, or other teachers over the same views; or a "
        "folder or URL of WebDataset tars made by `spkd cache export`",
    )
    teachers: str = key(
        "concatenate",
        "several teachers: concatenate or average their normalised vectors, or separate (each loss once for each)",
        ("concatenate", "average", "separate"),
    )
    class_means: bool = key(
        False,
        "labels: the teacher's embedding of a view gives way to its mean over the views of the same speaker and voice",
    )
    finetune_cache: list[str] = key(
        [], "one-step: caches of the labelled views for fine-tuning; default: the labelled views of cache"
    )
    manifest: str | None = key(None, "manifest of the audio; only needed when the cache holds no features")
    noise: str | None = key(None, "folder of the noise that augmented the cache's views; needed as manifest is")
    rir: str | None = key(None, "folder of the impulse responses of the cache's views; needed as manifest is")
    out: str = key("student", "folder of the trained student")
    student: StudentConfig = section(StudentConfig)
    loss: LossConfig = section(LossConfig)
    mining: MiningConfig = section(MiningConfig)
    optim: OptimConfig = section(OptimConfig)
    mask: MaskConfig = section(MaskConfig)
    crop: float = key(
        2.0, "student crop (s) of views longer than this; shorter views are repeated", low=0.05, high=100_000
    )
    batch_size: int = key(64, "views in one step", low=2, high=10**6)
    steps: int = key(2000, "training steps", low=1, high=10**9)
    epochs: float | None = key(None, "passes over the views, in the place of steps", positive=True, high=1e6)
    accumulate: int = key(1, "batches whose gradients make one step", low=1, high=10**6)
    large_margin: LargeMarginConfig = section(LargeMarginConfig)
    valid: ValidConfig = section(ValidConfig)
    sampler: SamplerConfig = section(SamplerConfig)
    augment: AugmentConfig = section(AugmentConfig)
    precision: str = key("fp32", "of the student's matrix products and convolutions (fp16: on a GPU)", PRECISIONS)
    compile: bool = key(False, "compile the student (torch.compile): slow to start, faster on a GPU")
    channels_last: bool = key(False, "channels-last memory, faster for 2-d networks")
    loggers: list[str] = key(
        ["tensorboard", "csv"],
        "logs beside log.jsonl; wandb and trackio need their packages",
        ("tensorboard", "csv", "wandb", "trackio"),
    )
    save_every: int = key(
        500, "steps between checkpoints of the training state, from which a run resumes", low=1, high=10**9
    )
    workers: int = key(2, "loader processes, used when audio has to be decoded", low=0, high=1024)
    seed: int = key(0, "seed of weights, order, crops and masks", low=0, high=MAX_SEED)
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)

    @property
    def total_steps(self) -> int:
        """Steps of both phases."""
        return self.steps + self.large_margin.steps


@dataclass
class EmbedConfig:
    model: str = key("student", "folder of a student, or a teacher family (then see weights)")
    weights: str | None = key(None, "weights of the teacher named by model; see extract's teacher.weights")
    layer: int | None = key(None, "see extract's teacher.layer", low=0, high=1000)
    input: str = key("auto", "see extract's teacher.input", INPUTS)
    outputs: dict[str, str] = key({}, "see extract's teacher.outputs")
    precision: str = key("fp32", "see extract's teacher.precision", PRECISIONS)
    compile: bool = key(False, "see extract's teacher.compile")
    out: str = key("embeddings.npy", "X.npy and the names in X.txt, or Kaldi's X.ark and X.scp")
    batch_size: int = key(
        32,
        "utterances in one batch; of different length only where padding does not change what the model gives",
        low=1,
        high=100_000,
    )
    workers: int = key(2, "threads that decode", low=1, high=1024)
    min_seconds: float = key(0.3, "shorter utterances are rejected (s)", low=0, high=100_000)
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)

    @property
    def frozen(self) -> ModelConfig:
        """The model to run."""
        return ModelConfig(self.model, self.weights, self.layer, self.input, self.outputs, self.precision, self.compile)


@dataclass
class ExportConfig:
    """What `spkd export` writes of a student, and the audio that it needs for that."""

    to: str = key("onnx", "format", EXPORTS)
    out: str = key("", "file to write, wespeaker: folder (default: in the student's folder, named after the format)")
    waveform: bool = key(False, "take the waveform: the features are computed within the graph")
    lengths: bool = key(False, "onnx: a second input, the lengths of the views of a padded batch")
    seconds: float = key(4.0, "litert: length that the graph takes (s), for it cannot change", low=0.3, high=60)
    calibration: str = key(
        "", "file of `spkd calibrate` that goes with the model (default: the one in the student's folder, if any)"
    )
    manifest: str = key("", "onnx-int8: manifest of the speech on which ranges are measured")
    speech: float = key(300.0, "onnx-int8: speech on which ranges are measured (s)", low=10, high=1e6)
    trials: str = key("", "trial list on which student and exported model are scored (onnx, onnx-int8)")
    trials_manifest: str = key("", "manifest of the trials' audio")
    url: str = key("", "of the model, for its metadata")
    licence: str = key("", "of the model, for its metadata")


@dataclass
class EnrolConfig:
    map: str | None = key(
        None, "enrolment map: lines `model utterance ...`, for trials whose enrolment side names a model"
    )
    model: str | None = key(
        None, "another model for the enrolment side, with embeddings of the same space: a student's own teacher"
    )
    weights: str | None = key(None, "weights of the teacher named by enrol.model")
    layer: int | None = key(None, "see extract's teacher.layer", low=0, high=1000)
    input: str = key("auto", "see extract's teacher.input", INPUTS)
    outputs: dict[str, str] = key({}, "see extract's teacher.outputs")

    def frozen(self, other: ModelConfig) -> ModelConfig | None:
        """The model of the enrolment side, which runs as the other does; None where it is the other."""
        if self.model is None:
            return None
        return ModelConfig(
            self.model, self.weights, self.layer, self.input, self.outputs, other.precision, other.compile
        )


@dataclass
class CohortConfig:
    source: str | None = key(
        None,
        "utterances of other speakers, a manifest or a cache of this very model: for norm, subtract_mean, backend=plda",
    )
    average: bool = key(True, "norm=as-norm: one mean embedding for each speaker, where the cohort has labels")
    top: int = key(300, "norm=as-norm: highest cohort scores of each side", low=2, high=10**7)


@dataclass
class ScoringConfig(EmbedConfig):
    """How trials are scored."""

    manifest: str = key(MANIFEST, "manifest of the trials' audio")
    format: str = key("auto", "trial format: `1 a b`, `a b target` or `a b`", ("auto", "voxceleb", "kaldi", "plain"))
    enrol: EnrolConfig = section(EnrolConfig)
    backend: str = key("cosine", "score of two embeddings; plda is trained on the cohort", ("cosine", "plda"))
    subtract_mean: bool = key(False, "subtract the cohort's mean embedding")
    norm: str = key("none", "score normalisation over the cohort", ("none", "as-norm"))
    cohort: CohortConfig = section(CohortConfig)


@dataclass
class EvalConfig(ScoringConfig):
    out: str = key("eval", "folder of scores.txt, report.json and report.html")
    calibration: str | None = key(None, "file that `spkd calibrate` wrote: scores become log-likelihood ratios")
    llr: bool = key(False, "the scores of --scores are log-likelihood ratios (natural logarithm)")
    points: list[str] = key(["0.01", "0.05"], "points of minDCF and actDCF: P_TARGET or P_TARGET:C_MISS:C_FALSE_ALARM")
    false_accept: list[float] = key([0.01, 0.001], "false-alarm rates whose thresholds are given", low=0, high=1)
    by: list[str] = key([], "columns of the manifest by which results are broken down, e.g. [gender,duration]")
    bootstrap: int = key(1000, "resamplings of the speakers for confidence intervals (0: none)", low=0, high=10**6)
    worst: int = key(10, "trials of each kind listed as the worst", low=0, high=1000)
    audio: bool = key(False, "put the audio of the worst trials into the report")
    seed: int = key(0, "seed of the resampling", low=0, high=MAX_SEED)


@dataclass
class CalibrateConfig(ScoringConfig):
    out: str = key("", "file to write (default: calibration.json in the student's folder)")
    quality: list[str] = key(
        [],
        "quality measures beside the scores: duration, magnitude of the embedding, number of enrolment utterances, "
        "mean cohort score",
        ("duration", "magnitude", "enrolments", "cohort"),
    )
    p_target: float = key(0.05, "prior of a target trial for which the calibration is best", low=1e-6, high=0.999999)


COMMANDS = {
    "extract": ExtractConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "calibrate": CalibrateConfig,
    "embed": EmbedConfig,
    "export": ExportConfig,
}
BORROWED = (VerifyConfig, CacheExportConfig)  # read the section of extract, as far as it concerns them

# Keys of earlier versions: an error names what to write instead.
RENAMED = {
    "labelled": "finetune_cache",
    "losses": "loss",
    "fbank_kind": "features",
    "student.fbank_kind": "student.features",
    "mining.over": "mining.embeddings",
    "optim.average": "optim.swa_fraction",
    "loss.margin": "loss.aam.margin (or loss.kld.margin, loss.nontarget.margin)",
    "loss.margin_rise": "loss.aam.margin_warmup (or loss.kld.margin_warmup, loss.nontarget.margin_warmup)",
    "loss.scale": "loss.aam.scale (or loss.kld.scale, loss.nontarget.scale)",
    "loss.subcentres": "loss.aam.subcentres",
    "loss.kd_temperature": "loss.kld.temperature (or loss.nontarget.temperature)",
    "loss.kd_rise": "loss.kld.kd_warmup (or loss.nontarget.kd_warmup)",
    "loss.gamma": "loss.nontarget.gamma",
    "loss.teacher_margin": "loss.kld.teacher_margin (or loss.nontarget.teacher_margin)",
    "loss.logits": "loss.kld.logits (or loss.nontarget.logits)",
    "loss.temperature": "loss.contrastive.temperature (or loss.ntxent.temperature)",
    "loss.ceiling": "loss.contrastive.ceiling",
    "loss.levels": "loss.multilevel.levels",
    "loss.concat": "loss.multilevel.concat",
    "loss.distance": "loss.multilevel.distance",
    "loss.level_weights": "loss.multilevel.level_weights",
    "loss.one_step.over_time": "loss.one_step.time_reduction",
    "loss.one_step.fade": "loss.one_step.linear_decay",
    "loss.one_step.tuning": "loss.one_step.finetune_weight",
    "loss.memo.teacher_rise": "loss.memo.teacher_temperature_warmup",
    "loss.memo.head_frozen": "loss.memo.frozen_prototypes",
    "loss.memo.teacher": "loss.memo.teacher_weight",
    "loss.memo.cross": "loss.memo.cross_weight",
    "loss.memo.contrastive": "loss.memo.contrastive_weight",
}


@dataclass(frozen=True)
class Key:
    """One settable key: dotted name, type, default, meaning, and the limits of its values."""

    name: str
    type: Any
    default: Any
    meaning: str
    limits: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The type as --help prints it."""
        return self.type.__name__ if isinstance(self.type, type) and "[" not in str(self.type) else str(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self.limits.get("choices", ()))

    def read(self, given: Given, name: str) -> Any:
        """The value that a user gave. Raises UsageError where it is not one that the key takes."""
        value, is_list = given.value, self.kind.startswith("list")
        if (
            isinstance(value, str)
            and value.startswith("[" if is_list else "{")
            and isinstance(self.default, list | dict)
        ):
            value = _yaml(value, given.where)
        value = [value] if is_list and not isinstance(value, list) else value
        try:
            return convert(self.type, value, self.limits, given.where, text=True)
        except (ValueError, SpkdError) as error:
            raise UsageError(f"{given.where}: {name} {error}") from error


def keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every settable key of a settings dataclass, depth first."""
    hints = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(cast(type, kind), f"{prefix}{f.name}.")
        elif "hidden" not in f.metadata:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            yield Key(prefix + f.name, kind, default, f.metadata["meaning"], f.metadata)


def recipes() -> list[str]:
    """Names of the recipes that come with spkd."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
        UsageError: no such recipe.
    """
    if name not in recipes():
        raise UsageError(f"--recipe {name}{did_you_mean(name, recipes())} (there are {', '.join(recipes())})")
    return RECIPES / f"{name}.yaml"


def load(
    schema: type[Schema],
    overrides: Sequence[str] = (),
    file: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    base: str | Path | None = None,
) -> Schema:
    """Settings of one command from defaults, recipe, file, environment and `key=value` overrides.

    Args:
        file: a YAML file; None takes ./spkd.yaml where there is one. Shared keys are at its top level,
            a command's own keys under `extract:`, `train:` or `eval:`.
        base: name of a recipe, or a file of settings that all others precede.
    Raises:
        UsageError: an unknown key or a value of the wrong type or out of range, naming the nearest valid one.
    """
    known = {k.name: k for k in keys(schema)}
    values: dict[str, Any] = {name: k.default for name, k in known.items()}
    sections: dict[str, dict[str, Given]] = {}
    ready = [] if base is None else list(_from_file(schema, base if isinstance(base, Path) else recipe(base)))
    given = [*ready, *_from_file(schema, file), *_from_environment(known, environ), *_from_command_line(overrides)]
    for name, value in given:
        name = _full_name(schema, name)
        loss, _, rest = name.removeprefix("loss.").partition(".")
        if _set(values, known, name, value):
            continue
        if (old := _renamed(name)) is not None:
            raise UsageError(f"{value.where}: {old} is now {RENAMED[old]}")
        elif "loss.names" in known and name.startswith("loss.") and (chosen := _loss_of(loss)) is not None:
            # Each loss declares its own keys; they are read once it is known which losses run.
            tree = {rest: value.value} if rest else value.value
            if not isinstance(tree, dict):
                raise UsageError(f"{value.where}: {name} has keys of its own; see spkd train --losses")
            section_ = sections.setdefault(chosen, {})
            section_ |= {str(k): value._replace(value=v) for k, v in tree.items()}
        else:
            raise UsageError(f"{value.where}: unknown key {name!r}{_suggestion(name, known)}")
    if "loss.names" in known:
        values["loss.sections"] = sections
    return cast(Schema, _assembled(schema, values))


def dump(settings: Any) -> str:
    """Settings of a command as the text of a settings file: those that are not the defaults."""
    import yaml

    command = next(name for name, kind in COMMANDS.items() if kind is type(settings))
    tree: dict[str, Any] = {}
    for one in keys(type(settings)):
        owner, *path = settings, *one.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        if owner != one.default:
            _put(tree, one.name.split("."), owner)
    for name, section_ in settings.loss.sections.items() if hasattr(settings, "loss") else ():
        for key_, given in section_.items():
            _put(tree, ["loss", name.replace("-", "_"), key_], given.value)
    return str(yaml.safe_dump({command: tree}, sort_keys=False, allow_unicode=True))


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def fill(schema: type[Schema], prefix: str, given: Mapping[str, Given]) -> Schema:
    """A section's dataclass from the values that a user gave for its keys; `prefix` names it in errors."""
    known = {k.name: k for k in keys(schema)}
    values: dict[str, Any] = {name: k.default for name, k in known.items()}
    for name, value in given.items():
        full = f"{prefix}.{name}"
        if (old := _renamed(full)) is not None:
            raise UsageError(f"{value.where}: {old} is now {RENAMED[old]}")
        if not _set(values, known, name, value, full):
            raise UsageError(f"{value.where}: unknown key {full!r}{did_you_mean(name, known)}")
    return cast(Schema, _assembled(schema, values))


def _set(values: dict[str, Any], known: Mapping[str, Key], name: str, given: Given, shown: str | None = None) -> bool:
    """Read a value of a key, or of one item of a mapping (`storage.codecs.frames`). Returns whether there is such a
    key; `shown` names it in errors."""
    if name in known:
        values[name] = known[name].read(given, shown or name)
        return True
    owner = next((k for k in known if name.startswith(f"{k}.") and isinstance(known[k].default, dict)), None)
    if owner is None:
        return False
    item = given._replace(value={name.removeprefix(f"{owner}."): given.value})
    values[owner] = values[owner] | known[owner].read(item, shown or owner)
    return True


def _loss_of(section: str) -> str | None:
    """The loss whose settings a section holds: `loss.one_step` belongs to one-step."""
    return next((name for name in LOSSES if name.replace("-", "_") == section.replace("-", "_")), None)


def _renamed(name: str) -> str | None:
    """The former key that a name is, or is an item of; None where it is none."""
    return next((old for old in RENAMED if name == old or name.startswith(f"{old}.")), None)


def _suggestion(name: str, known: Iterable[str]) -> str:
    """The key that was probably meant: one whose last part is the word (`lr`: optim.lr), or the nearest spelling."""
    ending = [k for k in known if k.rsplit(".", 1)[-1] == name]
    return f"; did you mean {' or '.join(map(repr, ending))}?" if 0 < len(ending) <= 3 else did_you_mean(name, known)


def _assembled(schema: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass that dotted names and values describe."""
    hints = get_type_hints(schema)
    return schema(
        **{
            f.name: _assembled(cast(type, hints[f.name]), values, f"{prefix}{f.name}.")
            if dataclasses.is_dataclass(hints[f.name])
            else values[prefix + f.name]
            for f in dataclasses.fields(schema)
        }
    )


def _full_name(schema: type, name: str) -> str:
    """`teacher` -> `teacher.name`: a section given a plain value sets its first key."""
    node = schema
    for part in name.split("."):
        hints = get_type_hints(node)
        kind = hints.get(part)
        if kind is None or not dataclasses.is_dataclass(kind):
            return name
        node = cast(type, kind)
    return f"{name}.{dataclasses.fields(node)[0].name}"


def _from_command_line(overrides: Sequence[str]) -> Iterator[tuple[str, Given]]:
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{item!r} is not key=value")
        yield name, Given(item, text, True)


def _from_environment(known: Iterable[str], environ: Mapping[str, str]) -> Iterator[tuple[str, Given]]:
    names = {f"SPKD_{name.replace('.', '__').upper()}": name for name in known}
    for variable, text in environ.items():
        if variable in names:
            yield names[variable], Given(variable, text, True)
        elif variable.startswith("SPKD_LOSS__") and "loss.names" in known:
            yield variable.removeprefix("SPKD_").replace("__", ".").lower(), Given(variable, text, True)


def _yaml(text: str, where: str) -> Any:
    """YAML whose scalars all stay text: a key's type says what they are. No tag is honoured."""
    import yaml

    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200] if isinstance(error, yaml.YAMLError) else "nested too deep"
        raise UsageError(f"{where}: not valid YAML: {problem}") from error


def _from_file(schema: type, file: str | Path | None) -> Iterator[tuple[str, Given]]:
    if file is None:
        if not Path("spkd.yaml").is_file():
            return
        file = "spkd.yaml"
    tree = _read_yaml(Path(file))
    shared = {k: v for k, v in tree.items() if k not in COMMANDS}
    everywhere = {f.name for s in (*COMMANDS.values(), *BORROWED) for f in dataclasses.fields(s)}
    here = {f.name for f in dataclasses.fields(schema)}
    for name in shared:
        if name in RENAMED:
            raise UsageError(f"{file}: {name} is now {RENAMED[name]}")
        if name not in everywhere:
            raise UsageError(f"{file}: unknown key {name!r}{did_you_mean(str(name), everywhere)}")
    own = next((name for name, kind in COMMANDS.items() if kind is schema), "extract")
    layers = [{k: v for k, v in shared.items() if k in here}, tree.get(own) or {}]
    known = {k.name for k in keys(schema)}
    for layer in layers:
        if not isinstance(layer, dict):
            raise UsageError(f"{file}: {own}: expected `key: value` lines")
        for name, value in _flatten(schema, layer):
            if schema not in BORROWED or _full_name(schema, name) in known:
                yield name, Given(str(file), value, False)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file() and file.exists():
            raise UsageError(f"{file}: not a regular file")
        if file.stat().st_size > MAX_YAML:
            raise UsageError(f"{file}: larger than any settings file")
        text = file.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"no settings file {file}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{file}: cannot be read as text ({error})") from error
    tree = _yaml(text, str(file)) or {}
    if not isinstance(tree, dict) or not all(isinstance(k, str) for k in tree):
        raise UsageError(f"{file}: expected `key: value` lines")
    return tree


def _flatten(schema: type, tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted (name, value) pairs; only sections are descended into, so that dict values stay whole."""
    hints = get_type_hints(schema)
    for name, value in tree.items():
        kind = hints.get(str(name))
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            yield from _flatten(cast(type, kind), value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
