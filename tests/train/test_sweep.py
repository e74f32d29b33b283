from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd import config
from spkd.errors import UsageError
from spkd.students import Checkpoint, build, save_student
from spkd.train.settings import TrainConfig
from spkd.train.sweep import combinations, runs_of


def test_every_combination_has_a_folder_of_its_own() -> None:
    given = ["cache=[a,b]", "student=xvector,tiny", "optim.lr=0.1,0.2"]
    names = [
        "student=xvector,optim.lr=0.1",
        "student=xvector,optim.lr=0.2",
        "student=tiny,optim.lr=0.1",
        "student=tiny,optim.lr=0.2",
    ]

    def load(keys: list[str], left_out: dict[str, str]) -> TrainConfig:
        environ = {"SPKD_OUT": "runs"} if "seed=1" in keys else {}
        return config.load(TrainConfig, keys, environ=environ, left_out=left_out)

    assert [run.out for run in runs_of(given, load)] == [f"sweep/{name}" for name in names]
    assert [run.out for run in runs_of([*given, "out=here"], load)] == [f"here/{name}" for name in names]
    assert [run.out for run in runs_of([*given, "seed=1"], load)] == [f"runs/{name}" for name in names]
    assert [run.optim.lr for run in runs_of(given, load)] == [0.1, 0.2, 0.1, 0.2]


def test_nothing_that_varies_and_too_much_are_refused() -> None:
    with pytest.raises(UsageError, match="no setting has several values"):
        list(combinations(["steps=3"]))
    with pytest.raises(UsageError, match="at most 10,000"):
        list(combinations([f"k{i}={','.join('0123456789')}" for i in range(5)]))
    with pytest.raises(UsageError, match="two runs would have that folder"):
        list(combinations(["student.init=a/b,a_b"]))
    with pytest.raises(UsageError, match="an empty value between commas"):
        list(combinations(["loss=aam,"]))
    with pytest.raises(UsageError, match="over 255 bytes"):
        list(combinations([f"student.init={'a' * 250},b"]))


def test_commas_in_brackets_separate_no_runs() -> None:
    found = [keys[0] for keys, _ in combinations(["loss=[aam,mse],[aam],cosine"])]
    assert found == ["loss=[aam,mse]", "loss=[aam]", "loss=cosine"]


def test_a_setting_acts_where_its_component_is_used(spkd: Callable, corpus: Path) -> None:
    """Of a component, and of the losses, which a run knows only with its cache."""
    save_student("teacher", Checkpoint(build("tiny", channels=8, embedding=6)))
    teacher = ["teacher=checkpoint", "teacher.weights=teacher"]
    spkd("extract", *teacher, f"manifest={corpus / 'manifest.csv'}", "fbank=true").ok()
    small = ["steps=1", "batch_size=4", "crop=0.5", "student.channels=8", "student.embedding=6", "loggers=[]"]
    train = ["train", "-m", "student=tiny", "loss=cosine", "optim=sgd,adamw", *small]
    done = spkd(*train, "optim.sgd.nesterov=false").ok()
    assert "note: optim.sgd.nesterov=false acts in 1 of 2 runs; in the others optim=sgd is not in use" in done.out
    assert "nesterov: false" in Path("sweep/optim=sgd/run.yaml").read_text()
    assert "nesterov" not in Path("sweep/optim=adamw/run.yaml").read_text()
    shutil.rmtree("sweep")
    # What only the losses use, which are known with the cache.
    mined = ["mining.negatives=2", "loss.contrastive.ceiling=2"]
    done = spkd("train", "-m", "loss=[contrastive,mse],cosine", "student=tiny", *small, *mined).ok()
    assert "note: mining.negatives=2 acts in 1 of 2 runs; in the others only contrastive takes hard" in done.out
    assert "negatives: 2" in Path("sweep/loss=[contrastive,mse]/run.yaml").read_text()
    assert "mining" not in Path("sweep/loss=cosine/run.yaml").read_text()
    shutil.rmtree("sweep")
    # Refused before the first run: what acts in none, and a run that is there twice.
    for more, error in (
        (["student.ssl.layers=2"], "student.ssl.layers=2 has no effect: student=ssl is not in use"),
        (["mining.negatives=2"], "mining.negatives=2 has no effect: only contrastive takes hard negatives"),
        (["optim.lr=0.01,1e-2"], "optim.lr=0.01 and sweep/optim=sgd,optim.lr=1e-2 are the same run"),
        (["optim.sgd.nesterov=false,true"], "are the same run"),
    ):
        done = spkd(*train, *more)
        assert (done.code, error in done.err) == (2, True), done.err
        assert not Path("sweep").exists()
