"""Scores of a trial list: by one model or two, or from the score files of other systems."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from spkd.corpus.manifest import Manifest, Utterance, measure
from spkd.corpus.settings import MANIFEST
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.eval import speakers
from spkd.eval.calibration import PLAIN, System, score_names
from spkd.eval.cohort import Cohort, load_cohort, normalised, speaker_means
from spkd.eval.embed import embed
from spkd.eval.enrolment import read_map
from spkd.eval.names import match
from spkd.eval.pairs import Side, Statistics, as_norm, cohort_statistics, score_pairs
from spkd.eval.plda import PLDA
from spkd.eval.settings import ScoringConfig
from spkd.eval.trials import Trials, in_order_of, notes_on, trials_of_enrolled, without_trial
from spkd.progress import log
from spkd.teachers.base import Teacher

Pair = tuple[np.ndarray, np.ndarray]  # values of a trial's enrolment and test side


@dataclass(frozen=True)
class People:
    """The utterances behind the trials' names.

    Attributes:
        enrolment: of each name on the enrolment side (several where a map defines it).
        test: of each name on the test side.
        notes: what was left out or assumed when their manifest was read.
    """

    enrolment: dict[str, list[Utterance]]
    test: dict[str, Utterance]
    notes: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether every speaker is known."""
        everyone = itertools.chain(*self.enrolment.values(), self.test.values())
        return all(utterance.speaker is not None for utterance in everyone)


@dataclass(frozen=True)
class Scored:
    """Trials that could be scored.

    Attributes:
        trials: these, N of them. left_out: how many others the list has.
        scores: (N,) of each system.
        system: that gave the scores.
        people: None where no manifest is known.
        rejected: utterances that could not be used, with the reasons.
        models: that embedded both sides; [] for scores from files.
        measures: quality measures of both sides of every trial, by name, where they are known.
        llr: whether the scores are log-likelihood ratios as they come.
        notes: what a reader has to know before the numbers are believed, in sentences.
    """

    trials: Trials
    left_out: int
    scores: list[np.ndarray]
    system: System
    people: People | None
    rejected: dict[str, str] = field(default_factory=dict)
    models: list[Teacher] = field(default_factory=list)
    measures: dict[str, Callable[[], Pair]] = field(default_factory=dict)
    llr: bool = False
    notes: tuple[str, ...] = ()

    def speakers(self) -> tuple[dict[str, str], dict[str, str], str]:
        """Speaker of each name on the enrolment and on the test side, and how they are known."""
        if self.people is not None and self.people.labelled:
            enrolment = {name: str(found[0].speaker) for name, found in self.people.enrolment.items()}
            return enrolment, {name: str(u.speaker) for name, u in self.people.test.items()}, "from the manifest"
        joined = dict(zip(self.trials.names, speakers.from_labels(self.trials), strict=True))
        return joined, joined, "utterances that target trials join are of one speaker"

    def columns(self, quality: Iterable[str]) -> dict[str, np.ndarray]:
        """The features of a calibration: scores, and the lower and the higher value of quality measures.

        Raises:
            UsageError: a measure that is not known of these trials.
        """
        found = dict(zip(score_names(len(self.scores)), self.scores, strict=True))
        for name in quality:
            if name not in self.measures:
                raise UsageError(
                    f"quality={name}: not known here; duration needs the manifest, magnitude and enrolments a model, "
                    "cohort norm=as-norm"
                )
            one, other = self.measures[name]()
            if name == "enrolments":
                found[name] = one
            else:
                found |= {f"{name}.low": np.minimum(one, other), f"{name}.high": np.maximum(one, other)}
        return found


