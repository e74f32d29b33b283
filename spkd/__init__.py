"""Distillation of heavy speaker-verification teachers into students small enough for a phone.

model = spkd.load()                     # the small model that comes with spkd
model = spkd.load("student")            # also an exported .onnx file, USER/NAME on the Hugging Face hub, or a teacher
model.embed(["a.wav", "b.wav"])         # (2, D)
model.verify("a.wav", "b.wav").same     # by the threshold that travels with the model
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from spkd.version import __version__

if TYPE_CHECKING:
    from spkd.errors import SpkdError, UsageError
    from spkd.mapping.embedding_map import EmbeddingMap, load_map
    from spkd.model import Identification, SpeakerModel, Verification, load
    from spkd.voiceprint import Voiceprint
    from spkd.voices.store import Voices

__all__ = [
    "EmbeddingMap",
    "Identification",
    "SpeakerModel",
    "SpkdError",
    "UsageError",
    "Verification",
    "Voiceprint",
    "Voices",
    "__version__",
    "load",
    "load_map",
]
# Name in the interface -> its module.
_PLACES = {
    **dict.fromkeys(("SpkdError", "UsageError"), "spkd.errors"),
    **dict.fromkeys(("Identification", "SpeakerModel", "Verification", "load"), "spkd.model"),
    **dict.fromkeys(("EmbeddingMap", "load_map"), "spkd.mapping.embedding_map"),
    "Voiceprint": "spkd.voiceprint",
    "Voices": "spkd.voices.store",
}


def __getattr__(name: str) -> Any:
    """A name of the Python interface, imported on first use, so that the command line does not wait for the import."""
    if name in _PLACES:
        return getattr(_import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'spkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
