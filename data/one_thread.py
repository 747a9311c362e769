"""Imported first in the process that workers are forked from, so that NumPy starts no threads in it. (Arrow, which only
Parquet and `datasets:` need, starts some of its own.)

From a process' first thread on, the C library locks with every allocation, in its forks too, and a tokenizer makes
millions: it takes a seventh more time.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read as NumPy is imported
