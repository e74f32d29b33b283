"""Core ML (.mlpackage), for iPhones and Macs."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkd.errors import SpkdError, UsageError, first_line
from spkd.export.base import COMMENT, Export, Exported, Run, checked, lengths_within
from spkd.export.beside import Runtime
from spkd.export.graph import Embedder, lengths_of, quiet, samples_of, simplified, traced_alone, unchecked
from spkd.export.onnx import NAMES, OUTPUT
from spkd.export.settings import LongestSettings
from spkd.files.atomic import check_is_own, check_writable, set_aside, write_bytes, writing_folder
from spkd.outputs.target import EMBEDDING
from spkd.progress import log

SPEC = Path("Data", "com.apple.CoreML", "model.mlmodel")  # of a package, the file that describes it
IMPORTS = "import coremltools"
CODE = """
if sys.platform != "darwin":
    sys.exit("Core ML runs on macOS and iOS alone")
GRAPH = coremltools.models.MLModel(str(MODEL))


def run(x):
    return GRAPH.predict({ABOUT["input"]["name"]: x})[ABOUT["output"]["name"]][0]
"""


class CoreML(Export):
    """Core ML's package, for a single view, in float32. Core ML runs on macOS and iOS alone."""

    Settings = LongestSettings
    file = "model.mlpackage"
    mark = COMMENT.encode()

    def one_length(self, waveform: bool) -> float | None:
        return float(self.settings.seconds) if waveform else None

    def check_out(self, out: Path, is_named: bool) -> None:
        if not out.is_dir() or out.is_symlink():
            check_writable(out)
        elif (out / SPEC).is_file():
            check_is_own(out / SPEC, self.mark, "out=FILE")
        elif any(out.iterdir()):
            raise UsageError(f"{out}: would be replaced (spkd did not write it); choose out=FILE, or remove it")

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        samples = write_coreml(embedder, out, self.settings.seconds)
        names = NAMES[embedder.front_end is not None], OUTPUT
        note = "Core ML runs on macOS and iOS alone, and so does the example."
        self.runtime = Runtime("Core ML", "numpy coremltools", IMPORTS, CODE, *names, samples, note=note)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        if sys.platform != "darwin":
            log(
                f"note: {out} is not run here, as Core ML runs on macOS and iOS alone: inputs, outputs and number of "
                "weights are the student's; compare its embeddings on a Mac"
            )
            return [Exported("coreml", size, None, None)]
        return [checked("coreml", out, embedder, load_coreml(out), lengths_within(samples))]


def write_coreml(embedder: Embedder, out: Path, seconds: float) -> tuple[int, int]:
    """Write the package for a single view, and read its description back.

    Args:
        seconds: as of `traced_alone`.
    Returns:
        Least and greatest number of samples of a recording.
    Raises:
        UsageError: coremltools is missing.
        SpkdError: the network cannot be converted, or the package does not describe what was converted.
    """
    try:
        with quiet():
            import coremltools
    except ImportError as error:
        raise UsageError("to=coreml needs coremltools: pip install 'spkd[coreml]'") from error
    name = NAMES[embedder.front_end is not None]
    try:
        program = traced_alone(embedder, seconds)
        samples = samples_of(program, embedder)
        example = embedder.example(seconds)
        length: Any = example.shape[1]
        if samples[0] < samples[1]:
            length = coremltools.RangeDim(*lengths_of(program), default=length)
        shape = (1, length, *example.shape[2:])
        with unchecked(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():  # it draws bars there
            model = coremltools.convert(
                simplified(program.run_decompositions({})),
                inputs=[coremltools.TensorType(name, coremltools.Shape(shape), dtype=np.float32)],
                outputs=[coremltools.TensorType(OUTPUT, dtype=np.float32)],
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
            )
        model.short_description = COMMENT
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "model.mlpackage"
            model.save(str(package))
            _check(coremltools.models.MLModel(str(package), skip_model_load=True), package, embedder, name)
            _replace(out, package)
    except SpkdError as error:
        raise SpkdError(f"{out}: the network cannot be converted ({error})") from error
    except OSError:
        raise
    except Exception as error:  # the converter raises many kinds
        raise SpkdError(f"{out}: the network cannot be converted ({first_line(error)})") from error
    return samples


def _check(model: Any, package: Path, embedder: Embedder, name: str) -> None:
    """Compare a package that was read back with the student. Raises SpkdError where they differ."""
    described = model.get_spec().description
    found = [(value.name, tuple(value.type.multiArrayType.shape)) for value in (*described.input, *described.output)]
    example, dim = embedder.example(1.0), embedder.network.levels[EMBEDDING].dim
    if [name for name, _ in found] != [name, OUTPUT] or found[1][1] != (1, dim) or len(found[0][1]) != example.ndim:
        raise SpkdError(f"the package has the inputs and outputs {found}")
    stored = sum(path.stat().st_size for path in package.rglob("weight.bin"))
    if stored < sum(4 * values.numel() for values in embedder.network.parameters() if values.ndim > 1):
        raise SpkdError(f"the package has {stored} bytes of weights, fewer than the student")


def _replace(out: Path, package: Path) -> None:
    """Put a package in the place of an earlier one, which is removed."""
    earlier = set_aside(out, out.name) if out.is_dir() else None
    with writing_folder(out) as folder:
        for path in package.rglob("*"):
            if path.is_file():
                write_bytes(folder / path.relative_to(package), path.read_bytes())
    if earlier is not None:
        shutil.rmtree(earlier, ignore_errors=True)


def load_coreml(path: Path) -> Run:
    """Function that runs a package on macOS: a single view -> embedding (1, D)."""
    import coremltools

    model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    name = model.get_spec().description.input[0].name

    def run(x: Tensor) -> np.ndarray:
        return model.predict({name: x.numpy()})[OUTPUT]

    return run
