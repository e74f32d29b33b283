"""Settings: one dataclass per command, `key=value` overrides in Hydra's style, YAML and environment below them.

Precedence, lowest first: the defaults here, a recipe, `spkd.yaml` (or `--config FILE`), environment variables
`SPKD_<KEY>` (dots as double underscores: `SPKD_TEACHER__WEIGHTS`), `key=value` on the command line.
A section given a plain value sets its first key: `teacher=wavlm` is `teacher.name=wavlm`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from spkd.errors import UsageError, did_you_mean

Schema = TypeVar("Schema")
COMMANDS = ("extract", "train", "eval")
RECIPES = Path(__file__).parent / "recipes"


def key(default: Any, meaning: str, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its meaning (shown by --help) and, where closed, its choices."""
    metadata = {"meaning": meaning, "choices": tuple(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    return field(default_factory=kind)


TEACHERS = ("dvector", "wavlm", "hubert", "wav2vec2", "checkpoint", "none")
STUDENTS = ("xvector", "etdnn", "ecapa", "resnet34", "campplus", "ssl", "tiny")
DEVICES = ("auto", "cuda", "mps", "cpu")


@dataclass
class TeacherConfig:
    name: str = key("dvector", "teacher family; none keeps only fbank, for training without a teacher", TEACHERS)
    weights: str | None = key(
        None,
        "weights: a file, a folder or a hub id; default: dvector takes the installed resemblyzer package, "
        "wavlm/hubert/wav2vec2 their public large models, checkpoint takes ./student",
    )
    targets: list[str] = key(["embedding"], "targets to keep, e.g. [embedding,frames.layer8]; see --targets")
    layer: int | None = key(None, "hidden layer pooled into the embedding of wavlm/hubert/wav2vec2 (default: the last)")


@dataclass
class ViewConfig:
    plan: str = key("full", "what the teacher hears: full | windows:SECONDS/HOP | crops:COUNT,SECONDS")
    speeds: list[float] = key([1.0], "speed factors; full and windows make one view per speed, crops draw one each")
    noise: str | None = key(
        None, "additive noise: a folder of audio files, or 'synthetic' (coloured noise, no data needed)"
    )
    noise_prob: float = key(0.6, "probability that a view gets noise, where noise is set")
    snr: list[float] = key([5.0, 20.0], "lowest and highest signal-to-noise ratio (dB)")
    rir: str | None = key(None, "reverberation: a folder of room impulse responses")
    rir_prob: float = key(0.3, "probability that a view is reverberated, where rir is set")
    seed: int = key(0, "seed of crop positions, speeds and augmentation")


@dataclass
class StorageConfig:
    codec: str = key(
        "float16",
        "how targets are stored: float16, float32, int8, sq8, sq6, sq4, pqMx8, opqMx8 (M parts); +zstd compresses",
    )
    codecs: dict[str, str] = field(
        default_factory=dict,
        metadata={"meaning": "targets stored otherwise, e.g. {frames.layer8: int8, logits: topk64}", "choices": ()},
    )
    unit_views: int = key(1024, "most views in one unit (the piece one worker fills and commits)")
    unit_seconds: float = key(1280.0, "most audio in one unit (s)")


@dataclass
class ExtractConfig:
    manifest: str = key("manifest.csv", "manifest of the audio (CSV, JSONL or Kaldi folder)")
    cache: str = key("cache", "folder of the teacher cache")
    teacher: TeacherConfig = section(TeacherConfig)
    view: ViewConfig = section(ViewConfig)
    fbank: bool = key(False, "also cache the student's 80-mel fbank of every view: training then needs no audio")
    wave: bool = key(False, "also cache the samples themselves, for students that hear the waveform (ssl)")
    storage: StorageConfig = section(StorageConfig)
    batch_size: int = key(32, "views in one teacher batch (views of equal length only, so nothing is padded)")
    workers: int = key(2, "threads that decode and augment")
    min_seconds: float = key(0.3, "shorter utterances are rejected (s)")
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU", DEVICES)


@dataclass
class StudentConfig:
    name: str = key("xvector", "architecture", STUDENTS)
    channels: int | None = key(None, "width (default: the architecture's own)")
    embedding: int = key(192, "embedding dimension")
    layers: int = key(2, "ssl: transformer layers")
    adapters: int = key(0, "ssl: width of the adapters beside the feed-forward layers, which one-step needs (0: none)")
    init: str | None = key(
        None,
        "weights to begin with: a student trained by spkd; for ssl also a transformers teacher (folder or hub id)",
    )


@dataclass
class OptimConfig:
    name: str = key("adamw", "optimiser", ("adamw", "sgd"))
    lr: float = key(2e-3, "peak learning rate")
    final_lr: float = key(1e-5, "learning rate at the last step")
    schedule: str = key("cosine", "how the learning rate falls", ("cosine", "exponential"))
    average: float = key(0.0, "fraction of the run, at its end, whose weights are averaged into the student (0: none)")
    weight_decay: float = key(0.02, "weight decay")
    warmup: int = key(100, "steps of linear warm-up")
    clip: float = key(3.0, "largest gradient norm (0: no clipping)")


@dataclass
class OneStepConfig:
    targets: list[str] = key(
        ["frames.layer4", "frames.layer8", "frames.layer12"], "teacher's frames that the path without adapters predicts"
    )
    distance: str = key("l1", "l1: mean |difference| - cosine * log sigmoid(cosine); mse", ("l1", "mse"))
    cosine: float = key(1.0, "weight of the cosine part of l1")
    over_time: str = key("mean", "the cosine part over the frames; the authors' code sums", ("mean", "sum"))
    weight: float = key(1.0, "weight of the distillation beside the fine-tuning")
    fade: bool = key(False, "let that weight fall linearly to 0 over the run")
    tuning: float = key(1.0, "weight of the fine-tuning (0: none, distillation alone, as DistilHuBERT)")
    classifier: str = key("aam", "of the fine-tuning path; aam takes loss.margin and loss.scale", ("aam", "softmax"))


@dataclass
class MeMoConfig:
    partner: str = key("resnet34", "the other architecture; none: one alone, which is DINO", (*STUDENTS, "none"))
    partner_channels: int | None = key(None, "width of the other architecture (default: its own)")
    locals: int = key(4, "short crops beside the two long ones (which are as long as crop)")
    local_crop: float = key(2.0, "length of the short crops (s)")
    prototypes: int = key(65536, "outputs of each head")
    hidden: int = key(2048, "width of the heads")
    bottleneck: int = key(256, "width of the heads before the prototypes")
    student_temperature: float = key(0.1, "temperature of the students' outputs")
    teacher_temperature: list[float] = key([0.04, 0.07], "temperature of the teachers' outputs, first and last")
    teacher_rise: float = key(0.2, "fraction of the run in which it rises from the one to the other")
    centre: float = key(0.9, "momentum of the centres")
    momentum: list[float] = key([0.996, 1.0], "momentum of the teachers, first and last")
    head_frozen: float = key(0.0067, "fraction of the run in which the prototypes learn nothing (one of 150 epochs)")
    cross: float = key(1.0, "weight of the cross mode")
    contrastive: float = key(1.0, "weight of the contrastive term, which stops by itself (0: none)")
    teacher: float = key(0.0, "weight of a third mode: contrast with the cached teacher's embeddings (0: none)")


@dataclass
class LossConfig:
    margin: float = key(0.2, "additive angular margin of aam, kld and nontarget (rad)")
    margin_rise: list[float] = key(
        [0.0, 0.0], "fractions of the run between which the margin rises from 0, exponentially; [0,0]: there at once"
    )
    scale: float = key(32.0, "scale of the student's cosine logits in aam, kld and nontarget")
    subcentres: int = key(1, "centres of each class in aam; the nearest counts")
    kd_temperature: float = key(1.0, "temperature of kld and nontarget")
    kd_rise: float = key(0.0, "fraction of the run in which the divergence of kld and nontarget gains its weight")
    gamma: float = key(2.0, "weight of the non-target part of nontarget")
    teacher_margin: float = key(0.2, "margin put on the teacher's own cosine logits in kld and nontarget (rad)")
    logits: str = key(
        "auto",
        "the teacher's logits: of its own head, or cosines to its mean embedding of each training class; auto takes "
        "the head where it knows every class",
        ("auto", "head", "prototypes"),
    )
    temperature: float = key(0.05, "temperature of contrastive and ntxent")
    ceiling: float | None = key(
        None,
        "contrastive skips negatives whose teacher cosine to the positive exceeds this (same voice?); default: 0.95, "
        "or above 99 % of different voices where the teacher finds even those more alike",
    )
    levels: dict[str, str] = field(
        default_factory=lambda: {"embedding": "embedding"},
        metadata={
            "meaning": "multilevel: student level -> target, e.g. {frames: frames, stats: stats, embedding: embedding}",
            "choices": (),
        },
    )
    concat: list[str] = key([], "multilevel: targets whose concatenation the student's embedding learns, besides")
    distance: str = key("cosine", "multilevel: 1 - cosine, or mse (mean over the numbers)", ("cosine", "mse"))
    level_weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"meaning": "multilevel: weight of a student level, or of concat (default 1)", "choices": ()},
    )
    one_step: OneStepConfig = section(OneStepConfig)
    memo: MeMoConfig = section(MeMoConfig)
    weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"meaning": "weight of each loss, e.g. loss.weights.aam=0.5 (default 1)", "choices": ()},
    )


