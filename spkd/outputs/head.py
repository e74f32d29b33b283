"""The teacher's speaker classifier. With it, logits follow exactly from the embedding, in a thirtieth of the bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.nn.functional import linear, normalize

from spkd.errors import SpkdError
from spkd.files.atomic import read_bytes

STORED = "stored"  # kind of a head whose logits are a target of the cache; only the card's list of classes is kept


@dataclass(frozen=True)
class HeadCard:
    """Description of a teacher's classification head on the card of a cache.

    Attributes:
        kind: cosine, linear, or stored where the logits themselves are a target.
        classes: names of the speakers.
        scale: factor of the logits.
    """

    kind: str = field(metadata={"choices": ("cosine", "linear", STORED)})
    classes: tuple[str, ...]
    scale: float


@dataclass(frozen=True)
class Head:
    """A classification head.

    Of kind cosine, logits = scale * cosine(x, weight); of kind linear, logits = scale * (x @ weight^T + bias). x is the
    embedding, or the output of a linear layer over it.

    Attributes:
        weight: (classes, D); or (classes * K, D) with K sub-centres for each class, of which the nearest counts.
        classes: names of the speakers.
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

    def logits(self, embedding: Tensor) -> Tensor:
        """Logits of embeddings, without a margin.

        Args:
            embedding: (B, E), or (B, D) where there is no layer.
        Returns:
            (B, classes), float32, on the device of the embedding.
        """
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
        """Description of the head for a card.

        Args:
            stored: whether the logits themselves are a target, so that the matrices are not kept.
        """
        return HeadCard(STORED if stored else self.kind, tuple(self.classes), self.scale)

    def to_bytes(self) -> bytes:
        """Content of the safetensors file with the matrices, which `load` reads."""
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
            card: its description on the card of the cache.
            dim: width of the embedding that it takes; None where that is not known.
        Raises:
            SpkdError: the file is missing or damaged, or its matrices do not fit the classes or the embedding.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        # Read the matrices.
        try:
            tensors = load(read_bytes(path))
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
