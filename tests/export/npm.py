"""A folder like the npm package onnxruntime-web, without the runtime itself."""

from __future__ import annotations

import json
from pathlib import Path


def write_package(folder: Path, version: str = "1.30.0", name: str = "onnxruntime-web") -> Path:
    """Write the files of the package that an export takes."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name, "version": version}))
    (folder / "dist" / "ort.wasm.bundle.min.mjs").write_text("export const env = {};\n")
    (folder / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"\0asm" * 1000)
    return folder
