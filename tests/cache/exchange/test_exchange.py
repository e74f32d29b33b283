"""HDF5 and WebDataset, both ways, and training from a stream."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
import torch
import webdataset as wds
from torch.utils.data import DataLoader, Dataset

from spkd.cache import Cache, Crop
from spkd.cache.exchange.hdf5 import _written
from spkd.cache.exchange.stream import Stream
from spkd.cache.exchange.tars import read_tar, tar_name
from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest
from spkd.corpus.view import ViewPlan
from spkd.errors import SpkdError
from spkd.files.atomic import machine_id, writing_folder
from spkd.outputs.features import fbank
from tests import processes
from tests.conftest import CommandLine, save_teacher


def make_cache(spkd: CommandLine, corpus: Path, cache: str, *more: str) -> Cache:
    """A small cache of a checkpoint with a head: embedding, frames and fbank of whole utterances, 18 views."""
    if not Path("teacher").is_dir():
        save_teacher(Path("teacher"), speakers="abcde")
    given = ["teacher=checkpoint", "teacher.weights=teacher", "teacher.targets=[embedding,frames,logits]", "fbank=true"]
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd.once(cache, "extract", *given, manifest, f"cache={cache}", "storage.unit_views=5", *more)
    return Cache.open(cache)


def content(cache: Cache) -> dict[str, bytes]:
    """Everything stored, bit for bit."""
    return {name: cache.ragged(cache.usable_views, name).values.numpy().tobytes() for name in cache.targets}


FORMATS = ["out.h5", "tars"]


@pytest.mark.parametrize(
    ("codec", "out"),
    [
        pytest.param(codec, out, marks=[pytest.mark.slow] * (out == "out.h5"))
        for codec in ("float16", "float32", "int8", "float16+zstd")
        for out in FORMATS
    ],
)
def test_there_and_back_bit_for_bit(spkd: Callable, corpus: Path, out: str, codec: str) -> None:
    (Path("short.wav")).write_bytes(b"")
    soundfile.write("short.wav", np.zeros(800), 16_000)
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest((*everything[:5], type(everything[0])("short", "short.wav", None), *everything[5:])).save("m.csv")
    cache = make_cache(spkd, corpus, "c", f"storage.codec={codec}", "manifest=m.csv", "view.speeds=[0.9,1.0]")
    assert len(cache.rejected) == 2
    spkd("cache", "export", "c", out).ok()
    spkd("cache", "import", out, "back").ok()
    back = Cache.open("back")
    assert back.card == cache.card
    assert back.rejected == cache.rejected
    assert content(back) == content(cache)
    logits = [c.batch(c.usable_views, ["logits"])["logits"] for c in (cache, back)]
    assert torch.equal(*logits)
    assert "all checksums match" in spkd("cache", "verify", "back").out
    assert "is there already" in spkd("cache", "import", out, "back").err
    # Exporting again gives the same.
    if out == "tars":
        before = {p.name: p.read_bytes() for p in Path(out).glob("*.tar")}
        shutil.rmtree(out)
        spkd("cache", "export", "back", out)
        assert before == {p.name: p.read_bytes() for p in Path(out).glob("*.tar")}


def test_hdf5_is_readable_without_us(spkd: Callable, corpus: Path) -> None:
    cache = make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "out.h5")
    with h5py.File("out.h5") as file:
        assert json.loads(file.attrs["card"])["identity"] == cache.card.identity
        at = file["offsets/frames"][:]
        frames = file["targets/frames"][at[3] : at[4]]
        assert np.array_equal(frames, cache.ragged(np.array([3]), "frames").values)
        assert file["targets/frames"].attrs["hop"] == 160
        assert file["utterance"].asstr()[3] == cache.plan.utterances[3]
        assert file["speaker"].asstr()[3] == cache.plan.speakers[cache.plan.speaker[3]]


def test_tars_are_readable_without_us_and_carry_the_audio(spkd: Callable, corpus: Path) -> None:
    cache = make_cache(spkd, corpus, "c", "view=crops:2,0.7", "view.noise=synthetic")
    spkd("cache", "export", "c", "tars", "--audio", f"manifest={corpus / 'manifest.csv'}").ok()
    plan = ViewPlan.from_card(cache.card.views, None, None)
    loader = ViewLoader(Manifest.load(corpus / "manifest.csv"), cache.plan.views, plan)
    urls = [str(p) for p in sorted(Path("tars").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 36
    for row, sample in enumerate(samples):
        assert sample["__key__"] == f"{row:09d}"
        assert np.array_equal(sample["embedding.npy"][0], cache.batch(np.array([row]), ["embedding"])["embedding"][0])
        wave, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        assert rate == 16_000
        assert np.abs(wave - loader(row)).max() <= 2.0**-15
        assert sample["json"]["utterance"] == cache.plan.utterances[cache.plan.views.utterance[row]]


def damage_hdf5(change: Callable[[h5py.File], None]) -> None:
    with h5py.File("out.h5", "r+") as file:
        change(file)


def reshape(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values


def empty(file: h5py.File, name: str, shape: tuple[int, ...], kind: str) -> None:
    """A dataset of which nothing is stored, so that it is of any size."""
    del file[name]
    file.create_dataset(name, shape, kind, chunks=True)


def sparse(file: h5py.File, name: str, size: int) -> None:
    """A dataset that libhdf5 counts as stored, although its bytes are a hole of the file."""
    del file[name]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((size,))
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_U8LE, space, properties)


@pytest.mark.slow  # a process that imports torch for each
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda f: reshape(f, "targets/embedding", f["targets/embedding"][:, :3]),
            r"/targets/embedding: float16 \(18, 3\)",
        ),
        (lambda f: reshape(f, "targets/frames", f["targets/frames"][:-1]), "/targets/frames: float16"),
        (lambda f: reshape(f, "targets/fbank", f["targets/fbank"][:].astype("f4")), "/targets/fbank: float32"),
        (lambda f: f.__delitem__("targets/frames"), "/targets/frames: missing, or a link"),
        (lambda f: f.attrs.__setitem__("spkd_cache", 2), "not an export of a cache in format 1"),
        (lambda f: f.attrs.__setitem__("card", "{"), "not valid JSON"),
        (lambda f: f["files/plan/0.npz"].write_direct(np.zeros(f["files/plan/0.npz"].shape, "u1")), "damaged"),
        (lambda f: f.create_dataset("files/evil", (3 << 30,), "u1", chunks=True), "h5: evil: no file of a cache"),
        (lambda f: empty(f, "files/plan/0.npz", (3 << 30,), "u1"), "/files/plan/0.npz: .* of which 0 are stored"),
        (
            lambda f: sparse(f, "files/plan/0.npz", 3 << 30),
            "/files/plan/0.npz: 3,221,225,472 bytes, in a file",
        ),
        (lambda f: empty(f, "targets/fbank", (1 << 30, 80), "f2"), "/targets/fbank: .* of which 0 are stored"),
    ],
)
def test_wrong_hdf5_imports_nothing(
    spkd: Callable, corpus: Path, change: Callable[[h5py.File], None], expected: str
) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "out.h5")
    damage_hdf5(change)
    done = spkd("cache", "import", "out.h5", "back")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("error: out.h5: ")
    with pytest.raises(SpkdError, match=expected):
        raise SpkdError(done.err)
    assert not list(Path().glob("back*"))


@pytest.mark.slow
def test_an_hdf5_file_that_links_elsewhere_is_refused(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "out.h5")
    shutil.copy("out.h5", "other.h5")

    def link(file: h5py.File) -> None:
        del file["targets/embedding"]
        file["targets/embedding"] = h5py.ExternalLink("other.h5", "/targets/embedding")

    damage_hdf5(link)
    assert "missing, or a link" in spkd("cache", "import", "out.h5", "back").err
    Path("out.h5").write_bytes(Path("other.h5").read_bytes()[:5000])
    assert "out.h5: damaged" in spkd("cache", "import", "out.h5", "back").err
    assert "no such file" in spkd("cache", "import", "none.h5", "back").err
    good = bytearray(Path("other.h5").read_bytes())
    frames = Cache.open("c").ragged(np.array([0]), "embedding").values.numpy().tobytes()
    good[good.index(frames) + 3] ^= 1
    Path("out.h5").write_bytes(good)
    assert "out.h5: damaged" in spkd("cache", "import", "out.h5", "back").err
    assert not list(Path().glob("back*"))


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, body in members:
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    out.seek(0)
    return out


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def array(values: object) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=True)  # type: ignore[arg-type]
    return out.getvalue()


GOOD = (member("000000000.embedding.npy"), array(np.zeros((1, 8), np.float16)))


@pytest.mark.parametrize(
    ("bad", "body"),
    [
        (member("/etc/000000001.embedding.npy"), GOOD[1]),
        (member("../000000001.embedding.npy"), GOOD[1]),
        (member("000000001.embedding.npy", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (member("000000001.embedding.npy", tarfile.LNKTYPE, "000000000.embedding.npy"), b""),
        (member("000000001.embedding.npy", tarfile.FIFOTYPE), b""),
        (member("000000001.embedding.pkl"), pickle.dumps([1])),
        (member("000000001.other.npy"), GOOD[1]),
        (member("000000001.embedding.npy"), array(np.array([{"a": 1}], object))),
        (member("000000001.embedding.npy"), b"not an array"),
    ],
    ids=["absolute", "dotdot", "symlink", "hardlink", "fifo", "pickle", "unknown", "object array", "garbage"],
)
def test_members_that_have_no_place_in_a_tar(bad: tarfile.TarInfo, body: bytes, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SpkdError, match=r"^x\.tar: "):
        list(read_tar(tar_of(GOOD, (bad, body)), "x.tar", {"embedding"}, ["embedding"]))
    assert sorted(tmp_path.rglob("*")) == before
    whole = tar_of(GOOD, (member("000000001.embedding.npy"), GOOD[1])).getvalue()
    with pytest.raises(SpkdError, match=r"^x\.tar: damaged"):
        list(read_tar(io.BytesIO(whole[:1800]), "x.tar", {"embedding"}, ["embedding"]))


def rewrite_index(change: Callable[[dict], None]) -> None:
    """What somebody with bad intent would do: a wrong export with right digests."""
    from spkd.files import digest
    from spkd.files.sealed import self_digest

    index = json.loads(Path("tars/index.json").read_text())
    for path in Path("tars").glob("*.tar"):
        index["tars"][path.name] = digest.of_file(path)
    change(index)
    index["check"] = self_digest(index)
    Path("tars/index.json").write_text(json.dumps(index))


def test_wrong_tars_import_nothing(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "tars")
    tar = Path("tars") / tar_name(1)
    good = tar.read_bytes()

    def refused(expected: str, code: int = 1) -> None:
        done = spkd("cache", "import", "tars", "back")
        assert done.code == code
        assert expected in done.err
        assert len(done.err.splitlines()) == 1
        assert not list(Path().glob("back*"))

    tar.write_bytes(good[:700] + bytes([good[700] ^ 4]) + good[701:])
    refused(f"{tar}: damaged, or of another export")
    tar.write_bytes(tar_of(GOOD).getvalue())
    rewrite_index(lambda index: None)
    refused(f"{tar}: lacks ")
    tar.write_bytes((Path("tars") / tar_name(0)).read_bytes())
    rewrite_index(lambda index: None)
    refused(f"{tar}: view 0 does not belong here")
    tar.unlink()
    refused(f"{tar}: missing")
    tar.write_bytes(good)
    rewrite_index(lambda index: index.update(spkd_webdataset=2))
    refused("update spkd")
    Path("tars/index.json").write_text("{}")
    refused("not the index of an export")
    Path("tars/index.json").unlink()
    refused("index.json: missing", code=2)


class Embeddings(Dataset):
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, view: int) -> torch.Tensor:
        return self.stream.stored(np.array([view]), ["embedding"])["embedding"][0]


def test_a_stream_serves_what_the_cache_serves(spkd: Callable, corpus: Path) -> None:
    cache = make_cache(spkd, corpus, "c", "storage.codec=int8", "storage.unit_views=2")
    spkd("cache", "export", "c", "tars")
    stream = Stream("tars")
    assert stream.names == cache.names
    order = stream.order(3, 1)
    assert sorted(order) == list(cache.usable_views)
    assert not np.array_equal(order, stream.order(3, 2))
    assert np.array_equal(order, Stream("tars").order(3, 1))
    stream.order(3, 1)
    names = ["embedding", "frames", "fbank", "logits"]
    for i in range(0, len(order), 4):
        rows = order[i : i + 4]
        crop = Crop(np.arange(len(rows)) * 1600, 16_000)
        mine = stream.decode(stream.stored(rows, names, crop), names)
        theirs = cache.batch(rows, names, crop)
        assert all(torch.equal(mine[name], theirs[name]) for name in names)
        assert len(stream._loaded) <= 12  # blocks of this batch and the next one, not the whole export


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_stream_serves_loaders_of_other_processes_too(spkd: Callable, corpus: Path, context: str) -> None:
    cache = make_cache(spkd, corpus, "c", "storage.unit_views=2")
    spkd("cache", "export", "c", "tars")
    stream = Stream("tars")
    order = stream.order(0, 0)
    stream.stored(order[:2], ["embedding"])  # its threads stay behind
    loader = DataLoader(
        Embeddings(stream), batch_size=None, sampler=order.tolist(), num_workers=1, multiprocessing_context=context
    )
    assert torch.equal(torch.stack(list(loader)), cache.batch(order, ["embedding"])["embedding"])


def test_a_stream_computes_features_from_its_audio(spkd: Callable, corpus: Path) -> None:
    cache = make_cache(spkd, corpus, "c", "fbank=false")
    spkd("cache", "export", "c", "tars", "--audio", f"manifest={corpus / 'manifest.csv'}")
    stream = Stream("tars")
    assert "fbank" in stream.names
    stream.order(0, 0)
    plan = ViewPlan.from_card(cache.card.views, None, None)
    loader = ViewLoader(Manifest.load(corpus / "manifest.csv"), cache.plan.views, plan)
    rows, crop = np.array([4, 1]), Crop(np.array([320, 0]), 8000)
    names = ["fbank", "embedding", "wave"]
    outputs = stream.decode(stream.stored(rows, names, crop), names)
    for i, row in enumerate(rows):
        wave = torch.from_numpy(np.round(loader(int(row)) * 32768).astype(np.float32) / 32768)
        whole = fbank(wave[None])[0]
        assert torch.allclose(outputs["fbank"][i], whole[crop.start[i] // 160 :][:48], atol=1e-3)
        assert torch.equal(outputs["wave"][i].flatten(), wave[crop.start[i] :][:8000])


def test_audio_beyond_full_scale_is_the_same_in_tars(spkd: Callable, corpus: Path) -> None:
    """Noise as loud as loud speech: most waveforms exceed 1. Any reader gets them by the scale in the JSON."""
    Path("loud").mkdir()
    some = []
    for number, utterance in enumerate(Manifest.load(corpus / "manifest.csv").utterances[:6]):
        wave, rate = soundfile.read(utterance.path)
        soundfile.write(f"loud/{number}.wav", wave / np.abs(wave).max(), rate, subtype="FLOAT")
        some.append(replace(utterance, path=f"loud/{number}.wav"))
    Manifest(tuple(some)).save("loud.csv")
    noise = ["view.noise=synthetic", "view.noise_prob=1", "view.snr=[0,0]"]
    spkd("extract", "teacher=none", "manifest=loud.csv", "cache=c", "wave=true", "storage.codec=float32", *noise).ok()
    spkd("cache", "export", "c", "tars", "--audio", "manifest=loud.csv").ok()
    cache, stream = Cache.open("c"), Stream("tars")
    beyond = 0
    for row, sample in enumerate(wds.WebDataset(["tars/000000.tar"], shardshuffle=False).decode()):
        streamed = cache.batch(np.array([row]), ["wave"])["wave"][0].numpy().ravel()
        wave, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        scale = sample["json"].get("scale", 1.0)
        assert scale == pytest.approx(max(np.abs(streamed).max(), 1.0), rel=1e-3)
        assert np.abs(scale * wave[: len(streamed)] - streamed).max() <= scale * 2.0**-14
        beyond += scale > 1
    assert beyond > 3
    del stream.targets["wave"]  # as where it is computed from the audio
    stream.order(0, 0)
    given = np.arange(2), ["wave"], Crop(np.zeros(2, np.int64), 8000)
    theirs = stream.decode(stream.stored(*given[:2], given[2]), ["wave"])["wave"]
    ours = cache.decode(cache.stored(*given[:2], given[2]), ["wave"])["wave"]
    assert torch.allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize("place", ["folder", "http", "s3"])
def test_training_from_a_stream_is_shuffled_and_resumes(
    spkd: Callable, corpus: Path, place: str, request: pytest.FixtureRequest
) -> None:
    make_cache(spkd, corpus, "c", "storage.unit_views=2")
    spkd("cache", "export", "c", "tars")
    where = "tars"
    if place == "http":
        where = request.getfixturevalue("web") + "/tars"
    if place == "s3":
        where = request.getfixturevalue("s3") + "/exports/tars"
        assert "all read back" in spkd("cache", "push", "tars", where).out
    train = [
        "train",
        "--loss",
        "cosine",
        f"cache={where}",
        "steps=12",
        "batch_size=4",
        "student.channels=8",
        "crop=0.5",
    ]
    spkd(*train, "out=whole").ok()
    from spkd.train import resume

    real, calls = resume.save, []

    def stop(*arguments):  # type: ignore[no-untyped-def]
        real(*arguments)
        calls.append(arguments)
        raise SpkdError("stopped")

    resume.save = stop  # type: ignore[assignment]
    try:
        assert spkd(*train, "out=cut", "save_every=5").code == 1
    finally:
        resume.save = real  # type: ignore[assignment]
    done = spkd(*train, "out=cut", "save_every=5")
    assert "at step 5" in done.out
    assert Path("cut/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_a_cache_elsewhere_says_how_to_get_it(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    make_cache(spkd, corpus, "c")
    done = spkd("train", "--loss", "cosine", f"cache=file://{tmp_path}/c")
    assert f"spkd cache pull file://{tmp_path}/c FOLDER" in done.err


@pytest.mark.parametrize("out", FORMATS)
def test_a_damaged_cache_is_not_exported(spkd: Callable, corpus: Path, out: str) -> None:
    make_cache(spkd, corpus, "c")
    shard = next(Path("c/fbank/c").glob("2/0"))
    data = bytearray(shard.read_bytes())
    data[5000] ^= 4
    shard.write_bytes(data)
    done = spkd("cache", "export", "c", out)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "fbank/c/2/0" in done.err
    assert not Path(out).exists() or not list(Path(out).glob("*.json"))


@pytest.mark.slow
def test_a_damaged_hdf5_file_ends_its_import_in_one_line(spkd: Callable, corpus: Path) -> None:
    """libhdf5 itself can crash on one; whatever it does must not end spkd."""
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "good.h5").ok()
    good, random = Path("good.h5").read_bytes(), np.random.RandomState(0)
    for _ in range(3):
        bad = bytearray(good)
        for at in random.randint(0, 4000, 40):
            bad[at] ^= 1 << random.randint(8)
        Path("bad.h5").write_bytes(bad)
        done = spkd("cache", "import", "bad.h5", "new")
        assert (done.code, len(done.err.splitlines())) == (1, 1)
        assert not Path("new").exists()


def with_little_room(*arguments: str) -> None:
    """The command line, where no file can be larger than 40 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    processes.command(*arguments)


