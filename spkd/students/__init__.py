"""Student networks. All take features (B, T, F) and return levels by name, so that any loss works with any student."""

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
from spkd.students.checkpoint import (
    Checkpoint,
    check_student,
    load_student,
    read_state,
    read_weights,
    remove_leftovers,
    save_student,
    weights_of,
)
from spkd.students.description import DESCRIPTION, Description, Training


def build(name: str, **settings: Any) -> Network:
    """Network of the registry with new random weights. Raises ValueError for widths the architecture cannot have."""
    network: Network = STUDENTS[name](**settings)
    return network


def is_of_library(config: StudentConfig) -> bool:
    """Whether `init` names a model of another library, whose width the student has."""
    if config.init is None or (Path(config.init) / DESCRIPTION).is_file():
        return False
    return "from_pretrained" in vars(STUDENTS[config.name])


def make_student(config: StudentConfig) -> Network:
    """Network that the settings describe, with new random weights or those of `init`.

    Raises:
        UsageError: widths the architecture cannot have, or weights of another architecture.
    """
    name, trained = config.name, config.init is not None and (Path(config.init) / DESCRIPTION).is_file()
    kind: type[Network] = STUDENTS[name]
    if config.init is not None and not trained and (network := kind.from_pretrained(config.init, config)) is not None:
        network.nested = tuple(config.nested)
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
    network.nested = tuple(config.nested)
    return network if config.init is None else initialise_from(network, config.init, trained)


def initialise_from(network: Network, source: str, trained: bool) -> Network:
    """Network with the weights of a trained model.

    Args:
        source: folder of a student trained by spkd; or file of a state dictionary of WeSpeaker or 3D-Speaker with the
            same names, of which a classifier is left out.
        trained: whether the source is a student trained by spkd.
    Raises:
        UsageError: another architecture or width.
    """
    if trained:
        earlier = load_student(source).network
        if earlier.input_kind != network.input_kind:
            log(
                f"note: student.init={source} was trained on {earlier.input_kind.name}, and this student takes "
                f"{network.input_kind.name}; its weights fit student.features of its own training best"
            )
        weights = earlier.state_dict()
    else:
        if network.input_kind == FBANKS["kaldi"]:
            log(f"note: {source}: for weights of WeSpeaker or 3D-Speaker set student.features to their toolkit")
        weights = {k: v for k, v in read_weights(source).items() if not k.startswith("projection.")}
    try:
        mismatch = network.load_state_dict(network.renamed(weights), strict=False)
    except RuntimeError as error:
        raise UsageError(f"student.init={source}: other widths ({_second_line(error)})") from error
    lacking = [n for n in mismatch.missing_keys if not n.endswith("num_batches_tracked") and ".feed_forward." not in n]
    if lacking or mismatch.unexpected_keys:
        raise UsageError(f"student.init={source}: another architecture ({[*lacking, *mismatch.unexpected_keys][0]})")
    return network


def _second_line(error: Exception) -> str:
    """Second line of an error: there torch names the tensor that does not fit."""
    return [*str(error).splitlines(), "", ""][1].strip()[:200]


__all__ = [
    "Checkpoint",
    "Description",
    "Network",
    "Training",
    "build",
    "check_student",
    "is_of_library",
    "load_student",
    "make_student",
    "read_state",
    "read_weights",
    "remove_leftovers",
    "save_student",
    "weights_of",
]
