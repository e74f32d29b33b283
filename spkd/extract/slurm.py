"""Script of a Slurm job array whose tasks share one cache."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from spkd.errors import UsageError, public_address
from spkd.extract.launch import without_effect
from spkd.extract.settings import ExtractConfig

TASKS = 8  # tasks where the settings give no number
DEVICES = ("auto", "cuda", "cpu")  # of a task


def script(configs: Sequence[ExtractConfig], arguments: Sequence[str]) -> str:
    """Script for `sbatch`.

    Args:
        arguments: arguments of the command `spkd`, including `--slurm-script`.
    Raises:
        UsageError: a setting without effect was typed, the engine or the device is not one of tasks, an address has
            credentials, or a line end or another control character is in an argument or in the name of the current
            folder.
    """
    folder = os.getcwd()
    if odd := next((text for text in (folder, *arguments) if not text.isprintable()), None):
        raise UsageError(f"--slurm-script: {odd!r} has line ends or control characters, which no script can hold")
    if secret := next((shown for text in arguments if (shown := public_address(text)) != text), None):
        raise UsageError(
            f"--slurm-script: {secret}: the script would hold what stands for ***; set the value in spkd.yaml, which "
            "the tasks read"
        )
    config, *others = without_effect(configs, is_script=True)
    if config.engine == "ray":
        raise UsageError("--slurm-script: engine=ray starts actors of its own; tasks share the cache without it")
    if config.device not in DEVICES:
        raise UsageError(
            f"--slurm-script: device={config.device}: a task has one GPU of those of its machine, which Slurm chooses; "
            f"choose one of {', '.join(DEVICES)}"
        )
    of_script = ("--slurm-script", "processes=")
    command = shlex.join(["spkd", *(item for item in arguments if not item.startswith(of_script))])
    runs_model = any(each.teacher.name != "none" for each in (config, *others))
    gpu = "#SBATCH --gres=gpu:1\n" if runs_model and config.device != "cpu" else ""
    return f"""#!/bin/bash
# Every task claims units of the cache until none is left; the last one completes it. A task that is lost costs its
# uncommitted units only, which the others take over; submitting this again continues.
# Since Slurm 22.05, srun does not take the number of cores from sbatch.
#SBATCH --job-name=spkd-extract
#SBATCH --array=0-{(config.processes or TASKS) - 1}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={config.workers + 1}
{gpu}#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --output=spkd-extract-%A_%a.log
#SBATCH --chdir={shlex.quote(folder)}
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" {command}
"""
