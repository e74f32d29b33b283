"""Running a teacher once over a manifest, into a cache."""
