"""Start of an extraction: in this process, as a rank of torchrun or srun, or by actors of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from spkd.cache.folder import CARD
from spkd.config import without_unused
from spkd.corpus.manifest import Manifest
from spkd.corpus.processes import check_is_guarded
from spkd.errors import UsageError
from spkd.extract.ranks import Rank, report
from spkd.extract.run import Report, load_and_extract
from spkd.extract.settings import ExtractConfig
from spkd.files.atomic import check_writable


def without_effect(configs: Sequence[ExtractConfig], is_script: bool = False) -> list[ExtractConfig]:
    """Settings of the teachers of one pass without those that have no effect; see spkd.config.without_unused.

    Args:
        is_script: whether they are those of --slurm-script.
    Raises:
        UsageError: a setting without effect was typed.
    """
    reasons = {}
    if configs[0].engine != "ray" and not is_script:
        reasons["processes"] = "it is of engine=ray and --slurm-script"
    if all(config.teacher.name == "none" for config in configs):
        reasons["device"] = "teacher=none runs no model"
    return [without_unused(config, reasons) for config in configs]


def extract_all(configs: Sequence[ExtractConfig]) -> list[Report]:
    """Extract with one or several teachers in one pass over the audio.

    Args:
        configs: settings of each teacher, which differ in cache, teacher and storage alone.
    Returns:
        A report of each cache; an empty list where another rank reports.
    Raises:
        UsageError: two teachers have the same cache, a script lacks its guard, or as of load_and_extract.
        SpkdError: as of load_and_extract.
    """
    check_is_guarded()
    configs = without_effect(configs)
    manifest = Manifest.load(configs[0].manifest)
    for config in configs:
        if Path(config.cache).is_file():
            raise UsageError(f"cache={config.cache}: a file; a cache is a folder")
        card = Path(config.cache) / CARD
        if card.is_file() or not os.path.lexists(card):  # what else is in its place is replaced by the extraction
            check_writable(card)
    if len({Path(config.cache).resolve() for config in configs}) < len(configs):
        raise UsageError("--also: every teacher needs a cache of its own (cache=FOLDER)")
    if configs[0].engine == "ray":
        from spkd.extract.ray_engine import extract_with_ray

        return extract_with_ray(configs, manifest)
    rank = Rank.launched()
    if rank is not None and rank.number:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            load_and_extract(configs, manifest, rank)
        return []
    reports = load_and_extract(configs, manifest, rank)
    for config in configs if rank is not None else ():
        report(Path(config.cache), rank.run if rank else "")
    return reports
