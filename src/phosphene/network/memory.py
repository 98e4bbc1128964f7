"""Memory that is kept: by default glibc gives large blocks back to the system, and every pass has to fetch them anew.

Each page that is fetched anew is first filled with zeros by the kernel, which at batch sizes above one costs a fifth to
a half of the time of a pass on a CPU. `mallopt` turns that off for the whole process, for as long as it lives: what has
been used stays with it. The environment variable PHOSPHENE_MALLOC=default leaves glibc as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# of glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
SETTINGS = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * 2**20))


@cache
def keep_memory() -> bool:
    """Have the C library keep the memory of large tensors, once a process; return whether it does now."""
    if not sys.platform.startswith("linux") or os.environ.get("PHOSPHENE_MALLOC") == "default":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    done = [mallopt(name, value) == 1 for name, value in SETTINGS]
    return all(done)
