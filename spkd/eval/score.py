"""Scores of a trial list: from one or two models, or from the score files of other systems."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from spkd.config import values
from spkd.corpus.manifest import Manifest, Utterance, measure
from spkd.corpus.settings import MANIFEST
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.base import NONE
from spkd.errors import SpkdError, UsageError, did_you_mean, first_few, listed
from spkd.eval import speakers
from spkd.eval.backend import Backend
from spkd.eval.calibration import OTHER_MODEL, System, columns_of, how_mapped, score_names
from spkd.eval.cohort import CohortSource, normalised
from spkd.eval.embed import Embeddings, embed, notes_on_vad
from spkd.eval.enrolment import read_map
from spkd.eval.metrics import curve, eer
from spkd.eval.names import match
from spkd.eval.pairs import Statistics
from spkd.eval.settings import ENROLMENTS, ScoringConfig
from spkd.eval.trials import (
    Trials,
    digest_of_pairs,
    in_order_of,
    labelled_otherwise,
    notes_on,
    trials_of_enrolled,
    without_trial,
)
from spkd.files.text import counted
from spkd.mapping.embedding_map import EmbeddingMap
from spkd.progress import log
from spkd.teachers.base import EmbeddingModel

MODEL_KEY = re.compile(r"(enrol\.)?model\.")
# Settings of models that their digests, or nothing, stand for.
OF_THE_SAME_SCORES = ("name", "weights", "compile", "dimension")
Pair = tuple[np.ndarray, np.ndarray]  # (N,) values of the trials' enrolment sides, and of their test sides


@dataclass(frozen=True)
class People:
    """Utterances of the names in trials.

    Attributes:
        enrolment: utterances of each name on the enrolment side (several where a map defines it).
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
    """Scored trials.

    Attributes:
        trials: the N trials that could be scored.
        left_out: number of trials of the list that could not.
        scores: (N,) scores of each system.
        people: utterances of the trials' names; None where no manifest is known.
        models: models that embedded the two sides; [] for scores from files.
        measures: functions that give a quality measure of both sides of every trial, by name.
        llr: whether the scores are log-likelihood ratios already.
        places: sentences that say where the cohort and the map are.
    """

    trials: Trials
    left_out: int
    scores: list[np.ndarray]
    system: System
    people: People | None
    rejected: dict[str, str] = field(default_factory=dict)
    models: list[EmbeddingModel] = field(default_factory=list)
    measures: dict[str, Callable[[], Pair]] = field(default_factory=dict)
    llr: bool = False
    places: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def speakers(self) -> tuple[dict[str, str], dict[str, str], str]:
        """Speaker of each name on the enrolment side and on the test side, and the source of their identity."""
        if self.people is not None and self.people.labelled:
            enrolment = {name: str(utterances[0].speaker) for name, utterances in self.people.enrolment.items()}
            return enrolment, {name: str(u.speaker) for name, u in self.people.test.items()}, "from the manifest"
        joined = dict(zip(self.trials.names, speakers.from_labels(self.trials), strict=True))
        return joined, joined, "utterances that target trials join are of one speaker"

    def utterances(self) -> set[str]:
        """Utterances of the trials, as the list names them, and as the manifest does where there is one."""
        if self.people is None:
            return set(self.trials.names)
        used = [*itertools.chain.from_iterable(self.people.enrolment.values()), *self.people.test.values()]
        return {*self.people.test, *(utterance.id for utterance in used)}

    @property
    def eer_percent(self) -> float:
        """Equal error rate (%) of the first system. Raises ValueError without trials of both kinds."""
        if self.trials.label is None:
            raise ValueError("error rates need labelled trials")
        return 100 * eer(curve(self.scores[0], self.trials.label))[0]

    def columns(self, quality: Iterable[str]) -> dict[str, np.ndarray]:
        """Features of a calibration, (N,) each: scores, and the lower and the higher value of quality measures.

        Raises:
            UsageError: a measure that is not known for these trials.
        """
        features = dict(zip(score_names(len(self.scores)), self.scores, strict=True))
        for name in quality:
            if name not in self.measures:
                raise UsageError(
                    f"quality={name}: not known here; duration needs the manifest, speech needs vad, magnitude and "
                    "enrolments a model, cohort norm=as-norm"
                )
            of_enrolment, of_test = self.measures[name]()
            sides = [np.minimum(of_enrolment, of_test), np.maximum(of_enrolment, of_test)]
            features |= dict(zip(columns_of(name), sides if name != ENROLMENTS else [of_enrolment], strict=True))
        return features


