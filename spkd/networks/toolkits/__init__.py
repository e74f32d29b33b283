"""Architectures that only teachers have, with the levels of every other network of this project."""
