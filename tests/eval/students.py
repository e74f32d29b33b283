"""Untrained students whose embeddings differ: those of a fresh network are nearly parallel."""

from __future__ import annotations

from pathlib import Path

import soundfile
import torch

from spkd.corpus.manifest import Manifest
from spkd.students import Checkpoint, build, save_student


def save_untrained(
    folder: Path, corpus: Path, seed: int = 0, embedding: int = 8, channels: int = 16, nested: tuple[int, ...] = ()
) -> Path:
    """A small x-vector whose embeddings of the corpus have a mean of zero."""
    torch.manual_seed(seed)
    network = build("xvector", channels=channels, embedding=embedding).eval()
    waves = [
        torch.from_numpy(soundfile.read(u.path, dtype="float32")[0]) for u in Manifest.load(corpus / "manifest.csv")
    ]
    with torch.no_grad():
        found = torch.cat([network(network.features(wave[None]))["embedding"] for wave in waves])
        network.segment_b[2].bias -= found.mean(0)
    network.nested = nested
    save_student(folder, Checkpoint(network))
    return folder
