"""Readers of manifests: one file for each format, one line for each in `MANIFEST_READERS` of spkd/registry.py."""
