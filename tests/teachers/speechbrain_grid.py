"""Settings of SpeechBrain's models that change an embedding, at small widths, one after the other and together."""

from __future__ import annotations

from typing import Any

import yaml

MODELS = "speechbrain.lobes.models."
ECAPA: dict[str, Any] = {
    "input_size": 24,
    "channels": [16, 16, 16, 16, 32],
    "kernel_sizes": [5, 3, 3, 3, 1],
    "dilations": [1, 2, 3, 4, 1],
    "attention_channels": 12,
    "se_channels": 10,
    "lin_neurons": 14,
}
XVECTOR: dict[str, Any] = {"in_channels": 24, "tdnn_channels": [16, 16, 16, 16, 20], "lin_neurons": 14}
RESNET: dict[str, Any] = {"input_size": 24, "channels": [4, 4, 8, 8], "block_sizes": [2, 1, 1, 2], "lin_neurons": 14}
KINDS = {"ecapa": ("ECAPA_TDNN.ECAPA_TDNN", ECAPA), "xvector": ("Xvector.Xvector", XVECTOR),
         "resnet": ("ResNet.ResNet", RESNET)}  # fmt: skip
SENTENCE = {"norm_type": "sentence", "std_norm": False}


def activation(name: str, **settings: float) -> str:
    """Text that `text` leaves as it is: YAML has no other way to write a tag."""
    return f"!name:torch.nn.{name} {settings or ''}".replace("'", "")


def text(
    kind: str,
    fbank: dict[str, Any] | None = None,
    norm: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    extra: str = "",
) -> str:
    """A hyperparams.yaml. fbank, norm, model: settings in addition to the usual ones."""

    def section(name: str, made: str, settings: dict[str, Any]) -> str:
        lines = [f"{name}: !new:{made}"]
        for key, value in settings.items():
            written = (
                value
                if isinstance(value, str) and value.startswith("!")
                else yaml.safe_dump(value, default_flow_style=True).split("\n...")[0]
            )
            lines.append(f"    {key}: {written.strip()}")
        return "\n".join(lines)

    network, usual = KINDS[kind]
    sections = [
        "sample_rate: 16000\nn_mels: 24",
        section("compute_features", "speechbrain.lobes.features.Fbank", {"n_mels": "!ref <n_mels>"} | (fbank or {})),
        section(
            "mean_var_norm",
            "speechbrain.processing.features.InputNormalization",
            SENTENCE if norm is None else norm,
        ),
        section("embedding_model", MODELS + network, usual | (model or {})),
        "modules:\n    compute_features: !ref <compute_features>\n    mean_var_norm: !ref <mean_var_norm>\n"
        "    embedding_model: !ref <embedding_model>",
        extra,
    ]
    return "\n".join(sections) + "\n"


