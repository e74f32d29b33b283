from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from spkd.cache import Cache
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.outputs.features import FBANKS, input_features
from spkd.registry import STUDENTS
from spkd.students import (
    Checkpoint,
    Training,
    build,
    checkpoint,
    load_student,
    read_weights,
    remove_leftovers,
    save_student,
)


def sealed(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A tree with other values and the digest of these."""
    content = {k: v for k, v in (tree | changes).items() if k not in ("spkd_model", "digest")}
    return {"spkd_model": tree["spkd_model"], **content, "digest": digest_of(content)}


def digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights, and a description that says so."""
    save_file(tensors, folder / "model.safetensors")
    card, data = json.loads((folder / "model.json").read_text()), (folder / "model.safetensors").read_bytes()
    changed = sealed(card, weights_sha256=hashlib.sha256(data).hexdigest())
    (folder / "model.json").write_text(json.dumps(changed))


@pytest.mark.parametrize("name", STUDENTS)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = build(name, channels=16, embedding=8).eval()
    save_student(tmp_path, Checkpoint(network, torch.randn(3, 8), ["a", "b", "c"], 30.0, Training(steps=5)))
    loaded = load_student(tmp_path)
    features = torch.randn(2, 30, network.input_kind.dim)
    assert torch.equal(loaded.network(features)["embedding"], network(features)["embedding"])
    assert loaded.head is not None
    assert (loaded.head.shape, loaded.classes, loaded.scale, loaded.training) == (
        (3, 8),
        ["a", "b", "c"],
        30.0,
        Training(steps=5),
    )


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("m.csv", b"utt,path,speaker\n", "it is a text file, beginning with 'utt,path"),
        ("empty.pt", b"", "it is empty"),
        ("a.wav", b"RIFF\x24\0\0\0WAVE", "it is audio"),
        ("w.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        ("w.pt", b"\x1f\x8b\x08\0\0", "it is gzipped"),
        ("m.onnx", b"\x08\x08\x12\x07pytorch", "it is an ONNX model: teacher=onnx"),
    ],
)
def test_a_file_that_holds_no_weights_is_named_for_what_it_is(
    tmp_path: Path, name: str, data: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SpkdError, match=f"{name}: cannot be read as weights.*{expected}"):
        read_weights(str(tmp_path / name))


def test_bad_checkpoints_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no spkd checkpoint"):
        load_student(tmp_path)
    save_student(tmp_path, Checkpoint(build("xvector", channels=16, embedding=8)))
    card, weights = tmp_path / "model.json", tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match="a file, not the folder of a student"):
        load_student(weights)
    good = json.loads(card.read_text())
    for change, expected in (
        ({"spkd_model": 2}, "update spkd"),
        ({"network": "vgg"}, "unknown network 'vgg'"),
        ({"settings": {"channels": 8, "embedding": 8}}, "not those of its digest"),
        (sealed(good, settings={"channels": 8, "embedding": 8}), "of another network"),
    ):
        card.write_text(json.dumps(good | change))
        with pytest.raises(SpkdError, match=expected):
            load_student(tmp_path)
    card.write_text(json.dumps(good))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SpkdError, match="damaged"):
        load_student(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("network", "settings", "classes", "scale") for value in (None, [], "x", {})),
        *({name: 7} for name in ("network", "settings", "classes")),
        {"scale": float("nan")},
        {"scale": 1e400},
        {"settings": {"channels": -8}},
        {"settings": {"channels": 10**12}},
        {"classes": ["a"] * 7},
        {"features": "wave"},
    ],
)
def test_a_card_with_odd_values_is_a_line(spkd: Callable, corpus: Path, change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    save_student(Path("s"), Checkpoint(build("xvector", channels=16, embedding=8), torch.randn(2, 8), ["a", "b"], 30.0))
    card = json.loads(Path("s/model.json").read_text())
    Path("s/model.json").write_text(json.dumps(sealed(card, **change)))
    more = [f"manifest={corpus / 'manifest.csv'}", "model=s"]
    done = spkd("eval", corpus / "trials.txt", *more)
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert "model.json" in done.err or "damaged" in done.err
    assert "unexpected" not in done.err


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_student(tmp_path, Checkpoint(build("xvector", channels=16, embedding=8), torch.randn(2, 8), ["a", "b"], 30.0))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n, v in tensors.items() if v.shape == (2, 8))
    for shape in ((2, 9), (1, 8), (2,), (2, 8, 1)):
        rewrite(tmp_path, tensors | {name: torch.zeros(shape)})
        with pytest.raises(SpkdError, match="damaged|another"):
            load_student(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x02."])
def test_a_checkpoint_file_that_is_none_is_a_line(spkd: Callable, corpus: Path, content: bytes) -> None:
    Path("w.pt").write_bytes(content)
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "cache=c")
    more = ["cache=c", "student.init=w.pt", "steps=1", "batch_size=4", "student.channels=16", "student.embedding=8"]
    done = spkd("train", "--loss", "aam", *more)
    assert done.code in (1, 2)
    assert "w.pt" in done.err.splitlines()[-1]
    assert "unexpected" not in done.err
    assert "weights_only" not in done.err


