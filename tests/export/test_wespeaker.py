from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from spkd.corpus.manifest import Manifest
from spkd.corpus.people import Names, People
from spkd.errors import SpkdError
from spkd.outputs.features import FBANKS
from spkd.students import Checkpoint, Training, build, load_student, save_student
from spkd.teachers import load_teacher
from spkd.teachers.settings import FrontEndSettings, ModelConfig


@pytest.mark.parametrize(("name", "channels", "theirs"), [("resnet34", 32, "ResNet34"), ("campplus", 128, "CAMPPlus")])
def test_what_is_written_loads_as_wespeakers(
    spkd: Callable, corpus: Path, name: str, channels: int, theirs: str
) -> None:
    """As a teacher of that toolkit, which is compared with the toolkit's own code elsewhere."""
    torch.manual_seed(0)
    network = build(name, channels=channels, embedding=16).eval()
    network.take(FBANKS["wespeaker"])
    save_student("s", Checkpoint(network))
    done = spkd("export", "s", "--to", "wespeaker", "out=w")
    assert done.code == 0, done.err
    student, exported, last = done.out.splitlines()
    assert (student.split()[0], last) == ("student", "w: written")
    assert exported.startswith("wespeaker ")
    assert exported.endswith("cosine with the student 1.000000")
    assert yaml.safe_load(Path("w/config.yaml").read_text())["model"] == theirs
    state = torch.load("w/avg_model.pt", weights_only=True)
    assert set(state) == set(load_student("s").network.state_dict())
    lines = [f"{i},{corpus}/audio/spk{i}/u0.flac,s{i}\n" for i in range(2)]
    Path("m.csv").write_text("utt,path,speaker\n" + "".join(lines))
    for model, out in ((["model=s"], "a.npy"), (["model=wespeaker", "model.weights=w"], "b.npy")):
        spkd("embed", "m.csv", *model, f"out={out}").ok()
    assert np.abs(np.load("a.npy") - np.load("b.npy")).max() < 1e-5


def test_an_export_below_its_student_has_its_training(spkd: Callable) -> None:
    network = build("resnet34", channels=32, embedding=16).eval()
    network.take(FBANKS["wespeaker"])
    people = People(Names.of(["spk0", "spk1", "someone"]))
    save_student("s", Checkpoint(network, training=Training(people=people)))
    spkd("export", "s", "to=wespeaker").ok()
    shutil.copytree("s/wespeaker", "away/wespeaker")
    shutil.copytree("s", "further")
    state = torch.load("s/wespeaker/avg_model.pt", weights_only=True)
    torch.save({name: values + 0.01 for name, values in state.items()}, "further/wespeaker/avg_model.pt")
    Path("further/wespeaker/export.json").unlink()
    expected = {"s": (people, False), "away": (None, True), "further": (None, False)}  # the last is somebody else's
    for place, (known, is_lost) in expected.items():
        config = ModelConfig("wespeaker", f"{place}/wespeaker", settings=FrontEndSettings())
        teacher = load_teacher(config, torch.device("cpu"))
        assert (teacher.training and teacher.training.people, teacher.training_lost) == (known, is_lost)


@pytest.mark.parametrize("name", ["avg_model.pt", "config.yaml", "export.json"])
def test_a_damaged_export_is_refused(spkd: Callable, name: str) -> None:
    """Without its record it would have other features, and one flipped bit of its weights makes embeddings NaN."""
    save_student("s", Checkpoint(build("resnet34", channels=32, embedding=16).eval()))
    spkd("export", "s", "to=wespeaker", "out=w").ok()
    path = Path("w", name)
    data = path.read_bytes()
    changed = (
        data.replace(b"kaldi", b"other") if name == "export.json" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    )
    assert changed != data
    path.write_bytes(changed)
    message = "damaged" if name == "export.json" else f"w/{name}: not the file that export.json describes: damaged"
    with pytest.raises(SpkdError, match=message):
        load_teacher(ModelConfig("wespeaker", "w", settings=FrontEndSettings()), torch.device("cpu"))


@pytest.mark.slow
def test_a_student_that_begins_as_an_export_knows_on_whom_that_was_trained(
    spkd: Callable, corpus: Path, tmp_path: Path
) -> None:
    network = build("resnet34", channels=32, embedding=16).eval()
    people = People(Names.of(["spk4", "spk5"]))
    save_student("s", Checkpoint(network, training=Training(people=people)))
    spkd("export", "s", "to=wespeaker").ok()
    shutil.copytree("s/wespeaker", "away/wespeaker")
    every = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(every[:12]).save("train.csv")
    Manifest(every[12:]).save("test.csv")
    Path("trials.txt").write_text(f"1 {every[12].id} {every[13].id}\n0 {every[12].id} {every[16].id}\n")
    spkd("extract", "teacher=none", "manifest=train.csv", "fbank=true").ok()
    small = ["--loss", "ntxent", "student=resnet34", "student.embedding=16", "steps=1", "batch_size=2", "crop=0.5"]
    expected = {
        "s": "The student was trained on 2 of the 2 speakers of trials.txt (spk4, spk5)",
        "away": "Whether the student was trained on speakers of trials.txt is not known: it began as an exported",
    }
    for place, note in expected.items():
        spkd("train", *small, f"student.init={place}/wespeaker/avg_model.pt", f"out={place}.out").ok()
        done = spkd("eval", "trials.txt", "manifest=test.csv", f"model={place}.out", "bootstrap=0", f"out={place}.eval")
        assert note in done.ok().out


def test_other_features_are_remarked_and_kept(spkd: Callable, corpus: Path) -> None:
    torch.manual_seed(0)
    save_student("s", Checkpoint(build("resnet34", channels=32, embedding=16).eval()))
    Path("m.csv").write_text(f"utt,path\na,{corpus}/audio/spk0/u0.flac\nb,{corpus}/audio/spk1/u0.flac\n")
    assert "trained on those of kaldi" in spkd("export", "s", "to=wespeaker").out
    for model, out in ((["model=s"], "a.npy"), (["model=wespeaker", "model.weights=s/wespeaker"], "b.npy")):
        spkd("embed", "m.csv", *model, f"out={out}").ok()
    assert np.abs(np.load("a.npy") - np.load("b.npy")).max() < 1e-5
    assert "the network alone, which takes fbank" in spkd("export", "s", "to=wespeaker", "waveform=true").err
