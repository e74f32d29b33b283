"""Student networks. All take fbank (B, T, 80) and return their named levels, so that any loss meets any student."""

from __future__ import annotations

from spkd.models.checkpoint import Checkpoint, load, save
from spkd.models.ecapa import ECAPA
from spkd.models.network import Network
from spkd.models.xvector import XVector

NETWORKS: dict[str, type[Network]] = {"xvector": XVector, "ecapa": ECAPA}


def build(name: str, channels: int, embedding: int) -> Network:
    """A network of NETWORKS with fresh weights. Raises ValueError for widths the architecture cannot have."""
    return NETWORKS[name](channels=channels, embedding=embedding)


__all__ = ["ECAPA", "NETWORKS", "Checkpoint", "Network", "XVector", "build", "load", "save"]
