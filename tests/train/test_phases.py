"""How a run goes on and ends: phases, epochs, more steps, signals, validation; through the real command line."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from spkd import config
from spkd.corpus.augment import bank
from spkd.corpus.manifest import Manifest
from spkd.corpus.people import Names, People
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.files.atomic import machine_id
from spkd.students import Checkpoint, Training, build, load_student, save_student
from spkd.teachers import load_teacher
from spkd.train import trainer
from spkd.train.log import RunLog
from spkd.train.settings import TrainConfig
from spkd.train.step import Optimisation
from tests import processes
from tests.conftest import CommandLine, save_teacher

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6"]


@pytest.fixture
def cached(spkd: CommandLine, corpus: Path, tmp_path: Path) -> None:
    """cache of four speakers; valid.csv and valid.txt of the two others."""
    every = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(every[:12]).save("train.csv")
    Manifest(every[12:]).save("valid.csv")
    pairs = itertools.combinations(every[12:], 2)
    Path("valid.txt").write_text("".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs))
    save_teacher(tmp_path / "teacher", 12)
    given = ["teacher=checkpoint", "teacher.weights=teacher", "manifest=train.csv", "fbank=true"]
    spkd.once("cache", "extract", *given, "view.speeds=[0.9,1.0]")


def logged(folder: str, name: str) -> dict[int, float]:
    lines = (json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(("more", "first"), [([], 4), (["large_margin.steps=6", "large_margin.crop=0.7"], 11)])
def test_weights_are_averaged_over_a_fraction_of_the_last_phase(
    spkd: Callable, monkeypatch: pytest.MonkeyPatch, more: list[str], first: int
) -> None:
    """Half of 8 steps; half of a second phase of 6 steps, and none of those before it."""
    seen = []
    step = Optimisation.step

    def recorded(run: Optimisation, *given: Any) -> Any:
        terms = step(run, *given)
        seen.append({name: values.double().clone() for name, values in run._module.network.state_dict().items()})
        return terms

    monkeypatch.setattr(Optimisation, "step", recorded)
    spkd("train", "--loss", "aam", *SMALL, "steps=8", "optim.warmup=0", "optim.swa_fraction=0.5", *more).ok()
    averaged = load_student("student").network.state_dict()
    for name, values in averaged.items():
        if values.is_floating_point():
            mean = sum(weights[name] for weights in seen[first:]) / len(seen[first:])
            assert torch.allclose(values.double(), mean, atol=1e-6), name


@pytest.mark.usefixtures("cached")
def test_a_second_phase_has_its_own_crops_margin_and_rate(spkd: Callable) -> None:
    given = ["steps=30", "large_margin.steps=20", "large_margin.crop=1.0", "optim.warmup=0"]
    spkd("train", "--loss", "aam", *SMALL, *given).ok()
    rates = logged("student", "lr")
    assert list(rates) == [0, 20, 40]
    assert rates[40] == pytest.approx(1e-4 * 0.25 ** (10 / 19))
    assert load_student("student").training.steps == 50


@pytest.mark.usefixtures("cached")
def test_epochs_stand_for_steps(spkd: Callable) -> None:
    spkd("train", "--loss", "cosine", *SMALL, "epochs=2.5").ok()
    assert load_student("student").training.steps == 10  # 24 views, 4 batches an epoch
    spkd("train", "--loss", "cosine", *SMALL, "epochs=2", "accumulate=2", "out=b").ok()
    assert load_student("b").training.steps == 4


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_run_of_constant_rate_can_be_continued_and_others_say_why_not(spkd: Callable) -> None:
    constant = ["--loss", "cosine", *SMALL, "optim.schedule=constant", "optim.warmup=5"]
    spkd("train", *constant, "steps=50", "out=whole").ok()
    spkd("train", *constant, "steps=40", "out=earlier").ok()
    spkd("train", *constant, "steps=20", "out=part").ok()
    done = spkd("train", *constant, "steps=50", "out=part").ok()
    assert "continuing part at step 20" in done.out
    assert Path("whole/model.safetensors").read_bytes() == Path("part/model.safetensors").read_bytes()
    assert logged("whole", "cosine") == logged("part", "cosine")
    # As a kill leaves it between the student and its state: the same command makes up for it.
    states = {path.name: path.read_bytes() for path in Path("whole").glob("state.*")}
    for name in states:
        Path("whole", name).unlink()
    for path in Path("earlier").glob("state.*"):
        shutil.copy(path, "whole")
    done = spkd("train", *constant, "steps=50", "out=whole")
    assert "continuing whole at step 40" in done.out, done.err
    assert {path.name: path.read_bytes() for path in Path("whole").glob("state.*")} == states
    assert "this run is finished already" in spkd("train", *constant, "steps=50", "out=whole").out
    spkd("train", "--loss", "cosine", *SMALL, "steps=20", "out=cosine").ok()
    done = spkd("train", "--loss", "cosine", *SMALL, "steps=50", "out=cosine")
    assert (done.code, "finished with steps=20, and its learning rate" in done.err) == (2, True)
    done = spkd("train", *constant, "steps=10", "out=part")
    assert "with other settings" in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_signal_saves_first_and_the_run_continues_exactly(spkd: Callable) -> None:
    """SIGUSR1, as Slurm sends it; the others have the same handler."""
    arguments = ["train", "--loss", "contrastive", *SMALL, "steps=200", "save_every=100000"]
    running = processes.spkd(*arguments, "out=cut")
    while not Path("cut/log.jsonl").is_file() or len(Path("cut/log.jsonl").read_text().splitlines()) < 2:
        assert running.returncode is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(signal.SIGUSR1)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert error.startswith("error: interrupted; cut was saved after step ")
    assert len(error.splitlines()) == 1
    spkd(*arguments, "out=cut").ok()
    spkd(*arguments, "out=whole").ok()
    assert Path("whole/model.safetensors").read_bytes() == Path("cut/model.safetensors").read_bytes()
    assert logged("whole", "contrastive") == logged("cut", "contrastive")


VALID = ["valid.trials=valid.txt", "valid.manifest=valid.csv", "valid.every=10"]


@pytest.mark.usefixtures("cached")
def test_validation_keeps_the_best_and_changes_nothing_else(spkd: Callable) -> None:
    spkd("train", "--loss", "cosine", *SMALL, "steps=35", "out=plain").ok()
    done = spkd("train", "--loss", "cosine", *SMALL, "steps=35", *VALID, "out=watched").ok()
    assert Path("plain/model.safetensors").read_bytes() == Path("watched/model.safetensors").read_bytes()
    rates = logged("watched", "valid_eer_percent")
    assert list(rates) == [9, 19, 29, 34]
    best = load_student("watched/best")
    step = best.training.steps - 1
    assert rates[step] == min(rates.values()) == best.training.valid_eer_percent
    assert load_student("watched").training.best.step == step + 1
    assert "lowest EER" in done.out
    # The list that chose the student is noted, in any order.
    Path("turned.txt").write_text("".join(reversed(Path("valid.txt").read_text().splitlines(keepends=True))))
    for trials in ("turned.txt", "valid.txt"):
        done = spkd("eval", trials, "manifest=valid.csv", "model=watched/best", "bootstrap=0")
        assert (done.code, f"chosen among others of its run by {trials}" in done.out) == (0, True)
    assert json.loads(Path("eval/report.json").read_text())["results"]["eer_percent"] == pytest.approx(rates[step])


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_rates_on_other_trials_are_not_compared(spkd: Callable) -> None:
    """Utterances against themselves have an EER of 0 whatever the student is."""
    names = sorted({name for line in Path("valid.txt").read_text().splitlines() for name in line.split()[1:]})
    differing = [line for line in Path("valid.txt").read_text().splitlines() if line.startswith("0")]
    Path("dev.txt").write_text("\n".join([*differing, *(f"1 {name} {name}" for name in names)]) + "\n")
    valid = ["valid.trials=dev.txt", *VALID[1:]]
    run = ["train", "--loss", "cosine", *SMALL, *valid, "optim.schedule=constant", "optim.lr=1e-9", "out=a"]
    assert "lowest EER 0.000 % after 10 steps" in spkd(*run, "steps=10").ok().out
    Path("dev.txt").write_text(Path("valid.txt").read_text())
    done = spkd(*run, "steps=10")
    assert (done.code, "dev.txt holds other trials than those that chose a/best" in done.err) == (2, True)
    done = spkd(*run, "steps=30").ok()
    assert "its lowest" not in done.out
    assert "their lowest EER, 0.000 % after 10 steps, does not count" in done.out
    rates = logged("a", "valid_eer_percent")
    best = load_student("a").training.best
    assert best.valid_eer_percent == min(rates[19], rates[29]) > 0
    assert load_student("a/best").training.steps == best.step


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_student_that_trials_chose_is_noted_on_others_of_the_same_people(spkd: Callable) -> None:
    spkd("train", "--loss", "cosine", *SMALL, "steps=10", *VALID, "out=watched").ok()
    Path("rest.txt").write_text("".join(Path("valid.txt").read_text().splitlines(keepends=True)[1:]))
    done = spkd("eval", "rest.txt", "manifest=valid.csv", "model=watched/best", "bootstrap=0").ok()
    assert "by trials (valid.trials) of 2 of the 2 speakers of rest.txt (spk4, spk5)" in done.out
    Manifest(tuple(replace(u, speaker=None) for u in Manifest.load("valid.csv"))).save("ids.csv")
    done = spkd("eval", "rest.txt", "manifest=ids.csv", "model=watched/best", "bootstrap=0", "out=ids").ok()
    assert "by trials (valid.trials) of 6 of the 6 utterances of rest.txt" in done.out


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_run_is_another_where_what_it_reads_is(spkd: Callable, tmp_path: Path) -> None:
    """Audio of noise, and weights to begin from, under the same names."""
    Path("noise").mkdir()
    noise = np.random.RandomState(0).randn(2, 16_000) / 10
    soundfile.write("noise/a.wav", noise[0], 16_000)
    fresh = ["augment.noise=noise", "manifest=train.csv", "workers=1", "out=noisy"]
    spkd("train", "--loss", "cosine", *SMALL, "steps=2", "out=first").ok()
    for given, change in (
        (fresh, lambda: soundfile.write("noise/a.wav", noise[1], 16_000)),
        (["student.init=first", "out=second"], lambda: shutil.copytree("noisy", "first", dirs_exist_ok=True)),
    ):
        run = ["train", "--loss", "cosine", *SMALL, "steps=2", *given]
        spkd(*run).ok()
        bank.cache_clear()
        assert "finished already" in spkd(*run).ok().out
        change()
        bank.cache_clear()
        done = spkd(*run)
        name = given[0].partition("=")[0]
        assert (done.code, f"with other settings (content of {name}: " in done.err) == (2, True), done.err
        again = spkd("train", "--from", given[-1].partition("=")[2], f"out=again-{name}").ok()
        assert f"note: {given[0]} has another content than for the run in " in again.out


@pytest.mark.usefixtures("cached")
def test_a_finished_run_that_is_repeated_keeps_its_validation(spkd: Callable) -> None:
    run = ["train", "--loss", "cosine", *SMALL, "steps=12", "--json"]
    first = json.loads(spkd(*run, *VALID, "out=a").out.splitlines()[-1])
    assert first["best_step"] in (10, 12)
    for given in (VALID, []):
        assert json.loads(spkd(*run, *given, "out=a").out.splitlines()[-1]) == first
    done = spkd(*run, *VALID[:2], "valid.every=5", "out=a")
    assert (done.code, "valid.every=5 has no effect: the run in a is finished without it" in done.err) == (2, True)
    Path("spkd.yaml").write_text("train: {valid: {every: 5, trials: valid.txt, manifest: valid.csv}}\n")
    assert "note: spkd.yaml: left out valid.every: the run in a is finished" in spkd(*run, "out=a").out


@pytest.mark.usefixtures("cached")
def test_what_kills_left_of_a_student_goes_with_the_next_run(spkd: Callable) -> None:
    """Of the last, and of the best; a killed process holds no lock on what it was writing."""
    run = ["train", "--loss", "cosine", *SMALL, *VALID, "steps=12", "out=a"]
    spkd(*run).ok()
    whole = {folder: sorted(os.listdir(folder)) for folder in ("a", "a/best")}
    for unfinished in (False, True):
        for folder in map(Path, whole):
            (folder / f"model.safetensors.{machine_id()}0123456789.part").write_bytes(b"half")
            (folder / "model.earlier.safetensors").write_bytes(b"weights that model.json described")
        if unfinished:
            Path("a/model.json").unlink()
            Path("a/best/model.json").unlink()
        spkd(*run).ok()
        assert {folder: sorted(os.listdir(folder)) for folder in whole} == whole


@pytest.mark.usefixtures("cached")
def test_training_ends_early_where_it_gets_no_better(spkd: Callable) -> None:
    done = spkd(
        "train",
        "--loss",
        "cosine",
        *SMALL,
        "steps=400",
        *VALID,
        "valid.patience=2",
        "optim.lr=1e-9",
        "optim.final_lr=1e-9",
    ).ok()
    assert "no lower EER in 2 validations: training ends after" in done.out
    assert load_student("student").training.steps < 400


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["valid.trials=none.txt", "valid.manifest=valid.csv"], "no trial list none.txt"),
        (["valid.trials=valid.txt"], "name the manifest of its audio by valid.manifest"),
        (["valid.trials=seen.txt", "valid.manifest=train.csv"], "2 of its speakers are trained on (spk0, spk1)"),
        (["valid.trials=wav.txt", "valid.manifest=train.csv"], "2 of its speakers are trained on (spk0, spk1)"),
        (["valid.trials=seen.txt", "valid.manifest=ids.csv"], "3 of its utterances are trained on (spk0/u0.flac"),
        (
            ["valid.trials=valid.txt", "valid.manifest=valid.csv", "student.init=earlier"],
            "2 of its speakers are trained on (spk4, spk5)",
        ),
    ],
)
def test_what_cannot_validate_is_refused_before_training(spkd: Callable, given: list[str], error: str) -> None:
    seen = "1 spk0/u0.flac spk0/u1.flac\n0 spk0/u0.flac spk1/u1.flac\n"
    Path("seen.txt").write_text(seen)
    Path("wav.txt").write_text(seen.replace("spk", "wav/spk"))
    Manifest(tuple(replace(u, speaker=None) for u in Manifest.load("train.csv"))).save("ids.csv")
    training = Training(people=People(Names.of(u.speaker for u in Manifest.load("valid.csv"))))
    save_student(Path("earlier"), Checkpoint(build("xvector", channels=16, embedding=8), training=training))
    done = spkd("train", "--loss", "cosine", *SMALL, "steps=3", *given)
    assert (done.code, error in done.err) == (2, True), done.err
    assert not Path("student").exists()


@pytest.mark.usefixtures("cached")
def test_fresh_augmentation_needs_the_audio_and_differs_by_epoch(spkd: Callable) -> None:
    noisy = ["augment.noise=synthetic", "augment.noise_prob=1", "augment.speeds=[0.9,1.0]", "workers=1"]
    assert "augment: fresh augmentation needs the audio" in spkd("train", "--loss", "cosine", *SMALL, *noisy).err
    given = [*SMALL, *noisy, "manifest=train.csv", "steps=6"]
    for out in ("a", "b"):
        spkd("train", "--loss", "cosine", *given, f"out={out}").ok()
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    spkd("train", "--loss", "cosine", *SMALL, "steps=6", "out=clean").ok()
    assert Path("a/model.safetensors").read_bytes() != Path("clean/model.safetensors").read_bytes()
    frames = ["--loss", "multilevel", "loss.multilevel.levels={frames: frames}"]
    given = [
        "teacher=checkpoint",
        "teacher.weights=teacher",
        "manifest=train.csv",
        "fbank=true",
        "teacher.targets=[embedding,frames]",
    ]
    spkd("extract", *given, "cache=f").ok()
    done = spkd("train", *frames, "cache=f", *SMALL, *noisy, "manifest=train.csv", "out=c")
    assert (done.code, "frames of the teacher do not follow another speed" in done.err) == (2, True), done.err


FULL_SCALE = [name for name in config.recipes() if not name.endswith("-mini")]
NARROW = {
    "enskd": ["optim.swa_fraction=0.7"],  # of the second phase alone
    "os-kdft": ["student.ssl.layers=2", "student.ssl.adapters=4", "loss.one_step.targets=[frames]"],
    "memo": [
        *("loss.memo.partner_channels=4", "loss.memo.locals=1", "loss.memo.local_crop=0.3"),
        *("loss.memo.prototypes=32", "loss.memo.hidden=16", "loss.memo.bottleneck=8"),
    ],
}
CUTS = (1, 19, 22)  # steps after which a run is interrupted: prototypes thaw, weights are averaged, the second phase


@pytest.fixture(scope="module")
def every_target(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with all targets that the full-scale recipes ask for."""
    folder = tmp_path_factory.mktemp("targets")
    save_teacher(folder / "teacher", 12, [f"spk{number}" for number in range(6)], 30.0)
    keys = ["teacher=checkpoint", f"teacher.weights={folder / 'teacher'}", f"manifest={corpus / 'manifest.csv'}"]
    keys += ["teacher.targets=[embedding,logits,frames,stats,segment.a]", "storage.codecs={frames: int8}"]
    keys += ["fbank=true", "wave=true", f"cache={folder / 'cache'}", "device=cpu"]
    settings = config.load(ExtractConfig, keys, environ={})
    extract(settings, load_teacher(settings.teacher, torch.device("cpu")), Manifest.load(settings.manifest))
    return folder / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SCALE)
