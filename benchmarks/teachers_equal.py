"""Every teacher family against its own library: the same random weights, the same audio, how far apart the embeddings.

With --hour, one model of each family extracts a WAV of one hour instead, whole and in windows of 30 s, in a process of
its own: its peak memory is printed, libraries included, and kept in benchmarks/results/teachers_hour.json.

Each model is made by its library with random weights (batch-norm statistics too), saved as its users find it, loaded by
spkd, and run on the same utterances, through the library's own features. Then a batch of 32 views of different length
is compared with the views one by one, where the family takes lengths. Three grids follow: settings of SpeechBrain's
hyperparams.yaml, of WeSpeaker's config.yaml, and of sherpa-onnx's metadata, each against the toolkit itself.

With --tiny, the first models of the families whose libraries are installed, on one second; nothing is kept.

    python benchmarks/teachers_equal.py --wespeaker CLONE --3d-speaker CLONE --redimnet CLONE --redimnet2 CLONE

WeSpeaker, 3D-Speaker and ReDimNet are on no package index: clones of their repositories. Oracles that are not installed
are skipped by name. Prints a table and, as its last line, one JSON object; keeps it in
benchmarks/results/teachers_equal.json.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record
import soundfile
import torch
import yaml
from torch import Tensor, nn

from spkd.demo.synthesis import speaker, utterance
from spkd.networks.toolkits.pooling import POOLINGS
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig, ONNXSettings
from spkd.teachers.wespeaker_networks import REPVGG

HERE = Path(__file__).parent
SECONDS = (1.0, 1.51, 2.3, 4.0)  # 1.51 s have an odd number of frames of fbank
# Prints the peak of its own memory in the end.
RUN = """
import atexit
atexit.register(lambda: print([line for line in open("/proc/self/status") if "VmHWM" in line][0]))
from spkd.cli import main
main()
"""
Oracle = Callable[[Tensor], Tensor]  # (samples,) -> (D,)


@dataclass
class Case:
    """A model of a family as its users find it, and what its library gives.

    Attributes:
        config: what spkd loads. oracle: the library's embedding. package: its name and version.
    """

    name: str
    config: ModelConfig
    oracle: Oracle
    package: str


def randomise(model: nn.Module) -> nn.Module:
    """Random weights of a useful size, and batch-norms as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                module.weight.data.uniform_(0.8, 1.2)
                module.bias.data.normal_(0, 0.1)
    return model.eval()


def revision(clone: Path) -> str:
    """Short hash of a clone's commit, or "unknown" where there is none."""
    command = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


