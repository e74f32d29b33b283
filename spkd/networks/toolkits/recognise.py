"""Recognition of the network of a file of weights, from the names and shapes of its tensors.

WeSpeaker and 3D-Speaker share names; the shapes tell the rest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spkd.networks.campplus import CAMPPlus
from spkd.networks.network import Network
from spkd.networks.resnet import FLOOR
from spkd.networks.toolkits.ecapa import SpeechBrainECAPA, WeSpeakerECAPA
from spkd.networks.toolkits.eres2net import ERes2Net, ERes2NetV2, Res2Net
from spkd.networks.toolkits.gemini import GeminiDFResNet
from spkd.networks.toolkits.pooling import make_pooling
from spkd.networks.toolkits.redimnet import SHAPES, ReDimNet, names_of
from spkd.networks.toolkits.repvgg import BlockShape, RepVGG
from spkd.networks.toolkits.resnet import DEPTHS, ResNet, SimAMResNet
from spkd.networks.toolkits.whisper import PMFA
from spkd.networks.toolkits.xvector import WeSpeakerXVector
from spkd.outputs.features import MELS

_CONV = ((r"\.0\.(\w+)$", r".conv.conv.\1"), (r"\.2\.(\w+)$", r".norm.norm.\1"))
SPEECHBRAIN_ECAPA = (
    (r"^stem\.", "blocks.0."),
    (r"^blocks\.(\d+)\.(layers|shortcut)\.", lambda m: f"blocks.{int(m[1]) + 1}.{m[2]}."),
    (r"\.shortcut\.", ".shortcut.conv."),
    (r"\.layers\.(\d)\.", lambda m: f".{('tdnn1', 'res2net_block', 'tdnn2', 'se_block')[int(m[1])]}."),
    (r"\.gate\.0\.", ".conv1.conv."),
    (r"\.gate\.2\.", ".conv2.conv."),
    (r"^pool\.0\.attention\.2\.", "asp.conv.conv."),
    (r"^pool\.0\.attention\.0\.", "asp.tdnn."),
    (r"^pool\.1\.", "asp_bn.norm."),
    (r"^project\.", "fc.conv."),
    (r"^join\.", "mfa."),
    *_CONV,
)
SPEECHBRAIN_XVECTOR = (
    (r"^blocks\.(\d+)\.0\.", lambda m: f"blocks.{3 * int(m[1])}.conv."),
    (r"^blocks\.(\d+)\.2\.", lambda m: f"blocks.{3 * int(m[1]) + 2}.norm."),
)
SPEECHBRAIN_RESNET = ((r"\.se\.", ".se.fc."), (r"^pool\.", ""))
WESPEAKER_ECAPA = (
    (r"^stem\.0\.", "layer1.conv."),
    (r"^stem\.2\.", "layer1.bn."),
    (r"^blocks\.(\d+)\.layers\.", lambda m: f"layer{int(m[1]) + 2}.se_res2block."),
    (r"\.1\.blocks\.(\d)\.0\.", r".1.convs.\1."),
    (r"\.1\.blocks\.(\d)\.2\.", r".1.bns.\1."),
    (r"\.gate\.0\.", ".linear1."),
    (r"\.gate\.2\.", ".linear2."),
    (r"(se_res2block\.[02])\.0\.", r"\1.conv."),
    (r"(se_res2block\.[02])\.2\.", r"\1.bn."),
    (r"^join\.0\.", "conv."),
    (r"^pool\.0\.", "pool."),
    (r"^pool\.1\.", "bn."),
    (r"^project\.1\.", "bn2."),
    (r"^project(\.0)?\.", "linear."),
)
# WeSpeaker names the first convolution of a fused block differently from the others.
WESPEAKER_ERES2NET = (
    (r"^(layer[34]\.\d+)\.(conv|bn)s\.(\d)\.", lambda m: f"{m[1]}.{m[2]}s.{int(m[3]) - 1}."),
    (r"^(layer[34]\.\d+)\.(conv|bn)s\.-1\.", r"\1.\g<2>2_1."),
)
REPVGG = ((r"^stage0\.0\.", "stage0."),)
WHISPER_PMFA = ((r"^pool\.", "pooling."), (r"^norm\.", "bn.norm."), (r"^project\.", "fc."))
# Weights that tell a pooling where the settings leave it to the architecture.
_POOLINGS = {"pool.linear1.weight": "ASTP", "pool.prior_mean": "XI"}
SIMAM = (
    (r"^(conv1|bn1|layer\d)\.", r"front.\1."),
    (r"\.shortcut\.", ".downsample."),
    (r"^pool\.", "pooling."),
    (r"^seg_1\.", "bottleneck."),
)


def recognise(
    tensors: dict[str, Tensor], mels: int = MELS, pooling: str | None = None, floor: float = FLOOR, name: str = ""
) -> tuple[Network, Any]:
    """Network with the shapes of these weights, and the rules of its names (see `fill`).

    Args:
        mels: bands of the input, where the shapes do not tell.
        pooling: WeSpeaker's name of the pooling, which shapes do not tell; None: that of the architecture.
        floor: number added to a variance before its root.
        name: name of the architecture, where the shapes do not tell.
    Raises:
        ValueError: an unknown architecture.
        KeyError: a weight is lacking.
    """

    def rows(name: str) -> int:
        return tensors[name].shape[0]

    def count(pattern: str) -> int:
        """Number of modules whose name has a number instead of `*`."""
        before, after = pattern.split("*")
        numbers = {
            n[len(before) :].split(".")[0] for n in tensors if n.startswith(before) and after in n[len(before) :]
        }
        return len(numbers)

    # Architectures with a characteristic name.
    if "backbone.stem.0.weight" in tensors:
        if name not in SHAPES:
            raise ValueError(f"a ReDimNet that is not known here ({name})")
        tensors.pop("backbone.inputs_weights.0", None)  # the first stage has one input, whose weight is 1
        redimnet = ReDimNet(name, len(tensors["seg_1.weight"]), mels, pooling or "ASTP", "seg_2.weight" in tensors)
        return redimnet, names_of(redimnet.shape, wespeaker=True)
    pooling = pooling or next((p for n, p in _POOLINGS.items() if n in tensors), "TSTP")
    if "xvector.tdnn.linear.weight" in tensors:
        # 3D-Speaker adds no floor to the variance in this network, unlike in its others.
        floor = FLOOR if floor == FLOOR else 0.0
        channels, embedding = rows("xvector.tdnn.linear.weight"), rows("xvector.dense.linear.weight")
        return CAMPPlus(channels, embedding, mels, *make_pooling(pooling, 4 * channels, floor=floor)), ()
    if "bn.norm.weight" in tensors:
        return PMFA(tensors["pooling.linear2.weight"].shape[0], rows("fc.weight")), WHISPER_PMFA
    if "fc.conv.weight" in tensors:
        return speechbrain_ecapa(tensors), SPEECHBRAIN_ECAPA
    if "layer2.se_res2block.0.conv.weight" in tensors:
        channels, bands, _ = tensors["layer1.conv.weight"].shape
        attention = tensors.get("pool.linear1.weight")
        context = attention is not None and attention.shape[1] == 3 * WeSpeakerECAPA.WIDE
        normalised = "bn2.weight" in tensors
        ecapa = WeSpeakerECAPA(channels, rows("linear.weight"), bands, context, normalised, pooling)
        return ecapa, WESPEAKER_ECAPA
    if "frame_1.conv_1d.weight" in tensors:
        first, last = tensors["frame_1.conv_1d.weight"], tensors["frame_5.conv_1d.weight"]
        return WeSpeakerXVector(first.shape[0], last.shape[0], rows("seg_1.weight"), first.shape[1], pooling), ()
    if "front.conv1.weight" in tensors:
        layers = {16: 34, 49: 100}[sum(count(f"front.layer{i}.*.conv1") for i in range(1, 5))]
        return SimAMResNet(layers, rows("front.conv1.weight"), rows("bottleneck.weight"), mels), SIMAM
    if "downsample_layers.0.0.weight" in tensors:
        widths = [rows(f"downsample_layers.{i}.0.weight") for i in range(5)]
        blocks = [count(f"stages.{i}.*.conv1") for i in range(4)]
        segment = "seg_2.weight" in tensors
        return GeminiDFResNet(widths, blocks, rows("seg_1.weight"), mels, pooling, segment), ()
    if "stage0.rbr_reparam.weight" in tensors:
        return RepVGG(repvgg_stages(tensors), rows("seg.weight"), mels, pooling), REPVGG
    # Res2Nets, ERes2Nets and ResNets, whose shapes tell widths and depths.
    channels, embedding, segment = rows("conv1.weight"), rows("seg_1.weight"), "seg_2.weight" in tensors
    if "layer1.0.convs.0.weight" in tensors:
        scale = count("layer1.0.convs.*.")
        expansion = rows("layer1.0.conv3.weight") // channels
        base = 64 * rows("layer4.0.convs.0.weight") // (8 * channels)
        if "layer3_ds.weight" not in tensors and "layer3_downsample.weight" not in tensors:
            return Res2Net(channels, embedding, base, scale + 1, mels, pooling, segment), ()
        kind: type[ERes2Net] | type[ERes2NetV2] = ERes2NetV2 if "layer3_ds.weight" in tensors else ERes2Net
        names = WESPEAKER_ERES2NET if "layer3.0.conv2_1.weight" in tensors else ()
        return kind(channels, embedding, base, scale, expansion, mels, pooling, segment, floor), names
    depths = tuple(count(f"layer{i}.*.conv1") for i in range(1, 5))
    wide = "layer1.0.conv3.weight" in tensors
    layers = next((n for n, depth in DEPTHS.items() if depth == depths and (n >= 50) == wide), 0)
    if not layers:
        raise ValueError("an architecture that is not known here")
    return ResNet(layers, channels, embedding, mels, pooling, segment, floor), ()


def repvgg_stages(tensors: dict[str, Tensor]) -> list[list[BlockShape]]:
    """Shapes of the blocks of a deployed RepVGG, for each of its five stages."""
    stages: list[list[BlockShape]] = [[] for _ in range(5)]
    inputs = 1
    for number, stage in enumerate(stages):
        while True:
            prefix = f"stage{number}." if number == 0 else f"stage{number}.{len(stage)}."
            kernel = tensors.get(f"{prefix}rbr_reparam.weight")
            if kernel is None or (number == 0 and stage):
                break
            outputs, own, size, _ = kernel.shape
            squeeze = tensors.get(f"{prefix}se.fc_1.weight")
            stage.append(BlockShape(inputs, outputs, size, inputs // own, 0 if squeeze is None else len(squeeze)))
            inputs = outputs
        if not stage:
            raise KeyError(f"{prefix}rbr_reparam.weight")
    return stages


def speechbrain_ecapa(tensors: dict[str, Tensor], groups: int = 1, **unseen: Any) -> SpeechBrainECAPA:
    """SpeechBrain's ECAPA-TDNN with the shapes of these weights.

    Args:
        groups: groups of the first layer, which shapes do not tell.
        unseen: dilations and activation, which shapes do not tell either.
    Raises:
        KeyError: a weight is lacking.
    """
    stem, join = tensors["blocks.0.conv.conv.weight"], tensors["mfa.conv.conv.weight"]
    attention = tensors["asp.tdnn.conv.conv.weight"]
    count = 1
    while f"blocks.{count}.tdnn1.conv.conv.weight" in tensors:
        count += 1
    layers = [tensors[f"blocks.{i}.tdnn1.conv.conv.weight"] for i in range(1, count)]
    cascades = [tensors.get(f"blocks.{i}.res2net_block.blocks.0.conv.conv.weight") for i in range(1, count)]
    scale = 1
    while f"blocks.1.res2net_block.blocks.{scale - 1}.conv.conv.weight" in tensors:
        scale += 1
    channels = [len(layer) for layer in (stem, *layers, join)]
    return SpeechBrainECAPA(
        channels,
        len(tensors["fc.conv.weight"]),
        stem.shape[1] * groups,
        kernels=[stem.shape[2], *(1 if c is None else c.shape[2] for c in cascades), join.shape[2]],
        groups=[
            groups,
            *(wide // layer.shape[1] for wide, layer in zip(channels, layers, strict=False)),
            sum(channels[1:-1]) // join.shape[1],
        ],
        scale=scale,
        squeeze=len(tensors["blocks.1.se_block.conv1.conv.weight"]),
        attention=len(attention),
        context=attention.shape[1] == 3 * len(join),
        **unseen,
    )
