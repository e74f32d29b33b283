"""Files beside an exported model: its description as JSON, a README, and an example that needs its runtime alone."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from textwrap import indent
from typing import Any

from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.quality import FRAME, LEAST_LEVEL, LEAST_SECONDS
from spkd.export.graph import FLOOR, Embedder, toolkit_of
from spkd.files import digest
from spkd.files.atomic import check_is_own, check_writable, write_bytes, write_json
from spkd.outputs.features import FBANKS, FFT, HIGH_HZ, HOP, INT16, LOW_HZ, MELS, PREEMPHASIS, SHERPA_HIGH_HZ, WINDOW
from spkd.outputs.target import EMBEDDING
from spkd.students.description import CALIBRATION_OF, EXPORT_KEY, OTHER, STUDENT, beside

README, EXAMPLE = ".README.md", ".example.py"
MARK = "written by spkd export"  # in each of the files, by which they are known
QUALITY = {"frame": FRAME, "level": LEAST_LEVEL, "seconds": LEAST_SECONDS}  # least sound of a decision, as here
LONGEST = 600.0  # length (s) from which a graph is for recordings of any length
FEATURES, MAIN = "features.txt", "main.txt"  # parts of the example


@dataclass(frozen=True)
class Runtime:
    """Runtime of a format, as its example uses it.

    Attributes:
        name: name of the format, for people.
        packages: what `pip install` takes.
        imports: lines of the example that import the runtime.
        code: lines of the example that load `MODEL` and define `run`: input (1, ...) -> embedding (D,).
        input: name of the input.
        output: name of the output.
        samples: least and greatest number of samples of a recording that the graph takes.
        batch: whether the graph takes several views at once.
        has_features: whether the runtime computes the features.
        note: further sentence of the README.
    """

    name: str
    packages: str
    imports: str
    code: str
    input: str
    output: str
    samples: tuple[int, int]
    batch: bool = False
    has_features: bool = False
    note: str = ""


def check_beside(out: Path) -> None:
    """Check that the files beside a model can be written.

    Raises:
        UsageError: a file that spkd did not write would be replaced.
        SpkdError: one cannot be written.
    """
    for path in (beside(out), *_texts(out)):
        check_writable(path)
        check_is_own(path, MARK.encode(), "out=FILE")


def _texts(out: Path) -> tuple[Path, Path]:
    return out.with_name(out.name + README), out.with_name(out.name + EXAMPLE)


def features_of(embedder: Embedder) -> dict[str, Any]:
    """Parameters of a network's fbank, for other programs."""
    toolkit = toolkit_of(embedder.network.input_kind)
    hamming = toolkit == "wespeaker"
    return {
        "toolkit": toolkit,
        "scale": 1.0 if toolkit == "3d-speaker" else INT16,
        "frames": "mirrored" if FBANKS[toolkit].window < WINDOW else "whole",
        "window_samples": WINDOW,
        "hop_samples": HOP,
        # (offset - (1 - offset) cos(2 pi n / (window_samples - 1))) ^ power: Hamming's and Povey's windows.
        "window": {"offset": 0.54, "power": 1.0} if hamming else {"offset": 0.5, "power": 0.85},
        "preemphasis": PREEMPHASIS,
        "fft": FFT,
        "mels": MELS,
        "low_hz": LOW_HZ,
        "high_hz": SHERPA_HIGH_HZ if toolkit == "sherpa" else HIGH_HZ,
        "floor": FLOOR,
    }


@dataclass(frozen=True)
class Decision:
    """What turns the cosines of a model into decisions.

    Attributes:
        calibration: map from cosines to log-likelihood ratios, as of `Calibration.decision`; None without one.
        of_student: whether the calibration is that of the student's folder, or is to be.
        way: how the model gets a calibration, as a phrase.
    """

    calibration: dict[str, Any] | None
    of_student: bool
    way: str


