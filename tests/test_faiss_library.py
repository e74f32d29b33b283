from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import pytest

from spkd import faiss_library
from spkd.errors import UsageError
from spkd.faiss_library import load_faiss
from tests.conftest import save_teacher


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Function that puts the records of a package beside those of this environment, as pip writes them."""

    forget = faiss_library.packages.cache_clear

    def run(name: str, *files: str) -> None:
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-1.15.1.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.15.1\n")
        (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        monkeypatch.syspath_prepend(folder.parent)
        forget()

    forget()
    yield run
    forget()


def test_one_package_is_loaded(install: Callable) -> None:
    install("faiss-gpu-cu12", "faiss_gpu_cu12/__init__.py")  # with the name alone
    install("another", "faiss/contrib/__init__.py")
    assert load_faiss("mining") is faiss


def test_two_packages_of_one_module_are_a_line(spkd: Callable, extraction: list[str], install: Callable) -> None:
    install("faiss-gpu", "faiss/__init__.py", "faiss/loader.py")
    save_teacher(Path("teacher"))
    line = (
        "faiss-cpu and faiss-gpu are installed, and each overwrites files of the other's module faiss; pip uninstall "
        'faiss-cpu faiss-gpu, then pip install "spkd[cpu]" or, with CUDA, "spkd[gpu]"\n'
    )
    done = spkd(*extraction, "storage.codec=sq8", "cache=codes")
    assert (done.code, done.err) == (2, f"error: codec sq8: {line}")
    spkd(*extraction, "fbank=true").ok()
    small = ["student.channels=8", "student.embedding=8", "batch_size=6", "crop=0.5", "steps=2"]
    done = spkd("train", "loss=contrastive", "mining.negatives=2", *small)
    assert (done.code, done.err) == (2, f"error: mining: {line}")


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, install: Callable) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="^mining: faiss-cpu cannot be imported .*; pip uninstall faiss-cpu, then pip"):
        load_faiss("mining")
    monkeypatch.setattr(faiss_library, "packages", list)
    with pytest.raises(UsageError, match=r'^mining: needs FAISS; pip install "spkd\[cpu\]" or, with CUDA'):
        load_faiss("mining")
