"""The teacher's speaker classifier. With it, logits follow exactly from the embedding, in a thirtieth of the bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from spkd.errors import SpkdError
from spkd.files.reading import MOST_OF_WEIGHTS, read_bytes
from spkd.files.sealed import open_tensors, seal_tensors

STORED = "stored"  # kind of a head whose logits are a target of the cache; only the card's list of classes is kept


@dataclass(frozen=True)
class HeadCard:
    """Description of a teacher's classification head on the card of a cache.

    Attributes:
        kind: cosine, linear, or stored where the logits themselves are a target.
        scale: factor of the logits.
    """

    kind: str = field(metadata={"choices": ("cosine", "linear", STORED)})
    classes: tuple[str, ...]
    scale: float


class _Matrices(NamedTuple):
    """Matrices of a head in float32 on one device. Rows of the weight of a cosine head have unit length."""

    weight: Tensor
    bias: Tensor | None
    layer: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Head:
    """A classification head.

    Of kind cosine, logits = scale * cosine(x, weight); of kind linear, logits = scale * (x @ weight^T + bias). x is the
    embedding, or the output of a linear layer over it.

    Attributes:
        weight: (classes, D); or (classes * K, D) with K sub-centres for each class, of which the nearest counts.
        scale: factor of the logits.
        kind: cosine or linear.
        bias: (classes,), or None.
        layer: weight (D, E) and bias (D,) of the linear layer between the embedding (E) and the classes; None where
            there is none.
    """

    weight: Tensor
    classes: list[str]
    scale: float = 1.0
    kind: str = "cosine"
    bias: Tensor | None = None
    layer: tuple[Tensor, Tensor] | None = None
    _placed: dict[torch.device, _Matrices] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}

    def logits(self, embedding: Tensor) -> Tensor:
        """Logits of embeddings, without a margin.

        Args:
            embedding: (B, E), or (B, D) where there is no layer.
        Returns:
            (B, classes), float32, on the device of the embedding.
        """
        x, (weight, bias, layer) = embedding.float(), self._on(embedding.device)
        if layer is not None:
            x = linear(x, *layer)
        if self.kind == "cosine":
            cosines = linear(normalize(x, dim=-1), weight)
            count = len(self.classes) or len(weight)
            if len(weight) > count:
                cosines = cosines.unflatten(-1, (count, -1)).amax(-1)
            return self.scale * cosines
        return self.scale * linear(x, weight, bias)

    def _on(self, device: torch.device) -> _Matrices:
        """Matrices on a device, where they stay: of many classes, a copy for each batch takes longer than the batch."""
        if device not in self._placed:
            with torch.inference_mode(False), torch.no_grad():
                weight, *layer = (values.to(device).float() for values in (self.weight, *(self.layer or ())))
                bias = None if self.bias is None else self.bias.to(device).float()
                if self.kind == "cosine":
                    weight = normalize(weight, dim=-1)
            self._placed[device] = _Matrices(weight, bias, tuple(layer) or None)
        return self._placed[device]

    def card(self, stored: bool = False) -> HeadCard:
        """Description of the head for a card.

        Args:
            stored: whether the logits themselves are a target, so that the matrices are not kept.
        """
        return HeadCard(STORED if stored else self.kind, tuple(self.classes), self.scale)

    def to_bytes(self) -> bytes:
        """Content of the safetensors file with the matrices and their digest, which `load` reads."""
        from safetensors.torch import save

        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        if self.layer is not None:
            tensors |= dict(zip(("layer.weight", "layer.bias"), self.layer, strict=True))
        return seal_tensors(save, {n: values.detach().float().cpu().contiguous() for n, values in tensors.items()})

    @classmethod
    def load(cls, path: Path, card: HeadCard, dim: int | None) -> Head:
        """The head that a card describes.

        Args:
            dim: width of the embedding that it takes; None where that is not known.
        Raises:
            SpkdError: the file is missing or damaged, or its matrices do not fit the classes or the embedding.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        # Read the matrices.
        try:
            data = read_bytes(path, MOST_OF_WEIGHTS)
            open_tensors(data, str(path))
            tensors = load(data)
            weight, bias = tensors["weight"], tensors.get("bias")
            layer = (tensors["layer.weight"], tensors["layer.bias"]) if "layer.weight" in tensors else None
        except (OSError, SafetensorError, KeyError) as error:
            raise SpkdError(f"{path}: missing or damaged ({error})") from error
        # Check their shapes against the classes and the embedding.
        classes = len(card.classes)
        takes = weight.shape[-1] if layer is None else layer[0].shape[-1]
        per_class = 1 if card.kind == "linear" else max(len(weight) // classes, 1)
        if weight.ndim != 2 or len(weight) != classes * per_class or dim not in (None, takes):
            raise SpkdError(f"{path}: damaged ({tuple(weight.shape)} weights for {classes} classes of width {dim})")
        if layer is not None and (layer[0].shape != (weight.shape[1], takes) or layer[1].shape != weight.shape[1:]):
            raise SpkdError(
                f"{path}: damaged (a layer of shape {tuple(layer[0].shape)} before {weight.shape[1]} inputs)"
            )
        if bias is not None and bias.shape != (classes,):
            raise SpkdError(f"{path}: damaged (a bias of shape {tuple(bias.shape)} for {classes} classes)")
        return cls(weight, list(card.classes), card.scale, card.kind, bias, layer)
