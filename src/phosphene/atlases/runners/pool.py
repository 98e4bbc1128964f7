"""Runners: who works off the jobs of an atlas. A runner has `run(model, jobs)`, which yields an `Outcome` a job.

Jobs are taken one by one, each when a worker is there for it, and outcomes come as they are done, in any order. A
runner writes nothing: its caller does.
"""

from __future__ import annotations

import importlib
import pickle
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from phosphene.arguments import whole_number
from phosphene.atlases.plan import Job
from phosphene.atlases.render_job import render_job
from phosphene.errors import ModelRefused, PhospheneError, Unfinished, first_line
from phosphene.network.loading import load
from phosphene.network.model import Model

RETRIES = 2  # how often a job is tried again whose worker died


@dataclass(frozen=True)
class Outcome:
    """What came of a job: its files and manifest, or the sentence that says why not."""

    job: Job
    files: Mapping[str, bytes] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class WorkerDied:
    """A worker ended in the middle of its job; `reason` says what is known of it."""

    reason: str


@dataclass(frozen=True)
class WorkerRefused:
    """A worker could not make the model that it was given."""

    reason: str


class Runner(Protocol):
    """What works off jobs."""

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]: ...


class Worker(Hashable, Protocol):
    """One process that has the model; a job can be given at once, it begins when the model is loaded."""

    def give(self, job: Job) -> None: ...
    def dismiss(self) -> None: ...


AnyWorker = TypeVar("AnyWorker", bound=Worker)
Wait = Callable[[Collection[AnyWorker]], tuple[AnyWorker, "Outcome | WorkerDied | WorkerRefused"]]


class CannotStart(Unfinished):
    """The workers cannot make the model; `jobs` were taken and are not done."""

    def __init__(self, message: str, jobs: Iterable[Job] = ()) -> None:
        super().__init__(message)
        self.jobs = list(jobs)


def try_job(model: Model, job: Job) -> Outcome:
    """Return what comes of a job, whatever it is."""
    try:
        return Outcome(job, *render_job(model, job))
    except KeyboardInterrupt:  # which the error of an interrupted render is too
        raise
    except (Exception, SystemExit) as error:
        known = isinstance(error, PhospheneError)
        return Outcome(job, error=str(error) if known else f"{type(error).__name__}: {first_line(error)}")


def run_jobs(
    hire: Callable[[], AnyWorker], wait: Wait[AnyWorker], slots: int, jobs: Iterable[Job]
) -> Generator[Outcome, None, None]:
    """Yield the outcomes of jobs that up to `slots` workers do, each one job at a time.

    `wait(busy)` blocks until one of these workers is done with its job, or has died of it. Workers for whom there is no
    job are dismissed, and all of them at the end, however it comes.

    Raises:
        CannotStart: a worker cannot make the model.
    """
    source, again = iter(jobs), deque[Job]()
    busy: dict[AnyWorker, Job] = {}
    idle: list[AnyWorker] = []
    deaths: Counter[str] = Counter()

    def spread() -> None:
        while len(busy) < slots:
            job = again.popleft() if again else next(source, None)
            if job is None:
                break
            worker = idle.pop() if idle else hire()
            busy[worker] = job
            worker.give(job)
        while idle:  # there is no job for them, and somebody else may be waiting for their place
            idle.pop().dismiss()

    try:
        spread()
        while busy:
            worker, came = wait(busy)
            job = busy.pop(worker)
            if isinstance(came, Outcome):
                idle.append(worker)
            else:
                worker.dismiss()
            if isinstance(came, WorkerRefused):
                raise CannotStart(came.reason, [job, *busy.values(), *again])
            if isinstance(came, WorkerDied):
                deaths[job.digest] += 1
                if deaths[job.digest] <= RETRIES:
                    again.append(job)
                else:
                    came = Outcome(job, error=f"its worker died {RETRIES + 1} times, at last so: {came.reason}")
            spread()  # before the caller is busy with this outcome
            if isinstance(came, Outcome):
                yield came
    finally:
        for worker in (*busy, *idle):
            worker.dismiss()


def check_workers(workers: int | None, least: int) -> None:
    """Refuse a number of workers that is none."""
    if workers is not None:
        whole_number(workers, "workers", least)


def pickle_model(model: Model, pickler: Any = None) -> bytes:
    """Return what makes a model in another process: its reference, or where it has none, the object itself.

    `pickler` has `dumps`; by default it is cloudpickle where that is installed, which packs classes of a script or a
    notebook too, else pickle.

    Raises:
        CannotStart: the object cannot be packed.
    """
    try:
        if model.ref is not None:
            return pickle.dumps((model.fingerprint, partial(load, model.ref, device=str(model.like.device))))
        return bytes((pickler or best_pickler()).dumps((model.fingerprint, model)))
    except Exception as error:
        raise CannotStart(f"{model.name} cannot be packed ({first_line(error)})") from error


def best_pickler() -> Any:
    """Return cloudpickle where it is installed, else pickle."""
    try:
        return importlib.import_module("cloudpickle")
    except ImportError:
        return pickle


def unpickle_model(content: Any, device: str | None = None) -> Model:
    """Return the model that `packed` packed into bytes, on a device of its own where one is given.

    Raises:
        ModelRefused: it came out as another, as that of a callable does that draws random weights.
        Whatever loading it raises.
    """
    fingerprint, made = pickle.loads(content)
    if not isinstance(made, Model):
        made = made(device=device) if device else made()
    model: Model = made
    if device:
        model.module.to(device)
    if model.fingerprint != fingerprint:
        raise ModelRefused(f"{model.name} comes out with other weights there than here")
    return model
