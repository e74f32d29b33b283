"""What stays of a run: settings, environment, curves, other loggers."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd import config
from spkd.errors import SpkdError, UsageError
from spkd.students.curves import read_curves
from spkd.train.log import RunLog
from spkd.train.record import RunRecord, _commit_of
from spkd.train.settings import TrainConfig
from spkd.train.speed import Speed
from tests.conftest import CommandLine
from tests.foreign import changed

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6"]


@pytest.fixture
def cached(spkd: CommandLine, corpus: Path) -> None:
    spkd.once("cache", "extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}")


def test_settings_come_back_from_their_file(tmp_path: Path) -> None:
    given = ["loss=[aam,kld]", "loss.kld.temperature=2", "loss.aam.margin_warmup=[0.1,0.2]", "loss.weights.aam=0.5"]
    given += ["cache=[a,b]", "optim.lr=0.01", "student=ecapa", "mask.frames=3", "valid.trials=t.txt"]
    first = config.load(TrainConfig, given, environ={})
    (tmp_path / "run.yaml").write_text(config.dump(first))
    again = config.load(TrainConfig, [], tmp_path / "run.yaml", environ={})
    assert first == again
    assert again.loss.settings["kld"].temperature == 2.0


@pytest.mark.usefixtures("cached")
def test_a_run_leaves_what_repeats_it(spkd: Callable) -> None:
    spkd("train", "--loss", "aam", "--loss", "ntxent", "loss.aam.margin=0.1", *SMALL, "steps=45", "out=run").ok()
    tree = json.loads(Path("run/run.json").read_text())
    assert tree["versions"].keys() == {"spkd", "python", "torch", "numpy"}
    assert list(tree["caches"]) == ["cache"]
    assert len(tree["code"]) == 64
    spkd("train", "--from", "run", "out=again").ok()
    assert Path("run/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert "this run is finished already" in spkd("train", "--from", "run").out
    page = Path("run/train.html").read_text()
    assert page.count("<svg") == 3  # aam, ntxent, lr
    assert "margin: 0.1" in page
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert read_curves("run")["aam"] == tuple((line["step"], line["aam"]) for line in lines)
    assert "no training was there" in spkd("train", "--from", "nothing").err
    settings = Path("run/run.yaml").read_text()
    Path("run/run.yaml").write_text(settings.replace("steps: 45", "steps: 41"))
    done = spkd("train", "--from", "run", "out=other")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "run/run.yaml: changed since the training" in done.err
    spkd("train", "--config", "run/run.yaml", "out=other").ok()


@pytest.mark.usefixtures("cached")
def test_a_repeated_run_takes_nothing_from_files_and_variables(spkd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["--loss", "aam", *SMALL, "steps=2"]
    spkd("train", *run, "optim.lr=0.002", "out=a").ok()
    Path("spkd.yaml").write_text("seed: 3\ntrain: {optim: {lr: 0.1}, crop: 0.5}\n")
    monkeypatch.setenv("SPKD_MASK__FRAMES", "3")
    done = spkd("train", "--from", "a", "out=b").ok()
    assert "note: left out spkd.yaml and SPKD_MASK__FRAMES: --from repeats the run" in done.out
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    done = spkd("train", "--from", "a", "--config", "spkd.yaml", "out=c")
    assert (done.code, "--config and --from: choose one" in done.err) == (2, True)


def test_the_commit_is_read_from_the_files_of_git(tmp_path: Path) -> None:
    def git(*arguments: object, cwd: Path = tmp_path / "repo") -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()

    repo, other = tmp_path / "repo", tmp_path / "other"
    repo.mkdir()
    assert _commit_of(repo) is None
    git("init", "-q", "-b", "main")
    assert _commit_of(repo) is None  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "one")
    assert _commit_of(repo) == git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    assert not (repo / ".git/refs/heads/main").exists()
    assert _commit_of(repo) == git("rev-parse", "HEAD")
    git("worktree", "add", "-q", "-b", "feature/x", other)
    git("commit", "-q", "--allow-empty", "-m", "two", cwd=other)
    assert _commit_of(other) == git("rev-parse", "HEAD", cwd=other) != _commit_of(repo)
    git("checkout", "-q", "--detach", cwd=other)
    assert _commit_of(other) == git("rev-parse", "feature/x")


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", ["run.lock", "log.jsonl", "run.json", "train.html", "model.safetensors"])
def test_links_in_the_folder_of_a_run_are_not_written_through(spkd: Callable, name: str) -> None:
    Path("precious").write_text("kept")
    Path("run").mkdir()
    Path("run", name).symlink_to("../precious")
    done = spkd("train", "--loss", "aam", *SMALL, "steps=2", "out=run")
    assert Path("precious").read_text() == "kept"
    assert (done.code, done.err.count("\n")) == (1 if name == "run.lock" else 2, 1), done.err
    reason = "a symbolic link, which is not written through" if name == "run.lock" else "would be replaced"
    assert f"{name}: {reason}" in done.err
    # The folder itself may be a link.
    Path("elsewhere").mkdir()
    Path("link").symlink_to("elsewhere")
    spkd("train", "--loss", "aam", *SMALL, "steps=2", "out=link").ok()
    assert Path("elsewhere/model.json").is_file()


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("folder", ["best", "tensorboard"])
def test_a_linked_folder_within_that_of_a_run_is_refused(spkd: Callable, folder: str) -> None:
    Path("theirs").mkdir()
    Path("run").mkdir()
    Path("run", folder).symlink_to("../theirs")
    done = spkd("train", "--loss", "aam", *SMALL, "steps=2", "out=run")
    message = f"error: run/{folder}: a symbolic link, which is not written through; remove it\n"
    assert (done.code, done.err) == (1, message)
    assert not list(Path("theirs").iterdir())


def test_tensorboard_shows_this_run_alone_and_no_file_is_removed(tmp_path: Path) -> None:
    """As its own reader finds the values after a run, another in the same folder, and one that is gone on with."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    theirs = tmp_path / "tensorboard" / "thesis" / "events.out.tfevents.1"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("42")
    for first, values, shown in (
        (0, [1, 2, 3], [(0, 1), (1, 2), (2, 3)]),
        (0, [4, 5], [(0, 4), (1, 5)]),
        (1, [6, 7], [(0, 4), (1, 6), (2, 7)]),
    ):
        log = RunLog(tmp_path, first, names=["tensorboard"])
        for step, value in enumerate(values, first):
            log.add(step, {"aam": value})
        log.close()
        found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [(event.step, event.value) for event in found.Scalars("aam")] == shown
    assert theirs.read_text() == "42"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_values_by_their_interface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """A module with the functions that both packages document, since neither may reach its server here."""
    called: list[tuple] = []
    module = types.ModuleType(name)
    module.init = lambda **given: called.append(("init", given["project"], given["resume"]))  # type: ignore[attr-defined]
    module.log = lambda values, step: called.append(("log", values, step))  # type: ignore[attr-defined]
    module.finish = lambda: called.append(("finish",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    log = RunLog(tmp_path, 0, names=[name])
    log.add(20, {"aam": 1.5})
    log.close()
    assert called == [("init", "spkd", "never"), ("log", {"aam": 1.5}, 20), ("finish",)]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"loggers: {name} is not installed"):
        RunLog(tmp_path, 0, names=[name])


@pytest.mark.usefixtures("cached")
def test_a_sweep_goes_on_after_a_failure_and_says_so(spkd: Callable) -> None:
    varied = ["student=xvector,tiny", "optim.lr=0.01,1e12"]
    done = spkd("train", "-m", "--loss", "aam", *SMALL, "steps=9", "optim.warmup=0", "optim.clip=0", *varied, "out=s")
    assert done.code == 1
    results = json.loads(done.out.splitlines()[-1])
    assert [("error" in one) for one in results] == [False, True, False, True]
    assert results[0]["out"] == "s/student=xvector,optim.lr=0.01"
    assert Path("s/student=tiny,optim.lr=0.01/model.safetensors").is_file()
    done = spkd("train", "--loss", "aam", *SMALL, "steps=3", "out=one", "--json")
    assert json.loads(done.out.splitlines()[-1])["parameters"] > 0


def test_every_changed_value_of_the_record_is_a_line_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    first = RunRecord(
        *(("--loss", "aam"), "2026", "h", "cpu", {"spkd": "1"}, None, "c0de", {"c": "f"}, "d1"),
        contents={"labels": "d2"},
        speed=Speed(9.0, 0.1, 1.5),
    )
    first.write(path)
    assert RunRecord.read(path) == first
    for field, damaged in changed(json.loads(path.read_text())):
        path.write_text(json.dumps(damaged))
        with pytest.raises(SpkdError) as caught:
            RunRecord.read(path)
        assert str(caught.value).startswith(f"{path}: "), field
        assert len(str(caught.value).splitlines()) == 1, field
