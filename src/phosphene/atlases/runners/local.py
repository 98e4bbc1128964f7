"""Jobs on this machine: one process a CPU or a GPU, which dies with its driver.

The workers are programs of their own, not forks and not `multiprocessing`'s, so that a script needs no
`if __name__ == "__main__"`. Each hangs on a socket to its driver: when that ends, however it ends, so do they.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Collection, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO

import torch

from phosphene.atlases.plan import Job
from phosphene.atlases.runners.pool import (
    CannotStart,
    Outcome,
    WorkerDied,
    WorkerRefused,
    check_workers,
    pickle_model,
    run_jobs,
    try_job,
    unpickle_model,
)
from phosphene.errors import first_line
from phosphene.network.model import Model

# what a worker runs: it ends when the other end of its line to the driver does, as soon as it has begun
PROGRAM = """
import os, select, sys, threading
line = select.poll()
line.register({line}, 0)  # no event but the end
threading.Thread(target=lambda: line.poll() and os._exit(1), daemon=True).start()
sys.path[:] = {path}
from phosphene.atlases.runners.local import worker_main
worker_main{arguments}
"""


@dataclass(frozen=True)
class LocalRunner:
    """Works off jobs on this machine.

    Attributes:
        workers: how many processes, by default one a CPU that this process may use, or one a GPU if the model is on
            one. 0 computes in this process, as is done where there is only one GPU.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, least=0)

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        """Yield what comes of each job, as they are done."""
        places = places_for(model, self.workers)
        if not places:
            yield from in_this_process(model, jobs)
            return
        source = iter(jobs)
        try:
            yield from in_processes(model, source, places)
        except CannotStart as error:
            of_script = type(model.module).__module__ == "__main__"
            advice = "; with `pip install cloudpickle` a network from a script can travel" if of_script else ""
            warnings.warn(f"{error}: computing in this process, one job at a time{advice}", stacklevel=2)
            yield from in_this_process(model, chain(error.jobs, source))


def places_for(model: Model, workers: int | None) -> list[str | None]:
    """Return the device of each worker, None for the model's own; no worker where this process does as well."""
    kind = model.like.device.type
    if workers == 0 or sys.platform == "win32" or not sys.executable:  # where no socket can be handed down
        return []
    if kind == "cpu":
        return [None] * (workers or processors())
    count = torch.cuda.device_count() if kind == "cuda" else 1
    return [f"{kind}:{number}" for number in range(min(count, workers or count))] if count > 1 else []


def processors() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_this_process(model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
    """Yield the outcomes of jobs, one after the other."""
    for job in jobs:
        yield try_job(model, job)


def in_processes(model: Model, jobs: Iterable[Job], places: list[str | None]) -> Generator[Outcome, None, None]:
    """Yield the outcomes of jobs that one process a place does.

    Raises:
        CannotStart: the model cannot be brought to other processes.
    """
    # without a name on the disk, so that nothing is left of it; every worker reads the same one
    with tempfile.TemporaryFile() as content:
        content.write(pickle_model(model))
        content.flush()
        free = deque(places)
        yield from run_jobs(lambda: Process(content, free), first_done, len(places), jobs)


class Process:
    """A worker: a process, and the socket by which it gets jobs and answers. It takes one of the free places."""

    def __init__(self, content: IO[bytes], free: deque[str | None]) -> None:
        self.free, self.place = free, free.popleft()
        self.connection, theirs = Pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, for as long as the process lives
        handed = (theirs.fileno(), content.fileno())
        code = PROGRAM.format(line=handed[0], path=sys.path, arguments=(*handed, self.place))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=handed,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the driver's to deal with
            )

    def give(self, job: Job) -> None:
        """Send a job."""
        with suppress(OSError):  # it has died, which is found out when it is waited for
            self.connection.send(job)

    def answer(self) -> Outcome | WorkerDied | WorkerRefused:
        """Return what the process sends, or that it has died."""
        try:
            received: Outcome | WorkerRefused = self.connection.recv()
            return received
        except (EOFError, OSError):
            code = self.process.wait()
            if code >= 0:  # nobody killed it, and a worker that has started never ends by itself
                return WorkerRefused(f"a worker did not start ({self.last_words() or f'exit code {code}'})")
            name = signal.Signals(-code).name
            return WorkerDied(f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}")

    def last_words(self) -> str:
        """Return the last line that the process wrote."""
        self.errors.seek(0)
        return (self.errors.read().decode(errors="replace").strip().splitlines() or [""])[-1].rstrip(".")

    def dismiss(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.errors.close()
        self.free.append(self.place)


def first_done(busy: Collection[Process]) -> tuple[Process, Outcome | WorkerDied | WorkerRefused]:
    """Wait until one of the processes has an answer, or has died, and return it."""
    by_connection = {one.connection: one for one in busy}
    process = by_connection[wait(list(by_connection))[0]]  # type: ignore[index]
    return process, process.answer()


def worker_main(connection_number: int, content_number: int, device: str | None) -> None:
    """Be a worker: load the model, then do one job after the other."""
    connection = Connection(connection_number)
    try:
        with mmap.mmap(content_number, 0, access=mmap.ACCESS_READ) as content:
            model = unpickle_model(content, device)
    except Exception as error:
        connection.send(
            WorkerRefused(f"a worker could not load the network ({type(error).__name__}: {first_line(error)})")
        )
        return
    while True:
        connection.send(try_job(model, connection.recv()))