CASES = {
    "ecapa": text("ecapa"),
    "ecapa f_min": text("ecapa", {"f_min": 60}),
    "ecapa f_max": text("ecapa", {"f_max": 7600}),
    "ecapa n_fft": text("ecapa", {"n_fft": 512}),
    "ecapa win_length": text("ecapa", {"win_length": 20}),
    "ecapa n_fft, win_length": text("ecapa", {"n_fft": 512, "win_length": 32}),
    "ecapa gaussian": text("ecapa", {"filter_shape": "gaussian"}),
    "ecapa rectangular": text("ecapa", {"filter_shape": "rectangular", "n_mels": 16}, model={"input_size": 16}),
    "ecapa n_mels": text("ecapa", {"n_mels": 40}, model={"input_size": 40}),
    "ecapa default n_mels": text("ecapa", {"n_mels": 40}, model={"input_size": 40}).replace(
        "    n_mels: 40\n", "    deltas: False\n"
    ),
    "ecapa deltas": text("ecapa", {"deltas": True}, model={"input_size": 72}),
    "ecapa context": text("ecapa", {"context": True}, model={"input_size": 264}),
    "ecapa left_frames": text(
        "ecapa", {"context": True, "left_frames": 2, "right_frames": 1}, model={"input_size": 96}
    ),
    "ecapa deltas, right_frames": text(
        "ecapa", {"context": True, "left_frames": 0, "right_frames": 2, "deltas": True}, model={"input_size": 216}
    ),
    "ecapa context is off": text("ecapa", {"left_frames": 2, "right_frames": 1}),
    "ecapa std_norm": text("ecapa", norm={"norm_type": "sentence", "std_norm": True}),
    "ecapa default std_norm": text("ecapa", norm={"norm_type": "sentence"}),
    "ecapa epsilon": text("ecapa", norm={"norm_type": "sentence", "epsilon": 9.5}),
    "ecapa small epsilon": text("ecapa", norm={"norm_type": "sentence"}).replace(
        "    norm_type: sentence\n", "    norm_type: sentence\n    epsilon: 1e-10\n"
    ),
    "ecapa LeakyReLU": text("ecapa", model={"activation": activation("LeakyReLU")}),
    "ecapa negative_slope": text("ecapa", model={"activation": activation("LeakyReLU", negative_slope=0.2)}),
    "ecapa GELU": text("ecapa", model={"activation": activation("GELU")}),
    "ecapa dilations": text("ecapa", model={"dilations": [1, 1, 2, 5, 1]}),
    "ecapa dilation of the first": text("ecapa", model={"dilations": [2, 2, 3, 4, 1]}),
    "ecapa kernel_sizes": text("ecapa", model={"kernel_sizes": [3, 5, 3, 1, 1]}),
    "ecapa last kernel": text("ecapa", model={"kernel_sizes": [5, 3, 3, 3, 3], "dilations": [1, 2, 3, 4, 2]}),
    "ecapa channels": text("ecapa", model={"channels": [24, 16, 16, 16, 40]}),
    "ecapa four blocks": text(
        "ecapa",
        model={"channels": [16] * 5 + [32], "kernel_sizes": [5, 3, 3, 3, 3, 1], "dilations": [1, 2, 3, 4, 5, 1],
               "groups": [1] * 6},
    ),
    "ecapa groups": text("ecapa", model={"groups": [1, 2, 4, 2, 1]}),
    "ecapa groups of all": text("ecapa", model={"groups": [2, 2, 1, 1, 4]}),
    "ecapa attention_channels": text("ecapa", model={"attention_channels": 6, "se_channels": 4}),
    "ecapa res2net_scale": text("ecapa", model={"res2net_scale": 4}),
    "ecapa without Res2": text("ecapa", model={"res2net_scale": 1}),
    "ecapa global_context": text("ecapa", model={"global_context": False}),
    "ecapa all": text(
        "ecapa",
        {"n_fft": 512, "f_min": 20, "f_max": 7600, "deltas": True},
        {"norm_type": "sentence"},
        {"input_size": 72, "activation": activation("SiLU"), "dilations": [1, 3, 2, 1, 1], "groups": [3, 2, 1, 1, 1],
         "channels": [24, 16, 16, 16, 32], "global_context": False},
    ),
    "xvector": text("xvector"),
    "xvector f_min, win_length": text("xvector", {"f_min": 40, "win_length": 22}),
    "xvector deltas": text("xvector", {"deltas": True}, model={"in_channels": 72}),
    "xvector ReLU": text("xvector", model={"activation": activation("ReLU")}),
    "xvector Tanh": text("xvector", model={"activation": activation("Tanh")}),
    "xvector dilations": text("xvector", model={"tdnn_dilations": [2, 1, 3, 1, 1]}),
    "xvector kernels": text("xvector", model={"tdnn_kernel_sizes": [3, 5, 3, 3, 1]}),
    "xvector three blocks": text("xvector", model={"tdnn_blocks": 3}),
    "xvector std_norm": text("xvector", norm={"norm_type": "sentence"}),
    "resnet": text("resnet"),
    "resnet strides": text("resnet", model={"strides": [1, 2, 2, 1]}),
    "resnet strides of the first": text("resnet", model={"strides": [2, 2, 1, 2]}),
    "resnet activation": text("resnet", model={"activation": activation("GELU")}),
    "resnet blocks": text("resnet", model={"block_sizes": [1, 2, 2, 1], "channels": [4, 6, 8, 10]}),
    "resnet n_mels": text("resnet", {"n_mels": 30}, model={"input_size": 30}),
    "resnet std_norm, f_max": text("resnet", {"f_max": 7000}, {"norm_type": "sentence"}),
}  # fmt: skip