@dataclass(frozen=True)
class _Sides:
    """Utterances and embeddings of both sides of the trials.

    Attributes:
        members: utterances of every name on the enrolment side, as trials or the enrolment map name them.
        tested: names on the test side.
        found: id in the manifest of each of these utterances.
        test: embeddings of the test utterances; the same object where one model embeds both sides.
    """

    members: dict[str, list[str]]
    tested: list[str]
    found: dict[str, str]
    enrolment: Embeddings
    test: Embeddings
    notes: tuple[str, ...]

    @cached_property
    def rejected(self) -> dict[str, str]:
        """Utterances of either side that could not be used, with the reasons."""
        return self.enrolment.rejected | self.test.rejected

    @cached_property
    def enrolment_rows(self) -> dict[str, list[int]]:
        """Rows of the enrolment embeddings for every name of that side that can be used."""
        row_of = {utterance.id: row for row, utterance in enumerate(self.enrolment.utterances)}
        rows = {
            name: [row_of[self.found[u]] for u in used if self.found[u] in row_of]
            for name, used in self.members.items()
        }
        return {name: some for name, some in rows.items() if some}

    @cached_property
    def test_rows(self) -> dict[str, int]:
        """Row of the test embeddings for every name of that side that can be used."""
        row_of = {utterance.id: row for row, utterance in enumerate(self.test.utterances)}
        return {name: row_of[self.found[name]] for name in self.tested if self.found[name] in row_of}

    @cached_property
    def people(self) -> People:
        return People(
            {name: [self.enrolment.utterances[row] for row in rows] for name, rows in self.enrolment_rows.items()},
            {name: self.test.utterances[row] for name, row in self.test_rows.items()},
            self.notes,
        )

    def pairs(self, trials: Trials) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The K trials whose two sides can be used.

        Returns:
            (K,) place of each trial in the list.
            (K,) place of its enrolment side in `enrolment_rows`.
            (K,) row of its test side among the test embeddings.
        """
        index_of = {name: index for index, name in enumerate(trials.names)}
        enrolment, test = (np.full(len(trials.names), -1, np.int32) for _ in range(2))
        for place, name in enumerate(self.enrolment_rows):
            enrolment[index_of[name]] = place
        for name, row in self.test_rows.items():
            test[index_of[name]] = row
        i, j = enrolment[trials.enrolment], test[trials.test]
        kept = np.flatnonzero((i >= 0) & (j >= 0))
        return kept, i[kept], j[kept]

    def magnitudes(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean length of the embeddings of every name on the enrolment side, and length of every test embedding."""
        enrolment, test = (np.linalg.norm(side.vectors, axis=1) for side in (self.enrolment, self.test))
        return np.array([enrolment[rows].mean() for rows in self.enrolment_rows.values()]), test


