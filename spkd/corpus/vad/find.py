"""Speech of all utterances of a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from spkd.corpus.audio import SAMPLE_RATE, AudioError
from spkd.corpus.manifest import Manifest
from spkd.corpus.utterance import Utterance
from spkd.corpus.vad.base import SpeechFinder, Stretches
from spkd.progress import track


def speech_alone(manifest: Manifest, finder: SpeechFinder | None, workers: int = 8) -> tuple[Manifest, dict[str, str]]:
    """Find the speech of the utterances whose speech is not known.

    Args:
        manifest: the utterances, all measured.
        finder: None finds nothing, and takes utterances whole.
        workers: number of threads.
    Returns:
        The utterances with speech, and the id of each other -> the reason.
    Raises:
        SpkdError: the names of a file of segments are not clear.
    """
    if finder is None:
        return manifest, {}
    finder.check(manifest)
    unknown, found, unusable = [u for u in manifest if u.speech is None], dict[str, Stretches](), dict[str, str]()
    with track("finding speech", len(unknown), "utterances") as bar:
        for utterance, result in find_each(unknown, finder, workers):
            if isinstance(result, AudioError):
                unusable[utterance.id] = result.reason
            else:
                found[utterance.id] = result
            bar.advance(1)
    cut, silent = with_stretches(manifest, found, finder)
    return cut, unusable | silent


def find_each(
    utterances: Sequence[Utterance], finder: SpeechFinder, workers: int
) -> Iterator[tuple[Utterance, Stretches | AudioError]]:
    """Each measured utterance with its stretches of speech, in order; or the error where its audio cannot be used.

    Args:
        workers: number of threads.
    """

    def result(utterance: Utterance) -> Stretches | AudioError:
        try:
            return finder.stretches(utterance)
        except AudioError as error:
            return error
        except MemoryError:
            return AudioError(utterance.path, "does not fit into memory; cut it into shorter utterances")

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, "speech", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from zip(utterances, pool.map(result, utterances), strict=True)
    finally:
        torch.set_num_threads(threads)  # for threads to come: torch keeps the number that any thread set last


def with_stretches(
    manifest: Manifest, stretches: Mapping[str, Stretches], finder: SpeechFinder
) -> tuple[Manifest, dict[str, str]]:
    """The utterances with their speech, and the id of each in which there is none -> the reason.

    Args:
        stretches: stretches of speech by id; other utterances are left out where their speech is not known already.
    """
    with_speech = (u.of_speech(stretches[u.id], SAMPLE_RATE) if u.id in stretches else u for u in manifest)
    known = Manifest(with_speech, manifest.source, manifest.notes)
    columns, counts = known.utterances, np.diff(known.utterances.ends, prepend=0)
    without = np.flatnonzero(~np.isnan(columns.whole) & (counts == 0))
    silent = {known.ids[index]: f"no speech in it ({finder.card})" for index in without.tolist()}
    return Manifest(columns.take(counts > 0), manifest.source, manifest.notes), silent
