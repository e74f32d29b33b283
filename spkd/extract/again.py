"""Units of a cache that are extracted again: damaged ones, and ones with rejected views that can be loaded now."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from spkd.cache.card import Card
from spkd.cache.claims import changing, reopen
from spkd.cache.folder import CommitRecord, commit_path, committed_views
from spkd.cache.plan import Plan
from spkd.corpus.address import state_of_audio
from spkd.corpus.audio import AudioError
from spkd.corpus.loader import ViewLoader
from spkd.errors import SpkdError
from spkd.files.text import counted
from spkd.progress import log, track


def can_be_extracted(root: Path, card: Card, plan: Plan, loader: ViewLoader, workers: int) -> Callable[[int], bool]:
    """Function of the number of a damaged unit that returns whether the audio of all views that it had can be loaded.

    Where neither its own record nor that of the cache tells which views these are, nothing of it can be used.
    """

    def can_be(unit: int) -> bool:
        had = committed_views(root, card, unit, plan.unit(unit))
        with ThreadPoolExecutor(workers) as pool:
            return all(pool.map(partial(_loads, loader), had or ()))

    return can_be


def _loads(loader: ViewLoader, view: int) -> bool:
    try:
        loader(view)
    except (AudioError, MemoryError):
        return False
    return True


def reopen_rejected(
    root: Path, card: Card, plan: Plan, loader: ViewLoader, limits: tuple[float, float | None], workers: int
) -> None:
    """Reopen the units with rejected views that can be loaded now, and say how many.

    A view is tried where its audio could not be decoded at extraction, or the file has changed since. A unit is left as
    it is where audio of its other views cannot be loaded now.

    Args:
        limits: shortest utterance and longest view that the teacher accepts (s); None for no longest.
    """

    def suspected(unit: int) -> list[int]:
        first, commit = plan.unit(unit).start, _record(root, card, unit)
        views = {first + number: commit.decoded.get(number) for number in commit.rejected} if commit else {}
        paths = {view: loader.manifest[int(plan.views.utterance[view])].path for view in views}
        return [
            view
            for view, state in views.items()
            if loader.refusal(view, *limits) is None and (state is None or state != state_of_audio(paths[view]))
        ]

    loads = partial(_loads, loader)

    def usable(unit: int) -> list[int]:
        first, commit = plan.unit(unit).start, _record(root, card, unit)
        return [] if commit is None else [view for view in plan.unit(unit) if view - first not in commit.rejected]

    views = {view: unit for unit in range(card.units) for view in suspected(unit)}
    loaded = set()
    with track("trying rejected views again", len(views), "views") as bar, ThreadPoolExecutor(workers) as pool:
        for view, is_loaded in zip(views, pool.map(loads, views), strict=True):
            loaded.update([view] if is_loaded else [])
            bar.advance(1)

    def is_due(unit: int) -> bool:  # another process may have extracted it again by now
        first, commit = plan.unit(unit).start, _record(root, card, unit)
        return commit is not None and any(first + number in loaded for number in commit.rejected)

    # A unit whose other audio is away by now would lose what it has.
    due = sorted({views[view] for view in loaded})
    with ThreadPoolExecutor(workers) as pool:
        kept = [unit for unit in due if not all(pool.map(loads, usable(unit)))]
    if kept:
        log(f"{root}: not extracted again, since audio of other views is away: {counted(len(kept), 'unit')}")
    due = [unit for unit in due if unit not in kept]
    if not due:
        return
    with changing(root):
        units = [unit for unit in due if reopen(root, unit, is_due)]
    if units:
        loaded = {view for view in loaded if views[view] in units}
        log(
            f"{root}: {counted(len(loaded), 'rejected view')} can be loaded now; "
            f"{counted(len(units), 'unit')} extracted again"
        )


def _record(root: Path, card: Card, unit: int) -> CommitRecord | None:
    """The commit record of a unit; None where it is not committed."""
    if not commit_path(root, unit).is_file():
        return None
    try:
        return CommitRecord.load(root, card, unit)
    except SpkdError:  # removed by another process, which extracts the unit again
        return None
