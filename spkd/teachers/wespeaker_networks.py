"""Networks and front ends of WeSpeaker's models, from config.yaml and the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError
from spkd.files import digest
from spkd.networks.network import Network
from spkd.networks.resnet import FLOOR
from spkd.networks.ssl import read_config, read_extractor
from spkd.networks.toolkits.encoded import Encoded
from spkd.networks.toolkits.pooling import POOLINGS
from spkd.networks.toolkits.recognise import recognise
from spkd.networks.toolkits.redimnet import SHAPES
from spkd.networks.toolkits.repvgg import deployed
from spkd.networks.toolkits.resnet import DEPTHS
from spkd.networks.toolkits.w2vbert import W2VBertMFA, merged, shape_of
from spkd.networks.toolkits.whisper import WhisperEncoder
from spkd.outputs.features import FBANK, HOP
from spkd.teachers.redimnet import SECOND, Given, of_wespeaker
from spkd.teachers.ssl import acting
from spkd.teachers.toolkit import FrontEnd, check_keys, check_rate, fill, kaldi_front_end, section
from spkd.teachers.wespeaker_features import TFMel, tfmel_front_end, whisper_front_end

CONFIG = "config.yaml"
WHISPER, W2VBERT = ("whisper_PMFA_large_v2", "Whisper_PMFA_large_v2"), "W2VBert_Adapter_MFA"
REPVGG = (
    *("TINY_A0", "TINY_RSBB_A0", "A0", "RSBB_A0", "A1", "A2", "RSBB_A2", "B0", "RSBB_B0", "B1", "B1g2", "B1g4"),
    *("B2", "B2g2", "B2g4", "B3", "B3g2", "B3g4", "D2SE"),
)
NETWORKS = (
    *(f"ResNet{n}" for n in DEPTHS),
    *("ECAPA_TDNN_c512", "ECAPA_TDNN_c1024", "ECAPA_TDNN_GLOB_c512", "ECAPA_TDNN_GLOB_c1024", "CAMPPlus", "XVEC"),
    *("XI_VEC_ECAPA_TDNN_c512", "XI_VEC_ECAPA_TDNN_c1024", "XI_VEC_XVEC"),
    *("ERes2Net34_Base", "ERes2Net34_Large", "ERes2Net34_aug", "Res2Net34_Base", "Res2Net34_Large"),
    *("SimAM_ResNet34_ASP", "SimAM_ResNet100_ASP"),
    *(f"Gemini_DF_ResNet{n}" for n in (60, 114, 183, 237)),
    *(f"REPVGG_{name}" for name in REPVGG),
    *SHAPES,
    *SECOND,
    *WHISPER,
    W2VBERT,
)
FRONT_ENDS = ("fbank", "tfmel", "whisper_encoder", "w2vbert")
TFMEL_TRAINING = ("do_spec_aug", "freq_mask_width", "time_mask_width")  # settings of `tfmel` that act only in training
# Settings of networks: pooling, those that the shapes of the weights tell, and one with an effect only in training.
MODEL_KEYS = (
    "pooling_func",
    *("feat_dim", "acoustic_dim", "embed_dim", "two_emb_layer", "emb_bn", "in_planes", "hid_dim", "stats_dim"),
    *("expansion", "baseWidth", "scale", "growth_rate", "bn_size", "init_channels", "deploy", "use_se"),
    *("n_mfa_layers", "adapter_dim", "num_frontend_hidden_layers"),
    "dropout",
)
FBANK_KEYS = (
    *("num_mel_bins", "frame_length", "frame_shift", "resample_rate"),
    *("dither", "raw_wav"),  # only in training
)
# Settings of data: those that are read here, and those with an effect only in training.
DATA_KEYS = (
    *("resample_rate", "frontend", "fbank_args", "cmvn", "cmvn_args"),
    *("aug_prob", "chunk_info_args", "filter", "filter_args", "musan_scp", "num_frms", "rirs_scp", "shuffle"),
    *("sample_num_per_epoch", "shuffle_args", "spec_aug", "spec_aug_args", "speed_perturb", "speed_perturb_mode"),
    *("train_label", "train_scp", "s3prl_args", "tfmel_args", "w2vbert_args", "whisper_encoder_args"),
)
W2VBERT_KEYS = (
    *("model_name", "use_bnb", "use_lora", "lora_config_args", "model_config_file"),
    *("download_dir", "frozen", "bnb_config_args", "sample_rate"),  # without effect on a loaded model
)
LORA_KEYS = ("r", "lora_alpha", "target_modules", "bias", "model_type", "lora_dropout")
LORA_RANK, LORA_ALPHA = 16, 32  # WeSpeaker's defaults
W2VBERT_HUB = "w2v-bert-2.0"  # end of the names of the public model, whose settings are the defaults of transformers


@dataclass
class Whisper:
    """Settings of `whisper_encoder` under WeSpeaker's names."""

    n_mels: int = 80
    num_blocks: int = 24
    output_size: int = 1280
    n_head: int = 20
    layer_st: int = 16
    layer_ed: int = 23


