"""Size and speed of a model."""

from __future__ import annotations

from typing import Any

from spkd.eval.embed import real_time_factor
from spkd.networks.network import count_macs
from spkd.teachers.base import Teacher
from spkd.teachers.toolkit import NetworkTeacher


def efficiency(model: Teacher) -> dict[str, Any]:
    """Parameters, bytes of the weights as they are in memory, multiply-accumulates per second of speech (features not
    counted), and processing time over audio time on one CPU thread; what is not known is left out."""
    found: dict[str, Any] = {"parameters": model.num_parameters}
    if isinstance(model, NetworkTeacher):
        found["bytes"] = sum(w.numel() * w.element_size() for w in model.network.state_dict().values())
        found["macs_per_second"] = count_macs(model.network, features=model.front_end.compute)
    if model.device.type == "cpu":
        found["real_time_factor"] = float(f"{real_time_factor(model):.3g}")
    return {name: value for name, value in found.items() if value is not None}
