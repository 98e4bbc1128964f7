"""Objectives: what a picture is to excite, as values that can be added, subtracted and scaled.

An objective describes `n` pictures. It scores a batch of them: `items` (b,) holds the picture's index of each row of
the batch, `acts` maps every address in `layers` to that layer's output for the batch, `image` is the batch (b, c, h, w)
in [0, 1] before random transforms. The score is (b,), and row k depends on row k alone.

If an objective reads only one number per item from a layer, `scalar_reads` describes it; then `acts` may hold that
number, (b,), in place of the layer's output (see `engine/forward.py`).
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


class MapOf(NamedTuple):
    """The key under which `Acts` also hold the tensor that was read for an address, where facets need it."""

    address: Address


class InPhoto(NamedTuple):
    """The key under which `Acts` also hold a layer's output for the photo that pictures are compared with."""

    address: Address


Acts = Mapping[Any, Tensor]  # by `Address`, `MapOf` or `InPhoto`
Score = Callable[[Acts, Tensor, Tensor], Tensor]
OUTPUT = ""  # the address of the network's output


class ScalarRead(NamedTuple):
    """The one number that an objective reads from a layer for each item, from its channel of `channels`.

    It is the channel's mean if `mean`, else its value at `position` (row, column), by default the map's centre.
    """

    channels: tuple[int, ...]
    mean: bool
    position: tuple[int, int] | None = None


@dataclass(frozen=True)
class Objective:
    """A score for each of `n` pictures; see the module's text.

    `spec` describes it in JSON terms; `names` holds what each picture shows, such as `filter_12`; `scalar_reads` covers
    the layers from which it reads one number per item. At the layers `compared`, pictures are compared with the photo
    that they start from: `acts` then also holds the outputs for the photo, under the same transforms, at `InPhoto`.
    """

    layers: tuple[Address, ...]
    n: int
    score: Score = field(repr=False, compare=False)
    spec: Mapping[str, Any]
    names: tuple[str, ...]
    scalar_reads: Mapping[Address, ScalarRead] = field(default_factory=dict, compare=False)
    compared: tuple[Address, ...] = ()

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


def add(left: Objective, right: Objective | float) -> Objective:
    """Return the sum of two objectives, or of an objective and a number; an objective of one picture fits any other."""
    if not isinstance(right, Objective):
        number = finite_number(right, "what is added to an objective is another objective or a number")
        return replace(
            left,
            score=lambda acts, image, items: left.score(acts, image, items) + number,
            spec={"sum": [left.spec, number]},
        )
    if left.n != right.n and 1 not in (left.n, right.n):
        raise InvalidRequest(f"an objective for {left.n} pictures cannot be added to one for {right.n}")

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        # an objective of one picture has only item 0
        left_items, right_items = (items if term.n > 1 else torch.zeros_like(items) for term in (left, right))
        return left.score(acts, image, left_items) + right.score(acts, image, right_items)

    # the term with the most pictures names them; of two with equally many, the one that is no regulariser
    naming = max(left, right, key=lambda term: (term.n, bool(term.layers)))
    return Objective(
        layers=tuple(dict.fromkeys(left.layers + right.layers)),
        n=naming.n,
        score=score,
        spec={"sum": [left.spec, right.spec]},
        names=naming.names,
        scalar_reads=scalar_reads_of_sum(left, right, naming.n),
        compared=tuple(dict.fromkeys(left.compared + right.compared)),
    )


def scalar_reads_of_sum(left: Objective, right: Objective, n: int) -> dict[Address, ScalarRead]:
    """Return the scalar reads of the layers that only one term reads, or that both read alike.

    An objective of one picture reads the same for every item of the sum.
    """
    scalar_reads: dict[Address, ScalarRead] = {}
    for term, partner in ((left, right), (right, left)):
        for layer, read in term.scalar_reads.items():
            if layer not in partner.layers or partner.scalar_reads.get(layer) == read:
                scalar_reads[layer] = read._replace(channels=read.channels * (n if term.n < n else 1))
    return scalar_reads


def check_map(act: Tensor, layer: Address, highest: int) -> None:
    """Refuse an output that is not a feature map (b, c, h, w) with at least `highest` + 1 channels."""
    if act.dim() != 4:
        raise LayerRefused(
            f"{layer!r} returns {tuple(act.shape[1:])} numbers a picture, not a map of channels; "
            "choose a convolution, or the objective 'logit' for a classifier"
        )
    if highest >= act.shape[1]:
        raise ChannelNotFound(f"{layer!r} has {act.shape[1]} channels, 0 to {act.shape[1] - 1}; there is no {highest}")


def pick(act: Tensor, channels: DeviceConstant, items: Tensor) -> Tensor:
    """Return for each row of (b, c, ...) the channel of its item, (b, ...)."""
    return act[torch.arange(len(act), device=act.device), channels.to(act.device)[items]]


def channel(layer: Address, channels: int | Iterable[int]) -> Objective:
    """Excite whole channels: picture k has score mean over (h, w) of channel `channels[k]` (R1, step 2).

    Example:
        >>> channel("features.10", range(64)).n
        64
    """
    numbers = indices(channels, "channel")
    spec = {"objective": "channel", "layer": layer, "channels": numbers}
    return scalar_objective(layer, ScalarRead(tuple(numbers), mean=True), spec)


