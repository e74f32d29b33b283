"""`spkd cache catalogue` of a folder, a bucket and a place over HTTP."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from spkd.demo.synthesis import speaker, utterance


@pytest.fixture
def lab(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> Path:
    """lab/wavlm and lab/features, and a student trained from the first, evaluated."""
    audio = f"manifest={corpus / 'manifest.csv'}"
    spkd("extract", "teacher=wavlm", f"teacher.weights={tiny_wavlm}", audio, "cache=lab/wavlm", "fbank=true").ok()
    spkd("extract", "teacher=none", audio, "cache=lab/features").ok()
    small = ["student.channels=16", "student.embedding=16", "steps=2", "batch_size=4", "crop=0.5"]
    spkd("train", "--loss", "cosine", "cache=lab/wavlm", "out=lab/students/small", *small).ok()
    spkd("eval", corpus / "trials.txt", audio, "model=lab/students/small", "out=lab/evals/a", "bootstrap=0").ok()
    return Path("lab")


def test_the_page_lists_caches_with_their_students(spkd: Callable, lab: Path) -> None:
    spkd("cache", "verify", "lab/wavlm").ok()
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


def test_lists_and_back_ends_have_a_column_each(spkd: Callable, lab: Path, corpus: Path) -> None:
    soundfile.write("u.wav", utterance(speaker(50), 0, 1.0), 16_000)
    Path("other.csv").write_text("utt,path\nu,u.wav\n")
    Path("l").mkdir()
    Path("l/trials.txt").write_text("".join((corpus / "trials.txt").read_text().splitlines(True)[20:80]))
    given = [f"manifest={corpus / 'manifest.csv'}", "model=lab/students/small", "bootstrap=0"]
    spkd("eval", "l/trials.txt", *given, "out=lab/evals/b").ok()
    spkd("eval", "l/trials.txt", *given, "out=lab/evals/c", "subtract_mean=true", "cohort=other.csv").ok()
    spkd("cache", "catalogue", "lab", "--out", "page.html").ok()
    page = Path("page.html").read_text()
    row = page[page.index("lab/students/small<") :].split("</tr>")[0]
    shown = re.findall(r'data-head="EER \(%\), ([^"]*)">([^<]*)<', row)
    found = [json.loads((lab / "evals" / name / "report.json").read_text())["results"]["eer_percent"] for name in "abc"]
    place = f"{corpus.name}/trials.txt"
    assert shown == list(zip([place, "l/trials.txt", "l/trials.txt [1]"], [f"{r:.2f}" for r in found], strict=True))
    assert "[1] The mean of the" in page


def test_a_nested_student_has_a_row_for_each_size_that_was_evaluated(spkd: Callable, lab: Path, corpus: Path) -> None:
    small = ["student.channels=16", "student.embedding=16", "student.nested=[2,4,16]", "steps=2", "batch_size=4"]
    spkd("train", "--loss", "cosine", "cache=lab/wavlm", "out=lab/students/sizes", "crop=0.5", *small).ok()
    given = ["eval", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "model=lab/students/sizes"]
    spkd(*given, "model.dimension=4", "out=lab/evals/part", "bootstrap=0").ok()
    spkd("cache", "catalogue", "lab", "--out", "page.html").ok()
    rows = [row for row in Path("page.html").read_text().split("<tr>") if "lab/students/sizes<" in row]
    shown = [re.findall(r'data-head="(?:embedding|EER [^"]*)">([^<]*)<', row) for row in rows]
    rate = json.loads((lab / "evals/part/report.json").read_text())["results"]["eer_percent"]
    assert shown == [["16", ""], ["4", f"{rate:.2f}"]]


def test_students_may_be_elsewhere_and_caches_in_a_bucket(spkd: Callable, lab: Path, s3: str) -> None:
    spkd("cache", "verify", "lab/wavlm").ok()
    spkd("cache", "push", "lab/wavlm", f"{s3}/cat/wavlm").ok()
    done = spkd("cache", "catalogue", f"{s3}/cat", "--students", "lab", "--out", "p.html")
    assert (done.code, done.out) == (0, "p.html: 1 cache\n"), done.err
    page = Path("p.html").read_text()
    assert f"spkd cache pull {s3}/cat/wavlm wavlm" in page
    assert "lab/students/small" in page
    assert "never, as far" not in page  # the record of the check went along


def test_copied_commands_are_safe_to_paste(spkd: Callable, lab: Path, tmp_path: Path) -> None:
    for name in ("-rf", "it's; touch $(touch ran) `touch ran`", "line\nend", "up\x1b[201~touch ran\n"):
        shutil.copytree(lab / "features", lab / name)
    spkd("cache", "catalogue", "lab", "--out", "p.html").ok()
    commands = [
        html.unescape(text) for text in re.findall(r"<pre>(spkd cache pull[^<]*)</pre>", Path("p.html").read_text())
    ]
    assert len(commands) == 4  # those of two names are not offered
    for command in commands:
        assert command.isprintable()
        words = subprocess.run(
            ["bash", "-c", f"spkd() {{ printf '%s\\n' \"$@\"; }}; {command}"], capture_output=True, text=True
        )
        assert words.stdout.splitlines()[:2] == ["cache", "pull"]
        assert Path(words.stdout.splitlines()[2]).is_dir()
        assert not words.stdout.splitlines()[3].startswith("-")
    assert not Path("ran").exists()


def test_damage_is_listed_and_an_empty_place_is_said_to_be(spkd: Callable, lab: Path) -> None:
    (lab / "features" / "COMPLETE.json").write_text("{")
    (lab / "students" / "small" / "model.json").write_text("{")
    done = spkd("cache", "catalogue", "lab", "--out", "p.html").ok()
    assert "Not readable" in Path("p.html").read_text()
    assert "note: " in done.out
    Path("empty").mkdir()
    assert spkd("cache", "catalogue", "empty", "--out", "p.html").out == "p.html: 0 caches\n"
    assert "No caches." in Path("p.html").read_text()


def test_a_folder_that_cannot_be_read_does_not_end_the_page(spkd: Callable, lab: Path, web: str) -> None:
    Path("lab/index.html").write_text('<a href="wavlm/">x</a> <a href="gone/">x</a> <a href="students/">x</a>')
    Path("lab/wavlm/verified.json").write_text("{")
    done = spkd("cache", "catalogue", f"{web}/lab", "--out", "page.html").ok()
    page = Path("page.html").read_text()
    assert f"{web}/lab/gone: not found" in page
    assert "1 cache" in done.out
    assert "checked: not known, " in page


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
    spkd("extract", *given, "cache=lab/old/wavlm").ok()
    (lab / "students" / "small" / "model.safetensors").unlink()  # model.json has their digest
    done = spkd("cache", "catalogue", "lab", "--out", "p.html")
    assert (done.code, done.out) == (0, "p.html: 4 caches\n"), done.err
    page = Path("p.html").read_text()
    headings = re.findall(r"<h2 id=(cache-\w+)>([^<]*)</h2>", page)
    assert [heading for _, heading in headings] == ["features", "mirror/wavlm, lab/wavlm", "old/wavlm"]
    assert len({anchor for anchor, _ in headings}) == 3
    assert page.count("lab/students/small") == 1
    assert page.count("spkd cache pull") == 4
