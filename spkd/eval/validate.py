"""Validation of a student during training."""

from __future__ import annotations

import torch

from spkd.corpus.manifest import Manifest
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.base import NONE
from spkd.errors import SpkdError, UsageError
from spkd.eval.embed import measured
from spkd.eval.score import ids_of, notes_on_rejected, score
from spkd.eval.settings import EvalConfig
from spkd.eval.trials import digest_of_pairs, notes_on, read
from spkd.files import digest
from spkd.progress import log
from spkd.students import Network
from spkd.teachers.settings import ScoredModelConfig
from spkd.teachers.toolkit import FrontEnd, NetworkModel


class Validation:
    """EER (%) of a student on the trials that the settings name.

    Attributes:
        speakers: names of the speakers of the trials, where the manifest has them.
        utterances: ids of the utterances of the trials, as the list names them and as the manifest does.
        digest: digest of the trials, in any order.
        measures: digest of the trials and of what finds their speech.
    """

    def __init__(self, trials: str, manifest: str | None, vad: str, model: str, device: torch.device) -> None:
        """
        Args:
            vad: what leaves silence out of the audio.
        Raises:
            UsageError: no such list or manifest.
            SpkdError: a list without both kinds of trials, or with utterances that the manifest lacks.
        """
        if manifest is None:
            raise UsageError("valid.trials: name the manifest of its audio by valid.manifest")
        self._manifest, self._device = Manifest.load(manifest), device
        self._trials = read(trials, known=self._manifest.index_of)
        for note in notes_on(self._trials):
            log(f"note: {note}")
        if not self._trials.has_both_kinds:
            raise SpkdError(f"{trials}: validation needs labelled trials of both kinds")
        self._config = EvalConfig(model=ScoredModelConfig(model), vad=vad)
        self._noted = ""  # the note on utterances that cannot be used, which is printed once
        self.digest = digest_of_pairs(self._trials)
        finder = finder_of(vad)
        self.measures = self.digest if finder is None else digest.of_tree([self.digest, finder.card.to_json()])
        ids = ids_of(self._trials, self._manifest)
        used = [self._manifest[self._manifest.index_of[name]] for name in ids.values()]
        self.utterances = frozenset({*ids, *ids.values()})
        self.speakers = frozenset(u.speaker for u in used if u.speaker is not None)
        if vad != NONE:  # found once, and not at each validation
            cut = measured(Manifest(dict.fromkeys(used), self._manifest.source), self._config)[0]
            known = {utterance.id: utterance for utterance in cut}
            self._manifest = Manifest((known.get(u.id, u) for u in self._manifest), self._manifest.source)

    def __call__(self, network: Network) -> float:
        training = network.training
        try:
            front_end = FrontEnd(network.input_kind, network.features, "as in training")
            model = NetworkModel(network, front_end, self._device)
            scored = score(self._config, model, self._manifest, self._trials)
            for note in notes_on_rejected(self._trials, scored.rejected, scored.left_out):
                if note != self._noted:
                    log(f"note: {note}")
                self._noted = note
            return scored.eer_percent
        finally:
            network.train(training)


def validation(
    trials: str | None, manifest: str | None, vad: str, model: str, device: torch.device
) -> Validation | None:
    """Validation of a student during training; None where no trials are named. Arguments and errors as Validation."""
    return None if trials is None else Validation(trials, manifest, vad, model, device)
