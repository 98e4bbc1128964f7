"""Objectives: what a picture is to excite, as values that can be added, subtracted and scaled.

An objective asks for `n` pictures. It is scored on a batch that shows some of them: `items` (b,) says which picture
each row of the batch is, `acts` maps every address in `layers` to that layer's output for the batch, `image` is the
batch (b, c, h, w) in [0, 1] before random transforms. The score is (b,), and row k depends on row k alone.

Where an objective reads no more of a layer than one number an item, `reads` says which; then `acts` may hold that
number, (b,), in place of the layer's output (see `shortcuts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phosphene.arguments import finite_number, indices
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerRefused
from phosphene.network.device_constant import DeviceConstant

Address = str | int
Acts = Mapping[Address, Tensor]
Score = Callable[[Acts, Tensor, Tensor], Tensor]
OUTPUT = ""  # the address of what the whole network returns


class ScalarRead(NamedTuple):
    """The one number an item that an objective reads of a layer, `channels` by item.

    It is the channel's mean where `mean`, else its value at `position` (row, column), by default the map's centre.
    """

    channels: tuple[int, ...]
    mean: bool
    position: tuple[int, int] | None = None


@dataclass(frozen=True)
class Objective:
    """A score for each of `n` pictures; see the module's text.

    `spec` says in JSON terms what it is; `names` says of each picture what it shows, such as `filter_12`; `reads` what
    it reads of those layers of which it reads one number an item.
    """

    layers: tuple[Address, ...]
    n: int
    score: Score = field(repr=False, compare=False)
    spec: Mapping[str, Any]
    names: tuple[str, ...]
    reads: Mapping[Address, ScalarRead] = field(default_factory=dict, compare=False)

    def __add__(self, other: Objective | float) -> Objective:
        return add(self, other)

    def __radd__(self, other: float) -> Objective:
        return add(self, other)

    def __sub__(self, other: Objective | float) -> Objective:
        return add(self, -other)

    def __rsub__(self, other: float) -> Objective:
        return add(-self, other)

    def __neg__(self) -> Objective:
        return self * -1.0

    def __mul__(self, factor: float) -> Objective:
        if isinstance(factor, Objective):
            raise InvalidRequest("an objective is multiplied by a number, not by another objective")
        number = finite_number(factor, "an objective is multiplied by a number")
        return replace(
            self,
            score=lambda acts, image, items: number * self.score(acts, image, items),
            spec={"times": number, "of": self.spec},
        )

    __rmul__ = __mul__


def add(one: Objective, other: Objective | float) -> Objective:
    """Return the sum of two objectives, or of an objective and a number; an objective of one picture fits any other."""
    if not isinstance(other, Objective):
        number = finite_number(other, "to an objective another objective or a number is added")
        return replace(
            one,
            score=lambda acts, image, items: one.score(acts, image, items) + number,
            spec={"sum": [one.spec, number]},
        )
    if one.n != other.n and 1 not in (one.n, other.n):
        raise InvalidRequest(f"an objective for {one.n} pictures cannot be added to one for {other.n}")

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        # an objective of one picture has only an item 0
        first, second = (items if part.n > 1 else torch.zeros_like(items) for part in (one, other))
        return one.score(acts, image, first) + other.score(acts, image, second)

    # what the pictures show is said by the part that has most of them, and never by a regulariser if it can be helped
    naming = max(one, other, key=lambda part: (part.n, bool(part.layers)))
    return Objective(
        layers=tuple(dict.fromkeys(one.layers + other.layers)),
        n=naming.n,
        score=score,
        spec={"sum": [one.spec, other.spec]},
        names=naming.names,
        reads=reads_of_sum(one, other, naming.n),
    )


def reads_of_sum(one: Objective, other: Objective, n: int) -> dict[Address, ScalarRead]:
    """Return what a sum reads of each layer of which it reads one number an item: both parts the same, or one of them.

    An objective of one picture reads the same for every item of the other.
    """
    found: dict[Address, ScalarRead] = {}
    for part, rest in ((one, other), (other, one)):
        for layer, reads in part.reads.items():
            if layer not in rest.layers or rest.reads.get(layer) == reads:
                found[layer] = reads._replace(channels=reads.channels * (n if part.n < n else 1))
    return found


def need_map(act: Tensor, layer: Address, highest: int) -> None:
    """Refuse an output that is no feature map (b, c, h, w) with at least `highest` + 1 channels."""
    if act.dim() != 4:
        raise LayerRefused(
            f"{layer!r} returns {tuple(act.shape[1:])} numbers a picture, not a map of channels; "
            "choose a convolution, or the objective 'logit' for a classifier"
        )
    if highest >= act.shape[1]:
        raise ChannelNotFound(f"{layer!r} has {act.shape[1]} channels, 0 to {act.shape[1] - 1}; there is no {highest}")


def pick(act: Tensor, channels: DeviceConstant, items: Tensor) -> Tensor:
    """Return, for each row of (b, c, ...), the channel that its item follows, (b, ...)."""
    return act[torch.arange(len(act), device=act.device), channels.on(act.device)[items]]


def channel(layer: Address, channels: int | Iterable[int]) -> Objective:
    """Excite whole channels: picture k has score mean over (h, w) of channel `channels[k]` (R1, step 2).

    Example:
        >>> channel("features.10", range(64)).n
        64
    """
    listed = indices(channels, "channel")
    chosen = DeviceConstant(torch.tensor(listed))

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        if acts[layer].dim() == 1:
            return acts[layer]
        need_map(acts[layer], layer, max(listed))
        # one axis after the other: both at once would round otherwise for a batch of one large map
        return pick(acts[layer], chosen, items).mean(-1).mean(-1)

    spec = {"objective": "channel", "layer": layer, "channels": listed}
    reads = {layer: ScalarRead(tuple(listed), mean=True)}
    return Objective((layer,), len(listed), score, spec, tuple(f"filter_{one}" for one in listed), reads)


def neuron(layer: Address, channels: int | Iterable[int], position: tuple[int, int] | None = None) -> Objective:
    """Excite single neurons: the value of the channel at `position` (row, column), by default the map's centre."""
    listed = indices(channels, "channel")
    if position is not None and len(indices(position, "row or column")) != 2:
        raise InvalidRequest(f"a position in a map is (row, column), not {position}")
    chosen = DeviceConstant(torch.tensor(listed))

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        if acts[layer].dim() == 1:
            return acts[layer]
        need_map(acts[layer], layer, max(listed))
        row, column = position_in(acts[layer], layer, position)
        return pick(acts[layer][..., row, column], chosen, items)

    spec = {"objective": "neuron", "layer": layer, "channels": listed, "position": position and list(position)}
    reads = {layer: ScalarRead(tuple(listed), mean=False, position=position)}
    return Objective((layer,), len(listed), score, spec, tuple(f"filter_{one}" for one in listed), reads)


