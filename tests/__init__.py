"""Tests. Each of pytest's workers, and each process that a test starts, computes in one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