def score(
    config: ScoringConfig,
    model: EmbeddingModel,
    manifest: Manifest,
    trials: Trials,
    enrol_model: EmbeddingModel | None = None,
    the_map: EmbeddingMap | None = None,
) -> Scored:
    """Scores of every trial whose two sides can be used.

    Args:
        model: model of the test side, and of the enrolment side unless there is an enrol_model.
        enrol_model: model of the enrolment side; None: the same.
        the_map: map from its embeddings to those of `model`; None: they are compared as they are.
    Raises:
        UsageError: settings without the cohort they need, or models whose embeddings are not comparable.
        SpkdError: a trial names an utterance that the manifest lacks, no trial can be scored, the cohort holds tested
            data, or a score is not finite.
    """
    check_cohort(config)
    # Utterances that the trials name; the cohort must share none of them.
    members, notes = _members(config, trials)
    tested = [trials.names[index] for index in np.unique(trials.test)]
    ids = _found([*itertools.chain.from_iterable(members.values()), *tested], manifest, trials, members)
    cohort = None if config.cohort.source is None else CohortSource.open(config.cohort.source)
    if cohort is not None:
        cohort.check_disjoint([manifest[manifest.index_of[name]] for name in dict.fromkeys(ids.values())])
    # Every utterance is embedded once by each model.
    enrolled = [ids[name] for name in dict.fromkeys(itertools.chain.from_iterable(members.values()))]
    test_ids = [ids[name] for name in tested]
    test = embed(model, _part(manifest, test_ids if enrol_model else [*enrolled, *test_ids]), config)
    enrolment = embed(enrol_model, _part(manifest, enrolled), config) if enrol_model else test
    sides = _Sides(members, tested, ids, enrolment, test, manifest.notes)
    _check_usable(config, trials, sides, the_map)
    kept, i, j = sides.pairs(trials)
    if not len(kept):
        raise SpkdError(f"{trials.source}: no trial has two sides that can be used ({_first(sides.rejected)})")
    # The back-end scores pairs of prepared vectors.
    cohorts = None
    if cohort is not None:
        of_test = cohort.embedded(config, model)
        of_enrolment = of_test if enrol_model is None else cohort.embedded(config, enrol_model)
        # Enrolments of the cohort go the way of those of the trials, so that both sides are in the space of `model`.
        cohorts = replace(of_enrolment, vectors=_mapped(of_enrolment.vectors, the_map)), of_test
    backend = Backend.of(config, cohorts)
    vectors = _mapped(enrolment.vectors, the_map)
    left = _averages(backend.prepared(vectors, 0), list(sides.enrolment_rows.values()))
    right = backend.prepared(test.vectors, 1)
    scores, statistics = backend.score(left, right, i, j)
    if wrong := int((~np.isfinite(scores)).sum()):
        raise SpkdError(f"{trials.source}: {wrong:,} of {len(scores):,} scores are not finite")
    # The trials that were scored, with their quality measures and notes.
    scored_trials, models = subset(trials, kept), [model] if enrol_model is None else [enrol_model, model]
    finder = finder_of(config.vad)
    how = (*how_embedded(config, the_map), *backend.how)
    system = System(tuple(m.weights_sha256 for m in models), 1, how, "" if finder is None else str(finder.card))
    return Scored(
        scored_trials,
        len(trials) - len(kept),
        [scores],
        system,
        sides.people,
        sides.rejected,
        models,
        _measures(scored_trials, sides, (i, j), statistics),
        llr=backend.plda is not None and backend.cohorts is None,
        places=(
            *([] if cohorts is None else [cohorts[1].place]),
            *([] if the_map is None else [f"{the_map.name.capitalize()} is {config.enrol.map_by}."]),
        ),
        notes=(
            *notes_on(trials, config.enrol.map is not None),
            *notes,
            *notes_on_rejected(trials, sides.rejected, len(trials) - len(kept)),
            *notes_on_labels(scored_trials, sides.people),
            *backend.notes,
            *notes_on_training(models, scored_trials, sides.people, the_map),
            *notes_on_vad(models, config.vad),
            *_notes_on_map(the_map, system.vad),
        ),
    )


def _mapped(vectors: np.ndarray, the_map: EmbeddingMap | None) -> np.ndarray:
    """Embeddings (N, D) of the enrolment side in the space of the test side."""
    return vectors if the_map is None else the_map.map(vectors)