WESPEAKER: list[tuple[str, dict[str, Any]]] = [
    *((f"ResNet{layers}", {}) for layers in (18, 50, 101, 152, 221)),
    ("ResNet34", {"two_emb_layer": True}), ("ResNet293", {"pooling_func": "ASTP"}), ("ECAPA_TDNN_c512", {}),
    ("ECAPA_TDNN_c1024", {}), ("ECAPA_TDNN_GLOB_c512", {"emb_bn": True}), ("ECAPA_TDNN_GLOB_c1024", {}),
    ("CAMPPlus", {}), ("XVEC", {}), ("ERes2Net34_Base", {}), ("ERes2Net34_Large", {}), ("ERes2Net34_aug", {}),
    ("SimAM_ResNet34_ASP", {}), ("SimAM_ResNet100_ASP", {}), ("ReDimNetB0", {"feat_dim": 60}),
    *((f"ReDimNetB{i}", {"feat_dim": 72}) for i in range(1, 7)),
    ("XI_VEC_ECAPA_TDNN_c512", {}), ("XI_VEC_ECAPA_TDNN_c1024", {}), ("XI_VEC_XVEC", {}),
    ("Res2Net34_Base", {}), ("Res2Net34_Large", {"two_emb_layer": True}),
    *((f"Gemini_DF_ResNet{layers}", {}) for layers in (60, 114, 183, 237)),
    *((f"REPVGG_{size}", {}) for size in REPVGG),
]  # fmt: skip
WESPEAKER_GRID: list[tuple[str, dict[str, Any]]] = [
    *(("ResNet18", {"pooling_func": pooling}) for pooling in ("TAP", "TSDP", "TSTP", "ASTP", "MHASTP", "MQMHASTP")),
    *(("XVEC", {"pooling_func": pooling, "feat_dim": 40}) for pooling in ("TAP", "TSDP", "TSTP", "ASTP", "MHASTP",
                                                                          "XI")),
    *(("ECAPA_TDNN_GLOB_c512", {"pooling_func": pooling}) for pooling in POOLINGS),
    *(("CAMPPlus", {"pooling_func": pooling}) for pooling in POOLINGS),
    *(("ResNet18", {"feat_dim": bands, "two_emb_layer": True}) for bands in (40, 64, 96)),
    ("ECAPA_TDNN_c512", {"emb_bn": True, "feat_dim": 64}), ("CAMPPlus", {"feat_dim": 40}),
    ("ERes2Net34_Base", {"pooling_func": "ASTP", "two_emb_layer": True}),
    ("Res2Net34_Base", {"pooling_func": "MQMHASTP", "feat_dim": 64}),
    ("Gemini_DF_ResNet60", {"pooling_func": "MHASTP", "two_emb_layer": True, "feat_dim": 64}),
    ("REPVGG_TINY_A0", {"pooling_func": "ASTP", "feat_dim": 64, "use_se": True}),
    ("REPVGG_A1", {"deploy": True, "pooling_func": "MQMHASTP"}), ("REPVGG_RSBB_A2", {"deploy": True}),
    ("REPVGG_RSBB_A0", {"use_se": True}),
]  # fmt: skip
SMALL_WHISPER = {"n_mels": 80, "num_blocks": 4, "output_size": 64, "n_head": 4, "layer_st": 1, "layer_ed": 2}
SMALL_LORA = {"r": 4, "lora_alpha": 12, "target_modules": ["linear_q", "linear_v"], "lora_dropout": 0.1, "bias": "none"}
# Networks on speech encoders: model, its arguments, front end, its arguments, further settings of data.
WESPEAKER_ENCODERS: list[tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = [
    ("whisper_PMFA_large_v2", {}, "whisper_encoder", SMALL_WHISPER, {}),
    ("whisper_PMFA_large_v2", {}, "whisper_encoder", SMALL_WHISPER | {"n_mels": 128, "layer_ed": 3}, {"cmvn": False}),
    ("whisper_PMFA_large_v2", {}, "whisper_encoder", SMALL_WHISPER | {"layer_st": 0},
     {"cmvn_args": {"norm_mean": True, "norm_var": True}}),
    ("ReDimNet2B0", {}, "tfmel", {"n_mels": 72, "norm_signal": True, "eps": 1e-8}, {"cmvn": False}),
    ("ReDimNet2B2", {"pooling_func": "TSTP"}, "tfmel", {"n_mels": 72, "do_preemph": False, "eps": 1e-6},
     {"cmvn": False}),
    ("ReDimNet2B6", {"emb_bn": True}, "tfmel", {"n_mels": 72, "f_min": 50, "f_max": 7000}, {"cmvn": False}),
    ("ECAPA_TDNN_GLOB_c512", {}, "whisper_encoder", SMALL_WHISPER, {}),
    ("XVEC", {"pooling_func": "TAP"}, "whisper_encoder", SMALL_WHISPER, {"cmvn_args": {"norm_mean": False}}),
    ("W2VBert_Adapter_MFA", {"adapter_dim": 32}, "w2vbert", {"use_lora": False, "frozen": False}, {"cmvn": False}),
    ("W2VBert_Adapter_MFA", {"adapter_dim": 32}, "w2vbert", {"use_lora": True, "lora_config_args": SMALL_LORA},
     {"cmvn": False}),
    ("W2VBert_Adapter_MFA", {"adapter_dim": 48, "n_mfa_layers": 3}, "w2vbert",
     {"use_lora": True, "lora_config_args": SMALL_LORA | {"target_modules": ["linear_k", "linear_out"]}},
     {"cmvn": False}),
]  # fmt: skip


def wespeaker_package(clone: Path) -> None:
    """Make WeSpeaker's modules importable, without what its packages import besides (commands, other front ends)."""
    for name in ("wespeaker", "wespeaker.frontend"):
        package = types.ModuleType(name)
        package.__path__ = [str(clone / name.replace(".", "/"))]
        sys.modules[name] = package


def save_wespeaker(folder: Path, config: dict[str, Any], model: nn.Module) -> ModelConfig:
    """A folder as WeSpeaker leaves it, trained on several GPUs."""
    folder.mkdir(parents=True)
    projection = {"project_type": "arc_margin", "scale": 32.0, "easy_margin": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"projection_args": projection}))
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(state | {"module.projection.weight": torch.randn(7, 192)}, folder / "avg_model.pt")
    return ModelConfig("wespeaker", str(folder))


