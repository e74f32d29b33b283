"""Networks against speechbrain's of the same architecture, after copying the weights.

speechbrain runs in a process of its own: once imported, its lazy modules fail under everything that looks through the
loaded modules, pytest among them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spkd.students import build

from ..conftest import HAS_SPEECHBRAIN

pytestmark = pytest.mark.skipif(not HAS_SPEECHBRAIN, reason="needs speechbrain")

# Saves the networks' weights, features and what they say of them. Batch-norms are made no identities; speechbrain
# mirrors the edges where the papers pad with zeros.
SCRIPT = """
import torch
from safetensors.torch import save_file
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.Xvector import Xvector

def ecapa():
    return ECAPA_TDNN(80, lin_neurons=24, channels=[32] * 4 + [96])

def xvector():
    layout = dict(tdnn_channels=[32] * 4 + [64], tdnn_kernel_sizes=[5, 3, 3, 1, 1], tdnn_dilations=[1, 2, 3, 1, 1])
    return Xvector("cpu", torch.nn.ReLU, 5, **layout, lin_neurons=24, in_channels=80)

for build in (ecapa, xvector):
    torch.manual_seed(0)
    network = build()
    for name, values in network.state_dict().items():
        if name.endswith("running_mean"):
            values.copy_(0.1 * torch.randn(values.shape))
        elif name.endswith("running_var"):
            values.copy_(torch.rand(values.shape) + 0.5)
    for module in network.modules():
        if hasattr(module, "padding_mode"):
            module.padding_mode = "constant"
    network.eval()
    features = torch.randn(3, 150, 80)
    features = features - features.mean(1, keepdim=True)
    found = {"features": features}
    with torch.no_grad():
        found["embedding"] = network(features)[:, 0]
        if build is xvector:
            for layer in network.blocks[:15]:
                features = layer(features)
            found["frames"] = features
    tensors = {**network.state_dict(), **found}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, f"{build.__name__}.safetensors")
"""


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def renamed(weights: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The weights under our names: every key that begins with one of theirs."""
    found = {}
    for theirs, mine in names.items():
        for key, values in weights.items():
            if key.startswith(theirs + "."):
                found[mine + key[len(theirs) :]] = values
    return found


def block(theirs: str, mine: str) -> dict[str, str]:
    """Convolution and batch-norm of a TDNN layer; ReLU stands between."""
    return {f"{theirs}.conv.conv": f"{mine}.0", f"{theirs}.norm.norm": f"{mine}.2"}


def test_ecapa_is_speechbrains(references: Path) -> None:
    weights = load_file(references / "ecapa.safetensors")
    names = block("blocks.0", "stem") | block("mfa", "join") | block("asp.tdnn", "pool.0.attention.0")
    names |= {"asp.conv.conv": "pool.0.attention.2", "asp_bn.norm": "pool.1", "fc.conv": "project"}
    for i in range(3):
        theirs, mine = f"blocks.{i + 1}", f"blocks.{i}.layers"
        names |= block(f"{theirs}.tdnn1", f"{mine}.0") | block(f"{theirs}.tdnn2", f"{mine}.2")
        for group in range(7):
            names |= block(f"{theirs}.res2net_block.blocks.{group}", f"{mine}.1.blocks.{group}")
        names |= {f"{theirs}.se_block.conv{n}.conv": f"{mine}.3.gate.{g}" for n, g in ((1, 0), (2, 2))}
    ours = renamed(weights, names)
    ours["project.weight"] = ours["project.weight"][..., 0]
    network = build("ecapa", channels=32, embedding=24).eval()
    network.load_state_dict(ours)
    with torch.no_grad():
        found = network(weights["features"])["embedding"]
    assert torch.allclose(found, weights["embedding"], rtol=1e-3, atol=1e-4)


def test_the_xvector_is_speechbrains(references: Path) -> None:
    weights = load_file(references / "xvector.safetensors")
    names = {f"blocks.{3 * i}.conv": f"tdnn.{i}.0" for i in range(5)}
    names |= {f"blocks.{3 * i + 2}.norm": f"tdnn.{i}.2" for i in range(5)}
    ours = renamed(weights, names | {"blocks.16.w": "segment_a"})
    # Theirs pools the deviation of the sample, ours of the population.
    ours["segment_a.weight"][:, 64:] *= (150 / 149) ** 0.5
    network = build("xvector", channels=32, embedding=24).eval()
    lacking = network.load_state_dict(ours, strict=False)
    assert not lacking.unexpected_keys
    assert all(key.startswith("segment_b.") for key in lacking.missing_keys)
    with torch.no_grad():
        found = network(weights["features"])
    assert torch.allclose(found["frames"], weights["frames"], rtol=1e-4, atol=1e-5)
    # Its pooling adds noise of about 1e-4.
    assert torch.allclose(found["segment.a"], weights["embedding"], atol=2e-3)
