from __future__ import annotations

import pytest

from spkd import config
from spkd.errors import UsageError
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

    def load(keys: list[str]) -> TrainConfig:
        return config.load(TrainConfig, keys, environ={"SPKD_OUT": "runs"} if "seed=1" in keys else {})

    assert [run.out for run in runs_of(given, load)] == [f"sweep/{name}" for name in names]
    assert [run.out for run in runs_of([*given, "out=here"], load)] == [f"here/{name}" for name in names]
    assert [run.out for run in runs_of([*given, "seed=1"], load)] == [f"runs/{name}" for name in names]
    assert [run.optim.lr for run in runs_of(given, load)] == [0.1, 0.2, 0.1, 0.2]


def test_nothing_that_varies_and_too_much_are_refused() -> None:
    with pytest.raises(UsageError, match="no setting has several values"):
        list(combinations(["steps=3"]))
    with pytest.raises(UsageError, match="at most 10,000"):
        list(combinations([f"k{i}={','.join('0123456789')}" for i in range(5)]))
