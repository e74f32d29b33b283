from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.cache.owner import silence
from spkd.errors import SpkdError
from spkd.files import atomic


def test_exactly_one_of_several_creates(tmp_path: Path) -> None:
    assert atomic.create_json(tmp_path / "x", "first")
    assert not atomic.create_json(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == '"first"\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_creating_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_exactly_one_of_several_creates(tmp_path)


def test_writing_works_where_folders_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    atomic.write_bytes(tmp_path / "x", b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic.write_bytes(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_bytes(tmp_path / "x", b"new")
    assert caught.value.filename == str(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_every_process_has_a_name_of_its_own() -> None:
    script = (
        "import os\nfrom spkd.files.atomic import worker_id\nprint(worker_id(), flush=True)\n"
        "pid = os.fork()\nif pid == 0:\n    print(worker_id(), flush=True)\n    os._exit(0)\nos.waitpid(pid, 0)\n"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in "ab"]
    names = [name for run in runs for name in run.stdout.split()]
    assert len(set(names)) == len(names) == 4


def killed_while_writing(path: Path, how: str) -> Path:
    """What a process leaves that dies while it writes a file or a folder of this path."""
    script = (
        "import os, pathlib, sys\nfrom spkd.files import atomic\n"
        f"with atomic.{how}(pathlib.Path(sys.argv[1])) as made:\n"
        "    (made / 'x').write_bytes(b'half') if isinstance(made, pathlib.Path) else made.write(b'half')\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    (left,) = path.parent.glob(f"{path.name}.*.part")
    return left


@pytest.mark.parametrize("how", ["writing", "writing_folder"])
def test_what_a_kill_left_goes_and_what_lives_stays(tmp_path: Path, how: str) -> None:
    left, path = killed_while_writing(tmp_path / "x", how), tmp_path / "x"
    others = [tmp_path / "x.part", tmp_path / "y.0123456789abcdef.part", tmp_path / "x.0123.part"]
    for other in others:
        other.write_text("of somebody else")
    with getattr(atomic, how)(path):
        (alive,) = set(tmp_path.glob("x.*.part")) - {left, *others}
        atomic.remove_abandoned(tmp_path, ["x"])
        assert not left.exists()
        assert alive.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["x", *(p.name for p in others)])


def test_what_another_machine_writes_is_left_for_a_day(tmp_path: Path) -> None:
    """Its locks are not seen here, on NFS with local_lock or Lustre with localflock."""
    name = f"{int(atomic.machine_id(), 16) ^ 1:06x}0123456789.part"
    alive = [tmp_path / f"x.{name}", tmp_path / f"y.{name}", tmp_path / f"z.{name}"]
    alive[0].touch()
    (alive[1] / "fbank").mkdir(parents=True)
    (alive[2] / "fbank" / "c").mkdir(parents=True)
    ago = time.time() - atomic.ELSEWHERE
    for path in tmp_path.rglob("*"):
        os.utime(path, (ago + 60, ago + 60))
    os.utime(alive[2], (ago - 60, ago - 60))
    atomic.remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(alive)
    for path in tmp_path.rglob("*"):
        os.utime(path, (ago - 60, ago - 60))
    atomic.remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_is_taken_again_where_it_was_removed_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def late(file: int, operation: int) -> None:
        if not calls:  # another process cleans between the opening and the lock
            next(tmp_path.glob("*.part")).unlink()
        calls.append(operation)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    atomic.write_bytes(tmp_path / "x", b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"
    assert len(calls) == 2


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def make(name: str) -> None:
        with atomic.writing_folder(tmp_path / "x") as work:
            atomic.write_bytes(work / "in" / name, b"abc")
            assert not (tmp_path / "x").exists() or name == "late"
            if name == "failed":
                raise KeyError(name)

    with pytest.raises(KeyError):
        make("failed")
    assert list(tmp_path.iterdir()) == []
    make("made")
    with pytest.raises(FileExistsError):
        make("late")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["x", "x/in", "x/in/made"]


def test_all_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of what a power cut must find: content, name, and the name of each folder that was made."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(re.sub(r"\.[0-9a-f]{16}\.part$", " (part)", f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}"))
        fsync(descriptor)

    def replaced(source: str, path: Path) -> None:
        done.append(f"name {path}")
        replace(source, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    folder = tmp_path / "a" / "b"
    atomic.write_bytes(folder / "x", b"abc")
    assert done == [
        f"sync {tmp_path / 'a'}",
        f"sync {tmp_path}",
        f"sync {folder / 'x'} (part)",
        f"name {folder / 'x'}",
        f"sync {folder}",
    ]
    done.clear()
    atomic.write_copy(folder / "x", folder / "y")
    assert done == [f"sync {folder / 'x'}", f"name {folder / 'y'}", f"sync {folder}"]


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM])
def test_a_copy_is_made_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    (tmp_path / "x").write_bytes(b"abc")
    monkeypatch.setattr(os, "link", refuse)
    atomic.write_copy(tmp_path / "x", tmp_path / "in" / "y")
    assert (tmp_path / "in" / "y").read_bytes() == b"abc"
    with pytest.raises(FileNotFoundError):
        atomic.write_copy(tmp_path / "gone", tmp_path / "z")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "x"]


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_of_a_symbolic_link_has_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    (tmp_path / "store").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "store" / "1").write_bytes(b"abc")
    (tmp_path / "in" / "x").symlink_to("../store/1")
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    copy = tmp_path / "far" / "away" / "y"
    atomic.write_copy(tmp_path / "in" / "x", copy)
    shutil.rmtree(tmp_path / "in")
    assert (copy.is_symlink(), copy.read_bytes()) == (False, b"abc")
    (tmp_path / "dead").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        atomic.write_copy(tmp_path / "dead", copy)
    assert [path.name for path in copy.parent.iterdir()] == ["y"]


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"), atomic.writing(tmp_path / "x"):
        (tmp_path / "nothing").read_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda path: atomic.write_bytes(path, b"new"),
        lambda path: atomic.create_json(path, "new"),
        lambda path: atomic.write_copy(path.with_name("other"), path),
        lambda path: atomic.writable_folder(path.parent),
        lambda path: atomic.check_writable(path),
        lambda path: silence(path.with_name("other")),
    ],
    ids=range(6),
)
def test_no_link_in_the_place_of_a_temporary_file_is_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]
) -> None:
    """Even where its name is known, which is another each time."""
    assert atomic.part_path(tmp_path / "x") != atomic.part_path(tmp_path / "x")
    monkeypatch.setattr(secrets, "token_hex", lambda size: size * "00")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "other").write_text("other")
    links = [atomic.part_path(tmp_path / name) for name in ("x", "probe", "other")]
    for number, link in enumerate(links):
        link.symlink_to(tmp_path / ("made" if number == 1 else "precious"))
    with contextlib.suppress(FileExistsError, SpkdError):
        write(tmp_path / "x")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "x").exists()