# What spkd does not have, and what its refusal says.
REFUSED = {
    "sample_rate=8000": text("ecapa", {"sample_rate": 8000}),
    "hop_length=8": text("ecapa", {"hop_length": 8}),
    "requires_grad=True": text("ecapa", {"requires_grad": True}),
    "compute_features: f_min": text("ecapa", {"f_min": 5000, "f_max": 4000}),
    "with n_fft 256": text("ecapa", {"n_fft": 256}),
    "n_fft=511": text("ecapa", {"n_fft": 511}),
    "filter_shape='mel'": text("ecapa", {"filter_shape": "mel"}),
    "n_mels='24'": text("ecapa", {"n_mels": "24"}),
    "compute_features.power is not known": text("ecapa", {"power": 1}),
    "compute_features.n_mels: '<n_mels> \\* 2' is an expression": text("ecapa", {"n_mels": "!ref <n_mels> * 2"}),
    "compute_features.f_min: refers to low": text("ecapa", {"f_min": "!ref <low>"}),
    "compute_features.f_min: references without end": text("ecapa", {"f_min": "!ref <a>"}, extra="a: !ref <a>"),
    "compute_features is speechbrain.lobes.features.MFCC": text("ecapa").replace("features.Fbank", "features.MFCC"),
    "norm_type='global'": text("ecapa", norm={"norm_type": "global", "std_norm": False}),
    "norm_type is not set, which is 'global'": text("ecapa", norm={"std_norm": False}),
    "norm_type='batch'": text("ecapa", norm={"norm_type": "batch"}),
    "mean_norm=False": text("ecapa", norm=SENTENCE | {"mean_norm": False}),
    "mean_var_norm.momentum is not known": text("ecapa", norm=SENTENCE | {"momentum": 0.1}),
    "mean_var_norm: refers to mean_var_norm": text("ecapa").replace("mean_var_norm: !new", "other: !new"),
    "embedding_model.activation=!name:torch.nn.PReLU": text("ecapa", model={"activation": activation("PReLU")}),
    "embedding_model.activation=!name:os.system": text("ecapa", model={"activation": "!name:os.system"}),
    "embedding_model.activation": text("ecapa", model={"activation": activation("ReLU", slope=0.1)}),
    "embedding_model.layers is not known": text("ecapa", model={"layers": 4}),
    "embedding_model.dilations=\\[1, 2\\]": text("ecapa", model={"dilations": [1, 2]}),
    "embedding_model is .*Xvector.Xvector": text("xvector"),
    "4 with dilation 1 loses a frame": text("ecapa", model={"kernel_sizes": [4, 3, 3, 3, 1]}),
    "its weights take 24 features a frame, and compute_features gives 72": text("ecapa", {"deltas": True}),
    "modules.wav2vec2 is not known": text("ecapa", extra="    wav2vec2: !ref <n_mels>"),
    "audio_normalizer.sample_rate=8000": text(
        "ecapa", extra="audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer\n    sample_rate: 8000"
    ),
    "pretrainer.paths.embedding_model='other.ckpt'": text(
        "ecapa",
        extra="pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer\n    paths:\n"
        "        embedding_model: other.ckpt",
    ),
    "pretrainer.loadables.compute_features is not known": text(
        "ecapa",
        extra="pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer\n    loadables:\n"
        "        compute_features: !ref <compute_features>",
    ),
    "n_mels is there twice": text("ecapa", extra="n_mels: 24"),
    "audio of 8000 Hz": text("ecapa").replace("16000", "8000"),
}
