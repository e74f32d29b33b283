"""Mapped plans against the same plans in memory."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spkd.cache import Cache, Plan, initialise, mapped_plan, verify
from spkd.cache.folder import COMPLETE, CompletionRecord, metadata_files
from spkd.cache.lazy import Lazy
from spkd.cache.mapped_plan import joined, mend, open_plan, problems
from spkd.corpus.manifest import Manifest, Utterance
from spkd.corpus.view import Views
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files import mapped as blocks
from spkd.files.atomic import write_json
from spkd.outputs.target import Target

from .test_layout import make_card, write

TARGETS = [Target("embedding", 4), Target("frames", 4, 320, 400), Target("fbank", 80, 160, 400)]


def plan_of(random: np.random.RandomState, first: int, utterances: int, unit_views: int = 5) -> tuple[Manifest, Plan]:
    """A plan of random views of some utterances."""
    speakers = [None if n == 0 else f"ß{n}" for n in random.randint(0 if first else 1, 5, utterances)]
    listed = [Utterance(f"u{first + i}ü", f"{i}.wav", speaker, 2.0) for i, speaker in enumerate(speakers)]
    manifest = Manifest(tuple(listed))
    utterance = np.repeat(np.arange(utterances, dtype=np.int32), random.randint(1, 4, utterances))
    count = len(utterance)
    views = Views(
        utterance,
        random.randint(0, 1000, count),
        random.randint(1, 20_000, count).astype(np.int32),
        random.choice(np.array([0.9, 1.0], np.float32), count),
        random.randint(0, 2**32, count, np.uint32),
        random.choice(np.array([1.0, 1.1], np.float32), count),
    )
    return manifest, Plan.make(manifest, views, unit_views, 4.0)


def saved(root: Path, plans: list[tuple[Manifest, Plan]]) -> CompletionRecord:
    """A complete cache without shards."""
    shutil.rmtree(root, ignore_errors=True)
    card = make_card(TARGETS, *plans[0])
    factors = replace(card.views, speeds=(0.9, 1.0), formants=(1.0, 1.1))
    parts = [make_card(TARGETS, *plan).parts[0] for plan in plans]
    card = replace(card.with_parts(parts), views=factors)
    initialise(root, card, [plan for _, plan in plans])
    files = (name for name in metadata_files(card) if not name.endswith((".safetensors", ".csv")))
    sha256 = {name: digest.of_file(root / name) if (root / name).is_file() else "0" * 64 for name in files}
    record = CompletionRecord(card, {}, 0, sha256)
    write_json(root / COMPLETE, record.to_json())
    return record


def check_equal(given: Plan, expected: Plan) -> None:
    """Every question of a reader has the same answer."""
    everything = np.arange(len(expected.views))
    for name, column in expected.views.columns().items():
        assert np.array_equal(getattr(given.views, name), column), name
        assert getattr(given.views, name)[everything[::-2]].dtype == column.dtype
    assert list(given.utterances) == expected.utterances
    assert list(given.speakers) == expected.speakers
    assert np.array_equal(given.speaker, expected.speaker)
    assert np.array_equal(given.first, expected.first)
    for target in TARGETS:
        for a, b in zip(given.places(target, everything), expected.places(target, everything), strict=True):
            assert np.array_equal(a, b), target
    for a, b in zip(
        *(plan.tables.views_of(np.arange(len(plan.utterances))) for plan in (given, expected)), strict=True
    ):
        assert np.array_equal(a, b)
    assert np.array_equal(given.tables.classes, expected.tables.classes)
    assert np.array_equal(given.tables.factors, expected.tables.factors)
    assert given.tables.labelled == expected.tables.labelled
    assert [given.view_name(view) for view in (0, len(everything) - 1)] == [
        expected.view_name(view) for view in (0, len(everything) - 1)
    ]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_a_mapped_plan_is_the_plan(tmp_path: Path, seed: int, sizes: list[int]) -> None:
    random = np.random.RandomState(seed)
    plans = [plan_of(random, 100 * i, size) for i, size in enumerate(sizes)]
    record = saved(tmp_path / "c", plans)
    plan = open_plan(tmp_path / "c", record)
    assert isinstance(plan.views.samples, Lazy)
    check_equal(plan, Plan.join([plan for _, plan in plans]))
    check_equal(joined([plan for _, plan in plans]), Plan.join([plan for _, plan in plans]))
    check_equal(pickle.loads(pickle.dumps(plan)), Plan.join([plan for _, plan in plans]))


def test_first_rows_are_sums_over_the_unit(tmp_path: Path) -> None:
    _, plan = plan_of(np.random.RandomState(0), 0, 30)
    for target in TARGETS:
        row, counts = plan.places(target, np.arange(len(plan.views)))
        for unit in range(plan.units):
            next_row = 0
            for view in plan.unit(unit):
                assert (row[view], plan.units_of(np.array([view]))[0]) == (next_row, unit)
                assert counts[view] == target.num_frames(int(plan.views.samples[view]))
                next_row += counts[view]


BAD = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "header": lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
    "foreign": lambda path: shutil.copy(path.with_name("other.bin"), path),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_damaged_or_foreign_is_made_again(tmp_path: Path, bad: str) -> None:
    random = np.random.RandomState(0)
    other = saved(tmp_path / "other", [plan_of(random, 0, 20)])
    plans = [plan_of(random, 0, 20)]
    record = saved(tmp_path / "c", plans)
    mend(tmp_path / "other", other)
    mend(tmp_path / "c", record)
    path = tmp_path / "c" / "plan" / "0.bin"
    good = path.read_bytes()
    shutil.copy(tmp_path / "other" / "plan" / "0.bin", path.with_name("other.bin"))
    BAD[bad](path)
    check_equal(open_plan(tmp_path / "c", record), plans[0][1])
    assert path.read_bytes() == good


def test_a_flipped_bit_within_is_an_error_until_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)
    record = saved(tmp_path, [plan_of(np.random.RandomState(0), 0, 20)])
    mend(tmp_path, record)
    path = tmp_path / "plan" / "0.bin"
    good = path.read_bytes()
    path.write_bytes(good[: blocks.HEADER] + bytes([good[blocks.HEADER] ^ 4]) + good[blocks.HEADER + 1 :])
    with pytest.raises(SpkdError, match=r"0\.bin: damaged; remove it, and it is made again"):
        open_plan(tmp_path, record).views.samples[:]
    assert [str(path) in line for line in problems(tmp_path, record)] == [True]
    assert any(str(path) in line for line in problems(tmp_path, record))
    mend(tmp_path, record)
    assert path.read_bytes() == good
    assert list(problems(tmp_path, record)) == []


@pytest.mark.parametrize("name", ["utterances", "speakers", "speaker", "views"])
def test_a_file_of_another_plan_with_valid_checksums_is_made_again(tmp_path: Path, name: str) -> None:
    """As another version with a fault would write it: its header names the plan from which it does not follow."""
    plans = [plan_of(np.random.RandomState(0), 0, 20)]
    record, plan = saved(tmp_path, plans), plans[0][1]
    mend(tmp_path, record)
    path, good = tmp_path / "plan" / "0.bin", (tmp_path / "plan" / "0.bin").read_bytes()
    samples = plan.views.samples.copy()
    samples[3] += 1
    others = {
        "utterances": list(plan.utterances)[::-1],
        "speakers": [f"{speaker}x" for speaker in plan.speakers],
        "speaker": np.roll(plan.speaker, 1),
        "views": Views(**(plan.views.columns() | {"samples": samples})),
    }
    mapped_plan._write(path, replace(plan, **{name: others[name]}), mapped_plan._content(record, 0))
    assert path.read_bytes() != good
    assert any(str(path) in line for line in problems(tmp_path, record))
    mend(tmp_path, record)
    assert path.read_bytes() == good
    assert list(problems(tmp_path, record)) == []


def test_a_file_with_other_names_is_found_by_verify_and_export_and_made_again(spkd: Callable, corpus: Path) -> None:
    command = ["extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "cache=c"]
    spkd(*command).ok()
    spkd("cache", "push", "c", "copy").ok()
    path, record = Path("c/plan/0.bin"), CompletionRecord.load(Path("c"))
    good = path.read_bytes()
    plan = mapped_plan._read_part(Path("c"), record, 0)
    other = replace(plan, utterances=list(plan.utterances)[::-1])
    for mended in (["cache", "repair", "c", "--from", "copy"], command):
        mapped_plan._write(path, other, mapped_plan._content(record, 0))
        for reader in (["verify", "c"], ["export", "c", "out.ark", "--target", "fbank"], ["export", "c", "tars"]):
            done = spkd("cache", *reader)
            message = f"{path}: not what follows from plan/0.npz; remove it, and it is made again"
            assert (done.code, message in done.err) == (1, True), (reader, done.err)
        spkd(*mended).ok()
        assert path.read_bytes() == good
    assert "all checksums match" in spkd("cache", "verify", "c").out


def test_a_file_that_is_cut_off_while_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    """In a process of its own, which the operating system would end."""
    record = saved(tmp_path, [plan_of(np.random.RandomState(0), 0, 3000)])
    mend(tmp_path, record)
    code = """
