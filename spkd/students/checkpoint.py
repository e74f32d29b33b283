"""Trained student on disk: model.safetensors (weights) and model.json (all that is needed to rebuild it)."""

from __future__ import annotations

import contextlib
import re
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest
from spkd.files.atomic import remove, remove_abandoned, write_bytes, write_copy, write_json
from spkd.files.reading import MOST_OF_WEIGHTS, opened, read_bytes
from spkd.files.schema import convert
from spkd.networks.network import Network
from spkd.networks.settings import StudentConfig
from spkd.outputs.features import FBANKS, HOP, MELS, WINDOW, is_fbank
from spkd.outputs.target import EMBEDDING, Target
from spkd.registry import STUDENTS
from spkd.students.description import DESCRIPTION, EARLIER, WEIGHTS, Description, Training, digest_of_part
from spkd.version import __version__

MOST_OF_FOREIGN = 1 << 32  # bytes of weights of another program: the largest speaker networks have 600 M in float32
MAGIC = {  # first bytes of files that are given by mistake
    b"RIFF": "audio or another RIFF file",
    b"fLaC": "audio (FLAC)",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of numpy",
    b"\x1f\x8b": "gzipped",
}
TORCH_VERSION = "torch.torch_version.TorchVersion"
HEADER = 1 << 16  # most bytes that describe a tensor in its file
CLASSIFIER = "head.weight"  # name of the classifier's weights, where training had a classifier


@dataclass
class Checkpoint:
    """Network, and the classifier it was trained with, if any.

    Attributes:
        head: (classes, D) rows of a cosine classifier.
        scale: scale of the classifier's logits.
        weights_sha256: digest of the file of weights that it was read from.
        part: number of numbers of the embedding, the first ones, that are taken; None: all.
    """

    network: Network
    head: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    scale: float = 1.0
    training: Training = field(default_factory=Training)
    weights_sha256: str = ""
    part: int | None = None

    @property
    def digest(self) -> str:
        """Digest that stands for the model: of its weights, and of the part of the embedding that is taken."""
        return self.weights_sha256 if self.part is None else digest_of_part(self.weights_sha256, self.part)


def read_weights(file: str) -> dict[str, Tensor]:
    """Read tensors by name from a file of another program: safetensors, or torch's format, without executing any code.

    Raises:
        UsageError: no such file.
        SpkdError: the file cannot be read as weights, or some of its tensors are not weights.
    """
    return weights_of(read_state(file), file)


def read_state(file: str, others: str = "") -> Any:
    """Read all that a file of weights holds, without executing any code.

    Args:
        others: name of a package whose objects may be in the file; objects without content are made in their place.
    Raises:
        UsageError: no such file.
        SpkdError: the file cannot be read as weights.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{file}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_tensors(read_bytes(path, MOST_OF_FOREIGN))
        if path.stat().st_size > MOST_OF_FOREIGN:
            raise ValueError(f"larger than the {MOST_OF_FOREIGN:,} bytes that it may have")
        if any(part.compress_type for part in _parts(path)):
            raise ValueError("its parts are compressed, as torch never writes them")
        if sum(part.file_size for part in _parts(path)) > path.stat().st_size:
            raise ValueError("its parts overlap: together they are larger than the file")
        allowed = _empty_objects(path, others) if others and _parts(path) else []
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise SpkdError(f"{path}: cannot be read as weights ({_reason(path, error)})") from error


class _Empty:
    """Object without content, in place of another program's."""

    def __init__(self, *content: Any) -> None:
        pass

    def __setstate__(self, content: Any) -> None:
        pass


