"""Networks of WeSpeaker on speech encoders, against transformers' own models and formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from spkd.errors import UsageError
from spkd.networks.network import Network
from spkd.networks.toolkits.eres2net import Res2Net
from spkd.networks.toolkits.gemini import GeminiDFResNet
from spkd.networks.toolkits.repvgg import BlockShape, RepVGG
from spkd.outputs.features import HOP, WINDOW
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.settings import FrontEndSettings, ModelConfig

from .fixed import fixed_wave, fixed_weights

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
DIM, EMBEDDING = 32, 24
WHISPER = {"n_mels": 80, "num_blocks": 3, "output_size": DIM, "n_head": 4, "layer_st": 0, "layer_ed": 1}
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["linear_q", "linear_v"], "lora_dropout": 0.1, "bias": "none"}
SAMPLES = 16_000  # of the length for which transformers' model of Whisper is made


def load(folder: Path) -> Teacher:
    return load_teacher(ModelConfig("wespeaker", str(folder), settings=FrontEndSettings()), CPU)


def save(folder: Path, model: str, state: dict[str, Tensor], data: dict[str, Any], **arguments: Any) -> Path:
    """A folder as WeSpeaker leaves it."""
    folder.mkdir(exist_ok=True)
    config = {"model": model, "model_args": arguments, "dataset_args": {"resample_rate": 16_000} | data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(state, folder / "avg_model.pt")
    return folder


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Linear layer, or convolution of one step, of frames (T, D), in float64."""
    weight = state[f"{name}.weight"].double()
    return x @ weight.flatten(1).T + state[f"{name}.bias"].double()


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, variance, weight, bias = (
        state[f"{name}.{n}"].double() for n in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"].double() + state[f"{name}.bias"].double()


def weighted(x: Tensor, scores: Tensor, least: float) -> Tensor:
    """Mean and deviation of frames (T, D) with weights that are the softmax of scores (T, D)."""
    weights = scores.softmax(0)
    mean = (weights * x).sum(0)
    return torch.cat([mean, ((weights * x**2).sum(0) - mean**2).clamp_min(least).sqrt()])


def agrees(values: np.ndarray, expected: Tensor) -> bool:
    return np.allclose(values, expected.numpy(), rtol=0, atol=2e-5 * float(expected.abs().max()))


def check_padding(teacher: Teacher, samples: int) -> None:
    """A view has the same outputs alone and, padded, beside a longer one."""
    wave = torch.from_numpy(fixed_wave())[None]
    short = wave[:, :samples]
    both = torch.cat([wave, nn.functional.pad(short, (0, wave.shape[1] - samples), value=0.3)])
    names = list(teacher.targets)
    together = teacher.extract(both, names, lengths=torch.tensor([wave.shape[1], samples]))
    for name, values in teacher.extract(short, names).items():
        target = teacher.targets[name]
        rows = () if target.hop is None else (target.num_frames(samples),)
        assert values.shape == (1, *rows, target.dim), name
        padded = together[name][1, : values.shape[1]] if rows else together[name][1]
        assert np.allclose(padded, values[0], rtol=1e-3, atol=1e-4 * np.abs(values).max()), name


# Whisper


def whisper(seconds: float = 1.0) -> tuple[Any, dict[str, Tensor]]:
    """Encoder of transformers, and its weights under WeSpeaker's names, with those of the layers after it."""
    torch.manual_seed(0)
    steps = round(50 * seconds)
    config = transformers.WhisperConfig(
        num_mel_bins=80, d_model=DIM, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=4 * DIM,
        max_source_positions=steps, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=8, vocab_size=60000,
    )  # fmt: skip
    encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    for values in encoder.parameters():
        values.data += 0.1 * torch.randn_like(values)
    names = (
        ("embed_positions.weight", "positional_embedding"), ("layers.", "blocks."), ("self_attn_layer_norm", "attn_ln"),
        ("self_attn.q_proj", "attn.query"), ("self_attn.k_proj", "attn.key"), ("self_attn.v_proj", "attn.value"),
        ("self_attn.out_proj", "attn.out"), ("fc1", "mlp.0"), ("fc2", "mlp.2"), ("final_layer_norm", "mlp_ln"),
    )  # fmt: skip
    state = {}
    for name, values in encoder.state_dict().items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        state[f"frontend.encoder.{name}"] = values
    del state["frontend.encoder.layer_norm.weight"], state["frontend.encoder.layer_norm.bias"]
    positions = torch.zeros(1500, DIM)
    positions[:steps] = state["frontend.encoder.positional_embedding"]
    wide = 2 * DIM
    shapes = {
        "frontend.encoder.ln_post2.weight": (wide,), "frontend.encoder.ln_post2.bias": (wide,),
        "pooling.linear1.weight": (128, 3 * wide, 1), "pooling.linear1.bias": (128,),
        "pooling.linear2.weight": (wide, 128, 1), "pooling.linear2.bias": (wide,),
        **{f"bn.norm.{n}": (2 * wide,) for n in ("weight", "bias", "running_mean", "running_var")},
        "fc.weight": (EMBEDDING, 2 * wide), "fc.bias": (EMBEDDING,),
    }  # fmt: skip
    return encoder, state | {"frontend.encoder.positional_embedding": positions} | fixed_weights(shapes.items())


def save_whisper(folder: Path, state: dict[str, Tensor], **data: Any) -> Path:
    given = {"frontend": "whisper_encoder", "whisper_encoder_args": WHISPER} | data
    return save(folder, "whisper_PMFA_large_v2", state, given, embed_dim=EMBEDDING, feat_dim=2 * DIM)


def whisper_layers(encoder: Any, wave: np.ndarray) -> list[Tensor]:
    """Outputs (T, D) of its first two blocks for one second, in float64."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    features = extractor(wave, sampling_rate=16_000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        hidden = encoder(features, output_hidden_states=True).hidden_states
    return [hidden[1][0].double(), hidden[2][0].double()]


@pytest.mark.parametrize(
    "data", [{}, {"cmvn": False}, {"cmvn_args": {"norm_var": True}}, {"cmvn_args": {"norm_mean": False}}], ids=str
)
def test_whisper_pmfa_is_transformers_encoder_under_attentive_statistics(tmp_path: Path, data: dict[str, Any]) -> None:
    encoder, state = whisper()
    wave = fixed_wave()[:SAMPLES]
    layers = whisper_layers(encoder, wave)
    teacher = load(save_whisper(tmp_path, state, **data))
    outputs = teacher.extract(torch.from_numpy(wave)[None], list(teacher.targets))
    for i, layer in enumerate(layers):
        assert agrees(outputs[f"frames.layer{i}"][0], layer)
    x = layer_norm(torch.cat(layers, 1), state, "frontend.encoder.ln_post2")
    variance = x.var(0)
    if data.get("cmvn", True) and data.get("cmvn_args", {}).get("norm_mean", True):
        x = x - x.mean(0)
    if data.get("cmvn_args", {}).get("norm_var"):
        x = x / (variance + 1e-7).sqrt()
    assert agrees(outputs["frames"][0], x)
    seen = torch.cat([x, x.mean(0).expand_as(x), (x.var(0) + 1e-7).sqrt().expand_as(x)], 1)
    scores = linear(linear(seen, state, "pooling.linear1").tanh(), state, "pooling.linear2")
    stats = batch_norm(weighted(x, scores, 1e-7), state, "bn.norm")
    assert agrees(outputs["stats"][0], stats)
    assert agrees(outputs["embedding"][0], linear(stats, state, "fc"))


def test_padding_changes_nothing_on_whisper(tmp_path: Path) -> None:
    teacher = load(save_whisper(tmp_path, whisper(2.0)[1]))
    for samples in (9_000, 16_123):
        check_padding(teacher, samples)
    assert teacher.max_samples == 30 * 16_000


def test_another_speaker_network_takes_the_frames_of_whisper(tmp_path: Path) -> None:
    """The x-vector, whose first layer of five frames alone is computed here."""
    encoder, state = whisper()
    front = {n: values for n, values in state.items() if n.startswith("frontend.")}
    widths = [2 * DIM, 8, 8, 8, 8, 12]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, kernel in enumerate((5, 3, 3, 1, 1)):
        shapes |= {f"frame_{i + 1}.conv_1d.weight": (widths[i + 1], widths[i], kernel)}
        shapes |= {
            f"frame_{i + 1}.{n}": (widths[i + 1],) for n in ("conv_1d.bias", "bn.running_mean", "bn.running_var")
        }
    shapes |= {"seg_1.weight": (EMBEDDING, 12), "seg_1.bias": (EMBEDDING,), "seg_2.weight": (EMBEDDING, EMBEDDING)}
    shapes |= dict.fromkeys(("seg_2.bias", "seg_bn_1.running_mean", "seg_bn_1.running_var"), (EMBEDDING,))
    weights = fixed_weights(shapes.items())
    data = {"frontend": "whisper_encoder", "whisper_encoder_args": WHISPER}
    teacher = load(save(tmp_path, "XVEC", front | weights, data, pooling_func="TAP"))
    wave = fixed_wave()[:SAMPLES]
    outputs = teacher.extract(torch.from_numpy(wave)[None], list(teacher.targets))
    x = layer_norm(torch.cat(whisper_layers(encoder, wave), 1), state, "frontend.encoder.ln_post2")
    x = (x - x.mean(0)).T[None]
    for i, (kernel, dilation) in enumerate(((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))):
        name = f"frame_{i + 1}"
        weight, bias = weights[f"{name}.conv_1d.weight"].double(), weights[f"{name}.conv_1d.bias"].double()
        mean, variance = (weights[f"{name}.bn.running_{n}"].double()[:, None] for n in ("mean", "var"))
        x = (nn.functional.conv1d(x, weight, bias, dilation=dilation).relu() - mean) / (variance + 1e-5).sqrt()
        assert weight.shape[2] == kernel
    assert agrees(outputs["stats"][0], x[0].mean(1))
    # 14 frames of 20 ms less; the first one has 7 of them on either side.
    target = teacher.targets["frames"]
    assert outputs["frames"].shape == (1, 50 - 14, 12)
    assert (target.hop, target.middle, target.num_frames(SAMPLES)) == (320, 7 * 320, 36)
    check_padding(teacher, 13_000)


# w2v-BERT


def w2v_bert(folder: Path, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """Model of transformers, saved to a folder, and weights of WeSpeaker's layers after it."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=DIM, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, mask_time_prob=0.0,
        conv_depthwise_kernel_size=5, **settings,
    )  # fmt: skip
    model = transformers.Wav2Vec2BertModel(config).eval()
    for values in model.parameters():
        values.data += 0.05 * torch.randn_like(values)
    model.config.save_pretrained(folder)
    transformers.SeamlessM4TFeatureExtractor(padding_value=1).save_pretrained(folder)
    return model, head_of_adapters(3, 8)


