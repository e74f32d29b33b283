"""Settings of `spkd map`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spkd.config import Settings, key
from spkd.corpus.settings import MAX_SEED

MAP = "map"
MOST_HIDDEN = 65_536


@dataclass
class MapConfig(Settings):
    COMMAND: ClassVar[str] = "map"

    out: str = key(MAP, "folder of the map: map.safetensors and map.json", is_replaced=True)
    hidden: int = key(
        512, "width of the hidden layer beside the linear part (0: the linear part alone)", low=0, high=MOST_HIDDEN
    )
    steps: int = key(
        2000, "most training steps; it ends earlier where speakers kept aside gain no more", low=1, high=10**7
    )
    held_out: float = key(
        0.1, "share of the speakers that are kept aside, to end the training and to measure", low=0.001, high=0.5
    )
    views: int = key(200_000, "most views that are used, drawn at random", low=2, high=10**8)
    seed: int = key(
        0, "seed of what is drawn: views, speakers kept aside, first weights, batches", low=0, high=MAX_SEED
    )
