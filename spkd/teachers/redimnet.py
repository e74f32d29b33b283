"""Checkpoints of the authors of ReDimNet (Yakovlev et al., Interspeech 2024, arXiv 2407.18223) and ReDimNet2 (2026,
arXiv 2603.11841): one file with `model_config` and `state_dict`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError, did_you_mean
from spkd.networks.network import count_parameters
from spkd.networks.toolkits.redimnet import CONTEXTS, MAPS, AuthorsReDimNet, Shape, StageShape, names_of
from spkd.outputs.features import CPU, HOP
from spkd.students import read_state, weights_of
from spkd.teachers.redimnet_features import MelBanks, mel_filters, mel_front_end
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import FrontEnd, ToolkitTeacher, fill
from spkd.teachers.wespeaker_features import TFMel, tfmel_filters, tfmel_front_end

CONFIG, STATE = "model_config", "state_dict"
CITE = (
    "Yakovlev et al., Reshape dimensions network for speaker recognition, Interspeech 2024, arXiv 2407.18223; "
    "ReDimNet2: scaling speaker verification via time-pooled dimension reshaping, 2026, arXiv 2603.11841"
)
POOLINGS = ("ASTP", "TSTP", "TAP", "TSDP")
MOST = 4096  # largest number of bands, channels and widths in a file
MOST_BLOCKS = 64  # of a stage, and stages of a network
# Stages of the authors' code where a file has none of its own, by whether it is ReDimNet2.
STAGES: dict[bool, list[Any]] = {
    False: [[1, 2, 1, 0, 12], [2, 2, 1, 0, 12], [1, 3, 1, 0, 12], [2, 4, 1, 0, 8], [1, 4, 1, 0, 8], [2, 4, 1, 0, 4]],
    True: [
        *([[1, 1], 2, 4, [[3, 3]], 24], [[2, 1], 3, 3, [[3, 3]], 24], [[1, 2], 4, 2, [[3, 3]], 24]),
        *([[2, 1], 5, 1, [[3, 3]], 24], [[1, 2], 4, 1, [[3, 3]], 24], [[2, 1], 3, 1, [[3, 3]], 24]),
    ],
}
# WeSpeaker's names of ReDimNet2: channels, width after the last layer, whether that takes each band, and the stages:
# strides over bands and time, blocks, expansion, reduction.
Sizes = tuple[int, int | None, bool, list[tuple[int, int, int, float, int]]]
_SMALL = [(1, 1, 2, 2), (2, 1, 3, 1), (1, 2, 4, 1), (2, 1, 5, 1), (1, 2, 4, 1), (2, 1, 3, 1)]
_LARGE = [(1, 1, 2, 4), (2, 1, 3, 3), (1, 2, 4, 2), (2, 1, 5, 1), (1, 2, 4, 1), (2, 1, 3, 1)]


def _with(stages: Iterable[tuple[int, ...]], *reductions: int) -> list[Any]:
    return [(*stage, reduction) for stage, reduction in zip(stages, reductions, strict=True)]


SECOND: dict[str, Sizes] = {
    "ReDimNet2B0": (12, 64, False, _with(_SMALL, 36, 36, 36, 36, 18, 18)),
    "ReDimNet2B1": (16, 64, False, _with(_SMALL, 32, 32, 32, 32, 16, 16)),
    "ReDimNet2B2": (20, 64, False, _with([*_SMALL[:3], (3, 1, 5, 1), *_SMALL[4:]], 40, 30, 30, 20, 20, 10)),
    "ReDimNet2B3": (24, 64, False, _with(_SMALL, 36, 36, 36, 36, 18, 18)),
    "ReDimNet2B4": (32, None, False, _with(_LARGE, 24, 24, 24, 24, 24, 24)),
    "ReDimNet2B5": (48, 256, False, _with(_LARGE, 48, 48, 48, 48, 32, 32)),
    "ReDimNet2B6": (
        *(64, 224, True),
        [
            (1, 1, 3, 3, 64),
            (2, 1, 4, 2, 64),
            (1, 2, 5, 2, 48),
            (2, 1, 5, 1, 48),
            (1, 2, 4, 0.75, 32),
            (2, 1, 3, 0.5, 24),
        ],
    ),
}


def config_of(name: str) -> dict[str, Any]:
    """Settings of the authors' code for WeSpeaker's name of a ReDimNet2."""
    channels, outputs, each_band, stages = SECOND[name]
    return {
        "C": channels,
        "out_channels": outputs,
        "return_2d_output": each_band,
        "stages_setup": [[[f, t], blocks, expansion, [[3, 3]], red] for f, t, blocks, expansion, red in stages],
    }


class Given:
    """Settings in a file, of which each has to be read before the end.

    Args:
        values: the settings.
        where: name of the file and the place in it, for errors.
    """

    def __init__(self, values: Mapping[Any, Any], where: str) -> None:
        self._values, self.where, self._read = values, where, list[str]()

    def has(self, key: str) -> bool:
        return key in self._values

    def raw(self, key: str, default: Any) -> Any:
        self._read.append(key)
        return self._values.get(key, default)

    def whole(self, key: str, default: int | None, low: int = 1, high: int = MOST) -> Any:
        """Whole number; None where that is the default."""
        value = self.raw(key, default)
        if (value is None and default is None) or (type(value) is int and low <= value <= high):
            return value
        raise self.wrong(key, value, f"{low} to {high}")

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self.raw(key, default)
        if isinstance(value, int | float) and low <= value <= high:
            return float(value)
        raise self.wrong(key, value, f"{low:g} to {high:g}")

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.choice(key, default, (True, False)))

    def choice(self, key: str, default: Any, known: Collection[Any]) -> Any:
        """One of several values; None stands for the default where it is known."""
        value = self.raw(key, default)
        if isinstance(value, str | int | None) and value in known:
            return value
        raise self.wrong(key, value, ", ".join(map(str, known)))

    def ignore(self, *keys: str) -> None:
        """Name settings that act only in training."""
        self._read += keys

    def finish(self) -> None:
        """Raise UsageError for a setting that was not read, since it may change the outputs."""
        for key in self._values:
            if key not in self._read:
                raise UsageError(f"{self.where}.{str(key)[:60]} is not known here{did_you_mean(str(key), self._read)}")

    def wrong(self, key: str, value: Any, expected: str) -> UsageError:
        return UsageError(f"{self.where}.{key} is {str(value)[:60]}: spkd takes {expected}")


def shape_of(given: Given, second: bool) -> Shape:
    """Shape that settings of the authors' code describe. Raises UsageError for values that spkd does not have.

    Args:
        second: whether they are those of ReDimNet2.
    """
    flat = not given.flag("return_2d_output", False) if second else True
    if second:
        given.choice("causal", "none", ("none",))
        given.choice("spec_in_channels", 1, (1,))
        given.choice("use_freq_pos_enc", False, (False,))
        given.choice("fm_weigthing_type", "NC", ("NC",))
    else:
        given.choice("tf_optimized_arch", False, (False,))
    given.choice("return_all_outputs", False, (False,))
    given.ignore("feat_agg_dropout", "class_dropout", "head_activation")
    return Shape(
        given.whole("F", 72),
        given.whole("C", 24 if second else 16),
        tuple(_stage(given, value, second) for value in _stages(given, second)),
        given.choice("block_2d_type", "basic_resnet" if second else "convnext_like", MAPS),
        given.choice("block_1d_type", "conv+att" if second else "att", CONTEXTS),
        None if given.raw("group_divisor", 1) is None else given.whole("group_divisor", 1 if second else 4),
        second,
        given.whole("out_channels", None),
        flat,
        given.flag("compress_tconvs", True) if second else False,
        given.flag("dual_agg", False) if second else False,
        given.flag("agg_gnorm", False) if second else False,
    )


def _stages(given: Given, second: bool) -> list[Any]:
    value = given.raw("stages_setup", None)
    value = STAGES[second] if value is None else value
    if isinstance(value, list | tuple) and 1 <= len(value) <= MOST_BLOCKS:
        return list(value)
    raise given.wrong("stages_setup", value, f"1 to {MOST_BLOCKS} stages")


def _stage(given: Given, value: Any, second: bool) -> StageShape:
    """Shape of a stage: stride, blocks, expansion, kernels, reduction. Strides of ReDimNet are over bands alone."""
    try:
        stride, blocks, expansion, kernels, reduction = value
        bands, time = stride if second else (stride, 1)
        # The kernels of ReDimNet are not used by its code.
        pairs = tuple((int(a), int(b)) for a, b in kernels) if second else ((3, 3),)
        numbers = (bands, time, blocks, *(n for pair in pairs for n in pair), 1 if reduction is None else reduction)
        if not (all(type(n) is int and 1 <= n <= MOST for n in numbers) and 0 < float(expansion) <= 64 and pairs):
            raise ValueError
        if max(blocks, time, len(pairs)) > MOST_BLOCKS:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise given.wrong("stages_setup", value, "stages of stride, blocks, expansion, kernels, reduction") from error
    return StageShape(bands, time, blocks, float(expansion), reduction, pairs)


def is_second(config: Mapping[Any, Any]) -> bool:
    """Whether settings are those of ReDimNet2, whose strides are pairs."""
    stages = config.get("stages_setup")
    try:
        return isinstance(stages[0][0], list | tuple)  # type: ignore[index]
    except (TypeError, IndexError, KeyError):
        return any(key in config for key in ("causal", "compress_tconvs", "fm_weigthing_type"))


def of_wespeaker(
    name: str, arguments: dict[str, Any], bands: int, tensors: dict[str, Tensor], where: str
) -> tuple[AuthorsReDimNet, list[tuple[str, str]]]:
    """Network of WeSpeaker's name of a ReDimNet2, and the rules of its names (see spkd.teachers.toolkit.fill).

    Args:
        arguments: `model_args` of WeSpeaker, which override the settings of the name.
        bands: bands of the input.
        tensors: the weights.
        where: place of the arguments, for errors.
    Raises:
        UsageError: settings that spkd does not have.
    """
    given = Given({"F": bands} | config_of(name) | arguments, where)
    if given.whole("feat_dim", bands) != bands:
        raise given.wrong("feat_dim", arguments["feat_dim"], f"the {bands} bands of its features")
    given.choice("two_emb_layer", False, (False,))
    given.choice("spec", "fbank", ("fbank", None))
    shape = shape_of(given, second=True)
    network = network_of(given, shape, tensors)
    _check_whole(given)
    given.ignore("feat_type", "hop_length", "spec_params", "num_classes")  # of features that it does not compute
    given.finish()
    return network, names_of(shape)


def _check_whole(given: Given) -> None:
    """Refuse views that are longer in the network than they are."""
    given.choice("pad_right_samples", None, (None, 0))
    given.choice("before_pool_offset", None, (None, 0))


def network_of(given: Given, shape: Shape, tensors: dict[str, Tensor]) -> AuthorsReDimNet:
    """Network with the output layers that settings describe, for the weights of a file.

    Raises:
        UsageError: widths that it cannot have, or more weights than the file holds.
    """
    arguments = (
        given.whole("embed_dim", 192),
        given.choice("pooling_func", "ASTP", POOLINGS),
        given.flag("global_context_att", shape.second),
        given.flag("emb_bn", False),
    )
    try:
        with torch.device("meta"):  # of any size, without its memory
            needed = count_parameters(AuthorsReDimNet(shape, *arguments))
        if needed > sum(values.numel() for values in tensors.values()):
            raise ValueError(f"they describe a network of {needed:,} weights, more than the file has")
        return AuthorsReDimNet(shape, *arguments)
    except ValueError as error:
        raise UsageError(f"{given.where}: {error}") from error


def front_end_of(given: Given, shape: Shape, where: str) -> tuple[FrontEnd, Tensor]:
    """Front end that settings describe, and its mel filters."""
    is_tf = given.choice("feat_type", "pt", ("pt", "pt_mel", "tf", "tf_mel")).startswith("tf")
    given.choice("hop_length", HOP, (HOP,))
    spec = given.raw("spec_params", {})
    if not isinstance(spec, dict):
        raise given.wrong("spec_params", spec, "settings by name")
    own = Given(spec, f"{where}.spec_params")
    own.choice("sample_rate", SAMPLE_RATE, (SAMPLE_RATE,))
    own.ignore("do_spec_aug", "freq_start_bin", "freq_mask_width", "time_mask_width")
    points, window = own.whole("n_fft", 512, 64, 8192), own.whole("win_length", 400, 64, 8192)
    low, high = own.number("f_min", 20.0, 0, 4000), own.number("f_max", 7600.0, 4000, 8000)
    norm, emphasis = own.flag("norm_signal", False), own.flag("do_preemph", True)
    if window > points or points % 2:
        raise UsageError(f"{where}.spec_params: windows of {window} samples, n_fft {points}")
    if is_tf:
        least = own.number("eps", 1e-8, 1e-12, 1e-2)
        own.finish()
        described = TFMel(shape.bands, points, window, low, high, norm, emphasis, least)
        return tfmel_front_end(described), tfmel_filters(shape.bands, points, low, high, CPU)
    own.ignore("num_apply_spec_aug")
    settings = MelBanks(points, window, low, high, norm, emphasis, own.choice("spec_norm", "mn", ("mn", "mvn")))
    own.finish()
    return mel_front_end(shape.bands, settings), mel_filters(shape.bands, points, low, high, CPU)


class ReDimNetTeacher(ToolkitTeacher):
    """ReDimNet and ReDimNet2 in the checkpoints of their authors, which hold settings, features and weights.

    Targets: frames, of which ReDimNet2 has one for each of its slowest steps (40 ms for B0 to B6), stats and embedding.
    """

    cite = CITE
    family = "redimnet"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> ReDimNetTeacher:
        """Load a model; `weights` is the file."""
        return cls(config.weights, device)

    def __init__(self, weights: str | None, device: torch.device) -> None:
        if weights is None:
            raise UsageError(f"{self.family}: name the checkpoint by weights=..., such as b0-vox2-lm.pt")
        saved = read_state(weights)
        if not (isinstance(saved, dict) and isinstance(saved.get(CONFIG), dict) and STATE in saved):
            raise UsageError(
                f"{weights}: expected {CONFIG} and {STATE}, as the authors of ReDimNet save them; models of WeSpeaker "
                "are teacher=wespeaker"
            )
        tensors, where = weights_of(saved[STATE], weights), f"{Path(weights).name}: {CONFIG}"
        config = saved[CONFIG]
        given, second = Given(config, where), is_second(config)
        shape = shape_of(given, second)
        network = network_of(given, shape, tensors)
        front_end, filters = front_end_of(given, shape, where)
        if second:
            _check_whole(given)
            given.ignore("num_classes")
        else:
            given.choice("num_classes", None, (None,))
        given.finish()
        self.source = Path(weights).name
        self.architecture = "ReDimNet2" if second else "ReDimNet"
        _check_features(tensors, filters, weights)
        tensors.pop(f"backbone.stage0{'_pre' if shape.dual else ''}.0.w", None)  # its only input has the weight 1
        fill(network, tensors, weights, names_of(shape))
        super().__init__(network, front_end, None, device)


def _check_features(tensors: dict[str, Tensor], filters: Tensor, source: str) -> None:
    """Take windows and filters out of the weights. Raises UsageError where filters are not those of the settings."""
    for name in [name for name in tensors if name.startswith("spec.torchfbank.")]:
        values = tensors.pop(name)
        if name.endswith(".melbanks_pt"):  # of the form (mels, bins, 1)
            values = values.squeeze(-1).T
        elif not name.endswith(".mel_scale.fb"):
            continue
        if values.shape != filters.shape or not torch.allclose(values, filters, atol=1e-4):
            raise UsageError(f"{source}: its mel filters are not those of its settings")
