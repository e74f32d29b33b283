"""PyTorch's exported programs (.pt2), for libtorch, AOTInductor and ExecuTorch."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from spkd.errors import SpkdError, first_line
from spkd.export.base import COMMENT, Export, Exported, checked, in_torch
from spkd.export.graph import Embedder, traced
from spkd.files.atomic import write_bytes

METADATA = "metadata.json"


class PT2(Export):
    """Exported program, for any batch size and length; `metadata.json` in the file describes it."""

    file = "model.pt2"
    mark = COMMENT.encode()

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        data = io.BytesIO()
        try:
            torch.export.save(traced(embedder), data, extra_files={METADATA: json.dumps(metadata)})
        except Exception as error:  # the exporter raises many kinds
            raise SpkdError(f"{out}: the network cannot be exported ({first_line(error)})") from error
        write_bytes(out, data.getvalue())
        return [checked("pt2", out, embedder, in_torch(torch.export.load(out).module()))]
