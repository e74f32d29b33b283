"""Pages of `spkd eval`, `report` and `cache catalogue` in a browser that is as wide as a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = 390  # CSS pixels
FRAMES = """<body>{frames}<pre id=widths></pre><script>
onload = () => {{
  const frames = [...document.querySelectorAll("iframe")];
  const measured = frames.map(frame => {{
    const page = frame.contentDocument.documentElement;
    const parts = [...page.querySelectorAll("td, p, h1, h2, svg")].filter(part => !part.closest("pre"));
    const outside = parts.filter(part => part.getBoundingClientRect().right > {phone} + 1);
    return page.scrollWidth + ":" + outside.length }});
  document.getElementById("widths").textContent = "widths " + measured.join(" ") }}
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_no_page_is_wider_than_a_phone(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    audio, name = f"manifest={corpus / 'manifest.csv'}", "a-name-of-a-model-that-is-as-long-as-those-of-sweeps-are"
    spkd("extract", "teacher=none", audio, "cache=lab/features").ok()
    shutil.copytree("lab/features", f"lab/{'long-' * 20}/features")  # a copy
    small = ["student.channels=16", "student.embedding=16", "steps=4", "batch_size=4", "crop=0.5"]
    spkd("train", "--loss", "aam", "cache=lab/features", f"out=lab/{name}", *small).ok()
    given = [corpus / "trials.txt", audio, f"model=lab/{name}", "bootstrap=20", "by=[speaker]", "audio=true"]
    spkd("eval", *given, "out=lab/eval/one").ok()
    spkd("eval", *given[:-2], "out=lab/eval/two", "subtract_mean=false").ok()
    spkd("report", f"{name}-1=lab/eval/one", f"{name}-2=lab/eval/two", "--out", "compared", "--bootstrap", "20").ok()
    spkd("cache", "catalogue", "lab", "--out", "catalogue.html").ok()
    Path("wide.html").write_text("<p style='width: 600px; white-space: nowrap'>what the measurement is to find")
    pages = ["wide.html", "lab/eval/one/report.html", "compared/comparison.html", "catalogue.html"]
    frames = "".join(
        f"<iframe src='{page}' style='width: {PHONE}px; height: 800px; border: 0'></iframe>" for page in pages
    )
    Path("frames.html").write_text(FRAMES.format(frames=frames, phone=PHONE))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    options += ["--allow-file-access-from-files"]  # the frames are files, too
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *options, profile, "--virtual-time-budget=5000", (tmp_path / "frames.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True)
    measured = re.search(r"widths ([\d: ]+)<", shown.stdout)
    assert measured is not None, shown.stderr[-2000:]
    wide, *others = measured[1].split()
    assert wide != f"{PHONE}:0"
    assert others == [f"{PHONE}:0"] * 3
