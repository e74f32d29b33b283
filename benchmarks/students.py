"""What each student costs: parameters, and multiply-accumulates per second of speech.

    python benchmarks/students.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/students.json and makes the table
of docs/students.md from it.
"""

from __future__ import annotations

import json
from pathlib import Path

from spkd.networks.network import count_macs, count_parameters
from spkd.students import build

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "students.md"
BEGIN, END = "<!-- made by benchmarks/students.py -->", "<!-- end -->"
SECONDS = 4.0
WIDTHS = {
    "xvector": (256, 512),
    "etdnn": (208, 512),
    "ecapa": (128, 512, 1024),
    "resnet34": (16, 32),
    "campplus": (64, 128),
    "ssl": (192, 768),
    "tiny": (64, 96),
}


def main() -> None:
    rows = []
    for name, widths in WIDTHS.items():
        for channels in widths:
            network = build(name, channels=channels, embedding=192).eval()
            row = {"student": name, "channels": channels, "default": channels == network.default_channels}
            row |= {"parameters": count_parameters(network), "macs_per_second": count_macs(network, SECONDS) / SECONDS}
            rows.append(row)
            print(
                f"{name:9} {channels:5} {row['parameters'] / 1e6:7.2f} M parameters"
                f" {row['macs_per_second'] / 1e6:8.1f} M MACs/s"
            )
    lines = [
        "| student | channels | parameters | MACs per second of speech |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['student']}` | {row['channels']}{' (default)' if row['default'] else ''} | "
            f"{row['parameters'] / 1e6:.2f} M | {row['macs_per_second'] / 1e6:.0f} M |"
        )
    before, _, rest = DOC.read_text().partition(BEGIN)
    made = "\n".join(lines)
    DOC.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}")
    result = {"students": rows, "embedding": 192, "seconds": SECONDS}
    (HERE / "results" / "students.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
