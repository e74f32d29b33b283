"""Formats of trial lists: one file for each, one line for each in `TRIAL_FORMATS` of spkd/registry.py."""
