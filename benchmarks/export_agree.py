"""A student in other runtimes: onnxruntime, sherpa-onnx, 8-bit integers, PyTorch programs, LiteRT.

Trains a student on sherpa-onnx's features from the teacher's cache (once; a finished run is taken as it is), exports it
by `spkd export` to everything, and compares embeddings, error rates, bytes and speed on the utterances of a trial list.

    python benchmarks/export_agree.py --data DIR --teacher FILE [--litert-python PYTHON]

DIR holds librispeech-mini, FILE is the weights of the d-vector.

Prints, as its last line, one JSON object; keeps it in benchmarks/results/export_agree.json. LiteRT's converter wants
another torch than torchaudio does: --litert-python names the interpreter of an environment that has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import record
import soundfile
import torch
from commands import spkd as command

import spkd
from spkd.corpus.manifest import Manifest
from spkd.eval.metrics import curve, eer
from spkd.eval.pairs import Side, score_pairs
from spkd.eval.trials import read
from spkd.students import load_student

HERE = Path(__file__).parent
SPEEDS = "view.speeds=[0.8,0.9,1.0,1.1,1.2]"
STUDENT = ["student=xvector", "student.embedding=192", "student.features=sherpa"]
Embed = Callable[[np.ndarray], np.ndarray]


def sherpa(path: Path) -> Embed:
    """The model in sherpa-onnx itself, with its own features."""
    import sherpa_onnx

    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(
        sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(path), num_threads=1)
    )

    def embed(wave: np.ndarray) -> np.ndarray:
        stream = extractor.create_stream()
        stream.accept_waveform(16_000, wave)
        stream.input_finished()
        return np.array(extractor.compute(stream), np.float32)

    return embed


def measured(embed: Embed, waves: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Embeddings (N, D), and processing time over audio time with the features."""
    start = time.perf_counter()
    vectors = np.stack([embed(wave) for wave in waves.values()])
    return vectors, (time.perf_counter() - start) * 16_000 / sum(map(len, waves.values()))


def table(result: dict) -> str:
    """The table of docs/export.md."""
    lines = ["| | least cosine with the student | EER (%) | size | real-time factor |", "|---|---|---|---|---|"]
    for name, row in result["runtimes"].items():
        rate = f"{row['eer_percent']:.2f}" if "eer_percent" in row else ""
        size = f"{row['bytes'] / 1e6:.2f} MB"
        lines.append(f"| {name} | {row['least_cosine']:.6f} | {rate} | {size} | {row['real_time_factor']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    options = record.options(__doc__, "export_agree", data=True)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--channels", type=int, default=192, help="width of the student")
    options.add_argument("--litert-python", type=Path, help="interpreter that has LiteRT's converter")
    given = record.parse(options, steps=2, batch_size=8, channels=16)
    torch.set_num_threads(2)
    given.work.mkdir(parents=True, exist_ok=True)
    cache, student = given.work / "cache", given.work / "student"
    data, threads = given.data / "librispeech-mini", 0 if given.tiny else 2

    def run(*arguments: object) -> str:
        return command(given.work, threads, *map(str, arguments))

    teacher, train = ["teacher=dvector", f"teacher.weights={given.teacher}"], f"manifest={data / 'train.csv'}"
    run("extract", *teacher, train, f"cache={cache}", SPEEDS, "fbank=true", "features=sherpa")
    losses = ["--loss", "contrastive", "--loss", "ntxent"]
    run(
        "train",
        *losses,
        f"cache={cache}",
        f"out={student}",
        *STUDENT,
        f"student.channels={given.channels}",
        f"steps={given.steps}",
        f"batch_size={given.batch_size}",
    )
    dev = [data / "trials-test-other.txt", f"manifest={data / 'test-other.csv'}"]
    run("calibrate", *dev, f"model={student}", f"force={str(given.tiny).lower()}")
    formats = {
        "onnx": ["to=onnx"],
        "onnx, waveform": ["to=onnx", "waveform=true", f"out={student / 'model.wave.onnx'}"],
        "onnx, lengths": ["to=onnx", "onnx.lengths=true", f"out={student / 'model.lengths.onnx'}"],
        "onnx-int8": ["to=onnx-int8", f"onnx_int8.{train}"],
        "pt2": ["to=pt2"],
    }
    files = {name: Path(run("export", student, *keys).splitlines()[-1].split(":")[0]) for name, keys in formats.items()}
    printed = ""
    if given.litert_python:
        printed = command(given.work, threads, "export", str(student), "to=litert", python=given.litert_python)
        files["litert"] = student / "model.tflite"

    torch.set_num_threads(1)
    trials, audio = read(data / "trials-test-short.txt"), Manifest.load(data / "test-short.csv")
    waves = {}
    for name in trials.names:
        utterance = audio[audio.index_of[name]]
        frames = round((utterance.duration or 0) * 16_000)
        waves[name] = soundfile.read(
            utterance.path, dtype="float32", start=round(utterance.start * 16_000), frames=frames
        )[0]
    graph = torch.export.load(str(files["pt2"])).module()
    features = load_student(student).network.features

    def pt2(wave: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return graph(features(torch.from_numpy(wave)[None]))[0].numpy()

    runtimes: dict[str, Embed] = {"student": spkd.load(student, "cpu").embed}
    runtimes |= {name: spkd.load(files[name], "cpu").embed for name in formats if name.startswith("onnx")}
    runtimes |= {"sherpa-onnx": sherpa(files["onnx"]), "pt2": pt2}
    files |= {"student": student / "model.safetensors", "sherpa-onnx": files["onnx"]}
    rows: dict[str, dict[str, float]] = {}
    reference = None
    for name, embed in runtimes.items():
        vectors, factor = measured(embed, waves)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        reference = unit if reference is None else reference
        scores = score_pairs(Side(unit), Side(unit), trials.enrolment, trials.test)
        assert trials.label is not None
        rows[name] = {
            "least_cosine": round(float((unit * reference).sum(1).min()), 7),
            "mean_cosine": round(float((unit * reference).sum(1).mean()), 7),
            "eer_percent": round(100 * eer(curve(scores, trials.label))[0], 3),
            "bytes": files[name].stat().st_size,
            "real_time_factor": float(f"{factor:.3g}"),
        }
        print(f"{name:16}", rows[name], flush=True)
    if given.litert_python:  # of one length: checked and timed by the command itself
        line = next(line for line in printed.splitlines() if line.startswith("litert"))
        rows["litert"] = {
            "least_cosine": float(line.split("student ")[1]),
            "bytes": files["litert"].stat().st_size,
            "real_time_factor": float(line.split("real-time factor ")[1].split()[0]),
        }
    result = {
        "cosine_onnx": min(rows[name]["least_cosine"] for name in ("onnx", "onnx, waveform", "onnx, lengths")),
        "cosine_sherpa": rows["sherpa-onnx"]["least_cosine"],
        "cosine_int8": rows["onnx-int8"]["mean_cosine"],
        "runtimes": rows,
    }
    record.keep("export_agree", result, given.tiny)


if __name__ == "__main__":
    main()
