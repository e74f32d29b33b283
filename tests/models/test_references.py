"""Networks against the public implementations of the same architecture, after copying the weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from spkd import models
from spkd.models.ecapa import ECAPA
from spkd.models.xvector import XVector

speechbrain = pytest.importorskip("speechbrain")


def scrambled(network: nn.Module) -> nn.Module:
    """Batch-norms that are no identities, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for name, values in network.state_dict().items():
        if name.endswith("running_mean"):
            values.copy_(torch.randn(values.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return network.eval()


def zero_padded(network: nn.Module) -> nn.Module:
    """speechbrain mirrors the edges, the papers pad with zeros."""
    for module in network.modules():
        if hasattr(module, "padding_mode"):
            module.padding_mode = "constant"
    return network


def conv_block(theirs: nn.Module, mine: nn.Module) -> None:
    """conv.conv and norm.norm into a sequence of convolution, ReLU, batch-norm."""
    mine[0].load_state_dict(theirs.conv.conv.state_dict())  # type: ignore[index, union-attr, operator, arg-type]
    mine[2].load_state_dict(theirs.norm.norm.state_dict())  # type: ignore[index, union-attr, operator, arg-type]


def test_ecapa_is_speechbrains() -> None:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    torch.manual_seed(0)
    theirs = scrambled(zero_padded(ECAPA_TDNN(80, lin_neurons=24, channels=[32] * 4 + [96])))
    mine = models.build("ecapa", channels=32, embedding=24).eval()
    assert isinstance(mine, ECAPA)
    conv_block(theirs.blocks[0], mine.stem)  # type: ignore[index, arg-type]
    for block, their_block in zip(mine.blocks, theirs.blocks[1:], strict=True):  # type: ignore[index, arg-type]
        first, res2, last, squeeze = block.layers  # type: ignore[misc, union-attr]
        conv_block(their_block.tdnn1, first)  # type: ignore[union-attr, arg-type]
        conv_block(their_block.tdnn2, last)  # type: ignore[union-attr, arg-type]
        for a, b in zip(res2.blocks, their_block.res2net_block.blocks, strict=True):  # type: ignore[union-attr, arg-type]
            conv_block(b, a)
        squeeze.gate[0].load_state_dict(their_block.se_block.conv1.conv.state_dict())  # type: ignore[union-attr, index, operator, arg-type]
        squeeze.gate[2].load_state_dict(their_block.se_block.conv2.conv.state_dict())  # type: ignore[union-attr, index, operator, arg-type]
    conv_block(theirs.mfa, mine.join)  # type: ignore[arg-type]
    attention = mine.pool[0].attention  # type: ignore[union-attr]
    conv_block(theirs.asp.tdnn, attention[0])  # type: ignore[union-attr, index, arg-type]
    attention[2].load_state_dict(theirs.asp.conv.conv.state_dict())  # type: ignore[index, union-attr, operator, arg-type]
    mine.pool[1].load_state_dict(theirs.asp_bn.norm.state_dict())  # type: ignore[union-attr, operator, arg-type]
    mine.project.weight.data = theirs.fc.conv.weight.data[..., 0]  # type: ignore[union-attr, index]
    mine.project.bias.data = theirs.fc.conv.bias.data  # type: ignore[union-attr, assignment]
    features = torch.randn(3, 150, 80)
    features = features - features.mean(1, keepdim=True)
    with torch.no_grad():
        expected = theirs(features)[:, 0]
        found = mine(features)["embedding"]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_xvector_is_speechbrains() -> None:
    from speechbrain.lobes.models.Xvector import Xvector

    torch.manual_seed(0)
    layout = {
        "tdnn_channels": [32, 32, 32, 32, 64],
        "tdnn_kernel_sizes": [5, 3, 3, 1, 1],
        "tdnn_dilations": [1, 2, 3, 1, 1],
    }
    theirs = Xvector("cpu", nn.ReLU, 5, **layout, lin_neurons=24, in_channels=80)
    theirs = scrambled(zero_padded(theirs))
    mine = models.build("xvector", channels=32, embedding=24).eval()
    assert isinstance(mine, XVector)
    *frame_layers, pooling, last = theirs.blocks  # type: ignore[misc]
    assert len(frame_layers) == 15  # five times convolution, activation, norm
    for i, block in enumerate(mine.tdnn):
        block[0].load_state_dict(frame_layers[3 * i].conv.state_dict())  # type: ignore[index, union-attr, operator, arg-type]
        block[2].load_state_dict(frame_layers[3 * i + 2].norm.state_dict())  # type: ignore[index, union-attr, operator, arg-type]
    frames = 150
    weight = last.w.weight.data.clone()
    # Theirs pools the deviation of the sample, ours of the population.
    weight[:, 64:] *= (frames / (frames - 1)) ** 0.5
    mine.segment_a.weight.data, mine.segment_a.bias.data = weight, last.w.bias.data
    features = torch.randn(3, frames, 80)
    features = features - features.mean(1, keepdim=True)
    x = features
    with torch.no_grad(), warnings.catch_warnings():
        for layer in frame_layers:
            x = layer(x)
        found = mine(features)
        assert torch.allclose(found["frames"], x, rtol=1e-4, atol=1e-5)
        assert type(pooling).__name__ == "StatisticsPooling"
        # Its pooling adds noise of about 1e-4.
        assert torch.allclose(found["segment.a"], theirs(features)[:, 0], atol=2e-3)
