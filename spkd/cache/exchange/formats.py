"""Export and import of a cache in the format that the file name gives: HDF5, WebDataset tars, or vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from spkd.cache import mapped_plan
from spkd.cache.exchange import remote
from spkd.cache.exchange.hdf5 import export_hdf5, import_hdf5
from spkd.cache.exchange.tars import INDEX, export_tars, import_tars, push_tars
from spkd.cache.exchange.vectors import export_vectors, import_vectors
from spkd.cache.folder import CompletionRecord
from spkd.cache.read import Cache
from spkd.config import without_unused
from spkd.corpus.fetched import copy_to
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import AugmentationFolders, FetchConfig
from spkd.corpus.view import unused_folders
from spkd.errors import SpkdError, UsageError, public_address
from spkd.files.atomic import check_is_path, check_writable
from spkd.files.text import counted
from spkd.files.vectors import SUFFIXES, files_of
from spkd.outputs.target import EMBEDDING

HDF5 = (".h5", ".hdf5")


class Audio(Protocol):
    """Location of the audio of a cache's views, and of its copies."""

    manifest: str
    view: AugmentationFolders
    fetch: FetchConfig


def export_cache(path: Path, out: Path, target: str | None, audio: Audio | None) -> str:
    """Write a cache as FILE.h5, as FILE.ark, .scp or .npy of one target, or as a folder of WebDataset tars.

    Args:
        target: name of the target to write, for files of vectors; None: the embedding.
        audio: location of the audio, to put every view's audio into the tars; None writes none.
    Returns:
        Phrase that says what was written.
    Raises:
        UsageError: an address, audio for a format that holds none, a target for a format that holds all, or a folder of
            audio that the views of the cache do not need; and as `copy_to`.
        SpkdError: no complete cache there, or its plan or what follows from it is damaged.
    """
    check_is_path(out)
    if audio is not None and out.suffix in (*HDF5, *SUFFIXES):
        raise UsageError(f"--audio: {out.suffix} files hold no audio; export to a folder of tars")
    if target is not None and out.suffix not in SUFFIXES:
        raise UsageError(f"--target {target}: {out} gets every target; files of one are {', '.join(SUFFIXES)}")
    cache = Cache.open(path)
    if damaged := list(mapped_plan.problems(path, CompletionRecord.load(path))):
        raise SpkdError(damaged[0])
    if audio is not None:
        audio = without_unused(audio, unused_folders([cache.card.views], "view."))
    for file in files_of(out) if out.suffix in SUFFIXES else (out,) if out.suffix in HDF5 else ():
        check_writable(file)
    if out.suffix in SUFFIXES:
        name = target or EMBEDDING
        return f"{counted(export_vectors(cache, out, name), 'view')}, target {name}"
    if out.suffix in HDF5:
        export_hdf5(cache, out)
    else:
        loader = None
        if audio is not None:
            manifest = Manifest.load(audio.manifest)
            copy_to(audio, manifest)
            loader = cache.view_loader(manifest, audio.view.noise, audio.view.rir)
        export_tars(cache, out, loader)
    return f"{counted(len(cache.usable_views), 'view')}, targets {', '.join(cache.targets)}"


def push(path: Path, url: str) -> int:
    """Copy a complete cache, or its export as tars, to a place; arguments, result and errors as `remote.push`."""
    return push_tars(path, url) if (path / INDEX).is_file() else remote.push(path, url)


def import_cache(source: str, path: Path, manifest: Path | None) -> str:
    """Make a cache from an export, or from vectors of another toolkit.

    Args:
        source: FILE.h5, a folder or URL of WebDataset tars, or FILE.ark, .scp or .npy.
        manifest: manifest of the utterances to which vectors belong; None for other formats.
    Returns:
        Phrase that says what was read.
    Raises:
        UsageError: vectors without a manifest, or a manifest for another format.
        SpkdError: a damaged file.
    """
    suffix = Path(source).suffix
    if (manifest is not None) != (suffix in SUFFIXES):
        raise UsageError(f"--manifest: needed for {', '.join(SUFFIXES)}, and for these alone")
    if manifest is not None:
        return import_vectors(Path(source), Manifest.load(manifest), path)
    if suffix in HDF5:
        import_hdf5(Path(source), path)
    else:
        import_tars(source, path)
    return f"imported from {public_address(source)}"
