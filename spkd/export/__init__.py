"""Students in the formats of other runtimes."""
