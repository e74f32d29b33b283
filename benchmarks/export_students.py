"""Every student in every format of `spkd export`: what is written, and what is refused and why.

Students have random weights and few channels; those that WeSpeaker has are of its widths. Each is exported by the
command, which runs what it has written and compares it with the student (Core ML: on macOS alone).

    python benchmarks/export_students.py --data DIR --runtime FOLDER

DIR holds librispeech-mini, on which `onnx-int8` measures its ranges; FOLDER is onnxruntime-web's npm package. Formats
whose extra is not installed are left out (the table keeps what an earlier call found, which may have been in another
environment). Prints, as its last line, one JSON object; keeps it in benchmarks/results/export_students.json.
"""

from __future__ import annotations

import csv
import itertools
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import record
import torch
from commands import in_this_process

from spkd.errors import SpkdError
from spkd.registry import STUDENTS
from spkd.students import Checkpoint, build, save_student

CHANNELS = {"resnet34": 32, "campplus": 128, "redimnet2": 8, "ssl": 48}  # others: 16
# Format -> settings, and the package that it needs beyond the extra `export`.
FORMATS: dict[str, tuple[list[str], str]] = {
    "onnx": (["to=onnx"], ""),
    "onnx, waveform": (["to=onnx", "waveform=true"], ""),
    "onnx, lengths": (["to=onnx", "onnx.lengths=true"], ""),
    "onnx-int8": (["to=onnx-int8", "onnx_int8.manifest=few.csv"], ""),
    "ort": (["to=ort"], ""),
    "pt2": (["to=pt2"], ""),
    "web": (["to=web", "web.runtime={runtime}"], ""),
    "wespeaker": (["to=wespeaker"], ""),
    "pte": (["to=pte", "pte.seconds=4"], "executorch"),
    "pte, waveform": (["to=pte", "pte.seconds=4", "waveform=true"], "executorch"),
    "coreml": (["to=coreml", "coreml.seconds=4"], "coremltools"),
    "coreml, waveform": (["to=coreml", "coreml.seconds=4", "waveform=true"], "coremltools"),
    "litert": (["to=litert"], "litert_torch"),
}
UTTERANCES = 20  # that fix the ranges of 8-bit integers
YES, NO = "yes", "no"
RESULT = "export_students"


def table(result: dict) -> str:
    """The tables of docs/export.md: which students go where, and the reasons of those that do not."""
    rows, reasons = result["students"], dict[str, int]()
    formats = [name for name in FORMATS if any(name in row for row in rows.values())]
    lines = [f"| | {' | '.join(f'`{name}`' for name in formats)} |", "|---" * (len(formats) + 1) + "|"]
    for student, row in rows.items():
        cells = []
        for name in formats:
            found = row.get(name, {})
            if found.get("reason"):
                number = reasons.setdefault(found["reason"], len(reasons) + 1)
                cells.append(f"{NO} ({number})")
            else:
                cells.append(YES if found else "")
        lines.append(f"| `{student}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def exported(work: Path, student: str, settings: list[str]) -> dict[str, object]:
    """Cosine of what was written with the student, None where it was not run; or the reason of a refusal."""
    folder = work / "student"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / student, folder)
    try:
        code, printed, errors = in_this_process(work, ("export", folder.name, *settings))
    except SpkdError as error:
        code, printed, errors = 1, "", str(error)
    if code:
        return {"reason": (errors.strip() or "?").splitlines()[-1].removeprefix("error: ")}
    cosine = re.search(r"cosine with the student ([\d.]+)", printed)
    return {"cosine": float(cosine[1]) if cosine else None}


def main() -> None:
    options = record.options(__doc__, RESULT, data=True, teacher=False)
    options.add_argument("--runtime", default="", help="folder of onnxruntime-web's npm package, for `web`")
    options.add_argument("--students", nargs="+", default=list(STUDENTS.ours))
    options.add_argument("--formats", nargs="+", default=list(FORMATS))
    given = record.parse(options, students=["tiny"], formats=["onnx", "ort", "wespeaker"])
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    with open(given.data / "librispeech-mini" / "train.csv", newline="") as file:
        rows = list(itertools.islice(csv.DictReader(file), UTTERANCES))
    with open(work / "few.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "path": given.data / "librispeech-mini" / row["path"]} for row in rows)
    kept = record.RESULTS / f"{RESULT}.json"
    found: dict[str, dict[str, dict]] = {} if given.tiny or not kept.is_file() else record.kept(RESULT)["students"]
    for name in given.students:
        torch.manual_seed(0)
        network = build(name, channels=CHANNELS.get(name, 16), embedding=32).eval()
        save_student(work / name, Checkpoint(network))
        for form in given.formats:
            settings, package = FORMATS[form]
            if (package and find_spec(package) is None) or (form == "web" and not given.runtime):
                continue
            settings = [setting.format(runtime=given.runtime) for setting in settings]
            found.setdefault(name, {})[form] = exported(work, name, settings)
            print(f"{name:10} {form:15} {found[name][form]}", flush=True)
    cosines = [one["cosine"] for row in found.values() for one in row.values() if one.get("cosine") is not None]
    result = {"least_cosine": min(cosines, default=None), "students": found}
    print(table(result))
    record.keep(RESULT, result, given.tiny)


if __name__ == "__main__":
    main()
