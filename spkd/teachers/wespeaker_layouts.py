"""WeSpeaker's networks as others save them: pyannote.audio's wrapper, and the authors of w2v-BERT 2.0 with adapters.

Their settings are turned into those that WeSpeaker's config.yaml would have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from spkd.errors import UsageError
from spkd.teachers.toolkit import check_keys, read_settings, section
from spkd.teachers.wespeaker_networks import CONFIG, Model

PYANNOTE = "pyannote"  # package whose objects are in its checkpoints
PREFIX = "resnet."
# Settings of pyannote's wrapper with the values that spkd has; those of other keys act.
FIXED: dict[str, Any] = {
    "sample_rate": 16_000,
    "num_channels": 1,
    "frame_length": 25,
    "frame_shift": 10,
    "round_to_power_of_two": True,
    "snip_edges": True,
    "dither": 0,
    "use_energy": False,
    "fbank_centering_span": None,
}
WINDOWS = {"hamming": "wespeaker", "povey": "kaldi"}  # windows, and the fbank that has them
TRAIN = "train.yaml"  # settings of the authors' recipe
SPEAKER_KEYS = (
    *("model_name", "frozen_encoder", "bnb_config", "peft_config", "encoder_config", "n_mfa_layers", "pooling_layer"),
    *("embd_dim", "adapter_dim", "dropout"),
)


def is_pyannotes(tensors: dict[str, Tensor]) -> bool:
    """Whether weights have the names of pyannote.audio's wrapper of WeSpeaker's ResNets."""
    return f"{PREFIX}seg_1.weight" in tensors


def of_pyannote(state: Any, tensors: dict[str, Tensor], file: Path) -> Model:
    """Model of a checkpoint of pyannote.audio. Its pooling has no floor under variances.

    Args:
        state: content of the checkpoint, whose `hyper_parameters` act, where it has them.
        tensors: its weights.
        file: the checkpoint; section `model` of a config.yaml next to it describes the same.
    Raises:
        UsageError: a setting has a value that spkd does not have, or is not known.
    """
    content = state if isinstance(state, dict) else {}
    config = file.with_name(CONFIG)
    described = section(read_settings(config), "model") if config.is_file() else {}
    acting = {key: value for key, value in described.items() if not key.startswith("_")}
    acting |= section(content, "hyper_parameters")
    check_keys(acting, (*FIXED, "num_mel_bins", "window_type"), str(file))
    for key, value in FIXED.items():
        if acting.get(key, value) != value:
            raise UsageError(f"{file}: {key} is {str(acting[key])[:40]}; spkd has {value}")
    if (window := acting.get("window_type", "hamming")) not in WINDOWS:
        raise UsageError(f"{file}: window_type is {str(window)[:40]}; taken: {', '.join(WINDOWS)}")
    name = str(section(section(content, "pyannote.audio"), "architecture").get("class", "WeSpeakerResNet34"))
    settings = {
        "model": name.removeprefix("WeSpeaker"),
        "model_args": {"pooling_func": "TSTP"},
        "dataset_args": {"fbank_args": {"num_mel_bins": acting.get("num_mel_bins", 80)}},
    }
    own = {n.removeprefix(PREFIX): values for n, values in tensors.items()}
    return Model(str(file), own, settings, WINDOWS[window], floor=0.0)


def is_authors(state: Any) -> bool:
    """Whether the content of a file is a checkpoint of the authors of w2v-BERT 2.0 with adapters."""
    return isinstance(state, dict) and isinstance(state.get("modules"), dict) and "spk_model" in state["modules"]


def authors_settings(file: Path) -> dict[str, Any]:
    """Settings of a checkpoint of these authors as WeSpeaker's config.yaml has them.

    Args:
        file: the checkpoint; LoRA that is not merged needs the train.yaml next to it.
    Raises:
        UsageError: a setting has a value that spkd does not have, or is not known.
    """
    config = file.with_name(TRAIN)
    settings = read_settings(config) if config.is_file() else {}
    model, lora = section(settings, "spk_model"), section(settings, "peft_config")
    check_keys(model, SPEAKER_KEYS, f"{config}: spk_model")
    for key, value in (("bnb_config", None), ("pooling_layer", "ASP")):
        if model.get(key, value) != value:
            raise UsageError(f"{config}: spk_model.{key} is {str(model[key])[:40]}; spkd has {value}")
    encoder = {"use_lora": bool(lora), "lora_config_args": lora or None}
    return {
        "model": "W2VBert_Adapter_MFA",
        "model_args": {},
        "dataset_args": {"frontend": "w2vbert", "cmvn": False, "w2vbert_args": encoder},
    }