def score(
    config: ScoringConfig, model: Teacher, manifest: Manifest, trials: Trials, enrol_model: Teacher | None = None
) -> Scored:
    """Scores of every trial whose two sides can be used.

    Args:
        model: of the test side, and of the enrolment side unless there is an enrol_model.
    Raises:
        UsageError: settings that lack a cohort, or models of different spaces. SpkdError: a trial names an utterance
            that the manifest lacks, none can be scored, or a score is not finite.
    """
    check_cohort(config)
    members, notes = _members(config, trials)
    tested = [trials.names[index] for index in np.unique(trials.test)]
    found = _found([*itertools.chain.from_iterable(members.values()), *tested], manifest, trials, members)
    enrolled = [found[name] for name in dict.fromkeys(itertools.chain.from_iterable(members.values()))]
    wanted = [found[name] for name in tested]
    test = embed(model, _part(manifest, wanted if enrol_model else [*enrolled, *wanted]), config)
    enrol = embed(enrol_model, _part(manifest, enrolled), config) if enrol_model else test
    rejected = enrol.rejected | test.rejected
    if not len(test.vectors) or not len(enrol.vectors):
        raise SpkdError(
            f"{trials.source}: none of its {len(found)} utterances can be used ({next(iter(rejected.values()))})"
        )
    if enrol_model is not None and enrol.vectors.shape[1] != test.vectors.shape[1]:
        raise UsageError(
            f"enrol.model={config.enrol.model.name}: embeddings of {enrol.vectors.shape[1]} dimensions, those of "
            f"model={config.model.name} have {test.vectors.shape[1]}; the two must be of one space, as a teacher's and "
            "a student's that was trained with a loss on embeddings"
        )
    cohorts = _cohorts(config, model, enrol_model)
    backend = Backend.of(config, cohorts)

    enrol_row, test_row = ({u.id: row for row, u in enumerate(part.utterances)} for part in (enrol, test))
    rows_of = {name: [enrol_row[found[u]] for u in used if found[u] in enrol_row] for name, used in members.items()}
    usable = [name for name, rows in rows_of.items() if rows]
    enrol_place, test_place = (np.full(len(trials.names), -1, np.int32) for _ in range(2))
    index_of = {name: index for index, name in enumerate(trials.names)}
    for row, name in enumerate(usable):
        enrol_place[index_of[name]] = row
    for name in tested:
        test_place[index_of[name]] = test_row.get(found[name], -1)
    i, j = enrol_place[trials.enrolment], test_place[trials.test]
    kept = np.flatnonzero((i >= 0) & (j >= 0))
    if not len(kept):
        raise SpkdError(f"{trials.source}: no trial has two sides that can be used ({next(iter(rejected.values()))})")
    i, j = i[kept], j[kept]
    left = _averages(backend.prepared(enrol.vectors, 0), [rows_of[name] for name in usable])
    right = backend.prepared(test.vectors, 1)
    scores, statistics = backend.score(left, right, i, j)
    if wrong := int((~np.isfinite(scores)).sum()):
        raise SpkdError(f"{trials.source}: {wrong:,} of {len(scores):,} scores are not finite")

    people = People(
        {name: [enrol.utterances[row] for row in rows_of[name]] for name in usable},
        {name: test.utterances[test_row[found[name]]] for name in tested if found[name] in test_row},
        manifest.notes,
    )
    models = [model] if enrol_model is None else [enrol_model, model]
    first = ["Embeddings of the enrolment utterances of one model are averaged."] if config.enrol.map else []
    if enrol_model is not None:
        first.append(
            f"Enrolment utterances are embedded by {config.enrol.model.name}, test utterances by {config.model.name}."
        )
    how = (*first, *backend.how)
    system = System(tuple(m.card().weights_sha256 for m in models), 1, how)
    part = subset(trials, kept)
    lengths = [np.linalg.norm(side.vectors, axis=1) for side in (enrol, test)]
    measures = {
        "duration": lambda: _durations(part, people),
        "enrolments": lambda: (np.log([len(rows_of[name]) for name in usable])[i], np.zeros(len(j))),
        "magnitude": lambda: (np.array([lengths[0][rows_of[name]].mean() for name in usable])[i], lengths[1][j]),
    }
    if statistics is not None:
        measures["cohort"] = lambda: (statistics[0][0][i], statistics[1][0][j])
    llr = backend.plda is not None and backend.cohorts is None
    left_out = len(trials) - len(kept)
    notes = (*notes_on(trials), *notes)
    return Scored(part, left_out, [scores], system, people, rejected, models, measures, llr, notes)


def score_from_files(
    config: ScoringConfig, files: Sequence[tuple[Trials, np.ndarray]], trials: Trials | None
) -> Scored:
    """The scores of other systems, for the same trials.

    Args:
        files: trials and scores of each, as `read_scores` gives them.
        trials: their order and their labels; None: as the first file has them.
    Raises:
        SpkdError: a trial without a score.
    """
    listed = files[0][0] if trials is None else trials
    scores = [in_order_of(listed, *file) for file in files]
    people, notes = _people(config, listed)
    for scored, _ in files:
        if count := without_trial(listed, scored):
            notes = (*notes, f"{scored.source}: scores of pairs that are no trials of {listed.source}: {count:,}")
    measures = {} if people is None else {"duration": lambda: _durations(listed, people)}
    system = System((), len(scores), ("Scores are as their files have them.",))
    return Scored(listed, 0, scores, system, people, measures=measures, notes=(*notes_on(listed), *notes))


