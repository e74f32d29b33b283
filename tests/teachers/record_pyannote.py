"""Writes pyannote.json: what pyannote.audio's wrapper of WeSpeaker's ResNet34 gives, for tests on machines without it.

python -m tests.teachers.record_pyannote
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import torch

from .fixed import fixed_wave
from .record import NUMBERS, fixed


def main() -> None:
    # Without the part that reports the use of models to a server.
    sys.modules["pyannote.audio.telemetry"] = types.SimpleNamespace(  # type: ignore[assignment]
        **dict.fromkeys(("set_opentelemetry_log_level", "set_telemetry_metrics", "track_model_init",
                         "track_pipeline_init", "track_pipeline_apply"), lambda *_, **__: None)
    )  # fmt: skip
    model = fixed(importlib.import_module("pyannote.audio.models.embedding.wespeaker").WeSpeakerResNet34())
    with torch.no_grad():
        embedding = model(torch.from_numpy(fixed_wave())[None, None])[0]
    weights = {n: list(v.shape) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    found = {
        "embedding": [float(f"{x:.8g}") for x in embedding[:NUMBERS]],
        "norm": float(embedding.double().norm()),
        "weights": weights,
    }
    Path(__file__).with_name("pyannote.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
