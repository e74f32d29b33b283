"""The demonstration: the whole pipeline on speech that it synthesises itself."""
