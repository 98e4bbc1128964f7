"""Jobs on a Ray cluster, in one actor for each CPU or GPU, which keeps its model loaded (Ray Core).

Results come back through the driver, so that the machines need not share a disk. An actor that dies, alone or with its
node, is replaced as soon as there is room for another.
"""

import faulthandler
import logging
import os
import re
import signal
import socket
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from phosphene.atlases.plan import Job
from phosphene.atlases.runners.pool import (
    Outcome,
    Pool,
    WorkerDied,
    WorkerRefused,
    check_workers,
    pickle_model,
    try_job,
    unpickle_model,
)
from phosphene.errors import Unfinished, first_line, require_extra
from phosphene.network.memory import keep_freed_memory
from phosphene.network.model import Model

HOST_AND_PORT = re.compile(r"\[?([^/\s]+?)\]?:(\d{1,5})")
CONNECT_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class RayRunner:
    """Does jobs on Ray.

    Attributes:
        address: of a running cluster, such as `auto` or `head:6379`; by default Ray is started on this machine, and
            stopped when the jobs are done. If this process has started Ray already, that is used.
        workers: actors at most, by default one for each CPU or GPU of the cluster.
        gpu: whether an actor takes a GPU or a CPU; by default a GPU if the model is on one, or if the cluster has GPUs
            and this machine has none.
    """

    address: str | None = None
    workers: int | None = None
    gpu: bool | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, least=1)

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        """Yield the outcome of each job, as they finish.

        Raises:
            ExtraMissing: Ray is not installed.
            Unfinished: the cluster cannot be joined, or has no such processor.
            CannotStart: the workers cannot load the model.
        """
        ray = require_extra("ray", "ray")
        with cluster(ray, self.address, self.workers):
            gpu, slots = worker_slots(ray, model, self.gpu, self.workers)
            content = ray.put(pickle_model(model, ray.cloudpickle))
            actor = ray.remote(JobActor).options(num_cpus=0 if gpu else 1, num_gpus=int(gpu))

            def start() -> RayWorker:
                return RayWorker(ray, actor.remote(content, "cuda" if gpu else "cpu"))

            yield from Pool(start, first_done, slots, jobs).outcomes()


@contextmanager
def cluster(ray: Any, address: str | None, workers: int | None) -> Iterator[None]:
    """Join a cluster, or start Ray on this machine, for as long as the context lasts; a running Ray is left as it is.

    Raises:
        Unfinished: Ray cannot be joined or started.
    """
    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    options = {"num_cpus": workers, "include_dashboard": False} if where == "local" else {}
    with process_state_restored():
        try:
            check_listening(where)
            ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:
            raise Unfinished(f"Ray at {where!r} cannot be used: {first_line(error)}; check --ray-address") from error
        try:
            yield
        finally:
            ray.shutdown()


def check_listening(address: str) -> None:
    """Connect to host:port once, since Ray itself takes five minutes to find out that nothing listens there.

    Raises:
        OSError: nothing does.
    """
    if match := HOST_AND_PORT.fullmatch(address):
        with socket.create_connection((match[1], int(match[2])), timeout=CONNECT_TIMEOUT):
            pass


@contextmanager
def process_state_restored() -> Iterator[None]:
    """Undo what Ray changes in a process: the environment, the handler of SIGTERM, `faulthandler`."""
    variables, handler, faults = dict(os.environ), signal.getsignal(signal.SIGTERM), faulthandler.is_enabled()
    try:
        yield
    finally:
        for name in {*os.environ, *variables}:
            os.environ.pop(name, None) if name not in variables else os.environ.update({name: variables[name]})
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray changes it in the main thread only
            signal.signal(signal.SIGTERM, handler)
        if not faults:
            faulthandler.disable()


def worker_slots(ray: Any, model: Model, gpu: bool | None, workers: int | None) -> tuple[bool, int]:
    """Return whether each actor takes a GPU rather than a CPU, and how many actors fit into the cluster.

    Raises:
        Unfinished: the cluster has no such processor.
    """
    takes_gpu = wants_gpu(ray, model) if gpu is None else gpu
    processor = "GPU" if takes_gpu else "CPU"
    available = int(ray.cluster_resources().get(processor, 0))
    if not available:
        raise Unfinished(f"the Ray cluster has no {processor} to work with")
    return takes_gpu, min(workers or available, available)


def wants_gpu(ray: Any, model: Model) -> bool:
    """Return whether actors take GPUs by default: if the model is on one, or if only the cluster has GPUs."""
    return model.prototype_tensor.device.type == "cuda" or (
        not torch.cuda.is_available() and "GPU" in ray.cluster_resources()
    )


class JobActor:
    """The Ray actor of a worker. It loads its model with its first job."""

    def __init__(self, content: bytes, device: str) -> None:
        keep_freed_memory()
        self.content, self.device = content, device
        self.model: Model | None = None

    def run(self, job: Job) -> Outcome | WorkerRefused:
        """Do a job."""
        if self.model is None:
            try:
                self.model = unpickle_model(self.content, self.device)
            except Exception as error:
                return WorkerRefused(
                    f"Ray's workers cannot load the network ({type(error).__name__}: {first_line(error)})"
                )
            self.content = b""
        return try_job(self.model, job)


class RayWorker:
    """An actor, and the reference to the outcome of its job."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor
        self.outcome: Any = None

    def send(self, job: Job) -> None:
        """Send a job, which waits until the actor has started."""
        self.outcome = self.actor.run.remote(job)

    def answer(self) -> Outcome | WorkerDied | WorkerRefused:
        """Return the actor's answer, or that it has died, or that its answer was lost with its node."""
        try:
            answer: Outcome | WorkerRefused = self.ray.get(self.outcome)
            return answer
        except self.ray.exceptions.RayError as error:
            return WorkerDied(f"{type(error).__name__}: {first_line(error)}")

    def stop(self) -> None:
        """End the actor at once, so that another can take its place."""
        self.ray.kill(self.actor)


def first_done(busy: Collection[RayWorker]) -> tuple[RayWorker, Outcome | WorkerDied | WorkerRefused]:
    """Wait until one of the workers has an answer or has died, and return it with its answer."""
    by_outcome = {worker.outcome: worker for worker in busy}
    worker = by_outcome[next(iter(busy)).ray.wait(list(by_outcome), num_returns=1)[0][0]]
    return worker, worker.answer()