@pytest.mark.parametrize("kind", ["wespeaker", "3d-speaker"])
def test_the_features_a_student_was_trained_on_go_with_it(spkd: Callable, corpus: Path, kind: str) -> None:
    """From training by the setting, into the folder, and back in scoring and as a teacher."""
    audio = f"manifest={corpus / 'manifest.csv'}"
    spkd("extract", "teacher=none", audio, "cache=c", f"features={kind}").ok()
    more = ["cache=c", "steps=2", "batch_size=4", "crop=0.5", "student.channels=16", "student.embedding=8"]
    assert (
        f"student.features={kind}" in spkd("train", "--loss", "aam", *more).err
    )  # the default is not what the cache holds
    spkd("train", "--loss", "aam", *more, f"student.features={kind}").ok()
    network = load_student(Path("student")).network
    assert network.input_kind == FBANKS[kind]
    spkd("eval", corpus / "trials.txt", audio, "model=student").ok()
    spkd("extract", "teacher=checkpoint", "teacher.weights=student", audio, "cache=d").ok()
    path = Manifest.load(corpus / "manifest.csv")[0].path
    wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
    with torch.no_grad():
        expected = network(input_features(FBANKS[kind], wave))["embedding"]
    found = Cache.open("d").batch(np.array([0]), ["embedding"])["embedding"]
    assert torch.allclose(found.float(), expected, atol=1e-2 * float(expected.abs().max()))


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.ones(2, dtype=torch.int8)}, "'w' holds int8"),
        ({"w": torch.ones(2, dtype=torch.bool)}, "'w' holds bool"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "'w' holds int64"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' holds complex64"),
        ({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "'w' holds qint8"),
        ({"w": sparse()}, "'w' is sparse"),
        ({"w": sparse().to_sparse_csr()}, "'w' is sparse"),
        ({"w": torch.ones(2, device="meta")}, "'w' has a shape, but no values"),
        ({"w": torch.ones(1).expand(1000, 1000)}, "'w' repeats 4 bytes"),
        ({0: torch.ones(2)}, "'0' is no name"),
        ({("a", 1): torch.ones(2)}, "is no name"),
        ({"model": torch.ones(2)}, "holds a Tensor, expected tensors by name"),
        ([torch.ones(2)], "holds a list, expected tensors by name"),
        ({"state_dict": {"model": 3}}, "holds a int, expected tensors by name"),
        ({"hparams": Path("x"), "state_dict": {}}, r"it holds Python objects \(pathlib.*torch.save"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_weights_is_one_line(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SpkdError, match=message) as raised:
        read_weights(str(tmp_path / "w.pt"))
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


def test_weights_of_every_precision_and_batch_counts_are_taken(tmp_path: Path) -> None:
    state = {"a": torch.ones(2).bfloat16(), "b": torch.ones(2).half(), "c": torch.ones(2).double().expand(1, 2)}
    torch.save({"epoch": 3, "state_dict": state | {"bn.num_batches_tracked": torch.tensor(7)}}, tmp_path / "w.pt")
    assert set(read_weights(str(tmp_path / "w.pt"))) == {*state, "bn.num_batches_tracked"}


def test_compressed_parts_are_refused_before_they_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as whole,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert (tmp_path / "small.pt").stat().st_size < 10_000
    with pytest.raises(SpkdError, match="its parts are compressed, as torch never writes them"):
        read_weights(str(tmp_path / "small.pt"))
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data.replace(b"PK\1\2", b"PK\0\2"))
    with pytest.raises(SpkdError, match="w.pt: cannot be read as weights"):
        read_weights(str(tmp_path / "w.pt"))


def test_parts_of_a_file_cannot_overlap(tmp_path: Path) -> None:
    """A directory with many names for one part would make any number of tensors of it."""
    torch.save({str(i): torch.full((10_000,), float(i)) for i in range(50)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as whole, zipfile.ZipFile(tmp_path / "small.pt", "w") as small:
        for part in whole.infolist():
            if not part.filename.rpartition("/data/")[2].isdecimal() or part.filename.endswith("/data/0"):
                small.writestr(part.filename, whole.read(part))
        first = next(part for part in small.filelist if part.filename.endswith("/data/0"))
        for i in range(1, 50):
            small.filelist.append(copied := copy.copy(first))
            copied.filename = copied.orig_filename = first.filename[:-1] + str(i)
    assert (tmp_path / "small.pt").stat().st_size < 60_000
    assert len(torch.load(tmp_path / "small.pt", weights_only=True)) == 50  # torch itself takes them
    with pytest.raises(SpkdError, match="its parts overlap: together they are larger than the file"):
        read_weights(str(tmp_path / "small.pt"))


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(SpkdError, match="a TorchScript program; save the model's state dictionary"):
        read_weights(str(tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_larger_than_any_network_are_refused_before_they_are_read(tmp_path: Path, name: str) -> None:
    """A file of holes, of 8 GiB, takes no room on the disk."""
    size = 1 << 33
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / name, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SpkdError, match="larger than the 4,294,967,296 bytes"):
        read_weights(str(tmp_path / name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # kB


def test_a_safetensors_file_of_integers_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.uint8)}, tmp_path / "w.safetensors")
    with pytest.raises(SpkdError, match="'w' holds uint8"):
        read_weights(str(tmp_path / "w.safetensors"))


def test_a_flipped_bit_of_the_weights_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_student(tmp_path, Checkpoint(build("tiny", channels=16, embedding=8)))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for place in (0, len(data) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 0x40
        path.write_bytes(flipped)
        with pytest.raises(SpkdError, match="model.safetensors: damaged"):
            load_student(tmp_path)
    path.write_bytes(data)
    load_student(tmp_path)


def test_weights_larger_than_those_of_the_network_are_refused_before_they_are_read(tmp_path: Path) -> None:
    save_student(tmp_path, Checkpoint(build("tiny", channels=8, embedding=4)))
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", 50 << 20)
    with pytest.raises(SpkdError, match="model.safetensors: larger than the") as raised:
        load_student(tmp_path)
    most = int(str(raised.value).split(" the ")[1].split(" bytes")[0].replace(",", ""))
    assert 2 * size < most < 2 * size + (8 << 20)


def test_weights_that_are_not_finite_are_an_error_with_their_count(tmp_path: Path) -> None:
    network = build("xvector", channels=16, embedding=8)
    with torch.no_grad():
        network.segment_b[2].bias[:3] = float("nan")
    save_student(tmp_path, Checkpoint(network))
    with pytest.raises(SpkdError, match="3 of its weights are not finite"):
        load_student(tmp_path)


def test_a_student_is_there_however_the_writing_of_another_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def students() -> list[Checkpoint]:
        return [Checkpoint(build("xvector", channels=16, embedding=8)) for _ in "ab"]

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    first, second = students()
    save_student(tmp_path, first)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            save_student(tmp_path, second)
    for expected in (first, second):
        remove_leftovers(tmp_path)  # not the weights that model.json describes
        found = load_student(tmp_path).network.state_dict()
        assert all(torch.equal(found[name], values) for name, values in expected.network.state_dict().items())
        save_student(tmp_path, second)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
