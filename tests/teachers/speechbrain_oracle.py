"""What SpeechBrain itself gives for every case of speechbrain_grid.py, each in a folder as its users find it.

    python -m tests.teachers.speechbrain_oracle FOLDER CASE ..

It runs in a process of its own: once imported, its lazy modules fail under everything that looks through the modules.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml

from .fixed import fixed_wave, fixed_weights
from .speechbrain_grid import CASES


def main(folder: Path, names: list[str]) -> None:
    wave = torch.from_numpy(fixed_wave())[None]
    for name in names:
        text = CASES[name]
        modules = load_hyperpyyaml(text)["modules"]
        model = modules["embedding_model"].eval()
        shapes = ((n, tuple(v.shape)) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked"))
        model.load_state_dict(fixed_weights(shapes), strict=False)
        with torch.no_grad():
            features = modules["mean_var_norm"].eval()(modules["compute_features"](wave), torch.ones(1))
            embedding = model(features, torch.ones(1)).flatten()
        (folder / name).mkdir(parents=True)
        (folder / name / "hyperparams.yaml").write_text(text)
        torch.save(model.state_dict(), folder / name / "embedding_model.ckpt")
        torch.save(embedding, folder / name / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
