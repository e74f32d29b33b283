from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spkd.corpus.people import Names, People
from spkd.errors import SpkdError
from spkd.students import Checkpoint, build, save_student
from spkd.students.description import Description, Training
from tests.foreign import FOREIGN, changed


def test_every_changed_value_is_a_line_that_names_file_and_field(tmp_path: Path) -> None:
    """Wrong types, nulls, huge numbers, NaN, lone surrogates and missing names, at every place of the tree."""
    people = People(Names.of(["ann"]), Names.of(["u1"]))
    training = Training({"losses": {"aam": {}}, "caches": ["f"], "batch_size": 4}, 5, {"aam": 0.5}, people=people)
    save_student(tmp_path, Checkpoint(build("tiny", channels=16, embedding=8), training=training))
    path = tmp_path / "model.json"
    tree = json.loads(path.read_text())
    assert Description.read(path).training == training
    count = 0
    for field, damaged in changed(tree):
        path.write_text(json.dumps(damaged))
        with pytest.raises(SpkdError) as caught:
            Description.read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value).splitlines()) == 1, field
        count += 1
    assert count > 15 * len(FOREIGN), count


@pytest.mark.parametrize("settings", [{"losses": {"aam": 3}}, {"losses": ["aam"]}, {"caches": [1]}])
def test_settings_that_no_training_has_are_a_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_student(tmp_path, Checkpoint(build("tiny", channels=16, embedding=8), training=Training(settings)))
    with pytest.raises(SpkdError, match=r"model.json: training: settings: damaged"):
        Description.read(tmp_path / "model.json")
