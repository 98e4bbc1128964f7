"""The model handle, and the one convention for tensors.

Images are (b, c, h, w), floating, in [0, 1], RGB where c = 3; any c is allowed. Activations are (b, c, h, w) for maps
and (b, c) for vectors. Kernels are (out, in, kh, kw). Only the handle deals with mean
and standard deviation, BGR and 0..255: inside `Model.forward`.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.errors import InvalidRequest, LayerRefused, PhospheneError, SizeRefused, WeightsRefused, first_line
from phosphene.images.photo import MIDDLE, Fit, Region
from phosphene.network.batchnorm_folding import BatchNormFolding
from phosphene.network.capture import PLAIN, InnerHookPoint, Layout, TensorAddress, borrowed, capture, tensors_in
from phosphene.network.layers import Layer, Layers
from phosphene.network.memory import is_out_of_memory
from phosphene.network.preprocessing import Preprocessing
from phosphene.network.survey import survey
from phosphene.version import __version__


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen handle on a network. The module stays the user's: it is never changed.

    Attributes:
        module: the network.
        name: what messages call it.
        ref: the reference that loads it again, None if a reference is not enough.
        options: the arguments of `load` beside the reference, in JSON terms; the two together load this network again.
        input_size: (h, w) that its full forward pass takes.
        channels_in: channels of its images.
        preprocessing: image (b, c, h, w) in [0, 1] -> what the module takes.
        fit: how a photo is brought to `input_size`; by default its centre crop, scaled by the short side.
        labels: class names by index, empty where unknown.
        logits: the address of the class scores before any softmax or sigmoid, `""` for what the network returns.
        layout: how the network's framework lays out maps and kernels.
        notes: what the user should know about how it was loaded.
        modules: every addressable module by path; `""` is the whole network.
    """

    module: nn.Module
    name: str
    input_size: tuple[int, int]
    channels_in: int = 3
    preprocessing: Callable[[Tensor], Tensor] = field(default_factory=Preprocessing)
    fit: Fit = MIDDLE
    labels: Sequence[str] = ()
    logits: str = ""
    layout: Layout = PLAIN
    ref: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    modules: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.modules:
            object.__setattr__(self, "modules", dict(self.module.named_modules()))

    @property
    def prototype_tensor(self) -> Tensor:
        """An empty tensor of the device and floating dtype that the network computes in."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        first = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
        return torch.empty(0, dtype=first.dtype, device=first.device)

    def forward(self, image: Tensor) -> Any:
        """Return the network's output for images (b, c, h, w) in [0, 1]."""
        return self.module(self.preprocessing(image))

    def fitted(self, photo: Tensor) -> tuple[Tensor, Region]:
        """Return a photo (1, c, h, w) as the network takes it, (1, c, *input_size), and the part of it that is left.

        The image is on the network's device and in its dtype.
        """
        image, region = self.fit(photo, self.input_size)
        return image.to(self.prototype_tensor), region

    def layers(self) -> Layers:
        """Return the table of the network's layers, from one forward pass at `input_size`."""
        return self._layers

    @cached_property
    def _layers(self) -> Layers:
        with self.refusing_size(self.input_size):
            return survey(self.forward, self.module, self.modules, self.grey(self.input_size), self.layout)

    def find(self, address: str | int) -> Layer:
        """Return the layer of an address; see `Layers.find`."""
        return self.layers().find(address)

    @contextmanager
    def reading(
        self, addresses: Sequence[str | int], roots: Sequence[str | int] = (), inputs: Collection[str | int] = ()
    ) -> Iterator[Callable[[Tensor], dict[str | int, Tensor]]]:
        """Borrow the network and yield `read(image)`: the tensors at the addresses, `""` being the network's output.

        The forward pass stops at the last of them. At `roots`, a part of the addresses, the graph of gradients starts:
        a backward pass goes no further down. At `inputs`, a part of the addresses, the layer's input is read in place
        of its output. The module is given back as it was.
        """
        places: dict[Any, TensorAddress] = {
            address: TensorAddress("") if address == "" else self.find(address).tensor_address for address in addresses
        }
        if "" in places:
            places[""] = TensorAddress("", part=self.output_part)
        modules = {place.path: self.modules[place.path] for place in places.values()}
        for address in inputs:
            hook_point = InnerHookPoint(modules[places[address].path], InnerHookPoint.INPUT)
            places[address] = TensorAddress(f"{places[address].path}#{InnerHookPoint.INPUT}", places[address].call)
            modules[places[address].path] = hook_point
        with borrowed(self.module), capture(self.forward, modules, places, self.layout, roots) as read:
            yield read

    def folding(self, addresses: Sequence[str | int]) -> BatchNormFolding:
        """Return the folding that is right, and cheaper, for forward passes that read these addresses alone.

        Call it before `reading`, whose hooks would count as the user's.
        """
        paths = {"" if address == "" else self.find(address).tensor_address.path for address in addresses}
        pairs = [pair for pair in self.layers().pairs if not pair.paths & paths]
        return BatchNormFolding(self.module, self.modules, pairs)

    @cached_property
    def output_part(self) -> str:
        """The name of the class scores among the tensors that the network returns: that of the only one, or `logits`.

        Raises:
            LayerRefused: it returns none, or several of which none has the name `logits`.
        """
        with self.refusing_size(self.input_size), borrowed(self.module), torch.no_grad():
            names = list(tensors_in(self.forward(self.grey(self.input_size))))
        if len(names) == 1:
            return names[0]
        if "logits" in names:
            return "logits"
        returned = f"several tensors ({', '.join(names)})" if names else "no tensor"
        raise LayerRefused(f"{self.name} returns {returned}; name the layer that you mean")

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the weights (names, shapes, dtypes, bytes) and the preprocessing.

        It is computed anew each time, for the network may be trained further while its handle lives.
        """
        plain = isinstance(self.preprocessing, Preprocessing)  # the repr of anything else may hold an address in memory
        digest = hashlib.sha256(repr(self.preprocessing if plain else type(self.preprocessing)).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @property
    def origin(self) -> dict[str, Any]:
        """What every result depends on, in JSON terms: model, how it was loaded, notes, and the versions in use."""
        return {
            "model": self.name,
            "options": dict(self.options),
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
            "versions": {"phosphene": __version__, "torch": torch.__version__},
        }

    def check_photo(self, photo: Tensor) -> None:
        """Check that a photo is a floating tensor (1, c, h, w) with the network's number of channels.

        Raises:
            InvalidRequest: it is not.
        """
        channels = self.channels_in
        if photo.dim() != 4 or tuple(photo.shape[:2]) != (1, channels) or not photo.is_floating_point():
            raise InvalidRequest(
                f"a photo for this network is a floating tensor (1, {channels}, height, width) in 0..1, such as "
                f"read(path, channels={channels}) returns, not {tuple(photo.shape)} of {photo.dtype}"
            )

    def check_finite(self) -> None:
        """Check that no weight is NaN or infinite.

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
        """Check that a network takes images of `size`, by running one through an open `reading`.

        Raises:
            SizeRefused: the network does not take it.
        """
        with self.refusing_size(size), torch.no_grad():
            acts = read(self.grey(size))
        for address, act in acts.items():
            if act.numel() == 0:
                raise self.size_error(size, f"nothing is left of it at {address!r}")

    def grey(self, size: tuple[int, int]) -> Tensor:
        """Return one image (1, c, h, w) of 0.5 throughout, on the network's device and in its dtype."""
        return self.prototype_tensor.new_full((1, self.channels_in, *size), 0.5)

    @contextmanager
    def refusing_size(self, size: tuple[int, int]) -> Iterator[None]:
        """Turn any failure of a forward pass, except for a lack of memory, into a refusal of the size.

        Raises:
            SizeRefused: it failed.
        """
        try:
            yield
        except PhospheneError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self.size_error(size, first_line(error)) from error

    def size_error(self, size: tuple[int, int], reason: str) -> SizeRefused:
        """Return the error that refuses a size and says what to do next."""
        usual = "×".join(map(str, self.input_size))
        advice = f"its usual size is {usual}, give another with --size"
        if size == self.input_size:
            advice = "say what it takes (--input-size, --channels-in)"
        shape = "×".join(map(str, (self.channels_in, *size)))
        return SizeRefused(f"{self.name} does not take a picture of {shape} px ({reason}); {advice}")