def _notes_on_map(the_map: EmbeddingMap | None, vad: str) -> list[str]:
    """Notes on a map whose caches have another detector of speech than the trials, in sentences."""
    there = {model.vad or NONE for model in (the_map.old, the_map.new)} if the_map is not None else set()
    if the_map is None or there == {vad or NONE}:
        return []
    return [
        f"{the_map.name.capitalize()} was trained with view.vad={listed(sorted(there), 'and')}, and trials are with "
        f"vad={vad or NONE}."
    ]


def _check_usable(config: ScoringConfig, trials: Trials, sides: _Sides, the_map: EmbeddingMap | None) -> None:
    """Check the embeddings of both sides."""
    widths = sides.enrolment.vectors.shape[1], sides.test.vectors.shape[1]
    if not len(sides.test.vectors) or not len(sides.enrolment.vectors):
        raise SpkdError(
            f"{trials.source}: none of its {counted(len(sides.found), 'utterance')} can be used "
            f"({_first(sides.rejected)})"
        )
    if widths[0] != widths[1] and the_map is None:
        raise UsageError(
            f"enrol.model={config.enrol.model.name}: embeddings of {widths[0]} dimensions, those of "
            f"model={config.model.name} have {widths[1]}; the two must be of one space, as a teacher's and a "
            "student's that was trained with a loss on embeddings, or be mapped (enrol.map_by=FOLDER, by `spkd map`)"
        )


def _first(rejected: Mapping[str, str]) -> str:
    return next(iter(rejected.values()))


def how_embedded(config: ScoringConfig, the_map: EmbeddingMap | None = None) -> list[str]:
    """Differences of the enrolment side from the test side, and settings that change what a model gives, in
    sentences."""
    how = ["Embeddings of the enrolment utterances of one model are averaged."] if config.enrol.map else []
    if the_map is not None:
        how += how_mapped(the_map.fingerprint)
    elif config.enrol.model.name is not None:
        how.append(OTHER_MODEL)
    acting = [
        f"{k.name}={value}"
        for k, value in values(config)
        if MODEL_KEY.match(k.name) and value != k.default and k.name.rpartition(".")[2] not in OF_THE_SAME_SCORES
    ]
    if acting:
        how.append(f"Embeddings are computed with {listed(acting)}.")
    return how


def _measures(
    trials: Trials, sides: _Sides, pairs: Pair, statistics: tuple[Statistics, Statistics] | None
) -> dict[str, Callable[[], Pair]]:
    """Quality measures of both sides of every trial, by name.

    Args:
        pairs: place of each trial's enrolment side in `enrolment_rows`, and row of its test side.
        statistics: cohort statistics of both sides; None without a cohort.
    """
    i, j = pairs

    def magnitude() -> Pair:
        enrolment, test = sides.magnitudes()
        return enrolment[i], test[j]

    def enrolments() -> Pair:
        return np.log([len(rows) for rows in sides.enrolment_rows.values()])[i], np.zeros(len(j))

    measures = {"duration": lambda: _durations(trials, sides.people), "enrolments": enrolments, "magnitude": magnitude}
    if all(utterance.speech is not None for utterance in sides.test.utterances):
        measures["speech"] = lambda: _durations(trials, sides.people, of_speech=True)
    if statistics is not None:
        measures["cohort"] = lambda: (statistics[0][0][i], statistics[1][0][j])
    return measures


def notes_on_rejected(trials: Trials, rejected: Mapping[str, str], left_out: int) -> list[str]:
    """Note on utterances that cannot be used, in a sentence.

    Args:
        rejected: reason for each.
        left_out: number of trials that have no score, since a side cannot be used.
    """
    if not rejected:
        return []
    name, reason = next(iter(rejected.items()))
    count = counted(len(rejected), "utterance")
    return [f"{trials.source}: {count} cannot be used ({name}: {reason}); trials left out: {left_out:,}"]


