"""Relative paths in files of recipes: Kaldi and WeSpeaker write them relative to the folder of the recipe."""

from __future__ import annotations

from pathlib import Path

from spkd.errors import SpkdError


def place_of(text: str, folder: Path, where: str, above: bool = False) -> str:
    """Path of a file that a recipe names, relative to the folder of the manifest or to the current one.

    Args:
        folder: folder of the manifest.
        where: file and line, for errors.
        above: whether it may be relative to a folder above that of the manifest, too.
    Returns:
        The path; that in the folder of the manifest where there is none.
    Raises:
        SpkdError: there are two, which are other files.
    """
    own, here = folder / text, Path(text)
    if here.is_absolute():
        return text
    folders = (folder, *folder.absolute().parents) if above else (folder,)
    found = next((each / text for each in folders if (each / text).is_file()), None)
    if not here.is_file():
        return str(found or own)
    if found is not None and not found.samefile(here):
        raise SpkdError(f"{where}: {text!r} is {found} and {here.absolute()}; run the command in another folder")
    return text
