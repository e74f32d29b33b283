"""Members of tars that a manifest names."""

from __future__ import annotations

from pathlib import Path

from spkd.corpus.audio import AUDIO_SUFFIXES
from spkd.corpus.containers.container import Wanted
from spkd.corpus.containers.tar import Tar


def addresses(tar: Path) -> dict[str, str]:
    """Name of each member of a tar -> its address; of members of one name the later one.

    Raises:
        SpkdError: the tar is missing, or nothing of it can be read.
    """
    members = Tar(str(tar), Wanted(frozenset(AUDIO_SUFFIXES))).members()
    return {member.name: str(member.address(str(tar))) for member in members}
