"""Runners: who works off the jobs, and what happens when a worker dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phosphene import errors
from phosphene.atlases.plan import Job
from phosphene.atlases.runners.local import LocalRunner, places_for
from phosphene.atlases.runners.pool import (
    CannotStart,
    Outcome,
    WorkerDied,
    WorkerRefused,
    pickle_model,
    run_jobs,
    try_job,
    unpickle_model,
)
from phosphene.atlases.runners.ray import RayRunner
from phosphene.network.loading import load
from tiny_atlas import NETS, tiny, tiny_atlas, tiny_model

JOBS = tiny_atlas(tiny_model(), channels="0:4", per_job=1).jobs  # eight


class Crew:
    """Workers that do as they are told: `fate[job]` says what comes of each try, "done" after the last."""

    def __init__(self, fate: dict[Job, list[str]] | None = None) -> None:
        self.fate = fate or {}
        self.hired: list[Clerk] = []
        self.begun: list[Job] = []
        self.most = 0

    def hire(self) -> Clerk:
        self.hired.append(Clerk(self))
        return self.hired[-1]

    def wait(self, busy: Collection[Clerk]) -> tuple[Clerk, Outcome | WorkerDied | WorkerRefused]:
        self.most = max(self.most, len(busy))
        clerk = next(iter(busy))  # the one that has been at it longest
        assert clerk.job is not None
        tries = self.fate.get(clerk.job, [])
        came = tries.pop(0) if tries else "done"
        if came == "dies":
            return clerk, WorkerDied("killed by SIGKILL")
        return clerk, WorkerRefused("no such network") if came == "refuses" else Outcome(clerk.job)

    def run(self, slots: int, jobs: Collection[Job]) -> list[Outcome]:
        return list(run_jobs(self.hire, self.wait, slots, jobs))


class Clerk:
    def __init__(self, crew: Crew) -> None:
        self.crew, self.there = crew, True
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        assert self.there
        self.job = job
        self.crew.begun.append(job)

    def dismiss(self) -> None:
        assert self.there
        self.there = False


def test_each_job_is_done_once_by_as_many_as_may() -> None:
    crew = Crew()
    outcomes = crew.run(3, JOBS)
    assert [one.job for one in outcomes] == list(JOBS) == crew.begun
    assert (len(crew.hired), crew.most) == (3, 3)
    assert not any(one.there for one in crew.hired)


def test_no_more_are_hired_than_there_are_jobs() -> None:
    crew = Crew()
    assert len(crew.run(64, JOBS[:2])) == len(crew.hired) == 2
    assert Crew().run(4, []) == []


def test_a_job_is_taken_only_when_somebody_begins_it() -> None:
    crew, taken = Crew(), list[Job]()

    def source() -> Any:
        for job in JOBS:
            taken.append(job)
            yield job

    outcomes = run_jobs(crew.hire, crew.wait, 2, source())
    next(outcomes)
    assert taken == crew.begun == list(JOBS[:3])  # one done, two at work
    outcomes.close()
    assert taken == list(JOBS[:3])
    assert not any(one.there for one in crew.hired)


def test_who_dies_costs_the_job_a_retry() -> None:
    crew = Crew({JOBS[1]: ["dies", "dies"]})
    outcomes = crew.run(2, JOBS[:4])
    assert [one.error for one in outcomes] == [None] * 4
    assert {one.job for one in outcomes} == set(JOBS[:4])
    assert crew.begun.count(JOBS[1]) == 3
    assert len(crew.hired) == 4  # two for the two that died
    assert not any(one.there for one in crew.hired)


def test_a_job_that_kills_three_has_failed() -> None:
    outcomes = Crew({JOBS[1]: ["dies"] * 9}).run(2, JOBS[:4])
    assert {one.job: one.error for one in outcomes} == {
        JOBS[0]: None,
        JOBS[1]: "its worker died 3 times, at last so: killed by SIGKILL",
        JOBS[2]: None,
        JOBS[3]: None,
    }


def test_workers_who_cannot_load_the_network_give_their_jobs_back() -> None:
    crew = Crew({JOBS[1]: ["refuses"]})
    outcomes = run_jobs(crew.hire, crew.wait, 2, iter(JOBS))
    assert next(outcomes).job == JOBS[0]
    with pytest.raises(CannotStart, match="no such network") as caught:
        next(outcomes)
    assert caught.value.jobs == [JOBS[1], JOBS[2]]
    assert not any(one.there for one in crew.hired)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.LayerRefused("it overflows"), "it overflows"),
        (ZeroDivisionError("by zero.\nmore"), "ZeroDivisionError: by zero"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_what_fails_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, error: BaseException, text: str) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("phosphene.atlases.runners.pool.render_job", fails)
    assert try_job(tiny_model(), JOBS[0]) == Outcome(JOBS[0], error=text)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, errors.Interrupted])
def test_being_stopped_is_no_failure(monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    def stopped(*_: Any) -> None:
        raise kind("stopped")

    monkeypatch.setattr("phosphene.atlases.runners.pool.render_job", stopped)
    with pytest.raises(kind):
        try_job(tiny_model(), JOBS[0])


def test_a_model_travels_as_its_reference_or_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_travel.py").write_text(NETS)
    by_reference = load("nets_travel:tiny")
    assert len(pickle_model(by_reference)) < 500
    assert unpickle_model(pickle_model(by_reference)).fingerprint == by_reference.fingerprint
    changed = load("nets_travel:tiny", std=[0.5])  # which the reference alone would load without
    assert (changed.ref, changed.options) == (None, {"std": [0.5]})
    assert unpickle_model(pickle_model(changed)).fingerprint == changed.fingerprint != by_reference.fingerprint
    torch.nn.init.zeros_(next(by_reference.module.parameters()))  # so that the reference means another
    with pytest.raises(errors.ModelRefused, match="nets_travel:tiny comes out with other weights there than here"):
        unpickle_model(pickle_model(by_reference))
    local = nn.Sequential(nn.Conv2d(3, 2, 3))
    local.forward = lambda image: image  # type: ignore[method-assign]
    with pytest.raises(CannotStart, match="Sequential cannot be packed"):
        pickle_model(load(local, input_size=8), pickle)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LocalRunner(-1), "workers is a whole number of at least 0, not -1"),
        (lambda: LocalRunner(True), "workers is a whole number of at least 0, not True"),
        (lambda: RayRunner(workers=0), "workers is a whole number of at least 1, not 0"),
    ],
)
def test_a_number_of_workers_that_is_none(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=text):
        make()


def test_where_workers_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(5), raising=False)
    assert places_for(model, None) == [None] * 5
    assert places_for(model, 2) == [None] * 2
    assert places_for(model, 0) == []
    monkeypatch.setattr(type(model), "like", types.SimpleNamespace(device=torch.device("cuda:0")))
    for count, expected in ((1, []), (4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert places_for(model, None) == expected
    assert places_for(model, 2) == ["cuda:0", "cuda:1"]
    assert places_for(model, 1) == ["cuda:0"]


def test_other_processes_make_the_same_bytes() -> None:
    model = tiny_model()
    jobs = tiny_atlas(model).jobs
    here = {one.job: one for one in LocalRunner(0).run(model, jobs)}
    there = {one.job: one for one in LocalRunner(2).run(model, jobs)}
    assert here == there
    assert {one.error for one in here.values()} == {None}


ARMED = """
import os, signal, torch
from pathlib import Path
from torch import nn

