"""Settings for all tests."""

from __future__ import annotations

import os

# Matrices this small are slower on several threads, most of all when tests share the cores with other processes. Set before torch
# is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
