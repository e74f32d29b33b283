"""Writes oracles.json: what WeSpeaker's and 3D-Speaker's own code gives, for tests on machines without it.

python -m tests.teachers.record --wespeaker CLONE --3d-speaker CLONE

What a toolkit gives that is not named stays as it is. A name is that of the model, and words that tell its settings.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchaudio.compliance import kaldi

from .fixed import fixed_wave, fixed_weights

NUMBERS = 12  # of each embedding
WESPEAKER: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet18": ("resnet", {"feat_dim": 80}),
    "ResNet34": ("resnet", {"feat_dim": 80, "two_emb_layer": True, "pooling_func": "ASTP"}),
    "ResNet50": ("resnet", {"feat_dim": 80}),
    "ECAPA_TDNN_c512": ("ecapa_tdnn", {"feat_dim": 80, "emb_bn": True}),
    "ECAPA_TDNN_GLOB_c512": ("ecapa_tdnn", {"feat_dim": 80}),
    "CAMPPlus": ("campplus", {"feat_dim": 80}),
    "XVEC": ("tdnn", {"feat_dim": 40}),
    "ERes2Net34_Base": ("eres2net", {"feat_dim": 80}),
    "SimAM_ResNet34_ASP": ("samresnet", {"acoustic_dim": 80}),
    "XI_VEC_ECAPA_TDNN_c512": ("xi_vector", {"feat_dim": 80}),
    "XI_VEC_XVEC": ("xi_vector", {"feat_dim": 40}),
    "Res2Net34_Base": ("res2net", {"feat_dim": 80}),
    "Gemini_DF_ResNet60": ("gemini_dfresnet", {"feat_dim": 80, "two_emb_layer": True}),
    "REPVGG_TINY_A0": ("repvgg", {"feat_dim": 80, "use_se": True}),
    "REPVGG_TINY_A0 deployed": ("repvgg", {"feat_dim": 80, "deploy": True}),
    "REPVGG_TINY_RSBB_A0": ("repvgg", {"feat_dim": 64}),
    "ResNet18 heads": ("resnet", {"feat_dim": 80, "pooling_func": "MHASTP"}),
    "ResNet18 queries": ("resnet", {"feat_dim": 40, "pooling_func": "MQMHASTP"}),
    "ECAPA_TDNN_c512 mean": ("ecapa_tdnn", {"feat_dim": 80, "pooling_func": "TAP"}),
    "CAMPPlus xi": ("campplus", {"feat_dim": 80, "pooling_func": "XI"}),
    "ReDimNetB0": ("redimnet", {"feat_dim": 60}),
    "ReDimNetB1": ("redimnet", {"feat_dim": 72, "two_emb_layer": True}),
    "ReDimNetB3": ("redimnet", {"feat_dim": 72}),
    "ReDimNet2B0": ("redimnet2", {"feat_dim": 72}),
}
TFMEL = {"n_mels": 72, "norm_signal": True, "f_min": 20, "f_max": 7600, "eps": 1e-8}  # its front end
THREE_D_SPEAKER: dict[str, tuple[str, dict[str, Any]]] = {
    "CAMPPlus": ("campplus.DTDNN", {"feat_dim": 80, "embedding_size": 192}),
    "ERes2Net": ("eres2net.ERes2Net", {"feat_dim": 80, "embedding_size": 192}),
    "ERes2NetV2": ("eres2net.ERes2NetV2", {"feat_dim": 80, "embedding_size": 192, "baseWidth": 24, "scale": 4,
                   "expansion": 4}),
    "ECAPA_TDNN": ("ecapa_tdnn.ECAPA_TDNN", {"input_size": 80, "lin_neurons": 192}),
    "ResNet": ("resnet.ResNet", {"feat_dim": 80, "embedding_size": 256}),
}  # fmt: skip


def fixed(model: nn.Module) -> nn.Module:
    """A library's model with the fixed weights."""
    shapes = ((n, tuple(v.shape)) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked"))
    model.load_state_dict(fixed_weights(shapes), strict=False)
    return model.eval()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--wespeaker", type=Path)
    options.add_argument("--3d-speaker", dest="three_d_speaker", type=Path)
    given = options.parse_args()
    oracles = Path(__file__).with_name("oracles.json")
    found: dict[str, dict[str, Any]] = json.loads(oracles.read_text())
    wave = torch.from_numpy(fixed_wave())[None]
    if given.wespeaker:
        package = types.ModuleType("wespeaker")  # its own __init__ imports the command line and what that needs
        package.__path__ = [str(given.wespeaker / "wespeaker")]
        front_ends = types.ModuleType("wespeaker.frontend")
        front_ends.__path__ = [str(given.wespeaker / "wespeaker" / "frontend")]
        sys.modules |= {"wespeaker": package, "wespeaker.frontend": front_ends}
        found["wespeaker"] = {}
    for name, (home, arguments) in WESPEAKER.items() if given.wespeaker else ():
        kind = getattr(importlib.import_module(f"wespeaker.models.{home}"), name.split()[0])
        mels = arguments.get("feat_dim", 80)
        model = fixed(kind(embed_dim=192, **arguments))
        kept: dict[str, Any] = {"model_args": arguments | {"embed_dim": 192}}
        if home == "redimnet2":
            bank = importlib.import_module("wespeaker.frontend.tfmel").TFMelFrontend(**TFMEL)(wave)[0][0]
            kept["dataset_args"] = {"frontend": "tfmel", "tfmel_args": TFMEL, "cmvn": False}
        else:
            bank = kaldi.fbank(wave * 32768, num_mel_bins=mels, window_type="hamming", dither=0.0)
            bank = bank - bank.mean(0)
        found["wespeaker"][name] = record(model, bank) | kept
    if given.three_d_speaker:
        sys.modules.setdefault("thop", types.SimpleNamespace(profile=None))  # type: ignore[arg-type]
        sys.path.insert(0, str(given.three_d_speaker))
        found["3d-speaker"] = {}
    for name, (home, arguments) in THREE_D_SPEAKER.items() if given.three_d_speaker else ():
        model = fixed(getattr(importlib.import_module(f"speakerlab.models.{home}"), name)(**arguments))
        bank = kaldi.fbank(wave, num_mel_bins=80, dither=0.0)
        found["3d-speaker"][name] = record(model, bank - bank.mean(0))
    lines = [
        f"{json.dumps(toolkit)}: {{\n"
        + ",\n".join(f"{json.dumps(n)}: {json.dumps(m)}" for n, m in models.items())
        + "}"
        for toolkit, models in found.items()
    ]
    oracles.write_text("{" + ",\n".join(lines) + "}\n")


def record(model: nn.Module, bank: torch.Tensor) -> dict[str, Any]:
    """Names and shapes of the weights, the first numbers of the embedding and its norm."""
    with torch.no_grad():
        out = model(bank[None])
    embedding = (out[-1] if isinstance(out, tuple) else out)[0]
    weights = {n: list(v.shape) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    return {
        "embedding": [float(f"{x:.8g}") for x in embedding[:NUMBERS]],
        "norm": float(embedding.double().norm()),
        "weights": weights,
    }


if __name__ == "__main__":
    main()
