"""Base classes of teachers that are one network over mel bands, and functions that those of all toolkits share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.files import digest
from spkd.files.reading import MOST_OF_SETTINGS, read_text
from spkd.networks.network import Network, count_parameters
from spkd.outputs.features import FBANKS, HOP, MELS, WINDOW, fbank_of
from spkd.outputs.head import Head
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.teachers.base import EmbeddingModel, Teacher

LAYER_BYTES = 1 << 30  # largest widest layer for one view (bytes); a forward pass holds several of that size
MOST_NODES = 100_000  # names and values of a settings file
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


@dataclass(frozen=True)
class FrontEnd:
    """Front end: computation of the input of a network.

    Attributes:
        frames: description of the features: width, window and hop.
        compute: function from waveforms (B, samples) and the lengths (B,) of padded ones, or None, to (B, T, F).
        words: description in words, for the card.
        takes_lengths: whether padding does not change the features of a view.
    """

    frames: Target
    compute: Callable[[Tensor, Tensor | None], Tensor]
    words: str
    takes_lengths: bool = True


def kaldi_front_end(kind: str, mels: int = MELS) -> FrontEnd:
    """Front end with the fbank of a toolkit in FBANKS and any number of bands. Raises UsageError for others."""
    if kind not in FBANKS:
        raise UsageError(f"input={kind}: expected {', '.join(FBANKS)}")
    words = {
        "kaldi": f"{mels}-mel Kaldi fbank",
        "wespeaker": f"{mels}-mel fbank with a Hamming window",
        "3d-speaker": f"{mels}-mel Kaldi fbank of samples in [-1, 1]",
        "sherpa": f"{mels}-mel fbank of sherpa-onnx (centred frames, 20 to 7600 Hz)",
    }
    return FrontEnd(
        replace(FBANKS[kind], dim=mels),
        lambda waves, lengths: fbank_of(kind, waves, mels, lengths),
        f"{words[kind]}, 25/10 ms, mean-normalised per view",
    )


class NetworkModel(EmbeddingModel):
    """Model of one network; its targets are all levels of the network (frames, stats, ..., embedding)."""

    def __init__(self, network: Network, front_end: FrontEnd, device: torch.device) -> None:
        self.network, self.front_end, self.device = network.to(device).eval(), front_end, device
        self.num_parameters = count_parameters(network)
        self.takes_lengths = network.takes_lengths and front_end.takes_lengths
        given = front_end.frames
        self.targets = {name: level.after(network.input_kind, given) for name, level in network.levels.items()}
        self.min_samples = max(WINDOW, *(target.window for target in self.targets.values()))
        steps = LAYER_BYTES // (4 * network.widest)
        self.max_samples = HOP * (steps if network.longest is None else min(steps, network.longest))

    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        counts = None if lengths is None else self.front_end.frames.num_frames(lengths)
        outputs: dict[str, Tensor] = self.network(self.front_end.compute(waves, lengths), lengths=counts)
        return outputs


class NetworkTeacher(NetworkModel, Teacher):
    """Teacher of one network. Targets: all levels of the network, and logits where it has a classifier."""

    def __init__(self, network: Network, front_end: FrontEnd, head: Head | None, device: torch.device) -> None:
        super().__init__(network, front_end, device)
        self.head = head
        if head is not None:
            self.targets[LOGITS] = Target(LOGITS, len(head.classes))

    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(waves, names, lengths)
        if self.head is not None and LOGITS in names:
            outputs[LOGITS] = self.head.logits(outputs[EMBEDDING])
        return outputs


class ToolkitTeacher(NetworkTeacher):
    """Base class of teachers trained by another toolkit.

    Attributes:
        source: name of the folder or file of the weights.
        settings: settings of the network that neither the architecture nor the shapes of the weights tell.
    """

    cite: ClassVar[str]
    source: str
    architecture: str
    settings: Mapping[str, Any] = {}
    on_card = ("input",)

    def card(self) -> TeacherCard:
        return TeacherCard(
            family=self.family,
            weights_sha256=digest.of_tensors(dict(self.network.state_dict()) | _tensors(self.head)),
            licence="see the model's own page",
            source=self.source,
            preprocessing=self.front_end.words,
            cite=self.cite,
            details={"network": self.architecture, **self.settings},
        )


def _tensors(head: Head | None) -> dict[str, Tensor]:
    """Weights of a classifier by name, for the digest: they may come from a further file."""
    given = {} if head is None else {"head.weight": head.weight, "head.bias": head.bias}
    return {name: values for name, values in given.items() if values is not None}


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name without the prefix that training on several GPUs adds."""
    return {name.removeprefix("module."): values for name, values in tensors.items()}