def description(
    embedder: Embedder, out: Path, to: str, runtime: Runtime, model: dict[str, Any], decision: Decision
) -> dict[str, Any]:
    """Content of the JSON beside a model.

    Args:
        out: the file, or the folder, of the model.
        to: name of its format.
        model: url, licence, and further descriptions of the student, with `weights_sha256`.
    """
    dim, waveform = embedder.network.levels[EMBEDDING].dim, embedder.front_end is not None or runtime.has_features
    least, most = runtime.samples
    batch = "batch" if runtime.batch else 1
    length: str | int = "samples" if waveform else "frames"
    if least == most:
        length = embedder.example(most / SAMPLE_RATE).shape[1]
    return {
        EXPORT_KEY: 1,
        "comment": MARK,
        "format": to,
        "file": out.name,
        "sha256": digests(out),
        "student": model["weights_sha256"],
        "sample_rate": SAMPLE_RATE,
        "input": {
            "name": runtime.input,
            "holds": "waveform" if waveform else "features",
            "shape": [batch, length] if waveform else [batch, length, MELS],
            "samples": [least, most],
        },
        "features": None if waveform else features_of(embedder),
        "output": {"name": runtime.output, "shape": [batch, dim]},
        "calibration": decision.calibration,
        CALIBRATION_OF: STUDENT if decision.of_student else OTHER,
        "way_to_calibrate": decision.way,
        "quality": QUALITY,
        "url": model["url"],
        "licence": model["licence"],
        "model": {name: value for name, value in model.items() if name not in ("url", "licence", "weights_sha256")},
    }


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the file of a model, or of each file in its folder, by its path below the folder of `out`."""
    files = sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]
    return {path.relative_to(out.parent).as_posix(): digest.of_file(path) for path in files}


def write_beside(out: Path, about: dict[str, Any], runtime: Runtime) -> None:
    """Write the description, the README and the example of a model that is there."""
    write_json(beside(out), about)
    readme, example = _texts(out)
    write_bytes(example, example_of(out, about, runtime).encode())
    write_bytes(readme, readme_of(out, about, runtime).encode())


def example_of(out: Path, about: dict[str, Any], runtime: Runtime) -> str:
    """Program that compares two recordings by the model, with numpy and the runtime alone."""
    return (
        _part(MAIN)
        .replace("EXAMPLE_NAME", out.name + EXAMPLE)
        .replace("PACKAGES", runtime.packages.replace(" ", " and "))
        .replace("PIP", runtime.packages)
        .replace("    # IMPORTS\n", indent(runtime.imports.strip() + "\n", "    "))
        .replace("HOW_TO_CALIBRATE", f"the model has no calibration; {about['way_to_calibrate']}")
        .replace("# FEATURES\n", "" if about["features"] is None else _part(FEATURES) + "\n\n")
        .replace("# RUNTIME\n", runtime.code.strip() + "\n")
        .replace("GRAPH_INPUT", "wave" if about["features"] is None else "features(wave)")
    )


def _part(name: str) -> str:
    return resources.files(__package__).joinpath("example", name).read_text(encoding="utf-8")


def readme_of(out: Path, about: dict[str, Any], runtime: Runtime) -> str:
    """What the model takes and gives, and how it is run."""
    least, most = (samples / SAMPLE_RATE for samples in about["input"]["samples"])
    given, made = about["input"], about["output"]
    takes = "samples in [-1, 1]" if given["holds"] == "waveform" else "log-mel energies, not mean-normalised"
    limits = f"{least:.2g} s or more" if most > LONGEST else f"{least:.2g} to {most:.2g} s"
    no_calibration = about["calibration"] is None
    lengths = f"{most:.2g} s, neither more nor less" if least == most else limits
    lines = [
        f"# {out.name}",
        f"A speaker-verification model in the format {runtime.name}, {MARK}.",
        f"* Input `{given['name']}`, {_shape(given['shape'])}, float32: {takes}, of mono audio at {SAMPLE_RATE:,} Hz; "
        f"{lengths}.",
        f"* Output `{made['name']}`, {_shape(made['shape'])}, float32: embeddings. The score of two recordings is the "
        "cosine of their embeddings.",
    ]
    if (kind := about["features"]) is not None:
        lines.append(
            f"* The features are those of {kind['toolkit']}; their parameters are in `{beside(out).name}`, and "
            f"`features` of the example computes them."
        )
    lines += [
        f"* `{beside(out).name}` has the thresholds, the parameters and the SHA-256 of the model. With a calibration, "
        "ratio = weight x cosine + offset is the natural logarithm of how much likelier the score is where one person "
        "spoke than where two did; a ratio at or above a threshold means one speaker. `quality` is the least sound of "
        "a recording with which a decision is made: the seconds of frames, of so many samples, above a level in dB of "
        "full scale.",
        *([f"* Without a calibration there is no decision: {about['way_to_calibrate']}."] * no_calibration),
        *(
            [
                f"* A calibration holds for recordings of up to {most:g} s: of longer ones the example takes the first "
                f"{most:g} s, and makes no decision."
            ]
            * (least < most <= LONGEST)
        ),
        *([f"* Every recording is repeated or cut to {most:g} s by the example."] * (least == most)),
        "* The model takes speech: cut off longer silence before. The example asks for enough sound alone. Unlike "
        "`spkd verify`, it looks neither for speech nor for clipping: noise, hum and music get a decision.",
        f"* Licence: {about['licence'] or 'not stated'}. Source: {about['url'] or 'not stated'}.",
        *([f"* {runtime.note}"] if runtime.note else []),
        f"Compare two recordings, WAV files of {SAMPLE_RATE:,} Hz, 16 bits and one channel (ffmpeg makes them of "
        f"others: `ffmpeg -i IN -ac 1 -ar {SAMPLE_RATE} -c:a pcm_s16le OUT.wav`):\n\n"
        f"    pip install {runtime.packages}\n    python {out.name + EXAMPLE} a.wav b.wav",
    ]
    return "\n\n".join([*lines[:2], "\n".join(lines[2:-1]), lines[-1]]) + "\n"


def _shape(shape: list[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