def head_of_adapters(count: int, width: int) -> dict[str, Tensor]:
    wide = count * width
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(count):
        for number, size in ((0, (width, DIM)), (1, (width,)), (3, (width, width))):
            shapes |= {f"adapter_layers.{i}.{number}.weight": size, f"adapter_layers.{i}.{number}.bias": (width,)}
    shapes |= {
        "pooling.attention.0.weight": (width, wide, 1), "pooling.attention.0.bias": (width,),
        **{f"pooling.attention.2.{n}": (width,) for n in ("weight", "bias", "running_mean", "running_var")},
        "pooling.attention.3.weight": (wide, width, 1), "pooling.attention.3.bias": (wide,),
        "bottleneck.weight": (EMBEDDING, 2 * wide), "bottleneck.bias": (EMBEDDING,),
    }  # fmt: skip
    return fixed_weights(shapes.items())


def mfa(hidden: list[Tensor], state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Frames and embedding of hidden states (T, D), in float64."""
    adapted = []
    for i, x in enumerate(hidden):
        x = layer_norm(linear(x, state, f"adapter_layers.{i}.0"), state, f"adapter_layers.{i}.1")
        adapted.append(linear(x.relu(), state, f"adapter_layers.{i}.3"))
    frames = torch.cat(adapted, 1)
    scores = batch_norm(linear(frames, state, "pooling.attention.0").relu(), state, "pooling.attention.2")
    stats = weighted(frames, linear(scores, state, "pooling.attention.3"), 1e-5)
    return frames, linear(stats, state, "bottleneck")


def hidden_states(model: Any, wave: np.ndarray) -> list[Tensor]:
    """Hidden states (T, D) as WeSpeaker's front end asks transformers for them, in float64."""
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    given = extractor([wave], sampling_rate=16_000, return_tensors="pt", padding="longest")
    with torch.no_grad():
        return [x[0].double() for x in model(**given, output_hidden_states=True).hidden_states]


def encoder_state(model: Any, prefix: str = "frontend.encoder.") -> dict[str, Tensor]:
    return {f"{prefix}{n}": values.clone() for n, values in model.state_dict().items()}


def with_lora(model: Any) -> dict[str, Tensor]:
    """Weights as peft saves them, whose products are added to the model's own: W + 6 / 2 B A."""
    state = encoder_state(model, "frontend.encoder.base_model.model.")
    for name in [n for n in state if n.rsplit(".", 2)[1] in ("linear_q", "linear_v")]:
        layer, kind = name.rsplit(".", 1)
        state[f"{layer}.base_layer.{kind}"] = state.pop(name)
        if kind == "weight":
            down, up = 0.1 * torch.randn(2, DIM), 0.1 * torch.randn(DIM, 2)
            state |= {f"{layer}.lora_A.default.weight": down, f"{layer}.lora_B.default.weight": up}
            own = layer.removeprefix("frontend.encoder.base_model.model.")
            model.get_parameter(f"{own}.weight").data += 3.0 * up @ down
    return state


def save_w2v_bert(folder: Path, state: dict[str, Tensor], hub: Path | str, **arguments: Any) -> Path:
    data = {"frontend": "w2vbert", "w2vbert_args": {"model_name": str(hub)} | arguments, "cmvn": False}
    return save(folder, "W2VBert_Adapter_MFA", state, data, embed_dim=EMBEDDING, pooling_func="ASP")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("samples", [16_000, 16_160])
def test_w2v_bert_is_transformers_model_under_adapters(tmp_path: Path, samples: int, lora: bool) -> None:
    """Of an odd number of fbank frames, the last makes a frame that attention does not take and the pooling does."""
    hub = tmp_path / "w2v"
    model, head = w2v_bert(hub, layer_norm_eps=1e-3)
    state = with_lora(model) if lora else encoder_state(model)
    given = {"use_lora": True, "lora_config_args": LORA} if lora else {"use_lora": False}
    teacher = load(save_w2v_bert(tmp_path / "model", state | head, hub, **given))
    wave = fixed_wave()[:samples]
    hidden = hidden_states(model, wave)
    frames, embedding = mfa(hidden, head)
    outputs = teacher.extract(torch.from_numpy(wave)[None], list(teacher.targets))
    assert len(frames) == (1 + (samples - WINDOW) // HOP + 1) // 2
    for i, states in enumerate(hidden):
        assert agrees(outputs[f"frames.layer{i}"][0], states)
    assert agrees(outputs["frames"][0], frames)
    assert agrees(outputs["embedding"][0], embedding)
    target = teacher.targets["frames"]
    assert (target.hop, target.middle) == (320, 280)


def test_padding_changes_nothing_on_w2v_bert(tmp_path: Path) -> None:
    model, head = w2v_bert(tmp_path / "w2v")
    teacher = load(save_w2v_bert(tmp_path / "model", encoder_state(model) | head, tmp_path / "w2v"))
    for samples in (9_040, 9_200):
        check_padding(teacher, samples)


def test_the_public_w2v_bert_needs_no_folder(tmp_path: Path) -> None:
    """Its settings are transformers' defaults; the widths come from the weights."""
    model, head = w2v_bert(tmp_path / "w2v")
    wave = torch.from_numpy(fixed_wave())[None]
    state = encoder_state(model) | head
    with_folder = load(save_w2v_bert(tmp_path / "a", state, tmp_path / "w2v"))
    without = load(save_w2v_bert(tmp_path / "b", state, "facebook/w2v-bert-2.0"))
    assert np.array_equal(with_folder.extract(wave, ["embedding"])["embedding"],
                          without.extract(wave, ["embedding"])["embedding"])  # fmt: skip
    assert with_folder.card().details == without.card().details


def test_settings_of_w2v_bert_that_no_weight_tells_are_on_the_card(tmp_path: Path) -> None:
    cards = []
    for name, eps in (("a", 1e-5), ("b", 1e-3)):
        model, head = w2v_bert(tmp_path / name, layer_norm_eps=eps)
        folder = save_w2v_bert(tmp_path / f"model-{name}", encoder_state(model) | head, tmp_path / name)
        cards.append(load(folder).card())
    assert cards[0].weights_sha256 == cards[1].weights_sha256
    assert cards[0].details != cards[1].details


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_bnb": True}, "w2vbert_args.use_bnb: weights of 8 bits"),
        ({"model_config_file": "config_prune.json"}, "w2vbert_args.model_config_file"),
        ({"quantise": True}, "w2vbert_args.quantise is not known"),
        ({"model_name": "facebook/mms-1b"}, "model_name is facebook/mms-1b: neither a folder"),
        ({"model_name": 7}, "model_name is a int: neither"),
        ({"use_lora": False}, "its weights have LoRA, and w2vbert_args.use_lora is not true"),
        ({"use_lora": True}, r"lora_config_args.r is 16; the weights have \[2\]"),
        ({"use_lora": True, "lora_config_args": LORA | {"lora_alpha": "6"}}, "lora_alpha: expected a number"),
        ({"use_lora": True, "lora_config_args": LORA | {"use_rslora": True}}, "use_rslora is not known"),
    ],
)
def test_settings_of_w2v_bert_are_refused_by_name(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    model, head = w2v_bert(tmp_path / "w2v-bert-2.0")
    folder = save_w2v_bert(tmp_path / "model", with_lora(model) | head, tmp_path / "w2v-bert-2.0", **arguments)
    with pytest.raises(UsageError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"frontend": "w2vbert"}, "model whisper_PMFA_large_v2 on the front end w2vbert"),
        ({"whisper_encoder_args": WHISPER | {"n_head": 5}}, "5 heads do not fit a width of 32"),
        ({"whisper_encoder_args": WHISPER | {"layer_ed": 3}}, "layers 0 to 3 of 3"),
        ({"whisper_encoder_args": WHISPER | {"layer_ed": 2}}, "ln_post2.weight has the shape"),
        ({"whisper_encoder_args": WHISPER | {"num_blocks": 2}}, "weights 'blocks.2.attn.key.weight' are not known"),
        ({"whisper_encoder_args": WHISPER | {"n_head": "4"}}, "n_head: expected a whole number"),
        ({"whisper_encoder_args": WHISPER | {"n_ctx": 700}}, "whisper_encoder_args.n_ctx is not known"),
        ({"cmvn_args": {"norm_median": True}}, "cmvn_args.norm_median is not known"),
    ],
)
def test_settings_of_whisper_are_refused_by_name(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(save_whisper(tmp_path, whisper()[1], **data))


# ReDimNet2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"frontend": "fbank"}, "model ReDimNet2B0 on the front end fbank"),
        ({"cmvn": True}, "dataset_args.cmvn is not false"),
        ({"tfmel_args": {"hop_length": 200}}, "tfmel_args.hop_length is 200: spkd takes 160"),
        ({"tfmel_args": {"n_fft": 256}}, "windows of 400 samples, n_fft 256"),
        ({"tfmel_args": {"f_max": 9_000}}, "tfmel_args.f_max is 9000"),
        ({"tfmel_args": {"window": "hann"}}, "tfmel_args.window is not known"),
        ({"tfmel_args": {"n_mels": 64}}, "feat_dim is 72: spkd takes the 64 bands"),
        ({"tfmel_args": {"n_mels": 72}}, "no weights|more than the file has"),
    ],
)
def test_settings_of_tfmel_are_refused_by_name(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    """What it gives for what is taken is compared with WeSpeaker's own code in benchmarks/teachers_equal.py."""
    given = {"frontend": "tfmel", "cmvn": False} | data
    folder = save(tmp_path, "ReDimNet2B0", {"linear.weight": torch.ones(192, 4)}, given, feat_dim=72)
    with pytest.raises(UsageError, match=message):
        load(folder)


# Times of frames


def networks() -> list[Network]:
    shapes = [[BlockShape(1, 4, 3, 1, 0)], *([BlockShape(4, 4, 3, 2, 0)] for _ in range(4))]
    return [GeminiDFResNet([4, 4, 6, 6, 8], [1, 1, 1, 1], 8, 32), RepVGG(shapes, 8, 32),
            Res2Net(4, 8, 32, 2, 32, "TAP", False)]  # fmt: skip


@pytest.mark.parametrize("number", range(3))
def test_frames_are_centred_where_an_impulse_moves_them_most(number: int) -> None:
    torch.manual_seed(number)
    network = networks()[number].eval()
    target = network.levels["frames"]
    features = torch.zeros(1, 128, 32)
    places = range(56, 72)
    found = []
    with torch.no_grad():
        silent = network.run(features.transpose(1, 2))["frames"][0]
        assert len(silent) == target.num_frames(WINDOW + 127 * HOP)
        for place in places:
            features[:, place] = 1.0
            energy = (network.run(features.transpose(1, 2))["frames"][0] - silent).square().sum(1).double()
            features[:, place] = 0.0
            found.append(float((energy * torch.arange(len(energy))).sum() / energy.sum()))
    times = np.mean(found) * (target.hop or 0) + target.middle
    # Over sixteen neighbouring places, random kernels that lean to one side lean by less than a frame of fbank.
    assert abs(times - (np.mean(places) * HOP + WINDOW / 2)) < 1.5 * HOP
