"""WeSpeaker's avg_model.pt and config.yaml, for networks that WeSpeaker has too."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError
from spkd.export.base import Export, Exported, Run, checked
from spkd.export.beside import Runtime
from spkd.export.graph import SHORTEST, Embedder, toolkit_of
from spkd.files import digest
from spkd.files.atomic import write_bytes, write_json
from spkd.networks.campplus import CAMPPlus
from spkd.networks.network import Network
from spkd.networks.resnet import ResNet34
from spkd.outputs.features import HOP, MELS
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.students.description import EXPORT, EXPORT_KEY, EXPORT_RECORD
from spkd.teachers.onnx import CARD
from spkd.teachers.settings import FrontEndSettings, ModelConfig
from spkd.teachers.wespeaker import WeSpeaker as TheirModel

PACKAGES = "numpy git+https://github.com/wenet-e2e/wespeaker"
IMPORTS = """
import torch
from wespeaker import load_model
"""
CODE = """
SPEAKER = load_model(str(MODEL))


def run(x):
    return SPEAKER.extract_embedding_from_pcm(torch.from_numpy(x * 32768), ABOUT["sample_rate"]).numpy()
"""
WEIGHTS, CONFIG = "avg_model.pt", "config.yaml"
THEIRS = ((ResNet34, "ResNet34", 32), (CAMPPlus, "CAMPPlus", 128))  # network, WeSpeaker's name, its only width


class WeSpeaker(Export):
    """WeSpeaker's folder: the network alone; the toolkit computes its features."""

    file = "wespeaker"
    folder = ((WEIGHTS, CONFIG, EXPORT_RECORD), {EXPORT_RECORD: EXPORT_KEY})
    lacks = dict.fromkeys(("waveform", "trials"), "WeSpeaker's files hold the network alone, which takes fbank")

    def check(self, network: Network) -> None:
        if _name(network) is None:
            has = ", ".join(f"{theirs} of {width} channels" for _, theirs, width in THEIRS)
            raise UsageError(f"to=wespeaker: WeSpeaker does not have this network; of spkd's students it has {has}")

    def changes_scores(self, network: Network) -> str:
        kit = toolkit_of(network.input_kind)
        return "" if kit == "wespeaker" else f"WeSpeaker computes its own features, not the student's of {kit}"

    def way_to_calibrate(self, out: Path, waveform: bool) -> str:
        return "train the student with student.features=wespeaker, run `spkd calibrate`, and export it"

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        limits = (SHORTEST[False][1] * HOP, 10**7 * HOP)
        self.runtime = Runtime("WeSpeaker", PACKAGES, IMPORTS, CODE, "pcm", "embedding", limits, has_features=True)
        write_wespeaker(embedder.network, out, json.loads(metadata[CARD])["weights_sha256"])
        size = sum((out / name).stat().st_size for name in (WEIGHTS, CONFIG))
        return [replace(checked("wespeaker", out, embedder, load_wespeaker(out)), bytes=size)]


def load_wespeaker(folder: Path) -> Run:
    """Function that runs the network of a folder, as `model=wespeaker` does: features (B, T, 80) -> (B, D)."""
    config = ModelConfig("wespeaker", str(folder), settings=FrontEndSettings())
    network = TheirModel.load(config, torch.device("cpu")).network

    def run(x: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return network(x)[EMBEDDING].numpy()

    return run


def _name(network: Network) -> str | None:
    """WeSpeaker's name of a network; None where WeSpeaker lacks the network or its width."""
    channels = network.settings.get("channels")
    return next((name for kind, name, width in THEIRS if type(network) is kind and width == channels), None)


def write_wespeaker(network: Network, folder: Path, weights_sha256: str) -> None:
    """Write the weights and config.yaml, after a record of their digests, by which the folder is known as an export.

    Args:
        weights_sha256: digest of the student's weights.
    """
    name = _name(network)
    toolkit = toolkit_of(network.input_kind)
    if toolkit != "wespeaker":
        log(
            f"note: WeSpeaker computes its own features, and this student was trained on those of {toolkit}; train "
            "with student.features=wespeaker"
        )
    dimension = network.levels[EMBEDDING].dim
    arguments = {"feat_dim": MELS, "embed_dim": dimension, "pooling_func": "TSTP"}
    config = {
        "model": name,
        "model_args": arguments | ({"two_emb_layer": False} if name == "ResNet34" else {}),
        "dataset_args": {
            "frontend": "fbank",
            "resample_rate": SAMPLE_RATE,
            "fbank_args": {"num_mel_bins": MELS, "frame_length": 25, "frame_shift": 10, "dither": 0.0},
            "cmvn": True,
            "cmvn_args": {"norm_mean": True, "norm_var": False},
        },
    }
    data = io.BytesIO()
    torch.save(_weights(network, dimension), data)
    files = {WEIGHTS: data.getvalue(), CONFIG: yaml.safe_dump(config, sort_keys=False).encode()}
    digests = {name: digest.of_bytes(content) for name, content in files.items()}
    write_json(folder / EXPORT_RECORD, EXPORT.seal({"student": weights_sha256, "features": toolkit, "sha256": digests}))
    for name, content in files.items():
        write_bytes(folder / name, content)


def _weights(network: Network, dimension: int) -> dict[str, Tensor]:
    """Weights of the same network with an embedding of the first numbers alone.

    The last layers are linear, a convolution or a batch-norm, whose first axis is that of the embedding.
    """
    weights = {name: values.cpu() for name, values in network.state_dict().items()}
    if dimension == network.settings["embedding"]:
        return weights
    smaller = type(network)(**network.settings | {"embedding": dimension}).state_dict()
    return {name: values[: len(smaller[name])].clone() if values.ndim else values for name, values in weights.items()}
