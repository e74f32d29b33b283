"""Mined negatives, codecs with codebooks and k-means by FAISS.

Several packages bring it as one module: faiss-cpu for every machine, others for CUDA.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import distributions
from pathlib import PurePosixPath
from typing import Any

from spkd.errors import UsageError, first_line, listed

PREFIX = "faiss"  # with which the names of all these packages begin
MODULE = PurePosixPath("faiss/__init__.py")
EXTRAS = 'pip install "spkd[cpu]" or, with CUDA, "spkd[gpu]"'


def load_faiss(what: str) -> Any:
    """The module faiss.

    Args:
        what: what needs it, for messages.
    Raises:
        UsageError: it is missing or cannot be imported, or several packages have written its files.
    """
    installed = packages()
    if len(installed) > 1:
        raise UsageError(
            f"{what}: {listed(installed)} are installed, and each overwrites files of the other's module faiss; "
            f"pip uninstall {' '.join(installed)}, then {EXTRAS}"
        )
    try:
        import faiss
    except ImportError as error:
        if not installed:
            raise UsageError(f"{what}: needs FAISS; {EXTRAS}") from error
        raise UsageError(
            f"{what}: {installed[0]} cannot be imported ({first_line(error)}); pip uninstall {installed[0]}, then "
            f"{EXTRAS}"
        ) from error
    return faiss


@cache
def packages() -> list[str]:
    """Names of the installed packages that have the module faiss, sorted."""
    found = (d for d in distributions() if (d.name or "").lower().startswith(PREFIX))
    return sorted({d.name.lower() for d in found if any(file == MODULE for file in d.files or ())})
