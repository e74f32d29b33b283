"""Members of tars that a manifest names."""

from __future__ import annotations

import os
from pathlib import Path

from spkd.corpus.address import state_of_container
from spkd.corpus.audio import AUDIO_SUFFIXES
from spkd.corpus.containers.container import Wanted
from spkd.corpus.containers.tar import Tar
from spkd.corpus.expected import expect, state_text


def addresses(tar: Path) -> dict[str, str]:
    """Name of each member of a tar -> its address; of members of one name the later one.

    Raises:
        SpkdError: the tar is missing, or nothing of it can be read.
    """
    if (state := state_of_container(str(tar))) is not None:
        expect(str(tar), state_text(state))
    members = Tar(str(tar), Wanted(frozenset(AUDIO_SUFFIXES))).members()
    path = os.path.abspath(tar)  # as readers put relative ones behind the folder of the manifest
    return {member.name: str(member.address(path)) for member in members}
