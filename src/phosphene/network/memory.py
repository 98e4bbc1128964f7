"""Memory: how much is free, what to do when it runs out, and how to lay out and keep what a forward pass needs."""

import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# from glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
SETTINGS = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * 2**20))
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep the memory of large tensors for as long as the process lives; return whether it does.

    By default glibc returns large blocks to the system. The kernel then fills each page with zeros when it is used
    again, which at batch sizes above one costs a fifth to a half of the time of a pass on a CPU. This changes the whole
    process: only a program such as the command line or a worker calls it, the library never does. The environment
    variable PHOSPHENE_MALLOC=default leaves glibc as it is.
    """
    if not sys.platform.startswith("linux") or os.environ.get("PHOSPHENE_MALLOC") == "default":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    results = [libc.mallopt(name, value) for name, value in SETTINGS]
    return results == [1] * len(SETTINGS)


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes are free on a device, None if the system does not report it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(free_of_system(), default=None) if device.type == "cpu" else None


def free_of_system() -> Iterator[int]:
    """Yield the bytes that Linux has left: for all processes, and for the control group of this one."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        yield int(lines["MemAvailable"].split()[0]) * 1024
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            yield int(limit) - int(used)
    except (OSError, KeyError, ValueError):
        return


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def channels_last_on_cpu(image: Tensor) -> Tensor:
    """Return images laid out as float32 convolutions on a CPU are fastest: with the channels last in memory."""
    if image.device.type != "cpu" or image.dtype != torch.float32:
        return image
    return image.contiguous(memory_format=torch.channels_last)
