"""Files of an ONNX model: the graph, and the files of weights that it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest
from spkd.files.reading import MOST_OF_WEIGHTS, read_bytes

DIGEST, CALIBRATION = "spkd_digest", "spkd_calibration"  # keys in the metadata of exported students
BLANK = b"0" * 64  # stands for the digest while it is computed
FORMS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")  # operations that keep all values
MOST = 2**31  # bytes of a protobuf message


def files_of(path: Path) -> list[Path]:
    """Paths of the graph and of every file of external data that it names, in the order of their names.

    Raises:
        UsageError: no such file, no package onnx, or a named file that is missing or outside the graph's folder.
        SpkdError: the file is not an ONNX model, or not the one that `spkd export` wrote.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageError("teacher=onnx needs onnx and onnxruntime: pip install 'spkd[onnx]'") from error
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.stat().st_size > MOST:
        raise SpkdError(f"{path}: cannot be loaded as an ONNX model (over 2 GiB; such weights lie in files beside it)")
    _check(read_bytes(path, MOST_OF_WEIGHTS), path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        names = sorted({name for tensor in _tensors(model) if (name := _location(tensor)) is not None})
    except Exception as error:  # protobuf's own kinds
        raise SpkdError(f"{path}: cannot be loaded as an ONNX model ({first_line(error)})") from error
    if not model.HasField("graph"):
        raise SpkdError(f"{path}: cannot be loaded as an ONNX model (no graph in it)")
    return [path, *(_inside(path, name) for name in names)]


def operation_of(path: Path, output: str) -> str:
    """Name of the operation that computes an output of a graph, but for those that only change its form."""
    import onnx

    nodes = {name: node for node in onnx.load(str(path), load_external_data=False).graph.node for name in node.output}
    node = nodes.get(output)
    while node is not None and node.op_type in FORMS and node.input[0] in nodes:
        node = nodes[node.input[0]]
    return "" if node is None else str(node.op_type)


def sealed(model: Any) -> bytes:
    """Content of the file of an ONNX model, with a digest over it in its metadata, as `spkd export` writes it."""
    model.metadata_props.add(key=DIGEST, value=BLANK.decode())
    data = bytes(model.SerializeToString())
    place = _place_of_digest(data)
    return data[:place] + digest.of_bytes(data).encode() + data[place + len(BLANK) :]


def is_exported(path: Path) -> bool:
    """Whether a file is an ONNX model that `spkd export` wrote. Raises SpkdError where it was changed since."""
    if path.suffix != ".onnx" or not path.is_file():
        return False
    data = read_bytes(path, MOST_OF_WEIGHTS)
    _check(data, path)
    return _place_of_digest(data) >= 0


def calibration_text(path: Path) -> str | None:
    """The calibration in the metadata of an exported model, as JSON; None where there is none."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return next((entry.value for entry in model.metadata_props if entry.key == CALIBRATION), None)


def with_calibration(path: Path, calibration: str) -> bytes:
    """Content of an exported model's file with another calibration in its metadata, as JSON."""
    import onnx

    model = _bare(onnx.load(str(path)))
    model.metadata_props.add(key=CALIBRATION, value=calibration)
    return sealed(model)


def _bare(model: Any) -> Any:
    """An exported model without its calibration, and without the digest over it."""
    kept = [entry for entry in model.metadata_props if entry.key not in (DIGEST, CALIBRATION)]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return model


def _check(data: bytes, where: Path) -> None:
    """Compare a file with the digest in its metadata, where it has one. Raises SpkdError where it differs."""
    if (place := _place_of_digest(data)) < 0:
        return
    end = place + len(BLANK)
    if digest.of_blocks((data[:place], BLANK, data[end:])).encode() != data[place:end]:
        raise SpkdError(
            f"{where}: damaged, or changed since `spkd export` wrote it (it does not match its metadata {DIGEST}); "
            "export it again, or remove that entry"
        )


def _place_of_digest(data: bytes) -> int:
    """First byte of the digest in a file; -1 where it has none. Behind the key stand two bytes, a tag and a length."""
    key = data.rfind(DIGEST.encode())
    return key if key < 0 else key + len(DIGEST) + 2


def digest_of(files: list[Path]) -> str:
    """Digest of all files of a model together; with a single file, the digest of that file.

    An exported file counts as it is without a calibration, which changes none of its outputs.
    """
    graph, *others = files
    digests = [_digest_without_calibration(graph), *(digest.of_file(file) for file in others)]
    return digests[0] if not others else digest.of_tree(digests)


def _digest_without_calibration(path: Path) -> str:
    data = read_bytes(path, MOST_OF_WEIGHTS)
    if _place_of_digest(data) < 0 or CALIBRATION.encode() not in data:
        return digest.of_bytes(data)
    import onnx

    return digest.of_bytes(sealed(_bare(onnx.load(str(path), load_external_data=False))))


def _inside(path: Path, name: str) -> Path:
    """Path of a file that the graph names. Raises UsageError unless it is a regular file inside the graph's folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or ":" in parts[0] or "\\" in name:
        raise UsageError(f"{path}: names {name[:100]!r} for its weights, which is outside its own folder")
    file = path.parent.joinpath(*parts)
    linked = [p for p in (file, *file.parents) if len(p.parts) > len(path.parent.parts) and p.is_symlink()]
    if linked:
        raise UsageError(
            f"{path}: its weights {name[:100]!r} are a link, which may lead out of its folder; copy the file there"
        )
    if not file.is_file():
        raise UsageError(f"{path}: its weights {name[:100]!r} are not there; copy that file next to it")
    return file


def _location(tensor: Any) -> str | None:
    """Name of the file with a tensor's values; None where they are in the graph."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
    if tensor.data_location == tensor.EXTERNAL or tensor.external_data:
        return location or ""
    return None


def _tensors(model: Any) -> Iterator[Any]:
    """All tensors of a model, including those in nested graphs and attributes."""
    for info in model.training_info:
        yield from _of_graph(info.initialization)
        yield from _of_graph(info.algorithm)
    for function in model.functions:
        yield from _of_attributes(function.attribute_proto)
        yield from _of_nodes(function.node)
    yield from _of_graph(model.graph)


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Iterable[Any]) -> Iterator[Any]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _of_graph(graph)
