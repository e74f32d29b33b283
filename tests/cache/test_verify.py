"""What verify finds in shards whose records were written by somebody else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from spkd.cache import verify
from spkd.cache.claims import reopen
from spkd.cache.folder import CompletionRecord, commit_path, load_card
from spkd.cache.verify import expected_shards
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import machine_id, write_json
from spkd.files.sealed import self_digest
from spkd.outputs.target import Target

from .test_layout import FRAMES, write

EMBEDDING = Target("embedding", 4)


def test_every_shard_is_expected_once(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 5, [FRAMES, EMBEDDING], unit_views=2)
    record = CompletionRecord.load(tmp_path / "c")
    shards = list(expected_shards(tmp_path / "c", record.card))
    assert len({shard.path for shard in shards}) == len(shards) == 6
    assert all(shard.problem() is None for shard in shards)
    assert sum(shard.record.bytes for shard in shards) == record.bytes


def resign(root: Path) -> None:
    """Let the completion record fit the commit record of unit 0 as it is now."""
    record = CompletionRecord.load(root)
    changed = {"commits/0.json": digest.of_file(commit_path(root, 0))}
    write_json(root / "COMPLETE.json", replace(record, sha256={**record.sha256, **changed}).to_json())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t["targets"].pop("embedding"), "its targets are not those of the card"),
        (lambda t: t["targets"]["embedding"].update(bytes=-1), "at least 1"),
        (lambda t: t["targets"]["embedding"].update(chunk_crc32c="x"), "must be a list"),
        (lambda t: t["targets"]["embedding"].update(chunk_crc32c=[]), "its index does not match"),
        (lambda t: t.update(rejected={"x": "y"}), "whole number"),
        (lambda t: t.pop("writer"), "writer is missing"),
    ],
)
def test_commit_records_with_values_that_no_commit_has(tmp_path: Path, change, expected: str) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "c"
    write(root, [4000] * 5, [EMBEDDING])
    tree = json.loads(commit_path(root, 0).read_text())
    change(tree)
    commit_path(root, 0).write_text(json.dumps(tree | {"check": self_digest(tree)}))
    resign(root)
    with pytest.raises(SpkdError, match=expected):
        raise SpkdError(" ".join(verify(root)))


@pytest.mark.parametrize(("value", "expected"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "of zeros")])
def test_values_that_no_teacher_gives_are_found_though_their_checksums_match(
    tmp_path: Path, value: float, expected: str
) -> None:
    root = tmp_path / "c"
    write(root, [4000] * 3, [EMBEDDING])
    shard, record = root / "embedding" / "c" / "0" / "0", json.loads(commit_path(root, 0).read_text())
    data = bytearray(shard.read_bytes())
    data[128 : 128 + 8] = np.full(4, value, "<f2").tobytes()
    shard.write_bytes(bytes(data))
    record["targets"]["embedding"]["chunk_crc32c"][0] = google_crc32c.value(bytes(data[128 : 128 + 64 * 8]))
    commit_path(root, 0).write_text(json.dumps(record | {"check": self_digest(record)}))
    resign(root)
    (line,) = verify(root)
    assert expected in line


def test_a_growth_that_was_killed_half_way_leaves_a_cache_that_verifies(spkd: Callable, corpus: Path) -> None:
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(everything[:5]).save("few.csv")
    extract = ["extract", "teacher=none", "cache=c", "storage.unit_views=2"]
    whole = f"manifest={corpus / 'manifest.csv'}"
    spkd(*extract, "manifest=few.csv").ok()
    before = Path("c/COMPLETE.json").read_bytes()
    spkd(*extract, whole).ok()
    # As a kill between the card and the record would leave it.
    Path("c/COMPLETE.json").write_bytes(before)
    done = spkd("cache", "verify", "c")
    assert (done.code, "all checksums match" in done.out) == (0, True), done.err
    assert "complete" in spkd(*extract, whole).out
    spkd("cache", "push", "c", "there").ok()


EXTRACT = ["extract", "teacher=none", "cache=c", "storage.unit_views=3"]
DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": lambda root: (root / "fbank/c/1/0").unlink(),
    "bytes instead of": lambda root: os.truncate(root / "fbank/c/1/0", 5000),
    "of another cache or unit": lambda root: shutil.copy(root / "fbank/c/2/0", root / "fbank/c/1/0"),
    "changed in its index": lambda root: blank_end(root / "fbank/c/1/0"),
    "not valid JSON": lambda root: os.truncate(root / "commits/1.json", 50),
}


def blank_end(path: Path) -> None:
    """As an interrupted copy leaves a file that was given its size first."""
    size = path.stat().st_size
    os.truncate(path, size - 500)
    os.truncate(path, size)


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.glob("*/c/*/0")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_units_are_extracted_again_by_the_same_command(spkd: Callable, corpus: Path, kind: str) -> None:
    command = [*EXTRACT, f"manifest={corpus / 'manifest.csv'}"]
    spkd(*command).ok()
    before = files(Path("c"))
    DAMAGE[kind](Path("c"))
    if kind != "not valid JSON":  # which reads the sizes in the records
        done = spkd("cache", "merge", "c", "c", "merged")
        assert (done.code, kind in done.err, "makes again what is damaged" in done.err) == (1, True, True), done.err
    if kind in ("missing", "bytes instead of"):
        done = spkd("train", "--loss", "cosine", "cache=c")
        assert (done.code, "damaged in 1 of 6 units" in done.err, kind in done.err) == (1, True, True), done.err
    done = spkd(*command)
    assert "c: 1 unit damaged and filled again" in done.out, done.err
    assert kind in done.out
    assert "3 views extracted, 0 rejected; complete" in done.out
    assert files(Path("c")) == before
    assert "all checksums match" in spkd("cache", "verify", "c").out
    assert "damaged" not in spkd(*command).out


@pytest.mark.parametrize("reader", [["verify", "c"], ["export", "c", "c.h5"], ["push", "c", "there"]])
def test_damaged_rows_that_were_found_are_extracted_again(spkd: Callable, corpus: Path, reader: list[str]) -> None:
    command = [*EXTRACT, f"manifest={corpus / 'manifest.csv'}"]
    spkd(*command).ok()
    before, state = files(Path("c")), Path("c/fbank/c/1/0").stat()
    data = bytearray(before["c/fbank/c/1/0"])
    data[5000] ^= 1
    Path("c/fbank/c/1/0").write_bytes(data)
    os.utime("c/fbank/c/1/0", ns=(state.st_atime_ns, state.st_mtime_ns))  # as a disk does it
    done = spkd("cache", *reader)
    assert (done.code, "fbank/c/1/0: changed in rows" in done.err) == (1, True), done.err
    assert "the `spkd extract` that made c makes again what is damaged" in done.err
    done = spkd("train", "--loss", "cosine", "cache=c", "student=tiny", "steps=1")
    message = (
        "error: c: damaged in 1 of 6 units (c/fbank/c/1/0: changed in rows 0 to 127); the `spkd extract` that made c"
    )
    assert (done.code, done.err.startswith(message), Path("student").exists()) == (1, True, False), done.err
    assert "c: 1 unit damaged and filled again (c/fbank/c/1/0: changed in rows" in spkd(*command).out
    assert files(Path("c")) == before
    assert "all checksums match" in spkd("cache", "verify", "c").out


def left_by_a_kill(path: Path) -> None:
    """A file that a process of this machine was writing under a name when it was killed."""
    path.with_name(f"{path.name}.{machine_id()}0123456789.part").write_bytes(b"half")


def test_damaged_units_of_a_merged_cache_are_copied_again_by_the_same_command(spkd: Callable, corpus: Path) -> None:
    utterances = Manifest.load(corpus / "manifest.csv").utterances
    for name, part in (("a", utterances[:9]), ("b", utterances[9:])):
        Manifest(part).save(f"{name}.csv")
        spkd(*EXTRACT, f"manifest={name}.csv", f"cache={name}").ok()
    merge = ["cache", "merge", "a", "b", "c"]
    spkd(*merge).ok()
    before = files(Path("c"))
    for shard in list(before)[::3]:
        Path(shard).unlink()
        left_by_a_kill(Path(shard))
    for name in ("claims/0", "claims/growth.lock", "commits/0.json"):
        left_by_a_kill(Path("c", name))
    done = spkd(*merge)
    assert "units damaged and filled again" in done.out, done.err
    assert files(Path("c")) == before
    assert not list(Path("c").rglob("*.part"))
    assert "all checksums match" in spkd("cache", "verify", "c").out


def test_shards_that_are_symbolic_links_are_copied_with_their_content(spkd: Callable, corpus: Path) -> None:
    """As git-annex and stores by content keep them."""
    utterances = Manifest.load(corpus / "manifest.csv").utterances
    for name, part in (("a", utterances[:9]), ("b", utterances[9:])):
        Manifest(part).save(f"{name}.csv")
        spkd(*EXTRACT, f"manifest={name}.csv", f"cache={name}").ok()
    Path("store").mkdir()
    for number, shard in enumerate(sorted(Path("a").glob("fbank/c/*/0"))):
        shard.rename(f"store/{number}")
        shard.symlink_to(f"../../../../store/{number}")
    spkd("cache", "merge", "a", "b", "far/away/merged").ok()
    spkd("cache", "push", "a", "far/away/pushed").ok()
    spkd("cache", "pull", "a", "far/away/pulled").ok()
    shutil.rmtree("store")
    for copy in ("merged", "pushed", "pulled"):
        assert "all checksums match" in spkd("cache", "verify", f"far/away/{copy}").out


def test_a_damaged_unit_of_a_merged_cache_stays_where_its_source_is_damaged_too(spkd: Callable, corpus: Path) -> None:
    spkd(*EXTRACT, f"manifest={corpus / 'manifest.csv'}", "cache=a").ok()
    shutil.copytree("a", "b")
    spkd("cache", "merge", "a", "b", "c").ok()
    spkd("cache", "push", "c", "copy").ok()
    for root in ("a", "b"):
        Path(root, "commits/1.json").unlink()
    shard = Path("c/fbank/c/1/0")
    shard.unlink()
    done = spkd("cache", "merge", "a", "b", "c")
    assert (done.code, f"{shard}: missing" in done.err) == (1, True), done.err
    assert "`spkd cache repair c --from COPY`" in done.err
    spkd("cache", "repair", "c", "--from", "copy").ok()
    spkd("cache", "merge", "a", "b", "c").ok()


def holes(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(100 << 30)


STATES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-20] + b"\0" * 20),
    "holes": holes,
    "link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("complete", [True, False])
def test_what_follows_from_record_or_manifest_is_written_again(
    spkd: Callable, corpus: Path, state: str, complete: bool
) -> None:
    command = [*EXTRACT, f"manifest={corpus / 'manifest.csv'}"]
    spkd(*command).ok()
    damaged = ["plan/0.npz", "codec.safetensors"] + ["card.json", "zarr.json", "fbank/zarr.json"] * complete
    whole = {path: path.read_bytes() for path in (Path("c", name) for name in [*damaged, "COMPLETE.json"])}
    if not complete:
        Path("c/COMPLETE.json").unlink()
    for name in damaged:
        STATES[state](Path("c", name))
    done = spkd("cache", "verify", "c")
    assert (done.code, "spkd extract`" in done.err) == (1, True), done.err
    done = spkd(*command)
    assert (done.code, "0 views extracted, 0 rejected; complete" in done.out) == (0, True), done.err
    assert {path: path.read_bytes() for path in whole} == whole
    assert "all checksums match" in spkd("cache", "verify", "c").out


def test_every_damaged_file_is_listed(spkd: Callable, corpus: Path) -> None:
    spkd(*EXTRACT, f"manifest={corpus / 'manifest.csv'}").ok()
    shutil.rmtree("c/fbank")
    Path("c/commits/4.json").unlink()
    done = spkd("cache", "verify", "c")
    listed = {line.partition(": ")[0] for line in done.err.splitlines()}
    shards = {f"c/fbank/c/{unit}/0" for unit in (0, 1, 2, 3, 5)}  # that of unit 4 has no record
    assert (done.code, listed >= shards | {"c/fbank/zarr.json", "c/commits/4.json"}) == (1, True), done.err
    assert "c: 7 damaged" in done.err


def test_a_damaged_plan_of_another_manifest_is_fetched_alone(spkd: Callable, corpus: Path) -> None:
    command = [*EXTRACT, "manifest=m.csv"]
    utterances = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(utterances).save("m.csv")
    spkd(*command).ok()
    STATES["torn"](Path("c/plan/0.npz"))
    Manifest(utterances[::-1]).save("m.csv")
    done = spkd(*command)
    assert (done.code, "plan/0.npz: damaged (" in done.err) == (1, True), done.err
    assert "; `spkd cache repair c --from COPY` fetches it" in done.err


def test_a_card_that_promises_any_number_of_units_is_refused_at_once(spkd: Callable, corpus: Path) -> None:
    spkd(*EXTRACT, f"manifest={corpus / 'manifest.csv'}").ok()
    Path("c/COMPLETE.json").unlink()
    card = load_card(Path("c"))
    part = replace(card.parts[0], units=10**7, views=2**31, utterances=2**31)
    write_json(Path("c/card.json"), card.with_parts([part] * 1000).to_json())
    for command in (["cache", "verify", "c"], ["cache", "push", "c", "d"], ["train", "--loss", "aam", "cache=c"]):
        since = time.monotonic()
        done = spkd(*command)
        assert (done.code, "not finished (6 of 10,000,000,000 units)" in done.err) == (1, True), done.err
        assert time.monotonic() - since < 60
    assert spkd(*EXTRACT, f"manifest={corpus / 'manifest.csv'}").code == 1


def test_a_copy_without_its_completion_record_is_mended_too(spkd: Callable, corpus: Path) -> None:
    command = [*EXTRACT, f"manifest={corpus / 'manifest.csv'}"]
    spkd(*command).ok()
    for number in (1, 4):
        Path(f"c/fbank/c/{number}/0").unlink()
    for left in (Path.unlink, lambda path: os.truncate(path, 99)):
        left(Path("c/COMPLETE.json"))
        done = spkd(*command)
        assert "complete" in done.out, done.err
        assert "all checksums match" in spkd("cache", "verify", "c").out
        done = spkd("cache", "export", "c", "out.h5").ok()
    Path("c/fbank/c/1/0").unlink()
    done = spkd("cache", "export", "c", "again.h5")
    assert (done.code, "fbank/c/1/0: missing; the `spkd extract` that made c" in done.err) == (1, True), done.err


def test_a_unit_that_another_worker_fills_is_not_taken_from_it(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 4, [EMBEDDING], unit_views=2)
    claim = tmp_path / "c" / "claims" / "1"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert not reopen(tmp_path / "c", 1, lambda unit: True)
    assert commit_path(tmp_path / "c", 1).is_file()
    claim.unlink()
    assert not reopen(tmp_path / "c", 1, lambda unit: False)
    assert reopen(tmp_path / "c", 1, lambda unit: True)
    assert not commit_path(tmp_path / "c", 1).exists()
