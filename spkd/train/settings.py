"""Settings of `spkd train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spkd.config import Chooser, Settings, component, key, section
from spkd.corpus.settings import MAX_SEED, VAD, AugmentationConfig, FetchConfig
from spkd.errors import did_you_mean
from spkd.networks.settings import StudentConfig
from spkd.registry import LOSSES, OPTIMISERS, SAMPLERS
from spkd.teachers.settings import DEVICES, PRECISIONS

DEFAULT_AAM_WEIGHT = 0.3  # as in the recipe best-mini
NOT_COMPILED, GRAPHS = "false", "reduce-overhead"  # values of compile


@dataclass
class SGDSettings:
    """Settings of stochastic gradient descent with momentum 0.9."""

    nesterov: bool = key(True, "Nesterov momentum")


@dataclass
class OptimConfig(Chooser):
    """The optimiser and its learning rate."""

    name: str = key("adamw", "optimiser", OPTIMISERS)
    lr: float = key(2e-3, "peak learning rate", positive=True, high=1e12)
    final_lr: float = key(1e-5, "learning rate at the last step", positive=True, high=1e12)
    schedule: str = key(
        "cosine",
        "decay of the learning rate; a run with constant can be continued with more steps",
        ("cosine", "exponential", "constant"),
    )
    swa_fraction: float = key(
        0.0,
        "last fraction of the run whose weights are averaged into the student (0: none); with large_margin.steps, of "
        "these steps",
        low=0,
        high=1,
    )
    weight_decay: float = key(0.02, "weight decay", low=0, high=1e6)
    warmup: int = key(100, "steps of linear warm-up", low=0, high=10**9)
    clip: float = key(3.0, "largest gradient norm (0: no clipping)", low=0, high=1e12)
    clip_by: str = key(
        "network",
        "what is clipped to that norm: all gradients of a network together, or each tensor",
        ("network", "tensor"),
    )
    settings: Any = component(OPTIMISERS)

    def unused(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if self.schedule == "constant":
            reasons["final_lr"] = "optim.schedule=constant keeps the learning rate"
        if not self.clip:
            reasons["clip_by"] = "optim.clip=0 clips nothing"
        return reasons


@dataclass
class LossConfig(Chooser):
    """The losses of a run. Each has its own settings, `loss.NAME.KEY`."""

    names: list[str] = key(
        [],
        f"losses to add up, as --loss: {', '.join(LOSSES)} (default: contrastive, and where views have a speaker "
        f"label aam as well, at weight {DEFAULT_AAM_WEIGHT})",
    )
    weights: dict[str, float] = key({}, "weight of each loss, e.g. loss.weights.aam=0.5 (default 1)", low=0, high=1e9)
    final_weights: dict[str, float] = key(
        {}, "weight at the end of the run, reached linearly from loss.weights (default: constant)", low=0, high=1e9
    )
    settings: dict[str, Any] = component(LOSSES)

    def unused(self) -> dict[str, str]:
        given = [(kind, name) for kind in ("weights", "final_weights") for name in getattr(self, kind)]
        return {
            f"{kind}{{{name}}}": f"the loss {name} is not in use{did_you_mean(name, self.names)}"
            for kind, name in given
            if self.names and name not in self.names
        }


@dataclass
class MiningConfig:
    """Hard negatives and further positives, mined from the whole cache."""

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
    """SpecAugment."""

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

    def unused(self) -> dict[str, str]:
        if not self.steps:
            return dict.fromkeys(("crop", "margin", "lr", "final_lr"), "large_margin.steps is 0")
        return {"final_lr": "large_margin.steps=1 has large_margin.lr alone"} if self.steps == 1 else {}


@dataclass
class ValidConfig:
    trials: str | None = key(None, "trial list that is scored during training, of speakers of its own")
    manifest: str | None = key(None, "manifest of its audio")
    vad: str = key("none", VAD)
    every: int = key(500, "steps between two validations", low=1, high=10**9)
    patience: int = key(0, "validations without a lower EER after which training ends (0: never)", low=0, high=10**6)

    def unused(self) -> dict[str, str]:
        return {} if self.trials else dict.fromkeys(("manifest", "vad", "every", "patience"), "no valid.trials are set")


@dataclass
class SpeakersSettings:
    """Settings of batches with several views of each of their speakers."""

    views: int = key(2, "views of each speaker", low=1, high=10**6)


@dataclass
class SharesSettings:
    """Settings of batches with a share of each corpus."""

    shares: list[float] = key([], "share of each corpus of cache=[a,b], e.g. [0.5,0.5]", low=0, high=1)


@dataclass
class HardSettings:
    """Settings of batches of groups of neighbours."""

    group: int = key(4, "size of a group: a view and its neighbours among mining.neighbours", low=2, high=10**6)


@dataclass
class SamplerConfig(Chooser):
    """Choice of the views that share a batch."""

    name: str = key(
        "shuffled",
        "which views share a batch: any; several views of each of its speakers; views of similar length, whose "
        "crop is as long as the shortest; a share of each corpus; or groups of the teacher's neighbours",
        SAMPLERS,
    )
    settings: Any = component(SAMPLERS)


@dataclass
class AugmentConfig(AugmentationConfig):
    """Fresh augmentation of the student's input, with the teacher's cached targets; it needs the audio (manifest)."""

    speeds: list[float] = key([1.0], "speed factors, of which one is drawn; no frame targets", low=0.5, high=2.0)

    @property
    def is_used(self) -> bool:
        return super().is_used or self.speeds != [1.0]


@dataclass
class TrainConfig(Settings):
    COMMAND: ClassVar[str] = "train"
    HINTS: ClassVar[dict[str, str]] = {"model": "student", "view": "augment"}

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
    labels: str | None = key(
        None,
        "file with the columns utt,speaker, as `spkd cache cluster` writes it: its speakers take the place of those of "
        "the manifests; utterances that it lacks have no label",
    )
    class_means: bool = key(
        False,
        "replace each embedding of the teacher by its mean over the views of the same speaker or pseudo-speaker",
    )
    finetune_cache: list[str] = key(
        [], "one-step: caches of the labelled views for fine-tuning; default: the labelled views of cache"
    )
    manifest: str | None = key(None, "manifest of the audio; only needed when the cache holds no features")
    noise: str | None = key(None, "folder of the noise that augmented the cache's views; needed as manifest is")
    rir: str | None = key(None, "folder of the impulse responses of the cache's views; needed as manifest is")
    fetch: FetchConfig = section(FetchConfig)
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
    epochs: float | None = key(None, "passes over the views, instead of steps", positive=True, high=1e6)
    accumulate: int = key(1, "batches whose gradients make one step", low=1, high=10**6)
    large_margin: LargeMarginConfig = section(LargeMarginConfig)
    valid: ValidConfig = section(ValidConfig)
    sampler: SamplerConfig = section(SamplerConfig)
    augment: AugmentConfig = section(AugmentConfig)
    precision: str = key("fp32", "of the student's matrix products and convolutions (fp16: on a GPU)", PRECISIONS)
    compile: str = key(
        NOT_COMPILED,
        "compile the student for training (torch.compile): slow to start, faster on a GPU; with reduce-overhead a GPU "
        "also repeats its steps from CUDA graphs, without waiting for Python",
        (NOT_COMPILED, "true", GRAPHS),
    )
    channels_last: bool = key(False, "channels-last memory, faster for 2-d networks")
    loggers: list[str] = key(
        ["tensorboard"],
        "logs in addition to log.jsonl; wandb and trackio need their packages, and are not taken from a file",
        ("tensorboard", "wandb", "trackio"),
        not_from_files=("wandb", "trackio"),  # each sends the run to a server
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

    def unused(self) -> dict[str, str]:
        reasons = {}
        if len(self.cache) < 2:
            reasons["teachers"] = "one cache is given"
        if self.manifest is None:
            reasons |= dict.fromkeys(
                ("noise", "rir", "fetch.cache", "fetch.limit"), "no manifest is given, so no audio is decoded"
            )
        if self.epochs is not None:
            # Given later is given with precedence: on the command line, after a file.
            later = [name for name in self.given if name in ("steps", "epochs")][-1:]
            if later == ["steps"]:
                reasons["epochs"] = f"steps={self.steps} sets their number"
            else:
                reasons["steps"] = f"epochs={self.epochs:g} sets their number"
        return reasons | self._unused_mining()

    def _unused_mining(self) -> dict[str, str]:
        mining, hard = self.mining, self.sampler.name == "hard"
        reasons = {}
        if not (mining.negatives or mining.positives or hard):
            reason = "nothing is mined (mining.negatives, mining.positives, sampler=hard)"
            reasons = dict.fromkeys(("neighbours", "embeddings", "refresh", "nprobe", "floor"), reason)
        elif not (mining.negatives or hard):
            reasons["neighbours"] = "no negatives are mined (mining.negatives, sampler=hard)"
        if hard and not (mining.negatives or mining.positives):
            reasons |= dict.fromkeys(
                ("embeddings", "refresh"), "sampler=hard takes the teacher's neighbours throughout"
            )
        if not mining.positives:
            reasons.setdefault("floor", "no positives are mined (mining.positives)")
        if mining.embeddings != "student":
            reasons.setdefault("refresh", "the teacher's embeddings do not change (mining.embeddings=student)")
        return {f"mining.{name}": reason for name, reason in reasons.items()}


@dataclass
class ClusterConfig(Settings):
    COMMAND: ClassVar[str] = "cluster"

    centres: int = key(
        0,
        "clusters of k-means, whose centres are merged (0: 10,000, or each utterance by itself where there are no "
        "more); merging takes 16 bytes for each pair of them",
        low=0,
        high=200_000,
    )
    speakers: int = key(0, "clusters that remain after merging (0: as similarity says)", low=0, high=200_000)
    similarity: float | None = key(
        None,
        "merge while two clusters have a mean cosine of at least this (default: the cut with the largest mean "
        "silhouette)",
        low=-1,
        high=1,
    )
    smallest: int = key(
        1, "least utterances of a cluster; those of smaller ones are left out, and have no label", low=1, high=10**9
    )
    seed: int = key(0, "seed of k-means", low=0, high=2**31 - 1)

    def unused(self) -> dict[str, str]:
        return {"similarity": f"speakers={self.speakers} sets the number of clusters"} if self.speakers else {}
