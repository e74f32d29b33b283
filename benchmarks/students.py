"""What each student costs: parameters, and multiply-accumulates per second of speech.

    python benchmarks/students.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/students.json, from which
tables.py makes the table of docs/students.md.
"""

from __future__ import annotations

import record

from spkd.networks.network import count_macs, count_parameters
from spkd.students import build

WIDTHS = {
    "xvector": (256, 512),
    "etdnn": (208, 512),
    "ecapa": (128, 512, 1024),
    "resnet34": (16, 32),
    "campplus": (64, 128),
    "ssl": (192, 768),
    "tiny": (64, 96),
}


def table(result: dict) -> str:
    """The table of docs/students.md."""
    lines = ["| student | channels | parameters | MACs per second of speech |", "|---|---|---|---|"]
    for row in result["students"]:
        lines.append(
            f"| `{row['student']}` | {row['channels']}{' (default)' if row['default'] else ''} | "
            f"{row['parameters'] / 1e6:.2f} M | {row['macs_per_second'] / 1e6:.0f} M |"
        )
    return "\n".join(lines)


def main() -> None:
    options = record.options(__doc__)
    options.add_argument("--students", nargs="+", default=list(WIDTHS))
    options.add_argument("--seconds", type=float, default=4.0)
    given = record.parse(options, students=["xvector", "tiny"], seconds=1.0)
    rows = []
    for name in given.students:
        for channels in WIDTHS[name]:
            network = build(name, channels=channels, embedding=192).eval()
            row = {"student": name, "channels": channels, "default": channels == network.default_channels}
            row |= {
                "parameters": count_parameters(network),
                "macs_per_second": count_macs(network, given.seconds) / given.seconds,
            }
            rows.append(row)
            print(
                f"{name:9} {channels:5} {row['parameters'] / 1e6:7.2f} M parameters"
                f" {row['macs_per_second'] / 1e6:8.1f} M MACs/s"
            )
    result = {"students": rows, "embedding": 192, "seconds": given.seconds}
    record.keep("students", result, given.tiny)


if __name__ == "__main__":
    main()
