"""A pass over photos on a Ray cluster, in one actor for each CPU or GPU, which keeps its network loaded (Ray Data).

An actor gets the number of a chunk of photos and returns its `Partial`. The chunks are merged here in their order, so
that the result equals that of one process with as many threads, to the bit. Every machine needs the photos' files.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phosphene.atlases.runners.pool import check_workers, pickle_model, unpickle_model
from phosphene.atlases.runners.ray import cluster, worker_slots
from phosphene.errors import Unfinished, first_line, require_extra
from phosphene.evidence.collect import pack_partial as packed_partial
from phosphene.evidence.collect import unpack_partial as unpacked_partial
from phosphene.evidence.photo_pass import Partial, PhotoPass
from phosphene.network.memory import keep_freed_memory


@dataclass(frozen=True)
class RayPhotoRunner:
    """Runs the photos of `evidence(…, runner=RayPhotoRunner())`.

    Attributes:
        address: of a running cluster; by default Ray is started on this machine, and stopped afterwards.
        workers: actors at most, by default one for each CPU or GPU of the cluster.
        gpu: whether an actor takes a GPU or a CPU; by default as `RayRunner` chooses.
    """

    address: str | None = None
    workers: int | None = None
    gpu: bool | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, least=1)

    def __call__(
        self, photo_pass: PhotoPass, chunks: Sequence[int], watch: Callable[[int], None]
    ) -> Generator[Partial, None, None]:
        """Yield the partial result of each chunk, in order.

        Raises:
            ExtraMissing: Ray is not installed.
            Unfinished: the cluster cannot be used, or a chunk failed on it for good.
        """
        if not chunks:
            return
        ray = require_extra("ray", "ray")
        list(photo_pass.partials([]))  # so that a network that cannot be run is refused here
        with cluster(ray, self.address, self.workers):
            gpu, slots = worker_slots(ray, photo_pass.model, self.gpu, self.workers)
            with closing(self.results(ray, photo_pass, chunks, gpu, min(slots, len(chunks)))) as results:
                for partial in in_order(results, chunks):
                    watch(partial.seen + partial.lost)
                    yield partial

    def results(
        self, ray: Any, photo_pass: PhotoPass, chunks: Sequence[int], gpu: bool, workers: int
    ) -> Generator[tuple[int, Partial], None, None]:
        """Yield the number and the partial result of each chunk, as they finish."""
        rest = photo_pass.photos, photo_pass.layers, photo_pass.size, photo_pass.top
        content = ray.put((pickle_model(photo_pass.model, ray.cloudpickle), rest))
        numbers = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
        partials = numbers.map_batches(
            PhotoActor,
            fn_constructor_args=([content], "cuda" if gpu else "cpu"),
            batch_size=1,
            num_cpus=0 if gpu else 1,
            num_gpus=int(gpu),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        )
        partials.context.enable_progress_bars = False
        try:
            with errors_only("ray.data"):
                for row in partials.iter_rows():
                    yield int(row["chunk"]), unpacked_partial(row["partial"])[1]
        except ray.exceptions.RayError as error:
            raise Unfinished(f"photos could not be shown on Ray: {reason_of(error)}") from error


def in_order(results: Iterable[tuple[int, Partial]], chunks: Sequence[int]) -> Iterator[Partial]:
    """Yield results, which come in any order, in the order of the chunks; each waits here for those before it."""
    waiting: dict[int, Partial] = {}
    order = iter(chunks)
    following = next(order)
    for chunk, partial in results:
        waiting[chunk] = partial
        while following in waiting:
            yield waiting.pop(following)
            following = next(order, -1)


class PhotoActor:
    """The actor of a worker. It loads its network, and runs one chunk of photos after the other through it."""

    def __init__(self, reference: Sequence[Any], device: str) -> None:
        keep_freed_memory()
        content, rest = require_extra("ray", "ray").get(reference[0])
        model = unpickle_model(content, device)
        if device == "cpu":
            torch.set_num_threads(1)  # so that sums have the same order on every machine
        self.photo_pass = PhotoPass(model, *rest)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the partial results of the chunks of a batch, as bytes."""
        chunks = [int(chunk) for chunk in batch["chunk"]]
        partials = np.empty(len(chunks), dtype=object)
        partials[:] = [packed_partial(partial) for partial in self.photo_pass.partials(chunks)]
        return {"chunk": chunks, "partial": partials}


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Have a logger report nothing below errors."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def reason_of(error: BaseException) -> str:
    """Return the first line of the error in a worker, without the traceback that Ray adds."""
    cause = getattr(error, "cause", None) or error.__cause__
    return reason_of(cause) if cause else first_line(error)
