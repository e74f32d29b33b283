"""Checks of a run against its cache and its settings, before the first batch."""

from __future__ import annotations

import contextlib
import shlex
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from spkd.cache import CacheSource
from spkd.corpus.settings import SEVERAL, ViewConfig
from spkd.corpus.vad.base import NONE, SEGMENTS
from spkd.corpus.view import ViewPlan, unused_folders
from spkd.errors import SpkdError, UsageError, listed
from spkd.files.text import counted
from spkd.outputs.features import FBANKS, FEATURES, is_fbank
from spkd.outputs.target import CODES, EMBEDDING, LOGITS, Target
from spkd.progress import log
from spkd.registry import DETECTORS, LOSSES, STUDENTS, section_of
from spkd.students import is_of_library, make_student
from spkd.train import mining
from spkd.train.distributed import ProcessGroup, launched
from spkd.train.losses.base import ChosenLoss
from spkd.train.losses.chosen import for_teachers
from spkd.train.losses.settings import CodebookSettings
from spkd.train.settings import GRAPHS, TrainConfig, ValidConfig
from spkd.train.teacher_logits import TeacherLogits

SEEN_WITHIN = 60.0  # s after which every machine sees a new file on a shared file system (NFS keeps folders so long)


def stored_targets(loss: ChosenLoss, logits: TeacherLogits | None) -> list[str]:
    """Names of the cached targets that a loss needs; for logits, the target from which they are computed."""
    return [logits.source if name == LOGITS and logits is not None else name for name in loss.needed_targets]


def check_labels(cache: CacheSource, losses: dict[str, ChosenLoss], file: str | None = None) -> None:
    """Check that the cache has the speaker labels that the losses need.

    Args:
        file: file of the labels; None: they are those of the manifest.
    Raises:
        SpkdError: a loss needs the speaker of every view and some are unknown, or it needs some and all are unknown.
    """
    if cache.labelled:
        return
    views = cache.usable_views[:]
    known = int((cache.speaker(views) >= 0).sum())
    for name, loss in losses.items():
        if loss.kind.needs_labels == "some" and known:
            log(f"{name}: {known:,} of {counted(len(views), 'view')} have a speaker label; it learns from those")
        elif loss.kind.needs_labels:
            lacking = f"the manifest of {cache.name} has utterances without"
            if file is not None:
                lacking = f"labels={file} has none for some utterances (spkd cache cluster smallest=1 leaves none out)"
            raise SpkdError(
                f"--loss {name} needs speaker labels, and {lacking}; "
                f"choose a loss without labels ({', '.join(n for n in LOSSES if not LOSSES[n].needs_labels)})"
            )


def check_targets(cache: CacheSource, losses: dict[str, ChosenLoss], logits: TeacherLogits | None) -> None:
    """Refuse a loss whose targets the cache lacks.

    Raises:
        SpkdError: a target is missing; the message has the `spkd extract` command that would make it.
        UsageError: the loss needs one teacher, and there are several; or it would take codes for vectors.
    """
    card, stored = cache.members[0].card, list(cache.names)
    for loss, suffix in for_teachers(losses, stored).values():
        needed = stored_targets(loss, logits)
        _check_vectors(loss, needed)
        missing = [name for name in needed if name + suffix not in stored]
        if missing and not suffix and any("@" in name for name in stored):
            raise UsageError(f"--loss {loss.name} needs one teacher; concatenate or average them (teachers=...)")
        coded = [name.removesuffix(CODES) for name in missing if name.endswith(CODES)]
        for name in coded:
            _check_codes(cache, loss.name, name, suffix)
        if missing:
            missing = [name.removesuffix(CODES) for name in missing]
            family = "NAME" if card.teacher.family == "none" else shlex.quote(card.teacher.family)
            kept = [name for name in stored if name not in FEATURES and not name.endswith(CODES)]
            targets = shlex.quote(f"teacher.targets=[{','.join([*kept, *missing])}]")
            codecs = "".join(f" {shlex.quote(f'storage.codecs={{{name}: rq8x8}}')}" for name in coded)
            command = f"spkd extract teacher={family}"
            raise SpkdError(
                f"--loss {loss.name} needs the target {', '.join(missing)}, which {cache.name} lacks; extract it: "
                f"{command} {targets}{codecs} {card.views.arguments} cache=NEW_FOLDER (its targets: {command} "
                "--targets)"
            )


