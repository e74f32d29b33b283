"""The tables of README and docs are those that the kept results give."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def test_tables_are_those_of_the_results(tables: ModuleType) -> None:
    changed = [str(path) for path in tables.texts() if path.read_text() != tables.written(path)]
    assert not changed, "python benchmarks/tables.py writes them"


def test_every_benchmark_has_a_result_with_its_date(tables: ModuleType) -> None:
    assert all({"date", "commit", "minutes"} <= tables.record.kept(name).keys() for name in tables.BENCHMARKS)
