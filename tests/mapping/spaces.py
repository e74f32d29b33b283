"""Students whose spaces are known: another network, and the same one turned by a rotation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from spkd.students import Checkpoint, load_student, save_student
from tests.eval.students import save_untrained

DIM = 6


def save_turned(folder: Path, source: Path, seed: int = 3) -> np.ndarray:
    """Save a student whose embeddings are those of another one, turned. Returns the rotation (D, D): x -> x @ it."""
    network = load_student(source).network
    last = network.get_submodule("segment_b.2")
    turn = np.linalg.qr(np.random.RandomState(seed).standard_normal((DIM, DIM)))[0]
    with torch.no_grad():
        last.weight.copy_(torch.from_numpy(turn.T) @ last.weight.double())  # type: ignore[operator, union-attr]
        last.bias.copy_(torch.from_numpy(turn.T) @ last.bias.double())  # type: ignore[operator, union-attr]
    save_student(folder, Checkpoint(network))
    return turn


def make_spaces(spkd: Callable, corpus: Path) -> np.ndarray:
    """`old`, a student; `new`, which gives the same turned; `other`, another one; caches old-cache, new-cache and
    other-cache of their embeddings; and a map of each pair. Returns the rotation."""
    save_untrained(Path("old"), corpus, embedding=DIM)
    save_untrained(Path("other"), corpus, seed=1, embedding=DIM + 2)
    turn = save_turned(Path("new"), Path("old"))
    for name in ("old", "new", "other"):
        extract(spkd, corpus, name, f"{name}-cache")
    for out, caches in (("map", ("old-cache", "new-cache")), ("wide-map", ("other-cache", "new-cache"))):
        spkd("map", *caches, f"out={out}", "hidden=0", "steps=1").ok()
    return turn


def extract(spkd: Callable, corpus: Path, student: str, cache: str, *more: str) -> None:
    """Extract the embeddings of the corpus with a student."""
    given = [f"manifest={corpus / 'manifest.csv'}", f"cache={cache}", *more]
    spkd("extract", "teacher=checkpoint", f"teacher.weights={student}", *given).ok()