class Trap(nn.Sequential):
    def forward(self, image):
        for name in ("armed.1", "armed.2"):
            if Path(name).exists():
                Path(name).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(image)

def trap():
    torch.manual_seed(0)
    return Trap(nn.Conv2d(3, 2, 3))
"""


def test_a_worker_that_is_killed_costs_a_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_trap.py").write_text(ARMED)
    model = load("nets_trap:trap")
    jobs = tiny_atlas(model, size=8).jobs
    expected = list(LocalRunner(0).run(model, jobs))
    (tmp_path / "armed.1").touch()
    assert list(LocalRunner(1).run(model, jobs)) == expected
    assert not (tmp_path / "armed.1").exists()


def test_a_network_that_only_this_process_knows_is_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = types.ModuleType("nets_nowhere")  # as a class of a notebook is without cloudpickle
    monkeypatch.setitem(sys.modules, "nets_nowhere", alone)
    kind = type("Own", (nn.Sequential,), {"__module__": "nets_nowhere"})
    alone.Own = kind  # type: ignore[attr-defined]
    model = load(kind(*tiny()).eval(), input_size=24)
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


# --- Ray --------------------------------------------------------------------------------------------------------------


def test_without_ray_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(errors.ExtraMissing, match=r"pip install 'phosphene\[ray\]'"):
        list(RayRunner().run(tiny_model(), JOBS))


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Yield a Ray cluster of one node of one CPU on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.slow
def test_ray_makes_the_same_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    ray = pytest.importorskip("ray")
    model = tiny_model()
    jobs = tiny_atlas(model).jobs
    here = {one.job: one for one in LocalRunner(0).run(model, jobs)}
    variables, ending = dict(os.environ), signal.getsignal(signal.SIGTERM)
    assert {one.job: one for one in RayRunner(workers=2).run(model, jobs)} == here
    assert not ray.is_initialized()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == (variables, ending)
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_ray_that_runs_is_used_and_kept() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        model = tiny_model()
        assert len(list(RayRunner().run(model, tiny_atlas(model).jobs))) == 4
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_worker_of_ray_that_is_killed_costs_a_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_trap.py").write_text(ARMED)
    model = load("nets_trap:trap")
    jobs = tiny_atlas(model, size=8, per_job=1).jobs
    expected = {one.job: one for one in LocalRunner(0).run(model, jobs)}
    for name in ("armed.1", "armed.2"):
        (tmp_path / name).touch()
    assert {one.job: one for one in RayRunner(workers=1).run(model, jobs)} == expected
    assert not list(tmp_path.glob("armed.*"))


@pytest.mark.slow
def test_a_node_that_goes_costs_only_what_it_was_at(cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    model = tiny_model()
    jobs = tiny_atlas(model, channels="0:6", per_job=1, steps=60, size=48).jobs
    outcomes = RayRunner(address=cluster.address).run(model, jobs)
    found = [next(outcomes) for _ in range(4)]
    cluster.remove_node(node, allow_graceful=False)
    found += outcomes
    assert {one.job: one for one in found} == {one.job: one for one in LocalRunner(0).run(model, jobs)}
    assert len(found) == 12


def test_a_cluster_that_is_not_there() -> None:
    pytest.importorskip("ray")
    with pytest.raises(errors.Unfinished, match=r"Ray at '127\.0\.0\.1:1' cannot be used: .*; check --ray-ad"):
        list(RayRunner(address="127.0.0.1:1").run(tiny_model(), JOBS))
