from __future__ import annotations

import math
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spkd.errors import Interrupted, SpkdError, UsageError
from spkd.outputs.features import FBANK, fbank_of
from spkd.teachers import load_model, load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.onnx import nemo_fbank
from spkd.teachers.settings import EnrolModelConfig, ModelConfig, ONNXSettings, ScoredModelConfig

from .fixed import fixed_wave

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
WAVE = torch.from_numpy(fixed_wave())[None]


class OfBands(nn.Module):
    """Strided convolution over fbank, mean over time, linear: embedding and frames."""

    def __init__(self, bands_first: bool = False, lengths: bool = False) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(80, 12, 5, 2), nn.Linear(12, 7)
        self._first, self._lengths = bands_first, lengths

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frames = self.conv(x if self._first else x.transpose(1, 2)).relu()
        mean = frames.mean(2)
        if lengths is not None:
            mean = frames.sum(2) / lengths[:, None]
        return self.out(mean), frames.transpose(1, 2)


class OfWaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 400, 320)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).abs().mean(2)


def save(
    path: Path, model: nn.Module, inputs: tuple[Tensor, ...], dynamic: dict[str, dict[int, str]], **described: str
) -> Path:
    names = ["x", "x_lens"][: len(inputs)]
    outputs = ["embs", "frames"] if isinstance(model, OfBands) else ["out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), inputs, str(path), input_names=names, output_names=outputs, dynamic_axes=dynamic, dynamo=False
        )
    graph = onnx.load(str(path))
    for key, value in described.items():
        graph.metadata_props.add(key=key, value=value)
    onnx.save(graph, str(path))
    return path


FREE = {"x": {0: "B", 1: "T"}, "embs": {0: "B"}, "frames": {0: "B", 1: "U"}}


def load(path: Path, **settings: Any) -> Teacher:
    return load_teacher(ModelConfig("onnx", str(path), settings=ONNXSettings(**settings)), torch.device("cpu"))


def centred(bank: Tensor) -> Tensor:
    return bank - bank.mean(1, keepdim=True)


@pytest.mark.parametrize("toolkit", ["wespeaker", "3d-speaker"])
def test_a_model_with_the_metadata_of_sherpa(tmp_path: Path, toolkit: str) -> None:
    model = OfBands()
    file = save(tmp_path / "m.onnx", model, (torch.randn(2, 60, 80),), FREE, framework=toolkit, output_dim="7")
    teacher = load(file)
    assert {n: (t.dim, t.hop, t.window) for n, t in teacher.targets.items()} == {
        "embedding": (7, None, 0),
        "frames": (12, 320, 400 + 4 * 160),
    }
    waves = torch.cat([WAVE, 0.5 * WAVE.flip(1)])
    outputs = teacher.extract(waves, ["embedding", "frames"])
    with torch.no_grad():
        embedding, frames = model(centred(fbank_of(toolkit, waves)))
    assert np.allclose(outputs["embedding"], embedding, atol=1e-4)
    assert np.allclose(outputs["frames"], frames, atol=1e-4)


def test_whose_fbank_it_is_can_be_named_and_is_not_guessed(tmp_path: Path) -> None:
    model = OfBands()
    file = save(tmp_path / "m.onnx", model, (torch.randn(1, 60, 80),), {"x": {1: "T"}, "frames": {1: "U"}})
    with pytest.raises(UsageError, match=r"takes fbank .* not whose: set teacher.onnx.input \(in"):
        load(file)
    for settings in (ScoredModelConfig("onnx", str(file)), EnrolModelConfig("onnx", str(file))):
        with pytest.raises(UsageError, match=f"not whose: set {settings.SECTION}.onnx.input"):
            load_model(settings, torch.device("cpu"))
    waves = torch.cat([WAVE, 0.5 * WAVE.flip(1)])  # the graph takes one view at a time
    outputs = load(file, input="kaldi").extract(waves, ["embedding"])
    with torch.no_grad():
        expected = torch.cat([model(centred(fbank_of("kaldi", w[None])))[0] for w in waves])
    assert np.allclose(outputs["embedding"], expected, atol=1e-4)


def test_a_model_of_the_waveform(tmp_path: Path, spkd: Callable, corpus: Path) -> None:
    model = OfWaves()
    file = save(tmp_path / "m.onnx", model, (torch.randn(2, 8000),), {"x": {0: "B", 1: "N"}, "out": {0: "B"}})
    with torch.no_grad():
        expected = model(WAVE)
    teacher = load(file)
    for again in (teacher, pickle.loads(pickle.dumps(teacher))):
        assert np.allclose(again.extract(WAVE, ["embedding"])["embedding"], expected, atol=1e-5)
    with pytest.raises(UsageError, match="takes a waveform"):
        load(file, input="kaldi")
    given = ["teacher=onnx", f"teacher.weights={file}", f"manifest={corpus / 'manifest.csv'}"]
    done = spkd("extract", *given).ok()
    assert "18 views extracted, 0 rejected; complete" in done.out
    done = spkd("eval", corpus / "trials.txt", "model=onnx", f"model.weights={file}", given[2])
    assert (done.code, "EER" in done.out) == (0, True), done.err