def test_a_folder_that_somebody_put_in_the_place_of_a_new_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda size: size * "00")
    (tmp_path / "theirs").mkdir()
    atomic.part_path(tmp_path / "x").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError), atomic.writing_folder(tmp_path / "x") as work:
        (work / "file").touch()
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard" / "mine").mkdir(parents=True)
    part = atomic.PartFile(tmp_path / "shard")
    with pytest.raises(IsADirectoryError) as raised:
        part.publish()
    assert raised.value.filename == str(tmp_path / "shard")


def test_what_a_kill_left_of_a_check_goes_where_the_folder_is_not_there_yet(tmp_path: Path) -> None:
    left = killed_while_writing(tmp_path / "report.json", "writing")
    atomic.check_writable(tmp_path / "new" / "eval" / "report.json")
    assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_of_a_name_of_two_lines_goes(tmp_path: Path) -> None:
    left = killed_while_writing(tmp_path / "a\nb", "writing")
    atomic.remove_abandoned(tmp_path, ["a\nb"])
    assert not left.exists()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_who_may_write_a_file_is_what_the_user_set(tmp_path: Path, umask: int) -> None:
    """As of files that Python opens, so that several users can lock the files of one cache."""
    before = os.umask(umask)
    try:
        atomic.appending(tmp_path / "x").close()
        atomic.write_bytes(tmp_path / "z", b"")
        (tmp_path / "y").touch()
    finally:
        os.umask(before)
    assert len({(tmp_path / name).stat().st_mode for name in "xyz"}) == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_in_the_place_of_another_has_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(mode)
    atomic.write_bytes(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", mode)
    atomic.write_json(tmp_path / "y", {}, 0o600)
    assert (tmp_path / "y").stat().st_mode & 0o777 == 0o600
    atomic.write_json(path, {}, 0o600)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_in_the_place_of_another_has_its_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    os.chown(path, 1234, 5678)
    atomic.write_bytes(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)


def test_a_link_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old\n")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(SpkdError, match="link: a symbolic link"):
        atomic.appending(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpkdError, match="pipe: not a regular file"):
        atomic.appending(tmp_path / "pipe")
    for _ in "ab":
        with atomic.appending(tmp_path / "log") as file:
            file.write("line\n")
    assert (tmp_path / "log").read_text() == "line\nline\n"
    assert (tmp_path / "precious").read_text() == "old\n"
