"""Memory that is kept: by default glibc gives large blocks back to the system, and every pass has to fetch them anew.

Each page that is fetched anew is first filled with zeros by the kernel, which at batch sizes above one costs a fifth to
a half of the time of a pass on a CPU. `mallopt` turns that off for the whole process, for as long as it lives: what has
been used stays with it. The environment variable PHOSPHENE_MALLOC=default leaves glibc as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# of glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
SETTINGS = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * 2**20))
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep the memory of large tensors, once a process; return whether it does now."""
    if not sys.platform.startswith("linux") or os.environ.get("PHOSPHENE_MALLOC") == "default":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    done = [mallopt(name, value) == 1 for name, value in SETTINGS]
    return all(done)


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes can still be had on a device, None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(free_of_system(), default=None) if device.type == "cpu" else None


def free_of_system() -> Iterator[int]:
    """Yield the bytes that Linux has left, for everybody and for the group of processes that this one is in."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        yield int(lines["MemAvailable"].split()[0]) * 1024
        most, taken = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            yield int(most) - int(taken)
    except (OSError, KeyError, ValueError):
        return


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def channels_last_on_cpu(image: Tensor) -> Tensor:
    """Return images as the convolutions of a CPU want them in float32: with the channels last in memory."""
    if image.device.type != "cpu" or image.dtype != torch.float32:
        return image
    return image.contiguous(memory_format=torch.channels_last)
