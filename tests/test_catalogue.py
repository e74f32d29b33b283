"""`spkd cache catalogue` of a folder, a bucket and a place over HTTP."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def lab(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> Path:
    """lab/wavlm and lab/features, and a student trained from the first, evaluated."""
    audio = f"manifest={corpus / 'manifest.csv'}"
    assert (
        spkd("extract", "teacher=wavlm", f"teacher.weights={tiny_wavlm}", audio, "cache=lab/wavlm", "fbank=true").code
        == 0
    )
    assert spkd("extract", "teacher=none", audio, "cache=lab/features").code == 0
    small = ["student.channels=16", "student.embedding=16", "steps=2", "batch_size=4", "crop=0.5"]
    assert spkd("train", "--loss", "cosine", "cache=lab/wavlm", "out=lab/students/small", *small).code == 0
    assert (
        spkd("eval", corpus / "trials.txt", audio, "model=lab/students/small", "out=lab/evals/a", "bootstrap=0").code
        == 0
    )
    return Path("lab")


def test_the_page_lists_caches_with_their_students(spkd: Callable, lab: Path) -> None:
    assert spkd("cache", "verify", "lab/wavlm").code == 0
    done = spkd("cache", "catalogue", "lab", "--out", "page.html")
    assert (done.code, done.out) == (0, "page.html: 2 caches\n"), done.err
    page = Path("page.html").read_text()
    assert "never, as far as is known here" in page  # features was not verified
    assert page.count("spkd cache pull") == 2
    assert "EER (%), trials.txt" in page
    assert "lab/students/small" in page
    for word in ("licence", "fbank", "float16", "cosine", "1 - cosine"):
        assert word in page
    assert "<script" not in page
    # On a phone rows of wide tables become lists: every cell carries the head of its column.
    table = page[page.index("<table class=many>") :].split("</table>")[0]
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", table)
    assert len(heads) == 7
    assert all(re.findall(r'data-head="([^"]*)"', row) == heads for row in table.split("<tr>")[2:])
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_students_may_be_elsewhere_and_caches_in_a_bucket(spkd: Callable, lab: Path, s3: str) -> None:
    assert spkd("cache", "verify", "lab/wavlm").code == 0
    assert spkd("cache", "push", "lab/wavlm", f"{s3}/cat/wavlm").code == 0
    done = spkd("cache", "catalogue", f"{s3}/cat", "--students", "lab", "--out", "p.html")
    assert (done.code, done.out) == (0, "p.html: 1 cache\n"), done.err
    page = Path("p.html").read_text()
    assert f"spkd cache pull {s3}/cat/wavlm wavlm" in page
    assert "lab/students/small" in page
    assert "never, as far" not in page  # the record of the check went along


def test_damage_is_listed_and_an_empty_place_is_said_to_be(spkd: Callable, lab: Path) -> None:
    (lab / "features" / "COMPLETE.json").write_text("{")
    (lab / "students" / "small" / "model.json").write_text("{")
    done = spkd("cache", "catalogue", "lab", "--out", "p.html")
    assert done.code == 0, done.err
    assert "Not readable" in Path("p.html").read_text()
    assert "note: " in done.out
    Path("empty").mkdir()
    assert spkd("cache", "catalogue", "empty", "--out", "p.html").out == "p.html: 0 caches\n"
    assert "No caches." in Path("p.html").read_text()


def test_copies_are_one_entry_and_caches_of_one_name_are_told_apart(
    spkd: Callable, lab: Path, corpus: Path, tiny_wavlm: Path
) -> None:
    shutil.copytree(lab / "wavlm", lab / "mirror" / "wavlm")
    given = [
        "teacher=wavlm",
        f"teacher.weights={tiny_wavlm}",
        "teacher.wavlm.layer=1",
        f"manifest={corpus / 'manifest.csv'}",
    ]
    assert spkd("extract", *given, "cache=lab/old/wavlm").code == 0
    (lab / "students" / "small" / "model.safetensors").unlink()  # model.json has their digest
    done = spkd("cache", "catalogue", "lab", "--out", "p.html")
    assert (done.code, done.out) == (0, "p.html: 4 caches\n"), done.err
    page = Path("p.html").read_text()
    headings = re.findall(r"<h2 id=(cache-\w+)>([^<]*)</h2>", page)
    assert [heading for _, heading in headings] == ["features", "mirror/wavlm, lab/wavlm", "old/wavlm"]
    assert len({anchor for anchor, _ in headings}) == 3
    assert page.count("lab/students/small") == 1
    assert page.count("spkd cache pull") == 4
