"""The layers of a network: their addresses, and the table of what each returns."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, overload

import torch
from torch import Tensor, nn

from phosphene.errors import LayerNotFound, LayerRefused, nearest
from phosphene.network.batchnorm_folding import ConvNormPair, FoldingObserver
from phosphene.network.capture import PLAIN, InnerHookPoint, Layout, TensorAddress, borrowed, hooked, tensors_in
from phosphene.network.receptive_field import DOWN, RIGHT, ReceptiveFieldState
from phosphene.network.receptive_field_tracer import ReceptiveFieldTracer

# Class names, so that the convolutions of other frameworks count without an import; a subclass counts as its parent.
CONVOLUTIONS = {"Conv2d", "ConvTranspose2d", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "SeparableConv2D"}


@dataclass(frozen=True)
class ReceptiveField:
    """How much of the input image one position of a map sees, (down, right), in input pixels.

    Position i sees the pixels from `i · stride - padding` to `i · stride - padding + size - 1`, as far as these are
    on the image. At stride 0 all positions see the same.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __str__(self) -> str:
        size, stride, padding = (shown(pair) for pair in (self.size, self.stride, self.padding))
        return f"{size} / {stride} / {padding}"


def shown(pair: tuple[int, int]) -> str:
    """Return a pair of numbers as "7" or "7×5"."""
    return "×".join(map(str, pair[:1] if pair[0] == pair[1] else pair))


@dataclass(frozen=True)
class Layer:
    """The frozen address of one tensor in a network's forward pass, and what is known of it.

    Attributes:
        path: what the user types.
        place: the module, call and part that `path` means.
        kind: the module's class name, and what activation function it ends in where that is no module of its own.
        convolution: whether it is a two-dimensional convolution, which an integer address counts.
        channels: channels of a map (b, c, h, w), numbers of a vector (b, c); None for anything else.
        size: (h, w) of the map, None where it is none.
        receptive_field: None where it is the whole image or is not known; `sees` tells which.
        sees: "part", "whole" or "unknown".
        in_place: the operation that overwrites what this layer returned, None where nothing does.
    """

    path: str
    place: TensorAddress
    kind: str
    convolution: bool
    channels: int | None
    size: tuple[int, int] | None
    receptive_field: ReceptiveField | None
    sees: str
    in_place: str | None

    @property
    def is_map(self) -> bool:
        return self.size is not None

    @property
    def spellings(self) -> tuple[str, ...]:
        """The path with and without the leading dot that marks a path of digits alone."""
        return (self.path, self.path.removeprefix("."))