def notes_on_training(
    models: Sequence[EmbeddingModel], trials: Trials, people: People, the_map: EmbeddingMap | None = None
) -> list[str]:
    """Notes on models of which they, their teachers or the map between them were trained on tested speakers or
    utterances, or may have been, or which were chosen by the list, in sentences."""
    notes = []
    chosen_by = {model.training.valid_trials for model in models if model.training is not None} - {""}
    if chosen_by and digest_of_pairs(trials) in chosen_by:
        notes.append(
            f"The student was chosen among others of its run by {trials.source} (valid.trials): its error rates are "
            "too low."
        )
    utterances = [*itertools.chain.from_iterable(people.enrolment.values()), *people.test.values()]
    speakers, ids = {u.speaker for u in utterances if u.speaker is not None}, {u.id for u in utterances}
    for chosen in (m.training.valid_people for m in models if m.training is not None and not notes):
        for known, names, word in ((chosen.speakers, speakers, "speakers"), (chosen.utterances, ids, "utterances")):
            if shared := known.shared(names):
                count = f"{len(shared):,} of the {len(names):,} {word} of {trials.source} ({first_few(shared)})"
                notes.append(
                    f"The student was chosen among others of its run by trials (valid.trials) of {count}: its error "
                    "rates may be too low."
                )
                break
    of_models = [
        (("The student", training.people), ("A teacher of the student", training.teacher_people))
        for training in (model.training for model in models if model.training is not None)
    ]
    for those in [*of_models, *([] if the_map is None else [(("The map", the_map.people),)])]:
        for whom, known, names, word in (
            found
            for who, of in those
            for found in ((who, of.speakers, speakers, "speakers"), (who, of.utterances, ids, "utterances"))
        ):
            if shared := known.shared(names):
                count = f"{'at least ' if known.is_sample else ''}{len(shared):,} of the {len(names):,} {word}"
                some = first_few(shared)
                notes.append(f"{whom} was trained on {count} of {trials.source} ({some}): its error rates are too low.")
                break
    if any(model.training is not None and model.training.people.unknown for model in models):
        notes.append(
            f"Whether the student was trained on speakers of {trials.source} is not known: it began as an exported "
            "student without the model.json of its folder beside it."
        )
    if any(model.training is not None and model.training.teacher_people.unknown for model in models):
        notes.append(
            f"Whether a teacher of the student was trained on speakers of {trials.source} is not known: it was an "
            "exported student without the model.json of its folder beside it."
        )
    if any(model.training_lost for model in models):
        notes.append(
            f"Whether the exported student was trained on speakers of {trials.source} is not known, without the "
            "model.json of its folder beside it."
        )
    return list(dict.fromkeys(notes))


def notes_on_labels(trials: Trials, people: People) -> list[str]:
    """Notes on labels and enrolment models that contradict the manifest's speakers, in sentences."""
    notes = []
    mixed = {
        name for name, used in people.enrolment.items() if len({u.speaker for u in used if u.speaker is not None}) > 1
    }
    if mixed:
        names = first_few(sorted(mixed))
        notes.append(f"{trials.source}: models enrolled by utterances of several speakers: {len(mixed):,} ({names})")
    if trials.label is None:
        return notes
    enrolment = {name: used[0].speaker for name, used in people.enrolment.items() if name not in mixed}
    test = {name: utterance.speaker for name, utterance in people.test.items()}
    number = {name: index for index, name in enumerate({*enrolment.values(), *test.values()} - {None})}
    left, right = (
        np.array([number.get(side.get(name), -1) for name in trials.names])[at]
        for side, at in ((enrolment, trials.enrolment), (test, trials.test))
    )
    known = (left >= 0) & (right >= 0)
    for wrong, what in (
        ((trials.label == 1) & (left != right), "target trials of two speakers"),
        ((trials.label == 0) & (left == right), "non-target trials of one speaker"),
    ):
        places = np.flatnonzero(known & wrong)
        if len(places):
            line = int(trials.line[places].min())
            notes.append(f"{trials.source}: {what}, by the manifest: {len(places):,} (first: line {line})")
    return notes


