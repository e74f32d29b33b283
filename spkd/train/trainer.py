"""`spkd train`: distil a student from a teacher cache."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from spkd.cache import CacheSource
from spkd.cache.plan import Plan
from spkd.config import chosen, without_unused
from spkd.corpus.people import Names, People
from spkd.corpus.settings import ViewConfig
from spkd.device import note_precision, resolve
from spkd.errors import Interrupted, SpkdError, UsageError, first_few, listed
from spkd.files.atomic import (
    check_holds_no_other,
    check_no_links,
    check_replaces_none,
    check_writable,
    writable_folder,
)
from spkd.files.text import counted
from spkd.meter import Meter
from spkd.networks.network import FRAME_LEVEL, count_macs, count_parameters
from spkd.outputs.target import LOGITS, Target
from spkd.progress import log, track
from spkd.students import Checkpoint, Network, load_student, make_student, remove_leftovers, save_student
from spkd.students.curves import LOG
from spkd.students.description import (
    DESCRIPTION,
    EARLIER,
    WEIGHTS,
    Best,
    Description,
    Training,
    record_of_export,
    training_of,
)
from spkd.students.description import FORMAT as MODEL_FORMAT
from spkd.train import mining, record, resume
from spkd.train.batches import BatchContent, CropPlan, StepBatches, ViewOrder
from spkd.train.caches import open_caches
from spkd.train.ceiling import mining_ceiling, with_ceilings
from spkd.train.checks import (
    check_labels,
    check_ranks,
    check_settings,
    check_shared,
    check_targets,
    note_drawn,
    note_embedding,
    note_graphs,
    note_validation,
    note_views,
    note_warmup,
    steps_of,
    stored_targets,
    unused_margins,
    without_effect,
)
from spkd.train.distributed import (
    ALONE,
    ProcessGroup,
    first_ranks,
    is_of_connection,
    mean_over_ranks,
    ranks_of,
    summed,
)
from spkd.train.label_file import put_labels
from spkd.train.labels import Labels, mean_embeddings
from spkd.train.loading import (
    BatchLoader,
    FinetunePath,
    TrainBatch,
    finetune_path,
    input_source,
    loader_killed,
    second_crop,
)
from spkd.train.log import BOARD, RunLog
from spkd.train.losses.base import ChosenLoss, LossContext
from spkd.train.losses.chosen import WeightedSum, chosen_losses, default_losses, for_teachers
from spkd.train.mining import NEGATIVES, POSITIVES, Miner
from spkd.train.module import TrainingModule
from spkd.train.samplers import SamplerContext, make_order
from spkd.train.settings import TrainConfig, ValidConfig
from spkd.train.speed import WARM_UP, Speed, in_words
from spkd.train.step import Optimisation
from spkd.train.stopping import BestValidation, stop_request
from spkd.train.teacher_logits import TeacherLogits, teacher_logits

PAGE_EVERY = 60.0  # s: drawing curves takes a second, too long for every one of frequent saves
BEST = "best"  # folder within that of the run, for the student with the lowest validation error


class Validate(Protocol):
    """Function that scores a student: network -> EER (%).

    Attributes:
        utterances: ids of the utterances of its trials.
        digest: digest of its trials, in any order.
        measures: digest of all that its rates depend on beside the student: its trials, and what finds their speech.
    """

    speakers: frozenset[str]
    utterances: frozenset[str]
    digest: str
    measures: str

    def __call__(self, network: Network) -> float: ...


@dataclass
class Result:
    """Result of a finished run.

    Attributes:
        terms: mean of each loss term over the last tenth of the run.
        best: best validation; None without validation.
    """

    out: Path
    parameters: int
    terms: dict[str, float]
    best: Best | None = None

    def line(self) -> str:
        """Result in a line."""
        terms = ", ".join(f"{name} {value:.4f}" for name, value in self.terms.items())
        best = self.best
        lowest = "" if best is None else f"; lowest EER {best.valid_eer_percent:.3f} % after {best.step} steps"
        return f"{self.out}: {self.parameters:,} parameters; mean of the last steps: {terms}{lowest}"

    def to_json(self) -> dict[str, Any]:
        """Result as JSON, for sweepers."""
        best = self.best
        lowest = {} if best is None else {"valid_eer_percent": best.valid_eer_percent, "best_step": best.step}
        return {"out": str(self.out), "parameters": self.parameters, "terms": self.terms, **lowest}


class Opened(NamedTuple):
    """Inputs of a run, and its settings without those that have no effect; see `Task`."""

    config: TrainConfig
    losses: dict[str, ChosenLoss]
    cache: CacheSource
    finetune_cache: CacheSource | None
    labels: Labels
    logits: TeacherLogits | None


@dataclass(frozen=True)
class Task:
    """Checked inputs of a run, before its modules are built.

    Attributes:
        logits: teacher logits, where a loss learns from them.
        finetune_cache: cache of the second path, if any.
    """

    config: TrainConfig
    device: torch.device
    losses: dict[str, ChosenLoss]
    cache: CacheSource
    finetune_cache: CacheSource | None
    labels: Labels
    logits: TeacherLogits | None

    @property
    def caches(self) -> list[CacheSource]:
        """The caches of both paths."""
        return [cache for cache in (self.cache, self.finetune_cache) if cache is not None]

    @property
    def plans(self) -> list[Plan]:
        return [cache.plan for cache in self.caches]

    @cached_property
    def teacher_people(self) -> People:
        """People that the teachers were trained on, as far as spkd trained them."""
        cards = [member.card.teacher_people for cache in self.caches for member in cache.members]
        return functools.reduce(People.with_those_of, cards, _before(self.config).teacher_people)


@dataclass
class Run:
    """State that the steps of a run share.

    Attributes:
        speakers: names of the student's classes.
        settings: settings that identify the run.
        validate: function that scores a student, where the settings ask for validation.
        recent: loss terms of the last tenth of the steps, on the device.
        drawn: time at which the page was last written (s of the monotonic clock).
    """

    task: Task
    out: Path
    module: TrainingModule
    optimisation: Optimisation
    loader: BatchLoader
    speakers: list[str]
    ranks: ProcessGroup = ALONE
    settings: dict[str, Any] = field(default_factory=dict)
    validate: Validate | None = None
    best: BestValidation = field(default_factory=BestValidation)
    recent: deque[dict[str, Tensor]] = field(default_factory=deque)
    drawn: float = field(default_factory=time.monotonic)

    @property
    def config(self) -> TrainConfig:
        return self.task.config

    @property
    def device(self) -> torch.device:
        return self.task.device

    @cached_property
    def people(self) -> People:
        """Speakers and utterances of the caches, and of the student that initialised this one.

        With a file of labels, speakers are those of the manifests, too: their speech is trained on.
        """
        people = _before(self.config).people
        for plan in self.task.plans:
            speakers = Names.of({*plan.speakers, *plan.of_manifest})
            people = people.with_those_of(People(speakers, Names.of(plan.utterances)))
        return people

    def save(self, step: int) -> None:
        """Save the state from which the run continues at a step. Raises SpkdError where training has diverged."""
        check_finite(self)
        extra = {f"step.{name}": value for name, value in self.optimisation.state().items()}
        extra |= {f"valid.{name}": value for name, value in self.best.state().items()}
        extra |= {f"recent.{name}": value for name, value in self._recent_of_all_ranks().items()}
        optimiser, miner = self.optimisation.optimiser, self.loader.miner
        with self.ranks.first_alone():  # it may wait for a search in the background
            resume.save(self.out, self.module, optimiser, miner, step, self.settings, extra)

    def restore(self) -> int:
        """Load the saved state. Returns the step to continue from."""
        optimiser, miner = self.optimisation.optimiser, self.loader.miner
        first, extra = resume.resume(self.out, self.module, optimiser, miner, self.config.total_steps)
        self.optimisation.load_state(_part(extra, "step."))
        trials = "" if self.validate is None else self.validate.measures
        self.best = BestValidation.of_state(_part(extra, "valid."))
        if trials and self.best.trials != trials:
            if self.best.step >= 0:
                log(
                    f"note: {self.config.valid.trials} holds other trials than the validations before, or they had "
                    f"another valid.vad: their lowest EER, {self.best.rate:.3f} % after "
                    f"{counted(self.best.step, 'step')}, does not count"
                )
            self.best = BestValidation(trials=trials)
        if recent := _part(extra, "recent."):
            steps = zip(*(values.to(self.device) for values in recent.values()), strict=True)
            self.recent.extend(dict(zip(recent, values, strict=True)) for values in steps)
        return first

    def _recent_of_all_ranks(self) -> dict[str, Tensor]:
        """Loss terms (steps,) of the recent steps by name, averaged over the ranks."""
        named = {name: torch.stack([terms[name] for terms in self.recent]) for name in (self.recent or [{}])[0]}
        if self.ranks.world > 1:
            named = {name: summed(values) / self.ranks.world for name, values in named.items()}
        return {name: values.cpu() for name, values in named.items()}


def train(config: TrainConfig, validate: Validate | None = None, views: ViewConfig | None = None) -> Result:
    """Train a student with the sum of the chosen losses, or continue where the same command was interrupted.

    Args:
        validate: function that scores the student every `valid.every` steps.
        views: views that the recipe of the settings extracts; a note is logged where the cache has others.
    Raises:
        UsageError: unknown losses, or invalid settings.
        SpkdError: the cache lacks a target or labels (the message has the command that would extract them), or `out`
            holds another run.
        Interrupted: a signal asked for an end; the state was saved.
    """
    task = checked(config)
    _check_validation(task, validate)
    if views is not None:
        note_views(task.cache, views)
    note_validation(task.cache, task.config.valid)
    with ranks_of(task.device) as ranks:
        check_ranks(ranks, task.config)
        try:
            return _train(task, validate, ranks)
        except RuntimeError as error:
            if (advice := loader_killed(error, task.config)) is not None:
                raise SpkdError(advice) from error
            if ranks.world > 1 and is_of_connection(error):
                raise SpkdError("another rank has ended; start the same command again, which continues") from error
            raise


def _train(task: Task, validate: Validate | None, ranks: ProcessGroup) -> Result:
    config = task.config
    out = Path(config.out)
    check_writable(out / DESCRIPTION)
    check_shared(out, ranks)
    check_holds_no_other(out, "a student")
    _check_replaces_none(out)
    check_no_links(out, (BEST, BOARD))
    settings = resume.run_settings(config, task.losses, task.cache, task.finetune_cache)
    resume.check_same_run(settings, task.losses, config, ranks)
    extendable = resume.can_be_extended(config, task.losses)
    if resume.is_finished(out, settings, config.total_steps if extendable else 0, config.cache):
        _check_same_validation(config, out, validate)
        log(f"{out}: this run is finished already")
        _remove_leftovers(out)
        if extendable:
            resume.drop_earlier(out)
        else:
            resume.drop(out)
        checkpoint = load_student(out)
        training = checkpoint.training
        return Result(out, count_parameters(checkpoint.network), training.last_terms, training.best)
    run = build(task, out, ranks)
    run.settings, run.validate = settings, validate
    writable_folder(out)  # not before the run is known to be valid: a refused one leaves no folder
    with resume.locked(out) if ranks.is_first else contextlib.nullcontext():
        first = run.restore()
        ranks.barrier()  # before the first rank writes there
        if ranks.is_first:
            _remove_leftovers(out)
            record.start(out, config, task.cache, task.device, settings.get("contents", {}))
        return _finish(run, _run(run, first))


def _remove_leftovers(out: Path) -> None:
    """Remove what kills left of writing the student, and the best one."""
    for folder in (out, out / BEST):
        remove_leftovers(folder)


def _check_replaces_none(out: Path) -> None:
    """Check that a run replaces no files of others. Raises SpkdError: they are in `out`, which is of no run."""
    students = [f"{folder}{name}" for folder in ("", f"{BEST}/") for name in (WEIGHTS, EARLIER, DESCRIPTION)]
    states = [path.name for path in out.glob(resume.STATES)]
    names = (record.RUN, record.SETTINGS, record.PAGE, LOG, resume.STATE, *students, *states)
    keys = {record.RUN: record.FORMAT.key, DESCRIPTION: MODEL_FORMAT.key, resume.STATE: resume.FORMAT.key}
    check_replaces_none(out, names, keys)
    lock = out / resume.LOCK  # removed at the end; the locks of other programs hold a number, or text
    if lock.is_file() and not lock.is_symlink() and lock.stat().st_size:
        raise UsageError(f"{lock}: would be removed (that of spkd is empty); choose another folder, or remove it")


def opened(config: TrainConfig, left_out: dict[str, str] | None = None) -> Opened:
    """Caches and losses that the settings name.

    Args:
        left_out: takes each typed setting that has no effect -> the reason; None: it is refused.
    Raises:
        UsageError: unknown losses, invalid settings, or a typed one without effect.
        SpkdError: a cache cannot be opened.
    """
    losses = chosen_losses(config.loss) if config.loss.names else None  # a wrong name is found before all else
    cache = open_caches(config.cache, config.teachers, config.labels is None)
    finetunes = losses is not None and any(loss.settings.finetunes() for loss in losses.values())
    finetune_cache = None
    if finetunes and config.finetune_cache:
        finetune_cache = open_caches(config.finetune_cache, labelled=config.labels is None)
    sources = [cache] if finetune_cache is None else [cache, finetune_cache]
    plans = [source.plan for source in sources]
    if config.labels is not None:
        put_labels(config.labels, sources)
    if losses is None:
        config = chosen(config, default_losses(labelled=bool(Labels.of(cache).names)), left_out)
        log(f"--loss is not given: {listed(config.loss.names)} by default")
        losses = chosen_losses(config.loss)
    # Without a setting, others may have no effect: audio is not decoded where its augmentation is left out.
    while (
        used := without_unused(config, without_effect(cache, finetune_cache, losses, config), left_out)
    ) is not config:
        config, losses = used, chosen_losses(used.loss)
    if config.labels is None:  # it may have been without effect
        for source, plan in zip(sources, plans, strict=True):
            source.plan = plan
    labels = Labels.of(cache)
    check_labels(cache, losses, config.labels)
    logits = teacher_logits(cache, labels, losses)
    config = without_unused(config, unused_margins(losses, logits), left_out)
    return Opened(config, chosen_losses(config.loss), cache, finetune_cache, labels, logits)


def checked(config: TrainConfig) -> Task:
    """Caches and losses that the settings name, checked for compatibility. Raises as `train`."""
    device = resolve(config.device)
    config.student.check_nested(config.crop)
    config, losses, cache, finetune_cache, labels, logits = opened(config)
    for member in (*cache.members, *([] if finetune_cache is None else finetune_cache.members)):
        member.pinned, member.shared = device.type == "cuda", False
    logits = None if logits is None else logits.with_prototypes(cache, device)
    check_targets(cache, losses, logits)
    check_settings(cache, losses, config)
    config = replace(config, steps=steps_of(config, cache))
    note_warmup(config)
    note_embedding(losses)
    note_precision("precision", config.precision, device)
    note_graphs(config, device)
    note_drawn(cache, config)
    return Task(config, device, with_ceilings(losses, cache), cache, finetune_cache, labels, logits)


def build(task: Task, out: Path, ranks: ProcessGroup = ALONE) -> Run:
    """New run: the student with its initial weights, its losses, the optimiser and the batches. Raises as `train`."""
    config = task.config
    torch.manual_seed(config.seed)
    network = make_student(config.student)
    finetune = finetune_path(config, task.losses, task.cache, task.finetune_cache, network, ranks)
    speakers = task.labels.names if finetune is None else finetune.content.labels.names
    module = _module(task, network, len(speakers))
    macs = count_macs(network) / 1e6
    log(
        f"{config.student.name}: {count_parameters(network):,} parameters, "
        f"{macs:,.{0 if macs >= 10 else 1}f} M MACs per second of speech"
    )
    loader = _loader(task, network, finetune, ranks)
    optimisation = Optimisation(config, module, task.device, ranks)
    recent: deque[dict[str, Tensor]] = deque(maxlen=max(config.total_steps // 10, 1))
    return Run(task, out, module, optimisation, loader, speakers, ranks, recent=recent)


def _module(task: Task, network: Network, speakers: int) -> TrainingModule:
    """Student and its losses."""
    targets = {name: task.cache.target(name) for name in task.cache.names}
    if task.logits is not None:
        targets[LOGITS] = Target(LOGITS, len(task.logits.classes))
    terms = for_teachers(task.losses, task.cache.names)
    nested_crops = tuple(task.config.student.nested_crops)
    objective = WeightedSum(terms, LossContext(network.levels, targets, speakers, network.nested, nested_crops))
    return TrainingModule(network, objective, task.config.optim.swa_fraction).to(task.device)


def _loader(task: Task, network: Network, finetune: FinetunePath | None, ranks: ProcessGroup) -> BatchLoader:
    """Loader of the batches: their content, order, crops and mined views."""
    config, cache, labels, logits = task.config, task.cache, task.labels, task.logits
    content = BatchContent(
        cache,
        labels,
        input_source(config, cache, network.input_kind),
        _targets(task),
        np.zeros(0, np.int64) if logits is None else logits.label,
    )
    miner = None
    if tables := _needed_tables(config):
        mining.check(cache, config.mining, config.sampler.name == "hard")
        miner = Miner(content, config.mining, mining_ceiling(task.losses), config.crop, tables, ranks, task.device)
    table = miner.tables.get(NEGATIVES) if miner is not None else None
    sampler = SamplerContext(cache, config.batch_size, config.seed, table)
    order = ViewOrder(make_order(config.sampler, sampler), config.batch_size)
    crops = CropPlan(
        _crop_lengths(task),
        later=second_crop(config),
        drawn=tuple(config.student.nested_crops),
        seed=config.seed,
        to_shortest=config.sampler.name == "lengths",
        positives=miner.positives if miner is not None and config.mining.positives else None,
        level=network.levels.get(FRAME_LEVEL),
    )
    return BatchLoader(
        content,
        StepBatches(content, order, crops, config.seed, ranks.part(config.batch_size)),
        logits,
        miner,
        finetune,
        mines_negatives=config.mining.negatives > 0,
        class_means=(
            mean_embeddings(cache, labels.label, len(labels.names)).to(task.device) if config.class_means else None
        ),
    )


def _targets(task: Task) -> list[str]:
    """Names of the cached targets that the losses need, with the suffixes of several teachers."""
    terms = for_teachers(task.losses, task.cache.names)
    return sorted({name + suffix for loss, suffix in terms.values() for name in stored_targets(loss, task.logits)})


def _crop_lengths(task: Task) -> tuple[float, ...]:
    """Length (s) of every crop of a view: the first crop, and the further crops of the loss that asks for most."""
    crop = task.config.crop
    further = max((loss.settings.further_crops() for loss in task.losses.values()), key=len)
    return (crop, *(seconds or crop for seconds in further))


def _needed_tables(config: TrainConfig) -> list[str]:
    """Names of the tables that have to be mined."""
    needed = {
        NEGATIVES: config.mining.negatives > 0 or config.sampler.name == "hard",
        POSITIVES: config.mining.positives > 0,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def _before(config: TrainConfig) -> Training:
    """Training of the student that initialises this one; an empty one where none does."""
    init = None if config.student.init is None else Path(config.student.init)
    if init is None:
        return Training()
    if (init / DESCRIPTION).is_file():
        return Description.read(init / DESCRIPTION).training
    if init.is_file() and (exported := record_of_export(init)) is not None:
        return training_of(init.parent.parent, exported.get("student")) or Training(people=People(unknown=True))
    return Training()


def _check_validation(task: Task, validate: Validate | None) -> None:
    """Check the validation. Speakers or utterances that a teacher was trained on are noted.

    Raises:
        UsageError: there is none, or its speakers or utterances are trained on, or were by the student of student.init.
    """
    if task.config.valid.trials is not None and validate is None:
        raise UsageError("valid.trials: give train() something that scores a student")
    if validate is None:
        return
    before, teacher_people = _before(task.config).people, task.teacher_people
    for word, names, known, trained, of_teachers in (
        (
            "speakers",
            validate.speakers,
            [names for p in task.plans for names in (p.speakers, p.of_manifest)],
            before.speakers,
            teacher_people.speakers,
        ),
        (
            "utterances",
            validate.utterances,
            [p.utterances for p in task.plans],
            before.utterances,
            teacher_people.utterances,
        ),
    ):
        if shared := sorted({*trained.shared(names), *(name for some in known for name in names.intersection(some))}):
            raise UsageError(
                f"valid.trials: {len(shared)} of its {word} are trained on ({first_few(shared)}); validate on others"
            )
        if shared := of_teachers.shared(names):
            log(f"note: valid.trials: a teacher was trained on {len(shared)} of its {word} ({first_few(shared)})")
    if before.unknown:
        log("note: valid.trials: whether the exported student of student.init was trained on its speakers is not known")
    if teacher_people.unknown:
        log("note: valid.trials: whether a teacher, an exported student, was trained on its speakers is not known")


def _check_same_validation(config: TrainConfig, out: Path, validate: Validate | None) -> None:
    """Check that a finished run had the validation that is asked for. A note says what a file or variable asks for.

    Raises:
        UsageError: it had another.
        SpkdError: its trials were others.
    """
    if validate is not None and (out / BEST / DESCRIPTION).is_file():
        chosen_by = Description.read(out / BEST / DESCRIPTION).training.valid_trials
        if chosen_by not in ("", validate.digest):
            raise UsageError(
                f"{out}: finished, and {config.valid.trials} holds other trials than those that chose {out / BEST}; "
                "choose another folder with out=FOLDER"
            )
    if not (names := [name for name in config.given if name.startswith("valid.")]):
        return
    there, reason = record.validation_of(out), f"the run in {out} is finished without it; choose another out=FOLDER"
    had = {f"valid.{f.name}": there.get(f.name, str(f.default)) for f in fields(ValidConfig)}
    now = {f"valid.{f.name}": str(getattr(config.valid, f.name)) for f in fields(ValidConfig)}
    without_unused(config, {name: reason for name in names if now[name] != had[name]})


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _run(run: Run, first: int) -> int:
    """Do every step from `first` on. Returns the number of steps done in all, fewer where validation ended the run."""
    config, meter, done, ranks = run.config, Meter(WARM_UP), run.config.total_steps, run.ranks
    run_log = RunLog(run.out, first, resume.logged(run.out), config.loggers) if ranks.is_first else None
    miner = run.loader.miner
    per_step = config.batch_size * config.accumulate
    try:
        with (
            stop_request() as stop,
            track("training", config.total_steps * per_step, "utterances", first * per_step) as bar,
        ):
            for step, batches in _steps(run, first, meter):
                terms = run.optimisation.step(step, batches)
                run.recent.append(terms)
                meter.count(per_step)
                note, is_due = None, RunLog.is_due(step)
                # Only these steps wait for the device and for the other ranks.
                if is_due or step + 1 == config.total_steps:
                    check_finite(run)
                    stop.asked = ranks.any(stop.asked, run.device)
                    values = mean_over_ranks({name: term.item() for name, term in terms.items()}, run.device)
                    logged = values | {"lr": run.optimisation.optimiser.param_groups[0]["lr"]}
                    if run_log is not None and is_due:
                        run_log.add(step, logged)
                    note = " ".join(f"{name} {value:.3f}" for name, value in values.items())
                bar.advance(per_step, note)
                if miner is not None:
                    miner.after_step(step, run.module.network)
                # All ranks end after the same step: one at which they exchanged whether to stop.
                stopping = stop.asked and (ranks.world == 1 or is_due)
                if _after_step(run, step + 1, run_log, stopping):
                    done = step + 1
                    break
    finally:
        if run_log is not None:
            run_log.close()
        if miner is not None:
            miner.close()
    check_finite(run)
    if ranks.is_first:
        speed = Speed.of(meter, run.device)
        record.finish(run.out, speed)
        for line in in_words(speed, meter.seconds, run.loader.decodes_audio, config.workers):
            log(line)
    return done


def _steps(run: Run, first: int, meter: Meter) -> Iterator[tuple[int, list[TrainBatch]]]:
    """Number of each step from `first` on, and its `accumulate` batches."""
    count = run.config.accumulate
    loaded = meter.loading(
        run.loader.batches_from(first * count, run.config.total_steps * count, run.config, run.device)
    )
    for step in range(first, run.config.total_steps):
        yield step, list(islice(loaded, count))


def _after_step(run: Run, done: int, run_log: RunLog | None, stopping: bool) -> bool:
    """Validate and save where it is time. Returns whether the run is over.

    Raises:
        Interrupted: a signal asked for an end; the state is saved.
    """
    config = run.config
    is_last = done >= config.total_steps
    is_due = config.valid.trials is not None and (done % config.valid.every == 0 or is_last)
    if is_due and _validate(run, done, run_log):
        return True
    if is_last:
        return False
    if stopping or done % config.save_every == 0:
        if run_log is not None:
            run_log.sync()
        run.save(done)
        if run.ranks.is_first and (stopping or time.monotonic() - run.drawn > PAGE_EVERY):
            record.write_page(run.out)
            run.drawn = time.monotonic()
    if stopping:
        raise Interrupted(f"interrupted; {run.out} was saved after step {done}, and the same command continues")
    return False


def _validate(run: Run, done: int, run_log: RunLog | None) -> bool:
    """Score the student, and save it where it is the best so far. Returns whether the run is over."""
    config, eer = run.config, torch.zeros((), device=run.device)
    network = run.module.trained_network()
    with run.ranks.first_alone():
        if run.ranks.is_first and run.validate is not None:
            eer.fill_(run.validate(network))
    rate = float(first_ranks(eer))
    if run_log is not None:
        run_log.add(done - 1, {"valid_eer_percent": rate})
    log(f"validation after {counted(done, 'step')}: EER {rate:.3f} %")
    if run.best.add(done, rate) and run.ranks.is_first and run.validate is not None:
        training = Training(
            run.settings,
            done,
            valid_eer_percent=rate,
            valid_trials=run.validate.digest,
            valid_people=People(Names.of(run.validate.speakers), Names.of(run.validate.utterances)),
            people=run.people,
            teacher_people=run.task.teacher_people,
        )
        save_student(run.out / BEST, Checkpoint(network, training=training))
    if run.best.is_over(config.valid):
        times = counted(config.valid.patience, "validation")
        log(f"no lower EER in {times}: training ends after {counted(done, 'step')}")
        return True
    return False


def check_finite(run: Run) -> None:
    """Check the losses of the steps so far. Raises SpkdError where one was not finite, with the reason."""
    step = run.ranks.most(int(run.optimisation.first_bad), run.device)
    if step < 0:
        return
    count = run.config.accumulate
    for batch in run.loader.batches_from(step * count, (step + 1) * count, run.config, run.device):
        _check_inputs(batch)
    raise SpkdError(f"training diverged at step {step} (the loss is not finite); lower optim.lr")


def _check_inputs(batch: TrainBatch) -> None:
    """Check the values of a batch. Raises SpkdError where some are not finite: a lower learning rate does not help."""
    named = {"input features": batch.crops[0], **{f"target {n}": v for n, v in batch.inputs.targets.items()}}
    for name, values in named.items():
        if not bool(values.isfinite().all()):
            raise SpkdError(f"the cache holds {name} that are not finite; look for the shard with spkd cache verify")


def _finish(run: Run, steps: int) -> Result:
    """Write the student, and remove the training state unless the run can be extended by more steps."""
    terms, logits = mean_over_ranks(_means(run.recent), run.device), run.task.logits
    best = None if run.best.step < 0 else Best(run.best.rate, run.best.step)
    named = run.module.objective.by_name()
    reports = {name: report for name, loss in named.items() if (report := loss.report())}
    training = Training(
        run.settings, steps, terms, best, reports=reports, people=run.people, teacher_people=run.task.teacher_people
    )
    checkpoint = Checkpoint(run.module.trained_network(), training=training)
    for loss in named.values():
        classifier = loss.classifier()
        if classifier is not None and checkpoint.head is None:
            checkpoint.head, checkpoint.scale = classifier.weight, classifier.scale
            checkpoint.classes = logits.classes if classifier.over_teacher and logits is not None else run.speakers
    # The student first: the state from which it follows is needed until the student is there.
    if run.ranks.is_first:
        save_student(run.out, checkpoint)
    if resume.can_be_extended(run.config, run.task.losses) and steps == run.config.total_steps:
        run.save(steps)
    elif run.ranks.is_first:
        resume.drop(run.out)
    run.ranks.barrier()
    return Result(run.out, count_parameters(checkpoint.network), terms, best)


def _means(recent: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each loss term; {} where no step was done (a run that was continued after its last step)."""
    by_name = {name: [terms[name] for terms in recent] for name in (recent[0] if recent else {})}
    return {name: math.fsum(torch.stack(values).tolist()) / len(values) for name, values in by_name.items()}
