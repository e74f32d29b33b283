"""Files of an ONNX model: the graph, and the files of weights that it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest


def files_of(path: Path) -> list[Path]:
    """Paths of the graph and of every file of external data that it names, in the order of their names.

    Raises:
        UsageError: no such file, no package onnx, or a named file that is missing or outside the graph's folder.
        SpkdError: the file is not an ONNX model.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageError("teacher=onnx needs onnx and onnxruntime: pip install 'spkd[onnx]'") from error
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
        names = sorted({name for tensor in _tensors(model) if (name := _location(tensor)) is not None})
    except Exception as error:  # protobuf's own kinds
        raise SpkdError(f"{path}: cannot be loaded as an ONNX model ({first_line(error)})") from error
    if not model.HasField("graph"):
        raise SpkdError(f"{path}: cannot be loaded as an ONNX model (no graph in it)")
    return [path, *(_inside(path, name) for name in names)]


def digest_of(files: list[Path]) -> str:
    """Digest of all files together; with a single file, the digest of that file."""
    digests = [digest.of_file(file) for file in files]
    return digests[0] if len(digests) == 1 else digest.of_tree(digests)


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
