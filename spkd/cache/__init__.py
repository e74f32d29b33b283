"""The teacher cache: one Zarr v3 array per target, filled unit by unit, read by memory map."""

from spkd.cache.plan import Plan
from spkd.cache.read import Cache, Crop, Head, verify
from spkd.cache.target import EMBEDDING, FBANK, LOGITS, Target
from spkd.cache.write import UnitWriter, claim_units, finalize, heartbeat, initialise

__all__ = [
    "EMBEDDING",
    "FBANK",
    "LOGITS",
    "Cache",
    "Crop",
    "Head",
    "Plan",
    "Target",
    "UnitWriter",
    "claim_units",
    "finalize",
    "heartbeat",
    "initialise",
    "verify",
]
