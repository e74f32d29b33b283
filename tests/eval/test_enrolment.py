from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from spkd.errors import SpkdError, UsageError
from spkd.eval.enrolment import read_map


@pytest.mark.parametrize(
    "data",
    [
        b"m a b\nn c\n",
        b"# models\nm a b\r\n\r\nn c\r\n",
        b"m a\nn c\nm b\nm a\n",
        b"modelid\tsegmentid\tside\nm\ta\ta\nm\tb\tb\nn\tc\ta\n",
        b"model,utterance\nm,a\nm,b\nn,c\n",
        gzip.compress(b"m a b\nn c\n", mtime=0),
    ],
)
def test_maps_as_kaldi_and_nist_have_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "map").write_bytes(data)
    assert read_map(tmp_path / "map").members == {"m": ["a", "b"], "n": ["c"]}


@pytest.mark.parametrize(("text", "error"), [("m a\nn\n", "map:2: 'n' is not `model utterance"), ("", "no models")])
def test_what_is_no_map_is_a_line(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "map").write_text(text)
    with pytest.raises(SpkdError, match=error):
        read_map(tmp_path / "map")
    with pytest.raises(UsageError, match="no enrolment map"):
        read_map(tmp_path / "none")
