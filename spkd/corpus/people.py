"""Speakers and utterances that a model was trained on, as digests: they tell whether tested ones are among them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from spkd.errors import SpkdError

DIGEST_BYTES = 6  # bytes of the digest of a name: in one of 600 sets of a million names, two share a digest
MOST_NAMES = 10_000  # digests of a set: 80 kB of text


@dataclass(frozen=True)
class Names:
    """Set of names, stored as digests: membership of a name can be tested, but names cannot be listed.

    Of a large set only the lowest digests are kept, which are a random sample of it.

    Attributes:
        digests: lowest digests in rising order, base64.
    """

    count: int = field(metadata={"low": 0})
    digests: str = ""

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        digests = sorted({_digest(name) for name in names})
        return cls(len(digests), _encoded(digests))

    @cached_property
    def kept(self) -> list[bytes]:
        """Digests as bytes. Raises SpkdError where they are damaged."""
        try:
            data = base64.b64decode(self.digests, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SpkdError(f"damaged (digests of names: {error})") from error
        digests = [data[first : first + DIGEST_BYTES] for first in range(0, len(data), DIGEST_BYTES)]
        if len(data) % DIGEST_BYTES or len(digests) != min(self.count, MOST_NAMES):
            raise SpkdError(f"damaged (digests of {len(digests)} names, {self.count} are counted)")
        return digests

    @property
    def is_sample(self) -> bool:
        """Whether only a sample of the names is kept, so that some are not recognised."""
        return self.count > MOST_NAMES

    def shared(self, names: Iterable[str]) -> list[str]:
        """Names that belong to the set, sorted."""
        if not self.count:
            return []
        known = set(self.kept)
        return sorted(name for name in set(names) if _digest(name) in known)

    def with_those_of(self, other: Names) -> Names:
        """Union of two sets. Where one is a sample, its count is the sum of both, as if the sets were disjoint."""
        digests = sorted({*self.kept, *other.kept})
        count = self.count + other.count if self.is_sample or other.is_sample else len(digests)
        return Names(count, _encoded(digests))


def _digest(name: str) -> bytes:
    normal = unicodedata.normalize("NFC", name)  # one name, however its accents are written
    return hashlib.sha256(normal.encode(errors="surrogatepass")).digest()[:DIGEST_BYTES]


def _encoded(digests: list[bytes]) -> str:
    return base64.b64encode(b"".join(digests[:MOST_NAMES])).decode()


@dataclass(frozen=True)
class People:
    """Speakers and utterances that a model was trained on.

    Attributes:
        unknown: whether it was trained on others too, of whom nothing is known.
    """

    speakers: Names = Names(0)
    utterances: Names = Names(0)
    unknown: bool = False

    def check(self, where: str) -> None:
        """Check both sets. Raises SpkdError where they are damaged."""
        try:
            _ = self.speakers.kept, self.utterances.kept
        except SpkdError as error:
            raise SpkdError(f"{where}: {error}") from error

    def with_those_of(self, other: People) -> People:
        return People(
            self.speakers.with_those_of(other.speakers),
            self.utterances.with_those_of(other.utterances),
            self.unknown or other.unknown,
        )
