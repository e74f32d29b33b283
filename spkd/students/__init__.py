"""Student networks. All take features (B, T, F) and return their named levels, so that any loss meets any student."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spkd.errors import UsageError
from spkd.networks.network import Network
from spkd.networks.settings import StudentConfig
from spkd.outputs.features import FBANKS, is_fbank
from spkd.progress import log
from spkd.registry import STUDENTS
from spkd.students.checkpoint import Checkpoint, load_student, read_weights, save_student
from spkd.students.description import DESCRIPTION, Description, Training


def build(name: str, **settings: Any) -> Network:
    """A network of the registry with fresh weights. Raises ValueError for widths the architecture cannot have."""
    network: Network = STUDENTS[name](**settings)
    return network


def make_student(config: StudentConfig) -> Network:
    """The network that the settings describe, with fresh weights or those of `init`.

    Raises:
        UsageError: widths the architecture cannot have, or weights of another one.
    """
    name, trained = config.name, config.init is not None and (Path(config.init) / DESCRIPTION).is_file()
    kind: type[Network] = STUDENTS[name]
    if config.init is not None and not trained and (network := kind.from_pretrained(config.init, config)) is not None:
        return network
    settings = {"channels": config.channels or kind.default_channels, "embedding": config.embedding}
    settings |= asdict(config.settings)
    try:
        network = build(name, **settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if is_fbank(network.input_kind):
        network.take(FBANKS[config.features])
    elif config.features != "kaldi":
        raise UsageError(f"student.features={config.features}: {name} takes the waveform")
    return network if config.init is None else initialise_from(network, config.init, trained)


def initialise_from(network: Network, source: str, trained: bool) -> Network:
    """The network with the weights of a student trained by spkd (a folder), or of a state dictionary with the same
    names: WeSpeaker's or 3D-Speaker's (a file; a classifier in it is left out).

    Raises:
        UsageError: another architecture or width.
    """
    if trained:
        weights = load_student(source).network.state_dict()
    else:
        if network.input_kind == FBANKS["kaldi"]:
            log(f"note: {source}: for weights of WeSpeaker or 3D-Speaker set student.features to their toolkit")
        weights = {k: v for k, v in read_weights(source).items() if not k.startswith("projection.")}
    try:
        found = network.load_state_dict(network.renamed(weights), strict=False)
    except RuntimeError as error:
        raise UsageError(f"student.init={source}: other widths ({_second_line(error)})") from error
    lacking = [n for n in found.missing_keys if not n.endswith("num_batches_tracked") and ".feed_forward." not in n]
    if lacking or found.unexpected_keys:
        raise UsageError(f"student.init={source}: another architecture ({[*lacking, *found.unexpected_keys][0]})")
    return network


def _second_line(error: Exception) -> str:
    """torch names the tensor that does not fit in the second line."""
    return [*str(error).splitlines(), "", ""][1].strip()[:200]


__all__ = [
    "Checkpoint",
    "Description",
    "Network",
    "Training",
    "build",
    "load_student",
    "make_student",
    "read_weights",
    "save_student",
]
