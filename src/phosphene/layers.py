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

from phosphene.capture import Place, borrowed, parts, watch
from phosphene.errors import LayerNotFound, LayerRefused, nearest
from phosphene.receptive import Field, Tracer


@dataclass(frozen=True)
class ReceptiveField:
    """How much of the input image one position of a map sees, (down, right), in input pixels.

    Position i sees the pixels from `i · stride - padding` to `i · stride - padding + size - 1`.
    """

    size: tuple[int, int]
    stride: tuple[float, float]
    padding: tuple[float, float]

    def __str__(self) -> str:
        size, stride, padding = (shown(pair) for pair in (self.size, self.stride, self.padding))
        return f"{size} / {stride} / {padding}"


def shown(pair: Sequence[float]) -> str:
    """Return a pair of numbers as "7" or "7×5"."""
    return "×".join(f"{one:g}" for one in (pair[:1] if pair[0] == pair[1] else pair))


@dataclass(frozen=True)
class Layer:
    """The frozen address of one tensor in a network's forward pass, and what is known of it.

    Attributes:
        path: what the user types.
        place: the module, call and part that `path` means.
        kind: the module's class name.
        channels: channels of a map (b, c, h, w), numbers of a vector (b, c); None for anything else.
        size: (h, w) of the map, None where it is none.
        receptive_field: None where it is the whole image or is not known; `sees` tells which.
        sees: "part", "whole" or "unknown".
        in_place: the operation that overwrites what this layer returned, None where nothing does.
    """

    path: str
    place: Place
    kind: str
    channels: int | None
    size: tuple[int, int] | None
    receptive_field: ReceptiveField | None
    sees: str
    in_place: str | None

    @property
    def is_map(self) -> bool:
        return self.size is not None


class Layers(Sequence[Layer]):
    """The table of a network's layers in the order of the forward pass; prints as a table, in notebooks too."""

    HEADINGS = ("layer", "kind", "channels", "map", "receptive field / stride / padding", "overwritten by")

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)

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
        return tuple(one for one in self if "Conv" in one.kind and one.is_map)

    def find(self, address: str | int) -> Layer:
        """Return the layer of an address: its path, or n for the n-th convolution (0-based).

        Raises:
            LayerNotFound: there is none; the message names the nearest.
            LayerRefused: the path means several tensors.
        """
        if isinstance(address, int):
            count = len(self.convolutions)
            if not 0 <= address < count:
                raise LayerNotFound(f"there is no convolution {address}: the network has {count}, 0 to {count - 1}")
            return self.convolutions[address]
        by_path = {one.path: one for one in self} | {one.path.lstrip("."): one for one in self}
        if address in by_path:
            return by_path[address]
        several = [one.path for one in self if one.place.path == address.lstrip(".")]
        if several:
            raise LayerRefused(
                f"{address!r} stands for {len(several)} results; choose one of: {', '.join(several[:8])}"
            )
        near = nearest(address, [one.path for one in self])
        raise LayerNotFound(f"there is no layer {address!r}; the nearest are: {near} (`phosphene layers` lists all)")

    def matching(self, pattern: str) -> Layers:
        """Return the layers whose path matches a glob such as `features.*`.

        Raises:
            LayerNotFound: none does.
        """
        found = [one for one in self if fnmatch.fnmatchcase(one.path, pattern)]
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
class Sighting:
    """One tensor that a module returned during the survey."""

    place: Place
    kind: str
    shape: tuple[int, ...]
    field: Field | None
    storage: int


def survey(run: Callable[[Tensor], Any], module: nn.Module, modules: Mapping[str, nn.Module], image: Tensor) -> Layers:
    """Run a network once on `image` (1, c, h, w) and return the table of what every module returned.

    A module that runs several times has one row a call, `path@0`, `path@1` …; one that returns several tensors has
    one row a tensor, `path#0`, `path#logits` …; an all-digit path gets a leading dot, for a bare integer means the n-th
    convolution. The module is left as it was.
    """
    calls: Counter[str] = Counter()
    sightings: list[Sighting] = []
    held: list[Tensor] = []  # a freed tensor's storage address may be given to another

    with borrowed(module), torch.no_grad():
        tracer = Tracer(image)

        def see(path: str, output: Any) -> None:
            for part, tensor in parts(output).items():
                place = Place(path, calls[path], part)
                kind, storage = type(modules[path]).__name__, tensor.untyped_storage().data_ptr()
                sightings.append(Sighting(place, kind, tuple(tensor.shape), tracer.field(tensor), storage))
                held.append(tensor)
            calls[path] += 1

        with watch(modules, see), tracer:
            run(image)
    pieces = Counter((one.place.path, one.place.call) for one in sightings)
    return Layers(
        [
            describe(one, calls[one.place.path] > 1, pieces[one.place.path, one.place.call] > 1, tracer)
            for one in sightings
            if one.place.path
        ]
    )


def describe(seen: Sighting, repeated: bool, several: bool, tracer: Tracer) -> Layer:
    """Return the row of one sighting."""
    path = f".{seen.place.path}" if seen.place.path.isdigit() else seen.place.path
    path += f"@{seen.place.call}" if repeated else ""
    path += f"#{seen.place.part}" if several else ""
    is_map = len(seen.shape) == 4
    sees, field = receptive_field(seen.field)
    return Layer(
        path=path,
        place=seen.place,
        kind=seen.kind,
        channels=seen.shape[1] if len(seen.shape) in (2, 4) else None,
        size=(seen.shape[2], seen.shape[3]) if is_map else None,
        receptive_field=field,
        sees=sees,
        in_place=tracer.overwritten.get(seen.storage),
    )


def receptive_field(field: Field | None) -> tuple[str, ReceptiveField | None]:
    """Return ("part", its figures), ("whole", None) or ("unknown", None)."""
    if field is None:
        return "unknown", None
    if any(side.whole for side in field.sides):
        return "whole", None
    down, right = field.sides
    figures = ReceptiveField(
        (down.size, right.size),
        (float(down.stride), float(right.stride)),
        (float(-down.start), float(-right.start)),
    )
    return "part", figures