def _check_vectors(loss: ChosenLoss, needed: Sequence[str]) -> None:
    """Refuse codes, which are numbers of entries in codebooks, where a loss takes vectors. Raises UsageError."""
    if any(name.endswith(CODES) for name in loss.kind.needs):
        return
    if coded := next((name for name in needed if name.endswith(CODES)), None):
        raise UsageError(
            f"--loss {loss.name}: {coded} are numbers of entries in codebooks, no vectors; name "
            f"{coded.removesuffix(CODES)}, or take --loss codebook"
        )


def _check_codes(cache: CacheSource, loss: str, name: str, suffix: str) -> None:
    """Refuse a target that the cache has, but not as codes of one codebook. Raises SpkdError."""
    if name + suffix not in cache.names:
        return
    if all(name + CODES in member.names for member in cache.members):
        raise SpkdError(
            f"--loss {loss} needs codes of one codebook, and the caches have several of {name}; train on one of them, "
            "or give teachers=separate for several teachers of one corpus"
        )
    raise SpkdError(
        f"--loss {loss} needs codes, and {cache.name} has {name} as {cache.target(name + suffix).codec}; extract it "
        f"with a codec that stores codes: {shlex.quote(f'storage.codecs={{{name}: rq8x8}}')}"
    )


def check_ranks(ranks: ProcessGroup, config: TrainConfig) -> None:
    """Check that a batch can be divided over the ranks of a run. Raises UsageError where it cannot."""
    if ranks.world > 1 and (config.batch_size % ranks.world or config.batch_size // ranks.world < 2):
        raise UsageError(f"batch_size={config.batch_size}: of all ranks together, so a multiple of {ranks.world}")


def check_shared(out: Path, ranks: ProcessGroup) -> None:
    """Check that the folder of a run is one and the same for all ranks.

    The first rank makes a file there, or in the nearest folder above it that exists. The others look for it.

    Raises:
        SpkdError: some do not see it; each would continue from a state of its own.
    """
    if ranks.world == 1:
        return
    folders, place, blind = [out.absolute(), *out.absolute().parents], "", ""
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            above = next(number for number, folder in enumerate(folders) if folder.is_dir())
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folders[above], prefix=".spkd-ranks-"))
            place = f"{above} {Path(file.name).name}"
        number, name = ranks.exchanged(place)[0].split()
        path, started = folders[min(int(number), len(folders) - 1)] / name, time.monotonic()
        while not path.exists():
            if time.monotonic() - started > SEEN_WITHIN:
                blind = f"rank {ranks.number} on {socket.gethostname()}"
                break
            time.sleep(SEEN_WITHIN / 100)
        without = list(filter(None, ranks.exchanged(blind)))
    if without:
        raise SpkdError(
            f"{out}: is another folder for {len(without)} of {ranks.world} ranks ({listed(without[:3])}); choose one "
            "that all machines share, with out=FOLDER"
        )


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


def note_validation(cache: CacheSource, valid: ValidConfig) -> None:
    """Log a note where validation takes other speech than the cache's views are of."""
    trained = sorted({NONE if m.card.views.vad is None else m.card.views.vad.detector for m in cache.members})
    here = valid.vad if valid.vad in (NONE, *DETECTORS) else SEGMENTS
    if valid.trials is not None and trained != [here]:
        log(f"note: the cache's views are with view.vad={listed(trained)}, validation is with valid.vad={valid.vad}")