@dataclass
class MiningConfig:
    negatives: int = key(0, "hard negatives of each view, mined from the whole cache, for contrastive (0: none)")
    neighbours: int = key(64, "nearest voices from which they are drawn")
    over: str = key("teacher", "whose embeddings say which voices are near", ("teacher", "student"))
    refresh: int = key(500, "over=student: steps between two searches, done in the background")
    nprobe: int = key(32, "lists that are searched where the index is approximate (above 100,000 voices)")


@dataclass
class MaskConfig:
    frames: int = key(20, "widest time mask (frames of 10 ms; 0: none)")
    bands: int = key(10, "widest frequency mask (mel bands; 0: none)")


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
    labelled: list[str] = key(
        [], "one-step: caches of the labelled views that fine-tune; default: the labelled views of cache"
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
    crop: float = key(2.0, "student crop (s) of views longer than this; shorter views are repeated")
    batch_size: int = key(64, "views in one step")
    steps: int = key(2000, "training steps")
    save_every: int = key(500, "steps between checkpoints of the training state, from which a run resumes")
    workers: int = key(2, "loader processes, used when audio has to be decoded")
    seed: int = key(0, "seed of weights, order, crops and masks")
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU", DEVICES)


@dataclass
class EvalConfig:
    manifest: str = key("manifest.csv", "manifest of the trials' audio")
    model: str = key("student", "folder of the student checkpoint, or a teacher family (then see weights)")
    weights: str | None = key(None, "weights of the teacher named by model; see extract's teacher.weights")
    layer: int | None = key(None, "layer pooled by wavlm/hubert/wav2vec2 (default: the last)")
    out: str = key("eval", "folder of scores.txt, report.json and report.html")
    format: str = key("auto", "trial format: `1 a b`, `a b target` or `a b`", ("auto", "voxceleb", "kaldi", "plain"))
    batch_size: int = key(32, "utterances in one batch (of equal length only, so nothing is padded)")
    workers: int = key(2, "threads that decode")
    min_seconds: float = key(0.3, "shorter utterances are rejected (s)")
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU", DEVICES)


@dataclass(frozen=True)
class Key:
    """One settable key: dotted name, type, default and meaning, as --help prints it."""

    name: str
    kind: str
    default: Any
    meaning: str
    choices: tuple[str, ...]


def keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every settable key of a settings dataclass, depth first."""
    hints = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(cast(type, kind), f"{prefix}{f.name}.")
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        name = kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)
        yield Key(prefix + f.name, name, default, f.metadata["meaning"], f.metadata["choices"])


def recipes() -> list[str]:
    """Names of the recipes that come with spkd."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe(name: str) -> tuple[Path, list[str]]:
    """The file of a recipe, and its losses.

    Raises:
        UsageError: no such recipe.
    """
    import yaml

    if name not in recipes():
        raise UsageError(f"--recipe {name}{did_you_mean(name, recipes())} (there are {', '.join(recipes())})")
    file = RECIPES / f"{name}.yaml"
    return file, yaml.safe_load(file.read_text())["losses"]


def load(
    schema: type[Schema],
    overrides: Sequence[str] = (),
    file: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    base: str | None = None,
) -> Schema:
    """Settings of one command from defaults, recipe, file, environment and `key=value` overrides.

    Args:
        file: a YAML file; None takes ./spkd.yaml where there is one. Shared keys stand at its top level,
            a command's own keys under `extract:`, `train:` or `eval:`.
        base: name of a recipe.
    Raises:
        UsageError: an unknown key or a value of the wrong type, naming the nearest valid one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = {k.name: k for k in keys(schema)}
    config = OmegaConf.structured(schema)
    ready = [] if base is None else list(_from_file(schema, recipe(base)[0]))
    given = [*ready, *_from_file(schema, file), *_from_environment(known, environ), *_from_command_line(overrides)]
    for where, name, value in given:
        name = _full_name(schema, name)
        if name not in known and not any(name.startswith(k + ".") and known[k].kind.startswith("dict") for k in known):
            raise UsageError(f"{where}: unknown key {name!r}{did_you_mean(name, known)}")
        if name in known and known[name].kind.startswith("list") and not isinstance(value, list):
            value = [value]
        try:
            OmegaConf.update(config, name, value, merge=False)
        except OmegaConfBaseException as error:
            expected = known[name].kind if name in known else "float"
            raise UsageError(f"{where}: {name}={value!r} is not a valid {expected}") from error
        choices = known[name].choices if name in known else ()
        if choices and value not in choices:
            raise UsageError(f"{where}: {name}={value!r}{did_you_mean(str(value), choices)}")
    return cast(Schema, OmegaConf.to_object(config))


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


def _from_command_line(overrides: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    import yaml

    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{item!r} is not key=value")
        try:
            yield item, name, yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{item!r}: the value is not valid YAML") from error


def _from_environment(known: Mapping[str, Key], environ: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    import yaml

    for name in known:
        variable = "SPKD_" + name.replace(".", "__").upper()
        if variable in environ:
            yield variable, name, yaml.safe_load(environ[variable])


def _from_file(schema: type, file: str | Path | None) -> Iterator[tuple[str, str, Any]]:
    import yaml

    if file is None:
        if not Path("spkd.yaml").is_file():
            return
        file = "spkd.yaml"
    try:
        tree = yaml.safe_load(Path(file).read_text()) or {}
    except FileNotFoundError as error:
        raise UsageError(f"no settings file {file}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{file}: expected `key: value` lines")
    command = schema.__name__.removesuffix("Config").lower()
    shared = {k: v for k, v in tree.items() if k not in (*COMMANDS, "losses")}
    everywhere = {f.name for s in (ExtractConfig, TrainConfig, EvalConfig) for f in dataclasses.fields(s)}
    here = {f.name for f in dataclasses.fields(schema)}
    for name in shared:
        if name not in everywhere:
            raise UsageError(f"{file}: unknown key {name!r}{did_you_mean(str(name), everywhere)}")
    layers = ({k: v for k, v in shared.items() if k in here}, tree.get(command) or {})
    for layer in layers:
        for name, value in _flatten(schema, layer):
            yield str(file), name, value


def _flatten(schema: type, tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted (name, value) pairs; only sections are descended into, so that dict values stay whole."""
    hints = get_type_hints(schema)
    for name, value in tree.items():
        kind = hints.get(str(name))
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            yield from _flatten(cast(type, kind), value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