def wespeaker(clone: Path, work: Path, models: list[tuple[str, dict[str, Any]]]) -> Iterator[Case]:
    from torchaudio.compliance import kaldi

    wespeaker_package(clone)
    find = importlib.import_module("wespeaker.models.speaker_model").get_speaker_model
    for number, (name, arguments) in enumerate(models):
        mels = {"acoustic_dim": 80} if name.startswith("SimAM") else {"feat_dim": 80} | arguments
        bands = mels.get("feat_dim", 80)
        model = randomise(find(name)(**(mels | arguments), embed_dim=192))
        config = {
            "model": name,
            "model_args": {**mels, "embed_dim": 192, **arguments},
            "dataset_args": {"resample_rate": 16000, "fbank_args": {"num_mel_bins": bands, "frame_length": 25,
                             "frame_shift": 10, "dither": 1.0}},
        }  # fmt: skip
        saved = save_wespeaker(work / str(number), config, model)

        def oracle(wave: Tensor, model: nn.Module = model, bands: int = bands) -> Tensor:
            bank = kaldi.fbank(wave[None] * 32768, num_mel_bins=bands, window_type="hamming", dither=0.0)
            out = model((bank - bank.mean(0))[None])
            return (out[-1] if isinstance(out, tuple) else out).flatten()

        changed = " ".join(f"{key}={value}" for key, value in arguments.items())
        label = f"wespeaker grid: {name} {changed}" if models is WESPEAKER_GRID else f"wespeaker {name}"
        yield Case(label, saved, oracle, f"wespeaker {revision(clone)}")


def wespeaker_encoders(clone: Path, work: Path) -> Iterator[Case]:
    import transformers as library

    wespeaker_package(clone)
    find = importlib.import_module("wespeaker.models.speaker_model").get_speaker_model
    normalise = importlib.import_module("wespeaker.dataset.dataset_utils").apply_cmvn
    hub = work / "w2v-bert-2.0"
    config = library.Wav2Vec2BertConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, layer_norm_eps=1e-4
    )
    library.Wav2Vec2BertModel(config).save_pretrained(hub)
    library.SeamlessM4TFeatureExtractor(padding_value=1).save_pretrained(hub)
    classes = {
        "whisper_encoder": ("whisper_encoder", "whisper_encoder"),
        "w2vbert": ("w2vbert", "W2VBertFrontend"),
        "tfmel": ("tfmel", "TFMelFrontend"),
    }
    for number, (name, arguments, front_end, its_arguments, data) in enumerate(WESPEAKER_ENCODERS):
        module, kind = classes[front_end]
        its_arguments = its_arguments | ({"model_name": str(hub)} if front_end == "w2vbert" else {})
        front = getattr(importlib.import_module(f"wespeaker.frontend.{module}"), kind)(
            **its_arguments, sample_rate=16_000
        )
        if front_end == "w2vbert":
            arguments = arguments | {"num_frontend_hidden_layers": 4}
        arguments = arguments | {"feat_dim": front.output_size(), "embed_dim": 192}
        model = find(name)(**arguments)
        model.add_module("frontend", front)
        randomise(model)
        for parameter, values in model.named_parameters():
            if "lora_B" in parameter:  # zero at the begin of training
                values.data.normal_(0, 0.1)
        data = {"frontend": front_end, f"{front_end}_args": its_arguments, "resample_rate": 16000} | data
        saved = save_wespeaker(
            work / str(number), {"model": name, "model_args": arguments, "dataset_args": data}, model
        )

        def oracle(wave: Tensor, model: nn.Module = model, data: dict[str, Any] = data) -> Tensor:
            features, _ = model.frontend(wave[None], torch.tensor([len(wave)]))
            if data.get("cmvn", True):
                features = normalise(features, **data.get("cmvn_args", {}))
            out = model(features)
            return (out[-1] if isinstance(out, tuple) else out).flatten()

        label = f"wespeaker encoder: {name} {number}"
        yield Case(label, saved, oracle, f"wespeaker {revision(clone)}")


def pyannote(work: Path) -> Iterator[Case]:
    # Without the part that reports the use of models to a server.
    sys.modules["pyannote.audio.telemetry"] = types.SimpleNamespace(  # type: ignore[assignment]
        **dict.fromkeys(("set_opentelemetry_log_level", "set_telemetry_metrics", "track_model_init",
                         "track_pipeline_init", "track_pipeline_apply"), lambda *_, **__: None)
    )  # fmt: skip
    models = importlib.import_module("pyannote.audio.models.embedding.wespeaker")
    task = importlib.import_module("pyannote.audio.core.task")
    for layers in (34, 152):
        model = randomise(getattr(models, f"WeSpeakerResNet{layers}")())
        model.specifications = task.Specifications(
            problem=task.Problem.REPRESENTATION, resolution=task.Resolution.CHUNK, duration=5.0
        )
        saved = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        model.on_save_checkpoint(saved)
        folder = work / str(layers)
        folder.mkdir(parents=True)
        torch.save(saved, folder / "pytorch_model.bin")

        def oracle(wave: Tensor, model: nn.Module = model) -> Tensor:
            return model(wave[None, None])[0]

        package = f"pyannote.audio {importlib.metadata.version('pyannote.audio')}"
        yield Case(f"pyannote ResNet{layers}", ModelConfig("wespeaker", str(folder)), oracle, package)


