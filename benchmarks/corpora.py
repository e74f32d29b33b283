"""Corpora of the shape that the benchmarks read, small and synthetic, for their tiny mode."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file

from spkd.demo.synthesis import speaker, utterance

SAMPLE_RATE = 16_000
MELS, WIDTH, LAYERS = 40, 256, 3  # of the GE2E d-vector


def synthesise(root: Path) -> tuple[Path, Path]:
    """Write librispeech-mini, speechocean-mini, unlabelled-mini, arabic-commands-mini and noise below a folder, with
    random weights of a GE2E d-vector. Returns the folder and the file of the weights; what is there is kept."""
    weights = root / "dvector.safetensors"
    if not weights.is_file():
        libri, ocean = root / "librispeech-mini", root / "speechocean-mini"
        write_split(libri, "train", 4, 1, 6.2)  # of which recipe.py cuts pieces
        write_list(libri, "test-other", write_split(libri, "test-other", 4, 2, 1.2))
        write_list(libri, "test-short", write_split(libri, "test-short", 4, 2, 1.2))
        write_split(ocean, "train", 6, 2, 1.6)
        write_list(ocean, "test", write_split(ocean, "test", 4, 2, 1.2))
        write_split(root / "unlabelled-mini", "train", 2, 2, 1.2, labelled=False)
        write_split(root / "arabic-commands-mini", "train", 3, 4, 1.2)
        for folder in ("noise", "babble", "rir_sim", "rir_sample"):
            (root / "noise" / folder).mkdir(parents=True)
            samples = 0.05 * np.random.RandomState(0).standard_normal(SAMPLE_RATE)
            if folder.startswith("rir"):
                samples *= np.exp(-np.arange(SAMPLE_RATE) / 1000)
            soundfile.write(root / "noise" / folder / "0.wav", samples, SAMPLE_RATE)
        write_dvector(weights)
    return root, weights


def write_split(
    corpus: Path, split: str, speakers: int, each: int, seconds: float, labelled: bool = True
) -> list[dict[str, str]]:
    """Audio and manifest of a split; its rows. Names end in the recording round."""
    rows = []
    (corpus / "audio" / split).mkdir(parents=True)
    for s, u in itertools.product(range(speakers), range(each)):
        who = f"{corpus.name}_{split}".replace("-", "_") + f"_{s}"
        name = f"{who}-{u}-r{u // 2}"
        path = corpus / "audio" / split / f"{name}.wav"
        soundfile.write(path, utterance(speaker(s), 10 * s + u, seconds), SAMPLE_RATE)
        row = {"utt": name, "path": str(path.relative_to(corpus)), "duration": f"{seconds}"}
        rows.append(row | {"speaker": who, "gender": "mf"[s % 2], "age": "30"} if labelled else row)
    with open(corpus / f"{split}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def write_list(corpus: Path, split: str, rows: list[dict[str, str]]) -> None:
    """Trials of all pairs."""
    pairs = itertools.combinations(rows, 2)
    lines = [f"{int(a['speaker'] == b['speaker'])} {a['utt']} {b['utt']}\n" for a, b in pairs]
    (corpus / f"trials-{split}.txt").write_text("".join(lines))


def write_dvector(path: Path) -> None:
    """Random weights of a GE2E d-vector."""
    torch.manual_seed(0)
    lstm, linear = torch.nn.LSTM(MELS, WIDTH, LAYERS, batch_first=True), torch.nn.Linear(WIDTH, WIDTH)
    tensors = {f"lstm.{name}": value for name, value in lstm.state_dict().items()}
    save_file(tensors | {f"linear.{name}": value for name, value in linear.state_dict().items()}, path)