def position_in(act: Tensor, layer: Address, position: tuple[int, int] | None) -> tuple[int, int]:
    """Return a position (row, column) of a map (b, c, h, w), by default its centre; refuse one that it has not."""
    height, width = act.shape[-2:]
    row, column = position or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise InvalidRequest(f"{layer!r} has a map of {height}×{width}; there is no position {row}, {column}")
    return row, column


def direction(layer: Address, vectors: Tensor | Sequence[float]) -> Objective:
    """Excite a mixture of channels: the mean over (h, w) of the dot product with a vector (c,), or one a row of (n, c).

    The vector is divided by its length, so that scores of different directions compare.
    """
    rows = torch.as_tensor(vectors, dtype=torch.float64)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not bool(rows.isfinite().all()) or bool((rows.norm(dim=1) == 0).any()):
        raise InvalidRequest("a direction is a vector (c,) or a table (n, c) of finite numbers, not all zero in a row")
    unit = DeviceConstant(rows / rows.norm(dim=1, keepdim=True))

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        act = acts[layer]
        need_map(act, layer, 0)
        if act.shape[1] != rows.shape[1]:
            raise InvalidRequest(f"{layer!r} has {act.shape[1]} channels, the direction has {rows.shape[1]}")
        along: Tensor = act.mean((-2, -1)) * unit.like(act)[items.to(act.device)]
        return along.sum(1)

    spec = {"objective": "direction", "layer": layer, "vectors": rows.tolist()}
    return Objective((layer,), len(rows), score, spec, tuple(f"direction_{one}" for one in range(len(rows))))


def logit(classes: int | Iterable[int], layer: Address = OUTPUT) -> Objective:
    """Excite classes: the class's entry of a layer that returns (b, classes), by default of the network's output."""
    listed = indices(classes, "class")
    chosen = DeviceConstant(torch.tensor(listed))
    shown = "the network" if layer == OUTPUT else repr(layer)

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        act = acts[layer]
        if act.dim() != 2:
            raise LayerRefused(
                f"{shown} returns {tuple(act.shape[1:])} a picture, not one number a class; "
                "use the objective 'channel' for maps"
            )
        if max(listed) >= act.shape[1]:
            raise ChannelNotFound(
                f"{shown} has {act.shape[1]} classes, 0 to {act.shape[1] - 1}; there is no {max(listed)}"
            )
        return pick(act, chosen, items)

    spec = {"objective": "logit", "layer": layer, "classes": listed}
    return Objective((layer,), len(listed), score, spec, tuple(f"class_{one}" for one in listed))


def layer(layer: Address) -> Objective:
    """Excite whatever a layer sees already: the mean of its squares (DeepDream, Mordvintsev et al. 2015)."""

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        return acts[layer].square().flatten(1).mean(1)

    return Objective((layer,), 1, score, {"objective": "layer", "layer": layer}, ("layer",))


def regulariser(name: str, measure: Callable[[Tensor], Tensor]) -> Objective:
    """Return an objective of the image alone, one that fits any number of pictures."""
    return Objective((), 1, lambda acts, image, items: measure(image), {"objective": name}, (name,))


def total_variation() -> Objective:
    """The mean absolute difference of neighbouring pixels, down plus right; subtract some for smoother pictures."""

    def measure(image: Tensor) -> Tensor:
        down = image.diff(dim=-2).abs().flatten(1).mean(1)
        return down + image.diff(dim=-1).abs().flatten(1).mean(1)

    return regulariser("total_variation", measure)


def l1() -> Objective:
    """The mean absolute distance of the pixels from mid-grey, 0.5."""
    return regulariser("l1", lambda image: (image - 0.5).abs().flatten(1).mean(1))


def l2() -> Objective:
    """The mean squared distance of the pixels from mid-grey, 0.5."""
    return regulariser("l2", lambda image: (image - 0.5).square().flatten(1).mean(1))


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "channel": channel,
    "neuron": neuron,
    "direction": direction,
    "logit": logit,
    "layer": layer,
    "total_variation": total_variation,
    "l1": l1,
    "l2": l2,
}
