"""Jobs on a Ray cluster: one actor a CPU or a GPU, which keeps its model loaded (Ray Core).

Results come back through the driver, so that no disk needs to be shared. An actor that dies, with its node or alone, is
replaced as soon as there is room for another.
"""

from __future__ import annotations

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
    WorkerDied,
    WorkerRefused,
    check_workers,
    pickle_model,
    run_jobs,
    try_job,
    unpickle_model,
)
from phosphene.errors import Unfinished, first_line, require_extra
from phosphene.network.model import Model

HOST_AND_PORT = re.compile(r"\[?([^/\s]+?)\]?:(\d{1,5})")
PATIENCE = 10  # seconds for somebody to answer at an address


@dataclass(frozen=True)
class RayRunner:
    """Works off jobs on Ray.

    Attributes:
        address: of a running cluster, such as `auto` or `head:6379`; by default Ray is started on this machine, and
            ended when the jobs are done. A Ray that this process has started itself is used as it is.
        workers: how many actors at most, by default one a CPU, or one a GPU, of the cluster.
        gpu: whether an actor takes a GPU or a CPU; by default a GPU where the model is on one, or where the cluster has
            some and this machine has none.
    """

    address: str | None = None
    workers: int | None = None
    gpu: bool | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, least=1)

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        """Yield what comes of each job, as they are done.

        Raises:
            ExtraMissing: Ray is not installed.
            Unfinished: the cluster cannot be joined, or has no such processor.
            CannotStart: the workers cannot load the model.
        """
        ray = require_extra("ray", "ray")
        with cluster(ray, self.address, self.workers):
            gpu, slots = places_of(ray, model, self.gpu, self.workers)
            content = ray.put(pickle_model(model, ray.cloudpickle))
            kind = ray.remote(Hand).options(num_cpus=0 if gpu else 1, num_gpus=int(gpu))

            def hire() -> Actor:
                return Actor(ray, kind.remote(content, "cuda" if gpu else "cpu"))

            yield from run_jobs(hire, first_done, slots, jobs)


@contextmanager
def cluster(ray: Any, address: str | None, workers: int | None) -> Iterator[None]:
    """Join a cluster, or start Ray on this machine, for as long as the context lasts; a Ray that runs here is kept.

    Raises:
        Unfinished: that fails.
    """
    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    own = {"num_cpus": workers, "include_dashboard": False} if where == "local" else {}
    with process_as_before():
        try:
            check_there(where)
            ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:
            raise Unfinished(f"Ray at {where!r} cannot be used: {first_line(error)}; check --ray-address") from error
        try:
            yield
        finally:
            ray.shutdown()


def check_there(address: str) -> None:
    """Find out whether anybody listens at host:port, for which Ray takes five minutes.

    Raises:
        OSError: nobody does.
    """
    found = HOST_AND_PORT.fullmatch(address)
    if found:
        with socket.create_connection((found[1], int(found[2])), timeout=PATIENCE):
            pass


@contextmanager
def process_as_before() -> Iterator[None]:
    """Give back what Ray changes in a process and leaves so: the environment, the end by SIGTERM, `faulthandler`."""
    variables, ending, faults = dict(os.environ), signal.getsignal(signal.SIGTERM), faulthandler.is_enabled()
    try:
        yield
    finally:
        for name in {*os.environ, *variables}:
            os.environ.pop(name, None) if name not in variables else os.environ.update({name: variables[name]})
        if signal.getsignal(signal.SIGTERM) is not ending:  # only ever changed in the main thread
            signal.signal(signal.SIGTERM, ending)
        if not faults:
            faulthandler.disable()


def places_of(ray: Any, model: Model, gpu: bool | None, workers: int | None) -> tuple[bool, int]:
    """Return whether actors take a GPU each or a CPU, and how many actors there can be.

    Raises:
        Unfinished: the cluster has no such processor.
    """
    takes_gpu = wants_gpu(ray, model) if gpu is None else gpu
    processor = "GPU" if takes_gpu else "CPU"
    have = int(ray.cluster_resources().get(processor, 0))
    if not have:
        raise Unfinished(f"the Ray cluster has no {processor} to work with")
    return takes_gpu, min(workers or have, have)


def wants_gpu(ray: Any, model: Model) -> bool:
    """Return whether workers are to take GPUs: where the model is on one, or where only the cluster has some."""
    return model.like.device.type == "cuda" or (not torch.cuda.is_available() and "GPU" in ray.cluster_resources())


class Hand:
    """What runs as an actor: it loads its model with its first job."""

    def __init__(self, content: bytes, device: str) -> None:
        self.content, self.device = content, device
        self.model: Model | None = None

    def work(self, job: Job) -> Outcome | WorkerRefused:
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


class Actor:
    """A worker: an actor, and the promise of what it is at."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self.ray, self.handle = ray, handle
        self.promise: Any = None

    def give(self, job: Job) -> None:
        """Send a job; it waits for the actor, which waits for a place."""
        self.promise = self.handle.work.remote(job)

    def answer(self) -> Outcome | WorkerDied | WorkerRefused:
        """Return what the actor made, or that it has died, or that its answer went down with its node."""
        try:
            answer: Outcome | WorkerRefused = self.ray.get(self.promise)
            return answer
        except self.ray.exceptions.RayError as error:
            return WorkerDied(f"{type(error).__name__}: {first_line(error)}")

    def dismiss(self) -> None:
        """End the actor at once, so that another has its place."""
        self.ray.kill(self.handle)


def first_done(busy: Collection[Actor]) -> tuple[Actor, Outcome | WorkerDied | WorkerRefused]:
    """Wait until one of the actors has an answer, or has died, and return it."""
    by_promise = {one.promise: one for one in busy}
    actor = by_promise[next(iter(busy)).ray.wait(list(by_promise), num_returns=1)[0][0]]
    return actor, actor.answer()
