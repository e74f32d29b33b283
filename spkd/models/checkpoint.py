"""A trained student on disk: model.safetensors (weights) beside model.json (everything needed to rebuild it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from spkd import __version__
from spkd.errors import SpkdError, UsageError
from spkd.features import HOP, MELS, WINDOW
from spkd.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from spkd.models.network import Network

FORMAT = 1
HEAD = "head.weight"  # beside the network's own weights: the classifier, where training had one


@dataclass
class Checkpoint:
    """A network, and the classifier it was trained with, if any.

    head: (classes, D) rows of a cosine classifier over `classes`, applied with `scale`.
    training: what the run was (losses, steps, data), for people.
    """

    network: Network
    head: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    scale: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)


def read_weights(file: str) -> dict[str, Tensor]:
    """Tensors by name of a file that others wrote: safetensors, or torch's own format, of which nothing is executed.

    Raises:
        UsageError: no such file. SpkdError: it cannot be read as weights.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{file}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path.read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model_state", "state_dict", "model"):
            state = state.get(key, state)
        return {name: values for name, values in state.items() if isinstance(values, Tensor)}
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise SpkdError(f"{path}: cannot be read as weights ({str(error).splitlines()[0]})") from error


def save(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write both files, each atomically; weights first, so that model.json never describes absent weights."""
    from spkd.models import NETWORKS

    folder, network = Path(folder), checkpoint.network
    tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if checkpoint.head is not None:
        tensors[HEAD] = checkpoint.head.detach().cpu().contiguous()
    write_bytes(folder / "model.safetensors", save_tensors(tensors))
    card = {
        "spkd_model": FORMAT,
        "network": next(name for name, kind in NETWORKS.items() if type(network) is kind),
        "settings": network.settings,
        "features": {"kind": "fbank", "mels": MELS, "window": WINDOW, "hop": HOP, "normalise": "mean"},
        "classes": checkpoint.classes,
        "scale": checkpoint.scale,
        "training": checkpoint.training,
        "version": __version__,
    }
    write_json(folder / "model.json", card)


def load(folder: str | Path) -> Checkpoint:
    """Read a checkpoint; the network is in evaluation mode, on the CPU.

    Raises:
        UsageError: the folder holds no checkpoint. SpkdError: it is damaged or of a newer format.
    """
    from spkd.models import NETWORKS, build

    folder = Path(folder)
    if not (folder / "model.json").is_file():
        raise UsageError(f"{folder}: no spkd checkpoint (model.json, model.safetensors); train one with `spkd train`")
    card = read_json(folder / "model.json")
    if not isinstance(card, dict) or card.get("spkd_model") != FORMAT:
        raise SpkdError(f"{folder / 'model.json'}: not a checkpoint of format {FORMAT}; update spkd to read it")
    if card.get("network") not in NETWORKS:
        raise SpkdError(f"{folder / 'model.json'}: unknown network {card.get('network')!r}")
    weights = folder / "model.safetensors"
    try:
        network = build(card["network"], **card["settings"])
        tensors = load_tensors(weights.read_bytes())
        network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k != HEAD})
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise SpkdError(f"{weights}: damaged or of another network ({str(error).splitlines()[0]})") from error
    return Checkpoint(network.eval(), tensors.get(HEAD), card["classes"], card["scale"], card["training"])
