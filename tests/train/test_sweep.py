from __future__ import annotations

import pytest

from spkd.errors import UsageError
from spkd.train.sweep import combinations


def test_every_combination_has_a_folder_of_its_own() -> None:
    found = list(combinations(["cache=[a,b]", "student=xvector,tiny", "optim.lr=0.1,0.2", "out=runs"]))
    assert [keys[-1] for keys in found] == [
        "out=runs/student=xvector,optim.lr=0.1",
        "out=runs/student=xvector,optim.lr=0.2",
        "out=runs/student=tiny,optim.lr=0.1",
        "out=runs/student=tiny,optim.lr=0.2",
    ]
    assert found[0][:-1] == ["cache=[a,b]", "student=xvector", "optim.lr=0.1"]


def test_nothing_that_varies_and_too_much_are_refused() -> None:
    with pytest.raises(UsageError, match="no setting has several values"):
        list(combinations(["steps=3"]))
    with pytest.raises(UsageError, match="at most 10,000"):
        list(combinations([f"k{i}={','.join('0123456789')}" for i in range(5)]))
