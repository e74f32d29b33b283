"""Cards and records: what is read is checked, whoever signed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spkd.cache import Card
from spkd.cache.card import CONTENT
from spkd.cache.folder import CommitRecord, CompletionRecord, commit_path, load_card, parse_completion
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.sealed import self_digest
from spkd.outputs.target import Target

from .test_layout import FRAMES, make_card, make_plan, write


def card() -> Card:
    return make_card([FRAMES, Target("embedding", 4)], *make_plan([4000] * 3))


def signed(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree with the identity and the digest of its own content, as somebody with bad intent would write it."""
    if not isinstance(tree["teacher"], dict):
        return tree
    teacher = {k: v for k, v in tree["teacher"].items() if k not in ("source", "licence", "cite", "library")}
    content = {name: tree[name] for name in CONTENT} | {"teacher": teacher}
    tree = tree | {"identity": digest.of_tree(content)}
    return tree | {"check": self_digest(tree)}


def test_a_card_survives_json() -> None:
    made = card()
    again = Card.from_json(json.loads(json.dumps(made.to_json())), "f")
    assert again == made
    assert again.identity == made.identity
    assert signed(made.to_json())["identity"] == made.identity


def test_what_identifies_a_cache() -> None:
    made = card()
    assert replace(made, teacher=replace(made.teacher, licence="other")).identity == made.identity
    assert replace(made, teacher=replace(made.teacher, library="transformers 5.0")).identity == made.identity
    assert replace(made, teacher=replace(made.teacher, weights_sha256="1")).identity != made.identity
    grown = made.with_parts([*made.parts, replace(made.parts[0], manifest="other")])
    assert made.grows_to(grown)
    assert not grown.grows_to(made)
    assert made.part_key(0) == grown.part_key(0) != grown.part_key(1)
    assert grown.difference(made) == "another manifest (utterances: 3 there, 6 now)"
    other = replace(made, views=replace(made.views, plan="crops:2,1.0"), targets=made.targets[:1], unit_views=7)
    other = other.with_parts([replace(made.parts[0], views=99, units=9)])
    assert other.difference(made) == (
        "another set of targets (embedding: 4 numbers in float16 there, none now), another view plan (plan: full "
        "there, crops:2,1.0 now) and another unit size (unit_views: 1024 there, 7 now)"
    )


def at(tree: Any, path: str, value: object) -> Any:
    """A deep copy with one value replaced."""
    copy = json.loads(json.dumps(tree))
    *parents, last = path.split(".")
    node = copy
    for parent in parents:
        node = node[int(parent) if isinstance(node, list) else parent]
    node[int(last) if isinstance(node, list) else last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("parts.0.units", 10**18),
        ("parts.0.units", "x"),
        ("parts.0.views", -1),
        ("parts.0.hours", float("inf")),
        ("parts", []),
        ("targets.0.dim", 0),
        ("targets.0.dim", 2.5),
        ("targets.0.hop", -160),
        ("targets.0.name", "../../escaped"),
        ("targets.0.name", "embedding"),
        ("targets.0.codec", 7),
        ("targets", {}),
        ("layout.unit_views", 0),
        ("layout.unit_seconds", None),
        ("views.speeds", [9.0]),
        ("views.augmentation.noise_prob", 2),
        ("teacher.family", None),
        ("teacher", "wavlm"),
        ("head", {"kind": "other", "classes": [], "scale": 1.0}),
        ("errors", {"embedding": {"cosine_min": "x"}}),
        ("made", {}),
        ("codecs", 5),
    ],
)
def test_a_signed_card_with_a_value_that_no_cache_has(path: str, value: object) -> None:
    with pytest.raises(SpkdError, match="^f") as caught:
        Card.from_json(signed(at(card().to_json(), path, value)), "f")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("path", "value"),
    [("made.by", "x"), ("teacher.licence", "x"), ("errors", {"embedding": {"cosine_min": 1.0}}), ("check", "0")],
)
def test_a_changed_value_that_the_fingerprint_leaves_out_is_found(path: str, value: object) -> None:
    with pytest.raises(SpkdError, match="f: damaged .*its own digest"):
        Card.from_json(at(card().to_json(), path, value), "f")


def test_a_changed_commit_record_is_found(tmp_path: Path) -> None:
    """Also before the cache is complete, when no other record covers it."""
    write(tmp_path / "c", [4000] * 3, [FRAMES])
    made, path = load_card(tmp_path / "c"), commit_path(tmp_path / "c", 0)
    tree = json.loads(path.read_text())
    assert CommitRecord.load(tmp_path / "c", made, 0).rejected == {}
    path.write_text(json.dumps(tree | {"rejected": {"1": "x"}}))
    with pytest.raises(SpkdError, match="0.json: damaged .*its own digest"):
        CommitRecord.load(tmp_path / "c", made, 0)


@pytest.mark.parametrize("tree", [None, [], 5, {}, {"spkd_cache": 2}, {"spkd_cache": [1]}])
def test_what_is_no_card(tree: object) -> None:
    with pytest.raises(SpkdError, match="^f"):
        Card.from_json(tree, "f")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(rejected={"9": "x"}),
        lambda t: t.update(rejected={"-1": "x"}),
        lambda t: t.update(rejected=[]),
        lambda t: t.update(bytes=-1),
        lambda t: t.update(bytes=1e400),
        lambda t: t["sha256"].update({"/etc/passwd": "0"}),
        lambda t: t["sha256"].update({"../x": "0"}),
        lambda t: t["sha256"].pop("plan/0.npz"),
        lambda t: t.pop("sha256"),
        lambda t: t["sha256"].update({"commits/0.json": "0" * 64}),
        lambda t: t.pop("commits_sha256"),
        lambda t: t.update(commits_sha256=t["commits_sha256"][:-1]),
        lambda t: t.update(commits_sha256=t["commits_sha256"][:-1] + "g"),
        lambda t: t.update(commits_sha256=t["commits_sha256"][:-2] + "  "),
        lambda t: t.update(commits_sha256=t["commits_sha256"] + "0" * 64),
        lambda t: t.update(commits_sha256=[]),
        lambda t: t.update(card=[]),
    ],
)
def test_a_signed_record_with_what_no_cache_has(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    write(tmp_path / "c", [4000] * 3, [FRAMES])
    path = tmp_path / "c" / "COMPLETE.json"
    tree = json.loads(path.read_text())
    assert parse_completion(path.read_bytes(), "f") == CompletionRecord.load(tmp_path / "c")
    change(tree)
    tree["check"] = self_digest(tree)
    with pytest.raises(SpkdError, match="^f"):
        parse_completion(json.dumps(tree).encode(), "f")
