"""`spkd extract` through the real command line."""

from __future__ import annotations

import csv
import itertools
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from spkd import config
from spkd.cache import Cache, Crop, owner
from spkd.corpus.audio import decode
from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest, Utterance
from spkd.corpus.view import ViewPlan
from spkd.extract import targets
from spkd.extract.run import extract
from spkd.extract.settings import ExtractConfig
from spkd.outputs.features import fbank
from spkd.registry import STUDENTS
from spkd.students import Checkpoint, build, save_student
from spkd.teachers import load_teacher
from spkd.teachers.settings import TeacherConfig
from tests import processes
from tests.conftest import save_teacher

from ..teachers.test_wespeaker import save_wespeaker

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher", speakers="abcde")
    return tmp_path / "teacher"


@pytest.fixture
def extraction(extraction: list[str], checkpoint: Path) -> list[str]:
    return extraction


@pytest.mark.parametrize(
    "view",
    [["view=full"], ["view=windows:0.8/0.4"], ["view=crops:2,0.7", "view.speeds=[0.9,1.1]", "view.noise=synthetic"]],
)
def test_cached_is_what_the_live_teacher_gives_for_every_view(
    spkd: Callable, corpus: Path, tiny_wavlm: Path, view: list[str]
) -> None:
    done = spkd(
        "extract",
        "teacher=wavlm",
        f"teacher.weights={tiny_wavlm}",
        "teacher.targets=[embedding,frames.layer2]",
        f"manifest={corpus / 'manifest.csv'}",
        "fbank=true",
        "storage.unit_views=7",
        *view,
    ).ok()
    assert "0 rejected; complete" in done.out
    cache, manifest = Cache.open("cache"), Manifest.load(corpus / "manifest.csv")
    plan = ViewPlan.from_card(cache.card.views, None, None)
    loader = ViewLoader(manifest, cache.plan.views, plan)
    teacher = load_teacher(TeacherConfig("wavlm", str(tiny_wavlm)), CPU)
    for row in cache.usable_views:
        wave = torch.from_numpy(np.ascontiguousarray(loader(int(row))))[None]
        live = teacher.extract(wave, ["embedding", "frames.layer2"]) | {"fbank": fbank(wave).numpy()}
        cached = cache.batch(np.array([row]), list(live))
        for name, values in live.items():
            a, b = values.ravel().astype(np.float64), cached[name].double().numpy().ravel()
            assert a.shape == b.shape
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9999


def test_a_checkpoint_gives_every_level_and_exact_logits(
    spkd: Callable, corpus: Path, checkpoint: Path, extraction: list[str]
) -> None:
    spkd(*extraction, "teacher.targets=[frames,stats,segment.a,logits]", "storage.codec=float32").ok()
    cache = Cache.open("cache")
    assert list(cache.targets) == ["frames", "stats", "segment.a", "embedding"]  # logits follow from the embedding
    teacher = load_teacher(TeacherConfig("checkpoint", str(checkpoint)), CPU)
    wave = soundfile.read(Manifest.load(corpus / "manifest.csv")[4].path, dtype="float32")[0]
    live = teacher.extract(torch.from_numpy(wave)[None], list(teacher.targets))
    cached = cache.batch(np.array([4]), ["frames", "stats", "segment.a", "embedding", "logits"])
    for name, values in cached.items():
        assert np.allclose(values, live[name], atol=1e-4), name


def test_the_same_command_continues_and_changes_nothing(spkd: Callable, extraction: list[str]) -> None:
    command = [*extraction, "storage.unit_views=5"]
    spkd(*command).ok()
    before = {p: p.read_bytes() for p in Path("cache").rglob("*") if p.is_file()}
    assert "0 views extracted" in spkd(*command).out
    assert before == {p: p.read_bytes() for p in Path("cache").rglob("*") if p.is_file()}
    Path("cache/commits/2.json").unlink()
    Path("cache/COMPLETE.json").unlink()
    assert "5 views extracted" in spkd(*command).out
    shard = Path("cache/embedding/c/2/0")
    assert shard.read_bytes() == before[shard]


