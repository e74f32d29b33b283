"""A student in other runtimes: onnxruntime, sherpa-onnx, 8-bit integers, PyTorch programs, ExecuTorch, LiteRT, Core ML.

Trains a student on sherpa-onnx's features from the teacher's cache (once; a finished run is taken as it is), exports it
by `spkd export` to everything, and compares embeddings, error rates, bytes and speed on the utterances of a trial list.
LiteRT's graph has one length: recordings are repeated or cut to it, for the student too.
Core ML's package is written, but runs on macOS alone.

    python benchmarks/export_agree.py --data DIR --teacher FILE

DIR holds librispeech-mini, FILE is the weights of the d-vector. Runtimes are left out where their extra (executorch,
litert, coreml) is not installed.

Prints, as its last line, one JSON object; keeps it in benchmarks/results/export_agree.json.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
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
from spkd.export.litert import load_litert
from spkd.export.onnx import Session
from spkd.export.pte import load_pte
from spkd.students import load_student

HERE = Path(__file__).parent
SPEEDS = "view.speeds=[0.8,0.9,1.0,1.1,1.2]"
STUDENT = ["student=xvector", "student.embedding=192", "student.features=sherpa"]
Embed = Callable[[np.ndarray], np.ndarray]
# Format -> package that it needs beyond the extra `export`.
PACKAGES = {"pte": "executorch", "litert": "litert_torch", "coreml": "coremltools"}
LITERT = 4.0  # length of LiteRT's graph (s)


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


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def table(result: dict) -> str:
    """The table of docs/export.md."""
    lines = ["| | least cosine with the student | EER (%) | size | real-time factor |", "|---|---|---|---|---|"]
    for name, row in result["runtimes"].items():
        figures = (("least_cosine", ".6f"), ("eer_percent", ".2f"), ("real_time_factor", ".4f"))
        cosine, rate, factor = (f"{row[figure]:{form}}" if figure in row else "" for figure, form in figures)
        lines.append(f"| {name} | {cosine} | {rate} | {row['bytes'] / 1e6:.2f} MB | {factor} |")
    return "\n".join(lines)


def main() -> None:
    options = record.options(__doc__, "export_agree", data=True)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--channels", type=int, default=192, help="width of the student")
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
        "ort": ["to=ort"],
        "pt2": ["to=pt2"],
        "pte": ["to=pte", "pte.seconds=40"],
        "litert": ["to=litert", f"litert.seconds={LITERT}"],
        "coreml": ["to=coreml", "coreml.seconds=40"],
    }
    # Converters take most of the time; a test of the others is enough.
    missing = {name for name, package in PACKAGES.items() if given.tiny or find_spec(package) is None}
    formats = {name: keys for name, keys in formats.items() if name not in missing}
    files = {name: Path(run("export", student, *keys).splitlines()[-1].split(":")[0]) for name, keys in formats.items()}

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # ExecuTorch takes as many threads as there are cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trials, audio = read(data / "trials-test-short.txt"), Manifest.load(data / "test-short.csv")
    waves = {}
    for name in trials.names:
        utterance = audio[audio.index_of[name]]
        frames = round((utterance.duration or 0) * 16_000)
        waves[name] = soundfile.read(
            utterance.path, dtype="float32", start=round(utterance.start * 16_000), frames=frames
        )[0]
    whole = spkd.load(student, "cpu").embed
    features = load_student(student).network.features

    def with_features(run: Callable[[torch.Tensor], np.ndarray]) -> Embed:
        def embed(wave: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return run(features(torch.from_numpy(wave)[None]))[0]

        return embed

    def of_one_length(embed: Embed) -> Embed:
        return lambda wave: embed(np.resize(wave, round(LITERT * 16_000)))

    runtimes: dict[str, Embed] = {"student": whole}
    runtimes |= {name: spkd.load(files[name], "cpu").embed for name in formats if name.startswith("onnx")}
    graph = torch.export.load(str(files["pt2"])).module()
    runtimes |= {
        "sherpa-onnx": sherpa(files["onnx"]),
        "ort": with_features(Session(files["ort"])),
        "pt2": with_features(lambda x: graph(x).numpy()),
    }
    if "pte" in files:
        runtimes["pte"] = with_features(load_pte(files["pte"]))
    if "litert" in files:
        runtimes["litert"] = of_one_length(with_features(load_litert(files["litert"])))
    files |= {"student": student / "model.safetensors", "sherpa-onnx": files["onnx"]}
    rows: dict[str, dict[str, float]] = {}
    references = {"whole": unit_rows(measured(whole, waves)[0])}
    if "litert" in runtimes:
        references["cut"] = unit_rows(measured(of_one_length(whole), waves)[0])
    for name, embed in runtimes.items():
        vectors, factor = measured(embed, waves)
        unit = unit_rows(vectors)
        reference = references["cut" if name == "litert" else "whole"]
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
    if "coreml" in files:
        rows["coreml"] = {"bytes": sum(path.stat().st_size for path in files["coreml"].rglob("*") if path.is_file())}
    result = {
        "cosine_onnx": min(rows[name]["least_cosine"] for name in ("onnx", "onnx, waveform", "onnx, lengths")),
        "cosine_sherpa": rows["sherpa-onnx"]["least_cosine"],
        "cosine_int8": rows["onnx-int8"]["mean_cosine"],
        "steps": given.steps,
        "load": round(os.getloadavg()[0], 1),
        "runtimes": rows,
    }
    record.keep("export_agree", result, given.tiny)


if __name__ == "__main__":
    main()