def score_from_files(
    config: ScoringConfig,
    files: Sequence[tuple[Trials, np.ndarray]],
    trials: Trials | None,
    origins: Sequence[str] = (),
) -> Scored:
    """Scores of other systems for the same trials.

    Args:
        files: trials and scores of each system, as `read_scores` gives them.
        trials: trial list that gives order and labels; None: the trials of the first file.
        origins: digest of the system of each file, "" where it is not known.
    Raises:
        SpkdError: a trial without a score.
    """
    listed = files[0][0] if trials is None else trials
    scores = [in_order_of(listed, *file) for file in files]
    people, notes = _people(config, listed)
    for scored, own in files:
        if scored.label is None and set(np.unique(own)) == {0.0, 1.0}:
            notes = (*notes, f"{scored.source}: every score is 0 or 1, as are the labels of a trial list")
        if count := without_trial(listed, scored):
            notes = (*notes, f"{scored.source}: scores of pairs that are no trials of {listed.source}: {count:,}")
        if len(places := labelled_otherwise(listed, scored)):
            line = int(scored.line[places].min())
            share = f"{len(places):,} of {len(scored):,} (first: line {line})"
            notes = (*notes, f"{scored.source}: labels that are not those of {listed.source}, which count: {share}")
    measures = {} if people is None else {"duration": lambda: _durations(listed, people)}
    if people is not None:
        notes = (*notes, *notes_on_labels(listed, people))
    system = System((), len(scores), ("Scores are as their files have them.",), origins=tuple(origins))
    notes = (*notes_on(listed, config.enrol.map is not None), *notes)
    return Scored(listed, 0, scores, system, people, measures=measures, notes=notes)


def _people(config: ScoringConfig, trials: Trials) -> tuple[People | None, tuple[str, ...]]:
    """Utterances of trials with scores from files, and notes on their enrolment map.

    The utterances are None where no manifest is named, and the one in the current folder lacks some of them.
    """
    by_default = config.manifest == MANIFEST and "manifest" not in config.given
    if by_default and not Path(MANIFEST).exists():
        return None, ()
    manifest = measure(Manifest.load(config.manifest, config_columns(config)))[0]
    members, notes = _members(config, trials)
    tested = [trials.names[index] for index in np.unique(trials.test)]
    names = [*itertools.chain.from_iterable(members.values()), *tested]
    if by_default and len(match(list(dict.fromkeys(names)), manifest.index_of)) < len(set(names)):
        log(f"note: {MANIFEST} lacks utterances of {trials.source}: it is not used")
        return None, ()
    ids = _found(names, manifest, trials, members)

    def utterance(name: str) -> Utterance:
        return manifest[manifest.index_of[ids[name]]]

    enrolment = {name: [utterance(member) for member in used] for name, used in members.items()}
    return People(enrolment, {name: utterance(name) for name in tested}, manifest.notes), notes


def config_columns(config: ScoringConfig) -> list[str]:
    """Columns of the manifest that the settings name, in addition to those that every manifest has."""
    own = ("duration", "speaker") if config.vad == NONE else ("duration", "speaker", "speech")
    return [name for name in getattr(config, "by", []) if name not in own]


def check_cohort(config: ScoringConfig) -> None:
    """Check that there is a cohort where a setting needs one. Raises UsageError where there is none."""
    uses = [f"backend={config.backend}"] * (config.backend == "plda") + [f"norm={config.norm}"] * (
        config.norm != "none"
    )
    uses += ["subtract_mean=true"] * config.subtract_mean
    if uses and config.cohort.source is None:
        raise UsageError(f"{uses[0]} needs cohort=FILE, a manifest or a cache of other speakers")


