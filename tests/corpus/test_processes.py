"""Loading by processes: the same batches as of one thread, in the same order, whatever becomes of the processes."""

# ruff: noqa: F811  # fixtures of another file

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from spkd.corpus import fetched, loader
from spkd.corpus.augment import bank
from spkd.corpus.fetched import Copies
from spkd.corpus.loader import ViewLoader, WaveBatch, processes_pay, stream_batches
from spkd.corpus.manifest import Manifest, Utterance, measure
from spkd.corpus.processes import Passed, Processes
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan
from spkd.errors import SpkdError
from spkd.outputs.features import fbank
from tests import processes
from tests.conftest import save_teacher
from tests.corpus.test_remote import Ranges, web  # noqa: F401
from tests.train.test_loading import starting_by, with_shared_memory


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes load from the first batch on, which waits for them."""
    processes.SERVER.Process(target=os.getpid).start()  # the server imports what other tests need, too
    monkeypatch.setattr(loader, "AFTER", -1.0)
    monkeypatch.setattr(Processes, "are_ready", property(lambda self: self._started.result() is None))


def features(wave: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fbank, and the number of the process that computed it."""
    return {"fbank": fbank(wave), "process": torch.full((1, 1, 1), os.getpid(), dtype=torch.int64)}


def uneven(views: int) -> Iterator[tuple[int, np.ndarray]]:
    """Groups of 0, 1, 2, ... views, in a random order of all."""
    order, first, group = np.random.RandomState(0).permutation(views), 0, 0
    while first < views:
        yield group, order[first : first + group]
        first, group = first + group, group + 1


Streamed = list[tuple[int, WaveBatch | None]]


def streamed(given: ViewLoader, workers: int, mixed: bool, size: int = 4) -> tuple[Streamed, dict[int, str]]:
    refused: dict[int, str] = {}

    def reject(view: int, error: Exception) -> None:
        refused[view] = str(error)

    groups = uneven(len(given.views))
    return list(stream_batches(given, groups, size, workers, reject, mixed, features=features)), refused


