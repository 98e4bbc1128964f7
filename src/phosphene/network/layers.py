"""The layers of a network: their addresses, and the table of what each returns."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, overload

from phosphene.errors import LayerNotFound, LayerRefused, nearest
from phosphene.network.batchnorm_pairs import ConvNormPair
from phosphene.network.capture import TensorAddress


@dataclass(frozen=True)
class ReceptiveField:
    """How much of the input image one position of a map sees, (down, right), in input pixels.

    Position i sees the pixels from `i · stride - padding` to `i · stride - padding + size - 1`, as far as these lie
    on the image. At stride 0 all positions see the same.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __str__(self) -> str:
        pairs = (self.size, self.stride, self.padding)
        return " / ".join(str(down) if down == right else f"{down}×{right}" for down, right in pairs)


@dataclass(frozen=True)
class Layer:
    """The frozen address of one tensor in a network's forward pass, and what is known about it.

    Attributes:
        path: what the user types.
        tensor_address: the module, call and part that `path` means.
        kind: the module's class name, and the activation function that it ends in if that is no module of its own.
        convolution: whether it is a two-dimensional convolution, which an integer address counts.
        channels: channels of a map (b, c, h, w), numbers of a vector (b, c); None for anything else.
        size: (h, w) of the map, None if it is not a map.
        receptive_field: None if it is the whole image or unknown; `sees` says which.
        sees: how much of the image an entry depends on: "part", "whole" or "unknown".
        in_place: the operation that overwrites what this layer returned, None if nothing does.
    """

    path: str
    tensor_address: TensorAddress
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
    def field_size(self) -> list[int] | str:
        """How much of the image an entry sees: [down, right] in pixels, "whole" or "unknown"; in JSON terms."""
        return list(self.receptive_field.size) if self.receptive_field else self.sees

    @property
    def spellings(self) -> tuple[str, ...]:
        """The path with and without the leading dot that marks a path of digits alone."""
        return (self.path, self.path.removeprefix("."))

    def to_json(self) -> dict[str, Any]:
        """Return the layer as JSON values, without `tensor_address`."""
        return {key: value for key, value in asdict(self).items() if key != "tensor_address"}


class Layers(Sequence[Layer]):
    """The layers of a network in the order of the forward pass; prints as a table, in notebooks too.

    `inner_layers` are tensors inside layers, such as `conv1#preactivation`, which have an address but no row; `pairs`
    are the convolutions that can do the work of the batch normalisation after them.
    """

    HEADINGS = ("layer", "kind", "channels", "map", "receptive field / stride / padding", "overwritten by")

    def __init__(
        self, layers: Sequence[Layer], inner_layers: Sequence[Layer] = (), pairs: Sequence[ConvNormPair] = ()
    ) -> None:
        self._layers = tuple(layers)
        self.inner_layers = tuple(inner_layers)
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
        return tuple(layer for layer in self if layer.convolution)

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
        layers = (*self._layers, *self.inner_layers)
        by_path = {path: layer for layer in layers for path in layer.spellings}
        if address in by_path:
            return by_path[address]
        paths = [layer.path for layer in layers if layer.tensor_address.path == address.lstrip(".")]
        if paths:
            raise LayerRefused(f"{address!r} stands for {len(paths)} results; choose one of: {', '.join(paths[:8])}")
        near = nearest(address, [layer.path for layer in (layers if "#" in address else self._layers)])
        raise LayerNotFound(f"there is no layer {address!r}; the nearest are: {near} (`phosphene layers` lists all)")

    def matching(self, pattern: str) -> Layers:
        """Return the layers whose path matches a glob such as `features.*`, or the one with exactly this path.

        Raises:
            LayerNotFound: none does.
        """
        layers = (*self._layers, *self.inner_layers) if "#" in pattern else self._layers
        exact = [layer for layer in layers if pattern in layer.spellings]
        matches = exact or [
            layer for layer in layers if any(fnmatch.fnmatchcase(path, pattern) for path in layer.spellings)
        ]
        if not matches:
            near = nearest(pattern.rstrip("*"), [layer.path for layer in self])
            raise LayerNotFound(f"no layer matches {pattern!r}; the nearest are: {near}")
        return Layers(matches)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells as text, one row per layer."""
        return [
            (
                layer.path,
                layer.kind,
                "" if layer.channels is None else str(layer.channels),
                "" if layer.size is None else "×".join(map(str, layer.size)),
                str(layer.receptive_field or ("whole image" if layer.sees == "whole" else "?")),
                layer.in_place or "",
            )
            for layer in self
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the table as JSON values."""
        return [layer.to_json() for layer in self]

    def __repr__(self) -> str:
        rows = [self.HEADINGS, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.HEADINGS))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def escape_digits(path: str) -> str:
    """Return a module's path as the user types it; a bare number would mean the n-th convolution."""
    return f".{path}" if path.isdigit() else path


def file_prefix(layers: Sequence[str]) -> str:
    """Return `layer_<layer>` for file names, with `_` in place of characters that a file name cannot hold."""
    name = "_".join(layers) or "output"
    return "layer_" + "".join(letter if letter.isalnum() or letter in "._-@#" else "_" for letter in name)
