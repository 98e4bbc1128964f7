"""Showing photos on a Ray cluster: one actor a CPU or a GPU, which keeps its network loaded (Ray Data).

What travels is a lot's number there and its `Partial` back. Lots are merged here in their order, so that the result is
the same as that of one process with as many threads, to the bit. The photos' files have to be there on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phosphene.atlases.runners.pool import check_workers, pickle_model, unpickle_model
from phosphene.atlases.runners.ray import cluster, places_of
from phosphene.errors import Unfinished, first_line, require_extra
from phosphene.evidence.collect import packed as packed_partial
from phosphene.evidence.collect import unpacked as unpacked_partial
from phosphene.evidence.photo_pass import Partial, PhotoPass


@dataclass(frozen=True)
class RayPhotoRunner:
    """Shows the photos for `evidence(…, show=RayShow())`.

    Attributes:
        address: of a running cluster; by default Ray is started on this machine, and ended afterwards.
        workers: how many actors at most, by default one a CPU, or one a GPU, of the cluster.
        gpu: whether an actor takes a GPU or a CPU; by default as `RayRunner` chooses.
    """

    address: str | None = None
    workers: int | None = None
    gpu: bool | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, least=1)

    def __call__(
        self, viewing: PhotoPass, lots: Sequence[int], watch: Callable[[int], None]
    ) -> Generator[Partial, None, None]:
        """Yield what is known of each lot, in order.

        Raises:
            ExtraMissing: Ray is not installed.
            Unfinished: the cluster cannot be used, or lost a lot's photos for good.
        """
        if not lots:
            return
        ray = require_extra("ray", "ray")
        list(viewing.partials([]))  # what can be refused is refused here
        with cluster(ray, self.address, self.workers):
            gpu, slots = places_of(ray, viewing.model, self.gpu, self.workers)
            with closing(self.coming(ray, viewing, lots, gpu, min(slots, len(lots)))) as coming:
                for partial in in_order(coming, lots):
                    watch(partial.seen + partial.lost)
                    yield partial

    def coming(
        self, ray: Any, viewing: PhotoPass, lots: Sequence[int], gpu: bool, workers: int
    ) -> Generator[tuple[int, Partial], None, None]:
        """Yield the number of each lot and what is known of it, as they are done."""
        rest = viewing.photos, viewing.layers, viewing.size, viewing.top
        asked = ray.put((pickle_model(viewing.model, ray.cloudpickle), rest))
        numbers = ray.data.from_items([{"lot": one} for one in lots], override_num_blocks=len(lots))
        found = numbers.map_batches(
            Eye,
            fn_constructor_args=([asked], "cuda" if gpu else "cpu"),
            batch_size=1,
            num_cpus=0 if gpu else 1,
            num_gpus=int(gpu),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        )
        found.context.enable_progress_bars = False
        try:
            with quiet("ray.data"):
                for row in found.iter_rows():
                    yield int(row["lot"]), unpacked_partial(row["partial"])[1]
        except ray.exceptions.RayError as error:
            raise Unfinished(f"photos could not be shown on Ray: {reason_of(error)}") from error


def in_order(coming: Iterable[tuple[int, Partial]], lots: Sequence[int]) -> Iterator[Partial]:
    """Yield what comes in any order in the order of the lots; it waits here for those before it."""
    waiting: dict[int, Partial] = {}
    wanted = iter(lots)
    number = next(wanted)
    for came, partial in coming:
        waiting[came] = partial
        while number in waiting:
            yield waiting.pop(number)
            number = next(wanted, -1)


class Eye:
    """What runs as an actor: it loads its network, and shows it one lot after the other."""

    def __init__(self, asked: Sequence[Any], device: str) -> None:
        content, rest = require_extra("ray", "ray").get(asked[0])
        model = unpickle_model(content, device)
        if device == "cpu":
            torch.set_num_threads(1)  # sums are then taken in one order, whatever the machine
        self.viewing = PhotoPass(model, *rest)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what is known of the lots of a batch, as bytes."""
        lots = [int(one) for one in batch["lot"]]
        found = np.empty(len(lots), dtype=object)
        found[:] = [packed_partial(one) for one in self.viewing.partials(lots)]
        return {"lot": lots, "partial": found}


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Have a logger speak of errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def reason_of(error: BaseException) -> str:
    """Return what went wrong in a worker, without the traceback that Ray gives."""
    cause = getattr(error, "cause", None) or error.__cause__
    return reason_of(cause) if cause else first_line(error)
