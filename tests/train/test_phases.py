"""How a run goes on and ends: phases, epochs, more steps, signals, validation; through the real command line."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spkd import config
from spkd.corpus.manifest import Manifest
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.students import Checkpoint, build, load_student, save_student
from spkd.teachers import load_teacher
from spkd.train import trainer
from spkd.train.log import RunLog
from spkd.train.settings import TrainConfig
from tests import processes

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6"]


@pytest.fixture
def cached(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """cache of four speakers; valid.csv and valid.txt of the two others."""
    every = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(every[:12]).save("train.csv")
    Manifest(every[12:]).save("valid.csv")
    pairs = itertools.combinations(every[12:], 2)
    Path("valid.txt").write_text("".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs))
    torch.manual_seed(0)
    save_student(tmp_path / "teacher", Checkpoint(build("xvector", channels=16, embedding=12).eval()))
    given = ["teacher=checkpoint", "teacher.weights=teacher", "manifest=train.csv", "fbank=true"]
    done = spkd("extract", *given, "view.speeds=[0.9,1.0]")
    assert done.code == 0, done.err


def logged(folder: str, name: str) -> dict[int, float]:
    lines = (json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.usefixtures("cached")
def test_a_second_phase_has_its_own_crops_margin_and_rate(spkd: Callable) -> None:
    given = ["steps=30", "large_margin.steps=20", "large_margin.crop=1.0", "optim.warmup=0"]
    done = spkd("train", "--loss", "aam", *SMALL, *given)
    assert done.code == 0, done.err
    rates = logged("student", "lr")
    assert list(rates) == [0, 20, 40]
    assert rates[40] == pytest.approx(1e-4 * 0.25 ** (10 / 19))
    assert load_student("student").training.steps == 50


@pytest.mark.usefixtures("cached")
def test_epochs_stand_for_steps(spkd: Callable) -> None:
    assert spkd("train", "--loss", "cosine", *SMALL, "epochs=2.5").code == 0
    assert load_student("student").training.steps == 10  # 24 views, 4 batches an epoch
    assert spkd("train", "--loss", "cosine", *SMALL, "epochs=2", "accumulate=2", "out=b").code == 0
    assert load_student("b").training.steps == 4


@pytest.mark.usefixtures("cached")
def test_a_run_of_constant_rate_can_be_continued_and_others_say_why_not(spkd: Callable) -> None:
    constant = ["--loss", "cosine", *SMALL, "optim.schedule=constant", "optim.warmup=5"]
    assert spkd("train", *constant, "steps=50", "out=whole").code == 0
    assert spkd("train", *constant, "steps=20", "out=part").code == 0
    done = spkd("train", *constant, "steps=50", "out=part")
    assert done.code == 0, done.err
    assert "continuing part at step 20" in done.out
    assert Path("whole/model.safetensors").read_bytes() == Path("part/model.safetensors").read_bytes()
    assert logged("whole", "cosine") == logged("part", "cosine")
    assert spkd("train", "--loss", "cosine", *SMALL, "steps=20", "out=cosine").code == 0
    done = spkd("train", "--loss", "cosine", *SMALL, "steps=50", "out=cosine")
    assert (done.code, "finished with steps=20, and its learning rate" in done.err) == (1, True)
    done = spkd("train", *constant, "steps=10", "out=part")
    assert "with other settings" in done.err


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
    assert spkd(*arguments, "out=cut").code == 0
    assert spkd(*arguments, "out=whole").code == 0
    assert Path("whole/model.safetensors").read_bytes() == Path("cut/model.safetensors").read_bytes()
    assert logged("whole", "contrastive") == logged("cut", "contrastive")


VALID = ["valid.trials=valid.txt", "valid.manifest=valid.csv", "valid.every=10"]


@pytest.mark.usefixtures("cached")
def test_validation_keeps_the_best_and_changes_nothing_else(spkd: Callable) -> None:
    assert spkd("train", "--loss", "cosine", *SMALL, "steps=35", "out=plain").code == 0
    done = spkd("train", "--loss", "cosine", *SMALL, "steps=35", *VALID, "out=watched")
    assert done.code == 0, done.err
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
    )
    assert done.code == 0, done.err
    assert "no lower EER in 2 validations: training ends after" in done.out
    assert load_student("student").training.steps < 400


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["valid.trials=none.txt", "valid.manifest=valid.csv"], "no trial list none.txt"),
        (["valid.trials=valid.txt"], "name the manifest of its audio by valid.manifest"),
        (["valid.trials=seen.txt", "valid.manifest=train.csv"], "2 of its speakers are trained on (spk0, spk1)"),
    ],
)
def test_what_cannot_validate_is_refused_before_training(spkd: Callable, given: list[str], error: str) -> None:
    Path("seen.txt").write_text("1 spk0/u0.flac spk0/u1.flac\n0 spk0/u0.flac spk1/u1.flac\n")
    done = spkd("train", "--loss", "cosine", *SMALL, "steps=3", *given)
    assert (done.code, error in done.err) == (2, True), done.err
    assert not Path("student").exists()


@pytest.mark.usefixtures("cached")
def test_fresh_augmentation_needs_the_audio_and_differs_by_epoch(spkd: Callable) -> None:
    noisy = ["augment.noise=synthetic", "augment.noise_prob=1", "augment.speeds=[0.9,1.0]", "workers=1"]
    assert "augment: fresh augmentation needs the audio" in spkd("train", "--loss", "cosine", *SMALL, *noisy).err
    given = [*SMALL, *noisy, "manifest=train.csv", "steps=6"]
    for out in ("a", "b"):
        assert spkd("train", "--loss", "cosine", *given, f"out={out}").code == 0
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert spkd("train", "--loss", "cosine", *SMALL, "steps=6", "out=clean").code == 0
    assert Path("a/model.safetensors").read_bytes() != Path("clean/model.safetensors").read_bytes()
    frames = ["--loss", "multilevel", "loss.multilevel.levels={frames: frames}"]
    given = [
        "teacher=checkpoint",
        "teacher.weights=teacher",
        "manifest=train.csv",
        "fbank=true",
        "teacher.targets=[embedding,frames]",
    ]
    assert spkd("extract", *given, "cache=f").code == 0
    done = spkd("train", *frames, "cache=f", *SMALL, *noisy, "manifest=train.csv", "out=c")
    assert (done.code, "frames of the teacher do not follow another speed" in done.err) == (2, True), done.err


FULL_SCALE = [name for name in config.recipes() if not name.endswith("-mini")]
NARROW = {
    "os-kdft": ["student.ssl.layers=2", "student.ssl.adapters=4", "loss.one_step.targets=[frames]"],
    "memo": [
        *("loss.memo.partner_channels=4", "loss.memo.locals=1", "loss.memo.local_crop=0.3"),
        *("loss.memo.prototypes=32", "loss.memo.hidden=16", "loss.memo.bottleneck=8"),
    ],
}
CUTS = (1, 19, 21)  # steps after which a run is interrupted: prototypes thaw, weights are averaged, the second phase


@pytest.fixture(scope="module")
def every_target(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with all targets that the full-scale recipes ask for."""
    folder = tmp_path_factory.mktemp("targets")
    torch.manual_seed(0)
    classes = [f"spk{number}" for number in range(6)]
    network = build("xvector", channels=16, embedding=12).eval()
    save_student(folder / "teacher", Checkpoint(network, torch.randn(len(classes), 12), classes, 30.0))
    keys = ["teacher=checkpoint", f"teacher.weights={folder / 'teacher'}", f"manifest={corpus / 'manifest.csv'}"]
    keys += ["teacher.targets=[embedding,logits,frames,stats,segment.a]", "storage.codecs={frames: int8}"]
    keys += ["fbank=true", "wave=true", f"cache={folder / 'cache'}", "device=cpu"]
    settings = config.load(ExtractConfig, keys, environ={})
    extract(settings, load_teacher(settings.teacher, torch.device("cpu")), Manifest.load(settings.manifest))
    return folder / "cache"


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
    done = spkd("train", "--recipe", name, *keys, "out=whole")
    assert done.code == 0, done.err
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
    assert spkd("train", "--recipe", name, *keys, "out=cut").code == 0
    assert Path("whole/model.safetensors").read_bytes() == Path("cut/model.safetensors").read_bytes()
    assert all(tensor.isfinite().all() for tensor in load_student("whole").network.state_dict().values())
