"""Docstrings of the site: the house leaves out the blank lines between sections, which griffe needs to find them."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"\n(Args|Attributes|Example|Raises|Returns|Yields):\n")


class Sections(griffe.Extension):
    """Docstrings with a blank line before each section."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(r"\n\n\1:\n", obj.docstring.value)