def _people(config: ScoringConfig, trials: Trials) -> tuple[People | None, tuple[str, ...]]:
    """The utterances of trials that are scored already, and notes on their enrolment map; None where no manifest is
    named, and the one that happens to be here is of other utterances."""
    if config.manifest == MANIFEST and not Path(MANIFEST).exists():
        return None, ()
    manifest = measure(Manifest.load(config.manifest, config_columns(config)))[0]
    members, notes = _members(config, trials)
    tested = [trials.names[index] for index in np.unique(trials.test)]
    names = [*itertools.chain.from_iterable(members.values()), *tested]
    if config.manifest == MANIFEST and len(match(list(dict.fromkeys(names)), manifest.index_of)) < len(set(names)):
        log(f"note: {MANIFEST} lacks utterances of {trials.source}: it is not used")
        return None, ()
    found = _found(names, manifest, trials, members)

    def utterance(name: str) -> Utterance:
        return manifest[manifest.index_of[found[name]]]

    enrolment = {name: [utterance(one) for one in used] for name, used in members.items()}
    return People(enrolment, {name: utterance(name) for name in tested}, manifest.notes), notes


def config_columns(config: ScoringConfig) -> list[str]:
    """Columns of the manifest that the settings name, beside those that every manifest has."""
    return [name for name in getattr(config, "by", []) if name not in ("duration", "speaker")]


def check_cohort(config: ScoringConfig) -> None:
    """Raises UsageError where a setting needs a cohort that is not there, or a cohort is named that nothing uses."""
    uses = [f"backend={config.backend}"] * (config.backend == "plda") + [f"norm={config.norm}"] * (
        config.norm != "none"
    )
    uses += ["subtract_mean=true"] * config.subtract_mean
    if uses and config.cohort.source is None:
        raise UsageError(f"{uses[0]} needs cohort=FILE, a manifest or a cache of other speakers")
    if config.cohort.source is not None and not uses:
        raise UsageError("cohort= is used by norm=as-norm, subtract_mean=true and backend=plda; choose one of them")


def subset(trials: Trials, kept: np.ndarray) -> Trials:
    """Some of the trials."""
    label = None if trials.label is None else trials.label[kept]
    return replace(
        trials, enrolment=trials.enrolment[kept], test=trials.test[kept], label=label, line=trials.line[kept]
    )


