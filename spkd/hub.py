"""Download and upload of students on the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spkd.errors import SpkdError, UsageError, first_line
from spkd.eval.calibration import Calibration, file_of
from spkd.eval.compare import SIZE, load_systems, markdown, paper_table
from spkd.students.description import DESCRIPTION, WEIGHTS, Description
from spkd.version import __version__

CALIBRATIONS = "calibration*.json"  # of every size of the embedding
STUDENT_FILES = (DESCRIPTION, WEIGHTS, CALIBRATIONS)  # files of a student's folder that are uploaded and downloaded
CARD = "README.md"


def download(name: str, revision: str | None, token: str | None) -> Path:
    """Download a student to the hub's cache on this machine.

    Args:
        name: USER/NAME.
        revision: a branch, a tag or a commit; None takes the main branch.
        token: access token of a private model; None uses that of the machine.
    Raises:
        UsageError: huggingface_hub is missing, or there is no such student.
        SpkdError: the hub does not answer.
    """
    hub = _hub()
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, token=token, allow_patterns=list(STUDENT_FILES)))
    except Exception as error:  # classes of the hub's package and of its network library
        raise SpkdError(f"{name}: cannot be loaded from the hub ({first_line(error)})") from error
    if not (folder / DESCRIPTION).is_file():
        raise UsageError(f"{name}: no student of spkd there ({DESCRIPTION})")
    return folder


def upload(
    folder: Path, name: str, evaluations: Sequence[str | Path], licence: str, private: bool, token: str | None
) -> str:
    """Upload the folder of a student, with a model card; arguments, result and errors as `SpeakerModel.push_to_hub`."""
    card = model_card(folder, name, evaluations, licence)
    digests = Description.read(folder / DESCRIPTION).digests
    calibrations = {
        file_of(part): Calibration.of_student(folder / file_of(part), model)
        for model, part in digests.items()
        if (folder / file_of(part)).is_file()
    }
    hub = _hub()
    api = hub.HfApi(token=token)
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        operations = [hub.CommitOperationAdd(file, str(folder / file)) for file in (DESCRIPTION, WEIGHTS)]
        for file, calibration in calibrations.items():
            operations.append(hub.CommitOperationAdd(file, json.dumps(calibration.public().to_json()).encode()))
        operations.append(hub.CommitOperationAdd(CARD, card.encode()))
        api.create_commit(name, operations, commit_message=f"Student trained by spkd {__version__}")
    except Exception as error:  # classes of the hub's package and of its network library
        raise SpkdError(f"{name}: the hub refuses it ({first_line(error)})") from error
    return address


def model_card(folder: Path, name: str, evaluations: Sequence[str | Path], licence: str) -> str:
    """Content of README.md of a student: use, error rates, training and caches.

    Args:
        evaluations: folders that `spkd eval` wrote.
        licence: an identifier of the hub; "" where it is not stated.
    Raises:
        UsageError: a folder holds no evaluation, or that of other weights.
        SpkdError: a damaged file.
    """
    # Facts of the student.
    student = Description.read(folder / DESCRIPTION)
    run = student.training.facts
    systems = load_systems([str(item) for item in evaluations])
    for system in systems:
        if not system.report.weights or system.report.weights[-1] not in student.digests:
            raise UsageError(f"{system.folder}: error rates of another model than {folder}, or of its earlier weights")
    head: dict[str, Any] = {"license": licence} if licence else {}
    head |= {
        "library_name": "spkd",
        "tags": ["speaker-verification", "speaker-embeddings", "knowledge-distillation", "audio"],
    }
    facts = {
        "Network": f"{student.network}, {student.settings}",
        "Sizes of the embedding": ", ".join(map(str, student.sizes)),
        "Features": student.features,
        "Licence": licence or "not stated",
        "Teachers": ", ".join(run.teacher_families) or "none",
        "Caches (fingerprints)": ", ".join(run.caches) or "unknown",
        "Voice activity detection": ", ".join(run.vad) or "none",
        "Losses": ", ".join(run.losses) or "unknown",
        "Steps": "unknown" if student.training.steps is None else student.training.steps,
    }
    # The page.
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n", f"# {name}\n"]
    parts.append("A speaker-verification student distilled by spkd.\n")
    parts.append(f'```python\nimport spkd\n\nmodel = spkd.load("{name}")\nmodel.verify("a.wav", "b.wav")\n```\n')
    if systems:
        header, rows = paper_table(systems)
        kept = [0, *range(len(SIZE), len(header))]
        table = markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows])
        parts.append(f"## Error rates\n\n{table}\nIn brackets: confidence intervals of 95 %.\n")
        parts += [f"{system.label}: {' '.join(system.report.about)}\n" for system in systems]
    parts.append("## Training\n")
    parts.append("".join(f"- {key}: {value}\n" for key, value in facts.items()))
    return "\n".join(parts)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError("models on the hub need huggingface_hub: pip install 'spkd[hub]'") from error
    return huggingface_hub