def fill(network: nn.Module, tensors: dict[str, Tensor], source: str, rules: Rules = ()) -> None:
    """Load the weights that a toolkit saved into a network.

    Args:
        tensors: weights by the toolkit's names.
        rules: pairs of pattern and replacement, applied in order, that turn a name of ours into the toolkit's.
    Raises:
        UsageError: a weight is lacking, has another shape, or is not used.
    """
    ours, left = network.state_dict(), dict(tensors)
    loaded = {}
    for name, values in ours.items():
        if name.endswith("num_batches_tracked"):
            continue
        toolkit_name = name
        for pattern, replacement in rules:
            toolkit_name = re.sub(pattern, replacement, toolkit_name)
        if toolkit_name not in left:
            raise UsageError(f"{source}: no weights {toolkit_name!r}; is it of another architecture?")
        given = left.pop(toolkit_name)
        if [n for n in given.shape if n > 1] != [n for n in values.shape if n > 1]:  # linear layers may be convolutions
            raise UsageError(
                f"{source}: {toolkit_name} has the shape {tuple(given.shape)}, expected {tuple(values.shape)}"
            )
        if not given.isfinite().all():
            raise UsageError(f"{source}: weights {toolkit_name!r} are not finite")
        loaded[name] = given.reshape(values.shape)
    if unused := [name for name in left if not name.endswith("num_batches_tracked")]:
        raise UsageError(f"{source}: weights {unused[0]!r} are not known here; is it of another architecture?")
    network.load_state_dict(loaded, strict=False)


# Names of weights that identify models of other kinds.
_OTHERS = (
    ("torch_spec.", "a speaker encoder of Coqui TTS"),
    ("resnet.conv1.", "a model of pyannote.audio; take teacher=wespeaker with its folder"),
    ("sincnet.", "a model of pyannote.audio"),
    ("preprocessor.featurizer.", "a model of NeMo; export it to ONNX and take teacher=onnx"),
    ("wavlm.", "a model of transformers; take teacher=wavlm with its folder"),
    ("hubert.", "a model of transformers; take teacher=hubert with its folder"),
    ("wav2vec2.", "a model of transformers; take teacher=wav2vec2 with its folder"),
    ("mfa.", "an ECAPA-TDNN of SpeechBrain or 3D-Speaker"),
    ("layer2.se_res2block.", "an ECAPA-TDNN of WeSpeaker"),
    ("fc_embed.", "a ResNet of SpeechBrain"),
    ("xvector.tdnn.", "a CAM++ of WeSpeaker or 3D-Speaker"),
    ("lstm.", "an LSTM, such as the GE2E d-vector (teacher=dvector)"),
    ("network.", "a student of spkd; take teacher=checkpoint with its folder"),
)


def foreign(tensors: dict[str, Tensor]) -> str:
    """Description, in words, of weights that a family does not support."""
    for start, words in _OTHERS:
        if any(name.startswith(start) for name in tensors):
            return f"{words} (its weights have names as {start}*)"
    return f"of an architecture that spkd does not have (its weights begin with {next(iter(tensors), 'none')[:100]!r})"


def lacking(error: Exception) -> str:
    """Reason for which weights do not fit an architecture; the text of a KeyError is only the name of a weight."""
    return f"no weights {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def check_keys(settings: dict[str, Any], known: Collection[str], where: str) -> None:
    """Check the names of settings. Raises UsageError for an unknown one, which may change the outputs."""
    for key in settings:
        if key not in known:
            raise UsageError(f"{where}.{str(key)[:60]} is not known here{did_you_mean(str(key), known)}")


class PlainLoader(yaml.SafeLoader):
    """YAML loader that makes plain data alone. Aliases cannot make more of a file than fits on some pages."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}  # identity of a node -> number of nodes in it, those of aliases counted again

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if not is_alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = [n for pair in parts for n in pair] if isinstance(node, yaml.MappingNode) else parts
            self._sizes[id(node)] = 1 + sum(self._sizes[id(n)] for n in inner)
        if self._sizes.get(id(node), MOST_NODES) >= MOST_NODES:  # an alias of what it is part of has no size
            raise yaml.composer.ComposerError(None, None, "aliases make it endless", None)
        return node


class _UntaggedLoader(PlainLoader):
    """YAML loader that ignores the tags of other programs (`!new:`, `!ref`) and reads their values as plain data."""


def _untagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_UntaggedLoader.add_multi_constructor("!", _untagged)
_UntaggedLoader.add_multi_constructor("tag:", _untagged)


def read_settings(path: Path, loader: type[PlainLoader] = _UntaggedLoader) -> dict[str, Any]:
    """Read a toolkit's YAML file as data; no object that it names is made or run.

    Args:
        loader: YAML loader, which determines the treatment of tags of other programs.
    Raises:
        UsageError: the file is missing or is not a settings file.
    """
    try:
        tree = yaml.load(read_text(path, MOST_OF_SETTINGS), Loader=loader)
    except SpkdError as error:
        raise UsageError(str(error)) from error
    except (OSError, yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read as settings ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected `key: value` lines")
    return tree


def section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Section of settings; empty where there is none."""
    content = settings.get(name)
    return content if isinstance(content, dict) else {}


def check_rate(settings: dict[str, Any], key: str, source: str) -> None:
    """Check the sampling rate. Raises UsageError for models of another rate."""
    if (rate := settings.get(key, SAMPLE_RATE)) != SAMPLE_RATE:
        raise UsageError(f"{source}: trained on audio of {rate} Hz; this project has {SAMPLE_RATE} Hz")
