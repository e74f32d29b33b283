"""What stays of a run: settings, environment, curves, other loggers."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd import config
from spkd.errors import SpkdError, UsageError
from spkd.students.curves import read_curves
from spkd.train.log import RunLog
from spkd.train.record import RunRecord, Speed
from spkd.train.settings import TrainConfig
from tests.foreign import changed

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6"]


@pytest.fixture
def cached(spkd: Callable, corpus: Path) -> None:
    assert spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}").code == 0


def test_settings_come_back_from_their_file(tmp_path: Path) -> None:
    given = ["loss=[aam,kld]", "loss.kld.temperature=2", "loss.aam.margin_warmup=[0.1,0.2]", "loss.weights.aam=0.5"]
    given += ["cache=[a,b]", "optim.lr=0.01", "student=ecapa", "mask.frames=3", "valid.trials=t.txt"]
    first = config.load(TrainConfig, given, environ={})
    (tmp_path / "run.yaml").write_text(config.dump(first))
    again = config.load(TrainConfig, [], environ={}, base=tmp_path / "run.yaml")
    assert first == again
    assert again.loss.settings["kld"].temperature == 2.0


@pytest.mark.usefixtures("cached")
def test_a_run_leaves_what_repeats_it(spkd: Callable) -> None:
    done = spkd("train", "--loss", "aam", "--loss", "ntxent", "loss.aam.margin=0.1", *SMALL, "steps=45", "out=run")
    assert done.code == 0, done.err
    tree = json.loads(Path("run/run.json").read_text())
    assert tree["versions"].keys() == {"spkd", "python", "torch", "numpy"}
    assert list(tree["caches"]) == ["cache"]
    assert spkd("train", "--from", "run", "out=again").code == 0
    assert Path("run/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert "this run is finished already" in spkd("train", "--from", "run").out
    page = Path("run/train.html").read_text()
    assert page.count("<svg") == 3  # aam, ntxent, lr
    assert "margin: 0.1" in page
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert read_curves("run")["aam"] == tuple((line["step"], line["aam"]) for line in lines)
    assert "no training was there" in spkd("train", "--from", "nothing").err


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_values_by_their_interface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """A module with the functions that both packages document, since neither may reach its server here."""
    called: list[tuple] = []
    module = types.ModuleType(name)
    module.init = lambda **given: called.append(("init", given["project"], given["resume"]))  # type: ignore[attr-defined]
    module.log = lambda values, step: called.append(("log", values, step))  # type: ignore[attr-defined]
    module.finish = lambda: called.append(("finish",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    log = RunLog(tmp_path, 0, [name])
    log.add(20, {"aam": 1.5})
    log.close()
    assert called == [("init", "spkd", "never"), ("log", {"aam": 1.5}, 20), ("finish",)]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"loggers: {name} is not installed"):
        RunLog(tmp_path, 0, [name])


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
    first = RunRecord(("--loss", "aam"), "2026", "h", "cpu", {"spkd": "1"}, None, {"c": "f"}, Speed(9.0, 0.1, 1.5))
    first.write(path)
    assert RunRecord.read(path) == first
    for field, damaged in changed(json.loads(path.read_text())):
        path.write_text(json.dumps(damaged))
        with pytest.raises(SpkdError) as caught:
            RunRecord.read(path)
        assert str(caught.value).startswith(f"{path}: "), field
        assert len(str(caught.value).splitlines()) == 1, field
