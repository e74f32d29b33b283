"""The teacher's own classifier: with it logits follow exactly from the embedding, at a thirtieth of their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import linear, normalize

from spkd.errors import SpkdError

FILE = "head.safetensors"
STORED = "stored"  # the logits themselves are a target of the cache; the card keeps their classes


@dataclass(frozen=True)
class Head:
    """kind cosine: logits = scale * cosine(embedding, weight); linear: scale * (embedding @ weight^T + bias).

    weight (classes, D), bias (classes,) or None.
    """

    weight: Tensor
    classes: list[str]
    scale: float = 1.0
    kind: str = "cosine"
    bias: Tensor | None = None

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, D) -> (B, classes), float32, on the embedding's device. No margin."""
        embedding, weight = embedding.float(), self.weight.to(embedding.device).float()
        if self.kind == "cosine":
            return self.scale * linear(normalize(embedding, dim=-1), normalize(weight, dim=-1))
        bias = None if self.bias is None else self.bias.to(embedding.device).float()
        return self.scale * linear(embedding, weight, bias)

    def card(self) -> dict[str, Any]:
        return {"kind": self.kind, "classes": self.classes, "scale": self.scale}

    def to_bytes(self) -> bytes:
        """The matrices, as safetensors; what `load` reads beside the card."""
        from safetensors.torch import save

        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return save({name: values.detach().float().cpu().contiguous() for name, values in tensors.items()})

    @classmethod
    def load(cls, root: Path, described: dict[str, Any]) -> Head:
        """Raises SpkdError where the file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load((root / FILE).read_bytes())
            weight = tensors["weight"]
        except (OSError, SafetensorError, KeyError) as error:
            raise SpkdError(f"{root / FILE}: missing or damaged ({error})") from error
        return cls(weight, described["classes"], described["scale"], described["kind"], tensors.get("bias"))