def three_d_speaker(clone: Path, work: Path) -> Iterator[Case]:
    sys.path.insert(0, str(clone))
    from torchaudio.compliance import kaldi

    wide = {"input_size": 80, "lin_neurons": 192, "channels": [1024, 1024, 1024, 1024, 3072]}
    builds = {
        "CAM++": ("campplus.DTDNN", "CAMPPlus", {"feat_dim": 80, "embedding_size": 512}),
        "ERes2Net": ("eres2net.ERes2Net", "ERes2Net", {"feat_dim": 80, "embedding_size": 192}),
        "ERes2Net large": ("eres2net.ERes2Net", "ERes2Net", {"feat_dim": 80, "embedding_size": 512, "m_channels": 64}),
        "ERes2Net 200k": ("eres2net.ERes2Net_huge", "ERes2Net", {"feat_dim": 80, "embedding_size": 192}),
        "ERes2NetV2": ("eres2net.ERes2NetV2", "ERes2NetV2", {"feat_dim": 80, "embedding_size": 192}),
        "ERes2NetV2 w24s4ep4": (
            "eres2net.ERes2NetV2",
            "ERes2NetV2",
            {"feat_dim": 80, "embedding_size": 192, "baseWidth": 24, "scale": 4, "expansion": 4},
        ),
        "ECAPA": ("ecapa_tdnn.ECAPA_TDNN", "ECAPA_TDNN", wide),
        "ResNet34": ("resnet.ResNet", "ResNet", {"feat_dim": 80, "embedding_size": 256}),
    }
    # A model of theirs prints its size with a package that nothing else needs.
    sys.modules.setdefault("thop", types.SimpleNamespace(profile=None))
    for name, (module, kind, arguments) in builds.items():
        model = randomise(getattr(importlib.import_module(f"speakerlab.models.{module}"), kind)(**arguments))
        folder = work / name.replace(" ", "-")
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "pretrained.ckpt")

        def oracle(wave: Tensor, model: nn.Module = model) -> Tensor:
            bank = kaldi.fbank(wave[None], num_mel_bins=80, dither=0.0)
            return model((bank - bank.mean(0))[None])[0]

        config = ModelConfig("3d-speaker", str(folder))
        yield Case(f"3d-speaker {name}", config, oracle, f"3D-Speaker {revision(clone)}")


REDIMNET_GRID: dict[str, dict[str, Any]] = {
    "two outputs a stage": {"dual_agg": True, "agg_gnorm": True, "out_channels": 32},
    "a layer for each band": {"out_channels": 10, "return_2d_output": True, "emb_bn": True},
    "group norms": {"agg_gnorm": True, "compress_tconvs": False, "global_context_att": False},
    **{kind: {"block_2d_type": kind} for kind in ("convnext_like", "convnext_like_relu", "basic_resnet_fwse")},
    **{f"1-d {kind}": {"block_1d_type": kind, "group_divisor": None} for kind in ("fc", "conv", "att")},
    **{f"pooling {kind}": {"pooling_func": kind} for kind in ("TSTP", "TAP", "TSDP")},
    "features tf": {"feat_type": "tf", "spec_params": {"norm_signal": True, "f_min": 50}},
    "features": {"spec_params": {"spec_norm": "mvn", "norm_signal": True, "do_preemph": False, "n_fft": 1024,
                 "win_length": 640, "f_min": 50, "f_max": 7000}},
}  # fmt: skip


