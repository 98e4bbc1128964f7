"""Batches: the pictures of an objective, rendered as many at once as fit the memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phosphene.errors import Interrupted, LayerRefused, OutOfMemory, Unfinished, first_line
from phosphene.network.memory import is_out_of_memory
from phosphene.progress import Bar, progress_bar
from phosphene.rendering.engine.cuda_graph import ascend_with_cuda_graph
from phosphene.rendering.gradient_ascent import AscentPlan, Frame, ReadActivations, ascend, clean_scores
from phosphene.rendering.result import Rendered

LEAKY_SHARE = 0.5  # of the steps
PLAIN_SHARE = 0.9  # of the rise of a score; see decision 8
Watch = Callable[[Frame], None]


@dataclass(frozen=True)
class RenderPlan:
    """A checked request: `batch` pictures at once, `film` moments besides the start, and the result's `spec`.

    `batch` is a multiple of the facets, which go together.
    """

    read: ReadActivations
    ascent: AscentPlan
    batch: int
    film: int
    spec: Mapping[str, Any]


class RenderedBatch(NamedTuple):
    """The results of one batch, on the CPU; `items` are its pictures' indices in the objective, as are `revived`.

    `flat_scores` are the higher of those of flat pictures in two colours of theirs, see `in_own_colours`.
    """

    items: list[int]
    images: Tensor
    start_scores: Tensor
    scores: Tensor
    flat_scores: Tensor
    history: Tensor
    moments: list[Tensor]
    revived: tuple[int, ...] = ()

    @property
    def unmoved_rows(self) -> list[int]:
        """The rows whose pictures never left their start."""
        unmoved = never_moved(self.start_scores, torch.cat([self.history, self.scores[None]]))
        rows: list[int] = unmoved.nonzero()[:, 0].tolist()
        return rows

    def with_revived(self, retry: RenderedBatch) -> RenderedBatch:
        """Return this batch, with those pictures that left their start only in `retry` taken from there."""
        unmoved, still_unmoved = self.unmoved_rows, retry.unmoved_rows
        rows = {self.items[row]: row for row in unmoved}
        revived = [
            (rows[item], index) for index, item in enumerate(retry.items) if item in rows and index not in still_unmoved
        ]
        for row, index in revived:
            for name in ("images", "scores", "flat_scores"):
                getattr(self, name)[row] = getattr(retry, name)[index]
            self.history[:, row] = retry.history[:, index]
            for moment, retried in zip(self.moments, retry.moments, strict=True):
                moment[row] = retried[index]
        return self._replace(revived=tuple(self.items[row] for row, _ in revived))


def collect_batches(plan: RenderPlan, watch: Watch | None, progress: bool) -> list[RenderedBatch]:
    """Return all pictures of an objective in batches; a batch that does not fit the memory is halved.

    The facets of one filter stay in one batch. `progress` shows a bar, which counts the steps of every picture.

    Raises:
        OutOfMemory: not even one picture fits.
        Interrupted, Unfinished: see `render`.
    """
    finished: list[RenderedBatch] = []
    remaining, at_once, facets = list(range(plan.ascent.objective.n)), plan.batch, plan.ascent.facets
    name = f"{len(remaining)} picture{'s' * (len(remaining) > 1)}"
    with progress_bar(name, "steps", progress) as bar, keeping_finished(finished, plan):
        bar.total = len(remaining) * plan.ascent.total_steps
        while remaining:
            items, counted = remaining[:at_once], (bar.done, bar.total)
            try:
                finished.append(retry_unmoved(plan, render_batch(plan, items, watch, bar), watch, bar))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(items) == facets:
                    one = "one picture" if facets == 1 else f"the {facets} facets of one filter"
                    raise OutOfMemory(
                        f"not even {one} of {plan.ascent.recipe.size} px fits in memory; give a smaller size"
                    ) from error
                at_once, (bar.done, bar.total) = len(items) // facets // 2 * facets, counted
                # 3: the line that called `render`
                warnings.warn(
                    f"out of memory with {len(items)} pictures at once; going on with {at_once}", stacklevel=3
                )
                continue
            remaining = remaining[len(items) :]
    return finished


@contextmanager
def keeping_finished(finished: Sequence[RenderedBatch], plan: RenderPlan) -> Iterator[None]:
    """Raise `Interrupted` on Ctrl-C, `Unfinished` on errors after a finished batch; both hold the finished batches."""
    count = plan.ascent.objective.n
    try:
        yield
    except KeyboardInterrupt as error:
        rendered = assemble(finished, plan) if finished else None
        raise Interrupted(f"stopped with {len(rendered or ())} of {count} done", rendered) from error
    except Exception as error:
        if not finished:
            raise
        rendered = assemble(finished, plan)
        raise Unfinished(f"{first_line(error)}; {len(rendered)} of {count} are done", rendered) from error


def render_batch(
    plan: RenderPlan, items: list[int], watch: Watch | None, bar: Bar, leaky_steps: int = 0
) -> RenderedBatch:
    """Render the given pictures at once; see `AscentPlan` for `leaky_steps`."""
    ascent = replace(plan.ascent, leaky_steps=leaky_steps)
    loop = ascend_with_cuda_graph if ascent.prototype_tensor.is_cuda and not leaky_steps else ascend
    history: list[Tensor] = []
    moments: list[Tensor] = []
    start_scores = None
    for frame in loop(plan.read, ascent, items):
        if start_scores is None:
            start_scores = clean_scores(plan.read, ascent, frame.image, frame.items)
            check_finite(start_scores, ascent, items)
        if frame.step < frame.steps:
            history.append(frame.scores)
            bar.done += len(items)
        if plan.film and is_film_frame(frame, plan.film):
            moments.append(frame.image.cpu())
        if watch:
            watch(frame)
    assert start_scores is not None
    # once at the end: reading a value at every step would make a GPU wait
    check_finite(torch.stack([*history, frame.scores]), ascent, items)
    flat_scores = torch.stack(
        [clean_scores(plan.read, ascent, flat, frame.items) for flat in in_own_colours(frame.image)]
    ).amax(0)
    return RenderedBatch(
        items,
        frame.image.cpu(),
        start_scores.cpu(),
        frame.scores.cpu(),
        flat_scores.cpu(),
        torch.stack(history).cpu(),
        moments,
    )


def retry_unmoved(plan: RenderPlan, batch: RenderedBatch, watch: Watch | None, bar: Bar) -> RenderedBatch:
    """Render again, with leaky rectifiers in the first steps, those pictures that never left their start.

    Facets are rendered again together, for each is kept apart from the others; those that have left keep their picture.
    """
    facets = plan.ascent.facets
    filters = {batch.items[row] // facets for row in batch.unmoved_rows}
    items = [item for item in batch.items if item // facets in filters]
    if not items:
        return batch
    bar.total += len(items) * plan.ascent.total_steps
    leaky_steps = max(1, round(LEAKY_SHARE * plan.ascent.total_steps))
    return batch.with_revived(render_batch(plan, items, watch, bar, leaky_steps))


def check_finite(scores: Tensor, ascent: AscentPlan, items: Sequence[int]) -> None:
    """Refuse scores (..., b) that are NaN or infinite; the message names the layer and the first such picture."""
    broken = ~scores.isfinite().reshape(-1, len(items)).all(0)
    if bool(broken.any()):
        name = ascent.objective.names[items[int(broken.nonzero()[0])]]
        raise LayerRefused(
            f"the score of {name} at {', '.join(map(repr, ascent.layers)) or 'the image'} became NaN or infinite: the "
            "network overflows on such a picture; take another recipe, a smaller rate, or --precision fp32"
        )


def is_film_frame(frame: Frame, moments: int) -> bool:
    """Return whether a frame is the start or one of `moments` evenly spaced frames, the last of them the finished."""
    return frame.step * moments // frame.steps > (frame.step - 1) * moments // frame.steps


def assemble(batches: Sequence[RenderedBatch], plan: RenderPlan) -> Rendered:
    """Return batches as one result."""
    images, start_scores, scores, flat_scores = (
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("images", "start_scores", "scores", "flat_scores")
    )
    history = torch.cat([batch.history for batch in batches], 1)
    dead = never_moved(start_scores, torch.cat([history, scores[None]]))
    names = plan.ascent.objective.names
    revived = [names[item] for batch in batches for item in batch.revived]
    return Rendered(
        images=images,
        scores=scores,
        start_scores=start_scores,
        history=history,
        dead=dead,
        plain=~dead & needs_no_pattern(start_scores, scores, flat_scores),
        names=tuple(names[item] for batch in batches for item in batch.items),
        spec={**plan.spec, "woken": revived} if revived else plan.spec,
        moments=tuple(torch.cat(moments) for moments in zip(*(batch.moments for batch in batches), strict=False)),
    )


def never_moved(start_scores: Tensor, scores: Tensor) -> Tensor:
    """Return for each picture whether its scores (steps, n) all equal its starting score (n,), within rounding."""
    return ((scores - start_scores).abs() <= 1e-6 * start_scores.abs()).all(0)


def in_own_colours(images: Tensor) -> Tensor:
    """Return images (n, c, h, w) as flat pictures (2, n, c, h, w), in two colours of their own, channel by channel.

    The first is the median, which leaves a border out. The second is the decile further from mid-grey: a picture whose
    contrast the recipe holds cannot be all in the colour that it goes to.
    """
    levels = images.flatten(2).sort(2).values
    last = levels.shape[2] - 1
    low, median, high = (levels[..., round(share * last)] for share in (0.1, 0.5, 0.9))
    colours = torch.stack([median, torch.where(median > 0.5, high, low)])
    return colours[..., None, None].expand(-1, *images.shape).contiguous()


def needs_no_pattern(start_scores: Tensor, scores: Tensor, flat_scores: Tensor) -> Tensor:
    """Return for each picture whether its score rose, and in one flat colour reaches `PLAIN_SHARE` of that rise.

    A limit on the contrast would not tell: recipes hold it, and a filter that wants white may have a border of any
    contrast where the network pads with zeros.
    """
    rise = scores - start_scores
    return (rise > 0) & (flat_scores - start_scores >= PLAIN_SHARE * rise)