def test_full_scale_recipes_run_through_all_their_phases(
    spkd: Callable, every_target: Path, name: str, tiny_wavlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow and short: warm-up, margins to their end, thawed prototypes, averaged weights, large margin; interrupted
    in every phase it comes to the same student."""
    recipe = config.load(TrainConfig, base=name, environ={})
    warmup = round(20 * recipe.optim.warmup / recipe.steps)
    keys = [f"cache={every_target}", "steps=20", f"optim.warmup={warmup}", "large_margin.steps=3"]
    keys += ["student.embedding=8", "batch_size=6", "crop=0.5", "large_margin.crop=0.7"]
    keys += ["student.channels=16"] if recipe.student.init is None else [f"student.init={tiny_wavlm}"]
    keys += ["loggers=[]", "device=cpu", "save_every=1000", *NARROW.get(name, [])]
    Path("labels.csv").write_text(
        "".join(
            ["utt,speaker\n", *(f"spk{n // 3}/u{n % 3}.{'flac' if n % 3 < 2 else 'wav'},{n // 6}\n" for n in range(18))]
        )
    )
    spkd("train", "--recipe", name, *keys, "out=whole").ok()
    after_step = trainer._after_step
    cuts = list(CUTS)

    def interrupted(run: trainer.Run, step: int, run_log: RunLog | None, stopping: bool) -> bool:
        if cuts and step == cuts[0]:
            stopping = bool(cuts.pop(0))
        return after_step(run, step, run_log, stopping)

    monkeypatch.setattr(trainer, "_after_step", interrupted)
    for step in CUTS:
        done = spkd("train", "--recipe", name, *keys, "out=cut")
        assert (done.code, f"saved after step {step}" in done.err) == (130, True), done.err
    spkd("train", "--recipe", name, *keys, "out=cut").ok()
    assert Path("whole/model.safetensors").read_bytes() == Path("cut/model.safetensors").read_bytes()
    assert load_student("whole").training.last_terms == load_student("cut").training.last_terms
    assert all(tensor.isfinite().all() for tensor in load_student("whole").network.state_dict().values())
