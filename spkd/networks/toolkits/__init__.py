"""Architectures of teachers trained by other toolkits, with the same levels as the student networks."""