def note_drawn(cache: CacheSource, config: TrainConfig) -> None:
    """Log a note where labels come from a file, and pseudo-speakers are not those of its speakers."""
    for member in cache.members if config.labels is not None else ():
        card = member.card.views
        if SEVERAL.fullmatch(card.plan) and len(card.speeds) * len(card.formants) > 1:
            log(
                f"note: {member.name}: view.plan={card.plan} draws pseudo-speakers for each speaker of the manifest, "
                f"and for each utterance without one, not for the speakers of labels={config.labels}; extract with "
                "view=full and lists of view.speeds and view.formants, so that all utterances have the same ones"
            )


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
    if is_of_library(config.student):
        reasons["student.channels"] = f"the width is that of {config.student.init}"
    if kind.name in cache.names and not config.augment.is_used:
        reason = f"the cache holds {kind.name}, and so no audio is decoded"
        reasons |= dict.fromkeys(("manifest", "noise", "rir", "fetch.cache", "fetch.limit", "workers"), reason)
    if not any(loss.settings.finetunes() for loss in losses.values()):
        reasons["finetune_cache"] = (
            f"{listed(list(losses))} {'does' if len(losses) == 1 else 'do'} not fine-tune; one-step does"
        )
    reasons |= _of_steps(steps_of(config, cache), config) | _of_losses(cache, losses, config)
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
    named, one = listed(list(losses)), len(losses) == 1
    if not any(loss.settings.has_margin() for loss in losses.values()):
        reasons["large_margin.margin"] = f"{named} {'has' if one else 'have'} no angular margin"
    if not launched():
        reasons |= dict.fromkeys(("loss.aam.sharded", "loss.one_step.aam.sharded"), "one rank has all classes")
    if config.mining.negatives and not any(loss.settings.contrasts() for loss in losses.values()):
        reasons["mining.negatives"] = "only contrastive takes hard negatives; add --loss contrastive"
    if config.mining.positives and not any(loss.settings.further_crops() for loss in losses.values()):
        reasons["mining.positives"] = "only ntxent and memo take further crops; add --loss ntxent"
    if config.class_means and not any(EMBEDDING in loss.needed_targets for loss in losses.values()):
        reasons["class_means"] = f"{named} {'learns' if one else 'learn'} nothing from the teacher's embeddings"
    elif config.class_means and (EMBEDDING not in cache.names or (cache.plan.speaker < 0).all()):
        reasons["class_means"] = "it needs one teacher's embeddings, and speaker labels"
    if not _use_labels(losses, config):
        reasons["labels"] = f"{named} {'learns' if one else 'learn'} from no labels; add --loss aam"
    if config.optim.swa_fraction and (averaging := [n for n, loss in losses.items() if loss.kind.averages_weights]):
        reasons["optim.swa_fraction"] = f"{averaging[0]} keeps a moving average of its own"
    for loss in losses.values():
        if isinstance(loss.settings, CodebookSettings):
            held = set(loss.settings.levels.values()) & set(cache.names)
            if held and all(cache.target(name).hop is None for name in held):
                reasons["loss.codebook.hop"] = "loss.codebook.levels names no frames"
    if config.student.nested and not any(loss.settings.on_embedding() for loss in losses.values()):
        names = ("student.nested", "student.nested_crops")
        reasons |= dict.fromkeys(names, f"{named} {'does' if one else 'do'} not act on the student's embedding")
    learned = {name for loss in losses.values() for name in loss.needed_targets}
    if config.augment.speeds != [1.0] and any(cache.target(n).hop is not None for n in learned & set(cache.names)):
        reasons["augment.speeds"] = "frames of the teacher do not follow another speed"
    return reasons


def _use_labels(losses: dict[str, ChosenLoss], config: TrainConfig) -> bool:
    """Whether anything in a run depends on labels."""
    return (
        config.class_means
        or config.mining.negatives > 0
        or config.sampler.name in ("speakers", "hard")
        or any(
            loss.kind.needs_labels
            or loss.settings.finetunes()
            or loss.settings.logits_request() is not None
            or (loss.settings.contrasts() and loss.settings.ceiling is None)  # measured on different speakers
            for loss in losses.values()
        )
    )


