"""Runners: they do the jobs of an atlas. A runner has `run(model, jobs)`, which yields an `Outcome` for each job.

A runner takes a job only when a worker is free, and yields outcomes as jobs finish, in any order. It writes nothing:
its caller does.
"""

import importlib
import pickle
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from phosphene.arguments import whole_number
from phosphene.atlases.plan import Job
from phosphene.atlases.render_job import render_job
from phosphene.errors import ModelRefused, PhospheneError, Unfinished, first_line
from phosphene.network.loading import load
from phosphene.network.model import Model

RETRIES = 2  # of a job whose worker died


@dataclass(frozen=True)
class Outcome:
    """The result of a job: its files and manifest, or a sentence that says why it failed."""

    job: Job
    files: Mapping[str, bytes] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class WorkerDied:
    """A worker ended in the middle of its job."""

    reason: str


@dataclass(frozen=True)
class WorkerRefused:
    """A worker could not load its model."""

    reason: str


class Runner(Protocol):
    """Does jobs."""

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]: ...


class Worker(Hashable, Protocol):
    """A process that does one job at a time. The first job can be sent before it has loaded its model."""

    def send(self, job: Job) -> None: ...
    def stop(self) -> None: ...


AnyWorker = TypeVar("AnyWorker", bound=Worker)
Wait = Callable[[Collection[AnyWorker]], tuple[AnyWorker, "Outcome | WorkerDied | WorkerRefused"]]


class CannotStart(Unfinished):
    """The workers cannot load the model. `jobs` were taken and are not done."""

    def __init__(self, message: str, jobs: Iterable[Job] = ()) -> None:
        super().__init__(message)
        self.jobs = list(jobs)


def try_job(model: Model, job: Job) -> Outcome:
    """Render a job and return its outcome, whatever happens."""
    try:
        return Outcome(job, *render_job(model, job))
    except KeyboardInterrupt:  # `Interrupted`, the error of an interrupted render, is one too
        raise
    except (Exception, SystemExit) as error:
        expected = isinstance(error, PhospheneError)
        return Outcome(job, error=str(error) if expected else f"{type(error).__name__}: {first_line(error)}")


class Pool(Generic[AnyWorker]):
    """Up to `slots` workers that do jobs, each one job at a time.

    Args:
        start: starts a worker.
        wait: blocks until one of the busy workers has finished its job or died, and returns it with its answer.
    """

    def __init__(self, start: Callable[[], AnyWorker], wait: Wait[AnyWorker], slots: int, jobs: Iterable[Job]) -> None:
        self.start, self.wait, self.slots = start, wait, slots
        self.jobs, self.retries = iter(jobs), deque[Job]()
        self.busy: dict[AnyWorker, Job] = {}
        self.idle: list[AnyWorker] = []
        self.deaths: Counter[str] = Counter()

    def outcomes(self) -> Generator[Outcome, None, None]:
        """Yield the outcomes of the jobs. All workers are stopped at the end, however it comes.

        Raises:
            CannotStart: a worker cannot load the model.
        """
        try:
            self.fill()
            while self.busy:
                outcome = self.next_outcome()
                self.fill()  # before the caller is busy with this outcome
                if outcome:
                    yield outcome
        finally:
            for worker in (*self.busy, *self.idle):
                worker.stop()

    def fill(self) -> None:
        """Give jobs to workers while there are slots and jobs, and stop the workers without a job."""
        while len(self.busy) < self.slots:
            job = self.retries.popleft() if self.retries else next(self.jobs, None)
            if job is None:
                break
            worker = self.idle.pop() if self.idle else self.start()
            self.busy[worker] = job
            worker.send(job)
        while self.idle:  # on a cluster others may be waiting for their place
            self.idle.pop().stop()

    def next_outcome(self) -> Outcome | None:
        """Wait for a worker and return the outcome of its job, None if the job is to be tried again."""
        worker, answer = self.wait(self.busy)
        job = self.busy.pop(worker)
        if isinstance(answer, Outcome):
            self.idle.append(worker)
            return answer
        worker.stop()
        if isinstance(answer, WorkerRefused):
            raise CannotStart(answer.reason, [job, *self.busy.values(), *self.retries])
        self.deaths[job.digest] += 1
        if self.deaths[job.digest] <= RETRIES:
            self.retries.append(job)
            return None
        return Outcome(job, error=f"its worker died {RETRIES + 1} times, the last time: {answer.reason}")


def check_workers(workers: int | None, least: int) -> None:
    """Refuse a number of workers that is not a whole number, or too small."""
    if workers is not None:
        whole_number(workers, "workers", least)


def pickle_model(model: Model, pickler: Any = None) -> bytes:
    """Return bytes from which another process makes the model: its reference, or the pickled object if it has none.

    `pickler` has `dumps`; by default it is cloudpickle if installed, which also pickles classes of a script or a
    notebook, else pickle.

    Raises:
        CannotStart: the object cannot be pickled.
    """
    try:
        if model.ref is not None:
            return pickle.dumps(
                (model.fingerprint, partial(load, model.ref, device=str(model.prototype_tensor.device)))
            )
        return bytes((pickler or best_pickler()).dumps((model.fingerprint, model)))
    except Exception as error:
        raise CannotStart(f"{model.name} cannot be pickled ({first_line(error)})") from error


def best_pickler() -> Any:
    """Return cloudpickle if it is installed, else pickle."""
    try:
        return importlib.import_module("cloudpickle")
    except ImportError:
        return pickle


def unpickle_model(content: Any, device: str | None = None) -> Model:
    """Return the model from the bytes of `pickle_model`, on another device if one is given.

    Raises:
        ModelRefused: it has other weights, as from a callable that draws them at random.
        Whatever loading it raises.
    """
    fingerprint, source = pickle.loads(content)
    options = {"device": device} if device else {}
    model: Model = source if isinstance(source, Model) else source(**options)
    if device:
        model.module.to(device)
    if model.fingerprint != fingerprint:
        raise ModelRefused(f"{model.name} has other weights when a worker loads it than in this process")
    return model
