"""The page of `spkd export --to web` in headless Chromium: embeddings, size, and speed.

Trains a student from the teacher's cache (once; a finished run is taken as it is), exports it, and opens the page.
Embeddings of the utterances of a trial list are compared with spkd's. Then a speaker is enrolled and verified by files,
and by a microphone that repeats a recording.

    python benchmarks/web.py --data DIR --teacher FILE --runtime FOLDER

DIR holds librispeech-mini, FILE is the weights of the d-vector, FOLDER the npm package onnxruntime-web. It needs
Chromium and playwright.

Prints, as its last line, one JSON object; keeps it in benchmarks/results/web.json.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import record
import soundfile
import torch
from commands import spkd as command

import spkd
from spkd.corpus.audio import resample
from spkd.corpus.manifest import Manifest, Utterance
from spkd.students import load_student

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests import browser  # noqa: E402

SPEEDS = "view.speeds=[0.8,0.9,1.0,1.1,1.2]"
STUDENT = ["student=xvector", "student.embedding=192"]


def lacking(runtime: Path) -> str:
    """What the benchmark needs and does not have; "" where it has all."""
    if not browser.CHROMIUM:
        return "no Chromium"
    if importlib.util.find_spec("playwright") is None:
        return "no playwright"
    return "" if runtime.is_dir() else "no folder of onnxruntime-web (--runtime FOLDER)"


def wave_of(utterance: Utterance) -> np.ndarray:
    """The utterance's audio, 16 kHz."""
    frames = round((utterance.duration or 0) * 16_000)
    return soundfile.read(utterance.path, dtype="float32", start=round(utterance.start * 16_000), frames=frames)[0]


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines (N,) of embeddings (N, D), in float64."""
    one, other = (vectors.astype(np.float64) for vectors in (one, other))
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def sentence(result: dict) -> str:
    """The sentence of docs/export.md."""
    return (
        f"[`web.py`](../benchmarks/web.py): an x-vector of {result['parameters'] / 1e6:.2f} M parameters in headless "
        f"Chromium (onnxruntime-web {result['runtime']}, one thread). The embeddings of {result['utterances']} "
        f"utterances of test-short have a cosine of at least {result['cosine_web']:.7f} with spkd's, and take "
        f"{result['ms_per_second_of_speech']:.1f} ms for a second of speech. All files are {result['page_mb']:.1f} MB, "
        f"of which {result['model_mb']:.1f} MB are the model."
    )


def main() -> None:
    options = record.options(__doc__, "web", data=True)
    options.add_argument(
        "--runtime", type=Path, default=browser.RUNTIME, help="folder of the npm package onnxruntime-web"
    )
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--channels", type=int, default=96, help="width of the student")
    options.add_argument("--utterances", type=int, default=100, help="utterances of which embeddings are compared")
    given = record.parse(options, steps=2, channels=16, utterances=3)
    if lacks := lacking(given.runtime):
        if not given.tiny:
            raise SystemExit(f"web.py: {lacks}")
        print(json.dumps({"skipped": lacks}))
        return
    torch.set_num_threads(2)
    given.work.mkdir(parents=True, exist_ok=True)
    data, threads = given.data / "librispeech-mini", 0 if given.tiny else 2

    def run(*arguments: object) -> None:
        command(given.work, threads, *map(str, arguments))

    teacher, train = ["teacher=dvector", f"teacher.weights={given.teacher}"], f"manifest={data / 'train.csv'}"
    run("extract", *teacher, train, "cache=cache", SPEEDS, "fbank=true")
    sizes = [f"student.channels={given.channels}", f"steps={given.steps}", f"batch_size={8 if given.tiny else 64}"]
    run("train", "--loss", "contrastive", "--loss", "ntxent", "cache=cache", "out=student", *STUDENT, *sizes)
    dev = [data / "trials-test-other.txt", f"manifest={data / 'test-other.csv'}"]
    run("calibrate", *dev, "model=student", f"force={str(given.tiny).lower()}")
    run("export", "student", "to=web", f"web.runtime={given.runtime}")

    torch.set_num_threads(1)
    page_folder, model = given.work / "student" / "web", spkd.load(given.work / "student", "cpu")
    audio = Manifest.load(data / "test-short.csv").utterances
    speaker = [utterance for utterance in audio if utterance.speaker == audio[0].speaker]
    files = []
    for number, utterance in enumerate(speaker[:4] if len(speaker) > 3 else [*speaker, *audio][:4]):
        files.append(given.work / f"speech{number}.wav")
        soundfile.write(files[-1], wave_of(utterance), 16_000, subtype="PCM_16")
    microphone = given.work / "microphone.wav"
    soundfile.write(microphone, resample(wave_of(speaker[0]), 16_000, 48_000), 48_000, subtype="PCM_16")
    waves = [wave_of(utterance) for utterance in audio[: given.utterances]]
    with browser.served(page_folder) as origin, browser.browser(microphone) as context:
        page = browser.page_of(context, origin)
        seconds = browser.loaded_in(page)
        vectors, times = page.embeddings(waves)
        by_file = page.enrol("file", files[:3])
        decided = page.verify(files[3])
        enrolled = np.array(page.voice("file")["embedding"])
        by_microphone = page.enrol_by_microphone("microphone")
        heard = np.array(page.voice("microphone")["embedding"])
        print(by_file, decided, by_microphone, sep="\n", flush=True)
        errors, elsewhere = page.errors, page.elsewhere
    voiceprint = model.enrol([str(path) for path in files[:3]]).embedding
    one = model.embed(str(files[0]))
    lengths = np.array([len(wave) for wave in waves]) / 16_000
    result = {
        "cosine_web": round(float(cosines(vectors, model.embed(waves)).min()), 9),
        "cosine_voiceprint": round(float(cosines(enrolled[None], voiceprint[None])[0]), 9),
        "cosine_microphone": round(float(cosines(heard[None], one[None])[0]), 4),
        "page_mb": round(sum(path.stat().st_size for path in page_folder.iterdir()) / 1e6, 3),
        "model_mb": round((page_folder / "model.onnx").stat().st_size / 1e6, 3),
        "parameters": sum(p.numel() for p in load_student(given.work / "student").network.parameters()),
        "ms_per_second_of_speech": round(float(np.median(np.array(times) / lengths)), 2),  # others use the cores, too
        "load_seconds": round(seconds, 2),
        "utterances": len(waves),
        "requests_elsewhere": len(elsewhere),
        "errors": errors,
        "runtime": json.loads((page_folder / "export.json").read_text())["runtime"],
    }
    record.keep("web", result, given.tiny)


if __name__ == "__main__":
    main()