def redimnet(first: Path | None, second: Path | None, work: Path) -> Iterator[Case]:
    """Checkpoints of the authors: ReDimNet, and ReDimNet2 with a grid of its settings."""
    from spkd.networks.toolkits.redimnet import SHAPES
    from spkd.teachers.redimnet import SECOND, config_of

    cases: list[tuple[str, Path, str, dict[str, Any]]] = []
    if second is not None:
        sys.path.insert(0, str(second))
        small = [[[1, 1], 1, 2, [[3, 3]], 36], [[2, 1], 1, 1, [[3, 3]], None], [[1, 2], 1, 0.5, [[3, 5]], 18]]
        shape = {"F": 24, "C": 12, "stages_setup": small, "causal": "none"}
        home = "redimnet2.redimnet2:ReDimNet2Wrap"
        cases += [(f"redimnet {name}", second, home, config_of(name) | {"causal": "none"}) for name in SECOND]
        cases += [(f"redimnet grid: {name}", second, home, shape | changed) for name, changed in REDIMNET_GRID.items()]
    if first is not None:
        sys.path.insert(0, str(first))
        for name, known in SHAPES.items():
            stages = [[s.bands, s.blocks, s.expansion, [[3, 3]], s.reduction] for s in known.stages]
            config = {"F": known.bands, "C": known.channels, "stages_setup": stages, "block_1d_type": known.context,
                      "block_2d_type": known.block, "group_divisor": known.divisor}  # fmt: skip
            cases.append((f"redimnet {name}", first, "redimnet.model:ReDimNetWrap", config))
    work.mkdir(parents=True, exist_ok=True)
    for name, clone, home, config in cases:
        module, _, kind = home.partition(":")
        model = randomise(getattr(importlib.import_module(module), kind)(**config))
        for part in model.modules():
            if part.__class__.__name__ == "weigth1d":  # means of equal weights would hide their order
                part.w.data.normal_()
        file = work / "model.pt"
        torch.save({"model_config": config, "state_dict": model.state_dict()}, file)

        def oracle(wave: Tensor, model: nn.Module = model) -> Tensor:
            return model(wave[None])[0]

        yield Case(name, ModelConfig("redimnet", str(file)), oracle, f"{clone.name} {revision(clone)}")


def speechbrain(work: Path) -> Iterator[Case]:
    from speechbrain.lobes.features import Fbank
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from speechbrain.lobes.models.ResNet import ResNet
    from speechbrain.lobes.models.Xvector import Xvector

    builds = {
        "ECAPA": (
            80,
            ECAPA_TDNN(80, channels=[1024, 1024, 1024, 1024, 3072], lin_neurons=192),
            "ECAPA_TDNN.ECAPA_TDNN",
        ),
        "ResNet": (80, ResNet(80, lin_neurons=256), "ResNet.ResNet"),
        "x-vector": (24, Xvector(in_channels=24, activation=nn.LeakyReLU), "Xvector.Xvector"),
    }
    for name, (mels, model, kind) in builds.items():
        randomise(model)
        folder = work / name
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "embedding_model.ckpt")
        (folder / "hyperparams.yaml").write_text(
            f"sample_rate: 16000\nn_mels: {mels}\n"
            "compute_features: !new:speechbrain.lobes.features.Fbank\n    n_mels: !ref <n_mels>\n"
            "mean_var_norm: !new:speechbrain.processing.features.InputNormalization\n"
            "    norm_type: sentence\n    std_norm: False\n"
            f"embedding_model: !new:speechbrain.lobes.models.{kind}\n    device: cpu\n"
        )
        bank = Fbank(n_mels=mels)

        def oracle(wave: Tensor, model: nn.Module = model, bank: nn.Module = bank) -> Tensor:
            features = bank(wave[None])
            return model(features - features.mean(1, keepdim=True)).flatten()

        version = importlib.metadata.version("speechbrain")
        yield Case(f"speechbrain {name}", ModelConfig("speechbrain", str(folder)), oracle, f"speechbrain {version}")


def speechbrain_grid(work: Path) -> Iterator[Case]:
    from hyperpyyaml import load_hyperpyyaml

    from tests.teachers.speechbrain_grid import CASES

    version = importlib.metadata.version("speechbrain")
    for name, text in CASES.items():
        modules = load_hyperpyyaml(text)["modules"]
        model = randomise(modules["embedding_model"])
        folder = work / name
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "embedding_model.ckpt")
        (folder / "hyperparams.yaml").write_text(text)

        def oracle(wave: Tensor, modules: dict[str, Any] = modules) -> Tensor:
            features = modules["mean_var_norm"].eval()(modules["compute_features"](wave[None]), torch.ones(1))
            return modules["embedding_model"](features, torch.ones(1)).flatten()

        config = ModelConfig("speechbrain", str(folder))
        yield Case(f"speechbrain grid: {name}", config, oracle, f"speechbrain {version}")


