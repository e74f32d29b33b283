"""Audio that the tests of evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from spkd.corpus.manifest import build
from spkd.demo.synthesis import speaker, utterance

COHORT_SPEAKERS, COHORT_UTTERANCES = 12, 2


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cohort.csv of twelve speakers that the corpus does not have, two utterances of 0.8 s each."""
    root = tmp_path_factory.mktemp("cohort")
    for s in range(COHORT_SPEAKERS):
        (root / "audio" / f"other{s:02}").mkdir(parents=True)
        for u in range(COHORT_UTTERANCES):
            wave = utterance(speaker(100 + s), 10_000 + 100 * s + u, 0.8)
            soundfile.write(root / "audio" / f"other{s:02}" / f"u{u}.flac", wave, 16_000)
    made, _, _ = build(root / "audio", "folder")
    made.save(root / "cohort.csv")
    return root / "cohort.csv"
