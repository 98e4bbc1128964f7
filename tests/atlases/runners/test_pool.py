"""The pool of workers: which job goes to which worker, what happens when workers die, and how a model gets there."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from phosphene import errors
from phosphene.atlases.plan import Job
from phosphene.atlases.runners.pool import (
    CannotStart,
    Outcome,
    Pool,
    WorkerDied,
    WorkerRefused,
    check_workers,
    pickle_model,
    try_job,
    unpickle_model,
)
from phosphene.network.loading import load
from tiny_atlas import NETS, tiny_atlas, tiny_model

JOBS = tiny_atlas(tiny_model(), channels="0:4", per_job=1).jobs  # eight


class Crew:
    """Workers whose answers are planned: `fate[job]` has an answer for each try, and "done" follows these."""

    def __init__(self, fate: dict[Job, list[str]] | None = None) -> None:
        self.fate = fate or {}
        self.started: list[FakeWorker] = []
        self.begun: list[Job] = []
        self.most_busy = 0

    def start(self) -> FakeWorker:
        self.started.append(FakeWorker(self))
        return self.started[-1]

    def wait(self, busy: Collection[FakeWorker]) -> tuple[FakeWorker, Outcome | WorkerDied | WorkerRefused]:
        self.most_busy = max(self.most_busy, len(busy))
        worker = next(iter(busy))  # the one that has been busy longest
        assert worker.job is not None
        answers = self.fate.get(worker.job, [])
        answer = answers.pop(0) if answers else "done"
        if answer == "dies":
            return worker, WorkerDied("killed by SIGKILL")
        return worker, WorkerRefused("no such network") if answer == "refuses" else Outcome(worker.job)

    def outcomes(self, slots: int, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        return Pool(self.start, self.wait, slots, jobs).outcomes()

    def run(self, slots: int, jobs: Collection[Job]) -> list[Outcome]:
        return list(self.outcomes(slots, jobs))


class FakeWorker:
    def __init__(self, crew: Crew) -> None:
        self.crew, self.alive = crew, True
        self.job: Job | None = None

    def send(self, job: Job) -> None:
        assert self.alive
        self.job = job
        self.crew.begun.append(job)

    def stop(self) -> None:
        assert self.alive
        self.alive = False


def test_each_job_is_done_once_by_as_many_as_may() -> None:
    crew = Crew()
    outcomes = crew.run(3, JOBS)
    assert [outcome.job for outcome in outcomes] == list(JOBS) == crew.begun
    assert (len(crew.started), crew.most_busy) == (3, 3)
    assert not any(worker.alive for worker in crew.started)


def test_no_more_are_started_than_there_are_jobs() -> None:
    crew = Crew()
    assert len(crew.run(64, JOBS[:2])) == len(crew.started) == 2
    assert Crew().run(4, []) == []


def test_a_job_is_taken_only_when_somebody_begins_it() -> None:
    crew, taken = Crew(), list[Job]()

    def source() -> Any:
        for job in JOBS:
            taken.append(job)
            yield job

    outcomes = crew.outcomes(2, source())
    next(outcomes)
    assert taken == crew.begun == list(JOBS[:3])  # one done, two at work
    outcomes.close()
    assert taken == list(JOBS[:3])
    assert not any(worker.alive for worker in crew.started)


def test_who_dies_costs_the_job_a_retry() -> None:
    crew = Crew({JOBS[1]: ["dies", "dies"]})
    outcomes = crew.run(2, JOBS[:4])
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert {outcome.job for outcome in outcomes} == set(JOBS[:4])
    assert crew.begun.count(JOBS[1]) == 3
    assert len(crew.started) == 4  # two for the two that died
    assert not any(worker.alive for worker in crew.started)


def test_a_job_that_kills_three_has_failed() -> None:
    outcomes = Crew({JOBS[1]: ["dies"] * 9}).run(2, JOBS[:4])
    assert {outcome.job: outcome.error for outcome in outcomes} == {
        JOBS[0]: None,
        JOBS[1]: "its worker died 3 times, the last time: killed by SIGKILL",
        JOBS[2]: None,
        JOBS[3]: None,
    }


def test_workers_who_cannot_load_the_network_give_their_jobs_back() -> None:
    crew = Crew({JOBS[1]: ["refuses"]})
    outcomes = crew.outcomes(2, iter(JOBS))
    assert next(outcomes).job == JOBS[0]
    with pytest.raises(CannotStart, match="no such network") as caught:
        next(outcomes)
    assert caught.value.jobs == [JOBS[1], JOBS[2]]
    assert not any(worker.alive for worker in crew.started)


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
    nn.init.zeros_(next(by_reference.module.parameters()))  # so that the reference means another
    with pytest.raises(errors.ModelRefused, match="nets_travel:tiny has other weights when a worker loads it"):
        unpickle_model(pickle_model(by_reference))
    local = nn.Sequential(nn.Conv2d(3, 2, 3))
    local.forward = lambda image: image  # type: ignore[method-assign]
    with pytest.raises(CannotStart, match="Sequential cannot be pickled"):
        pickle_model(load(local, input_size=8), pickle)


def test_a_number_of_workers() -> None:
    for workers, least in ((None, 1), (1, 1), (0, 0), (64, 1)):
        check_workers(workers, least)
    with pytest.raises(errors.InvalidRequest, match="workers is a whole number of at least 2, not 1"):
        check_workers(1, least=2)