class Layers(Sequence[Layer]):
    """The table of a network's layers in the order of the forward pass; prints as a table, in notebooks too.

    `unlisted` are places inside layers, such as `conv1#preactivation`, that have an address but no row; `pairs` are the
    convolutions that can do the work of the batch normalisation after them.
    """

    HEADINGS = ("layer", "kind", "channels", "map", "receptive field / stride / padding", "overwritten by")

    def __init__(
        self, layers: Sequence[Layer], unlisted: Sequence[Layer] = (), pairs: Sequence[ConvNormPair] = ()
    ) -> None:
        self._layers = tuple(layers)
        self.unlisted = tuple(unlisted)
        self.pairs = tuple(pairs)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Layers: ...
    def __getitem__(self, index: int | slice) -> Layer | Layers:
        return Layers(self._layers[index]) if isinstance(index, slice) else self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    @property
    def convolutions(self) -> tuple[Layer, ...]:
        """The two-dimensional convolutions, which an integer address counts."""
        return tuple(one for one in self if one.convolution)

    def find(self, address: str | int) -> Layer:
        """Return the layer of an address: its path, or n for the n-th convolution (0-based).

        Raises:
            LayerNotFound: there is none; the message names the nearest.
            LayerRefused: the path means several tensors.
        """
        if isinstance(address, int):
            count = len(self.convolutions)
            if not 0 <= address < count:
                counted = f"{count}, 0 to {count - 1}" if count else "none; give a path"
                raise LayerNotFound(f"there is no convolution {address}: the network has {counted}")
            return self.convolutions[address]
        every = (*self._layers, *self.unlisted)
        by_path = {path: one for one in every for path in one.spellings}
        if address in by_path:
            return by_path[address]
        several = [one.path for one in every if one.place.path == address.lstrip(".")]
        if several:
            raise LayerRefused(
                f"{address!r} stands for {len(several)} results; choose one of: {', '.join(several[:8])}"
            )
        near = nearest(address, [one.path for one in (every if "#" in address else self._layers)])
        raise LayerNotFound(f"there is no layer {address!r}; the nearest are: {near} (`phosphene layers` lists all)")

    def matching(self, pattern: str) -> Layers:
        """Return the layers whose path matches a glob such as `features.*`; one that is spelled just so is meant alone.

        Raises:
            LayerNotFound: none does.
        """
        known = (*self._layers, *self.unlisted) if "#" in pattern else self._layers
        exact = [one for one in known if pattern in one.spellings]
        found = exact or [one for one in known if any(fnmatch.fnmatchcase(path, pattern) for path in one.spellings)]
        if not found:
            near = nearest(pattern.rstrip("*"), [one.path for one in self])
            raise LayerNotFound(f"no layer matches {pattern!r}; the nearest are: {near}")
        return Layers(found)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells as text, a row a layer."""
        return [
            (
                one.path,
                one.kind,
                "" if one.channels is None else str(one.channels),
                "" if one.size is None else "×".join(map(str, one.size)),
                str(one.receptive_field) if one.receptive_field else {"whole": "whole image"}.get(one.sees, "?"),
                one.in_place or "",
            )
            for one in self
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the table as JSON values."""
        return [{key: value for key, value in asdict(one).items() if key != "place"} for one in self]

    def __repr__(self) -> str:
        rows = [self.HEADINGS, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.HEADINGS))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class ObservedTensor:
    """One tensor that a module returned during the survey."""

    place: TensorAddress
    module: nn.Module
    shape: tuple[int, ...]
    field: ReceptiveFieldState | None


def survey(
    run: Callable[[Tensor], Any],
    module: nn.Module,
    modules: Mapping[str, nn.Module],
    image: Tensor,
    layout: Layout = PLAIN,
) -> Layers:
    """Run a network once on `image` (1, c, h, w) and return the table of what every module returned.

    A module that runs several times has one row a call, `path@0`, `path@1` …; one that returns several tensors has
    one row a tensor, `path#0`, `path#logits` …; an all-digit path gets a leading dot, for a bare integer means the n-th
    convolution. The module is left as it was.
    """
    with borrowed(module), torch.no_grad():
        try:
            return trace(run, modules, image, ReceptiveFieldTracer(image, arithmetic=False), layout)
        except Exception:  # the network minds what is computed, or does not take the image and says so better this way
            return trace(run, modules, image, ReceptiveFieldTracer(image), layout)


def trace(
    run: Callable[[Tensor], Any],
    modules: Mapping[str, nn.Module],
    image: Tensor,
    tracer: ReceptiveFieldTracer,
    layout: Layout = PLAIN,
) -> Layers:
    """Run a network under a tracer and return its table."""
    calls: Counter[str] = Counter()
    sightings: list[ObservedTensor] = []
    witness = FoldingObserver()

    def see(path: str, output: Any) -> None:
        for part, returned in tensors_in(output).items():
            witness.show(path, modules[path], returned)
            tensor = layout.read(returned)
            field = tracer.show(len(sightings), tensor)
            sightings.append(
                ObservedTensor(TensorAddress(path, calls[path], part), modules[path], tuple(tensor.shape), field)
            )
        calls[path] += 1

    with hooked(modules, see), tracer, witness:
        run(image)
    pieces = Counter((one.place.path, one.place.call) for one in sightings)
    rows = [
        layer_row(
            one,
            tracer.overwritten.get(number),
            calls[one.place.path] > 1,
            pieces[one.place.path, one.place.call] > 1,
            fused_activation(modules, one.place.path),
        )
        for number, one in enumerate(sightings)
    ]
    inside = {one.place.path for one in sightings if isinstance(one.module, InnerHookPoint)}
    return Layers(
        [row for row in rows if row.place.path and row.place.path not in inside],
        [row for row in rows if row.place.path in inside],
        witness.pairs(),
    )


