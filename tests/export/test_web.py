"""`spkd export --to web`: the folder, its scripts in Node, and the page in a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import scipy.signal
import soundfile
import torch

import spkd as package
from spkd.corpus.audio import remark_on, resample
from spkd.corpus.manifest import Manifest
from spkd.corpus.quality import WAY, remarks_on, voicing_of
from spkd.demo import synthesis
from spkd.eval.calibration import Calibration
from spkd.export.web import LIMITS, runtime_of
from spkd.students import Checkpoint, build, load_student, save_student
from tests import browser
from tests.conftest import CommandLine
from tests.export.npm import write_package

PAGE = Path(package.__file__).parent / "export" / "page"


@pytest.fixture
def student(tmp_path: Path, corpus: Path, spkd: CommandLine) -> Path:
    """A calibrated student, and the package of the runtime in node_modules."""
    torch.manual_seed(0)
    network = build("tiny", channels=8, embedding=8).eval()  # seconds less to export than the others
    save_student("student", Checkpoint(network))
    given = [corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true"]
    spkd.once("student/calibration.json", "calibrate", *given)
    write_package(tmp_path / "node_modules" / "onnxruntime-web")
    return tmp_path / "student"


def test_the_folder_has_all_that_the_page_loads(spkd: Callable, student: Path, corpus: Path) -> None:
    done = spkd("export", "student", "--to", "web", "licence=apache-2.0", "web.seconds=3").ok()
    assert done.out.splitlines()[-1] == "student/web: written"
    page = student / "web"
    record = json.loads((page / "export.json").read_text())
    names = {path.name for path in page.iterdir()}
    assert names == {*record["sha256"], "export.json", "index.html", "sw.js"}
    for name, expected in record["sha256"].items():
        assert hashlib.sha256((page / name).read_bytes()).hexdigest() == expected
    assert gzip.decompress((page / "ort.wasm.packed").read_bytes()) == b"\0asm" * 1000
    assert (record["runtime"], record["seconds"], record["dim"]) == ("1.30.0", 3.0, 8)
    kept = json.loads((student / "calibration.json").read_text())
    assert record["calibration"] == {
        "weight": kept["weights"][0],
        "offset": kept["offset"],
        "thresholds": kept["thresholds"],
    }
    # Who took part, and where, stays in the laboratory.
    assert "spk0" not in json.dumps(record)
    assert str(corpus) not in json.dumps(record)
    assert b"spk0" not in (page / "model.onnx").read_bytes()
    # All that is loaded is in the folder, and is kept for use without a network.
    kept_files = json.loads(re.search(r"^const FILES = (.*); //", (page / "sw.js").read_text(), re.M)[1])  # type: ignore[index]
    assert {*kept_files} == {"./"} | names - {"sw.js", "README.md"}
    # Browsers check all but the page and its worker by digests.
    html = (page / "index.html").read_text()
    checked = json.loads(re.search(r'<script type="importmap">(.+)</script>', html)[1])["integrity"]  # type: ignore[index]
    assert {*checked} == {f"./{name}" for name in names - {"index.html", "sw.js", "README.md"}}
    for name, expected in {**kept_files, **checked}.items():
        content = (page / (name if name != "./" else "index.html")).read_bytes()
        assert expected == "sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode()
    assert f'href="style.css" integrity="{checked["./style.css"]}"' in html
    assert {*re.findall(r'(?:src|href)="([^"]+)"', html)} <= names
    for script in page.glob("*.js"):
        assert {f"{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())} <= names
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]  # type: ignore[index]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe-inline" not in policy
    session = onnxruntime.InferenceSession(page / "model.onnx", providers=["CPUExecutionProvider"])
    model = package.load("student", "cpu")
    for utterance in Manifest.load(corpus / "manifest.csv").utterances[:4]:
        wave = soundfile.read(utterance.path, dtype="float32")[0]
        found, expected = session.run(None, {"wave": wave[None]})[0][0].astype(float), model.embed(wave).astype(float)
        assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 1 - 1e-6


@pytest.mark.slow
def test_a_new_calibration_names_the_page_that_holds_the_earlier(spkd: Callable, student: Path, corpus: Path) -> None:
    spkd("export", "student", "--to", "web").ok()
    given = [corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true"]
    note = "note: student/web: holds another calibration than the student; export the student again"
    assert note not in spkd("calibrate", *given).ok().out
    assert note in spkd("calibrate", *given, "p_target=0.3").ok().out
    assert (student / "web" / "export.json").exists()


@pytest.mark.slow
def test_voices_are_of_weights_and_features_and_the_worker_is_of_all_files(spkd: Callable, student: Path) -> None:
    def exported() -> tuple[str, str]:
        spkd("export", "student", "to=web").ok()
        record = json.loads(Path("student/web/export.json").read_text())
        assert (record["calibration"] is None) == (not Path("student/calibration.json").is_file())
        return record["model"], Path("student/web/sw.js").read_text().split("\n")[1]

    first = exported()
    assert exported() == first
    shutil.rmtree("node_modules")
    write_package(Path("node_modules/onnxruntime-web"), "1.31.0")
    newer = exported()
    assert (newer[0] == first[0], newer[1] == first[1]) == (True, False)
    Path("student/calibration.json").unlink()
    without = exported()
    assert (without[0] == first[0], without[1] in (first[1], newer[1])) == (True, False)
    network = load_student("student").network
    next(network.parameters()).data[0] += 0.1
    save_student("student", Checkpoint(network))
    assert exported()[0] != first[0]


def test_the_package_of_the_runtime_is_found_or_asked_for(spkd: Callable, student: Path, tmp_path: Path) -> None:
    shutil.move("node_modules", "elsewhere")
    write_package(Path("other"), name="onnxruntime-node")
    write_package(Path("old"))
    Path("old/dist/ort.wasm.bundle.min.mjs").unlink()
    write_package(Path("damaged"))
    Path("damaged/package.json").write_text("{")
    for given, text in (
        ([], "npm install onnxruntime-web"),
        (["web.runtime=nosuch"], "no package onnxruntime-web there"),
        (["web.runtime=other"], "no package onnxruntime-web there"),
        (["web.runtime=old"], "take a newer onnxruntime-web"),
    ):
        done = spkd("export", "student", "to=web", *given)
        assert (done.code, text in done.err, done.err.count("\n")) == (2, True, 1), done.err
    done = spkd("export", "student", "to=web", "web.runtime=damaged")
    assert (done.code, "package.json" in done.err, done.err.count("\n")) == (1, True, 1), done.err
    assert not Path("student/web").exists()
    found = [runtime_of(f"elsewhere{part}") for part in ("", "/onnxruntime-web", "/onnxruntime-web/dist")]
    assert found == [(Path("elsewhere/onnxruntime-web"), "1.30.0")] * 3


def test_what_a_page_cannot_do_is_refused(spkd: Callable, student: Path) -> None:
    calibration = Calibration.load(student / "calibration.json")
    replace(calibration, system=replace(calibration.system, vad="energy 1")).save(student / "calibration.json")
    done = spkd("export", "student", "to=web")
    assert (done.code, "vad=energy 1" in done.err, done.err.count("\n")) == (2, True, 1), done.err
    done = spkd("export", "student", "to=web", "waveform=true")
    assert (done.code, "the page takes the waveform in any case" in done.err) == (2, True)
    assert not Path("student/web").exists()


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")


def in_node(folder: Path, script: str, given: Any) -> Any:
    """What a script gives, to which `given` and the functions of speaker.js are known."""
    shutil.copy(PAGE / "speaker.js", folder / "speaker.mjs")
    (folder / "given.json").write_text(json.dumps(given))
    (folder / "run.mjs").write_text(
        'import * as speaker from "./speaker.mjs";\nimport { readFileSync } from "node:fs";\n'
        f'const given = JSON.parse(readFileSync("given.json"));\n{script}\nconsole.log(JSON.stringify(result));\n'
    )
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def recordings() -> dict[str, np.ndarray]:
    """Recordings at the edges of the rules of quality, 16 kHz."""
    random = np.random.RandomState(0)
    noise = 0.1 * random.randn(16_000)
    spoken = synthesis.utterance(synthesis.speaker(3), 300, 1.5)
    hum = np.sin(2 * np.pi * 100 * np.arange(16_000) / 16_000)
    short = np.concatenate([noise[:7_000], np.zeros(9_000)])
    made = {
        "good": spoken,
        "another voice": synthesis.utterance(synthesis.speaker(2), 202, 2.0),
        "breathy": synthesis.utterance(synthesis.speaker(0), 1, 1.6),
        "noise": noise,
        "low noise": np.cumsum(noise) / 30,
        "hum": 0.1 * hum,
        "hum that grows": hum * np.linspace(0.01, 0.3, 16_000),
        "clipped speech": np.clip(5 * spoken / np.abs(spoken).max(), -1, 1),
        "between silence": np.concatenate([np.zeros(16_000), spoken, np.zeros(7_000)]),
        "in a quiet room": np.concatenate([np.full(64_000, 1e-3) * random.randn(64_000), spoken, np.zeros(3_000)]),
        "short": short,
        "just enough": np.concatenate([noise[:8_000], np.zeros(8_000)]),
        "quiet": 0.01 * noise,
        "level of the limit": 10 ** (-55 / 20) * random.choice([-1.0, 1.0], 16_000),
        "silence": np.zeros(16_000),
        "offset": 0.5 + 0.1 * noise,
        "clipped": np.clip(12 * noise, -1, 1),
        "a few peaks": np.where(np.arange(16_000) % 100 == 0, 1.0, noise),
        "one sample": np.array([0.5]),
    }
    return {name: wave.astype(np.float32) for name, wave in made.items()}


@needs_node
def test_quality_in_the_browser_has_the_rules_of_spkd(tmp_path: Path) -> None:
    waves = recordings()
    script = """const result = given.waves.map((values) => {
        const wave = Float32Array.from(values);
        return speaker.remarks(wave, speaker.remarkOn(wave), given.limits).map((each) => [each.text, each.minor]);
    });"""
    found = in_node(tmp_path, script, {"waves": [wave.tolist() for wave in waves.values()], "limits": LIMITS})
    for (name, wave), remarks in zip(waves.items(), found, strict=True):
        expected = remarks_on(wave, remark_on(wave, wave[:, None]))
        assert remarks == [[each.text.replace(WAY, ""), each.is_minor] for each in expected], name
    assert [len(each) for each in found[:3]] == [0, 0, 1]


def through(path: Path, wave: np.ndarray) -> np.ndarray:
    """A waveform at 16 kHz as it comes out of a file."""
    soundfile.write(path, wave, 16_000)
    return soundfile.read(path, dtype="float32")[0]


@needs_node
def test_samples_are_judged_at_their_own_rate(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    wave = np.clip(3 * random.randn(4_000), -1, 1)
    speech = synthesis.utterance(synthesis.speaker(3), 300, 1.5)
    loud = np.clip(8 * np.sin(2 * np.pi * 100 * np.arange(16_000) / 16_000), -1, 1)
    real = soundfile.read(PAGE.parents[1] / "demo" / "people" / "2033" / "0.flac")[0]
    flat = np.clip(12 * real / np.abs(real).max(), -1, 1)
    channels = {
        "clipped": [wave],
        "clipped, then resampled": [scipy.signal.resample_poly(loud, 147, 160)],
        "clipped, then turned down": [0.2 * flat],
        "clipped, then coded": [through(tmp_path / "flat.mp3", flat)],
        "clipped on one side, then resampled": [0.1 * scipy.signal.resample_poly(np.minimum(flat, 0.7), 3, 1)],
        "real speech": [real],
        "floats beyond full scale": [6 * speech / np.abs(speech).max()],
        "opposite": [wave, -wave],
        "opposite but for an offset": [wave, 0.2 - wave],
        "one is silent": [wave / 2, 0 * wave],
        "two": [wave / 3, random.randn(4_000) / 9],
    }
    script = """const result = given.map((parts) => {
        const channels = parts.map((each) => Float32Array.from(each));
        return speaker.remarkOn(speaker.mono(channels), channels);
    });"""
    given = {name: np.stack(each).astype(np.float32) for name, each in channels.items()}
    found = in_node(tmp_path, script, [each.tolist() for each in given.values()])
    assert found == [remark_on(each.mean(0), each.T) for each in given.values()]
    assert ["clipped" in each for each in found[:7]] == [*[True] * 5, False, False]
    assert "cancel" in found[7]
    script = """const bad = [[0.1, NaN], [Infinity, 0], [], [0, -20.5], [0.5]].map((each) => Float32Array.from(each));
    const result = bad.map(speaker.unusable);"""
    found = in_node(tmp_path, script, None)
    assert ["not finite" in found[0], "not finite" in found[1], found[2], "20.5" in found[3], found[4]] == [
        *(True, True, "holds no samples", True, "")
    ]


@needs_node
def test_scores_in_the_browser_are_the_formulas(tmp_path: Path) -> None:
    random = np.random.RandomState(1)
    vectors, test = random.randn(4, 192), random.randn(192)
    vectors[:3] += 3 * test  # the last one is unlike the others
    calibration = {"weight": 21.5, "offset": -7.25, "thresholds": {"eer": 0.4}}
    script = """const units = given.vectors.map(speaker.unit);
    const score = speaker.cosine(speaker.mean(units), speaker.unit(given.test));
    const likelihood = speaker.ratio(score, given.calibration);
    const unlike = speaker.outliers(units, given.calibration);
    const words = [[0.7, 5], [0.2, -3], [1, 20]].map(([cosine, ratio]) => speaker.inWords(cosine, ratio));
    const meanings = ["eer", "false_alarm_0.001", "min_dcf_0.05"].map(speaker.meaning);
    const result = { score, likelihood, unlike, words, meanings };"""
    given = {"vectors": vectors.tolist(), "test": test.tolist(), "calibration": calibration}
    found = in_node(tmp_path, script, given)
    cosines = vectors @ test / np.linalg.norm(vectors, axis=1) / np.linalg.norm(test)
    assert found["score"] == pytest.approx(cosines.mean(), abs=1e-12)
    assert found["likelihood"] == pytest.approx(21.5 * cosines.mean() - 7.25, abs=1e-10)
    assert found["unlike"] == [4]
    assert found["words"] == [
        "A cosine of 0.700 is 148 times as likely from one person as from two.",  # e^5
        "A cosine of 0.200 is 20.1 times as likely from two people as from one.",  # e^3
        "A cosine of 1.000 is 4.9e+8 times as likely from one person as from two.",  # e^20
    ]
    assert "accepts 0.1 % of the pairs of two people" in found["meanings"]


@needs_node
@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050, 8_000])
def test_the_microphone_is_resampled_without_aliases(tmp_path: Path, rate: int) -> None:
    time = np.arange(rate // 4) / rate
    wave = (0.3 * np.sin(2 * np.pi * 1_000 * time) + 0.3 * np.sin(2 * np.pi * 11_000 * time)).astype(np.float32)
    if rate <= 22_050:  # above half of the rate
        wave = (0.3 * np.sin(2 * np.pi * 1_000 * time)).astype(np.float32)
    script = "const result = Array.from(speaker.resample(Float32Array.from(given.wave), given.rate));"
    found = np.array(in_node(tmp_path, script, {"wave": wave.tolist(), "rate": rate}))
    assert np.abs(found - resample(wave, rate, 16_000)).max() < 1e-5
    expected = 0.3 * np.sin(2 * np.pi * 1_000 * np.arange(len(found)) / 16_000)
    inside = slice(400, -400)
    assert np.abs(found - expected)[inside].max() < 2e-3
    theirs = scipy.signal.resample_poly(wave.astype(float), 16_000, rate)
    assert np.abs(found - theirs)[inside].max() < 5e-3


needs_browser = pytest.mark.skipif(
    not browser.CHROMIUM or importlib.util.find_spec("playwright") is None or not browser.RUNTIME.is_dir(),
    reason="needs Chromium, playwright and onnxruntime-web (tests/browser.py)",
)


@pytest.fixture
def speech(corpus: Path, tmp_path: Path) -> list[Path]:
    """Four recordings as WAV files of 16 bits, of the first two speakers in turn."""
    files = []
    for number, index in enumerate((3, 4, 5, 6)):  # the first speaker is too breathy to be found
        wave = soundfile.read(Manifest.load(corpus / "manifest.csv")[index].path)[0]
        files.append(tmp_path / f"speech{number}.wav")
        soundfile.write(files[-1], wave, 16_000, subtype="PCM_16")
    return files


@pytest.mark.slow
@needs_browser
def test_a_voice_is_enrolled_and_verified_in_a_browser(
    spkd: Callable, student: Path, speech: list[Path], tmp_path: Path
) -> None:
    spkd("export", "student", "to=web", f"web.runtime={browser.RUNTIME}", "web.seconds=2").ok()
    model, person = package.load("student", "cpu"), "Ann <img src=x onerror=alert(1)>"
    voiceprint = model.enrol([str(path) for path in speech[:3]])
    expected = model.verify(voiceprint, str(speech[3]))
    soundfile.write("silent.wav", np.zeros(32_000), 16_000)
    Path("text.wav").write_text("no audio")
    # Of whatever 2 s the microphone gives, the embedding is nearly the same.
    whole = soundfile.read(speech[3], dtype="float32")[0]
    tiles = [np.tile(whole[start : start + 4_000], 16) for start in range(0, len(whole) - 4_000, 1_000)]
    voice = max(tiles, key=lambda wave: voicing_of(wave).is_speech * voicing_of(wave).variation)
    soundfile.write("microphone.wav", resample(voice, 16_000, 48_000), 48_000, subtype="PCM_16")
    with browser.browser(tmp_path / "microphone.wav") as context:
        with browser.served(student / "web") as origin:
            page = browser.page_of(context, origin)
            page.open()
            # Files: what is kept and shown is what spkd computes.
            assert "first" in page.enrol("", speech[:3])
            assert page.enrol(person, speech[:3]).startswith(f"{person} is enrolled")
            kept = page.voice(person)
            ours, theirs = np.array(kept["embedding"]), voiceprint.embedding.astype(float)
            assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 1 - 1e-6
            assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), abs=1e-4)
            assert kept["seconds"] == pytest.approx(voiceprint.seconds, abs=1e-3)
            result = page.verify(speech[3])
            assert result.startswith("The same speaker" if expected.same else "Different speakers")
            assert f"Log-likelihood ratio {expected.ratio:.2f}." in result
            assert f"A cosine of {expected.score:.3f} is" in result
            assert "is enrolled: delete that voice first" in page.enrol(person, speech[:3])
            assert page.verify(tmp_path / "silent.wav").startswith("No decision")
            assert "does not read it as audio" in page.verify(tmp_path / "text.wav")
            # The microphone, which repeats a recording.
            assert page.enrol_by_microphone("Bob").startswith("Bob is enrolled")
            heard = np.array(page.voice("Bob")["embedding"])
            again = model.embed("microphone.wav").astype(float)
            assert (
                heard @ again / np.linalg.norm(heard) / np.linalg.norm(again) > 0.97
            )  # Chromium takes the highest frequencies away
            assert page.verify(None).split("\n")[0].endswith("Bob")
            page.tab.evaluate("() => navigator.serviceWorker.ready.then(() => 0)")
            assert page.elsewhere == []
            assert page.errors == []
        # Without the server.
        page.open()
        assert page.tab.inner_text("#voices").count("3 recordings") == 2
        assert f"A cosine of {expected.score:.3f} is" in page.verify_of(person, speech[3])
        page.tab.get_by_role("button", name="Delete Bob").click()
        assert page.tab.evaluate("() => Object.keys(localStorage)") == [f"spkd.voice.{person}"]
        assert page.errors == []


@pytest.mark.slow
@needs_browser
def test_voices_of_another_model_and_damaged_files_are_refused(
    spkd: Callable, student: Path, speech: list[Path], tmp_path: Path
) -> None:
    (student / "calibration.json").unlink()
    spkd("export", "student", "to=web", f"web.runtime={browser.RUNTIME}").ok()
    save_student("second", Checkpoint(build("tiny", channels=16, embedding=8).eval()))
    spkd("export", "second", "to=web", f"web.runtime={browser.RUNTIME}").ok()
    # One address, and no worker that keeps the files of the first.
    with browser.served(tmp_path) as root, browser.browser(service_workers="block") as context:
        first, second = (browser.page_of(context, f"{root}{name}/web/") for name in ("student", "second"))
        first.open()
        assert "no decision is made" in first.tab.inner_text("#state")
        first.enrol("Ann", speech[:3])
        result = first.verify(speech[3])
        assert result.startswith("No decision")
        assert "Cosine with Ann: " in result
        assert "cannot be used" in first.verify(None) or "no microphone" in first.verify(None)
        second.open()
        assert "of another model" in second.tab.inner_text("#voices")
        assert "Enrol a voice first" in second.verify(speech[3])
        second.tab.evaluate("() => localStorage.setItem('spkd.voice.Eve', '{')")
        second.open()
        assert "damaged: delete it" in second.tab.inner_text("#voices")
        # A voice in storage whose numbers were changed.
        voice = first.voice("Ann")
        voice["embedding"] = [value / 2 for value in voice["embedding"]]
        first.tab.evaluate("text => localStorage.setItem('spkd.voice.Ann', text)", json.dumps(voice))
        first.open()
        assert "damaged: delete it" in first.tab.inner_text("#voices")
        assert "Enrol a voice first" in first.verify(speech[3])


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", ["model.onnx", "export.json", "ort.wasm.packed", "speaker.js", "app.js"])
def test_a_page_with_a_changed_byte_says_so(spkd: Callable, student: Path, name: str) -> None:
    spkd("export", "student", "to=web", f"web.runtime={browser.RUNTIME}").ok()
    data = bytearray((student / "web" / name).read_bytes())
    data[data.rindex(b" ")] ^= 1
    (student / "web" / name).write_bytes(data)
    with browser.served(student / "web") as origin, browser.browser(service_workers="block") as context:
        page = browser.page_of(context, origin)
        page.open()
        what = "one of its scripts" if name.endswith("js") else name
        assert f"cannot be used: {what} cannot be loaded, is damaged, or is of another export" in page.tab.inner_text(
            "#state"
        )
        assert not page.tab.is_visible("main")


@pytest.mark.slow
@needs_browser
def test_a_clipped_microphone_is_remarked_on(spkd: Callable, student: Path, speech: list[Path], tmp_path: Path) -> None:
    spkd("export", "student", "to=web", f"web.runtime={browser.RUNTIME}", "web.seconds=2").ok()
    wave = resample(soundfile.read(speech[3], dtype="float32")[0], 16_000, 48_000)
    soundfile.write("loud.wav", np.clip(8 * wave / np.abs(wave).max(), -1, 1), 48_000, subtype="PCM_16")
    # Chromium gives it at another rate, and so beyond full scale.
    with browser.served(student / "web") as origin, browser.browser(tmp_path / "loud.wav") as context:
        page = browser.page_of(context, origin)
        page.open()
        page.name("Ann")
        page.tab.get_by_role("button", name="Record 1 of 3").click()
        page.tab.wait_for_selector("#takes li:nth-child(1).done, #enrol-message.bad")
        assert "its samples are clipped" in page.tab.inner_text("#takes")
        # The part of the page that takes the microphone is checked as well.
        (student / "web" / "capture.js").write_text("// another")
        page.tab.evaluate("async () => { for (const name of await caches.keys()) await caches.delete(name) }")
        page.tab.get_by_role("button", name="Record 2 of 3").click()
        assert "capture.js cannot be loaded, is damaged" in page.message()


@pytest.mark.slow
@needs_browser
def test_recordings_of_a_voice_are_of_one_person_and_count_once(
    spkd: Callable, student: Path, speech: list[Path], tmp_path: Path
) -> None:
    spkd("export", "student", "to=web", f"web.runtime={browser.RUNTIME}").ok()
    wave = soundfile.read(speech[1], dtype="float32")[0]
    soundfile.write("loud.wav", np.clip(8 * wave / np.abs(wave).max(), -1, 1), 16_000)
    remark = "loud.wav: its samples are clipped in more than 2 % of their samples"
    with browser.served(student / "web") as origin, browser.browser() as context:
        page = browser.page_of(context, origin)
        page.open()

        def chosen(*files: Path) -> None:
            page.tab.set_input_files("#enrol-files", [str(path) for path in files])

        page.name("Ann")
        chosen(*speech[:2])
        page.tab.wait_for_selector("#takes li:nth-child(2).done")
        page.name("Eve")
        page.tab.press("#name", "Tab")
        page.tab.wait_for_selector("#enrol-message:text('the recordings of Ann are dropped')")
        chosen(speech[2])
        page.tab.wait_for_selector("#takes li:nth-child(1).done")
        chosen(speech[2])
        assert page.message() == "speech2.wav is the same as Recording 1: each recording counts once."
        assert page.tab.locator("#takes .done").count() == 1
        chosen(tmp_path / "loud.wav", speech[0])
        page.tab.wait_for_selector("#enrol-message:text('Eve is enrolled')")
        message = page.message()
        assert message.split("\n")[:2] == ["Eve is enrolled.", f"{remark}."]
        # They stay with the voice, as in a file of voices.
        paths = [str(speech[2]), str(tmp_path / "loud.wav"), str(speech[0])]
        expected = package.load("student", "cpu").enrol(paths).remarks
        kept = page.voice("Eve")
        assert kept["remarks"] == [each.removeprefix(f"{tmp_path}/") for each in expected]
        assert kept["remarks"][0] == remark
        page.open()
        assert remark in page.tab.inner_text("#voices").split("\n")
        # A voice of a page that kept none.
        script = """async () => {
            const { save, voices } = await import("./store.js");
            const { remarks, ...voice } = voices().get("Eve");
            save("Bob", voice);
        }"""
        page.tab.evaluate(script)
        page.open()
        assert page.verify_of("Bob", speech[3]).split("\n")[0].endswith("Bob")
        assert page.errors == []