def steps_of(config: TrainConfig, cache: CacheSource) -> int:
    """Number of steps before large-margin fine-tuning, also where the settings name passes over the views."""
    if config.epochs is None:
        return config.steps
    per_epoch = max(len(cache.usable_views) // (config.batch_size * config.accumulate), 1)
    return max(round(config.epochs * per_epoch), 1)


def _of_steps(steps: int, config: TrainConfig) -> dict[str, str]:
    """Settings that have no effect on a run of so many steps, with the reasons."""
    optim, reasons = config.optim, dict[str, str]()
    decays = steps > 1 and (optim.schedule != "cosine" or optim.warmup < steps - 1)
    if not decays:
        reasons["optim.final_lr"] = f"{counted(steps, 'step')} with a warm-up of {optim.warmup:,} have no decay"
    phase = config.large_margin.steps or steps
    if (phase - 1) / phase <= 1.0 - optim.swa_fraction:
        of = "large_margin.steps" if config.large_margin.steps else counted(steps, "step")
        reasons["optim.swa_fraction"] = f"it holds no more than the last of {of}"
    return reasons


def note_warmup(config: TrainConfig) -> None:
    """Log a note where the warm-up is longer than the run."""
    optim = config.optim
    if optim.warmup > config.steps:
        log(
            f"note: optim.warmup={optim.warmup} is longer than the run ({counted(config.steps, 'step')}): the learning "
            f"rate rises to {optim.lr * config.steps / optim.warmup:.3g}, not to optim.lr={optim.lr:g}"
        )


def note_embedding(losses: dict[str, ChosenLoss]) -> None:
    """Log a note where no loss acts on the student's embedding, which then stays as it began."""
    if not any(loss.settings.on_embedding() for loss in losses.values()):
        log(
            f"note: {listed(list(losses))} {'acts' if len(losses) == 1 else 'act'} on other levels alone: the "
            "student's embedding is not trained; add a loss on it, such as --loss contrastive, or fine-tune with "
            "student.init"
        )


def note_graphs(config: TrainConfig, device: torch.device) -> None:
    """Log a note where CUDA graphs are asked for, and the device has none."""
    if config.compile == GRAPHS and device.type != "cuda":
        log(f"note: compile=reduce-overhead: CUDA graphs need device=cuda; on {device.type} it is compile=true")


def unused_margins(losses: dict[str, ChosenLoss], logits: TeacherLogits | None) -> dict[str, str]:
    """Margins of the losses over logits that have no effect with these logits, with the reasons."""
    over = [f"loss.{section_of(name)}" for name, loss in losses.items() if loss.settings.logits_request() is not None]
    if logits is None:
        return {}
    if (logits.label < 0).all():
        names = [f"{loss}.{key}" for loss in over for key in ("margin", "margin_warmup", "teacher_margin")]
        return dict.fromkeys(names, "no view has a label among the teacher's classes")
    if logits.scale is None:
        return {f"{loss}.teacher_margin": "the teacher's head is linear, without angles" for loss in over}
    return {}


def check_settings(cache: CacheSource, losses: dict[str, ChosenLoss], config: TrainConfig) -> None:
    """Check that the settings are compatible with one another, with the losses and with the cache.

    Raises:
        UsageError: they are not.
        SpkdError: the cache has too few usable views.
    """
    if config.compile == GRAPHS and config.sampler.name == "lengths":
        raise UsageError("compile=reduce-overhead: CUDA graphs have fixed shapes, which sampler=lengths changes")
    if not cache.random_access and any(loss.settings.further_crops() for loss in losses.values()):
        raise UsageError("these losses need several crops of each view, which a stream lacks; pull or import the cache")
    kind = _input_kind(config).name
    for name, loss in losses.items():
        if kind in loss.needed_targets:
            raise UsageError(f"--loss {name}: {kind} is the student's own input; choose targets of the teacher")
    if config.mining.positives and config.mining.embeddings == "student" and config.manifest is not None:
        raise UsageError("mining.positives: of the student's embeddings need cached features (fbank=true)")
    groups = config.sampler.name == "hard"
    if config.mining.negatives or config.mining.positives or groups:
        mining.check(cache, config.mining, groups)
    if len(cache.usable_views) < config.batch_size:
        raise SpkdError(
            f"{cache.name}: {counted(len(cache.usable_views), 'usable view')}, fewer than "
            f"batch_size={config.batch_size}; lower it, or extract more"
        )