def sherpa_grid(work: Path) -> Iterator[Case]:
    import onnx as library
    import sherpa_onnx

    from tests.teachers.sherpa_grid import COMMON, KALDI, NEMO

    helper, kinds = library.helper, library.TensorProto
    for number, described in enumerate([*KALDI, *NEMO]):
        bands, nemo = int(described.get("feat_dim", 80)), described["framework"] == "nemo"
        weight = library.numpy_helper.from_array(torch.randn(bands, 32).numpy(), "w")
        node = helper.make_node
        # Of magnitudes: the mean of normalised features is nothing but rounding.
        nodes = [node("Abs", ["x"], ["a"]), node("ReduceMean", ["a"], ["m"], axes=[2 if nemo else 1], keepdims=0),
                 node("MatMul", ["m", "w"], ["embs"])]  # fmt: skip
        shape = ["B", bands, "T"] if nemo else ["B", "T", bands]
        inputs = [helper.make_tensor_value_info("x", kinds.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info("embs", kinds.FLOAT, ["B", 32])]
        if nemo:  # sherpa-onnx takes the second output
            inputs.append(helper.make_tensor_value_info("length", kinds.INT64, ["B"]))
            nodes.append(node("Cast", ["length"], ["logits"], to=kinds.FLOAT))
            outputs.insert(0, helper.make_tensor_value_info("logits", kinds.FLOAT, ["B"]))
        graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        for key, value in (COMMON | described | {"output_dim": "32"}).items():
            model.metadata_props.add(key=key, value=value)
        file = work / f"{number}.onnx"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(model.SerializeToString())
        settings = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(file), num_threads=1)
        extractor = sherpa_onnx.SpeakerEmbeddingExtractor(settings)

        def oracle(wave: Tensor, extractor: Any = extractor) -> Tensor:
            stream = extractor.create_stream()
            stream.accept_waveform(16_000, wave.numpy())
            stream.input_finished()
            return torch.tensor(extractor.compute(stream))

        name = ",".join(value or "none" for value in described.values())
        package = f"sherpa-onnx {importlib.metadata.version('sherpa-onnx')}"
        yield Case(f"sherpa grid: {name}", ModelConfig("onnx", str(file)), oracle, package)


def transformers(work: Path) -> Iterator[Case]:
    import transformers as library

    small = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
    waves = {"conv_dim": (64,) * 7, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4}
    head = {"tdnn_dim": (96, 96, 96, 96, 200), "xvector_output_dim": 64, "num_labels": 9,
            "use_weighted_layer_sum": True}  # fmt: skip
    layer = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    builds: dict[str, tuple[str, Any, Any]] = {
        "wavlm base, x-vector": ("wavlm", library.WavLMForXVector, library.WavLMConfig(**small, **waves, **head)),
        "wavlm large": ("wavlm", library.WavLMModel, library.WavLMConfig(**small, **waves, **layer)),
        "hubert base": ("hubert", library.HubertModel, library.HubertConfig(**small, **waves)),
        "hubert large": ("hubert", library.HubertModel, library.HubertConfig(**small, **waves, **layer)),
        "wav2vec2 base, x-vector": (
            "wav2vec2", library.Wav2Vec2ForXVector, library.Wav2Vec2Config(**small, **waves, **head)),
        "data2vec": ("data2vec", library.Data2VecAudioModel, library.Data2VecAudioConfig(**small, **waves)),
        "w2v-bert, x-vector": (
            "w2v-bert", library.Wav2Vec2BertForXVector,
            library.Wav2Vec2BertConfig(**small, feature_projection_input_dim=160, **head)),
    }  # fmt: skip
    for name, (family, kind, config) in builds.items():
        model = kind(config).eval()
        folder = work / name.replace(" ", "-")
        model.save_pretrained(folder)
        if family == "w2v-bert":
            extractor: Any = library.SeamlessM4TFeatureExtractor()
        else:
            norm = getattr(config, "feat_extract_norm", "layer") == "layer"
            extractor = library.Wav2Vec2FeatureExtractor(do_normalize=norm)
        extractor.save_pretrained(folder)

        def oracle(wave: Tensor, model: Any = model, extractor: Any = extractor) -> Tensor:
            inputs = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
            if "input_features" not in inputs:
                inputs.pop("attention_mask", None)
            out = model(**inputs, output_hidden_states=True)
            if hasattr(out, "embeddings"):
                return out.embeddings[0]
            hidden = out.hidden_states[-1][0]
            return torch.cat([hidden.mean(0), hidden.std(0, correction=0)])

        version = importlib.metadata.version("transformers")
        yield Case(f"transformers {name}", ModelConfig(family, str(folder)), oracle, f"transformers {version}")


