"""PyTorch's exported programs (.pt2), for libtorch, AOTInductor and ExecuTorch."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from spkd.errors import SpkdError, first_line
from spkd.export.base import COMMENT, Export, Exported, checked, in_torch, lengths_within
from spkd.export.beside import Runtime
from spkd.export.graph import Embedder, samples_of, traced
from spkd.files.atomic import write_bytes

METADATA = "metadata.json"
IMPORTS = "import torch"
CODE = """
GRAPH = torch.export.load(str(MODEL)).module()


def run(x):
    with torch.no_grad():
        return GRAPH(torch.from_numpy(x))[0].numpy()
"""


class PT2(Export):
    """Exported program, for any batch size and length; `metadata.json` in the file describes it."""

    file = "model.pt2"
    mark = COMMENT.encode()

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        data = io.BytesIO()
        try:
            program = traced(embedder)
            torch.export.save(program, data, extra_files={METADATA: json.dumps(metadata)})
        except Exception as error:  # the exporter raises many kinds
            raise SpkdError(f"{out}: the network cannot be exported ({first_line(error)})") from error
        write_bytes(out, data.getvalue())
        samples = samples_of(program, embedder)
        self.runtime = Runtime(
            "PyTorch exported program", "numpy torch", IMPORTS, CODE, "x", "embedding", samples, batch=True
        )
        run = in_torch(torch.export.load(out).module())
        return [checked("pt2", out, embedder, run, lengths_within(samples))]
