"""Checks of a run against its cache and its settings, before the first batch."""

from __future__ import annotations

from torch import nn

from spkd.cache import CacheSource
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan, unused_folders
from spkd.errors import SpkdError, UsageError
from spkd.outputs.features import FBANKS, FEATURES, is_fbank
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.progress import log
from spkd.registry import LOSSES, STUDENTS
from spkd.students import make_student
from spkd.train import mining
from spkd.train.distributed import ProcessGroup, launched
from spkd.train.losses.base import ChosenLoss
from spkd.train.losses.chosen import for_teachers
from spkd.train.settings import TrainConfig
from spkd.train.teacher_logits import TeacherLogits


def stored_targets(loss: ChosenLoss, logits: TeacherLogits | None) -> list[str]:
    """Names of the cached targets that a loss needs; for logits, the target from which they are computed."""
    return [logits.source if name == LOGITS and logits is not None else name for name in loss.needed_targets]


def check_labels(cache: CacheSource, losses: dict[str, ChosenLoss]) -> None:
    """Check that the cache has the speaker labels that the losses need.

    Raises:
        SpkdError: a loss needs the speaker of every view and some are unknown, or it needs some and all are unknown.
    """
    if cache.labelled:
        return
    views = cache.usable_views
    known = int((cache.speaker(views) >= 0).sum())
    for name, loss in losses.items():
        if loss.kind.needs_labels == "some" and known:
            log(f"{name}: {known:,} of {len(views):,} views have a speaker label; it learns from those")
        elif loss.kind.needs_labels:
            raise SpkdError(
                f"--loss {name} needs speaker labels, and the manifest of {cache.name} has utterances without; "
                f"choose a loss without labels ({', '.join(n for n in LOSSES if not LOSSES[n].needs_labels)})"
            )


def check_targets(cache: CacheSource, losses: dict[str, ChosenLoss], logits: TeacherLogits | None) -> None:
    """Refuse a loss whose targets the cache lacks.

    Raises:
        SpkdError: a target is missing; the message has the `spkd extract` command that would make it.
        UsageError: the loss needs one teacher, and there are several.
    """
    card, stored = cache.members[0].card, list(cache.names)
    for loss, suffix in for_teachers(losses, stored).values():
        missing = [name for name in stored_targets(loss, logits) if name + suffix not in stored]
        if missing and not suffix and any("@" in name for name in stored):
            raise UsageError(f"--loss {loss.name} needs one teacher; concatenate or average them (teachers=...)")
        if missing:
            family = "NAME" if card.teacher.family == "none" else card.teacher.family
            wanted = ",".join([*(t for t in stored if t not in FEATURES), *missing])
            raise SpkdError(
                f"--loss {loss.name} needs the target {', '.join(missing)}, which {cache.name} lacks; extract it: "
                f"spkd extract teacher={family} teacher.targets=[{wanted}] "
                f"view.plan={card.views.plan} cache=NEW_FOLDER (its targets: spkd extract teacher={family} --targets)"
            )