import itertools, os, sys, time
from pathlib import Path
seconds = itertools.count()
time.monotonic = lambda: float(next(seconds))
from spkd.cache.folder import CompletionRecord
from spkd.cache.mapped_plan import open_plan
from spkd.errors import SpkdError
root = Path(sys.argv[1])
plan = open_plan(root, CompletionRecord.load(root))
plan.views.samples[:]
os.truncate(root / "plan/0.bin", 100)
for look in (lambda: plan.views.samples[5:9], lambda: plan.views.samples[[7, 9]], lambda: plan.utterances[2999]):
    try:
        look()
    except SpkdError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("0.bin: cut off while it was being read (100 bytes")) == (0, 3), done


def test_a_damaged_plan_makes_no_mapped_file(tmp_path: Path) -> None:
    record = saved(tmp_path, [plan_of(np.random.RandomState(0), 0, 20)])
    path = tmp_path / "plan" / "0.npz"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(SpkdError, match=r"0\.npz: damaged"):
        open_plan(tmp_path, record)
    assert not (tmp_path / "plan" / "0.bin").exists()


def test_a_folder_that_cannot_be_written_is_read_by_way_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [plan_of(np.random.RandomState(0), 0, 20)]
    record = saved(tmp_path / "c", plans)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "c" / "plan", tmp_path / "elsewhere" / "plan")
    os.symlink(tmp_path / "elsewhere" / "plan", tmp_path / "c" / "plan")  # is not written through
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for _ in range(2):
        plan = open_plan(tmp_path / "c", record)
        assert isinstance(plan.views.samples, Lazy)
        check_equal(plan, plans[0][1])
    assert len(list((tmp_path / "home").rglob("*.bin"))) == 1
    assert not (tmp_path / "elsewhere" / "plan" / "0.bin").exists()
    # Where neither can be written, the plan is held in memory.
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("")
    plan = open_plan(tmp_path / "c", record)
    assert isinstance(plan.views.samples, np.ndarray)
    check_equal(plan, plans[0][1])


def test_a_complete_cache_has_it_and_verify_names_damage(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 10, [Target("embedding", 4)], unit_views=4)
    path = tmp_path / "c" / "plan" / "0.bin"
    data = path.read_bytes()
    assert verify(tmp_path / "c") == []
    path.write_bytes(data[:-1])
    assert [str(path) in line for line in verify(tmp_path / "c")] == [True]
    assert len(Cache.open(tmp_path / "c")) == 10
    assert path.read_bytes() == data
