"""Features against sherpa-onnx itself: a graph that hands its input out as the embedding shows what it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spkd.errors import UsageError
from spkd.teachers.sherpa import sherpa_front_end

from .fixed import fixed_wave
from .sherpa_grid import COMMON, KALDI, NEMO

onnx = pytest.importorskip("onnx")
sherpa_onnx = pytest.importorskip("sherpa_onnx")
WAVE = fixed_wave(0.7)


def handed_out(path: Path, described: dict[str, str]) -> np.ndarray:
    """The features (T, F) that sherpa-onnx gives a model of these metadata."""
    helper, kind = onnx.helper, onnx.TensorProto
    nemo = described["framework"] == "nemo"
    shape = helper.make_tensor("shape", kind.INT64, [2], [1, -1])
    given = [helper.make_tensor_value_info("x", kind.FLOAT, ["B", "T", "F"])]
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["emb"])]
    outputs = [helper.make_tensor_value_info("emb", kind.FLOAT, ["B", "N"])]
    if nemo:  # the second output is its embedding
        given.append(helper.make_tensor_value_info("length", kind.INT64, ["B"]))
        nodes.append(helper.make_node("Cast", ["length"], ["logits"], to=kind.FLOAT))
        outputs.insert(0, helper.make_tensor_value_info("logits", kind.FLOAT, ["B"]))
    graph = helper.make_graph(nodes, "g", given, outputs, [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    for key, value in (COMMON | described).items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(
        sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(path), num_threads=1)
    )
    stream = extractor.create_stream()
    stream.accept_waveform(16_000, WAVE)
    stream.input_finished()
    bands = int(described.get("feat_dim", 80))
    values = np.array(extractor.compute(stream))
    return values.reshape(bands, -1).T if nemo else values.reshape(-1, bands)


@pytest.mark.parametrize("described", [*KALDI, *NEMO], ids=lambda d: ",".join(d.values()))
def test_features_are_those_of_sherpa(tmp_path: Path, described: dict[str, str]) -> None:
    expected = handed_out(tmp_path / "m.onnx", described)
    front_end = sherpa_front_end("m.onnx", COMMON | described)
    assert front_end is not None
    features = front_end.compute(torch.from_numpy(WAVE)[None], None)[0].numpy()
    assert len(features) == front_end.frames.num_frames(len(WAVE))
    assert features.shape == expected.shape
    assert np.abs(features - expected).max() < 5e-3
    a, b = features.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 1 - 1e-8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"framework": "wespeaker", "normalize_samples": "yes"}, "normalize_samples='yes'"),
        ({"framework": "wespeaker", "normalize_samples": "2"}, "normalize_samples='2'"),
        ({"framework": "wespeaker", "feature_normalize_type": ""}, "no normalize_samples"),
        (
            {"framework": "3d-speaker", "normalize_samples": "1", "feature_normalize_type": "per_feature"},
            "feature_normalize_type='per_feature'",
        ),
        (NEMO[0] | {"window_type": "kaiser"}, "window_type='kaiser'"),
        (NEMO[0] | {"feature_normalize_type": "all_features"}, "feature_normalize_type='all_features'"),
        (NEMO[0] | {"window_size_ms": "0"}, "window_size_ms='0'"),
        (NEMO[0] | {"feat_dim": "x"}, "feat_dim='x'"),
        (NEMO[0] | {"feat_dim": "200"}, "some filters are empty"),
        ({"framework": "nemo", "window_type": "hann", "feat_dim": "80"}, "no window_size_ms"),
    ],
)
def test_what_sherpa_does_not_take_is_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sherpa_front_end("m.onnx", COMMON | changed)


def test_a_framework_alone_says_nothing_of_the_features() -> None:
    assert sherpa_front_end("m.onnx", {"framework": "wespeaker", "output_dim": "7"}) is None
    assert sherpa_front_end("m.onnx", {"framework": "other", "normalize_samples": "1"}) is None
