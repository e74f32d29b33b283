"""The teacher cache: one Zarr v3 array per target, filled unit by unit, read by memory map."""

from spkd.cache.codebook import Codebook
from spkd.cache.contents import Contents, Crop
from spkd.cache.head import Head
from spkd.cache.plan import Plan
from spkd.cache.read import Cache, Ragged, verify
from spkd.cache.target import EMBEDDING, FBANK, FEATURES, LOGITS, WAVE, Target
from spkd.cache.write import Background, UnitWriter, claim_units, finalize, heartbeat, initialise

__all__ = [
    "EMBEDDING",
    "FBANK",
    "FEATURES",
    "LOGITS",
    "WAVE",
    "Background",
    "Cache",
    "Codebook",
    "Contents",
    "Crop",
    "Head",
    "Plan",
    "Ragged",
    "Target",
    "UnitWriter",
    "claim_units",
    "finalize",
    "heartbeat",
    "initialise",
    "verify",
]