def test_a_model_of_nemo_with_lengths(tmp_path: Path) -> None:
    model = OfBands(bands_first=True, lengths=True)
    free = {"x": {0: "B", 2: "T"}, "x_lens": {0: "B"}, "embs": {0: "B"}, "frames": {0: "B", 1: "U"}}
    inputs = (torch.randn(2, 80, 60), torch.tensor([60, 60]))
    outputs = load(
        save(tmp_path / "m.onnx", model, inputs, free, framework="nemo", feat_dim="80", output_dim="7")
    ).extract(WAVE, ["embedding"])
    bank = nemo_fbank(WAVE, 80)
    padded = nn.functional.pad(bank.transpose(1, 2), (0, -bank.shape[1] % 16))
    with torch.no_grad():
        expected = model(padded, torch.tensor([bank.shape[1]]))[0]
    assert np.allclose(outputs["embedding"], expected, atol=1e-4)


def test_nemos_fbank_is_its_formula() -> None:
    """Written out in float64: pre-emphasis, centred Hann windows, power, Slaney's triangles, log, normalisation."""
    wave = WAVE[0].double().numpy()
    emphasised = np.concatenate([wave[:1], wave[1:] - 0.97 * wave[:-1]])
    padded = np.pad(emphasised, 256)
    window = np.zeros(512)
    window[56:456] = np.hanning(400)
    count = 1 + len(wave) // 160
    power = np.abs(np.fft.rfft([padded[160 * i : 160 * i + 512] * window for i in range(count)])) ** 2

    def to_hz(mel: float) -> float:
        return 200 * mel / 3 if mel < 15 else 1000 * math.exp(math.log(6.4) / 27 * (mel - 15))

    top = 15 + math.log(8) / (math.log(6.4) / 27)
    hz = [to_hz(top * i / 81) for i in range(82)]
    bins = np.arange(257) * 16_000 / 512
    filters = [
        np.clip(np.minimum((bins - a) / (b - a), (c - bins) / (c - b)), 0, None) * 2 / (c - a)
        for a, b, c in zip(hz, hz[1:], hz[2:], strict=False)
    ]
    bank = np.log(power @ np.array(filters).T + 2.0**-24)
    expected = (bank - bank.mean(0)) / (bank.std(0, ddof=1) + 1e-5)
    assert np.allclose(nemo_fbank(WAVE, 80)[0], expected, atol=2e-3)


def test_which_output_is_the_embedding_can_be_named(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean(1)[:, :5], x.amax(1)[:, :9]

    path = tmp_path / "m.onnx"
    torch.onnx.export(
        Two(), (torch.randn(2, 60, 80),), str(path), input_names=["x"], output_names=["one", "other"], dynamo=False,
        dynamic_axes={"x": {0: "B", 1: "T"}, "one": {0: "B"}, "other": {0: "B"}},
    )  # fmt: skip
    with pytest.raises(UsageError, match="which of one, other is the embedding"):
        load(path, input="kaldi")
    assert load(path, input="kaldi", outputs={"embedding": "other"}).targets["embedding"].dim == 9
    with pytest.raises(UsageError, match="has one, other"):
        load(path, input="kaldi", outputs={"embedding": "third"})


def test_files_that_are_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(SpkdError, match="cannot be loaded as an ONNX model"):
        load(tmp_path / "bad.onnx")
    file = save(
        tmp_path / "n.onnx", OfBands(), (torch.randn(2, 60, 80),), FREE, framework="3d-speaker", sample_rate="8000"
    )
    with pytest.raises(UsageError, match="8000 Hz"):
        load(file)


class OfMaps(nn.Module):
    """Features with an axis of 1 before or after both others, or of one length."""

    def __init__(self, mels: int = 80, channel: int | None = None, bands_first: bool = False) -> None:
        super().__init__()
        self.out, self._channel, self._first = nn.Linear(mels, 7), channel, bands_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self._channel is None else x.squeeze(self._channel)
        x = x.transpose(1, 2) if self._first else x
        return self.out((x * torch.linspace(0, 1, x.shape[1])[:, None]).abs().mean(1))  # frames have a place


def given_to(bank: Tensor, channel: int | None, bands_first: bool) -> np.ndarray:
    bank = bank.transpose(1, 2) if bands_first else bank
    return (bank if channel is None else bank.unsqueeze(channel)).numpy()


@pytest.mark.parametrize("bands_first", [False, True])
@pytest.mark.parametrize(
    ("channel", "mels", "frames"), [(1, 80, None), (3, 80, None), (1, 32, 76), (3, 32, 76), (None, 80, 198)]
)
def test_maps_and_features_of_one_length(
    tmp_path: Path, channel: int | None, mels: int, frames: int | None, bands_first: bool
) -> None:
    """As with openWakeWord's embedding (76 frames of 32 bands, last axis 1): what onnxruntime itself gives."""
    model = OfMaps(mels, channel, bands_first)
    example = torch.from_numpy(given_to(torch.randn(2, frames or 60, mels), channel, bands_first))
    axis = [place for place, size in enumerate(example.shape) if size == (frames or 60)][-1]
    free = {"x": {0: "B"} | ({} if frames else {axis: "T"}), "out": {0: "B"}}
    if frames is None:  # its length would be fixed by the trace
        model.forward = lambda x: model.out(  # type: ignore[method-assign]
            (x.squeeze(channel).transpose(1, 2) if bands_first else x.squeeze(channel)).abs().mean(1)
        )
    file = save(tmp_path / "m.onnx", model, (example,), free, feat_dim=str(mels))
    teacher = load(file, input="3d-speaker")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    samples = WAVE.shape[1] if frames is None else 400 + (frames - 1) * 160
    for extra in (0, 159):
        waves = torch.randn(3, samples + extra, generator=torch.Generator().manual_seed(1)) * 0.1
        bank = centred(fbank_of("3d-speaker", waves, mels))
        expected = session.run(["out"], {"x": given_to(bank, channel, bands_first)})[0]
        assert np.allclose(teacher.extract(waves, ["embedding"])["embedding"], expected, atol=1e-5)
    if frames is not None:
        assert (teacher.min_samples, teacher.max_samples) == (samples, samples + 159)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 60, 80), "takes exactly 2 views at a time"),
        ((1, 3, 60, 80), "of which the second or the last has to be 1"),
        ((1, 60, 64), "takes exactly 60 x 64 numbers, of which 80 are not the bands of one axis"),
        ((1, 80, 80), "takes exactly 80 x 80 numbers"),
    ],
)
def test_shapes_that_do_not_tell_time_from_bands(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    file = save(tmp_path / "m.onnx", nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 7)), (
        torch.randn(shape),), {}, framework="wespeaker")  # fmt: skip
    with pytest.raises(UsageError, match=message):
        load(file)


