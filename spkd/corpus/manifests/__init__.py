"""Readers of manifests: a file for each format, and a line for each in `MANIFEST_READERS` of spkd/registry.py."""