def test_a_cache_of_something_else_is_refused(spkd: Callable, corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = ["extract", "teacher=checkpoint", f"teacher.weights={checkpoint}"]
    spkd(*command, f"manifest={corpus / 'manifest.csv'}").ok()
    few = Manifest(Manifest.load(corpus / "manifest.csv").utterances[:5])
    few.save(tmp_path / "few.csv")
    done = spkd(*command, "manifest=few.csv")
    assert (done.code, "holds a cache of another manifest" in done.err) == (2, True)
    done = spkd(*command, f"manifest={corpus / 'manifest.csv'}", "view=crops:1,1")
    assert done.code == 2
    assert "holds a cache of another view plan (plan: full there, crops:1,1 now)" in done.err
    assert "manifest" not in done.err


def test_bad_audio_is_listed_and_the_run_goes_on(
    spkd: Callable, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    good = Manifest.load(corpus / "manifest.csv").utterances[:4]
    wave = 0.1 * np.random.RandomState(0).randn(16_000)
    nan = wave.copy()
    nan[100] = np.nan
    soundfile.write("nan.wav", nan, 16_000, subtype="FLOAT")
    soundfile.write("short.wav", wave[:800], 16_000)
    soundfile.write("stereo.wav", np.stack([wave, -0.5 * wave], 1), 16_000)
    soundfile.write("slow.wav", wave[:8000], 8000)
    Path("empty.wav").touch()
    Path("corrupt.flac").write_bytes(Path(good[0].path).read_bytes()[:2000])
    named = [
        Utterance(p, str(tmp_path / p), "s")
        for p in ("nan.wav", "short.wav", "stereo.wav", "slow.wav", "empty.wav", "missing.wav")
    ]
    named.append(Utterance("corrupt.flac", str(tmp_path / "corrupt.flac"), "s", good[0].duration))
    Manifest((*good, *named)).save("mixed.csv")
    command = ["extract", "teacher=checkpoint", f"teacher.weights={checkpoint}", "manifest=mixed.csv"]
    done = spkd(*command).ok()
    assert "5 rejected; complete" in done.out
    for name, reason in (
        ("nan.wav", "not finite"),
        ("short.wav", "too short"),
        ("empty.wav", "empty file"),
        ("missing.wav", "no such file"),
        ("corrupt.flac", ""),
    ):
        assert f"rejected {name}: " in done.err
        assert reason in done.err
    assert "8000 Hz is resampled to 16000 Hz (this note is not repeated)" in done.out
    assert done.out.count("averaged to one (this note is not repeated)") == 1
    with open("cache/rejected.csv") as file:
        assert {row["utt"] for row in csv.DictReader(file)} == {
            "nan.wav",
            "short.wav",
            "empty.wav",
            "missing.wav",
            "corrupt.flac",
        }
    assert "5 rejected; complete" in spkd(*command).out  # outputs again, though nothing was left to do
    cache = Cache.open("cache")
    assert len(cache.usable_views) == 6
    shutil.rmtree("cache")
    assert spkd(*command, "--strict").code == 1


def test_nothing_usable_at_all(spkd: Callable, checkpoint: Path) -> None:
    Path("m.csv").write_text("utt,path\na,none.wav\n")
    done = spkd("extract", "teacher=checkpoint", f"teacher.weights={checkpoint}", "manifest=m.csv")
    assert done.code == 1
    assert "m.csv: none of 1 utterance can be used; the first, none.wav: no such file" in done.err


@pytest.mark.parametrize(
    ("extra", "code", "expected"),
    [
        (["teacher.targets=[embeding]"], 2, "did you mean 'embedding'"),
        (["teacher.targets=embedding,frames"], 2, "a list is written teacher.targets=[embedding,frames]"),
        (["view=crops:x"], 2, "expected full"),
        (["cache=file/cache"], 1, "file/cache/card.json: cannot be written"),
        (["manifest=none.csv"], 2, "no manifest none.csv"),
        (["teacher.weights=nowhere"], 2, "no spkd checkpoint"),
        (["device=cuda"], 2, "not available") if not torch.cuda.is_available() else (["device=x"], 2, "valid"),
    ],
)
def test_one_line_errors(spkd: Callable, extraction: list[str], extra: list[str], code: int, expected: str) -> None:
    Path("file").touch()
    done = spkd(*extraction, *extra)
    assert done.code == code
    assert done.err.startswith("error: ")
    assert expected in done.err
    assert len(done.err.splitlines()) == 1


def test_dvector_without_weights_says_how_to_get_them(
    spkd: Callable, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = spkd("extract", "teacher=dvector", f"manifest={corpus / 'manifest.csv'}")
    assert done.code == 2
    assert "pip install --no-deps resemblyzer" in done.err


def test_targets_are_listed(spkd: Callable, tiny_wavlm: Path) -> None:
    done = spkd("extract", "teacher=wavlm", f"teacher.weights={tiny_wavlm}", "--targets").ok()
    assert "frames.layer3                16  50 Hz" in done.out


def test_no_teacher_keeps_fbank_alone(spkd: Callable, corpus: Path) -> None:
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}").ok()
    cache = Cache.open("cache")
    assert list(cache.targets) == ["fbank"]
    assert cache.batch(np.array([0, 1]), ["fbank"], Crop(np.array([0, 160]), 8000))["fbank"].shape == (2, 48, 80)


def test_several_workers_fill_one_cache(spkd: Callable, extraction: list[str], tmp_path: Path) -> None:
    arguments = [*extraction, "view.speeds=[0.9,1.0,1.1]", "storage.unit_views=3"]
    workers = [processes.spkd(*arguments, "cache=shared", cwd=tmp_path) for _ in range(3)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], outputs
    assert sum(int(n) for out, _ in outputs for n in re.findall(r"(\d+) views? extracted", out)) == 54
    assert any("complete" in out for out, _ in outputs)
    spkd(*arguments, "cache=alone").ok()
    shared, alone = Cache.open("shared"), Cache.open("alone")
    assert torch.equal(
        shared.batch(shared.usable_views, ["embedding"])["embedding"],
        alone.batch(alone.usable_views, ["embedding"])["embedding"],
    )
    assert "all checksums match" in spkd("cache", "verify", "shared").out


def test_a_claim_is_kept_alive_within_a_batch(
    corpus: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, a teacher that took longer for a batch than a claim lasts lost its unit."""
    monkeypatch.setattr(owner, "HEARTBEAT", 0.001)
    arguments = ["teacher=checkpoint", f"teacher.weights={checkpoint}", f"cache={tmp_path / 'c'}"]
    settings = config.load(ExtractConfig, arguments, environ={})
    teacher = load_teacher(settings.teacher, CPU)
    compute, ages = teacher.begin, []

    def slowly(*batch: Any) -> Callable[[], dict[str, np.ndarray]]:
        for claim in (tmp_path / "c" / "claims").glob("[0-9]*"):  # none yet while codecs are measured
            os.utime(claim, (1, 1))
            for _ in range(5000):
                if claim.stat().st_mtime == 1:
                    time.sleep(0.001)
            ages.append(claim.stat().st_mtime)
        return compute(*batch)

    teacher.begin = slowly  # type: ignore[method-assign]
    assert extract(settings, teacher, Manifest.load(corpus / "manifest.csv")).complete
    assert ages
    assert min(ages) > 1


def test_a_batch_begins_before_the_last_one_is_read_back(
    corpus: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU needs it: features are computed on another thread, and nothing waits between two batches of a unit."""
    arguments = ["teacher=checkpoint", f"teacher.weights={checkpoint}", f"cache={tmp_path / 'c'}", "fbank=true"]
    arguments += ["view=crops:1,0.7", "batch_size=3", "storage.unit_views=9"]
    given = config.load(ExtractConfig, arguments, environ={})
    teacher, happened, threads = load_teacher(given.teacher, CPU), [], set()
    begin, features, count = teacher.begin, targets.input_features, itertools.count()

    def is_filling() -> bool:
        """Whether a unit is claimed; before, codecs are measured."""
        return bool(list((tmp_path / "c" / "claims").glob("[0-9]*")))

    def begin_noted(*batch: Any) -> Callable[[], dict[str, np.ndarray]]:
        if not is_filling():
            return begin(*batch)
        number, finish = next(count), begin(*batch)
        happened.append(("begins", number))
        return lambda: (happened.append(("ends", number)), finish())[1]

    def features_noted(*given: Any) -> torch.Tensor:
        if is_filling():
            threads.add(threading.current_thread().name.split("_")[0])
        return features(*given)

    monkeypatch.setattr(teacher, "begin", begin_noted)
    monkeypatch.setattr(targets, "input_features", features_noted)
    assert extract(given, teacher, Manifest.load(corpus / "manifest.csv")).complete
    units = [happened[i : i + 6] for i in range(0, len(happened), 6)]
    assert len(units) == 2
    for first, unit in zip((0, 3), units, strict=True):
        order = [("begins", 0), ("begins", 1), ("ends", 0), ("begins", 2), ("ends", 1), ("ends", 2)]
        assert unit == [(what, first + number) for what, number in order]
    assert threads == {"views"}


@pytest.mark.parametrize("codec", ["float16", "topk3", "float32+zstd"])
def test_logits_are_stored_where_a_codec_is_named_for_them(
    spkd: Callable, corpus: Path, checkpoint: Path, extraction: list[str], codec: str
) -> None:
    arguments = [*extraction, "teacher.targets=[embedding,logits]", f"storage.codecs={{logits: {codec}}}"]
    spkd(*arguments).ok()
    cache = Cache.open("cache")
    assert (cache.head, cache.card.head and cache.card.head.classes) == (None, tuple("abcde"))
    teacher = load_teacher(TeacherConfig("checkpoint", str(checkpoint)), CPU)
    wave = soundfile.read(Manifest.load(corpus / "manifest.csv")[4].path, dtype="float32")[0]
    live = teacher.extract(torch.from_numpy(wave)[None], ["logits"])["logits"][0]
    read = cache.batch(np.array([4]), ["logits"])["logits"][0].float().numpy()
    kept = np.argsort(-live)[: 3 if codec == "topk3" else 5]
    assert np.allclose(read[kept], live[kept], rtol=2e-3, atol=2e-3)
    errors = cache.card.errors["logits"]
    kl = [errors[f"kl_t{t}"] for t in (1, 2, 4)]
    assert max(kl) < 1e-4 if codec != "topk3" else kl[0] < kl[2]
    info = spkd("cache", "info", "cache").out
    assert "KL" in info
    assert ("compressed, so read slower" in info) == ("zstd" in codec)
    assert spkd(*arguments, "storage.codecs={embedding: topk3}", "cache=d").code == 2
    assert "did you mean 'logits'" in spkd(*arguments, "storage.codecs={logit: int8}", "cache=d").err


def test_exact_logits_have_their_divergence_in_the_card(spkd: Callable, corpus: Path, checkpoint: Path) -> None:
    arguments = ["extract", "teacher=checkpoint", f"teacher.weights={checkpoint}", "teacher.targets=[logits]"]
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd(*arguments, manifest, "cache=fine", "storage.codec=float32").ok()
    spkd(*arguments, manifest, "cache=coarse").ok()
    fine, coarse = (Cache.open(name).card.errors["logits"]["kl_t1"] for name in ("fine", "coarse"))
    assert 0 <= fine < coarse < 1e-6


def test_a_codec_that_needs_more_views_says_so(spkd: Callable, extraction: list[str]) -> None:
    done = spkd(*extraction, "storage.codec=pq4x8")
    assert (done.code, "learnt from at least 256 rows, and the views give" in done.err) == (1, True)
    assert not Path("cache/card.json").exists()
    spkd(*extraction).ok()


def test_workers_share_one_codebook(spkd: Callable, extraction: list[str], tmp_path: Path) -> None:
    arguments = [*extraction, "teacher.targets=[frames]", "storage.codec=pq4x4", "storage.unit_views=2"]
    workers = [processes.spkd(*arguments, cwd=tmp_path) for _ in range(2)]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert "all checksums match" in spkd("cache", "verify", "cache").out
    assert "at least 0." in spkd("cache", "verify", "cache", "--live", "18", *arguments[1:4]).out
    assert "0 views extracted" in spkd(*arguments).out


def write_odd(path: str, wave: np.ndarray) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    soundfile.write(path, wave.astype(np.float32), 16_000, subtype="FLOAT")


def test_audio_that_is_hardly_speech_is_noted_once_with_its_count(spkd: Callable) -> None:
    noise = 0.1 * np.random.RandomState(0).randn(16_000)
    write_odd("a/silent.wav", np.zeros(16_000))
    write_odd("a/silent2.wav", np.zeros(16_000))
    write_odd("a/constant.wav", np.full(16_000, 0.5))
    write_odd("a/clipped.wav", np.sign(noise))
    write_odd("a/opposite.wav", np.stack([noise, -noise], 1))
    write_odd("a/good.wav", noise)
    spkd("manifest", ".", "--out", "m.csv").ok()
    done = spkd("extract", "teacher=none", "manifest=m.csv", "cache=c").ok()
    notes = [line for line in done.err.splitlines() + done.out.splitlines() if line.startswith("note:")]
    text = "\n".join(notes)
    assert len(notes) == len(set(notes))
    for kind in ("silen", "constant", "clipp", "cancel"):
        assert kind in text, text
    assert "good" not in text


def test_a_duration_in_milliseconds_is_rejected_with_a_hint(spkd: Callable) -> None:
    write_odd("a/x.wav", 0.1 * np.random.RandomState(0).randn(16_000))
    write_odd("a/y.wav", 0.1 * np.random.RandomState(1).randn(16_000))
    Path("m.csv").write_text("utt,path,duration\nx,a/x.wav,1000\ny,a/y.wav,1\nz,a/y.wav,1e18\nw,a/y.wav,200000\n")
    done = spkd("extract", "teacher=none", "manifest=m.csv", "cache=c")
    assert (done.code, "3 rejected" in done.out) == (0, True), done.err
    assert "milliseconds" in done.err


def test_a_file_that_is_a_pipe_or_a_socket_is_rejected(spkd: Callable) -> None:
    write_odd("a/x.wav", 0.1 * np.random.RandomState(0).randn(16_000))
    os.mkfifo("a/p.wav")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("a/s.wav")
        Path("m.csv").write_text("utt,path,duration\nx,a/x.wav,1\np,a/p.wav,1\ns,a/s.wav,1\n")
        done = spkd("extract", "teacher=none", "manifest=m.csv", "cache=c")
    assert (done.code, "2 rejected" in done.out) == (0, True), done.err


def test_several_teachers_in_one_pass(spkd: Callable, corpus: Path, checkpoint: Path, tiny_wavlm: Path) -> None:
    """Each has its own cache, with what a run of its own gives."""
    common = [f"manifest={corpus / 'manifest.csv'}", "view=crops:2,0.7", "view.noise=synthetic", "storage.unit_views=9"]
    first = ["teacher=checkpoint", f"teacher.weights={checkpoint}", "teacher.targets=[embedding,frames]"]
    other = ["teacher=wavlm", f"teacher.weights={tiny_wavlm}", "storage.codec=float32"]
    done = spkd("extract", *common, *first, "cache=a", "--also", " ".join([*other, "cache=b"])).ok()
    assert "a: 36 views extracted, 0 rejected; complete" in done.out
    assert "b: 36 views extracted, 0 rejected; complete" in done.out
    spkd("extract", *common, *first, "cache=c").ok()
    spkd("extract", *common, *other, "cache=d").ok()
    for one, alone in (("a", "c"), ("b", "d")):
        together, apart = Cache.open(one), Cache.open(alone)
        assert together.fingerprint == apart.fingerprint
        for name in together.targets:
            views = np.arange(36)
            a, b = (cache.batch(views, [name])[name] for cache in (together, apart))
            assert torch.equal(a, b), name


def test_a_codec_acts_for_those_of_several_teachers_that_have_its_target(
    spkd: Callable, corpus: Path, checkpoint: Path
) -> None:
    teacher = f"teacher=checkpoint teacher.weights={checkpoint}"
    run = ["extract", *teacher.split(), "teacher.targets=[embedding,frames]", f"manifest={corpus / 'manifest.csv'}"]
    run += ["cache=a", "--also", f"{teacher} cache=b"]
    for codec, reason in (("logits", "no target 'logits' is stored"), ("wave", "wave=true stores it")):
        done = spkd(*run, f"storage.codecs.{codec}=float32")
        assert (done.code, reason in done.err) == (2, True)
    spkd(*run[:-1], f"{run[-1]} storage.codecs.frames=int8", "storage.codecs.frames=int8").ok()
    assert [(t.name, t.codec) for t in Cache.open("a").card.targets] == [("embedding", "float16"), ("frames", "int8")]
    assert [(t.name, t.codec) for t in Cache.open("b").card.targets] == [("embedding", "float16")]


def test_a_second_teacher_catches_up_alone(spkd: Callable, corpus: Path, checkpoint: Path) -> None:
    keys = ["teacher=checkpoint", f"teacher.weights={checkpoint}", f"manifest={corpus / 'manifest.csv'}"]
    spkd("extract", *keys, "cache=a").ok()
    done = spkd("extract", *keys, "cache=a", "--also", f"{keys[0]} {keys[1]} cache=b").ok()
    assert "a: 0 views extracted, 0 rejected; complete" in done.out
    assert "b: 18 views extracted, 0 rejected; complete" in done.out


def test_views_that_one_teacher_cannot_take_are_left_out_of_its_cache_alone(
    spkd: Callable, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """WeSpeaker's x-vector takes 15 frames at least."""
    soundfile.write("short.wav", np.random.RandomState(0).standard_normal(1600).astype(np.float32) * 0.1, 16_000)
    rows = Manifest.load(corpus / "manifest.csv").utterances
    Manifest((*rows, Utterance("short", str(tmp_path / "short.wav"), "spk0", 0.1))).save(Path("m.csv"))
    save_wespeaker(tmp_path / "xvec", "XVEC")
    keys = ["teacher=checkpoint", f"teacher.weights={checkpoint}", "manifest=m.csv", "min_seconds=0", "cache=a"]
    done = spkd("extract", *keys, "--also", "teacher=wespeaker teacher.weights=xvec cache=b").ok()
    assert "a: 19 views extracted, 0 rejected; complete" in done.out
    assert "b: 18 views extracted, 1 rejected; complete" in done.out
    assert "short: too short (0.10 s < 0.165 s)" in done.err
    assert len(Cache.open("a").rejected) == 0
    assert len(Cache.open("b").rejected) == 1


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("teacher=none", "needs a cache of its own"),
        ("teacher=none cache=b view=full", "is none of teacher"),
        ("teacher=none 'cache=b", "No closing quotation"),
        ("teacher=none cache=b storage.unit_views=3", "is none of"),
    ],
)
def test_keys_of_the_whole_pass_are_not_for_one_teacher(spkd: Callable, corpus: Path, also: str, message: str) -> None:
    done = spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "--also", also)
    assert (done.code, message in done.err) == (2, True), done.err


def test_the_precision_is_on_the_card(spkd: Callable, corpus: Path, checkpoint: Path) -> None:
    keys = ["teacher=checkpoint", f"teacher.weights={checkpoint}", f"manifest={corpus / 'manifest.csv'}"]
    spkd("extract", *keys, "cache=a").ok()
    done = spkd("extract", *keys, "cache=b", "teacher.precision=bf16", "device=cpu").ok()
    lacks = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert ("note: teacher.precision=bf16: this processor has no bfloat16 arithmetic" in done.out) == lacks
    a, b = Cache.open("a"), Cache.open("b")
    assert "precision" not in a.card.teacher.details
    assert b.card.teacher.details["precision"] == "bfloat16"
    one, other = (cache.batch(np.arange(18), ["embedding"])["embedding"] for cache in (a, b))
    assert not torch.equal(one, other)
    assert torch.nn.functional.cosine_similarity(one.float(), other.float()).min() > 0.999
    done = spkd("extract", *keys, "cache=a", "teacher.precision=bf16")
    assert (done.code, "holds a cache of" in done.err) == (2, True)
    done = spkd("extract", *keys, "cache=c", "device=cpu", "teacher.precision=fp16")
    assert (done.code, done.err) == (2, "error: teacher.precision=fp16: needs a GPU; bf16 works everywhere\n")
    assert not Path("c").exists()


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_is_a_teacher_too(spkd: Callable, corpus: Path, tmp_path: Path, name: str) -> None:
    """Whole utterances of different length, several in a batch: every level is what the network gives for one alone."""
    torch.manual_seed(0)
    network = build(name, channels=16 if name != "campplus" else 32, embedding=8).eval()
    save_student(tmp_path / "teacher", Checkpoint(network))
    keys = ["teacher=checkpoint", "teacher.weights=teacher", f"teacher.targets=[{','.join(network.levels)}]"]
    done = spkd("extract", *keys, f"manifest={corpus / 'manifest.csv'}", "storage.codec=float32", "batch_size=5").ok()
    assert "18 views extracted, 0 rejected; complete" in done.out
    cache, manifest = Cache.open("cache"), Manifest.load(corpus / "manifest.csv")
    for view in (0, 7, 17):
        wave = torch.from_numpy(decode(manifest[view].path).wave)[None]
        with torch.no_grad():
            expected = network(network.features(wave))
        for level, values in expected.items():
            found = cache.ragged(np.array([view]), level).values if values.dim() == 3 else cache.batch(
                np.array([view]), [level])[level]  # fmt: skip
            assert torch.allclose(found.reshape(values[0].shape), values[0], atol=1e-4 * float(values.abs().max())), (
                level
            )


@pytest.mark.parametrize(("codec", "lost"), [("float16", "100"), ("int8", "[1-9][0-9.e+]*")])
def test_outputs_too_small_for_a_codec_are_refused(spkd: Callable, corpus: Path, codec: str, lost: str) -> None:
    """Numbers of 1e-9: float16 has none below 6e-8, and the scale of int8 ends at 6e-5 of a deviation."""
    network = build("xvector", channels=16, embedding=8).eval()
    with torch.no_grad():
        for values in network.segment_b[2].parameters():
            values *= 1e-9
    save_student(Path("small"), Checkpoint(network))
    common = [
        "extract",
        "teacher=checkpoint",
        "teacher.weights=small",
        f"manifest={corpus / 'manifest.csv'}",
        "cache=c",
    ]
    done = spkd(*common, f"storage.codec={codec}")
    message = rf"target embedding: values up to [\d.]+e-(09|10) are too small for {codec}, which loses {lost} %"
    assert (done.code, bool(re.search(message, done.err))) == (1, True), done.err
    spkd(*common, "storage.codec=float32").ok()
    stored = Cache.open("c").batch(np.arange(4), ["embedding"])["embedding"]
    assert (stored.norm(dim=1) > 0).all()


def test_outputs_beyond_float16_name_the_codec_that_holds_them(spkd: Callable, corpus: Path) -> None:
    network = build("xvector", channels=16, embedding=8).eval()
    with torch.no_grad():
        network.segment_b[2].bias += 1e6  # float16 ends at 65,504
    save_student(Path("large"), Checkpoint(network))
    common = [
        "extract",
        "teacher=checkpoint",
        "teacher.weights=large",
        f"manifest={corpus / 'manifest.csv'}",
        "cache=c",
    ]
    done = spkd(*common, "teacher.targets=[embedding]")
    assert done.code == 1
    assert "target embedding: values that are not finite as float16; try storage.codec=float32" in done.err
    spkd(*common, "storage.codec=float32").ok()


CODEC_OF_FRAMES = "storage.codecs.frames=int8"


def test_codecs_without_effect(spkd: Callable, corpus: Path, checkpoint: Path) -> None:
    """Refused where they are typed, left out with a note where a file gives them."""
    keys = ["teacher=checkpoint", f"teacher.weights={checkpoint}", f"manifest={corpus / 'manifest.csv'}"]
    done = spkd("extract", *keys, CODEC_OF_FRAMES)
    reason = f"error: {CODEC_OF_FRAMES} has no effect: no target 'frames' is stored"
    assert (done.code, done.err.startswith(reason)) == (2, True), done.err
    done = spkd("extract", *keys, "storage.codec=float32", "storage.codecs={embedding: int8}")
    assert (done.code, "every target has a codec of its own" in done.err) == (2, True)
    assert not Path("cache").exists()
    Path("spkd.yaml").write_text("extract: {storage: {codec: float32, codecs: {embedding: int8, frames: int8}}}")
    done = spkd("extract", *keys).ok()
    assert "left out storage.codecs.frames: no target 'frames' is stored" in done.out
    assert "left out storage.codec: every target has a codec of its own" in done.out
    assert [(target.name, target.codec) for target in Cache.open("cache").card.targets] == [("embedding", "int8")]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["teacher=none", "processes=3"], "it is of engine=ray and --slurm-script"),
        (["teacher=none", "device=cpu"], "teacher=none runs no model"),
        (["teacher=none", "view.noise_prob=0", "view.noise=synthetic"], "noise_prob is 0"),
        (["teacher=none", "view.rir_prob=0", "view.rir=rirs"], "rir_prob is 0"),
        (["teacher=none", "view.coder_prob=0", "view.coders=[gsm]"], "coder_prob is 0"),
        (
            ["teacher=none", "view=full:3"],
            "its views of an utterance are the same without speeds, formants or augmentation",
        ),
        (["teacher=none", "view=full:1", "view.speeds=[0.9]"], "view=full:1 is each utterance as it is"),
        (["teacher=none", "view=full:01", "view.formants=[0.9,1.1]"], "view=full:01 is each utterance as it is"),
        (
            ["teacher=none", "view=full:2", "view.speeds=[0.9]", "view.seed=3"],
            "view=full:2 without augmentation draws nothing at random",
        ),
    ],
)
def test_settings_without_effect(spkd: Callable, corpus: Path, given: list[str], reason: str) -> None:
    done = spkd("extract", f"manifest={corpus / 'manifest.csv'}", *given, "cache=new/folder")
    assert (done.code, done.err) == (2, f"error: {given[-1]} has no effect: {reason}\n")
    assert not Path("new").exists()


