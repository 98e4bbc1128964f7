"""Keeping memory: seen from outside, in page faults of a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch, phosphene.network.memory as allocator
print(allocator.keep_memory() if {keep} else None)
def faults():
    torch.empty(20_000_000).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
start = faults()
for _ in range(5):
    end = faults()
print(end - start)
"""


def run(keep: bool, **environment: str) -> list[str]:
    code = CODE.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set are glibc's own settings")
def test_large_tensors_are_not_fetched_anew() -> None:
    pages = 5 * 20_000_000 * 4 // 2**21  # at least, with the largest pages that there are
    before, after, off = run(False), run(True), run(True, PHOSPHENE_MALLOC="default")
    assert before[0] == "None"
    assert int(before[1]) >= pages
    assert after[0] == "True"
    assert int(after[1]) < int(before[1]) / 2
    assert off[0] == "False"
    assert int(off[1]) >= pages
