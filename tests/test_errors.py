from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spkd.errors import (
    Interrupted,
    SpkdError,
    UsageError,
    check_address,
    did_you_mean,
    first_line,
    printable,
    public_address,
    reported,
)


def test_nothing_that_a_terminal_would_obey_is_printed() -> None:
    shown = printable("CC0\x1b[2K\r  fingerprint\x1b]0;owned\n\x07 ü [/x] \udcff")
    assert "\x1b" not in shown
    assert "\n" not in shown
    assert "ü [/x]" in shown
    assert len(printable("x" * 10**6)) < 2100


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("http://host:80/x/COMPLETE.json", None),
        ("http://host/a@2/b", None),
        ("http://[::1]:8080/a/b", None),
        ("s3://bucket/a b", None),
        ("/home/anna@work/x", None),
        ("http://bob:SECRET@host:80/x", "http://***@host:80/x"),
        ("https://SECRET@host/x", "https://***@host/x"),
        ("http://bob:SEC RE'T\"SECRET@host/x", "http://***@host/x"),
        ("http://bob:SECRET@SECRET@host/x", "http://***@host/x"),
        ("http://host/my caches/x?token=SECRET", "http://host/my caches/x?***"),
        ("https:/bob:SECRET@host/x", "https:/***@host/x"),  # as a path has it
        ("s3:/bucket/x?token=SECRET", "s3:/bucket/x?***"),
        ("C:/x?y", None),
        ("http://host/it's/x?token=SEC ' \" SECRET", "http://host/it's/x?***"),
        ("s3://key:SECRET@bucket/x", "s3://***@bucket/x"),
    ],
)
def test_secrets_of_an_address_are_left_out(url: str, public: str | None) -> None:
    check_address(url)
    assert public_address(url) == (public or url)
    assert public_address(public_address(url)) == public_address(url)
    for text in (url, f"error: {url}/plan/0.npz: not found", f"pull '{url}' copy", f"{url}, then {url}"):
        shown = printable(text)
        assert "SECRET" not in shown
        assert "RE'T" not in shown
        assert (public is not None) or shown == text


@pytest.mark.parametrize(
    "url",
    [
        *("http://bob:SE#CRET@host/x", "http://bob:SE/CRET@host/x", "http://bob:SE?CRET@host/x"),
        *("http://bob:12/CRET@host/x", "http://bob:12#CRET@host/x", "http://bob:12?CRET@host", "https://b:S:E@h:x/y"),
        *("http://bob:S@E#CRET@host", "http://bob:S@E/CRET@host"),
    ],
)
def test_an_address_whose_password_cannot_be_told_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="cannot be separated") as raised:
        check_address(url)
    assert "CRET" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (SpkdError("no cache"), 1, "error: no cache"),
        (UsageError("bad key"), 2, "error: bad key"),
        (Interrupted("stopped"), 130, "error: stopped"),
        (OSError(28, "No space left on device", "out/x"), 1, "error: out/x: the disk is full"),
        (OSError(24, "Too many open files"), 1, "ulimit -n"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("unable to write to file </torch_1>: shared memory"), 1, "--shm-size"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."), 1, "--shm-size"),
    ],
)
def test_every_failure_is_a_line(
    capsys: pytest.CaptureFixture[str], error: Exception | Interrupted, code: int, expected: str
) -> None:
    assert reported(error, ["spkd", "train"]) == code
    printed = capsys.readouterr().err
    assert expected in printed
    assert len(printed.splitlines()) == 1


def test_an_unexpected_failure_keeps_its_traceback_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError) as caught:
        {}["missing"]
    assert reported(caught.value, ["spkd", "cache", "info", "x"]) == 1
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert "unexpected failure of `spkd cache info`" in printed
    log = Path(printed.split("the traceback is in ")[1].split(";")[0])
    assert "spkd cache info x" in log.read_text()
    assert "Traceback" in log.read_text()
    log.unlink()


def test_a_failure_of_a_plug_in_is_its_packages(capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, object] = {"__name__": "mine.huber"}
    exec("def fail(): return {}['missing']", space)
    with pytest.raises(KeyError) as caught:
        space["fail"]()  # type: ignore[operator]
    assert reported(caught.value, ["spkd", "train"], lambda: ["other", "mine"]) == 1
    assert "please report it to the package of mine with that file" in capsys.readouterr().err


def test_a_hint_is_another_word() -> None:
    assert did_you_mean("AAM", ["aam", "mse"]) == "; did you mean 'aam'?"
    assert did_you_mean("one_step", ["one-step", "onestop"]) == "; did you mean 'one-step'?"
    assert did_you_mean("fbank", ["fbank"]) == ""
    assert did_you_mean("qqqq", ["b", "a"]) == "; valid: a, b"


def test_an_empty_message_still_says_something() -> None:
    assert first_line(ValueError()) == "ValueError"
    assert "weights_only" not in first_line(RuntimeError("re-run with weights_only=False\nbroken file"))


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'from spkd.cli import main; main()' train --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Traceback" not in done.stderr
