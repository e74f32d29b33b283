"""Pages of `spkd eval`, `report` and `cache catalogue` in a browser that is as wide as a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import browser

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


@pytest.fixture
def pages(spkd: Callable, corpus: Path) -> list[Path]:
    """A report, a comparison and a catalogue."""
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
    return [Path(page) for page in ("lab/eval/one/report.html", "compared/comparison.html", "catalogue.html")]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_no_page_is_wider_than_a_phone(pages: list[Path], tmp_path: Path) -> None:
    Path("wide.html").write_text("<p style='width: 600px; white-space: nowrap'>what the measurement is to find")
    frames = "".join(
        f"<iframe src='{page}' style='width: {PHONE}px; height: 800px; border: 0'></iframe>"
        for page in ("wide.html", *pages)
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


CONTRASTS = """() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = (color) => (Math.max(luminance(color), paper) + 0.05) / (Math.min(luminance(color), paper) + 0.05);
  const words = [...document.querySelectorAll("h1, h2, p, th, td, li, pre, a, caption")];
  const glyphs = [...document.querySelectorAll("svg [id^=text_] use")].map((each) => getComputedStyle(each).fill);
  const curves = [...document.querySelectorAll("svg path")].map((each) => getComputedStyle(each).stroke);
  return {
    paper,
    words: words.map((each) => contrast(getComputedStyle(each).color)),
    glyphs: glyphs.filter((color) => color !== "none").map(contrast),
    curves: curves.filter((color) => color !== "none").map(contrast),
  };
}"""


@pytest.mark.slow
@pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_figures_stand_out_in_the_light_and_in_the_dark(pages: list[Path], scheme: str) -> None:
    pytest.importorskip("playwright")
    with browser.browser(color_scheme=scheme) as context:
        tab = context.new_page()
        for page in pages:
            tab.goto(page.resolve().as_uri())
            found = tab.evaluate(CONTRASTS)
            assert (found["paper"] < 0.1) == (scheme == "dark")
            # As WCAG 2.1 asks (1.4.3): 4.5 of text.
            assert min(found["words"]) > 4.5, page
            assert min(found["glyphs"], default=5) > 4.5, page
            assert all(value > 1.1 for value in found["curves"]), page  # the grid is faint
