"""Student networks. All take features (B, T, F) and return their named levels, so that any loss meets any student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spkd.config import StudentConfig
from spkd.errors import UsageError
from spkd.models.campplus import CAMPPlus
from spkd.models.checkpoint import Checkpoint, load, read_weights, save
from spkd.models.ecapa import ECAPA
from spkd.models.etdnn import ETDNN
from spkd.models.network import Network
from spkd.models.resnet import ResNet34
from spkd.models.ssl import SSL, beside_adapter, from_teacher
from spkd.models.tiny import Tiny
from spkd.models.xvector import XVector

NETWORKS: dict[str, type[Network]] = {
    "xvector": XVector,
    "etdnn": ETDNN,
    "ecapa": ECAPA,
    "resnet34": ResNet34,
    "campplus": CAMPPlus,
    "ssl": SSL,
    "tiny": Tiny,
}


def build(name: str, **settings: Any) -> Network:
    """A network of NETWORKS with fresh weights. Raises ValueError for widths the architecture cannot have."""
    return NETWORKS[name](**settings)


def student(config: StudentConfig) -> Network:
    """The network that the settings describe, with fresh weights or those of `init`.

    Raises:
        UsageError: widths the architecture cannot have, or weights of another one.
    """
    name, trained = config.name, config.init is not None and (Path(config.init) / "model.json").is_file()
    if config.adapters and name != "ssl":
        raise UsageError("student.adapters: only student=ssl has them")
    if config.init is not None and name == "ssl" and not trained:
        return from_teacher(config.init, config.embedding, config.layers, config.adapters)
    settings = {"channels": config.channels or NETWORKS[name].default_channels, "embedding": config.embedding}
    if name == "ssl":
        settings |= {"layers": config.layers, "adapters": config.adapters}
    try:
        network = build(name, **settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return network if config.init is None else begin(network, config.init, trained)


def begin(network: Network, source: str, trained: bool) -> Network:
    """The network with the weights of a student trained by spkd (a folder), or of a state dictionary with the same
    names: WeSpeaker's or 3D-Speaker's (a file; a classifier in it is left out).

    Raises:
        UsageError: another architecture or width.
    """
    if trained:
        weights = load(source).network.state_dict()
    else:
        weights = {k: v for k, v in read_weights(source).items() if not k.startswith("projection.")}
    # Adapters come new beside layers that were trained without.
    there = network.state_dict()
    moved = {beside_adapter(k) if k not in there and beside_adapter(k) in there else k: v for k, v in weights.items()}
    try:
        found = network.load_state_dict(moved, strict=False)
    except RuntimeError as error:
        raise UsageError(f"student.init={source}: other widths ({str(error).splitlines()[1].strip()})") from error
    lacking = [n for n in found.missing_keys if not n.endswith("num_batches_tracked") and ".feed_forward." not in n]
    if lacking or found.unexpected_keys:
        raise UsageError(f"student.init={source}: another architecture ({[*lacking, *found.unexpected_keys][0]})")
    return network


__all__ = [
    "NETWORKS",
    "SSL",
    "Checkpoint",
    "Network",
    "build",
    "load",
    "read_weights",
    "save",
    "student",
]
