"""docs/voxceleb.md: its commands as they stand there, on archives of the same names with a few recordings."""

from __future__ import annotations

import io
import itertools
import re
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus.manifest import Manifest

PAGE = Path(__file__).parents[1] / "docs" / "voxceleb.md"
ARCHIVES = {  # archive -> name of a recording in it; speakers
    "vox2_dev_aac.zip": ("dev/aac/id{:05d}/v{}/{:05d}.m4a", range(12, 18)),
    "vox1_test_wav.zip": ("wav/id{:05d}/v{}/{:05d}.wav", range(10270, 10274)),
    "vox1_dev_wav.zip": ("wav/id{:05d}/v{}/{:05d}.wav", range(10001, 10005)),
}


def recording(random: np.random.RandomState, suffix: str) -> bytes:
    """Noise of 1.2 s that differs in its spectrum."""
    wave = np.convolve(random.normal(size=19_200), random.normal(size=8), "same").astype(np.float32)
    wave *= 0.1 / np.abs(wave).max()
    file = io.BytesIO()
    if suffix == ".wav":
        soundfile.write(file, wave, 16_000, "PCM_16", format="WAV")
        return file.getvalue()
    av = pytest.importorskip("av")
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for first in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, first : first + 1024], "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, first
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.slow
def test_every_command_of_the_page_runs(spkd: Callable, tiny_wavlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, trials = np.random.RandomState(0), {}
    for archive, (pattern, speakers) in ARCHIVES.items():
        names = [pattern.format(speaker, video, 1) for speaker in speakers for video in range(4)]
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(name, recording(random, Path(name).suffix))
        ids = ["/".join(Path(name).parts[-3:]) for name in names]
        trials[archive] = "".join(f"{int(a[:7] == b[:7])} {a} {b}\n" for a, b in itertools.combinations(ids, 2))
    Path("veri_test2.txt").write_text(trials["vox1_test_wav.zip"])
    Path("vox1-dev-trials.txt").write_text(trials["vox1_dev_wav.zip"])
    for name in ("musan/noise/hum.wav", "rirs/room.wav", "a.wav", "b.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(recording(random, ".wav"))
    response = np.exp(-np.arange(800) / 80) * random.normal(size=800)
    response[0] = 5.0
    soundfile.write("rirs/room.wav", 0.1 * response, 16_000)
    # Sizes alone are others.
    for key, value in {
        "DEVICE": "cpu",
        "TEACHER__WEIGHTS": str(tiny_wavlm),
        "MODEL__WEIGHTS": str(tiny_wavlm),
        "VIEW__PLAN": "crops:2,1.0",
        "STEPS": "4",
        "BATCH_SIZE": "8",
        "CROP": "0.8",
        "STUDENT__NAME": "tiny",
        "STUDENT__CHANNELS": "8",
        "STUDENT__EMBEDDING": "6",
        "FORCE": "true",
        "BOOTSTRAP": "5",
    }.items():
        monkeypatch.setenv(f"SPKD_{key}", value)
    commands = re.findall(r"^    spkd (.+)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) > 10
    for command in commands:
        done = spkd(*shlex.split(command))
        assert done.code == 0, f"{command}: {done.err}"
    assert [len(Manifest.load(Path(f"{name}.csv"))) for name in ("vox2", "vox1-test", "vox1-dev")] == [24, 16, 16]
    for made in ("caches/wavlm/COMPLETE.json", "comparison/comparison.html", "student/model.wave.onnx"):
        assert Path(made).is_file(), made