def fused_activation(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return the name of the activation function that a layer applies itself; "" where there is none."""
    inside = modules.get(f"{path}#{InnerHookPoint.ACTIVATION}")
    if not isinstance(inside, InnerHookPoint):
        return ""
    activation = inside.owner.activation
    return str(getattr(activation, "__name__", type(activation).__name__))


def escape_digits(path: str) -> str:
    """Return a module's path as it is typed: a number alone would be the n-th convolution."""
    return f".{path}" if path.isdigit() else path


def layer_row(seen: ObservedTensor, overwritten: str | None, repeated: bool, several: bool, fused: str = "") -> Layer:
    """Return the row of one sighting."""
    inside = isinstance(seen.module, InnerHookPoint)
    owner = seen.module.owner if isinstance(seen.module, InnerHookPoint) else seen.module
    path, mark, where = seen.place.path.rpartition("#") if inside else (seen.place.path, "", "")
    path = escape_digits(path)
    path += f"@{seen.place.call}" if repeated else ""
    path += f"#{seen.place.part}" if several else f"{mark}{where}"
    is_map = len(seen.shape) == 4 and channels_first(seen.field)
    sees, field = receptive_field(seen.field)
    return Layer(
        path=path,
        place=seen.place,
        kind=type(owner).__name__ + (f" + {fused}" if fused else ""),
        convolution=is_map and any(one.__name__ in CONVOLUTIONS for one in type(owner).__mro__),
        channels=seen.shape[1] if is_map or len(seen.shape) == 2 else None,
        size=(seen.shape[2], seen.shape[3]) if is_map else None,
        receptive_field=field,
        sees=sees,
        in_place=overwritten,
    )


def producing_call(
    run: Callable[[Tensor], Any], modules: Mapping[str, nn.Module], image: Tensor
) -> TensorAddress | None:
    """Return which call of which module made the one tensor that the network returns; None where none did."""
    calls: Counter[str] = Counter()
    made: list[tuple[TensorAddress, Any]] = []

    def see(path: str, output: Any) -> None:
        made.append((TensorAddress(path, calls[path]), output))
        calls[path] += 1

    with hooked({path: one for path, one in modules.items() if path}, see):
        result = run(image)
    # the first that returned it made it: what holds that module returned it later
    return next((place for place, output in made if output is result), None)


def channels_first(field: ReceptiveFieldState | None) -> bool:
    """Return whether the sides of the image lie along the last two of four dimensions, as far as is known."""
    if field is None:
        return True
    along = [{one.side for one in factors} - {None} for factors in field.layout]
    return not along[0] | along[1] and along[2] <= {DOWN} and along[3] <= {RIGHT}


def receptive_field(field: ReceptiveFieldState | None) -> tuple[str, ReceptiveField | None]:
    """Return ("part", its figures), ("whole", None) or ("unknown", None)."""
    if field is not None and field.whole:
        return "whole", None
    down, right = (field and field.along(side) for side in (DOWN, RIGHT))
    if not down or not right:
        return "unknown", None
    size, stride, start = zip(down, right, strict=True)
    return "part", ReceptiveField(size, stride, (-start[0], -start[1]))


def file_prefix(layers: Sequence[str]) -> str:
    """Return `layer_<layer>` for file names, with what a file name cannot hold replaced."""
    shown = "_".join(layers) or "output"
    return "layer_" + "".join(one if one.isalnum() or one in "._-@#" else "_" for one in shown)
