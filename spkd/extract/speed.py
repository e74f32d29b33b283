"""Speed of an extraction: hours of audio per hour, and the shares of time in which the teacher runs and waits."""

from __future__ import annotations

import os

from spkd.meter import Meter
from spkd.progress import log

TEACHER, WRITING, LOADING = "teacher", "writing", "loading"  # activities of the meter, which counts seconds of audio
HELD_UP = 0.15  # share of the time above which waiting is reported as a bottleneck


def note(meter: Meter) -> str:
    """Speed so far, for the progress bar."""
    return f"{meter.rate:.0f} h/h"


def report(meter: Meter, workers: int) -> None:
    """Log the speed, and the bottleneck if there is one.

    Args:
        meter: meter of the extraction.
        workers: number of threads that load audio.
    """
    if meter.is_short or not meter.done:
        return
    loading, writing = meter.share(LOADING), meter.share(WRITING)
    log(
        f"{meter.done / 3600:.2f} h of audio in {meter.seconds:.0f} s: {meter.rate:.0f} hours per hour; the teacher "
        f"was busy {meter.share(TEACHER):.0%} of the time, waited {loading:.0%} for audio and {writing:.0%} for the "
        "disk"
    )
    if loading > HELD_UP:
        cores = os.cpu_count() or 1
        more = f"raise workers={workers}" if workers < cores else "take faster storage or more cores"
        log(f"bottleneck: decoding and augmentation; {more} (this machine has {cores} cores)")
    elif writing > HELD_UP:
        log("bottleneck: writing the cache; take faster storage, fewer targets or a smaller codec")
