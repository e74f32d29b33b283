"""`engine=ray`: extraction by actors of a Ray cluster, each of which is a process that shares the cache with others."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spkd.cache.folder import CARD, commit_path, load_card
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError, first_line
from spkd.extract.ranks import Rank, report
from spkd.extract.run import Report, load_and_extract
from spkd.extract.settings import ExtractConfig
from spkd.files.text import counted
from spkd.progress import log, track

POLL = 0.5  # s between two checks of the actors
RESTARTS = 3  # most restarts of an actor that dies


def extract_with_ray(configs: Sequence[ExtractConfig], manifest: Manifest) -> list[Report]:
    """Extract with actors of a Ray cluster.

    There are `processes` actors; with processes=0, one for each GPU of the cluster, or one for every two CPUs. An actor
    that dies is started again. Units that it had not committed are extracted by other actors.

    Args:
        configs: settings of each teacher, which differ in cache, teacher and storage alone.
    Raises:
        UsageError: ray is missing.
        SpkdError: no actor finished.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("engine=ray needs ray: pip install 'spkd[ray]'") from error
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            # Ray lets the actors import from the current folder, where anybody's modules may lie: it gets an empty one.
            empty = stack.enter_context(tempfile.TemporaryDirectory(prefix="spkd-ray-"))
            with contextlib.chdir(empty):
                # By default, ray waits for whatever cluster was started last, which may be gone.
                address = "auto" if os.environ.get("RAY_ADDRESS") else "local"
                ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            stack.callback(ray.shutdown)
        return _run(ray, configs, configs[0], manifest)


def _run(ray: Any, configs: Sequence[ExtractConfig], config: ExtractConfig, manifest: Manifest) -> list[Report]:
    # Start the actors.
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if config.device != "cpu" else 0
    count = config.processes or gpus or max(int(resources.get("CPU", 1)) // 2, 1)
    needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    kind = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **needs)(Actor)
    run, folder = uuid.uuid4().hex, os.getcwd()
    actors = [kind.remote(folder) for _ in range(count)]
    waiting = {a.run.remote(list(configs), manifest, Rank(i, count, run)): (i, a) for i, a in enumerate(actors)}
    log(f"{counted(count, 'actor')}, each with {'a GPU' if gpus else 'one CPU or more'}")
    # Wait for them; the bar shows the units that are committed.
    reports: list[Report] | None = None
    problem = ""
    roots, shown = [Path(c.cache) for c in configs], 0
    with track("extracting", 0, "units") as bar:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=POLL)
            done, bar.total = _committed(roots)
            if done > shown:
                bar.advance(done - shown)
                shown = done
            for ref in ready:
                number, actor = waiting.pop(ref)
                try:
                    reports = ray.get(ref)
                except ray.exceptions.RayError as error:
                    problem = first_line(error)
                    log(f"actor {number} failed for good: {problem}")
                ray.kill(actor)  # others may wait for its place, such as one whose machine is lost
            time.sleep(0.01)
    if reports is None:
        raise SpkdError(f"engine=ray: none of {counted(count, 'actor')} finished ({problem})")
    for root in roots:
        report(root, run)
    return reports


def _committed(roots: Sequence[Path]) -> tuple[int, int]:
    """Number of committed units, and of all units, of the caches that have a card."""
    done = total = 0
    for root in roots:
        if (root / CARD).is_file():
            units = load_card(root).units
            total += units
            done += sum(commit_path(root, unit).is_file() for unit in range(units))
    return done, total


class Actor:
    """Process of the cluster that extracts.

    Args:
        folder: folder in which the command was given, to which paths are relative.
    """

    def __init__(self, folder: str) -> None:
        os.chdir(folder)

    def run(self, configs: list[ExtractConfig], manifest: Manifest, rank: Rank) -> list[Report]:
        """Extract, as a rank of the actors."""
        return load_and_extract(configs, manifest, rank)