def subset(trials: Trials, kept: np.ndarray) -> Trials:
    """Trials at the given places."""
    label = None if trials.label is None else trials.label[kept]
    return replace(
        trials, enrolment=trials.enrolment[kept], test=trials.test[kept], label=label, line=trials.line[kept]
    )


def _members(config: ScoringConfig, trials: Trials) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Utterances of every name on the enrolment side, and notes on the enrolment map."""
    names = [trials.names[index] for index in np.unique(trials.enrolment)]
    if config.enrol.map is None:
        return {name: [name] for name in names}, ()
    enrolment_map = read_map(config.enrol.map)
    models = enrolment_map.members
    for name in names:
        if name not in models:
            near = did_you_mean(name, list(models)[:10_000])
            raise UsageError(f"{trials.source}:{_line_of(trials, name)}: {name!r} is not in {config.enrol.map}{near}")
    notes = [f"{config.enrol.map}: {note}" for note in enrolment_map.notes]
    enrolled = trials_of_enrolled(trials, models)
    if len(enrolled):
        place = f"first: line {int(trials.line[enrolled].min())}"
        notes.append(f"{trials.source}: trials that test an utterance of their own model: {len(enrolled):,} ({place})")
    return {name: list(models[name]) for name in names}, tuple(notes)


def ids_of(trials: Trials, manifest: Manifest) -> dict[str, str]:
    """Ids in the manifest by name in the trials. Raises UsageError where the manifest lacks one."""
    return _found(trials.names, manifest, trials, {})


def _found(names: list[str], manifest: Manifest, trials: Trials, members: Mapping[str, list[str]]) -> dict[str, str]:
    """Ids in the manifest by utterance, as a trial or an enrolment map names it."""
    wanted = list(dict.fromkeys(names))
    ids = match(wanted, manifest.index_of)
    if missing := [name for name in wanted if name not in ids]:
        name = missing[0]
        owner = next((model for model, used in members.items() if name in used), name)
        if len(missing) == len(wanted):
            advice = "; the manifest is of other recordings, or has other ids"
        else:
            advice = did_you_mean(name, list(manifest.index_of)[:10_000])
        raise UsageError(
            f"{trials.source}:{_line_of(trials, owner)}: utterance {name!r} is not in {manifest.source} "
            f"({len(missing)} such of {len(wanted)}){advice}"
        )
    return ids


def _line_of(trials: Trials, name: str) -> int:
    index = trials.names.index(name)
    return int(trials.line[int(np.argmax((trials.enrolment == index) | (trials.test == index)))])


def _part(manifest: Manifest, ids: Iterable[str]) -> Manifest:
    return manifest.take([manifest.index_of[name] for name in dict.fromkeys(ids)])


def _averages(vectors: np.ndarray, rows: list[list[int]]) -> np.ndarray:
    """Mean of the rows (of vectors (N, D)) in each list, scaled to length 1: (lists, D)."""
    if all(len(some) == 1 for some in rows):
        return vectors[[some[0] for some in rows]]
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
    starts = np.cumsum([0, *(len(some) for some in rows[:-1])])
    return normalised(np.add.reduceat(vectors[flat], starts))


def _durations(trials: Trials, people: People, of_speech: bool = False) -> Pair:
    """Logarithm of the duration (s), with silence or of speech alone, of both sides of every trial."""

    def seconds(utterance: Utterance) -> float:
        return (utterance.duration if of_speech else utterance.whole) or 0.0

    enrolment, test = (np.zeros(len(trials.names)) for _ in range(2))
    index_of = {name: index for index, name in enumerate(trials.names)}
    for name, used in people.enrolment.items():
        enrolment[index_of[name]] = sum(map(seconds, used))
    for name, utterance in people.test.items():
        test[index_of[name]] = seconds(utterance)
    left, right = (np.log(np.maximum(side, 0.01)) for side in (enrolment, test))
    return left[trials.enrolment], right[trials.test]
