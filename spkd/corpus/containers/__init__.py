"""Kinds of containers of audio: a file for each kind, and a line for each in `CONTAINERS` of spkd/registry.py."""
