"""Completion through the protocol of the shells: what their scripts ask, and what the command prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spkd.registry import LOSSES, TEACHERS

START = (
    "import sys; from spkd.cli import main\n"
    "try: main()\n"
    "finally: assert not {'torch', 'numpy', 'zarr'} & set(sys.modules), sorted(sys.modules)"
)


def asked(shell: str, line: str, **variables: str) -> str:
    """What the command prints where a shell completes a line."""
    environment = {**os.environ, "_SPKD_COMPLETE": f"complete_{shell}", **variables}
    if shell == "bash":
        words = re.findall(r"=|[^\s=]+", line)  # as bash divides it, COMP_WORDBREAKS having the equals sign
        place = len(words) - (0 if line.endswith(" ") else 1)
        environment |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(place)}
    else:
        environment |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-c", START]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("spkd extr", ["extract"]),
        ("spkd extract teacher=w", ["wavlm", "wav2vec2", "w2v-bert", "wespeaker"]),
        ("spkd extract teacher=", list(TEACHERS.ours)),
        ("spkd extract fb", ["fbank=true", "fbank=false"]),
        ("spkd train loss=[aam,contr", ["[aam,contrastive"]),
        ("spkd train student=ssl student.ssl.", ["student.ssl.layers=", "student.ssl.adapters="]),
        ("spkd train student.ssl.", []),  # of another student
        ("spkd train steps", ["steps=", "steps=2000"]),  # two: after one, bash adds a space
        ("spkd train steps=5 steps", []),  # given
        ("spkd train --recipe best-", ["best-mini"]),
        ("spkd train --loss mu", ["multilevel"]),
        ("spkd eval trials.txt backend", ["backend=cosine", "backend=plda"]),
        ("spkd eval backend", ["backend=cosine", "backend=plda"]),
        ("spkd eval trials.txt model=wav", ["wavlm", "wav2vec2"]),
        ("spkd verify a.wav b.wav model=bun", ["bundled"]),
        ("spkd eval trials.txt enrol.model=red", ["redimnet"]),
        ("spkd extract manifest=", []),  # bash completes files by itself
        ("spkd cache inf", ["info"]),
    ],
)
def test_bash(line: str, expected: list[str]) -> None:
    assert asked("bash", line).split() == expected


def test_zsh_and_fish_get_whole_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.csv").touch()
    Path("train").mkdir()
    assert asked("zsh", "spkd train loss=[aam,contr") == "_arguments '*: :((\"loss=[aam,contrastive\"))'\n"
    assert asked("fish", "spkd extract teacher=wav").split() == ["teacher=wavlm", "teacher=wav2vec2"]
    assert asked("fish", "spkd extract manifest=tr").split() == ["manifest=train.csv", "manifest=train/"]
    assert asked("fish", "spkd train loss=[").split() == [f"loss=[{name}" for name in LOSSES.ours]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_its_shell_reads(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    environment = {**os.environ, "_SPKD_COMPLETE": f"source_{shell}"}
    made = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True)
    assert f"complete_{shell}" in made.stdout
    (tmp_path / "script").write_text(made.stdout)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
