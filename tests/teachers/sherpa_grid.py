"""Metadata that sherpa-onnx reads of a speaker model, one value after the other."""

from __future__ import annotations

import itertools

COMMON = {"language": "English", "output_dim": "1", "sample_rate": "16000"}
KALDI = [
    {"framework": framework, "normalize_samples": small} | normal
    for framework, small, normal in itertools.product(
        ["wespeaker", "3d-speaker"],
        ["0", "1"],
        [{}, {"feature_normalize_type": ""}, {"feature_normalize_type": "global-mean"}],
    )
]
NEMO = [
    {"framework": "nemo", "feat_dim": "80", "window_size_ms": "25", "window_stride_ms": "10"} | changed
    for changed in [
        *({"window_type": name} for name in ("povey", "hann", "hanning", "hamming", "sine", "rectangular", "blackman")),
        {},
        {"feature_normalize_type": "per_feature", "window_type": "hann"},
        {"feature_normalize_type": ""},
        {"window_size_ms": "20", "feat_dim": "64"},
        {"window_size_ms": "32", "window_stride_ms": "16"},
        {"window_size_ms": "40", "window_stride_ms": "20", "feature_normalize_type": "per_feature"},
        {"feat_dim": "23"},
    ]
]
