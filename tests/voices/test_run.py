"""People enrolled, verified and identified, from the command line and in Python."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import spkd as interface
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.model import Verification
from spkd.voices.run import lines_of
from spkd.voices.store import changing
from tests import processes
from tests.conftest import served
from tests.corpus.test_remote import Ranges
from tests.eval.students import save_untrained


@pytest.fixture
def student(tmp_path: Path, corpus: Path, spkd: Callable) -> Path:
    """A student with a calibration, and recordings in the current folder."""
    folder = save_untrained(tmp_path / "student", corpus)
    given = (corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true")
    spkd("calibrate", *given).ok()
    utterances = list(Manifest.load(corpus / "manifest.csv"))
    # The voice of the first speaker is so breathy that no speech is found in two of the recordings: they come last.
    for number, utterance in enumerate([*utterances[3:], *utterances[:3]]):
        shutil.copy(utterance.path, f"{number}.wav")
    return folder


def expected_cosines(model: interface.SpeakerModel, enrolled: list[str], tested: str) -> np.ndarray:
    """(N,): cosine of the test with each recording, by its formula in float64."""
    test = model.embed(tested).astype(np.float64)
    return np.array([e @ test / np.sqrt((e @ e) * (test @ test)) for e in model.embed(enrolled).astype(np.float64)])


def test_a_voice_is_enrolled_verified_identified_and_removed(spkd: Callable, student: Path) -> None:
    model = interface.load(student)
    done = spkd("enrol", "ann", "0.wav", "1.wav", "2.wav").ok()
    assert done.out.startswith("voices.json: ann: 3 recordings, ")
    spkd("enrol", "bob", "6.wav", "voices=voices.json").ok()
    # The score is the mean of the cosines with the recordings.
    mean = expected_cosines(model, ["0.wav", "1.wav", "2.wav"], "4.wav").mean()
    assert model.calibration is not None
    ratio = float(model.calibration({"score": np.array([mean])})[0])
    found = model.verify(interface.Voices.load("voices.json")["ann"], "4.wav")
    assert (found.score, found.ratio) == (pytest.approx(mean, abs=1e-5), pytest.approx(ratio, abs=1e-3))
    shown = spkd("verify", "ann", "4.wav").ok().out
    assert shown.startswith(f"ann, 4.wav: {'the same speaker' if ratio >= found.threshold else 'different speakers'}")
    assert f"log-likelihood ratio {ratio:.2f}: a cosine of {mean:.3f} is " in shown
    assert "different speakers" in spkd("verify", "4.wav", "ann", "threshold=1e6").ok().out
    assert "the same speaker" in spkd("verify", "0.wav", "1.wav", "threshold=-1e6").ok().out
    # The nearest voice is named where it reaches the threshold.
    near = {name: expected_cosines(model, files, "4.wav").mean() for name, files in {
        "ann": ["0.wav", "1.wav", "2.wav"], "bob": ["6.wav"]}.items()}  # fmt: skip
    best = max(near, key=lambda name: near[name])
    assert spkd("identify", "4.wav", "threshold=-1e6").ok().out.startswith(f"4.wav: {best} (")
    assert spkd("identify", "4.wav", "threshold=1e6").ok().out.startswith("4.wav: nobody enrolled (")
    note = "note: among 2 voices a stranger is taken for one of them up to 2 times as often as by one voice"
    assert [note in spkd("identify", "4.wav", *given).ok().out for given in ([], ["threshold=1e6"])] == [True, False]
    identified = model.identify("4.wav", interface.Voices.load("voices.json"), -1e6)
    assert (identified.name, list(identified.results)) == (best, sorted(near, key=lambda name: -near[name]))
    # List and remove.
    lines = spkd("voices").ok().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["ann", "bob"]
    spkd("voices", "--remove", "ann").ok()
    assert "no such file, and no voice in voices.json" in spkd("verify", "ann", "4.wav").err
    assert list(interface.Voices.load("voices.json")) == ["bob"]
    assert list(Path().glob("voices.json.*")) == []  # no lock stays


def count(path: Path, times: int) -> None:
    """Add to the number in a file, reading and writing it, each time while the voices are locked."""
    for _ in range(times):
        with changing(path.with_name("voices.json")):
            path.write_text(str(int(path.read_text()) + 1))


@pytest.mark.slow
def test_locks_that_are_removed_keep_processes_apart(tmp_path: Path) -> None:
    path = tmp_path / "number"
    path.write_text("0")
    running = [processes.Running(count, path, 25) for _ in range(4)]
    for each in running:
        assert each.communicate()[1] == ""
    assert (path.read_text(), [file.name for file in tmp_path.iterdir()]) == ("100", ["number"])


def test_poor_recordings_get_no_decision(spkd: Callable, student: Path) -> None:
    model, silence = interface.load(student), np.zeros(32_000, np.float32)
    with pytest.raises(SpkdError, match="recording 2: its samples are digital silence"):
        model.enrol(["0.wav", silence])
    ann = model.enrol("0.wav")
    assert model.verify(ann, silence, -1e6).same is None
    found = model.identify(silence, {"ann": ann}, -1e6)
    assert (found.name, found.results["ann"].same) == (None, None)
    assert found.results["ann"].remarks == (
        "the recording: its samples are digital silence",
        "the recording: only 0.00 s are louder than -55 dB of full scale; a decision needs 0.5 s",
    )
    spoken = soundfile.read("6.wav")[0]
    loud = np.clip(5 * spoken / np.abs(spoken).max(), -1, 1)
    assert model.enrol(loud).remarks == ("recording 1: its samples are clipped in more than 2 % of their samples",)


def test_a_recording_unlike_the_others_is_named(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = interface.load(student)
    assert model.calibration is not None
    files = [f"{number}.wav" for number in range(15)]
    units = model.embed(files).astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    # Two recordings that are alike, and one that is far from both, by brute force.
    a, b = divmod(int((units @ units.T - 2 * np.eye(15)).argmax()), 15)
    c = int((units @ (units[a] + units[b])).argmin())
    middle = (units[a] @ units[b] + units[c] @ (units[a] + units[b]) / 2) / 2
    limit = float(model.calibration({"score": np.array([middle])})[0])
    monkeypatch.setitem(model.calibration.thresholds, "eer", limit)  # type: ignore[arg-type]
    outliers = [
        one
        for one, others in [(a, (b, c)), (b, (a, c)), (c, (a, b))]
        if units[one] @ (units[others[0]] + units[others[1]]) / 2 < middle
    ]
    assert c in outliers
    remarks = model.enrol([files[a], files[b], files[c]]).remarks
    assert remarks == tuple(f"{n}.wav: may be of another speaker" for n in outliers)
    # Of two, neither is known to be the right one.
    assert model.enrol([files[a], files[b]]).remarks == ()
    limit = float(model.calibration({"score": np.array([units[a] @ units[c] + 0.01])})[0])
    monkeypatch.setitem(model.calibration.thresholds, "eer", limit)  # type: ignore[arg-type]
    doubt = f"{files[a]}, {files[c]}: one may be of another speaker"
    assert model.enrol([files[a], files[c]]).remarks == (doubt,)


def test_remarks_on_an_enrolment_stay_with_the_voice(spkd: Callable, student: Path) -> None:
    wave, rate = soundfile.read("6.wav")
    soundfile.write("loud.wav", np.clip(5 * wave / np.abs(wave).max(), -1, 1), rate, subtype="PCM_16")
    remark = "\n  loud.wav: its samples are clipped in more than 2 % of their samples\n"
    assert remark in spkd("enrol", "ann", "loud.wav").ok().out
    assert remark in spkd("voices").ok().out


def test_voices_are_for_their_owner_alone_and_a_link_is_not_replaced(spkd: Callable, student: Path) -> None:
    spkd("enrol", "ann", "0.wav").ok()
    assert Path("voices.json").stat().st_mode & 0o777 == 0o600
    Path("voices.json").chmod(0o640)
    spkd("enrol", "bob", "1.wav").ok()
    assert Path("voices.json").stat().st_mode & 0o777 == 0o640
    Path("link.json").symlink_to("voices.json")
    before = Path("voices.json").read_bytes()
    for words in (("enrol", "eve", "2.wav", "voices=link.json"), ("voices", "link.json", "--remove", "ann")):
        done = spkd(*words)
        assert (done.code, "link.json: a symbolic link, which is not written through" in done.err) == (2, True)
    assert (Path("link.json").is_symlink(), Path("voices.json").read_bytes()) == (True, before)
    assert spkd("voices", "link.json").ok().out.count("enrolled") == 2


def test_two_recordings_need_no_voices_and_one_that_is_damaged_stops_nothing(spkd: Callable, student: Path) -> None:
    spkd("enrol", "ann", "0.wav", "voices=good.json").ok()
    Path("voices.json").write_text('{"damaged":')
    assert "a cosine of " in spkd("verify", "0.wav", "1.wav").ok().out
    assert spkd("verify", "ann", "1.wav").code == 1
    Path("text.wav").write_text("hello")
    done = spkd("identify", "1.wav", "text.wav", "2.wav", "voices=good.json", "threshold=-1e6")
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1.wav", "text.wav", "2.wav", "model"]
    assert lines[1].startswith("text.wav: left out (cannot be decoded (")
    assert "b'" not in lines[1]
    assert (done.code, "1 of 3 recordings could not be used" in done.err) == (1, True)


def test_without_sound_there_are_reasons_and_no_odds(spkd: Callable, student: Path) -> None:
    soundfile.write("sil.wav", np.zeros(48_000), 16_000)
    silence = "its samples are digital silence"
    out = spkd("verify", "0.wav", "sil.wav").ok().out
    assert out.startswith(f"0.wav, sil.wav: no decision\n  sil.wav: {silence}\n  sil.wav: only 0.00 s are louder")
    assert "times as likely" not in out
    assert f"sil.wav: {silence}" in spkd("enrol", "zed", "sil.wav").err
    spkd("enrol", "ann", "0.wav").ok()
    assert spkd("identify", "sil.wav").ok().out.startswith(f"sil.wav: no decision\n  sil.wav: {silence}\n")


@pytest.mark.parametrize(
    ("ratio", "times"), [(0.0, "1"), (np.log(1.934), "1.93"), (-np.log(1926), "1,930"), (np.log(1.9e12), "1.9e+12")]
)
def test_odds_are_numbers_that_people_read(ratio: float, times: str) -> None:
    lines = list(lines_of("a", "b", Verification(ratio >= 0, 0.5, ratio, 0.0), "eer"))
    assert f"is {times} times as likely" in lines[1]


def test_voices_of_another_model_are_refused(spkd: Callable, student: Path, corpus: Path) -> None:
    spkd("enrol", "ann", "0.wav").ok()
    save_untrained(Path("other"), corpus, seed=1)
    shutil.copy(student / "calibration.json", "c.json")
    done = spkd("enrol", "bob", "1.wav", "model=other")
    assert (done.code, "of another model than other; enrol them again" in done.err) == (2, True)
    assert list(interface.Voices.load("voices.json")) == ["ann"]
    model = interface.load(student)
    with pytest.raises(UsageError, match="a voiceprint of another model than .*student"):
        model.verify(interface.load("other").enrol("0.wav"), "1.wav")
    # The same student elsewhere is the same model.
    shutil.copytree(student, "moved")
    assert interface.load("moved").digest == model.digest
    assert "the same speaker" in spkd("verify", "ann", "0.wav", "model=moved", "threshold=-1e6").ok().out


def test_recordings_in_containers_and_on_web_servers_are_as_files(spkd: Callable, student: Path) -> None:
    Path("web").mkdir()
    with tarfile.open("web/x.tar", "w") as tar:
        tar.add("0.wav")
    with tarfile.open("web/x.tar") as tar:
        info = tar.getmember("0.wav")
    address = f"x.tar#{info.offset_data}+{info.size}.wav"
    expected = spkd("verify", "0.wav", "1.wav").ok().out.splitlines()[1:]
    assert spkd("verify", f"web/{address}", "1.wav").ok().out.splitlines()[1:] == expected
    assert spkd("verify", "1.wav", f"web/{address}").ok().out.splitlines()[1:] == expected
    spkd("enrol", "ann", f"web/{address}").ok()
    assert spkd("identify", f"web/{address}", "threshold=-1e6").ok().out.startswith(f"web/{address}: ann (")
    assert "web/none.tar#1+44.wav: no such file" in spkd("verify", "web/none.tar#1+44.wav", "1.wav").err
    with served(Path("web").resolve(), type("Own", (Ranges,), {"asked": []})) as url:
        assert spkd("verify", f"{url}/{address}", "1.wav").ok().out.splitlines()[1:] == expected


def test_what_cannot_be_a_voice_is_refused(spkd: Callable, student: Path) -> None:
    spkd("enrol", "ann", "0.wav").ok()
    before = Path("voices.json").read_bytes()
    spkd("enrol", "ann", "0.wav").ok()  # again, as after a power cut
    shutil.copy("1.wav", "same.wav")
    for words, message in (
        (("enrol", "ann", "1.wav"), "ann is enrolled; `spkd voices --remove ann` first"),
        (("enrol", "a\nb", "1.wav"), "no name for a voice"),
        (("enrol", " bob ", "1.wav"), "no name for a voice"),
        (("enrol", "bob", "1.wav", "1.wav"), "recording 2: is the same as recording 1; each recording counts once"),
        (("enrol", "bob", "1.wav", "same.wav"), "same.wav: is the same as 1.wav; each recording counts once"),
        (("verify", "ann", "1.wav", "threshold=-1e400"), "threshold=-inf: give a number"),
        (("voices", "voices=voices.json"), "here the file is named alone: `spkd voices voices.json`"),
        (("enrol", "bob", "none.wav"), "none.wav: no such file"),
        (("enrol", "0.wav", "1.wav"), "enrol 0.wav: a file has this name; name the person first"),
        (("enrol", "bob", "model=student"), "name one recording or several"),
        (("enrol", "bob", "1.wav", "thresold=1"), "unknown key"),
        (("verify", "anne", "1.wav"), "no voice in voices.json; did you mean 'ann'"),
        (("verify", "ann", "1.wav", "threshold=err"), "threshold='err'"),
        (("identify", "1.wav", "voices=none.json"), "no voices none.json"),
        (("voices", "--remove", "bob"), "no voice 'bob'"),
    ):
        done = spkd(*words)
        assert (done.code, message in done.err) == (2, True) or (done.code == 1 and message in done.err), done.err
    assert Path("voices.json").read_bytes() == before
    shutil.copy("0.wav", "ann")
    assert "a voice in voices.json and a file here; write ./ann" in spkd("verify", "ann", "1.wav").err
    # Files of others stay.
    Path("mine.json").write_text("{}")
    assert "not a file of voices" in spkd("enrol", "bob", "1.wav", "voices=mine.json").err
    assert Path("mine.json").read_text() == "{}"


def test_a_changed_file_of_voices_is_damaged(spkd: Callable, student: Path) -> None:
    spkd("enrol", "ann", "0.wav").ok()
    tree = json.loads(Path("voices.json").read_text())
    tree["voices"]["eve"] = tree["voices"].pop("ann")
    Path("voices.json").write_text(json.dumps(tree))
    done = spkd("identify", "1.wav")
    assert (done.code, "damaged (its values are not those of its digest)" in done.err) == (1, True)
    # With a digest that fits: a name that nobody can have, and a voice of another width.
    Path("voices.json").unlink()
    spkd("enrol", "ann", "0.wav").ok()
    kept = interface.Voices.load("voices.json")
    replace(kept, prints={"a=b": kept["ann"]}).save()
    done = spkd("verify", "ann", "1.wav")
    assert (done.code, "damaged ('a=b': no name for a voice" in done.err) == (1, True), done.err
    replace(kept, prints={"ann": replace(kept["ann"], embedding=kept["ann"].embedding[:2])}).save()
    for words in (("verify", "ann", "1.wav"), ("identify", "1.wav")):
        done = spkd(*words)
        assert (done.code, "a voiceprint of student has not " in done.err, done.out) == (2, True, ""), done.err


def test_voices_with_a_detector_are_of_the_model_with_that_detector(spkd: Callable, student: Path) -> None:
    plain = interface.load(student)
    spoken = interface.load(student, vad="energy")
    assert plain.digest != spoken.digest
    with pytest.raises(UsageError, match="a voiceprint of another model"):
        spoken._sides({"it": plain.enrol("0.wav")}, 16_000)
    done = spkd("verify", "0.wav", "1.wav", "vad=energy")
    assert (done.code, "calibrated with vad=none" in done.err) == (2, True)


def test_without_a_calibration_there_is_a_cosine_and_no_decision(spkd: Callable, student: Path) -> None:
    (student / "calibration.json").unlink()
    spkd("enrol", "ann", "0.wav", "1.wav").ok()
    cosine = expected_cosines(interface.load(student), ["0.wav", "1.wav"], "4.wav").mean()
    done = spkd("verify", "ann", "4.wav", "model=bundled")
    assert (done.code, "a voiceprint of another model" in done.err, done.out) == (2, True, "")
    out = spkd("verify", "ann", "4.wav").ok().out
    assert out.startswith("ann, 4.wav: no decision, as student has no calibration")
    assert float(out.split("cosine ")[1].split(";")[0]) == pytest.approx(cosine, abs=1e-5)
    assert f"(cosines: ann {cosine:.3f})" in spkd("identify", "4.wav").ok().out
