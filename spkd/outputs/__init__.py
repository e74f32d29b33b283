"""Outputs of a teacher: targets, features, heads."""
