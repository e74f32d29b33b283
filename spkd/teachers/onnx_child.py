"""Process that loads an ONNX model and runs it on noise, under limits of time and memory (see onnx_probe.py).

It is run as a file and imports nothing of spkd, so that it starts quickly. Every answer is one line of JSON.

    python -P onnx_child.py MODEL SECONDS BYTES
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def main(path: str, seconds: int, memory: int) -> None:
    """Load a model, describe it, and answer requests to run it until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    say(
        {
            "inputs": [[node.name, node.type, node.shape] for node in session.get_inputs()],
            "outputs": [node.name for node in session.get_outputs()],
            "metadata": session.get_modelmeta().custom_metadata_map,
        }
    )

    def filled(
        shape: list[int], value: int | None, axis: int, halves: list[int] | None, levels: list[float] | None
    ) -> Any:
        """Noise (from the seeds `halves`) or values, with another half after the middle of an axis, each row at its
        level."""

        def whole(item: int) -> Any:
            return 0.1 * np.random.RandomState(item).standard_normal(shape) if value is None else np.full(shape, item)

        first, second = halves or [value or 0] * 2
        values = whole(first)
        if second != first:
            later = tuple(slice(size // 2 if i == axis % len(shape) else 0, None) for i, size in enumerate(shape))
            values[later] = whole(second)[later]
        if levels is not None:
            values *= np.reshape(levels, (-1, *[1] * (len(shape) - 1)))
        return values

    def difference(outputs: list[str], feeds: dict[str, Any]) -> float:
        """Largest difference between the rows of a batch and the same rows each in a run of its own, as a share of the
        largest number of the row."""
        shares = [0.0]
        for row, together in enumerate(zip(*session.run(outputs, feeds), strict=True)):
            alone = session.run(outputs, {name: feed[row : row + 1] for name, feed in feeds.items()})
            for one, (other, *_) in zip(together, alone, strict=True):
                if not np.array_equal(one, other, equal_nan=True):
                    one, other = one.astype("float64"), other.astype("float64")
                    shares.append(float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-30)))
        return float(np.max(shares))

    for line in sys.stdin:
        asked = json.loads(line)
        feeds = {}
        for name, (kind, *described) in asked["feeds"].items():
            feeds[name] = filled(*described).astype(TYPES[kind])
        try:
            if asked["answer"] == "difference":
                say({"difference": difference(asked["outputs"], feeds)})
                continue
            results = session.run(asked["outputs"], feeds)
            if asked["answer"] == "values":
                say({"values": results[0].ravel().astype("float64").tolist()})
            else:
                say({"shapes": [list(result.shape) for result in results], "types": [str(r.dtype) for r in results]})
        except Exception as error:  # onnxruntime's own kinds
            say({"error": str(error)})


def say(tree: dict[str, Any]) -> None:
    """Write an answer to standard output."""
    print(json.dumps(tree), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    except Exception as error:
        say({"error": str(error) or type(error).__name__})