def onnx(work: Path) -> Iterator[Case]:
    import onnxruntime
    from torchaudio.compliance import kaldi

    from spkd.networks.toolkits.resnet import ResNet

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = randomise(ResNet(18, 16, 64))

        def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
            levels = self.network(features)
            return levels["embedding"], levels["frames"]

    folder = work / "onnx"
    folder.mkdir(parents=True)
    file = folder / "model.onnx"
    # Without gradients: with them, variances are computed for some views at a time, which the export would fix.
    model = Graph().eval().requires_grad_(False)
    free = {0: torch.export.Dim("B"), 1: torch.export.Dim("T", min=256)}
    torch.onnx.export(
        model, (torch.randn(2, 400, 80),), str(file), input_names=["feats"], output_names=["embs", "frames"],
        dynamic_shapes=(free,), dynamo=True, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(file))

    def oracle(wave: Tensor) -> Tensor:
        bank = kaldi.fbank(wave[None] * 32768, num_mel_bins=80, window_type="hamming", dither=0.0)
        return torch.from_numpy(session.run(["embs"], {"feats": (bank - bank.mean(0))[None].numpy()})[0][0])

    config = ModelConfig("onnx", str(file), settings=ONNXSettings("wespeaker"))
    yield Case("onnx of fbank", config, oracle, f"onnxruntime {onnxruntime.__version__}")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cosine, in float64."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(1 - (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def batched_distance(teacher: Teacher) -> float | None:
    """The greatest distance between a view in a batch of 32 of different length and the view alone."""
    if not teacher.takes_lengths:
        return None
    random = np.random.RandomState(0)
    lengths = torch.from_numpy(random.randint(max(8000, teacher.min_samples), 24_000, 32))
    waves = nn.utils.rnn.pad_sequence([wave(i, int(n) / 16_000)[: int(n)] for i, n in enumerate(lengths)], True)
    together = teacher.extract(waves, ["embedding"], lengths=lengths)["embedding"]
    alone = [teacher.extract(w[None, :n], ["embedding"])["embedding"][0] for w, n in zip(waves, lengths, strict=True)]
    return max(distance(a, b) for a, b in zip(together, alone, strict=True))


def one_hour(work: Path, config: ModelConfig) -> list[dict[str, Any]]:
    """Peak memory of extracting a WAV of one hour, whole and in windows; whole may be refused, with the reason."""
    audio = work / "hour.wav"
    if not audio.is_file():
        soundfile.write(audio, np.tile(utterance(speaker(0), 0, 60.0), 60), 16_000)
        (work / "hour.csv").write_text(f"utt,path,spk,dur\nhour,{audio},s,3600\n")
    found = []
    for view in ("full", "windows:30/30"):
        cache = work / "hour-cache"
        shutil.rmtree(cache, ignore_errors=True)
        keys = [f"teacher={config.name}", f"teacher.weights={config.weights}"]
        command = [sys.executable, "-c", RUN, "extract", *keys, f"view={view}",
                   f"manifest={work / 'hour.csv'}", f"cache={cache}", "device=cpu", "batch_size=8",
                   "storage.unit_seconds=3600"]  # fmt: skip
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
        peak = int(out.rsplit("VmHWM:", 1)[-1].split()[0])  # kB
        refused = "more than this model takes" in out
        extracted = "complete" in out and "0 rejected" in out
        found.append({"family": config.name, "view": view, "peak_gb": round(peak / 1e6, 2),
                      "extracted": extracted, "refused": refused})  # fmt: skip
        outcome = "extracted" if extracted else "refused" if refused else out.strip()[-200:]
        print(f"  one hour, {config.name}, {view}: {found[-1]['peak_gb']} GB, {outcome}", flush=True)
    return found


def chosen(families: Collection[str], only: str) -> list[str]:
    """Families whose names begin with `only`, or else the one with whose name the model `only` begins."""
    return [name for name in families if name.startswith(only)] or [
        max((name for name in families if only.startswith(name)), key=len, default="")
    ]


NEEDED = {
    "speechbrain": ("speechbrain",), "speechbrain grid": ("speechbrain",), "transformers": ("transformers",),
    "sherpa grid": ("sherpa_onnx",), "wespeaker encoder": ("transformers", "peft", "whisper"),
    "pyannote": ("pyannote.audio",),
}  # fmt: skip


def missing(family: str) -> str | None:
    """A package that the cases of a family need and that is not installed; None: all are."""
    for name in NEEDED.get(family, ()):
        try:
            if importlib.util.find_spec(name) is None:
                return name
        except ModuleNotFoundError:  # a package that it is part of
            return name
    return None


def wave(number: int, seconds: float) -> Tensor:
    return torch.from_numpy(utterance(speaker(number % 6), number, seconds))


