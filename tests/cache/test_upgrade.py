"""A cache of format 1, as spkd 0.1 wrote it, is moved in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spkd.cache import Cache
from spkd.cache.folder import self_digest
from spkd.files import digest
from spkd.outputs.target import Target

from .test_layout import FRAMES, write

EMBEDDING = Target("embedding", 4)


def as_format_1(root: Path, complete: bool = True) -> None:
    """What spkd 0.1 would have written: the same shards, `manifest/` instead of `commits/`, and its number."""
    (root / "commits").rename(root / "manifest")
    for path in (root / "manifest").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"writer": {"host": "old", "pid": 5}}))
    card = json.loads((root / "card.json").read_text()) | {"spkd_cache": 1}
    (root / "card.json").write_text(json.dumps(card))
    (root / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"spkd_cache": 1}}')
    record = json.loads((root / "COMPLETE.json").read_text())
    names = [name.replace("commits/", "manifest/") for name in record["sha256"]]
    record |= {"card": card, "sha256": {name: digest.of_file(root / name) for name in names}}
    record["check"] = self_digest(record)
    (root / "COMPLETE.json").write_text(json.dumps(record))
    if not complete:
        (root / "COMPLETE.json").unlink()
        (root / "manifest" / "0.json").unlink()


def test_an_old_cache_says_how_to_move_and_is_moved(spkd: Callable, tmp_path: Path) -> None:
    values = write(tmp_path / "c", [4000] * 5, [FRAMES, EMBEDDING], reject=(2,), unit_views=2)
    before = Cache.open("c")
    shards = {p: p.stat().st_mtime_ns for p in Path("c").glob("*/c/*/0")}
    as_format_1(Path("c"))
    for command in (["info", "c"], ["verify", "c"], ["export", "c", "x.h5"], ["push", "c", "there"]):
        done = spkd("cache", *command)
        assert done.code == 1
        assert len(done.err.splitlines()) == 1
        assert "spkd cache upgrade" in done.err
    assert "spkd cache upgrade" in spkd("train", "--loss", "cosine", "cache=c").err
    assert "upgraded; complete" in spkd("cache", "upgrade", "c").out
    assert "all checksums match" in spkd("cache", "verify", "c").out
    assert {p: p.stat().st_mtime_ns for p in shards} == shards
    after = Cache.open("c")
    assert after.card.fingerprint == before.card.fingerprint
    assert after.rejected == before.rejected
    usable = after.usable_views
    expected = np.stack([values["embedding"][v][0] for v in usable])
    assert np.array_equal(after.batch(usable, ["embedding"])["embedding"].numpy(), expected)
    assert "not a cache of format 1" in spkd("cache", "upgrade", "c").err


def test_an_unfinished_old_cache_stays_unfinished(spkd: Callable, tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 5, [EMBEDDING], unit_views=2)
    as_format_1(Path("c"), complete=False)
    assert "units are still missing" in spkd("cache", "upgrade", "c").out
    assert "2 of 3 committed" in spkd("cache", "info", "c").out
