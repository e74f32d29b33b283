"""spkd: distil heavy speaker-verification teachers into students small enough for a phone."""

__version__ = "0.2.0"
