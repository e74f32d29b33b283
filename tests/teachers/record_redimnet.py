"""Writes redimnet.json: what the code of the authors of ReDimNet gives, for tests on machines without it.

python -m tests.teachers.record_redimnet --first CLONE --second CLONE     (IDRnD/ReDimNet, PalabraAI/redimnet2)
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .fixed import fixed_wave
from .record import NUMBERS, fixed

STAGES: list[Any] = [[[1, 1], 1, 2, [[3, 3]], 36], [[2, 1], 1, 1, [[3, 3]], None], [[1, 2], 1, 0.5, [[3, 3]], 18]]
SECOND: dict[str, Any] = {"F": 24, "C": 12, "causal": "none", "stages_setup": STAGES}
FEATURES = {"spec_norm": "mvn", "norm_signal": True, "do_preemph": False, "n_fft": 1024, "win_length": 640}
CONFIGS: dict[str, dict[str, Any]] = {
    "ReDimNet2 with two outputs a stage": SECOND | {"dual_agg": True, "agg_gnorm": True, "out_channels": 16},
    "ReDimNet2 with a layer for each band": SECOND | {"out_channels": 10, "return_2d_output": True, "emb_bn": True},
    "ReDimNet2 of ConvNeXt": SECOND
    | {"block_2d_type": "convnext_like", "group_divisor": 4, "compress_tconvs": False}
    | {"stages_setup": [[[1, 1], 1, 2, [[3, 3], [3, 5]], 36], [[2, 4], 1, 1, [[5, 3]], 18]]},
    "ReDimNet2 of ReLU, attention": SECOND
    | {"block_2d_type": "convnext_like_relu", "block_1d_type": "att", "pooling_func": "TSTP", "agg_gnorm": True},
    "ReDimNet2 with gates, convolutions": SECOND
    | {"block_2d_type": "basic_resnet_fwse", "block_1d_type": "conv", "group_divisor": None},
    "ReDimNet2 of dense layers, other features": SECOND
    | {"block_1d_type": "fc", "global_context_att": False, "spec_params": FEATURES | {"f_min": 50, "f_max": 7000}},
    "ReDimNet2 of other mel bands": SECOND | {"feat_type": "tf", "spec_params": {"norm_signal": True}},
    "ReDimNet": {"F": 24, "C": 8, "block_1d_type": "conv+att", "block_2d_type": "basic_resnet", "group_divisor": 2}
    | {"stages_setup": [[1, 1, 2, [[3, 3]], 12], [2, 1, 1, [[3, 3]], None], [3, 1, 1, [[3, 3]], 6]]}
    | {"out_channels": 20},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--first", type=Path, required=True)
    options.add_argument("--second", type=Path, required=True)
    given = options.parse_args()
    sys.path[:0] = [str(given.first), str(given.second)]
    wave = torch.from_numpy(fixed_wave())[None]
    found = {}
    for name, config in CONFIGS.items():
        home, kind = ("redimnet2.redimnet2", "ReDimNet2Wrap") if "2" in name else ("redimnet.model", "ReDimNetWrap")
        model = getattr(importlib.import_module(home), kind)(**config)
        own = {n: list(v.shape) for n, v in model.state_dict().items() if not n.startswith("spec.")}
        spec = model.spec
        fixed(model)
        model.spec = spec.__class__(n_mels=config["F"], **config.get("spec_params", {})).eval()  # with its own filters
        with torch.no_grad():
            embedding = model(wave)[0]
        found[name] = {
            "config": config,
            "embedding": [float(f"{x:.8g}") for x in embedding[:NUMBERS]],
            "norm": float(embedding.double().norm()),
            "weights": {n: shape for n, shape in own.items() if not n.endswith("num_batches_tracked")},
        }
    lines = [f"{json.dumps(name)}: {json.dumps(content)}" for name, content in found.items()]
    Path(__file__).with_name("redimnet.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
