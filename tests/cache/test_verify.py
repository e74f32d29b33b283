"""What verify finds in shards whose records were written by somebody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spkd.cache import verify
from spkd.cache.folder import CompletionRecord, commit_path
from spkd.cache.plan import Plan
from spkd.cache.verify import expected_shards
from spkd.errors import SpkdError
from spkd.target import Target

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
    from spkd import digest
    from spkd.files import write_json

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
