"""The teacher's own speaker classifier: with it logits follow exactly from the embedding, at a thirtieth of their
bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.nn.functional import linear, normalize

from spkd.errors import SpkdError
from spkd.files.atomic import read_bytes

STORED = "stored"  # kind of a head whose logits are a target of the cache; the card keeps the classes alone


@dataclass(frozen=True)
class HeadCard:
    """The teacher's classification head as a card describes it.

    Attributes:
        kind: cosine, linear, or stored where the logits themselves are a target.
        classes: names of the speakers.
        scale: of the logits.
    """

    kind: str = field(metadata={"choices": ("cosine", "linear", STORED)})
    classes: tuple[str, ...]
    scale: float


@dataclass(frozen=True)
class Head:
    """A classification head: kind cosine: logits = scale * cosine(x, weight); linear: scale * (x @ weight^T + bias). x
    is the embedding, or a linear layer over it.

    Attributes:
        weight: (classes, D), or (classes * K, D) with K sub-centres of each class in a row: the nearest counts.
        classes: names of the speakers.
        bias: (classes,) or None.
        layer: weight (D, E) and bias (D,) of the linear layer between the embedding (E) and the classes, if any.
    """

    weight: Tensor
    classes: list[str]
    scale: float = 1.0
    kind: str = "cosine"
    bias: Tensor | None = None
    layer: tuple[Tensor, Tensor] | None = None

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, D) -> (B, classes), float32, on the embedding's device. No margin."""
        x, weight = embedding.float(), self.weight.to(embedding.device).float()
        if self.layer is not None:
            x = linear(x, *(values.to(x.device).float() for values in self.layer))
        if self.kind == "cosine":
            cosines = linear(normalize(x, dim=-1), normalize(weight, dim=-1))
            count = len(self.classes) or len(weight)
            if len(weight) > count:
                cosines = cosines.unflatten(-1, (count, -1)).amax(-1)
            return self.scale * cosines
        bias = None if self.bias is None else self.bias.to(x.device).float()
        return self.scale * linear(x, weight, bias)

    def card(self, stored: bool = False) -> HeadCard:
        """How a card describes it. stored: the logits themselves are a target, and the matrices are not kept."""
        return HeadCard(STORED if stored else self.kind, tuple(self.classes), self.scale)

    def to_bytes(self) -> bytes:
        """The matrices, as safetensors; what `load` reads beside the card."""
        from safetensors.torch import save

        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        if self.layer is not None:
            tensors |= dict(zip(("layer.weight", "layer.bias"), self.layer, strict=True))
        return save({name: values.detach().float().cpu().contiguous() for name, values in tensors.items()})

    @classmethod
    def load(cls, path: Path, card: HeadCard, dim: int | None) -> Head:
        """The head that a card describes.

        Args:
            path: file of its matrices.
            dim: width of the embedding that it takes, where that is known.
        Raises:
            SpkdError: its file is missing or damaged, or its matrices do not fit the classes or the embedding.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(read_bytes(path))
            weight, bias = tensors["weight"], tensors.get("bias")
            layer = (tensors["layer.weight"], tensors["layer.bias"]) if "layer.weight" in tensors else None
        except (OSError, SafetensorError, KeyError) as error:
            raise SpkdError(f"{path}: missing or damaged ({error})") from error
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
