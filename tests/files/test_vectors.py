"""Vectors of other tools: written, read, exported from a cache, imported into one, and made by `spkd embed`."""

from __future__ import annotations

from collections.abc import Callable
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

kaldiio = pytest.importorskip("kaldiio")
ROWS = [(f"utt{i}", np.random.RandomState(i).standard_normal(5).astype(np.float32)) for i in range(4)]


@pytest.mark.parametrize("suffix", ["ark", "scp", "npy"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    assert write_vectors(tmp_path / f"x.{suffix}", ROWS) == 4
    for kind in ("ark", "scp") if suffix != "npy" else ("npy",):
        found = list(read_vectors(tmp_path / f"x.{kind}"))
        assert [name for name, _ in found] == [name for name, _ in ROWS]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, ROWS, strict=True))


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


def test_commands_in_an_scp_are_not_run(tmp_path: Path) -> None:
    for line in (f"utt1 touch {tmp_path / 'ran'} |", f"utt1 | touch {tmp_path / 'ran'}", "utt1", "utt1 none.ark:5"):
        (tmp_path / "x.scp").write_text(f"{line}\n")
        with pytest.raises(SpkdError, match=r"x.scp, line 1: .* is no file"):
            list(read_vectors(tmp_path / "x.scp"))
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_a_line(tmp_path: Path) -> None:
    write_vectors(tmp_path / "x.npy", ROWS)
    (tmp_path / "x.txt").write_text("one\n")
    with pytest.raises(SpkdError, match="but 1 names"):
        list(read_vectors(tmp_path / "x.npy"))
    write_vectors(tmp_path / "x.ark", ROWS)
    (tmp_path / "x.ark").write_bytes((tmp_path / "x.ark").read_bytes()[:-9])
    with pytest.raises(SpkdError, match=r"cannot be read as vectors|not a vector"):
        list(read_vectors(tmp_path / "x.ark"))
    np.save(tmp_path / "evil.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "evil.txt").write_text("a\n")
    with pytest.raises(SpkdError, match="cannot be read as vectors"):
        list(read_vectors(tmp_path / "evil.npy"))
    with pytest.raises(UsageError, match="has a space"):
        write_vectors(tmp_path / "x.ark", [("a b", ROWS[0][1])])
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


def test_a_cache_gives_vectors_and_vectors_give_a_cache(spkd: Callable, corpus: Path, student: Path) -> None:
    keys = ["teacher=checkpoint", f"teacher.weights={student}", f"manifest={corpus / 'manifest.csv'}"]
    assert spkd("extract", *keys, "teacher.targets=[embedding,frames]", "storage.codec=float32").code == 0
    assert spkd("cache", "export", "cache", "e.ark").code == 0
    assert spkd("cache", "export", "cache", "f.scp", "--target", "frames").code == 0
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
    assert spkd("cache", "verify", "made").code == 0
    more = ["cache=made", f"manifest={corpus / 'manifest.csv'}", "student=tiny", "student.channels=16", "out=other"]
    assert spkd("train", "--loss", "cosine", *more, "steps=2", "batch_size=4").code == 0
    assert "is there already" in spkd("cache", "import", "part.ark", "made", "--manifest", corpus / "manifest.csv").err
    assert "--manifest: needed" in spkd("cache", "import", "part.ark", "other").err
    write_vectors(Path("none.npy"), ROWS)
    assert "has no vector" in spkd("cache", "import", "none.npy", "x", "--manifest", corpus / "manifest.csv").err


def test_names_of_several_views(spkd: Callable, corpus: Path, student: Path) -> None:
    keys = ["teacher=checkpoint", f"teacher.weights={student}", f"manifest={corpus / 'manifest.csv'}"]
    assert spkd("extract", *keys, "view=crops:2,0.6").code == 0
    assert spkd("cache", "export", "cache", "e.npy").code == 0
    names = Path("e.txt").read_text().split()
    assert len(set(names)) == 36
    assert names[1].endswith("-1")


def test_names_that_a_file_cannot_hold_are_refused_before_anything_is_embedded(
    tmp_path: Path, spkd: Callable[..., Any]
) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    (tmp_path / "m.csv").write_text("utt,path\nann lee,a.wav\n")
    for out, expected in (("x.ark", "'ann lee' has a space"), ("x.scp", "'ann lee' has a space"), ("x.npy", "nowhere")):
        done = spkd("embed", "m.csv", "model=nowhere", f"out={out}")
        assert done.code != 0
        assert expected in done.err


def test_names_with_spaces_and_numbers_are_kept(tmp_path: Path) -> None:
    rows = [(name, np.ones(3, np.float32)) for name in ("ann lee", "007", "#1", "x,y")]
    write_vectors(tmp_path / "x.npy", rows)
    assert [name for name, _ in read_vectors(tmp_path / "x.npy")] == [name for name, _ in rows]
