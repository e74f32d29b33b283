"""Runs of an ONNX model that end: by themselves, by a limit of processor time, or by a signal.

How long a graph runs may depend on what it is given, so that its probe on noise does not show it. While onnxruntime
computes, Python handles no signals in the thread that called it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spkd.errors import SpkdError, first_line

LOOK = 0.5  # time between two looks at the processor time (s)
GRACE = 10.0  # longest wait for the end of a run that is terminated (s): it ends between two nodes of the graph


class Session:
    """Graph in onnxruntime.

    Args:
        device: where it runs, if this onnxruntime supports it; else the processor.
    Raises:
        SpkdError: onnxruntime does not load the graph.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        self._threads = options.intra_op_num_threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own kinds
            raise SpkdError(f"{path}: cannot be loaded as an ONNX model ({first_line(error)})") from error

    def run(self, outputs: list[str], feed: dict[str, np.ndarray], seconds: float) -> list[np.ndarray]:
        """Values of outputs.

        Args:
            seconds: most processor time on one thread (s). It does not grow while the machine is busy or suspended.
        Raises:
            TimeoutError: the run takes longer.
            Exception: it fails; onnxruntime's own kinds.
        """
        import onnxruntime

        options, done = onnxruntime.RunOptions(), list[list[np.ndarray] | Exception]()
        options.log_severity_level = 4  # its errors are raised
        has_ended = threading.Event()  # Thread.join cannot be asked again after a signal has ended it

        def compute() -> None:
            try:
                done.append(self._session.run(outputs, feed, options))
            except Exception as error:  # onnxruntime's own kinds
                done.append(error)
            finally:
                has_ended.set()

        end = time.process_time() + seconds * self._threads
        threading.Thread(target=compute, daemon=True).start()
        try:
            while not has_ended.wait(LOOK) and time.process_time() < end:
                pass
        finally:
            is_late = not has_ended.is_set()
            options.terminate = True
            has_ended.wait(GRACE)
        if is_late:
            raise TimeoutError(f"it runs for more than {seconds:.0f} s of processor time")
        if isinstance(done[0], Exception):
            raise done[0]
        return done[0]
