"""Voiceprints as bytes."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from spkd.errors import SpkdError, UsageError
from spkd.voiceprint import Voiceprint

PRINT = Voiceprint(np.array([0.6, 0.0, 0.8], np.float32), "ab12", 2, 7.5, "2026-11-30", ("recording 1: short",))


def test_bytes_hold_the_whole_voiceprint() -> None:
    again = Voiceprint.from_bytes(PRINT.to_bytes())
    assert again == PRINT
    assert again.embedding.tobytes() == PRINT.embedding.tobytes()
    # Little-endian float32 in base64, which any language reads.
    stored = base64.b64decode(json.loads(PRINT.to_bytes())["embedding"])
    assert np.frombuffer(stored, "<f4").tolist() == pytest.approx([0.6, 0.0, 0.8])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding", base64.b64encode(np.array([np.nan, 1.0], "<f4").tobytes()).decode()),
        ("embedding", base64.b64encode(np.array([3.0, 4.0], "<f4").tobytes()).decode()),
        ("embedding", base64.b64encode(b"abcde").decode()),
        ("embedding", "?"),
        ("embedding", ""),
        ("embedding", None),
        ("recordings", 0),
        ("recordings", True),
        ("seconds", -1.0),
        ("model", 5),
        ("further", 1),
    ],
)
def test_other_values_are_refused(name: str, value: object) -> None:
    tree = PRINT.to_json() | {name: value}
    with pytest.raises(SpkdError, match="damaged"):
        Voiceprint.from_json(tree, "v")


def test_changed_and_foreign_bytes_are_refused() -> None:
    with pytest.raises(UsageError, match="expected the bytes of a voiceprint, got a str"):
        Voiceprint.from_bytes("abc")  # type: ignore[arg-type]
    with pytest.raises(SpkdError, match="its values are not those of its digest"):
        Voiceprint.from_bytes(PRINT.to_bytes().replace(b"2026-11-30", b"2026-11-29"))
    for data in (b"\xff", b"{}", b"[]", b"null", b"{", PRINT.to_bytes()[:-5]):
        with pytest.raises(SpkdError):
            Voiceprint.from_bytes(data)