def check_ranks(ranks: ProcessGroup, config: TrainConfig) -> None:
    """Check that a batch can be divided over the ranks of a run. Raises UsageError where it cannot."""
    if ranks.world > 1 and (config.batch_size % ranks.world or config.batch_size // ranks.world < 2):
        raise UsageError(f"batch_size={config.batch_size}: of all ranks together, so a multiple of {ranks.world}")


def note_views(cache: CacheSource, recipe: ViewConfig) -> None:
    """Log a note where the cache has other views than the recipe extracts, such as whole utterances without
    pseudo-speakers."""
    for member in cache.members:
        card = member.card.views
        stored = ViewConfig(plan=card.plan, speeds=list(card.speeds), formants=list(card.formants))
        wanted = ViewConfig(plan=recipe.plan, speeds=recipe.speeds, formants=recipe.formants)
        if ViewPlan.parse(stored) == ViewPlan.parse(wanted):
            continue
        differing = [name for name in ("plan", "speeds", "formants") if getattr(stored, name) != getattr(wanted, name)]
        shown = ", ".join(f"view.{name}={_shown(getattr(stored, name))}" for name in differing)
        meant = ", ".join(f"view.{name}={_shown(getattr(wanted, name))}" for name in differing)
        lacking = ": its pseudo-speakers are not there" if _pseudo(wanted) > _pseudo(stored) else ""
        log(f"note: {member.name} has {shown}; the recipe is for {meant}{lacking}; extract them with the same --recipe")


def _pseudo(view: ViewConfig) -> int:
    """Number of pseudo-speakers per speaker: pairs of speed and formant factor other than those of the recording."""
    return len({(s, f) for s in view.speeds for f in view.formants} - {(1.0, 1.0)})


def _shown(value: str | list[float]) -> str:
    return value if isinstance(value, str) else f"[{','.join(f'{factor:g}' for factor in value)}]"


def without_effect(
    cache: CacheSource, finetune_cache: CacheSource | None, losses: dict[str, ChosenLoss], config: TrainConfig
) -> dict[str, str]:
    """Settings that have no effect on a run over these caches, with the reasons; see spkd.config.without_unused."""
    reasons: dict[str, str] = {}
    kind = _input_kind(config)
    if not is_fbank(kind):
        reasons |= dict.fromkeys(
            ("student.features", "mask.bands"), f"student={config.student.name} takes the waveform"
        )
    if kind.name in cache.names and not config.augment.is_used:
        reason = f"the cache holds {kind.name}, and so no audio is decoded"
        reasons |= dict.fromkeys(("manifest", "noise", "rir", "workers"), reason)
    if not any(loss.settings.finetunes() for loss in losses.values()):
        reasons["finetune_cache"] = f"{' and '.join(losses)} does not fine-tune; one-step does"
    reasons |= _of_losses(cache, losses, config)
    if config.channels_last and not any(isinstance(m, nn.Conv2d) for m in make_student(config.student).modules()):
        reasons["channels_last"] = f"student={config.student.name} has no 2-d convolutions"
    teachers = {(member.card.teacher.family, member.card.teacher.weights_sha256) for member in cache.members}
    if len(teachers) == 1:
        reasons["teachers"] = "the caches are of one teacher"
    sources = [cache] if finetune_cache is None else [cache, finetune_cache]
    reasons = unused_folders(member.card.views for source in sources for member in source.members) | reasons
    if len(cache.usable_views) <= mining.EXACT:
        reasons["mining.nprobe"] = f"the search of up to {mining.EXACT:,} instances is exact"
    return reasons


def _input_kind(config: TrainConfig) -> Target:
    """Input features of the student."""
    kind = STUDENTS[config.student.name].input_kind
    return FBANKS.get(config.student.features, kind) if is_fbank(kind) else kind


def _of_losses(cache: CacheSource, losses: dict[str, ChosenLoss], config: TrainConfig) -> dict[str, str]:
    """Settings that have no effect with the losses of a run, with the reasons."""
    reasons: dict[str, str] = {}
    named = " and ".join(losses)
    if not any(loss.settings.has_margin() for loss in losses.values()):
        reasons["large_margin.margin"] = f"{named} has no angular margin"
    if not launched():
        reasons |= dict.fromkeys(("loss.aam.sharded", "loss.one_step.aam.sharded"), "one rank has all classes")
    if config.mining.negatives and not any(loss.settings.contrasts() for loss in losses.values()):
        reasons["mining.negatives"] = "only contrastive takes hard negatives; add --loss contrastive"
    if config.mining.positives and not any(loss.settings.further_crops() for loss in losses.values()):
        reasons["mining.positives"] = "only ntxent and memo take further crops; add --loss ntxent"
    if config.class_means and not any(EMBEDDING in loss.needed_targets for loss in losses.values()):
        reasons["class_means"] = f"{named} learns nothing from the teacher's embeddings"
    elif config.class_means and (EMBEDDING not in cache.names or (cache.plan.speaker < 0).all()):
        reasons["class_means"] = "it needs one teacher's embeddings, and speaker labels"
    if config.optim.swa_fraction and (averaging := [n for n, loss in losses.items() if loss.kind.averages_weights]):
        reasons["optim.swa_fraction"] = f"{averaging[0]} keeps a moving average of its own"
    learned = {name for loss in losses.values() for name in loss.needed_targets}
    if config.augment.speeds != [1.0] and any(cache.target(n).hop is not None for n in learned & set(cache.names)):
        reasons["augment.speeds"] = "frames of the teacher do not follow another speed"
    return reasons


def check_settings(cache: CacheSource, losses: dict[str, ChosenLoss], config: TrainConfig) -> None:
    """Check that the settings are compatible with one another, with the losses and with the cache.

    Raises:
        UsageError: they are not.
        SpkdError: the cache has too few usable views.
    """
    if not cache.random_access and any(loss.settings.further_crops() for loss in losses.values()):
        raise UsageError("these losses need several crops of each view, which a stream lacks; pull or import the cache")
    kind = _input_kind(config).name
    for name, loss in losses.items():
        if kind in loss.needed_targets:
            raise UsageError(f"--loss {name}: {kind} is the student's own input; choose targets of the teacher")
    if config.mining.positives and config.mining.embeddings == "student" and config.manifest is not None:
        raise UsageError("mining.positives: of the student's embeddings need cached features (fbank=true)")
    if config.mining.negatives or config.mining.positives:
        mining.check(cache, config.mining)
    if len(cache.usable_views) < config.batch_size:
        raise SpkdError(
            f"{cache.name}: {len(cache.usable_views)} usable views, fewer than batch_size={config.batch_size}; lower "
            "it, or extract more"
        )
