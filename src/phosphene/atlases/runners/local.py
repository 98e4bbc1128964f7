"""Jobs on this machine, in one process for each CPU or GPU.

The workers are programs of their own, not forks and not `multiprocessing`'s, so that a script needs no
`if __name__ == "__main__"`. Each has a socket to its driver, and ends when the driver ends, even if that is killed.
"""

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
    Pool,
    WorkerDied,
    WorkerRefused,
    check_workers,
    pickle_model,
    try_job,
    unpickle_model,
)
from phosphene.errors import first_line
from phosphene.network.memory import keep_freed_memory
from phosphene.network.model import Model

# the program of a worker: from its start on, a thread ends it when the socket to the driver is closed
PROGRAM = """
import os, select, sys, threading
socket = select.poll()
socket.register({socket}, 0)  # reports only that it was closed
threading.Thread(target=lambda: socket.poll() and os._exit(1), daemon=True).start()
sys.path[:] = {path}
from phosphene.atlases.runners.local import worker_main
worker_main{arguments}
"""


@dataclass(frozen=True)
class LocalRunner:
    """Does jobs on this machine.

    Attributes:
        workers: processes, by default one for each CPU that this process may use, or for each GPU if the model is on
            one. 0 computes in this process, which is the default with a single GPU.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, least=0)

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        """Yield the outcome of each job, as they finish."""
        devices = worker_devices(model, self.workers)
        if not devices:
            yield from in_this_process(model, jobs)
            return
        source = iter(jobs)
        try:
            yield from in_processes(model, source, devices)
        except CannotStart as error:
            of_script = type(model.module).__module__ == "__main__"
            advice = "; after `pip install cloudpickle` processes can load a network of a script" if of_script else ""
            warnings.warn(f"{error}: computing in this process, one job at a time{advice}", stacklevel=2)
            yield from in_this_process(model, chain(error.jobs, source))


def worker_devices(model: Model, workers: int | None) -> list[str | None]:
    """Return the device of each worker, None for the model's own; [] if this process alone is as fast."""
    kind = model.prototype_tensor.device.type
    if workers == 0 or sys.platform == "win32" or not sys.executable:  # a worker could not inherit its socket
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


def in_processes(model: Model, jobs: Iterable[Job], devices: list[str | None]) -> Generator[Outcome, None, None]:
    """Yield the outcomes of jobs that are done by one process for each device.

    Raises:
        CannotStart: the model cannot be brought to other processes.
    """
    with tempfile.TemporaryFile() as content:  # which has no name, so that nothing is left of it; all workers share it
        content.write(pickle_model(model))
        content.flush()
        free = deque(devices)
        yield from Pool(lambda: LocalWorker(content, free), first_done, len(devices), jobs).outcomes()


class LocalWorker:
    """A process, and the socket by which it gets jobs and sends outcomes. It takes one of the free devices."""

    def __init__(self, content: IO[bytes], free: deque[str | None]) -> None:
        self.free, self.device = free, free.popleft()
        self.connection, theirs = Pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, for as long as the process lives
        inherited = (theirs.fileno(), content.fileno())
        code = PROGRAM.format(socket=inherited[0], path=sys.path, arguments=(*inherited, self.device))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # so that Ctrl-C reaches the driver alone
            )

    def send(self, job: Job) -> None:
        """Send a job."""
        with suppress(OSError):  # the process has died, which `answer` will tell
            self.connection.send(job)

    def answer(self) -> Outcome | WorkerDied | WorkerRefused:
        """Return what the process sends, or that it has died."""
        try:
            received: Outcome | WorkerRefused = self.connection.recv()
            return received
        except (EOFError, OSError):
            code = self.process.wait()
            if code >= 0:  # it was not killed, and a worker that has started never ends by itself
                return WorkerRefused(f"a worker did not start ({self.last_error() or f'exit code {code}'})")
            name = signal.Signals(-code).name
            return WorkerDied(f"killed by {name}{', perhaps because memory ran out' if name == 'SIGKILL' else ''}")

    def last_error(self) -> str:
        """Return the last line of the process' error output."""
        self.errors.seek(0)
        return (self.errors.read().decode(errors="replace").strip().splitlines() or [""])[-1].rstrip(".")

    def stop(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.errors.close()
        self.free.append(self.device)


def first_done(busy: Collection[LocalWorker]) -> tuple[LocalWorker, Outcome | WorkerDied | WorkerRefused]:
    """Wait until one of the workers has an answer or has died, and return it with its answer."""
    by_connection = {worker.connection: worker for worker in busy}
    worker = by_connection[wait(list(by_connection))[0]]  # type: ignore[index]
    return worker, worker.answer()


def worker_main(connection_number: int, content_number: int, device: str | None) -> None:
    """Run a worker process: load the model, then do one job after the other."""
    keep_freed_memory()
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
