"""The model handle, and the one convention for tensors.

Images are (b, c, h, w), floating, in [0, 1], RGB where c = 3; any c is allowed. Activations are (b, c, h, w) for maps
and (b, c) for vectors. Kernels are (out, in, kh, kw). Mean and standard deviation, BGR, 0..255: all that is the
handle's business, inside `Model.forward`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.capture import Place, borrowed, capture, parts
from phosphene.errors import InvalidRequest, LayerRefused, PhospheneError, SizeRefused, WeightsRefused
from phosphene.layers import Layer, Layers, survey


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants done to an image in [0, 1]: (image - mean) / std a channel, RGB turned to BGR if `bgr`."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    bgr: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(numbers, dtype=torch.float64).to(image).view(-1, 1, 1) for numbers in (self.mean, self.std)
        )
        ready = (image - mean) / std
        return ready.flip(1) if self.bgr else ready


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen handle on a network. The module stays the user's: it is never changed.

    Attributes:
        module: the network.
        name: how to speak of it; `ref` is how to load it again, None for an object that only lives here.
        input_size: (h, w) that its full forward pass takes.
        channels_in: channels of its images.
        preprocessing: image (b, c, h, w) in [0, 1] -> what the module takes.
        labels: class names by index, empty where unknown.
        notes: what the user should know about how it was loaded.
        modules: every addressable module by path; `""` is the whole network.
    """

    module: nn.Module
    name: str
    input_size: tuple[int, int]
    channels_in: int = 3
    preprocessing: Callable[[Tensor], Tensor] = Preprocessing()
    labels: Sequence[str] = ()
    ref: str | None = None
    notes: tuple[str, ...] = ()
    modules: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.modules:
            object.__setattr__(self, "modules", dict(self.module.named_modules()))

    @property
    def like(self) -> Tensor:
        """An empty tensor of the device and floating dtype that the network computes in."""
        weights = (one for one in (*self.module.parameters(), *self.module.buffers()) if one.is_floating_point())
        first = next(weights, torch.empty(0))
        return torch.empty(0, dtype=first.dtype, device=first.device)

    def forward(self, image: Tensor) -> Any:
        """Return what the network makes of an image (b, c, h, w) in [0, 1]."""
        return self.module(self.preprocessing(image))

    def layers(self) -> Layers:
        """Return the table of the network's layers, from one forward pass at `input_size`."""
        return self._layers

    @cached_property
    def _layers(self) -> Layers:
        image = torch.full((1, self.channels_in, *self.input_size), 0.5).to(self.like)
        try:
            return survey(self.forward, self.module, self.modules, image)
        except RuntimeError as error:
            raise SizeRefused(
                f"{self.name} does not take a picture of {self.channels_in}×{self.input_size[0]}×{self.input_size[1]}: "
                f"{first_line(error)}; say what it takes (--input-size, --channels-in)"
            ) from error

    def find(self, address: str | int) -> Layer:
        """Return the layer of an address; see `Layers.find`."""
        return self.layers().find(address)

    @contextmanager
    def reading(self, addresses: Sequence[str | int]) -> Iterator[Callable[[Tensor], dict[str | int, Tensor]]]:
        """Borrow the network and yield `read(image)`: the tensors at the addresses, `""` being the network's output.

        The forward pass stops at the last of them. The module is given back as it was.
        """
        places: dict[Any, Place] = {one: Place("") if one == "" else self.find(one).place for one in addresses}
        if "" in places:
            places[""] = Place("", part=self.output_part)
        modules = {place.path: self.modules[place.path] for place in places.values()}
        with borrowed(self.module), capture(self.forward, modules, places) as read:
            yield read

    @cached_property
    def output_part(self) -> str:
        """Which tensor of what the network returns is its class scores: the bare one, or `logits`.

        Raises:
            LayerRefused: it returns several and none is called so.
        """
        image = torch.full((1, self.channels_in, *self.input_size), 0.5).to(self.like)
        with borrowed(self.module), torch.no_grad():
            found = parts(self.forward(image))
        if len(found) == 1:
            return next(iter(found))
        if "logits" in found:
            return "logits"
        raise LayerRefused(f"{self.name} returns several tensors ({', '.join(found)}); name the layer that you mean")

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the weights' names, shapes, dtypes and bytes, 16 hexadecimal digits of it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def check_finite(self) -> None:
        """Refuse weights with NaN or infinity.

        Raises:
            WeightsRefused: the message names the first layer that has any.
        """
        for name, tensor in self.module.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise WeightsRefused(
                    f"the weights of {self.name} are damaged: {name} holds {count} values that are NaN or infinite; "
                    "load a sound file"
                )

    def check_takes(self, read: Callable[[Tensor], Any], size: tuple[int, int]) -> None:
        """Run one image of `size` through an open `reading`, and refuse the size where that fails.

        Raises:
            SizeRefused: the network does not take it.
        """
        try:
            with torch.no_grad():
                acts = read(torch.full((1, self.channels_in, *size), 0.5).to(self.like))
        except PhospheneError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            raise self.size_error(size, first_line(error)) from error
        for address, act in acts.items():
            if act.numel() == 0:
                raise self.size_error(size, f"nothing is left of it at {address!r}")

    def size_error(self, size: tuple[int, int], reason: str) -> SizeRefused:
        usual = "×".join(map(str, self.input_size))
        return SizeRefused(
            f"{self.name} does not take a picture of {size[0]}×{size[1]} px ({reason}); its usual size is {usual}, "
            "give another with --size"
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def parse_channels(text: str, count: int) -> list[int]:
    """Return the channels that `0:64`, `3,7,11`, `0:8,20` or `all` mean, for a layer that has `count`.

    Raises:
        InvalidRequest: the text is none of these, or chooses nothing.
    """
    chosen: list[int] = []
    for piece in text.split(","):
        if piece.strip() == "all":
            chosen += range(count)
            continue
        try:
            bounds = [int(bound) if bound.strip() else None for bound in piece.split(":")]
        except ValueError:
            bounds = []
        if len(bounds) == 1 and bounds[0] is not None:
            chosen.append(bounds[0])
        elif len(bounds) in (2, 3):
            stop = count if bounds[1] is None else bounds[1]
            chosen += range(bounds[0] or 0, stop, (bounds[2] if len(bounds) == 3 else 1) or 1)
        else:
            raise InvalidRequest(f"channels are given as 0:64, 3,7,11 or all, not {text!r}")
    if not chosen:
        raise InvalidRequest(f"the channels {text!r} choose nothing")
    return chosen