def neuron(layer: Address, channels: int | Iterable[int], position: tuple[int, int] | None = None) -> Objective:
    """Excite single neurons: the value of the channel at `position` (row, column), by default the map's centre."""
    numbers = indices(channels, "channel")
    if position is not None and len(indices(position, "row or column")) != 2:
        raise InvalidRequest(f"a position in a map is (row, column), not {position}")
    spec = {"objective": "neuron", "layer": layer, "channels": numbers, "position": position and list(position)}
    return scalar_objective(layer, ScalarRead(tuple(numbers), mean=False, position=position), spec)


def scalar_objective(layer: Address, read: ScalarRead, spec: Mapping[str, Any]) -> Objective:
    """Return the objective whose score is one number of a layer for each item."""
    constant = DeviceConstant(torch.tensor(read.channels))

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        act = acts[layer]
        if act.dim() == 1:
            return act
        check_map(act, layer, max(read.channels))
        if read.mean:
            # one axis after the other: both at once would round differently for a batch of one large map
            return pick(act, constant, items).mean(-1).mean(-1)
        row, column = position_in(act, layer, read.position)
        return pick(act[..., row, column], constant, items)

    names = tuple(f"filter_{channel}" for channel in read.channels)
    return Objective((layer,), len(names), score, spec, names, {layer: read})


def position_in(act: Tensor, layer: Address, position: tuple[int, int] | None) -> tuple[int, int]:
    """Return a position (row, column) of a map (b, c, h, w), by default its centre; refuse one outside the map."""
    height, width = act.shape[-2:]
    row, column = position or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise InvalidRequest(f"{layer!r} has a map of {height}×{width}; there is no position {row}, {column}")
    return row, column


def direction(layer: Address, vectors: Tensor | Sequence[float]) -> Objective:
    """Excite a mixture of channels: the mean over (h, w) of the dot product with a vector (c,), or each row of (n, c).

    The vector is divided by its length, so that scores of different directions can be compared.
    """
    rows = torch.as_tensor(vectors, dtype=torch.float64)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not bool(rows.isfinite().all()) or bool((rows.norm(dim=1) == 0).any()):
        raise InvalidRequest("a direction is a vector (c,) or a table (n, c) of finite numbers, and no row is all zero")
    unit = DeviceConstant(rows / rows.norm(dim=1, keepdim=True))

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        act = acts[layer]
        check_map(act, layer, 0)
        if act.shape[1] != rows.shape[1]:
            raise InvalidRequest(f"{layer!r} has {act.shape[1]} channels, the direction has {rows.shape[1]}")
        products: Tensor = act.mean((-2, -1)) * unit.like(act)[items.to(act.device)]
        return products.sum(1)

    spec = {"objective": "direction", "layer": layer, "vectors": rows.tolist()}
    return Objective((layer,), len(rows), score, spec, tuple(f"direction_{index}" for index in range(len(rows))))


def logit(classes: int | Iterable[int], layer: Address = OUTPUT) -> Objective:
    """Excite classes: the class's entry of a layer that returns (b, classes), by default of the network's output."""
    numbers = indices(classes, "class")
    constant = DeviceConstant(torch.tensor(numbers))
    subject = "the network" if layer == OUTPUT else repr(layer)

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        act = acts[layer]
        if act.dim() != 2:
            raise LayerRefused(
                f"{subject} returns {tuple(act.shape[1:])} a picture, not one number a class; "
                "use the objective 'channel' for maps"
            )
        if max(numbers) >= act.shape[1]:
            raise ChannelNotFound(
                f"{subject} has {act.shape[1]} classes, 0 to {act.shape[1] - 1}; there is no {max(numbers)}"
            )
        return pick(act, constant, items)

    spec = {"objective": "logit", "layer": layer, "classes": numbers}
    return Objective((layer,), len(numbers), score, spec, tuple(f"class_{number}" for number in numbers))


def layer(layer: Address) -> Objective:
    """Excite whatever a layer already sees: the mean of its squares (DeepDream, Mordvintsev et al. 2015)."""

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        return acts[layer].square().flatten(1).mean(1)

    return Objective((layer,), 1, score, {"objective": "layer", "layer": layer}, ("layer",))


def regulariser(name: str, measure: Callable[[Tensor], Tensor]) -> Objective:
    """Return an objective of the image alone, which fits any number of pictures."""
    return Objective((), 1, lambda acts, image, items: measure(image), {"objective": name}, (name,))


def total_variation() -> Objective:
    """The mean absolute difference of neighbouring pixels, down plus right; subtract some for smoother pictures."""

    def measure(image: Tensor) -> Tensor:
        vertical = image.diff(dim=-2).abs().flatten(1).mean(1)
        return vertical + image.diff(dim=-1).abs().flatten(1).mean(1)

    return regulariser("total_variation", measure)


def l1() -> Objective:
    """The mean absolute distance of the pixels from mid-grey, 0.5."""
    return regulariser("l1", lambda image: (image - 0.5).abs().flatten(1).mean(1))


def l2() -> Objective:
    """The mean squared distance of the pixels from mid-grey, 0.5."""
    return regulariser("l2", lambda image: (image - 0.5).square().flatten(1).mean(1))