@dataclass
class Built:
    """Network with its weights, and its front end.

    Attributes:
        settings: settings for the card, which neither the architecture nor the shapes of the weights tell.
    """

    network: Network
    front_end: FrontEnd
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Model:
    """What was read of a model.

    Attributes:
        source: name for messages.
        tensors: weights by WeSpeaker's names, without the projection.
        settings: content of config.yaml.
        features: kind of fbank.
        floor: number added to a variance before its root.
        padded: whether a frame without a partner is kept (see `W2VBertMFA`).
    """

    source: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    features: str
    floor: float = FLOOR
    padded: bool = True


def build(model: Model) -> Built:
    """Network of a model with its weights, and its front end.

    Raises:
        UsageError: settings that spkd does not have, or weights that do not fit the network.
        ValueError: an architecture that is not known.
        KeyError: a weight is lacking.
        RuntimeError: shapes of weights that do not fit one another.
    """
    name, source = text(model.settings.get("model")), model.source
    if "model" not in model.settings:
        raise UsageError(f"{source}: no model in its {CONFIG}, which names the network")
    if name not in NETWORKS:
        raise UsageError(f"{source}: model is {name}, which spkd does not have; taken: {', '.join(NETWORKS)}")
    data = section(model.settings, "dataset_args")
    check_keys(data, DATA_KEYS, f"{source}: dataset_args")
    check_rate(data, "resample_rate", source)
    front_end = data.get("frontend", "fbank")
    if front_end not in FRONT_ENDS:
        raise UsageError(f"{source}: its front end is {text(front_end)}; taken: {', '.join(FRONT_ENDS)}")
    if (name == W2VBERT) != (front_end == "w2vbert") or (name in SECOND) != (front_end == "tfmel"):
        raise UsageError(f"{source}: model {name} on the front end {front_end}, which WeSpeaker cannot run either")
    if name == W2VBERT:
        return _w2vbert(model, data)
    if name in SECOND:
        return _redimnet2(model, data, name)
    return _whisper(model, data, name) if front_end == "whisper_encoder" else _of_fbank(model, data, name)


def text(value: Any) -> str:
    """Name in a settings file, as shown in errors."""
    return value[:100] if isinstance(value, str) else f"a {type(value).__name__}"


def _of_fbank(model: Model, data: dict[str, Any], name: str) -> Built:
    """Network that takes fbank."""
    source = model.source
    # Earlier releases of WeSpeaker have the settings of features at the top level.
    bank = section(data, "fbank_args") or section(model.settings, "feature_args")
    check_rate(bank, "resample_rate", source)
    check_keys(bank, FBANK_KEYS, f"{source}: dataset_args.fbank_args")
    for key, expected in (("frame_length", 25), ("frame_shift", 10)):
        if (given := bank.get(key, expected)) != expected:
            shown = given if isinstance(given, int | float) else text(given)
            raise UsageError(f"{source}: fbank_args.{key} is {shown} ms; spkd has {expected}")
    if _normalisation(data, source) != (True, False):
        raise UsageError(
            f"{source}: its features are not mean-normalised as WeSpeaker's recipes have it (cmvn, norm_mean, norm_var)"
        )
    mels = bank.get("num_mel_bins", 80)
    if not isinstance(mels, int) or not 8 <= mels <= 256:
        raise UsageError(f"{source}: fbank_args.num_mel_bins: expected 8 to 256")
    network, settings = _recognised(model, name, mels, model.tensors)
    return Built(network, kaldi_front_end(model.features, mels), settings)


