"""The embedded demonstration: the whole way, on speech it synthesises itself."""