def damaged(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with an utterance that is away, and one that cannot be decoded."""
    (folder / "bad.wav").write_bytes(b"RIFF" + bytes(100))
    bad = [Utterance("gone", "/none.wav", "s", 1.0), Utterance("bad", str(folder / "bad.wav"), "s", 1.0)]
    return Manifest((*manifest.utterances[:4], *bad, *manifest.utterances[4:]))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("mixed", [False, True])
def test_batches_are_those_of_one_thread_to_the_bit(manifest: Manifest, tmp_path: Path, mixed: bool) -> None:
    plan = ViewPlan.parse(ViewConfig(plan="full", speeds=[0.9, 1.0], formants=[1.1], noise="synthetic"))
    broken = damaged(manifest, tmp_path)
    given = ViewLoader(broken, plan.views(broken), plan, 0.1)
    (alone, refused), (together, also) = streamed(given, 1, mixed), streamed(given, 2, mixed)
    assert len(refused) == 4
    assert also == refused
    assert [(group, batch is None) for group, batch in together] == [(group, batch is None) for group, batch in alone]
    pids = set[int]()
    for (_, one), (_, other) in zip(alone, together, strict=True):
        if one is None or other is None:
            continue
        assert np.array_equal(other.views, one.views)
        assert torch.equal(other.waves, one.waves)
        assert (other.lengths is None) == (one.lengths is None)
        assert other.lengths is None or torch.equal(other.lengths, one.lengths)  # type: ignore[arg-type]
        assert np.array_equal(other.features["fbank"], one.features["fbank"])
        assert other.cores > 0
        for row, view in enumerate(other.views.tolist()):
            wave = given(view)
            assert np.array_equal(other.waves[row, : len(wave)].numpy(), wave)
        pids |= set(other.features["process"].ravel().tolist())
    assert os.getpid() not in pids
    assert not multiprocessing.active_children() or pids.isdisjoint(p.pid for p in multiprocessing.active_children())


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_batches_are_the_same_where_processes_are_spawned(manifest: Manifest, tmp_path: Path) -> None:
    plan = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0]))
    broken = damaged(manifest, tmp_path)
    given = ViewLoader(broken, plan.views(broken), plan, 0.1)
    alone, refused = streamed(given, 1, True)
    with starting_by("spawn"):
        together, also = streamed(given, 2, True)
    assert also == refused
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(other.waves, one.waves)


@pytest.mark.usefixtures("at_once")
def test_notes_and_remarks_come_once_from_all_processes(tmp_path: Path) -> None:
    rows = []
    for number in range(8):
        loud = np.full((8000, 2), 20_000.0 if number % 2 else 0.1, np.float32)
        soundfile.write(tmp_path / f"{number}.wav", loud, 8000, subtype="FLOAT")
        rows.append(Utterance(str(number), str(tmp_path / f"{number}.wav"), "s"))
    measured, _ = measure(Manifest(rows))
    plan = ViewPlan.parse(ViewConfig(plan="crops:3,0.5"))
    logged: list[list[str]] = []
    for workers in (1, 2):
        logged.append([])
        given = ViewLoader(measured, plan.views(measured), plan, 0.1, logged[-1].append)
        streamed(given, workers, False)
        given.report_remarks()
    alone, together = map(sorted, logged)
    assert together == alone
    assert sum("8000 Hz is resampled" in text for text in together) == 1
    assert sum("2 channels is averaged" in text for text in together) == 1


@pytest.mark.usefixtures("at_once")
def test_noise_is_drawn_from_the_files_that_were_there_at_first(manifest: Manifest, tmp_path: Path) -> None:
    for name in "bc":
        noise = np.random.RandomState(ord(name)).standard_normal(16_000)
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * noise, 16_000)
    plan = ViewPlan.parse(ViewConfig(noise=str(tmp_path), noise_prob=1.0))
    given = ViewLoader(manifest, plan.views(manifest), plan, 0.1)
    alone, _ = streamed(given, 1, False)
    assert len(bank(str(tmp_path)).files) == 2
    soundfile.write(tmp_path / "a.wav", np.ones(16_000), 16_000)
    together, _ = streamed(given, 2, False)
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert one is None or (other is not None and torch.equal(other.waves, one.waves))


@pytest.mark.usefixtures("at_once")
def test_a_bad_file_of_noise_is_the_error_of_one_thread(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "noise.wav").write_bytes(b"RIFF" + bytes(50))
    plan = ViewPlan.parse(ViewConfig(noise=str(tmp_path), noise_prob=1.0))
    given = ViewLoader(manifest, plan.views(manifest), plan, 0.1)
    found = []
    for workers in (1, 2):
        with pytest.raises(SpkdError, match=r"augmentation: .*noise\.wav: cannot be decoded") as error:
            streamed(given, workers, False)
        found.append(str(error.value))
    assert found[0] == found[1]


def left_over() -> list[int]:
    """Processes of loaders that go on."""
    return [child.pid for child in multiprocessing.active_children() if "ForkServer" in type(child).__name__]  # type: ignore[misc]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("end", ["error", "close"])
def test_no_process_goes_on_when_batches_are_left(manifest: Manifest, end: str) -> None:
    plan = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0, 1.1]))
    given = ViewLoader(manifest, plan.views(manifest), plan)
    before = left_over()
    batches = stream_batches(given, uneven(len(given.views)), 2, 2, pytest.fail)
    next(batches)
    next(batches)
    started = [pid for pid in left_over() if pid not in before]
    assert len(started) in (1, 2)
    if end == "close":
        batches.close()
    else:
        with pytest.raises(ValueError, match="of the consumer"):
            batches.throw(ValueError("of the consumer"))
    assert not set(started) & set(left_over())
    for pid in started:
        assert not Path(f"/proc/{pid}").exists() or b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.usefixtures("at_once")
def test_processes_leave_an_interruption_to_their_parent(manifest: Manifest) -> None:
    """A terminal sends it to every process of the command."""
    plan = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0, 1.1]))
    given = ViewLoader(manifest, plan.views(manifest), plan)
    pids = set[int]()
    for _, batch in stream_batches(given, uneven(len(given.views)), 2, 2, pytest.fail, features=features):
        if batch is None:
            continue
        pids |= set(batch.features["process"].ravel().tolist())
        for pid in pids - {os.getpid()}:  # those that have begun: before, an interruption ends them
            os.kill(pid, signal.SIGINT)
        for row, view in enumerate(batch.views.tolist()):
            assert np.array_equal(batch.waves[row].numpy(), given(view))
    assert pids - {os.getpid()}  # on a busy machine one of them may do it all


def kill_while_they_work(self: Processes, job: object) -> object:
    """Begin a job, and kill the process that has it, as the kernel does where memory runs out."""
    for pid in left_over():
        os.kill(pid, signal.SIGSTOP)
    future = SUBMIT(self, job)
    for pid in left_over():
        os.kill(pid, signal.SIGKILL)
    return future


def end_by_a_fault(self: Processes, job: object) -> object:
    """Begin a job, and end a process as a library does that reads where it must not."""
    pid, begun = self._pool.submit(os.getpid).result(), SUBMIT(self, job)
    os.kill(pid, signal.SIGSEGV)
    return begun


def kill_before(self: Processes, job: object) -> object:
    """Kill a process, and begin a job once that is found."""
    os.kill(self._pool.submit(os.getpid).result(), signal.SIGKILL)
    while not self._pool._broken:
        time.sleep(0.01)
    return SUBMIT(self, job)


SUBMIT = Processes.submit


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kill", [kill_while_they_work, kill_before, end_by_a_fault])
def test_a_killed_process_ends_an_extraction_which_goes_on_later(
    spkd: Callable, corpus: Path, monkeypatch: pytest.MonkeyPatch, kill: Callable
) -> None:
    given = [
        "extract",
        "teacher=none",
        f"manifest={corpus / 'manifest.csv'}",
        "view=crops:4,0.5",
        "storage.unit_views=8",
    ]
    spkd(*given, "cache=whole", "workers=1").ok()
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "submit", kill)
        done = spkd(*given, "cache=killed", "workers=2", "batch_size=8")
    assert done.code == 1
    (line,) = done.err.splitlines()
    reason = "killed: most likely memory ran out and the system ended it; lower workers=2 or batch_size=8, and"
    reason = "ended by SIGSEGV;" if kill is end_by_a_fault else reason
    assert line == f"error: a process that loads audio was {reason} start the same command again"
    spkd(*given, "cache=killed", "workers=2", "batch_size=8").ok()
    shards = sorted(path.relative_to("whole") for path in Path("whole/fbank/c").rglob("*") if path.is_file())
    assert len(shards) == 9
    for path in shards:
        assert Path("killed", path).read_bytes() == Path("whole", path).read_bytes()


def load_for_ever(path: str) -> None:
    """Load by two processes, whose numbers are printed."""
    loader.AFTER = -1.0
    manifest = Manifest.load(path)
    plan = ViewPlan.parse(ViewConfig())
    given = ViewLoader(manifest, plan.views(manifest), plan)
    groups = ((0, np.arange(len(manifest))) for _ in iter(int, 1))
    for _, batch in stream_batches(given, groups, 4, 2, print, features=features):
        if batch is not None and (pids := set(batch.features["process"].ravel().tolist()) - {os.getpid()}):
            print(*pids, flush=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_extraction_whose_loaders_are_stopped_can_be_interrupted(
    corpus: Path, extraction: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    save_teacher(tmp_path / "teacher")
    running = processes.Running(extract_beside_stopped, *extraction, "view=crops:9,1", "workers=2", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while "stopped" not in running.printed():
        assert running.returncode is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    out, error = running.communicate(10)
    assert (running.returncode, error.count("\n")) == (130, 1), error
    assert error.startswith("error: interrupted;")
    assert not any(is_running(pid) for pid in out.partition("stopped ")[2].split("\n")[0].split())


def extract_at_once(*arguments: str) -> None:
    """The command line where no page of /dev/shm is left, with processes from the first batch on."""
    loader.AFTER = -1.0
    with_shared_memory(0, *arguments)


def test_full_shared_memory_stops_no_extraction(corpus: Path, extraction: list[str], tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    out, error = processes.Running(extract_at_once, *extraction, "workers=2", cwd=tmp_path).communicate()
    if "made" not in out:
        pytest.skip("no mounts here")
    assert error == ""
    assert "note: no processes could be started to load audio ([Errno 28] No space left on device); threads load" in out
    assert "18 views extracted, 0 rejected; complete" in out


def extract_with_few_descriptors(*arguments: str) -> None:
    """The command line, which has no descriptor left once it waits for the first job of its processes."""
    loader.AFTER = -1.0
    Processes.are_ready = property(lambda self: self._started.result() is None)  # type: ignore[assignment]

    def submit(self: Processes, job: object) -> object:
        begun, (_, most) = SUBMIT(self, job), resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
        with contextlib.suppress(OSError):
            while True:
                os.dup(1)
        return begun

    Processes.submit = submit  # type: ignore[assignment]
    processes.command(*arguments)


def test_few_descriptors_are_named(corpus: Path, extraction: list[str], tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    running = processes.Running(extract_with_few_descriptors, *extraction, "workers=2", cwd=tmp_path)
    _, error = running.communicate()
    assert running.returncode == 1
    assert error == "error: too many open files; raise the limit (ulimit -n 65536) and run the same command again\n"


UNGUARDED = """
import sys
from spkd import config
from spkd.corpus import loader
from spkd.extract.launch import extract_all
from spkd.extract.settings import ExtractConfig
loader.AFTER = -1.0
extract_all([config.load(ExtractConfig, sys.argv[1:], environ={})])
print("done")
"""


@pytest.mark.slow
def test_a_script_without_a_guard_extracts_once(corpus: Path, extraction: list[str], tmp_path: Path) -> None:
    """Its processes import it, and begin no extraction of their own."""
    save_teacher(tmp_path / "teacher")
    (tmp_path / "script.py").write_text(UNGUARDED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    given = [sys.executable, "script.py", *extraction[1:], "workers=2", "view=crops:20,1"]
    done = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("done\n")) == (0, 1), done.stderr
    assert 'put what the script does under `if __name__ == "__main__":`' in done.stderr


def extract_beside_stopped(*arguments: str) -> None:
    """The command line, whose processes stop with their first job."""
    loader.AFTER = -1.0
    Processes.are_ready = property(lambda self: self._started.result() is None)  # type: ignore[assignment]

    def submit(self: Processes, job: object) -> object:
        for process in self._all():
            os.kill(process.pid, signal.SIGSTOP)  # type: ignore[arg-type]
        print("stopped", *(process.pid for process in self._all()), flush=True)
        return SUBMIT(self, job)

    Processes.submit = submit  # type: ignore[assignment]
    processes.command(*arguments)


@pytest.mark.slow
def test_processes_end_with_a_parent_that_was_killed(corpus: Path) -> None:
    running, started = processes.Running(load_for_ever, str(corpus / "manifest.csv")), time.monotonic()
    while len(pids := set(running.printed().split())) < 2:
        assert running.returncode is None
        assert time.monotonic() < started + 120, running.printed()
        time.sleep(0.05)
    running.kill()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    """Whether a process is there, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("at_once")
def test_processes_share_the_copies_of_audio_elsewhere(
    web: tuple[str, type[Ranges]], manifest: Manifest, tmp_path: Path
) -> None:
    rows = []
    for utterance in manifest:
        name = utterance.id.replace("/", "-") + Path(utterance.path).suffix
        (tmp_path / "web" / name).write_bytes(Path(utterance.path).read_bytes())
        rows.append(replace(utterance, path=f"{web[0]}/{name}?token=secret"))
    there, plan = Manifest(rows), ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0, 1.1]))
    here = ViewLoader(manifest, plan.views(manifest), plan)
    (tmp_path / "copies").mkdir()
    fetched.use(Copies(tmp_path / "copies", 10**9))
    try:
        given = ViewLoader(there, plan.views(there), plan)
        assert processes_pay(given, 2)
        together, _ = streamed(given, 2, False)
    finally:
        fetched.use(None)
    for (_, one), (_, other) in zip(streamed(here, 1, False)[0], together, strict=True):
        assert one is None or (other is not None and torch.equal(other.waves, one.waves))
    assert len(list((tmp_path / "copies").glob("*.copy"))) == len(manifest)
    assert sum(length for _, length in web[1].asked if length > 1) == sum(
        path.stat().st_size for path in (tmp_path / "web").iterdir()
    )