def main() -> None:
    options = record.options(__doc__)
    options.add_argument("--wespeaker", type=Path, help="a clone of github.com/wenet-e2e/wespeaker")
    options.add_argument("--3d-speaker", dest="three_d_speaker", type=Path, help="a clone of modelscope/3D-Speaker")
    options.add_argument("--redimnet", type=Path, help="a clone of IDRnD/ReDimNet")
    options.add_argument("--redimnet2", type=Path, help="a clone of PalabraAI/redimnet2")
    options.add_argument("--only", default="", help="families or models whose names begin with this")
    options.add_argument("--hour", action="store_true", help="a WAV of one hour through every family besides")
    options.add_argument("--dvector", help="weights of the GE2E d-vector, for --hour")
    given = record.parse(options)
    torch.manual_seed(0)
    sys.path.insert(0, str(HERE.parent))  # the grids lie with the tests
    lengths = SECONDS[:1] if given.tiny else SECONDS
    rows: list[dict[str, Any]] = []
    hours: list[dict[str, Any]] = []
    print(f"{'family':<36} {'oracle':<24} distance  32 views of different length in one batch")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sources: dict[str, Callable[[], Iterator[Case]]] = {
            "wespeaker": lambda: wespeaker(given.wespeaker, work / "wespeaker", WESPEAKER),
            "wespeaker grid": lambda: wespeaker(given.wespeaker, work / "wespeaker-grid", WESPEAKER_GRID),
            "wespeaker encoder": lambda: wespeaker_encoders(given.wespeaker, work / "wespeaker-encoders"),
            "pyannote": lambda: pyannote(work / "pyannote"),
            "3d-speaker": lambda: three_d_speaker(given.three_d_speaker, work / "3d-speaker"),
            "redimnet": lambda: redimnet(given.redimnet, given.redimnet2, work / "redimnet"),
            "speechbrain": lambda: speechbrain(work / "speechbrain"),
            "transformers": lambda: transformers(work / "transformers"),
            "onnx": lambda: onnx(work / "onnx"),
            "speechbrain grid": lambda: speechbrain_grid(work / "speechbrain-grid"),
            "sherpa grid": lambda: sherpa_grid(work / "sherpa-grid"),
        }
        for family, cases in sources.items():
            if family not in chosen(sources, given.only):
                continue
            clones = {"wespeaker": given.wespeaker, "3d-speaker": given.three_d_speaker,
                      "redimnet": given.redimnet or given.redimnet2}  # fmt: skip
            if not clones.get(family.split()[0], True):
                print(f"skipped: {family} (no clone named)")
                continue
            if (library := missing(family)) is not None:
                print(f"skipped: {family} ({library} is not installed)")
                continue
            for case in itertools.islice(cases(), 2 if given.tiny else None):
                if not (family.startswith(given.only) or case.name.startswith(given.only)):
                    continue
                if given.hour:
                    hours += one_hour(work, case.config)
                    break
                teacher = load_teacher(case.config, torch.device("cpu"))
                with torch.no_grad():
                    found = [
                        distance(case.oracle(w).numpy(), teacher.extract(w[None], ["embedding"])["embedding"])
                        for w in (wave(i, seconds) for i, seconds in enumerate(lengths))
                    ]
                batch = None if given.tiny else batched_distance(teacher)
                rows.append(
                    {"name": case.name, "oracle": case.package, "cosine_distance": max(found), "batched": batch}
                )
                shown = "equal lengths only" if batch is None else f"{batch:.1e}"
                print(f"{case.name:<36} {case.package:<24} {max(found):.1e}   {shown}", flush=True)
        if given.hour and given.dvector:
            hours += one_hour(work, ModelConfig("dvector", str(Path(given.dvector).resolve())))
    if given.hour:
        report: dict[str, Any] = {"rows": hours, "most_gb": max(row["peak_gb"] for row in hours)}
        record.keep("teachers_hour", report, given.tiny)
        return
    grids = {
        f"{name}_grid": max(distances)
        for name in ("speechbrain", "sherpa", "wespeaker", "redimnet")
        if (distances := [row["cosine_distance"] for row in rows if row["name"].startswith(f"{name} grid")])
    }
    report = {
        "rows": rows,
        "models": len(rows),
        **grids,
        "max_cosine_distance": max(row["cosine_distance"] for row in rows),
        "max_batched_distance": max((row["batched"] for row in rows if row["batched"] is not None), default=None),
    }
    record.keep("teachers_equal", report, given.tiny or bool(given.only))


if __name__ == "__main__":
    main()
