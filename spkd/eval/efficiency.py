"""Size and speed of a model."""

from __future__ import annotations

from spkd.eval.embed import real_time_factor
from spkd.eval.report import Efficiency
from spkd.networks.network import count_macs
from spkd.outputs.target import EMBEDDING
from spkd.teachers.base import EmbeddingModel
from spkd.teachers.toolkit import NetworkModel


def efficiency(model: EmbeddingModel) -> Efficiency:
    """Size and speed of a model; the time is measured on a CPU alone."""
    size, macs, factor = None, None, None
    if isinstance(model, NetworkModel):
        size = sum(w.numel() * w.element_size() for w in model.network.state_dict().values())
        macs = count_macs(model.network, features=model.front_end.compute)
    if model.device.type == "cpu":
        factor = float(f"{real_time_factor(model):.3g}")
    return Efficiency(model.num_parameters, model.targets[EMBEDDING].dim, size, macs, factor)