@pytest.mark.parametrize(
    ("path", "with_copies", "pays"),
    [
        ("/data/a.flac", False, True),
        ("/data/a.tar#512+100.flac", False, True),
        ("https://host/a.flac", False, False),
        ("s3://bucket/a.tar#512+100.flac", False, False),
        ("/data/a.parquet#3+0.flac.row", False, False),
        ("s3://bucket/a.tar#512+100.flac", True, True),
        ("/data/a.parquet#3+0.flac.row", True, True),
    ],
)
def test_processes_load_what_lies_here(
    path: str, with_copies: bool, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "usable", lambda: 2)
    plan = ViewPlan.parse(ViewConfig())
    there = Manifest((Utterance("here", "/data/b.flac", "s", 1.0), Utterance("a", path, "s", 1.0)))
    given = ViewLoader(there, plan.views(there), plan)
    fetched.use(Copies(tmp_path, 1000) if with_copies else None)
    try:
        assert processes_pay(given, 2) == pays
    finally:
        fetched.use(None)
    assert not processes_pay(given, 1)


SHAPES = [(3, 5), (0, 4), (2, 3, 4)]


@pytest.mark.parametrize("has_memory_files", [True, False])
def test_arrays_are_passed_to_the_bit(has_memory_files: bool) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        for shape, there in zip(SHAPES, pool.submit(passed, has_memory_files).result(), strict=True):
            assert there.dtype == np.float32
            assert np.array_equal(there, numbers(shape))
            there += 1  # it is the receiver's own


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def passed(has_memory_files: bool) -> list[Passed]:
    if not has_memory_files:  # macOS
        del os.memfd_create
    return [Passed(numbers(shape)) for shape in SHAPES]


@pytest.mark.usefixtures("at_once")
def test_what_a_process_is_given_does_not_grow_with_the_corpus(manifest: Manifest) -> None:
    utterances = [replace(u, id=f"{n}-{u.id}", path=f"/{n}/{u.path}") for n in range(500) for u in manifest]
    many, plan = Manifest(utterances), ViewPlan.parse(ViewConfig())
    given = ViewLoader(many, plan.views(many), plan)
    assert len(pickle.dumps(given)) > 500_000
    assert len(pickle.dumps(loader._InProcess(given, None, 2))) < 10_000
    assert len(pickle.dumps(loader._Job(*given.part(np.arange(100, 132)), (32,)))) < 20_000
