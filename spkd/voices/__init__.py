"""Voices: people enrolled in one file, verified and identified from the command line."""