def _empty_objects(path: Path, package: str) -> list[Any]:
    """What torch takes to make empty objects in place of those of a package, and of torch's version."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(_Empty, name) for name in names if name.split(".")[0] == package or name == TORCH_VERSION]


def weights_of(state: Any, file: str) -> dict[str, Tensor]:
    """Tensors by name of the content of a file.

    Raises:
        SpkdError: it holds no weights, or some of its tensors are not weights.
    """
    for key in ("model_state", "state_dict", "model", "modules", "spk_model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise SpkdError(f"{file}: holds a {type(state).__name__}, expected tensors by name (a state dictionary)")
    tensors = {name: values for name, values in state.items() if isinstance(values, Tensor)}
    for name, values in tensors.items():
        if (problem := _no_weights(name, values)) is not None:
            raise SpkdError(f"{file}: {str(name)[:100]!r} {problem}; expected dense floating-point weights by name")
    return tensors


def _parts(path: Path) -> list[zipfile.ZipInfo]:
    """Parts of a file that torch reads as an archive; none of another file. Raises many kinds for a damaged archive."""
    with opened(path) as file:
        if file.read(4) != b"PK\3\4":
            return []
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()


def _reason(path: Path, error: Exception) -> str:
    """Reason, in a user's words, for which a file cannot be read."""
    with contextlib.suppress(Exception):  # those of a damaged archive
        if any(part.filename.endswith("/constants.pkl") for part in _parts(path)):
            return "it is a TorchScript program; save the model's state dictionary, or export it to ONNX"
    # torch names the first object that it refused to make.
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds Python objects ({match[1]}), which are never made; in the program that it comes from, save its "
            "tensors alone: torch.save(model.state_dict(), FILE)"
        )
    with open(path, "rb") as file:
        start = file.read(200)
    if path.suffix == ".onnx":
        return "it is an ONNX model: teacher=onnx, or model=onnx"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    if (kind := next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)) is not None:
        return f"it is {kind}"
    if not start:
        return "it is empty"
    if start.isascii() and b"\0" not in start:
        return f"it is a text file, beginning with {start[:40].decode()!r}"
    return first_line(error)


def _no_weights(name: object, values: Tensor) -> str | None:
    """Reason for which a tensor cannot be weights; None where it can."""
    if not isinstance(name, str):
        return "is no name"
    if values.layout != torch.strided or values.is_nested:
        return "is sparse or nested"
    if values.device.type == "meta":
        return "has a shape, but no values"
    if values.is_quantized or not (values.is_floating_point() or name.endswith("num_batches_tracked")):
        return f"holds {str(values.dtype).removeprefix('torch.')}"
    if values.numel() * values.element_size() > values.untyped_storage().nbytes():
        return f"repeats {values.untyped_storage().nbytes():,} bytes to the shape {tuple(values.shape)}"
    return None


