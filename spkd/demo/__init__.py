"""The demonstration: the whole pipeline on synthetic speech."""
