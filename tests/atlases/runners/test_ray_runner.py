"""Workers on a Ray cluster: what they compute, and what happens when they or their nodes die."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phosphene import errors
from phosphene.atlases.runners import ray as ray_runner
from phosphene.atlases.runners.local import LocalRunner
from phosphene.atlases.runners.pool import WorkerRefused, pickle_model, try_job
from phosphene.atlases.runners.ray import JobActor, RayRunner, check_listening, process_state_restored, worker_slots
from phosphene.network.loading import load
from tiny_atlas import TRAP, tiny_atlas, tiny_model


def test_a_number_of_ray_workers_that_is_none() -> None:
    with pytest.raises(errors.InvalidRequest, match="workers is a whole number of at least 1, not 0"):
        RayRunner(workers=0)


def test_without_ray_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(errors.ExtraMissing, match=r"pip install 'phosphene\[ray\]'"):
        list(RayRunner().run(tiny_model(), []))


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Yield a Ray cluster of one node of one CPU on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_ray_makes_the_same_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    ray = pytest.importorskip("ray")
    model = tiny_model()
    jobs = tiny_atlas(model).jobs
    expected = {outcome.job: outcome for outcome in LocalRunner(0).run(model, jobs)}
    variables, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    assert {outcome.job: outcome for outcome in RayRunner(workers=2).run(model, jobs)} == expected
    assert not ray.is_initialized()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == (variables, handler)
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
    (tmp_path / "nets_trap.py").write_text(TRAP)
    model = load("nets_trap:trap")
    jobs = tiny_atlas(model, size=8, per_job=1).jobs
    expected = {outcome.job: outcome for outcome in LocalRunner(0).run(model, jobs)}
    for name in ("armed.1", "armed.2"):
        (tmp_path / name).touch()
    assert {outcome.job: outcome for outcome in RayRunner(workers=1).run(model, jobs)} == expected
    assert not list(tmp_path.glob("armed.*"))


@pytest.mark.slow
def test_a_node_that_goes_costs_only_what_it_was_at(cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    model = tiny_model()
    jobs = tiny_atlas(model, channels="0:6", per_job=1, steps=60, size=48).jobs
    outcomes = RayRunner(address=cluster.address).run(model, jobs)
    results = [next(outcomes) for _ in range(4)]
    cluster.remove_node(node, allow_graceful=False)
    results += outcomes
    assert {outcome.job: outcome for outcome in results} == {
        outcome.job: outcome for outcome in LocalRunner(0).run(model, jobs)
    }
    assert len(results) == 12


def test_a_cluster_that_is_not_there() -> None:
    pytest.importorskip("ray")
    with pytest.raises(errors.Unfinished, match=r"Ray at '127\.0\.0\.1:1' cannot be used: .*; check --ray-ad"):
        list(RayRunner(address="127.0.0.1:1").run(tiny_model(), []))


@pytest.mark.parametrize(
    ("resources", "gpu", "workers", "slots"),
    [
        ({"CPU": 4.0}, None, None, (False, 4)),
        ({"CPU": 4.0, "GPU": 2.0}, None, None, (True, 2)),  # this machine has none
        ({"CPU": 4.0, "GPU": 2.0}, False, 3, (False, 3)),
        ({"CPU": 4.0, "GPU": 2.0}, True, 9, (True, 2)),
    ],
)
def test_slots_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
    resources: dict[str, float],
    gpu: bool | None,
    workers: int | None,
    slots: tuple[bool, int],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cluster = SimpleNamespace(cluster_resources=lambda: resources)
    assert worker_slots(cluster, tiny_model(), gpu, workers) == slots


def test_a_cluster_without_the_processor() -> None:
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    with pytest.raises(errors.Unfinished, match="the Ray cluster has no GPU to work with"):
        worker_slots(cluster, tiny_model(), True, None)


def test_an_actor_loads_its_model_once_and_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(ray_runner, "keep_freed_memory", lambda: kept.append(True))
    model = tiny_model()
    jobs = tiny_atlas(model).jobs[:2]
    actor = JobActor(pickle_model(model), "cpu")
    assert kept == [True]
    assert actor.run(jobs[0]) == try_job(model, jobs[0])
    first = actor.model
    assert actor.run(jobs[1]) == try_job(model, jobs[1])
    assert actor.model is first is not None
    answer = JobActor(b"no model", "cpu").run(jobs[0])
    assert isinstance(answer, WorkerRefused)
    assert answer.reason.startswith("Ray's workers cannot load the network (UnpicklingError: ")


def test_what_ray_changes_in_a_process_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOSPHENE_A", "1")
    monkeypatch.setenv("PHOSPHENE_B", "2")
    handler = signal.getsignal(signal.SIGTERM)
    with process_state_restored():
        os.environ["PHOSPHENE_A"] = "changed"
        del os.environ["PHOSPHENE_B"]
        os.environ["PHOSPHENE_C"] = "new"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert (os.environ["PHOSPHENE_A"], os.environ["PHOSPHENE_B"], "PHOSPHENE_C" in os.environ) == ("1", "2", False)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_address_is_tried_before_ray_tries_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_listening(f"127.0.0.1:{port}")
    with pytest.raises(ConnectionRefusedError):
        check_listening(f"127.0.0.1:{port}")
    check_listening("auto")  # no host and port, so it is left to Ray