@pytest.mark.slow
def test_an_hdf5_file_for_which_there_is_no_room_fails_in_one_line(spkd: Callable, corpus: Path) -> None:
    """libhdf5 itself crashes where it cannot write."""
    make_cache(spkd, corpus, "c")
    failing = processes.Running(with_little_room, "cache", "export", "c", "o/out.h5")
    _, errors = failing.communicate()
    assert (failing.returncode, errors) == (1, "error: o/out.h5: File too large\n")
    assert list(Path("o").iterdir()) == []
    spkd("cache", "export", "c", "out.h5").ok()


@pytest.mark.slow
def test_a_name_that_is_too_long_is_no_damage_of_the_imported_file(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "c.h5").ok()
    done = spkd("cache", "import", "c.h5", "x" * 240)
    assert (done.code, "damaged" in done.err) == (1, False), done.err
    assert done.err.endswith(": File name too long\n")


class FailsOnce(io.BytesIO):
    """A file of which one write fails, as on a network file system or a bad disk.

    Args:
        number: of the write that fails, counted from 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def write(self, data: Any) -> int:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(data)


def test_every_write_of_an_hdf5_file_that_fails_is_an_error() -> None:
    """libhdf5 itself ends the process by a signal at most of them, and leaves the others out without an error."""
    rows, number = np.arange(6000, dtype="<f4").reshape(-1, 3), 0
    while True:
        number += 1
        disk = FailsOnce(number)
        try:
            with _written(disk) as (file, _):
                file.attrs["card"] = "x" * 300
                file.create_dataset("rows", data=rows, chunks=(500, 3), fletcher32=True)
                file.create_dataset("names", data=["a", "b"] * 50, dtype=h5py.string_dtype())
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017
        else:
            break
    assert disk.left > 0  # it needed fewer writes
    assert number > 10
    with h5py.File(io.BytesIO(disk.getvalue())) as file:
        assert np.array_equal(file["rows"][:], rows)


def test_a_sparse_member_of_a_tar_takes_no_memory(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "tars").ok()
    tar = sorted(Path("tars").glob("*.tar"))[0]
    members = []
    with tarfile.open(tar) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for number, (member, data) in enumerate(members):
            if number == 0:
                size = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**11)}
                member.pax_headers = {**size, "GNU.sparse.name": member.name}
                data = b"1\n0\n0\n".ljust(512, b"\0")
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    done = spkd("cache", "import", "tars", "new")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "memory" not in done.err


def test_a_view_twice_in_a_tar_is_refused(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "tars").ok()
    tar = sorted(Path("tars").glob("*.tar"))[0]
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[0]
        data = archive.extractfile(member).read()  # type: ignore[union-attr]
    with tarfile.open(tar, "a") as archive:
        archive.addfile(member, io.BytesIO(data))
    assert spkd("cache", "import", "tars", "new").code == 1
    assert not Path("new").exists()


@pytest.mark.slow
def test_two_imports_into_one_place(spkd: Callable, corpus: Path) -> None:
    """One works; the other waits for it, or says so: never a message about a temporary file."""
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "tars").ok()
    both = [processes.spkd("cache", "import", "tars", "new") for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert 0 in [process.returncode for process in both], errors
    for error in errors:
        assert ".part" not in error
        assert "Traceback" not in error
    assert "all checksums match" in spkd("cache", "verify", "new").out


@pytest.mark.slow
@pytest.mark.parametrize("source", FORMATS)
def test_an_import_removes_what_kills_left_of_it_and_nothing_else(spkd: Callable, corpus: Path, source: str) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", source).ok()
    left, other = (Path(f"{name}.{machine_id()}0123456789.part") for name in ("new", "other"))
    for folder in (left, other):
        (folder / "embedding").mkdir(parents=True)
    with writing_folder(Path("new").absolute()) as alive:  # another import into the same place
        damaged = Path(source) if source == "out.h5" else Path(source, tar_name(0))
        good = damaged.read_bytes()
        damaged.write_bytes(good[: len(good) - 20_000] + bytes(20_000))
        failing = processes.spkd("cache", "import", source, "new")
        assert len(failing.communicate()[1].splitlines()) == failing.returncode == 1
        assert [alive.is_dir(), left.exists(), other.is_dir()] == [True, False, True]
    assert not alive.exists()


@pytest.mark.parametrize("name", ["rejected", "card", "digests", "files/head.safetensors", "targets/embedding"])
def test_a_changed_value_in_an_hdf5_file_is_found(spkd: Callable, corpus: Path, name: str) -> None:
    """Also where its own checksums fit, as those of a file that another tool wrote again."""
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "out.h5").ok()
    with h5py.File("out.h5", "r+") as file:
        if "/" in name:
            values = file[name][...]
            values.view(np.uint8).reshape(-1)[-1] ^= 1
            file[name][...] = values
        elif name == "card":  # a value that the fingerprint leaves out
            file.attrs[name] = file.attrs[name].replace("the owner", "an owner", 1)
        else:
            file.attrs[name] = json.dumps({"3": "too short"})
    done = spkd("cache", "import", "out.h5", "new")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "damaged" in done.err
    assert not Path("new").exists()
