"""Formats of score files: one file for each, one line for each in `SCORE_FORMATS` of spkd/registry.py."""
