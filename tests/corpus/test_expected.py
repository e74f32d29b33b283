"""Containers that change between their manifest and the reading of their audio."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from spkd.corpus import expected
from spkd.corpus.audio import AudioError, decode
from spkd.corpus.loader import ViewLoader
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan

from .test_containers import write_tar
from .test_shards import audio, indexed


def reason(path: str) -> str:
    """Why audio cannot be read; "" where it can."""
    try:
        decode(path)
    except AudioError as error:
        return error.reason
    return ""


def test_a_container_that_changes_after_its_manifest_was_read_is_refused(tmp_path: Path) -> None:
    """All members have one length, so that each place in the later tar is that of other audio."""
    first, second = ([(f"{n}.wav", audio(seed=10 * turn + n, form="WAV")) for n in range(3)] for turn in range(2))
    path = write_tar(tmp_path / "x.tar", first)
    manifest, _ = indexed(tmp_path, "x.tar")
    assert len(decode(manifest.utterances[0].path).wave)
    before = path.stat().st_mtime_ns
    write_tar(path, second)
    os.utime(path, ns=(before, before + 1_000))
    with pytest.raises(AudioError, match="its container has changed since it was indexed"):
        decode(manifest.utterances[1].path)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:  # as a loader of training has them
        assert "has changed since it was indexed" in pool.submit(reason, manifest.utterances[2].path).result()
    # A spawned process has what comes with the loader.
    plan = ViewPlan.parse(ViewConfig())
    sent = pickle.dumps(ViewLoader(manifest, plan.views(manifest), plan))
    expected.forget(str(path))
    assert reason(manifest.utterances[2].path) == ""
    loader = pickle.loads(sent)
    with pytest.raises(AudioError, match="has changed since it was indexed"):
        loader(2)
    again, _ = indexed(tmp_path, "x.tar")
    (tmp_path / "1.wav").write_bytes(second[1][1])
    assert np.array_equal(decode(again.utterances[1].path).wave, decode(str(tmp_path / "1.wav")).wave)
