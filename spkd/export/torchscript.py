"""TorchScript, for libtorch and PyTorch Mobile."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from spkd.errors import SpkdError, first_line
from spkd.export.graph import Embedder
from spkd.files.atomic import write_bytes

METADATA = "metadata.json"


def write_torchscript(embedder: Embedder, out: Path, metadata: dict[str, str]) -> None:
    """Write the graph, of any batch and length; `metadata.json` within the file describes it.

    Raises:
        SpkdError: the network cannot be traced.
    """
    data = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(embedder, embedder.example(4.0, batch=2), check_trace=False)
            torch.jit.save(torch.jit.freeze(traced.eval()), data, _extra_files={METADATA: json.dumps(metadata)})
    except Exception as error:  # tracing raises many kinds
        raise SpkdError(f"{out}: the network cannot be traced ({first_line(error)})") from error
    write_bytes(out, data.getvalue())


def load_torchscript(path: Path) -> Any:
    """The graph of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path))
