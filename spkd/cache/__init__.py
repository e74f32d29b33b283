"""The teacher cache: one Zarr v3 array per target, filled unit by unit, read by memory map."""

from spkd.cache.background import Background
from spkd.cache.card import Card, Part
from spkd.cache.claims import claim_units
from spkd.cache.codebook import Codebook
from spkd.cache.crop import Crop, Rows
from spkd.cache.plan import Plan
from spkd.cache.read import Cache, Ragged
from spkd.cache.source import CacheSource
from spkd.cache.verify import verify
from spkd.cache.write import UnitWriter, finalize, initialise

__all__ = [
    "Background",
    "Cache",
    "CacheSource",
    "Card",
    "Codebook",
    "Crop",
    "Part",
    "Plan",
    "Ragged",
    "Rows",
    "UnitWriter",
    "claim_units",
    "finalize",
    "initialise",
    "verify",
]
