"""What SpeechBrain itself gives, written to a folder: `python -m tests.teachers.speechbrain_oracle FOLDER`.

It runs in a process of its own: once imported, its lazy modules fail under everything that looks through the modules.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.ResNet import ResNet
from speechbrain.lobes.models.Xvector import Xvector

from .fixed import fixed_wave, fixed_weights


def main(folder: Path) -> None:
    wave = torch.from_numpy(fixed_wave())[None]
    models = {
        "ecapa": (80, ECAPA_TDNN(80, channels=[64, 64, 64, 64, 192], lin_neurons=24)),
        "resnet": (80, ResNet(80, channels=[8, 8, 16, 16], block_sizes=[2, 1, 1, 2], lin_neurons=24)),
        "xvector": (24, Xvector(in_channels=24, tdnn_channels=[32, 32, 32, 32, 50], lin_neurons=24)),
    }
    for name, (mels, model) in models.items():
        shapes = ((n, tuple(v.shape)) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked"))
        model.load_state_dict(fixed_weights(shapes), strict=False)
        features = Fbank(n_mels=mels)(wave)
        with torch.no_grad():
            embedding = model.eval()(features - features.mean(1, keepdim=True)).flatten()
        found = {"weights": model.state_dict(), "features": features, "embedding": embedding}
        torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