def _redimnet2(model: Model, data: dict[str, Any], name: str) -> Built:
    """ReDimNet2, which takes `tfmel` alone: fbank has its axes in another order in WeSpeaker."""
    source, where = model.source, f"{model.source}: tfmel_args"
    given = Given(section(data, "tfmel_args"), where)
    given.ignore(*TFMEL_TRAINING)
    given.choice("sample_rate", SAMPLE_RATE, (SAMPLE_RATE,))
    given.choice("hop_length", HOP, (HOP,))
    settings = TFMel(
        given.whole("n_mels", 80, 8, 256),
        given.whole("n_fft", 512, 64, 8192),
        given.whole("win_length", 400, 64, 8192),
        given.number("f_min", 20.0, 0, 4000),
        given.number("f_max", 7600.0, 4000, 8000),
        given.flag("norm_signal", False),
        given.flag("do_preemph", True),
        given.number("eps", 1e-8, 1e-12, 1e-2),
    )
    given.finish()
    if settings.win_length > settings.n_fft or settings.n_fft % 2:
        raise UsageError(f"{where}: windows of {settings.win_length} samples, n_fft {settings.n_fft}")
    if data.get("cmvn", True):
        raise UsageError(
            f"{source}: dataset_args.cmvn is not false, with which WeSpeaker subtracts the mean over bands"
        )
    tensors = {n: values for n, values in model.tensors.items() if not n.startswith("frontend.")}  # windows and filters
    arguments = section(model.settings, "model_args")
    network, rules = of_wespeaker(name, arguments, settings.n_mels, tensors, f"{source}: model_args")
    tensors.pop(f"backbone.stage0{'_pre' if network.shape.dual else ''}.0.w", None)  # its only input has the weight 1
    fill(network, tensors, source, rules)
    return Built(network, tfmel_front_end(settings), {"features": asdict(settings), "model_args": arguments})


def _recognised(model: Model, name: str, bands: int, tensors: dict[str, Tensor]) -> tuple[Network, dict[str, Any]]:
    """Speaker network with its weights, and settings for the card.

    Args:
        bands: bands of its input.
        tensors: weights of the speaker network alone.
    """
    pooling = _pooling(model, name)
    # CAM++ has its pooling under two names.
    tensors = {n.replace("xvector.stats.", "pool."): values for n, values in deployed(tensors).items()}
    network, rules = recognise(tensors, bands, pooling, model.floor, name)
    fill(network, tensors, model.source, rules)
    return network, {} if pooling is None else {"pooling": pooling}


def _pooling(model: Model, name: str) -> str | None:
    """WeSpeaker's name of the pooling of a network; None: the pooling of the architecture."""
    arguments = section(model.settings, "model_args")
    check_keys(arguments, MODEL_KEYS, f"{model.source}: model_args")
    pooling = arguments.get("pooling_func")
    fixed = "ASP" if name == W2VBERT or name.startswith("SimAM") else "ASTP" if name in WHISPER else None
    if pooling not in (None, *((fixed,) if fixed else POOLINGS)):
        taken = fixed or ", ".join(POOLINGS)
        raise UsageError(f"{model.source}: model_args.pooling_func is {text(pooling)}; taken: {taken}")
    return None if fixed else pooling


def _normalisation(data: dict[str, Any], source: str) -> tuple[bool, bool]:
    """Whether the mean over time is subtracted from the features, and whether they are divided by their deviation."""
    norm = section(data, "cmvn_args")
    check_keys(norm, ("norm_mean", "norm_var"), f"{source}: dataset_args.cmvn_args")
    if not data.get("cmvn", True):
        return False, False
    return bool(norm.get("norm_mean", True)), bool(norm.get("norm_var", False))


