"""Vectors of other tools: written, read, exported from a cache, imported into one, and made by `spkd embed`."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from spkd.cache import Cache
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.files.vectors import read_vectors, write_vectors
from spkd.students import Checkpoint, build, save_student
from spkd.teachers.checkpoint import CheckpointTeacher
from tests import processes

kaldiio = pytest.importorskip("kaldiio")
ROWS = [(f"utt{i}", np.random.RandomState(i).standard_normal(5).astype(np.float32)) for i in range(4)]


@pytest.mark.parametrize("suffix", ["ark", "scp", "npy"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    assert write_vectors(tmp_path / f"x.{suffix}", ROWS) == 4
    for kind in ("ark", "scp") if suffix != "npy" else ("npy",):
        found = list(read_vectors(tmp_path / f"x.{kind}"))
        assert [name for name, _ in found] == [name for name, _ in ROWS]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, ROWS, strict=True))


@pytest.mark.parametrize("suffix", ["ark", "npy"])
def test_a_changed_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """`sha256sum -c` accepts what was written; nothing is read that it would refuse."""
    monkeypatch.chdir(tmp_path)
    write_vectors(Path(f"x.{suffix}"), ROWS)
    subprocess.run(["sha256sum", "-c", "--strict", f"x.{suffix}.sha256"], check=True)
    random = np.random.RandomState(0)
    for first, files in {"x.ark": ("x.ark",), "x.scp": ("x.scp", "x.ark"), "x.npy": ("x.npy", "x.txt")}.items():
        if not Path(first).exists():
            continue
        for file in map(Path, files):
            good = file.read_bytes()
            for bit in random.randint(0, 8 * len(good), 20):
                bad = bytearray(good)
                bad[bit // 8] ^= 1 << bit % 8
                file.write_bytes(bad)
                with pytest.raises(SpkdError, match=f"{file}: changed since it was written"):
                    list(read_vectors(Path(first)))
            file.write_bytes(good)
        assert len(list(read_vectors(Path(first)))) == 4
    for path in Path().glob("*.sha256"):
        path.unlink()
    assert len(list(read_vectors(Path(f"x.{suffix}")))) == 4  # as of another tool


@pytest.mark.parametrize(
    ("out", "theirs"),
    [
        ("x.npy", "x.txt"),
        ("x.npy", "x.npy.sha256"),
        ("x.ark", "x.scp"),
        ("x.ark", "x.ark.sha256"),
        ("x.scp", "x.ark"),
        ("x.scp", "x.ark.sha256"),
    ],
)
def test_no_file_is_replaced_that_nobody_named(tmp_path: Path, out: str, theirs: str) -> None:
    first = out if out.endswith("npy") else "x.ark"
    for content in ("1 a b\n", f"{'0' * 64}  {first}\n"):
        (tmp_path / theirs).write_text(content)
        with pytest.raises(SpkdError, match=f"{theirs}: would be replaced, but was not written with {out}"):
            write_vectors(tmp_path / out, ROWS)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(theirs, content)]
    # What an earlier run wrote is replaced, unless it was changed since.
    (tmp_path / theirs).unlink()
    for rows in (ROWS, ROWS[:2]):
        assert write_vectors(tmp_path / out, rows) == len(list(read_vectors(tmp_path / out))) == len(rows)
    (tmp_path / theirs).write_text("1 a b\n")
    with pytest.raises(SpkdError, match="would be replaced"):
        write_vectors(tmp_path / out, ROWS)


def as_lists(rows: Iterable[tuple[str, np.ndarray]]) -> list[tuple[str, list[float]]]:
    return [(name, values.tolist()) for name, values in rows]


def killed_after(steps: int, *arguments: Any) -> None:
    """`write_vectors`, killed after so many renames and removals."""
    left = [steps]

    def limited(call: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **settings: Any) -> None:
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            call(*arguments, **settings)

        return run

    os.replace, os.unlink = limited(os.replace), limited(os.unlink)  # type: ignore[assignment]
    write_vectors(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("out", ["x.npy", "x.ark", "x.scp"])
def test_a_kill_leaves_no_vectors_under_the_names_of_others(tmp_path: Path, out: str) -> None:
    """After each step, what can be read is the old set or the new one, and the same call ends."""
    new = [(f"new{i}", values + 1) for i, (_, values) in enumerate(ROWS)]
    for steps in range(20):
        write_vectors(tmp_path / out, ROWS)
        process = processes.Running(killed_after, steps, tmp_path / out, new)
        process.communicate()
        try:
            found = list(read_vectors(tmp_path / out))
        except (SpkdError, UsageError):
            found = []
        assert as_lists(found) in ([], as_lists(ROWS), as_lists(new)), steps
        assert found or out != "x.ark", steps  # the vectors themselves are there at any moment
        assert write_vectors(tmp_path / out, new) == 4
        if process.returncode == 0:
            break
    assert steps > 3
    assert as_lists(read_vectors(tmp_path / out)) == as_lists(new)


def test_kaldiio_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    matrix = np.random.RandomState(0).standard_normal((7, 3)).astype(np.float32)
    write_vectors(tmp_path / "x.ark", [*ROWS, ("frames", matrix)])
    theirs = kaldiio.load_scp(str(tmp_path / "x.scp"))
    assert np.array_equal(theirs["utt2"], ROWS[2][1])
    assert np.array_equal(theirs["frames"], matrix)
    assert [name for name, _ in kaldiio.load_ark(str(tmp_path / "x.ark"))][-1] == "frames"
    kaldiio.save_ark(str(tmp_path / "y.ark"), dict(ROWS), scp=str(tmp_path / "y.scp"))
    assert np.array_equal(dict(read_vectors(tmp_path / "y.scp"))["utt3"], ROWS[3][1])
    kaldiio.save_ark(str(tmp_path / "t.ark"), dict(ROWS), text=True)
    assert np.allclose(dict(read_vectors(tmp_path / "t.ark"))["utt1"], ROWS[1][1], atol=1e-4)


def test_kaldis_kinds_of_numbers_are_read(tmp_path: Path) -> None:
    rows = {"double": ROWS[0][1].astype(float), "row": ROWS[1][1][None], "double row": ROWS[2][1][None].astype(float)}
    for text in (False, True):
        kaldiio.save_ark(str(tmp_path / "x.ark"), {n.replace(" ", "-"): v for n, v in rows.items()}, text=text)
        found = list(read_vectors(tmp_path / "x.ark"))
        assert [name for name, _ in found] == ["double", "row", "double-row"]
        assert all(np.allclose(v, w.reshape(-1), atol=1e-4) for (_, v), w in zip(found, rows.values(), strict=True))


class Marked:
    """An object whose unpickling makes the file `ran`."""

    def __reduce__(self) -> tuple[Any, tuple]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a PKL" + pickle.dumps(Marked()), "no vector or matrix of numbers"),
        (b"a " + pickle.dumps(Marked()), "no vector or matrix of numbers"),
        (b"a NPY" + pickle.dumps(Marked()), "no vector or matrix of numbers"),
        (b"a AUDIO" + bytes(40), "no vector or matrix of numbers"),
        (b"a \0BCM2 " + bytes(40), "--compress=false"),
        (b"a \0BFV \4" + struct.pack("<i", 2**31 - 1) + bytes(40), "buffer is smaller"),
        (b"a \0BFV \4" + struct.pack("<i", -1) + bytes(40), "an entry of"),
        (b"a \0BFM \4\1\0", "ends within an entry"),
        (b"a  [ 1 2 import ]\n", "could not convert"),
        (b"a  [ 1 2\n 3 ]\n", "inhomogeneous"),
        (b"x" * 5000, "no name"),
        (b"", "empty"),
    ],
    ids=range(12),
)
def test_nothing_but_numbers_is_read_from_an_ark(spkd: Callable, corpus: Path, data: bytes, reason: str) -> None:
    Path("v.ark").write_bytes(data)
    Path("v.scp").write_text("a v.ark:2\n")
    for file in ("v.ark", "v.scp"):
        done = spkd("cache", "import", file, "new", "--manifest", corpus / "manifest.csv")
        assert (done.code, done.err.count("\n"), "Traceback" in done.err) == (1, 1, False), done.err
        assert reason in done.err or file == "v.scp"
    assert not Path("ran").exists()


def test_a_false_shape_takes_no_memory(tmp_path: Path) -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000, 4), }".ljust(117) + "\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode() + bytes(64))
    (tmp_path / "x.txt").write_text("a\n")
    with pytest.raises(SpkdError, match="cannot be read as vectors"):
        list(read_vectors(tmp_path / "x.npy"))


def test_commands_in_an_scp_are_not_run(tmp_path: Path) -> None:
    for line in (f"utt1 touch {tmp_path / 'ran'} |", f"utt1 | touch {tmp_path / 'ran'}", "utt1", "utt1 none.ark:5"):
        (tmp_path / "x.scp").write_text(f"{line}\n")
        with pytest.raises(SpkdError, match=r"x.scp, line 1: .* is no file"):
            list(read_vectors(tmp_path / "x.scp"))
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_a_line(tmp_path: Path) -> None:
    write_vectors(tmp_path / "x.npy", ROWS)
    (tmp_path / "x.npy.sha256").unlink()
    (tmp_path / "x.txt").write_text("one\n")
    with pytest.raises(SpkdError, match="but 1 names"):
        list(read_vectors(tmp_path / "x.npy"))
    write_vectors(tmp_path / "x.ark", ROWS)
    (tmp_path / "x.ark.sha256").unlink()
    (tmp_path / "x.ark").write_bytes((tmp_path / "x.ark").read_bytes()[:-9])
    with pytest.raises(SpkdError, match=r"cannot be read as vectors|not a vector"):
        list(read_vectors(tmp_path / "x.ark"))
    np.save(tmp_path / "evil.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "evil.txt").write_text("a\n")
    with pytest.raises(SpkdError, match="cannot be read as vectors"):
        list(read_vectors(tmp_path / "evil.npy"))
    with pytest.raises(UsageError, match="has a space"):
        write_vectors(tmp_path / "y.ark", [("a b", ROWS[0][1])])
    with pytest.raises(UsageError, match="written as"):
        write_vectors(tmp_path / "x.txt", ROWS)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_student(tmp_path / "student", Checkpoint(build("tiny", channels=16, embedding=6).eval()))
    return tmp_path / "student"


def test_embed_writes_what_the_model_gives(spkd: Callable, corpus: Path, student: Path) -> None:
    manifest = Manifest.load(corpus / "manifest.csv")
    for out in ("e.ark", "e.npy"):
        done = spkd("embed", corpus / "manifest.csv", f"model={student}", f"out={out}")
        assert (done.code, f"{out}: 18 embeddings, 0 rejected" in done.out) == (0, True), done.err
        found = dict(read_vectors(Path(out)))
        assert list(found) == [u.id for u in manifest]
    wave = torch.from_numpy(soundfile.read(manifest[3].path, dtype="float32")[0])[None]
    expected = CheckpointTeacher(student, torch.device("cpu")).extract(wave, ["embedding"])["embedding"][0]
    assert np.allclose(found[manifest[3].id], expected, atol=1e-5)
    done = spkd("embed", corpus / "manifest.csv", f"model={student}", "out=e.h5")
    assert (done.code, "written as" in done.err) == (2, True)
    Path("trials.txt").write_text("1 a b\n")
    done = spkd("embed", corpus / "manifest.csv", f"model={student}", "out=trials.npy")
    assert (done.code, "trials.txt: would be replaced" in done.err) == (1, True), done.err
    assert Path("trials.txt").read_text() == "1 a b\n"


def test_a_cache_gives_vectors_and_vectors_give_a_cache(spkd: Callable, corpus: Path, student: Path) -> None:
    keys = ["teacher=checkpoint", f"teacher.weights={student}", f"manifest={corpus / 'manifest.csv'}"]
    spkd("extract", *keys, "teacher.targets=[embedding,frames]", "storage.codec=float32").ok()
    spkd("cache", "export", "cache", "e.ark").ok()
    spkd("cache", "export", "cache", "f.scp", "--target", "frames").ok()
    cache, found = Cache.open("cache"), dict(read_vectors(Path("e.scp")))
    names = cache.plan.utterances
    assert list(found) == list(names)
    assert np.array_equal(found[names[5]], cache.batch(np.array([5]), ["embedding"])["embedding"][0])
    frames = kaldiio.load_scp("f.scp")[names[5]]
    assert np.array_equal(frames, cache.batch(np.array([5]), ["frames"])["frames"][0])

    write_vectors(Path("part.ark"), [(n, v) for n, v in found.items() if n != names[2]])
    done = spkd("cache", "import", "part.ark", "made", "--manifest", corpus / "manifest.csv")
    assert (done.code, "17 of 18 utterances have a vector" in done.out) == (0, True), done.err
    made = Cache.open("made")
    assert list(made.rejected.values()) == ["no vector in part.ark"]
    assert np.array_equal(made.batch(np.array([5]), ["embedding"])["embedding"][0], found[names[5]])
    spkd("cache", "verify", "made").ok()
    more = ["cache=made", f"manifest={corpus / 'manifest.csv'}", "student=tiny", "student.channels=16", "out=other"]
    spkd("train", "--loss", "cosine", *more, "steps=2", "batch_size=4").ok()
    assert "is there already" in spkd("cache", "import", "part.ark", "made", "--manifest", corpus / "manifest.csv").err
    assert "--manifest: needed" in spkd("cache", "import", "part.ark", "other").err
    write_vectors(Path("none.npy"), ROWS)
    assert "has no vector" in spkd("cache", "import", "none.npy", "x", "--manifest", corpus / "manifest.csv").err


def test_an_import_counts_what_it_leaves_out(spkd: Callable, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("u0", "u1", "u2"):
        soundfile.write(f"{name}.wav", rng.standard_normal(16_000) * 0.1, 16_000)
    Path("m.csv").write_text("utt,path\n" + "".join(f"u{i},u{i}.wav\n" for i in range(6)))
    names = ["u1", "u2", "u3", "u4", "x0", "x1", "x2"]  # of u0 to u5, u3 to u5 have no audio, u0 and u5 no vector
    write_vectors(Path("v.npy"), [(name, np.ones(4, np.float32)) for name in names])
    done = spkd("cache", "import", "v.npy", "c", "--manifest", "m.csv").ok()
    counts = "4 of 6 utterances have a vector in v.npy; left out: 3 utterances that cannot be used (u3: "
    assert done.out.startswith(f"c: {counts}")
    assert done.out.endswith("; not used: 3 vectors of other names (the first: x0)\n")
    made = Cache.open("c")
    assert (made.plan.utterances, list(made.rejected)) == (["u0", "u1", "u2"], [0])
    spkd("cache", "verify", "c").ok()
    write_vectors(Path("w.npy"), [("u3", np.ones(4, np.float32))])
    assert (
        "m.csv: no utterance with a vector can be used (u3: "
        in spkd("cache", "import", "w.npy", "d", "--manifest", "m.csv").err
    )


def test_names_of_several_views(spkd: Callable, corpus: Path, student: Path) -> None:
    keys = ["teacher=checkpoint", f"teacher.weights={student}", f"manifest={corpus / 'manifest.csv'}"]
    spkd("extract", *keys, "view=crops:2,0.6").ok()
    spkd("cache", "export", "cache", "e.npy").ok()
    names = Path("e.txt").read_text().split()
    assert len(set(names)) == 36
    assert names[1].endswith("-1")


def test_names_that_a_file_cannot_hold_are_refused_before_anything_is_embedded(
    tmp_path: Path, spkd: Callable[..., Any]
) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    (tmp_path / "m.csv").write_text("utt,path\nann lee,a.wav\n")
    (tmp_path / "damaged").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "damaged" / name).touch()
    for out, expected in (
        ("x.ark", "'ann lee' has a space"),
        ("x.scp", "'ann lee' has a space"),
        ("x.npy", "damaged/"),
    ):
        done = spkd("embed", "m.csv", "model=damaged", f"out={out}")
        assert done.code != 0
        assert expected in done.err


def test_names_with_spaces_and_numbers_are_kept(tmp_path: Path) -> None:
    rows = [(name, np.ones(3, np.float32)) for name in ("ann lee", "007", "#1", "x,y")]
    write_vectors(tmp_path / "x.npy", rows)
    assert [name for name, _ in read_vectors(tmp_path / "x.npy")] == [name for name, _ in rows]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((2, 3)) * 1j, "holds complex128, expected real numbers"),
        (np.ones((2, 3), bool), "holds bool"),
        (np.ones((2, 3)).astype("U4"), "holds <U4"),
        (np.ones((2, 3)).astype("M8[s]"), "holds datetime64"),
        (np.full((2, 3), 1e-42), "numbers up to 1e-42, which float32 cannot hold"),
        (np.full((2, 3), 1e39), "not a vector of finite numbers"),
    ],
)
def test_numbers_that_would_change_are_refused(tmp_path: Path, values: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "x.npy", values)
    (tmp_path / "x.txt").write_text("a\nb\n")
    with pytest.raises(SpkdError, match=reason):
        list(read_vectors(tmp_path / "x.npy"))


def test_names_may_have_the_line_ends_of_windows(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    (tmp_path / "x.txt").write_bytes(b"a\r\nb\r\n")
    assert as_lists(read_vectors(tmp_path / "x.npy")) == [("a", [0, 1, 2]), ("b", [3, 4, 5])]
