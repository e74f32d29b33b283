"""Settings of stored targets."""

from __future__ import annotations

from dataclasses import dataclass

from spkd.config import key
from spkd.registry import CODECS


@dataclass
class StorageConfig:
    codec: str = key(
        "float16", f"how targets are stored: {', '.join(CODECS)} (M parts, K classes); NAME+zstd compresses as well"
    )
    codecs: dict[str, str] = key({}, "targets stored otherwise, e.g. {frames.layer8: int8, logits: topk64}")
    unit_views: int = key(
        1024, "most views in one unit (the piece that one worker fills and commits)", low=1, high=10**6
    )
    unit_seconds: float = key(1280.0, "most audio in one unit (s)", low=0.1, high=134_000)