def _whisper(model: Model, data: dict[str, Any], name: str) -> Built:
    """Speaker network on Whisper's encoder."""
    source, arguments = model.source, section(data, "whisper_encoder_args")
    names = [f.name for f in fields(Whisper)]
    check_keys(arguments, (*names, "frozen", "model_path", "sample_rate"), f"{source}: whisper_encoder_args")
    given = {key: value for key, value in arguments.items() if key in names}
    for key, value in given.items():
        if not isinstance(value, int) or not 0 <= value <= 10_000:
            raise UsageError(f"{source}: whisper_encoder_args.{key}: expected a whole number from 0 to 10000")
    shape = Whisper(**given)
    encoder = WhisperEncoder(
        shape.n_mels, shape.output_size, shape.n_head, shape.num_blocks, shape.layer_st, shape.layer_ed
    )
    front, back = _split(model.tensors)
    fill(encoder, front, source)
    network, settings = _recognised(model, name, encoder.frames.dim, back)
    centred, scaled = _normalisation(data, source)
    settings |= {"heads": shape.n_head, "layers": [shape.layer_st, shape.layer_ed], "cmvn": [centred, scaled]}
    front_end = whisper_front_end(shape.n_mels)
    return Built(Encoded(encoder, network, front_end.frames, centred, scaled), front_end, settings)


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of an encoder by its own names, and the others."""
    before = ("frontend.encoder.", "front.encoder.")
    front = {n.split("encoder.", 1)[1]: values for n, values in tensors.items() if n.startswith(before)}
    return front, {n: values for n, values in tensors.items() if not n.startswith(before)}


W2VBERT_NAMES = ((r"^encoder\.", "frontend.encoder."), (r"^pool\.", "pooling."), (r"^project\.", "bottleneck."))


def _w2vbert(model: Model, data: dict[str, Any]) -> Built:
    """w2v-BERT 2.0 with adapters."""
    source, arguments = model.source, section(data, "w2vbert_args")
    check_keys(arguments, W2VBERT_KEYS, f"{source}: w2vbert_args")
    _pooling(model, W2VBERT)
    for key, words in (
        ("use_bnb", "weights of 8 bits, which spkd does not have"),
        ("model_config_file", "a further file of settings, which spkd does not read"),
    ):
        if arguments.get(key):
            raise UsageError(f"{source}: w2vbert_args.{key}: {words}")
    if data.get("cmvn"):
        raise UsageError(f"{source}: dataset_args.cmvn is true; the layers of w2v-BERT are taken as they are (false)")
    config = _encoder_settings(arguments, source)
    front, back = _split(model.tensors)
    front = merged(front, _alpha(arguments, front, source))
    front.pop("masked_spec_embed", None)  # only in training
    config |= shape_of(front)
    adapted = len({n.split(".")[1] for n in back if n.startswith("adapter_layers.")})
    width, embedding = len(back["adapter_layers.0.0.weight"]), len(back["bottleneck.weight"])
    network = W2VBertMFA(config, adapted, width, embedding, model.padded)
    fill(network, {f"frontend.encoder.{n}": values for n, values in front.items()} | back, source, W2VBERT_NAMES)
    settings = {"encoder": digest.of_tree(acting(network.encoder.config)), "odd frame": model.padded}
    front_end = kaldi_front_end("kaldi")
    words = "80-mel Kaldi fbank, 25/10 ms, zero mean and unit variance of each band per view"
    return Built(network, FrontEnd(FBANK, front_end.compute, words), settings)


def _alpha(arguments: dict[str, Any], front: dict[str, Tensor], source: str) -> float | None:
    """Scale alpha of LoRA; None where there is none."""
    lora = section(arguments, "lora_config_args")
    check_keys(lora, LORA_KEYS, f"{source}: lora_config_args")
    ranks = {len(values) for name, values in front.items() if ".lora_A." in name}
    if not ranks:
        return None
    if not arguments.get("use_lora"):
        raise UsageError(f"{source}: its weights have LoRA, and w2vbert_args.use_lora is not true: no scale is known")
    rank, alpha = lora.get("r", LORA_RANK), lora.get("lora_alpha", LORA_ALPHA)
    if ranks != {rank}:
        raise UsageError(f"{source}: lora_config_args.r is {str(rank)[:20]}; the weights have {sorted(ranks)}")
    if not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise UsageError(f"{source}: lora_config_args.lora_alpha: expected a number above 0")
    return float(alpha)


def _encoder_settings(arguments: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings of w2v-BERT in the folder that config.yaml names; the public model has the defaults of transformers."""
    name = arguments.get("model_name", W2VBERT_HUB)
    if isinstance(name, str) and (Path(name) / "config.json").is_file():
        try:
            config = read_config(name).to_dict()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{source}: w2vbert_args.model_name: {name} cannot be read ({error})") from error
        read_extractor(name)
        return {key: value for key, value in config.items() if key != "model_type"}
    if not isinstance(name, str) or not name.rstrip("/").endswith(W2VBERT_HUB):
        raise UsageError(
            f"{source}: w2vbert_args.model_name is {text(name)}: neither a folder with config.json nor {W2VBERT_HUB}"
        )
    return {}
