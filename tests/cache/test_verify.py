"""What verify finds in shards whose records were written by somebody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from spkd.cache import verify
from spkd.cache.folder import CompletionRecord, commit_path
from spkd.cache.plan import Plan
from spkd.cache.verify import expected_shards
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import write_json
from spkd.outputs.target import Target

from .test_layout import FRAMES, write

EMBEDDING = Target("embedding", 4)


def test_every_shard_is_expected_once(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 5, [FRAMES, EMBEDDING], unit_views=2)
    record = CompletionRecord.load(tmp_path / "c")
    shards = list(expected_shards(tmp_path / "c", record.card, Plan.load(tmp_path / "c", record.card)))
    assert len({shard.path for shard in shards}) == len(shards) == 6
    assert all(shard.problem() is None for shard in shards)
    assert sum(shard.record.bytes for shard in shards) == record.bytes


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
    commit_path(root, 0).write_text(json.dumps(tree))
    record = CompletionRecord.load(root)
    record.sha256["commits/0.json"] = digest.of_file(commit_path(root, 0))
    write_json(root / "COMPLETE.json", record.to_json())
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
    commit_path(root, 0).write_text(json.dumps(record))
    complete = CompletionRecord.load(root)
    complete.sha256["commits/0.json"] = digest.of_file(commit_path(root, 0))
    write_json(root / "COMPLETE.json", complete.to_json())
    (line,) = verify(root)
    assert expected in line


def test_a_growth_that_was_killed_half_way_leaves_a_cache_that_verifies(spkd: Callable, corpus: Path) -> None:
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(everything[:5]).save("few.csv")
    extract = ["extract", "teacher=none", "cache=c", "storage.unit_views=2"]
    whole = f"manifest={corpus / 'manifest.csv'}"
    assert spkd(*extract, "manifest=few.csv").code == 0
    before = Path("c/COMPLETE.json").read_bytes()
    assert spkd(*extract, whole).code == 0
    # As a kill between the card and the record would leave it.
    Path("c/COMPLETE.json").write_bytes(before)
    done = spkd("cache", "verify", "c")
    assert (done.code, "all checksums match" in done.out) == (0, True), done.err
    assert "complete" in spkd(*extract, whole).out
    assert spkd("cache", "push", "c", "there").code == 0