def test_views_that_are_bound_to_be_equal_are_noted(spkd: Callable, corpus: Path) -> None:
    given = ["extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "view.speeds=[0.9]", "view=full:3"]
    note = "note: view=full:3: no more than 2 of the 3 views of an utterance are different\n"
    assert note in spkd(*given, "cache=a").out
    views = Cache.open("a").plan.views
    assert len({*zip(views.utterance, views.speed, strict=True)}) == 2 * 18
    for index, more in enumerate((["view=full:2"], ["view.speeds=[0.9,1.1]"], ["view.coders=[g711]"])):
        done = spkd(*given, *more, f"cache=b{index}")
        assert (done.code, "are different" in done.out) == (0, False), done.err


def test_one_view_of_a_drawn_plan_is_the_whole_utterance(spkd: Callable, corpus: Path) -> None:
    given = ["extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}"]
    assert spkd(*given, "cache=a").code == 0
    Path("spkd.yaml").write_text("extract: {view: {speeds: [0.9]}}")
    done = spkd(*given, "cache=b", "view=full:1")
    assert "note: spkd.yaml: left out view.speeds: view=full:1 is each utterance as it is" in done.out
    assert Cache.open("a").fingerprint == Cache.open("b").fingerprint


def test_a_probability_of_0_turns_off_the_augmentation_of_a_file(spkd: Callable, corpus: Path) -> None:
    Path("spkd.yaml").write_text("extract: {view: {noise: synthetic, snr: [0, 5]}}")
    done = spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "view.noise_prob=0")
    assert (done.code, "left out view.noise, view.snr: noise_prob is 0" in done.out) == (0, True), done.err
    assert Cache.open("cache").card.views.augmentation.noise is None


