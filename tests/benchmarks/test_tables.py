"""The tables of README and docs are those that the kept results give."""

from __future__ import annotations

import importlib
import json
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


@pytest.mark.parametrize(("name", "seeds"), [("papers", 3), ("recipe", 2)])
def test_runs_are_found_under_their_settings_of_today(tables: ModuleType, name: str, seeds: int) -> None:
    """A setting that is renamed, and no run with it, would have every student trained again for the next table."""
    module, papers = importlib.import_module(name), importlib.import_module("papers")
    runs = json.loads((ROOT / "benchmarks" / "results" / f"{name}_runs.json").read_text())
    nowhere = Path()
    study = papers.Study(nowhere, nowhere, nowhere, {}, module.METHODS, module.CACHES, papers.Runs(nowhere))
    keys = {method: study.key(method) for method in module.METHODS}
    found = {method: sum(f"{key}-{seed}" in runs for seed in range(seeds)) for method, key in keys.items()}
    once = {"wide"} & found.keys()  # the teacher of others
    # Frames of the x-vector in eight bytes have not been run yet.
    later = {method for method in found if method.startswith("x-vector_")}
    assert dict.fromkeys(later, 0) == {method: found[method] for method in later}
    assert {method: found[method] for method in found.keys() - later} == {
        method: 1 if method in once else seeds for method in found.keys() - later
    }