def test_the_shortest_view_gives_what_is_declared(tmp_path: Path) -> None:
    teacher = load(save(tmp_path / "m.onnx", OfBands(), (torch.randn(2, 60, 80),), FREE, framework="wespeaker"))
    samples = max(teacher.min_samples, teacher.targets["frames"].window)
    assert FBANK.num_frames(samples) == 5
    assert teacher.extract(torch.randn(1, samples), ["frames"])["frames"].shape == (1, 1, 12)


def built(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[str, list[Any]]],
    outputs: list[str],
    constants: dict[str, np.ndarray] | None = None,
    **described: str,
) -> Path:
    """A graph written node by node. inputs: type and shape by name."""
    helper, kinds = onnx.helper, onnx.TensorProto
    given = [helper.make_tensor_value_info(n, getattr(kinds, kind), shape) for n, (kind, shape) in inputs.items()]
    made = [helper.make_tensor_value_info(name, kinds.FLOAT, None) for name in outputs]
    tensors = [onnx.numpy_helper.from_array(values, name) for name, values in (constants or {}).items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", given, made, tensors), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    for key, value in described.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


WEIGHT = np.random.RandomState(0).standard_normal((80, 7)).astype(np.float32)


def pooled(path: Path, time: int, shape: list[Any], **described: str) -> Path:
    """The mean of magnitudes over an axis, times WEIGHT."""
    node = onnx.helper.make_node
    nodes = [node("Abs", ["x"], ["a"]), node("ReduceMean", ["a"], ["m"], axes=[time], keepdims=0)]
    nodes.append(node("MatMul", ["m", "w"], ["emb"]))
    return built(
        path, nodes, {"x": ("FLOAT", shape)}, ["emb"], {"w": WEIGHT[: 40 if shape[-1] == 40 else 80]}, **described
    )


def with_external_data(folder: Path, seed: int) -> Path:
    """The file as torch.onnx.export writes it by default: the weights lie in a file beside the graph."""
    folder.mkdir()
    torch.manual_seed(seed)
    file = save(folder / "plain.onnx", OfBands(), (torch.randn(2, 60, 80),), FREE)
    onnx.save_model(
        onnx.load(str(file)), str(folder / "m.onnx"), save_as_external_data=True, location="m.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    file.unlink()
    return folder / "m.onnx"


def test_the_digest_is_over_every_file_of_the_model(tmp_path: Path, spkd: Callable, corpus: Path) -> None:
    one, two = (with_external_data(tmp_path / name, i) for i, name in enumerate(("one", "two")))
    assert one.read_bytes() == two.read_bytes()
    assert load(one, input="kaldi").card().weights_sha256 != load(two, input="kaldi").card().weights_sha256
    keys = ["teacher=onnx", "teacher.onnx.input=kaldi", f"manifest={corpus / 'manifest.csv'}"]
    spkd("extract", *keys, f"teacher.weights={one}").ok()
    done = spkd("extract", *keys, f"teacher.weights={two}")
    assert (done.code, "another teacher" in done.err) == (2, True)


@pytest.mark.parametrize("place", ["../other.data", "/etc/passwd", "..", "sub/../../other.data", "C:\\w", ""])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    file = with_external_data(tmp_path / "m", 0)
    graph = onnx.load(str(file), load_external_data=False)
    (tmp_path / "other.data").write_bytes((tmp_path / "m" / "m.onnx.data").read_bytes())
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(UsageError, match="outside its own folder"):
        load(file, input="kaldi")


def test_weights_that_are_a_link_or_missing_are_refused(tmp_path: Path) -> None:
    file = with_external_data(tmp_path / "m", 0)
    data = tmp_path / "m" / "m.onnx.data"
    data.rename(tmp_path / "other.data")
    with pytest.raises(UsageError, match="are not there"):
        load(file, input="kaldi")
    data.symlink_to(tmp_path / "other.data")
    with pytest.raises(UsageError, match="are a link"):
        load(file, input="kaldi")


def test_external_data_of_a_branch_is_part_of_the_model(tmp_path: Path) -> None:
    """Tensors of nested graphs and of constants are files as well."""
    from spkd.teachers.onnx_file import files_of

    helper, kinds = onnx.helper, onnx.TensorProto

    def outside(name: str) -> Any:
        tensor = onnx.TensorProto(name=name, data_type=kinds.FLOAT, dims=[1], data_location=kinds.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.bin")
        (tmp_path / f"{name}.bin").write_bytes(bytes(4))
        return tensor

    value = [helper.make_tensor_value_info("y", kinds.FLOAT, [1])]
    branch = helper.make_graph([helper.make_node("Constant", [], ["y"], value=outside("a"))], "b", [], value)
    other = helper.make_graph([helper.make_node("Identity", ["i"], ["y"])], "c", [], value, [outside("i")])
    test = helper.make_node("If", ["x"], ["emb"], then_branch=branch, else_branch=other)
    graph = helper.make_graph([test], "g", [helper.make_tensor_value_info("x", kinds.BOOL, [])], value)
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert [f.name for f in files_of(tmp_path / "m.onnx")] == ["m.onnx", "a.bin", "i.bin"]


def levels(path: Path, before: list[Any], named: str) -> Path:
    """The sum of magnitudes and the root of the sum of squares of an input, after the nodes that make `named` of x."""
    node = onnx.helper.make_node
    nodes = [
        *before,
        *(node("ReduceL1", [named], ["l1"], axes=[1]), node("ReduceL2", [named], ["l2"], axes=[1])),
        node("Concat", ["l1", "l2"], ["emb"], axis=1),
    ]
    return built(path, nodes, {"x": ("FLOAT", ["B", "S"])}, ["emb"])


def over_the_tensor(path: Path) -> Path:
    node = onnx.helper.make_node
    nodes = [
        *(node("ReduceMean", ["x"], ["mean"]), node("Sub", ["x", "mean"], ["d"]), node("Mul", ["d", "d"], ["s"])),
        *(node("ReduceMean", ["s"], ["v"]), node("Sqrt", ["v"], ["r"]), node("Div", ["d", "r"], ["n"])),
    ]
    return levels(path, nodes, "n")


def by_the_largest(path: Path) -> Path:
    node = onnx.helper.make_node
    nodes = [node("Abs", ["x"], ["a"]), node("ReduceMax", ["a"], ["m"]), node("Div", ["x", "m"], ["n"])]
    return levels(path, nodes, "n")


def dynamically_quantised(path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    free = {"x": {0: "B", 1: "N"}, "out": {0: "B"}}
    file = save(path.with_suffix(".float.onnx"), OfWaves(), (torch.randn(2, 8000),), free)
    quantize_dynamic(str(file), str(path))
    return path


@pytest.mark.parametrize("make", [over_the_tensor, by_the_largest, dynamically_quantised])
def test_views_of_a_batch_that_change_one_another_run_alone(
    tmp_path: Path, make: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime on each view alone."""
    file = make(tmp_path / "m.onnx")
    waves = torch.cat([WAVE, 0.01 * WAVE.flip(1)])
    session = onnxruntime.InferenceSession(str(file))
    name = session.get_inputs()[0].name
    expected, together = (
        np.concatenate([session.run(None, {name: part.numpy()})[0] for part in waves.split(size)]) for size in (1, 2)
    )
    assert not np.allclose(together, expected, rtol=1e-3)
    teacher = load(file)
    assert capsys.readouterr().out.count("so it takes one view at a time") == 1
    assert np.allclose(teacher.extract(waves, ["embedding"])["embedding"], expected, rtol=1e-5)
    assert np.allclose(teacher.embed(list(waves.numpy())), expected, rtol=1e-5)
    assert "one view" in teacher.described().details["batch"]


def test_views_that_change_nothing_of_one_another_share_a_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load(levels(tmp_path / "m.onnx", [], "x"))
    assert (capsys.readouterr().out, "batch" in teacher.described().details) == ("", False)


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax"])
def test_probabilities_of_classes_are_no_embedding(tmp_path: Path, last: str) -> None:
    node = onnx.helper.make_node
    nodes = [
        *(
            node("Abs", ["x"], ["a"]),
            node("ReduceMean", ["a"], ["m"], axes=[1], keepdims=0),
            node("MatMul", ["m", "w"], ["z"]),
        ),
        *(node(last, ["z"], ["p"], axis=1), node("Identity", ["p"], ["probs"])),
    ]
    file = built(tmp_path / "m.onnx", nodes, {"x": ("FLOAT", ["B", "T", 80])}, ["probs"], {"w": WEIGHT})
    with pytest.raises(UsageError, match=f"its output probs is that of {last}"):
        load(file, input="kaldi")
    assert load(file, input="kaldi", outputs={"embedding": "probs"}).targets["embedding"].dim == 7


def test_random_operations_are_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    dither = [node("RandomNormalLike", ["x"], ["r"], scale=1e-5), node("Add", ["x", "r"], ["d"])]
    dropout = [node("RandomUniformLike", ["x"], ["r"], seed=1.0), node("Mul", ["x", "r"], ["d"])]
    for nodes in (dither, dropout):
        with pytest.raises(UsageError, match="in every run"):
            load(levels(tmp_path / "m.onnx", nodes, "d"))


@pytest.mark.parametrize("shape", [["B", 1, "S"], ["B", "S", 1]])
def test_a_waveform_with_a_channel(tmp_path: Path, shape: list[Any]) -> None:
    node = onnx.helper.make_node
    nodes = [
        node("Reshape", ["x", "flat"], ["f"]),
        node("Conv", ["f", "w"], ["c"], strides=[160]),
        node("Abs", ["c"], ["a"]),
        node("ReduceMean", ["a"], ["emb"], axes=[2], keepdims=0),
    ]
    kernel = np.random.RandomState(1).standard_normal((5, 1, 400)).astype(np.float32)
    constants = {"flat": np.array([0, 1, -1]), "w": kernel}
    file = built(tmp_path / "m.onnx", nodes, {"x": ("FLOAT", shape)}, ["emb"], constants)
    expected = torch.nn.functional.conv1d(WAVE[:, None], torch.from_numpy(kernel), stride=160).abs().mean(2)
    assert np.allclose(load(file).extract(WAVE, ["embedding"])["embedding"], expected, atol=1e-5)


def test_half_precision_and_a_mask(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["x"], ["s"], to=1),
        node("Cast", ["attention_mask"], ["valid"], to=1),
        node("Mul", ["s", "valid"], ["y"]),
        node("Abs", ["y"], ["a"]),
        node("ReduceSum", ["a", "axis"], ["total"], keepdims=1),
        node("ReduceSum", ["valid", "axis"], ["count"], keepdims=1),
        node("Div", ["total", "count"], ["emb"]),
    ]
    inputs = {"x": ("FLOAT16", ["B", "S"]), "attention_mask": ("INT64", ["B", "S"])}
    file = built(tmp_path / "m.onnx", nodes, inputs, ["emb"], {"axis": np.array([1])})
    given = load(file).extract(WAVE, ["embedding"])["embedding"]
    assert np.allclose(given, WAVE.half().float().abs().mean(1, keepdim=True), rtol=1e-5)


def with_mask(path: Path, name: str, kind: str, nodes: list[Any]) -> Path:
    """The mean of magnitudes over steps for which `nodes` make `valid` of a mask."""
    node = onnx.helper.make_node
    nodes = [
        *nodes,
        node("Mul", ["x", "valid"], ["y"]),
        node("Abs", ["y"], ["a"]),
        node("ReduceSum", ["a", "axis"], ["total"], keepdims=1),
        node("ReduceSum", ["valid", "axis"], ["count"], keepdims=1),
        node("Max", ["count", "least"], ["divisor"]),
        node("Div", ["total", "divisor"], ["emb"]),
    ]
    constants = {"axis": np.array([1]), "least": np.ones(1, np.float32)}
    return built(path, nodes, {"x": ("FLOAT", ["B", "S"]), name: (kind, ["B", "S"])}, ["emb"], constants)


@pytest.mark.parametrize("name", ["padding_mask", "attention_mask"])
@pytest.mark.parametrize("of_padding", [True, False])
def test_the_sense_of_a_mask_is_measured(tmp_path: Path, name: str, of_padding: bool) -> None:
    """In PyTorch and fairseq True marks padding, in transformers 1 marks what is valid."""
    node = onnx.helper.make_node
    if of_padding:
        nodes, kind = [node("Not", [name], ["kept"]), node("Cast", ["kept"], ["valid"], to=1)], "BOOL"
    else:
        nodes, kind = [node("Cast", [name], ["valid"], to=1)], "INT64"
    given = load(with_mask(tmp_path / "m.onnx", name, kind, nodes)).extract(WAVE, ["embedding"])["embedding"]
    assert np.allclose(given, WAVE.abs().mean(1, keepdim=True), rtol=1e-5)


def test_a_mask_without_a_sense_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    nodes = [node("Abs", ["x"], ["a"]), node("Add", ["a", "mask"], ["s"])]
    nodes.append(node("ReduceMean", ["s"], ["emb"], axes=[1]))
    inputs = {"x": ("FLOAT", ["B", "S"]), "mask": ("FLOAT", ["B", "S"])}
    with pytest.raises(UsageError, match="whether mask marks steps that are valid or padding"):
        load(built(tmp_path / "m.onnx", nodes, inputs, ["emb"]))
    nodes = [node("Identity", ["mask"], ["unused"]), *nodes[:1], node("ReduceMean", ["a"], ["emb"], axes=[1])]
    given = load(built(tmp_path / "n.onnx", nodes, inputs, ["emb"])).extract(WAVE, ["embedding"])["embedding"]
    assert np.allclose(given, WAVE.abs().mean(1, keepdim=True), rtol=1e-5)


@pytest.mark.parametrize(("factor", "message"), [(0.0, "same for different noise"), (np.nan, "not finite")])
def test_an_embedding_that_does_not_depend_on_the_input_is_refused(tmp_path: Path, factor: float, message: str) -> None:
    node = onnx.helper.make_node
    nodes = [node("ReduceMean", ["x"], ["m"], axes=[1]), node("Mul", ["m", "factor"], ["emb"])]
    constants = {"factor": np.full(4, factor, np.float32)}
    with pytest.raises(UsageError, match=message):
        load(built(tmp_path / "m.onnx", nodes, {"x": ("FLOAT", ["B", "S"])}, ["emb"], constants))


@pytest.mark.parametrize(
    ("hop", "window"), [(160, 400), (320, 400), (320, 1000), (1280, 400), (2560, 400), (2560, 1200), (4800, 5000)]
)
def test_frames_have_the_hop_and_window_of_the_convolution(tmp_path: Path, hop: int, window: int) -> None:
    node = onnx.helper.make_node
    nodes = [
        node("Unsqueeze", ["x", "channel"], ["f"]),
        node("Conv", ["f", "w"], ["c"], strides=[hop]),
        node("Transpose", ["c"], ["frames"], perm=[0, 2, 1]),
        node("Abs", ["c"], ["a"]),
        node("ReduceMean", ["a"], ["emb"], axes=[2], keepdims=0),
    ]
    kernel = np.random.RandomState(1).standard_normal((5, 1, window)).astype(np.float32)
    constants = {"channel": np.array([1]), "w": kernel}
    file = built(tmp_path / "m.onnx", nodes, {"x": ("FLOAT", ["B", "S"])}, ["emb", "frames"], constants)
    target = load(file).targets["frames"]
    assert (target.hop, target.window, target.middle) == (hop, window, window / 2)


@pytest.mark.parametrize(("pad", "first"), [(0, 2), (1, 1), (2, 0)])
def test_frames_on_centred_features_are_centred_where_the_features_are(tmp_path: Path, pad: int, first: int) -> None:
    """The middle of the first kernel is feature frame `first`; those of sherpa-onnx lie on samples 80, 240, ..."""
    model = OfBands()
    model.conv.padding = (pad,)
    described = {"framework": "wespeaker", "output_dim": "7", "normalize_samples": "0"}
    target = load(save(tmp_path / "m.onnx", model, (torch.randn(2, 60, 80),), FREE, **described)).targets["frames"]
    assert (target.hop, target.middle) == (320, 80 + 160 * first)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pads", [(4, 0), (0, 4), (3, 1), (2, 2), (1, 0), (0, 1)])
def test_frames_of_padding_on_one_side_are_centred_on_what_they_depend(
    tmp_path: Path, stride: int, pads: tuple[int, int]
) -> None:
    """A kernel of five steps: the middle of the first one is step 2 without padding, earlier by what comes before."""
    model = OfBands()
    model.conv = nn.Sequential(nn.ConstantPad1d(pads, 0.0), nn.Conv1d(80, 12, 5, stride))  # type: ignore[assignment]
    described = {"framework": "wespeaker", "output_dim": "7", "normalize_samples": "0"}
    target = load(save(tmp_path / "m.onnx", model, (torch.randn(2, 60, 80),), FREE, **described)).targets["frames"]
    assert (target.hop, target.middle) == (160 * stride, 80 + 160 * (2 - pads[0]))


def test_frames_that_know_all_of_the_past_lie_on_the_last_step_that_they_know(tmp_path: Path) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            frames = nn.functional.pad(x, (0, 0, 3, 0)).cumsum(1)[:, :-3]
            return x.abs().mean(1), frames

    described = {"framework": "wespeaker", "output_dim": "80", "normalize_samples": "0"}
    target = load(save(tmp_path / "m.onnx", Sums(), (torch.randn(2, 60, 80),), FREE, **described)).targets["frames"]
    assert (target.hop, target.middle) == (160, 80 - 3 * 160)


def test_frames_without_a_constant_rate_are_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Resampled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            frames = nn.functional.interpolate(x.transpose(1, 2), scale_factor=0.4).transpose(1, 2)
            return x.abs().mean(1), frames

    path = tmp_path / "m.onnx"
    torch.onnx.export(
        Resampled(), (torch.randn(2, 60, 80),), str(path), input_names=["x"], output_names=["embs", "frames"],
        dynamic_axes=FREE, dynamo=False,
    )  # fmt: skip
    assert list(load(path, input="kaldi").targets) == ["embedding"]
    assert "do not come at a constant rate" in capsys.readouterr().out


def test_bands_that_come_first_where_no_dimension_says_so(tmp_path: Path) -> None:
    last = load(pooled(tmp_path / "last.onnx", 1, ["B", "D", "T"]), input="kaldi")
    first = load(pooled(tmp_path / "first.onnx", 2, ["B", "D", "T"]), input="kaldi")
    expected = centred(fbank_of("kaldi", WAVE)).abs().mean(1) @ torch.from_numpy(WEIGHT)
    for teacher in (last, first):
        assert np.allclose(teacher.extract(WAVE, ["embedding"])["embedding"], expected, atol=1e-4)


def test_a_model_that_takes_one_view_though_its_batch_is_free(tmp_path: Path) -> None:
    """A pooling that was traced with one view: the reshape has its batch of 1 in it."""
    node = onnx.helper.make_node
    nodes = [
        node("Abs", ["x"], ["a"]),
        node("ReduceMean", ["a"], ["m"], axes=[1], keepdims=0),
        node("MatMul", ["m", "w"], ["p"]),
        node("Reshape", ["p", "one"], ["emb"]),
    ]
    constants = {"w": WEIGHT, "one": np.array([1, 7])}
    file = built(tmp_path / "m.onnx", nodes, {"x": ("FLOAT", ["B", "T", 80])}, ["emb"], constants)
    waves = torch.cat([WAVE, 0.5 * WAVE.flip(1)])
    expected = centred(fbank_of("wespeaker", waves)).abs().mean(1) @ torch.from_numpy(WEIGHT)
    assert np.allclose(load(file, input="wespeaker").extract(waves, ["embedding"])["embedding"], expected, atol=1e-4)


def test_the_whole_model_is_that_of_sherpa(tmp_path: Path) -> None:
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    described = {"language": "x", "sample_rate": "16000", "output_dim": "7", "framework": "3d-speaker"}
    file = pooled(tmp_path / "m.onnx", 1, ["B", "T", 80], normalize_samples="0", **described)
    settings = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(file), num_threads=1)
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(settings)
    stream = extractor.create_stream()
    stream.accept_waveform(16_000, WAVE[0].numpy())
    stream.input_finished()
    expected = np.array(extractor.compute(stream))
    assert np.allclose(load(file).extract(WAVE, ["embedding"])["embedding"][0], expected, rtol=1e-4, atol=1e-3)
    # What the metadata say gives way to what the user says.
    own = load(file, input="3d-speaker").extract(WAVE, ["embedding"])["embedding"]
    assert not np.allclose(own[0], expected, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "described", "message"),
    [
        (["B", "T", "F"], {"feat_dim": "x"}, "feat_dim='x'"),
        (["B", "T", "F"], {"feat_dim": "-3"}, "feat_dim='-3'"),
        (["B", "T", 40], {"normalize_samples": "0", "framework": "wespeaker"}, "takes 40 bands; sherpa-onnx gives 80"),
        (["B", "T", 80], {"sample_rate": "8000"}, "audio of 8000 Hz"),
        (["B", "T", 80], {"framework": "speechbrain"}, "not whose: set teacher.onnx.input"),
        (["T", 80], {}, "takes 80 numbers at a time"),
        (["B", 1, 1, "T", 80], {}, "inputs x .*; spkd loads graphs of"),
    ],
)
def test_metadata_and_shapes_that_cannot_be_taken(tmp_path: Path, shape: list, described: dict, message: str) -> None:
    kind = "kaldi" if "feat_dim" in described or "sample_rate" in described else "auto"
    with pytest.raises(UsageError, match=message):
        load(pooled(tmp_path / "m.onnx", 1, shape, **described), input=kind)


def test_a_width_that_follows_the_length_is_no_embedding(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("ReduceMean", ["x"], ["emb"], axes=[2], keepdims=0)]
    file = built(tmp_path / "m.onnx", nodes, {"x": ("FLOAT", ["B", "T", 80])}, ["emb"])
    with pytest.raises(UsageError, match="no output there of one vector a view"):
        load(file, input="kaldi")


def test_an_input_of_which_nothing_is_known_is_named(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Add", ["x", "speed"], ["emb"])]
    file = built(tmp_path / "m.onnx", nodes, {"x": ("FLOAT", ["B", "S"]), "speed": ("FLOAT", [1])}, ["emb"])
    with pytest.raises(UsageError, match="what is speed"):
        load(file)


def looping(path: Path, turns: int, when_loud: int | None = None) -> Path:
    """A loop that adds 1 to the mean of the waveform, so many times.

    Args:
        when_loud: number of times where a sample exceeds 1; None: as often.
    """
    helper, kinds = onnx.helper, onnx.TensorProto
    named = {name: helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("go", 9), ("on", 9))}
    value = [helper.make_tensor_value_info(name, kinds.FLOAT, None) for name in ("v", "w")]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["v", "one"], ["w"])], "body",
        [named["i"], named["go"], value[0]], [named["on"], value[1]],
    )  # fmt: skip
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1]),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "limit"], ["is_loud"]),
        helper.make_node("Where", ["is_loud", "many", "few"], ["turns"]),
        helper.make_node("Loop", ["turns", "true", "mean"], ["emb"], body=body),
    ]
    constants = {
        "few": np.array(turns),
        "many": np.array(turns if when_loud is None else when_loud),
        "limit": np.float32(1),
        "true": np.array(True),
        "one": np.ones((1, 1), np.float32),
    }
    return built(path, nodes, {"x": ("FLOAT", ["B", "S"])}, ["emb"], constants)


def test_a_graph_without_end_or_of_gigabytes_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spkd.teachers.onnx_probe import Feed, probed

    endless = looping(tmp_path / "endless.onnx", 1 << 62)
    with monkeypatch.context() as patch:
        patch.setattr("spkd.teachers.onnx_probe.SECONDS", 1)
        with pytest.raises(SpkdError, match="more than 1 s of processor time"), probed(endless, 1000) as probe:
            probe.run({"x": Feed("tensor(float)", [1, 16_000])}, ["emb"])
    few = load(looping(tmp_path / "few.onnx", 3)).extract(WAVE, ["embedding"])["embedding"]
    assert np.allclose(few, WAVE.mean() + 3, atol=1e-5)
    node = onnx.helper.make_node
    nodes = [node("ConstantOfShape", ["many"], ["zeros"]), node("ReduceMean", ["zeros"], ["z"], axes=[0])]
    nodes += [node("ReduceMean", ["x"], ["m"], axes=[1]), node("Add", ["m", "z"], ["emb"])]
    constants = {"many": np.array([1_000_000_000])}
    large = built(tmp_path / "large.onnx", nodes, {"x": ("FLOAT", ["B", "S"])}, ["emb"], constants)
    with pytest.raises(SpkdError, match="asks for more memory"):
        load(large)


def test_a_graph_without_end_on_some_speech_alone_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spkd.teachers.onnx.seconds_for", lambda size: 0.1)
    teacher, loud = load(looping(tmp_path / "m.onnx", 3, when_loud=1 << 62)), torch.full((1, 16_000), 2.0)
    assert np.allclose(teacher.extract(WAVE, ["embedding"])["embedding"], WAVE.mean() + 3, atol=1e-5)
    with pytest.raises(SpkdError, match="m.onnx: fails on 1 s .it runs for more than 0 s of processor time"):
        teacher.extract(loud, ["embedding"])


def test_a_signal_ends_a_run(tmp_path: Path) -> None:
    teacher = load(looping(tmp_path / "m.onnx", 3, when_loud=1 << 62))

    def interrupt(*_: object) -> None:
        raise Interrupted("by the user")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Interrupted, match="by the user"):
            teacher.extract(torch.full((1, 16_000), 2.0), ["embedding"])
    finally:
        signal.signal(signal.SIGALRM, before)
    used = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - used < 0.1  # nothing runs on


def test_the_probe_imports_nothing_of_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "json", "onnxruntime", "resource"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    load(pooled(tmp_path / "m.onnx", 1, ["B", "T", 80]), input="kaldi")
    assert not (tmp_path / "ran").exists()


def test_the_card_names_the_library(tmp_path: Path) -> None:
    card = load(pooled(tmp_path / "m.onnx", 1, ["B", "T", 80]), input="kaldi").described()
    assert card.library == f"onnxruntime {onnxruntime.__version__}"


def test_padding_changes_no_frame_of_nemos_features() -> None:
    lengths = torch.tensor([1600, 1759, 1760, 4000])
    waves = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
    together = nemo_fbank(waves, 80, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = nemo_fbank(waves[row : row + 1, :length], 80)[0]
        assert torch.allclose(together[row, : len(alone)], alone, atol=1e-4)
