"""Memory: that only an explicit call changes the process, seen in its page faults, and when memory has run out."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

from phosphene.network.memory import channels_last_on_cpu, is_out_of_memory

CODE = """
import json, os, resource, torch
from phosphene.network.memory import keep_freed_memory
from phosphene.network.model import Model

def page_faults():
    torch.empty(10_000_000).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def new_page_faults():
    start = [page_faults() for _ in range(8)][-1]  # by then the heap has grown to where the block fits for good
    return [page_faults() for _ in range(5)][-1] - start

before = new_page_faults()
model = Model(torch.nn.Conv2d(1, 2, 3), "net", (8, 8), channels_in=1)
with model.reading([""]) as read:
    read(torch.zeros(1, 1, 8, 8))
after_reading = new_page_faults()
os.environ["PHOSPHENE_MALLOC"] = "default"
is_kept = [keep_freed_memory()]
left_as_default = new_page_faults()
keep_freed_memory.cache_clear()
del os.environ["PHOSPHENE_MALLOC"]
is_kept.append(keep_freed_memory())
print(json.dumps([is_kept, before, after_reading, left_as_default, new_page_faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set are glibc's own settings")
def test_freed_memory_is_kept_after_the_call_alone_and_not_by_reading_a_model() -> None:
    pages = 5 * 10_000_000 * 4 // 2**21  # at least, with the largest pages that there are
    process = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    is_kept, before, after_reading, left_as_default, kept = json.loads(process.stdout)
    assert min(before, after_reading, left_as_default) >= pages
    assert is_kept == [False, True]
    assert kept < before / 2


def test_a_lack_of_memory_is_known_by_its_error_on_any_device() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_float32_images_on_a_cpu_get_their_channels_last_and_others_stay_as_they_are() -> None:
    image = torch.arange(24.0).view(1, 2, 3, 4)
    laid_out = channels_last_on_cpu(image)
    assert laid_out.equal(image)
    assert laid_out.stride() == (24, 1, 8, 2)
    double = image.double()
    assert channels_last_on_cpu(double) is double
