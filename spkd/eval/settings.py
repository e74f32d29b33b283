"""Settings of `spkd eval`, `spkd calibrate` and `spkd embed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spkd.config import Settings, key, section
from spkd.corpus.settings import MANIFEST, MAX_SEED, VAD, FetchConfig
from spkd.registry import TRIAL_FORMATS
from spkd.teachers.settings import DEVICES, EnrolModelConfig, ScoredModelConfig

ENROLMENTS = "enrolments"
QUALITY = ("duration", "speech", "magnitude", ENROLMENTS, "cohort")  # quality measures


@dataclass
class EmbedConfig(Settings):
    COMMAND: ClassVar[str] = "embed"
    HINTS: ClassVar[dict[str, str]] = {"teacher": "model", "student": "model"}

    model: ScoredModelConfig = section(ScoredModelConfig)
    out: str = key("embeddings.npy", "X.npy and the names in X.txt, or Kaldi's X.ark and X.scp", is_replaced=True)
    batch_size: int = key(
        32,
        "utterances in one batch; of different length only where padding does not change what the model gives",
        low=1,
        high=100_000,
    )
    workers: int = key(2, "threads, or in longer runs processes, that decode", low=1, high=1024)
    min_seconds: float = key(0.3, "shorter utterances are rejected (s)", low=0, high=100_000)
    vad: str = key("none", VAD)
    fetch: FetchConfig = section(FetchConfig)
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)


@dataclass
class EnrolConfig:
    """Settings of the enrolment side of trials."""

    map: str | None = key(
        None, "enrolment map: lines `model utterance ...`, for trials whose enrolment side names a model"
    )
    model: EnrolModelConfig = section(EnrolModelConfig)
    map_by: str | None = key(
        None, "folder of a map (`spkd map`) from the space of enrol.model to that of model, by which enrolments go"
    )

    def unused(self) -> dict[str, str]:
        return {} if self.model.name is not None else {"map_by": "no enrol.model is set, whose embeddings it maps"}


@dataclass
class CohortConfig:
    """Settings of the cohort: utterances of other speakers."""

    source: str | None = key(
        None,
        "utterances of other speakers, a manifest or a cache of this very model: for norm, subtract_mean, backend=plda",
    )
    average: bool = key(True, "norm=as-norm: one mean embedding for each speaker, where the cohort has labels")
    top: int = key(300, "norm=as-norm: highest cohort scores of each side", low=10, high=10**7)


@dataclass
class ScoringConfig(EmbedConfig):
    """Settings of the scoring of trials."""

    manifest: str = key(MANIFEST, "manifest of the trials' audio")
    format: str = key("auto", "format of the trial list", ("auto", *TRIAL_FORMATS))
    enrol: EnrolConfig = section(EnrolConfig)
    backend: str = key("cosine", "score of two embeddings; plda is trained on the cohort", ("cosine", "plda"))
    subtract_mean: bool = key(False, "subtract the cohort's mean embedding")
    norm: str = key("none", "score normalisation over the cohort", ("none", "as-norm"))
    cohort: CohortConfig = section(CohortConfig)

    def unused(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if self.norm == "none":
            reasons |= dict.fromkeys(("cohort.average", "cohort.top"), "no norm=as-norm")
        if self.backend == "plda":
            reasons["subtract_mean"] = "backend=plda subtracts the cohort's mean in any case"
        if self.norm == "none" and self.backend == "cosine" and not self.subtract_mean:
            reasons["cohort.source"] = "nothing uses a cohort (norm=as-norm, backend=plda, subtract_mean=true)"
        return reasons


@dataclass
class EvalConfig(ScoringConfig):
    COMMAND: ClassVar[str] = "eval"

    out: str = key("eval", "folder of scores.txt, report.json and report.html", is_replaced=True)
    calibration: str | None = key(None, "file that `spkd calibrate` wrote: scores become log-likelihood ratios")
    llr: bool = key(False, "the scores of --scores are log-likelihood ratios (natural logarithm)")
    points: list[str] = key(["0.01", "0.05"], "points of minDCF and actDCF: P_TARGET or P_TARGET:C_MISS:C_FALSE_ALARM")
    false_accept: list[float] = key([0.01, 0.001], "false-alarm rates whose thresholds are given", low=0, high=1)
    by: list[str] = key(
        [], "columns of the manifest, or speech (s, with vad), by which results are broken down, e.g. [gender,duration]"
    )
    bootstrap: int = key(1000, "resamplings of the speakers for confidence intervals (0: none)", low=0, high=10**6)
    worst: int = key(10, "trials of each kind listed as the worst", low=0, high=1000)
    audio: bool = key(False, "put the audio of the worst trials into the report")
    seed: int = key(0, "seed of the resampling", low=0, high=MAX_SEED)

    def unused(self) -> dict[str, str]:
        reasons = super().unused()
        if not self.bootstrap:
            reasons["seed"] = "bootstrap=0 draws nothing"
        if not self.worst:
            reasons["audio"] = "no trials are listed (worst=0)"
        if self.calibration is not None:
            reasons["llr"] = "a calibration gives log-likelihood ratios of any scores"
        return reasons


@dataclass
class CalibrateConfig(ScoringConfig):
    COMMAND: ClassVar[str] = "calibrate"

    out: str = key("", "file to write (default: calibration.json in the student's folder)", is_replaced=True)
    quality: list[str] = key(
        [],
        "quality measures next to the scores: duration, that of speech alone (with vad), magnitude of the embedding, "
        "number of enrolment utterances, mean cohort score",
        QUALITY,
    )
    p_target: float = key(0.05, "prior of a target trial for which the calibration is best", low=1e-6, high=0.999999)
    force: bool = key(False, "calibrate on fewer than 30 target or non-target trials")
