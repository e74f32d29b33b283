"""Files: written whole or not at all, parsed with limits, checked against digests."""
