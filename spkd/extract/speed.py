"""Speed of an extraction: hours of audio per hour, and the shares of time in which the teacher runs and waits."""

from __future__ import annotations

import math

from spkd.cores import usable
from spkd.files.text import counted
from spkd.meter import Meter
from spkd.progress import log

# Activities of the meter, which counts seconds of audio; CORES is the time of all cores that load.
TEACHER, WRITING, LOADING, CORES = "teacher", "writing", "loading", "cores"
HELD_UP = 0.15  # share of the time above which waiting is reported as a bottleneck


def note(meter: Meter) -> str:
    """Speed so far, for the progress bar."""
    return f"{meter.rate:.0f} h/h"


def cores_needed(meter: Meter) -> int:
    """Number of cores, beside those that the teacher uses itself, that load as fast as the teacher runs here.

    It is the time of cores that loading took, over the time in which nothing waited for it.
    """
    return max(math.ceil(meter.share(CORES) / max(1 - meter.share(LOADING), 1e-3) - 0.05), 1)


def report(meter: Meter, workers: int, runs_teacher: bool) -> None:
    """Log the speed, and the bottleneck if there is one.

    Args:
        workers: number of threads or processes that load.
        runs_teacher: whether there is a teacher, which could wait for them.
    """
    if meter.is_short or not meter.done:
        return
    loading, writing = meter.share(LOADING), meter.share(WRITING)
    speed = f"{meter.done / 3600:.2f} h of audio in {meter.seconds:.0f} s: {meter.rate:.0f} hours per hour"
    used = meter.share(CORES)
    if not runs_teacher:
        log(f"{speed}; loading took {used:.2g} cores (workers={workers})")
    else:
        log(
            f"{speed}; the teacher was busy {meter.share(TEACHER):.0%} of the time, waited {loading:.0%} for audio and "
            f"{writing:.0%} for the disk"
        )
        needed = f"it needs {cores_needed(meter)} here (workers={workers})"
        log(f"loading took {used:.2g} cores; so that this teacher never waits, {needed}")
    if runs_teacher and loading > HELD_UP:
        cores, needs = usable(), cores_needed(meter)
        if needs <= min(workers, cores):
            log("bottleneck: audio that comes late; take faster storage, or cores without other work")
        else:
            more = f"raise workers={workers}" if workers < cores else "take more cores"
            log(f"bottleneck: decoding and augmentation; {more} ({counted(cores, 'core')} may be used)")
    elif writing > HELD_UP:
        log("bottleneck: writing the cache; take faster storage, fewer targets or a smaller codec")
