"""Workers on this machine: how many, what they compute, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from torch import nn

from phosphene import errors
from phosphene.atlases.runners import local
from phosphene.atlases.runners.local import LocalRunner, worker_devices, worker_main
from phosphene.atlases.runners.pool import WorkerRefused
from phosphene.network.loading import load
from tiny_atlas import TRAP, tiny, tiny_atlas, tiny_model


@pytest.mark.parametrize("workers", [-1, True])
def test_a_number_of_local_workers_that_is_none(workers: int) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"workers is a whole number of at least 0, not {workers}"):
        LocalRunner(workers)


def test_where_workers_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(5), raising=False)
    assert worker_devices(model, None) == [None] * 5
    assert worker_devices(model, 2) == [None] * 2
    assert worker_devices(model, 0) == []
    monkeypatch.setattr(type(model), "prototype_tensor", types.SimpleNamespace(device=torch.device("cuda:0")))
    for count, expected in ((1, []), (4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert worker_devices(model, None) == expected
    assert worker_devices(model, 2) == ["cuda:0", "cuda:1"]
    assert worker_devices(model, 1) == ["cuda:0"]


def test_other_processes_make_the_same_bytes() -> None:
    model = tiny_model()
    jobs = tiny_atlas(model).jobs
    here = {outcome.job: outcome for outcome in LocalRunner(0).run(model, jobs)}
    elsewhere = {outcome.job: outcome for outcome in LocalRunner(2).run(model, jobs)}
    assert here == elsewhere
    assert {outcome.error for outcome in here.values()} == {None}


def test_worker_processes_keep_freed_memory_and_this_process_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(local, "keep_freed_memory", lambda: kept.append(True))
    model = tiny_model()
    assert len(list(LocalRunner(0).run(model, tiny_atlas(model).jobs[:1]))) == 1
    assert kept == []
    ours, theirs = Pipe()
    with tempfile.TemporaryFile() as content:
        content.write(b"no model")
        content.flush()
        worker_main(os.dup(theirs.fileno()), content.fileno(), None)
    assert kept == [True]
    answer = ours.recv()
    assert isinstance(answer, WorkerRefused)
    assert answer.reason.startswith("a worker could not load the network (UnpicklingError: ")


def test_a_worker_that_is_killed_costs_a_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_trap.py").write_text(TRAP)
    model = load("nets_trap:trap")
    jobs = tiny_atlas(model, size=8).jobs
    expected = list(LocalRunner(0).run(model, jobs))
    (tmp_path / "armed.1").touch()
    assert list(LocalRunner(1).run(model, jobs)) == expected
    assert not (tmp_path / "armed.1").exists()


def test_a_network_that_only_this_process_knows_is_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("nets_nowhere")  # as a class of a notebook is without cloudpickle
    monkeypatch.setitem(sys.modules, "nets_nowhere", module)
    network = type("Own", (nn.Sequential,), {"__module__": "nets_nowhere"})
    module.Own = network  # type: ignore[attr-defined]
    model = load(network(*tiny()).eval(), input_size=24)
    jobs = tiny_atlas(model).jobs[:2]
    with pytest.warns(UserWarning, match=r"could not load the network \(ModuleNotFoundError: No module named 'nets_no"):
        outcomes = list(LocalRunner(1).run(model, jobs))
    assert outcomes == list(LocalRunner(0).run(model, jobs))


DRIVER = """
from phosphene.atlases.plan import atlas
from phosphene.network.loading import load
from phosphene.atlases.runners import local

begin = local.subprocess.Popen
def begun(*arguments, **options):
    process = begin(*arguments, **options)
    print(process.pid, flush=True)
    return process
local.subprocess.Popen = begun
model = load("nets_slow:slow")
jobs = atlas(model, size=8, steps=2, per_job=1).jobs
open("slow", "w").close()
list(local.LocalRunner(2).run(model, jobs))
"""
SLOW = """
import os, time
from torch import nn

class Slow(nn.Sequential):
    def forward(self, image):
        if os.path.exists("slow"):
            open(f"begun.{os.getpid()}", "w").close()
            time.sleep(600)
        return super().forward(image)

def slow():
    return Slow(nn.Conv2d(3, 2, 3))
"""


@pytest.mark.slow
def test_workers_die_with_their_driver(tmp_path: Path) -> None:
    (tmp_path / "nets_slow.py").write_text(SLOW)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert driver.stdout
    workers = [int(driver.stdout.readline()) for _ in range(2)]
    until(lambda: len(list(tmp_path.glob("begun.*"))) == 2)  # both are in the middle of a forward pass
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    until(lambda: not any(map(alive, workers)))


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