def save_student(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write both files, weights first. Those of an earlier student stay until model.json describes the new ones."""
    folder, network = Path(folder), checkpoint.network
    tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if checkpoint.head is not None:
        tensors[CLASSIFIER] = checkpoint.head.detach().cpu().contiguous()
    data = save_tensors(tensors)
    if (folder / DESCRIPTION).is_file() and (folder / WEIGHTS).is_file():
        write_copy(folder / WEIGHTS, folder / EARLIER)
    write_bytes(folder / WEIGHTS, data)
    name = next(name for name, kind in STUDENTS.items() if type(network) is kind)
    described = Description(
        name,
        network.settings,
        _features(network.input_kind),
        digest.of_bytes(data),
        checkpoint.classes,
        checkpoint.scale,
        checkpoint.training,
        __version__,
        network.nested,
    )
    write_json(folder / DESCRIPTION, described.to_json())
    remove(folder / EARLIER)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what kills left of writing a student: unfinished files, and weights that model.json describes no more."""
    folder = Path(folder)
    remove_abandoned(folder, (WEIGHTS, EARLIER, DESCRIPTION))
    # Of a student that cannot be read all files stay, for the command that loads it and says why.
    with contextlib.suppress(SpkdError, OSError):
        if (folder / EARLIER).is_file():
            described = Description.read(folder / DESCRIPTION).weights_sha256
            if digest.of_file(folder / WEIGHTS) == described:
                remove(folder / EARLIER)


def check_student(folder: str | Path) -> None:
    """Check that a folder holds a checkpoint, without reading it. Raises UsageError where it holds none."""
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        what = "a file, not the folder of a student" if folder.is_file() else "no spkd checkpoint"
        out = shlex.quote(str(folder)) if not folder.exists() else "NEW_FOLDER"
        way = f"train one with `spkd train out={out}`"
        if (folder / "run.yaml").is_file():  # of a training
            way = "its training has not finished: run the same `spkd train` again, which continues it"
        raise UsageError(f"{folder}: {what} ({DESCRIPTION}, {WEIGHTS}); {way}")


def load_student(folder: str | Path, dimension: int | None = None) -> Checkpoint:
    """Read a checkpoint, with the network in evaluation mode on the CPU.

    Args:
        dimension: number of numbers of the embedding, the first ones, that are taken; None: all. The classifier is that
            of the whole embedding, and is left out where a part is taken.
    Raises:
        UsageError: the folder holds no checkpoint, or its embedding is not usable at this dimension.
        SpkdError: the checkpoint is damaged, of another format, or its weights are not finite.
    """
    folder = Path(folder)
    path, weights = folder / DESCRIPTION, folder / WEIGHTS
    check_student(folder)
    described = Description.read(path)
    part = described.part(dimension, str(folder))
    expected = _expected(described, weights)
    most = min(MOST_OF_WEIGHTS, _most_bytes(expected, len(described.classes)))
    data = read_bytes(weights, most)
    if digest.of_bytes(data) != described.weights_sha256 and (folder / EARLIER).is_file():
        data = read_bytes(folder / EARLIER, most)  # the writing of both files was cut off
    if digest.of_bytes(data) != described.weights_sha256:
        raise SpkdError(f"{weights}: damaged (it is not the file that {DESCRIPTION} describes)")
    try:
        tensors = load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise SpkdError(f"{weights}: damaged ({first_line(error)})") from error
    head = tensors.pop(CLASSIFIER, None)
    if {k: v.shape for k, v in tensors.items()} != {f"network.{k}": v.shape for k, v in expected.items()}:
        raise SpkdError(f"{weights}: damaged or of another network (its tensors are not those of {path})")
    network = _network(described, {k.removeprefix("network."): v for k, v in tensors.items()}, weights)
    for kind in FBANKS.values() if is_fbank(network.input_kind) else ():
        if described.features == _features(kind):
            network.take(kind)
    if described.features != _features(network.input_kind):
        raise SpkdError(f"{path}: damaged (its features are not those of this network)")
    if head is not None and head.shape != (len(described.classes), network.levels[EMBEDDING].dim):
        raise SpkdError(
            f"{weights}: damaged (a classifier of shape {tuple(head.shape)}, {len(described.classes)} classes)"
        )
    network.nested = described.nested
    if network.nested and network.nested[-1] != network.levels[EMBEDDING].dim:
        raise SpkdError(f"{path}: damaged (its nested sizes are not those of this network)")
    if part is not None:
        network.keep(part)
        head = None
    return Checkpoint(
        network.eval(), head, described.classes, described.scale, described.training, described.weights_sha256, part
    )


def _expected(described: Description, weights: Path) -> dict[str, Tensor]:
    """Tensors of the network that a student's description names, by name, without values."""
    network_settings = STUDENTS.settings(described.network)
    limits = {f.name: f.metadata for kind in (StudentConfig, network_settings) for f in fields(kind)}
    kind: type[Network] = STUDENTS[described.network]
    try:
        for name, value in described.settings.items():
            if name in limits:
                convert(int, value, limits[name], name)
        # Without memory: a damaged width could ask for more than there is.
        with torch.device("meta"):
            return kind(**described.settings).state_dict()
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise SpkdError(f"{weights}: damaged or of another network ({first_line(error)})") from error


def _most_bytes(network: Mapping[str, Tensor], classes: int) -> int:
    """Most bytes of the weights of a network with a classifier as wide as its widest layer, in double precision."""
    widest = max((size for values in network.values() for size in values.shape), default=0)
    numbers = sum(values.numel() for values in network.values()) + classes * widest
    return 8 * numbers + HEADER * (len(network) + 1)


def _network(described: Description, tensors: dict[str, Tensor], weights: Path) -> Network:
    kind: type[Network] = STUDENTS[described.network]
    try:
        network = kind(**described.settings)
        network.load_state_dict(tensors)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise SpkdError(f"{weights}: damaged or of another network ({first_line(error)})") from error
    wrong = sum(int((~values.isfinite()).sum()) for values in tensors.values() if values.is_floating_point())
    if wrong:
        raise SpkdError(f"{weights}: {wrong:,} of its weights are not finite; the training that made it diverged")
    return network


def _features(kind: Target) -> dict[str, Any]:
    if is_fbank(kind):
        return {"kind": kind.name, "mels": MELS, "window": WINDOW, "hop": HOP, "normalise": "mean"}
    return {"kind": kind.name, "normalise": "mean and variance"}
