"""Codecs of frames on real speech: bytes, error, and how fast they encode.

Frames of the GE2E d-vector (its last LSTM layer) and of a network of WavLM's shape with random weights (768 numbers, 50
a second), over librispeech-mini. Every codec is fitted on three quarters of the speakers and measured on the others.

    python benchmarks/frame_codecs.py --data DIR --teacher FILE

DIR holds librispeech-mini, FILE is the weights of the d-vector. Prints two tables and, as its last line, one JSON
object; keeps it in benchmarks/results/frame_codecs.json.
"""

from __future__ import annotations

import time
from pathlib import Path

import record
from cache_codecs import rows_of, stored_bytes
from commands import spkd
from extract_overhead import save_wavlm

from spkd.cache import Cache
from spkd.cache import codec as codecs

# The WavLM shape: width and heads of WavLM-Base, of its 12 layers the first two.
WAVLM = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}
TINY_WAVLM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | {
    "conv_dim": [16] * 7
}
FITTED = 20_000  # rows
WHOLE = ("float32", "float16", "float16+zstd", "int8", "sq8", "sq6", "sq4", "pq64x8", "opq64x8", "pq32x8")
CODES = tuple(f"{kind}{count}x8" for count in (16, 8) for kind in ("pq", "opq", "rq", "lsq"))
TEACHERS = {"d-vector": "frames.layer3", "WavLM's shape": "frames.layer2"}
VOXCELEB2 = 2338 * 3600 * 50  # frames of its 2,338 h at 50 a second


def cost(cache: Cache, name: str, codec_name: str) -> dict[str, float]:
    """Bytes of a row, error and rows encoded in a second of the processor's time."""
    training, measured = rows_of(cache, name, FITTED)
    codec = codecs.make_codec(codec_name, training.shape[1])
    if codec.training_rows:
        codecs.fit(name, codec, training)
    start = time.process_time()
    stored = codec.encode(measured)
    rate = len(measured) / max(time.process_time() - start, 1e-9)
    return {
        "bytes_per_row": stored_bytes(codec_name, stored),
        "rows_per_second": float(f"{rate:.2g}"),
        **codecs.error(codec, measured),
    }


def table(result: dict) -> str:
    """The table of docs/cache.md."""
    heads = ["codec"]
    for teacher, found in result["teachers"].items():
        heads += [f"{teacher} ({found['columns']}): bytes", "1 - cosine", "worst row"]
    lines = [f"| {' | '.join([*heads, 'rows/s', 'VoxCeleb2 (GB)'])} |", "|---" * (len(heads) + 2) + "|"]
    for codec in result["codecs"]:
        cells = [f"`{codec}`"]
        for found in result["teachers"].values():
            row = found["codecs"][codec]
            error = [record.figure(1 - row[key]) for key in ("cosine_mean", "cosine_min")]
            cells += [f"{row['bytes_per_row']:.0f}", *error]
        # Of the last teacher, whose frames are those of most teachers: 50 a second.
        cells += [f"{row['rows_per_second']:,.0f}", f"{row['bytes_per_row'] * VOXCELEB2 / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = record.options(__doc__, "frame_codecs", data=True)
    options.add_argument("--codecs", nargs="+", default=[*WHOLE, *CODES])
    given = record.parse(options, codecs=["float16+zstd", "rq2x8"])
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    wavlm = save_wavlm(work / "wavlm", **(TINY_WAVLM if given.tiny else WAVLM))
    teachers = {
        "d-vector": ("teacher=dvector", f"teacher.weights={given.teacher}"),
        "WavLM's shape": ("teacher=wavlm", f"teacher.weights={wavlm}"),
    }
    manifest, found = given.data / "librispeech-mini" / "train.csv", {}
    for number, (teacher, arguments) in enumerate(teachers.items()):
        target, cache = TEACHERS[teacher], f"cache{number}"
        settings = (f"teacher.targets=[{target}]", "view=crops:2,3.0", "storage.codec=float32")
        spkd(work, 0 if given.tiny else 1, "extract", *arguments, *settings, f"manifest={manifest}", f"cache={cache}")
        frames = Cache.open(work / cache)
        found[teacher] = {
            "columns": frames.targets[target].dim,
            "codecs": {codec: cost(frames, target, codec) for codec in given.codecs},
        }
    result = {"codecs": given.codecs, "teachers": found, "fitted_on_rows": FITTED}
    print(table(result))
    record.keep("frame_codecs", result, given.tiny)


if __name__ == "__main__":
    main()