def _members(config: ScoringConfig, trials: Trials) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The utterances of every name on the enrolment side, and notes on the map that says so."""
    names = [trials.names[index] for index in np.unique(trials.enrolment)]
    if config.enrol.map is None:
        return {name: [name] for name in names}, ()
    found = read_map(config.enrol.map)
    models = found.members
    for name in names:
        if name not in models:
            near = did_you_mean(name, list(models)[:10_000])
            raise SpkdError(f"{trials.source}:{_line_of(trials, name)}: {name!r} is not in {config.enrol.map}{near}")
    notes = [f"{config.enrol.map}: {note}" for note in found.notes]
    enrolled = trials_of_enrolled(trials, models)
    if len(enrolled):
        place = f"first: line {int(trials.line[enrolled].min())}"
        notes.append(f"{trials.source}: trials that test an utterance of their own model: {len(enrolled):,} ({place})")
    return {name: list(models[name]) for name in names}, tuple(notes)


def _found(names: list[str], manifest: Manifest, trials: Trials, members: Mapping[str, list[str]]) -> dict[str, str]:
    """Utterance of a trial or of an enrolment map -> id in the manifest.

    Raises:
        SpkdError: one is not there.
    """
    wanted = list(dict.fromkeys(names))
    found = match(wanted, manifest.index_of)
    if missing := [name for name in wanted if name not in found]:
        name = missing[0]
        owner = next((model for model, used in members.items() if name in used), name)
        raise SpkdError(
            f"{trials.source}:{_line_of(trials, owner)}: utterance {name!r} is not in {manifest.source} "
            f"({len(missing)} such of {len(wanted)}){did_you_mean(name, list(manifest.index_of)[:10_000])}"
        )
    return found


def _line_of(trials: Trials, name: str) -> int:
    index = trials.names.index(name)
    return int(trials.line[int(np.argmax((trials.enrolment == index) | (trials.test == index)))])


def _part(manifest: Manifest, ids: Iterable[str]) -> Manifest:
    return Manifest(tuple(manifest[manifest.index_of[name]] for name in dict.fromkeys(ids)), manifest.source)


def _averages(vectors: np.ndarray, rows: list[list[int]]) -> np.ndarray:
    """The mean of some rows, of length 1, for each list of rows."""
    if all(len(some) == 1 for some in rows):
        return vectors[[some[0] for some in rows]]
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
    starts = np.cumsum([0, *(len(some) for some in rows[:-1])])
    return normalised(np.add.reduceat(vectors[flat], starts))


def _durations(trials: Trials, people: People) -> Pair:
    """Logarithm of the seconds of speech on both sides."""
    enrolment, test = (np.zeros(len(trials.names)) for _ in range(2))
    index_of = {name: index for index, name in enumerate(trials.names)}
    for name, used in people.enrolment.items():
        enrolment[index_of[name]] = sum(u.duration or 0.0 for u in used)
    for name, utterance in people.test.items():
        test[index_of[name]] = utterance.duration or 0.0
    left, right = (np.log(np.maximum(side, 0.01)) for side in (enrolment, test))
    return left[trials.enrolment], right[trials.test]


def _cohorts(config: ScoringConfig, model: Teacher, enrol_model: Teacher | None) -> tuple[Cohort, Cohort] | None:
    """The cohort as embedded by the models of the enrolment and of the test side."""
    if config.cohort.source is None:
        return None
    test = load_cohort(config, model)
    return (test if enrol_model is None else load_cohort(config, enrol_model)), test


@dataclass(frozen=True)
class Backend:
    """What makes scores of vectors.

    Attributes:
        means: subtracted from the vectors of the enrolment and of the test side; None: nothing is.
        plda: None for cosines.
        cohorts: prepared vectors of the cohort as either side, for AS-norm; None without.
        top: highest cohort scores that AS-norm takes.
        how: each step in a sentence.
    """

    means: tuple[np.ndarray, np.ndarray] | None
    plda: PLDA | None
    cohorts: tuple[np.ndarray, np.ndarray] | None
    top: int
    how: tuple[str, ...]

    @classmethod
    def of(cls, config: ScoringConfig, cohorts: tuple[Cohort, Cohort] | None) -> Backend:
        """What the settings describe.

        Raises:
            UsageError, SpkdError: PLDA, and a cohort without labels or too small for it.
        """
        name, moved = config.cohort.source, config.subtract_mean or config.backend == "plda"
        means = None if cohorts is None or not moved else (cohorts[0].vectors.mean(0), cohorts[1].vectors.mean(0))
        how = [
            f"The mean of the {len(cohorts[1].vectors):,} embeddings of {name} is subtracted from every embedding."
            if means is not None and cohorts is not None
            else PLAIN[0],
            PLAIN[1],
        ]
        self = cls(means, None, None, config.cohort.top, ())
        if config.backend == "plda" and cohorts is not None:
            if not cohorts[1].labelled:
                raise UsageError(f"cohort={name}: PLDA is trained on speaker labels, and some utterances have none")
            speaker = cohorts[1].speaker
            plda = PLDA.train(self.prepared(cohorts[1].vectors, 1), speaker, f"cohort={name}")
            self = replace(self, plda=plda)
            how.append(
                "A score is the log-likelihood ratio of a two-covariance PLDA (EM, 20 iterations) trained on "
                f"{len(speaker):,} utterances of {int(speaker.max()) + 1:,} speakers of {name}."
            )
        else:
            how.append(PLAIN[2])
        if config.norm == "as-norm" and cohorts is not None:
            averaged = config.cohort.average and cohorts[1].labelled
            if config.cohort.average and not averaged:
                log(f"note: {name} has utterances without speaker: cohort embeddings are not averaged")
            prepared = [self.prepared(cohort.vectors, side) for side, cohort in enumerate(cohorts)]
            if averaged:
                prepared = [speaker_means(v, c.speaker) for v, c in zip(prepared, cohorts, strict=True)]
            self = replace(self, cohorts=(prepared[0], prepared[1]))
            size, kind = len(prepared[0]), "speaker means" if averaged else "utterances"
            how.append(
                f"AS-norm: each side normalises by mean and deviation of its {min(self.top, size):,} highest scores "
                f"with {size:,} {kind} of {name}, and the two are averaged."
            )
        return replace(self, how=tuple(how))

    def prepared(self, vectors: np.ndarray, side: int) -> np.ndarray:
        """Vectors (N, D) of the enrolment (0) or test (1) side, centred where that is asked for, of length 1."""
        return normalised(vectors if self.means is None else vectors - self.means[side])

    def score(
        self, enrolment: np.ndarray, test: np.ndarray, i: np.ndarray, j: np.ndarray
    ) -> tuple[np.ndarray, tuple[Statistics, Statistics] | None]:
        """Scores (T,) of pairs of rows i and j of prepared vectors, and the cohort statistics of both sides."""
        left, right = self._sides(enrolment, test)
        scores = score_pairs(left, right, i, j)
        if self.cohorts is None:
            return scores, None
        one = cohort_statistics(left, self._sides(enrolment, self.cohorts[1])[1], self.top)
        other = cohort_statistics(right, self._sides(self.cohorts[0], test)[0], self.top)
        return as_norm(scores, one, other, i, j), (one, other)

    def _sides(self, enrolment: np.ndarray, test: np.ndarray) -> tuple[Side, Side]:
        return (Side(enrolment), Side(test)) if self.plda is None else self.plda.sides(enrolment, test)