def test_processes_of_a_file_are_left_out(spkd: Callable, corpus: Path) -> None:
    Path("spkd.yaml").write_text("extract: {processes: 3, device: cpu}")
    done = spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}").ok()
    assert "left out processes: it is of engine=ray and --slurm-script" in done.out
    assert "left out device: teacher=none runs no model" in done.out


def test_a_bad_response_is_found_before_the_cache_is_begun(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """One of many, which might be drawn hours later; the folder without it is that of another cache."""
    folder = tmp_path / "responses"  # what a folder holds is remembered by the process
    folder.mkdir()
    for number in range(40):
        response = np.exp(-np.arange(2000) / 300) * np.random.RandomState(number).randn(2000)
        soundfile.write(folder / f"{number}.wav", 0.1 * response if number != 31 else np.zeros(2000), 16_000)
    given = ["extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "cache=c"]
    done = spkd(*given, f"view.rir={folder}", "view.rir_prob=0.0001")
    assert (done.code, done.err) == (
        1,
        f"error: augmentation: {folder}/31.wav: no impulse response of a room (digital silence)\n",
    )
    assert not Path("c").exists()
    (folder / "31.wav").unlink()
    others = folder.rename(tmp_path / "others")
    spkd(*given, f"view.rir={others}", "view.rir_prob=0.5").ok()
