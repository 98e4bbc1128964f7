"""Folding batch normalisations into the convolutions before them, for the length of a forward pass.

With the statistics of the training, a batch normalisation multiplies each channel by one number and adds another. A
convolution whose weights are multiplied so, and whose bias is changed so, returns the same within rounding, and the
pass over the map is saved (Jacob 2018, arXiv:1712.05877, section 3.2).

That is right only where nothing else looks at what the convolution returned, or uses its weights. So a `Witness`
watches the survey's forward pass, in which it sees which operation made, read and changed what; a `Pair` is what it
vouches for. `Folding` holds the folded weights and puts them in the modules' place while a pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.utils._python_dispatch import TorchDispatchMode

from phosphene.network.receptive_field_tracer import flat_tensors, storage_address

# which arguments of an operation have to be a module's own; the first is what the module was given
CONVOLUTION = {"weight": 1, "bias": 2}
NORM = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
NORMS = {
    "native_batch_norm": {**NORM, "training": 5, "eps": 7},
    "_native_batch_norm_legit_no_training": {**NORM, "eps": 6},
}
KINDS = {"convolution": CONVOLUTION, **NORMS}
VALUE_READING_OPERATIONS = (
    "_local_scalar_dense",
    "equal",
)  # what tells a value to Python, which may go another way for it
EXACT_DTYPES = (torch.float32, torch.float64)  # in the others, rounding the weights anew would show


@dataclass(frozen=True)
class ConvNormPair:
    """A convolution and the batch normalisation that alone takes what it returns.

    Attributes:
        convolution: the path of its module; `norm` likewise.
        between: the paths of all modules that return what passes between the two, the convolution's included.
    """

    convolution: str
    norm: str
    between: frozenset[str]

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all modules that return something else, or that within rounding, once the two are folded."""
        return self.between | {self.norm}


@dataclass(eq=False)
class Operation:
    """One operation of a forward pass, and those of its arguments that may be a module's own."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)

    def is_of(self, module: nn.Module) -> bool:
        """Return whether the module's own weights and settings, as they are, went into it."""
        own = {**vars(module), **module._buffers, **module._parameters}
        return bool(self.given) and all(
            value is own.get(name) if value is None or isinstance(value, Tensor) else value == own.get(name)
            for name, value in self.given.items()
        )


@dataclass(eq=False)
class TensorStorage:
    """What happened to the memory of a tensor and its views since it was made, and which modules returned it.

    Attributes:
        maker: None where it was there before, such as weights.
        owner: the module that returned it as its maker had made it, the first that did.
    """

    maker: Operation | None = None
    owner: nn.Module | None = None
    users: list[Operation] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


class FoldingObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, notes which operation made each tensor and which used it, be it through a view of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See `Tracer`."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories: dict[int, TensorStorage] = {}  # by address; reused ones mean the last tensor there
        self.made: dict[Operation, TensorStorage] = {}
        self.decides = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        self.decides |= name in VALUE_READING_OPERATIONS
        given = {key: args[index] for key, index in KINDS.get(name, {}).items() if index < len(args)}
        operation = Operation(name, given)
        used = {storage_address(one) for one in flat_tensors([*args, *kwargs.values()])}
        for place in used:
            self.memories.setdefault(place, TensorStorage()).users.append(operation)
        for one in flat_tensors([output]):
            if storage_address(one) not in used:
                self.memories[storage_address(one)] = memory = TensorStorage(operation)
                if name in KINDS:
                    self.made.setdefault(operation, memory)  # the first of a normalisation's three results
        return output

    def show(self, path: str, module: nn.Module, tensor: Tensor) -> None:
        """Note that a module returned a tensor."""
        memory = self.memories.setdefault(storage_address(tensor), TensorStorage())
        if not memory.users and not memory.paths:
            memory.owner = module
        memory.paths.append(path)

    def pairs(self) -> tuple[ConvNormPair, ...]:
        """Return what can be folded; nothing in a network whose way depends on values."""
        found = (self.pair(first, memory) for first, memory in self.made.items())
        return () if self.decides else tuple(one for one in found if one)

    def pair(self, first: Operation, between: TensorStorage) -> ConvNormPair | None:
        """Return the pair that begins with an operation, None where it cannot be folded."""
        if first.name in NORMS or len(between.users) != 1:
            return None
        then = between.users[0]
        after = self.made.get(then)
        if after is None or then.name not in NORMS or not between.owner or not after.owner:
            return None
        alone = self.alone(first) and self.alone(then) and first.is_of(between.owner) and then.is_of(after.owner)
        return ConvNormPair(between.paths[0], after.paths[0], frozenset(between.paths)) if alone else None

    def alone(self, operation: Operation) -> bool:
        """Return whether the weights that went into an operation went into no other."""
        return all(
            self.memories[storage_address(one)].users == [operation]
            for one in operation.given.values()
            if isinstance(one, Tensor)
        )


class BatchNormFolding:
    """The folded weights of the pairs of a network that can be folded now.

    The network has to be in evaluation mode. The weights are computed when first needed, and again once those of the
    network have changed.
    """

    def __init__(self, root: nn.Module, modules: Mapping[str, nn.Module], pairs: Iterable[ConvNormPair]) -> None:
        able = [one for one in pairs if is_foldable(root, modules, one)]
        self.pairs = [(modules[one.convolution], modules[one.norm]) for one in able]
        self.known: list[FoldedWeights | None] = []
        self.versions: list[int] = []

    def weights(self) -> Sequence[FoldedWeights | None]:
        """Return what replaces each pair, None where it would not be finite."""
        versions = [own._version for pair in self.pairs for one in pair for own in tensors(one)]
        if versions != self.versions:
            self.known = [fold(*pair) for pair in self.pairs]
            self.versions = versions
        return self.known

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Have the convolutions do the work of the normalisations inside, and leave all modules as they were."""
        chosen = [(*pair, new) for pair, new in zip(self.pairs, self.weights(), strict=True) if new]
        before = [{name: one._parameters[name] for name in new.weights} for one, _, new in chosen]
        try:
            for convolution, norm, new in chosen:
                convolution._parameters.update(new.weights)
                vars(norm)["forward"] = new.rest  # found before the class's own; hooks still run
            yield
        finally:
            for (convolution, norm, _), old in zip(chosen, before, strict=True):
                convolution._parameters.update(old)
                vars(norm).pop("forward", None)


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """What replaces a pair: weights of the convolution by name, and what is left for the normalisation to do."""

    weights: dict[str, nn.Parameter]
    rest: Callable[[Tensor], Tensor]


def as_it_is(input: Tensor) -> Tensor:
    """Return the tensor; its name is what `nn.BatchNorm2d` calls it."""
    return input


def tensors(module: nn.Module) -> list[Tensor]:
    """Return the module's own weights and statistics."""
    return [one for one in (*module._parameters.values(), *module._buffers.values()) if one is not None]


def is_foldable(root: nn.Module, modules: Mapping[str, nn.Module], pair: ConvNormPair) -> bool:
    """Return whether what the survey saw of a pair still holds, and nobody would notice.

    The weights are the modules' own and of an exact type; nobody has replaced a module or its `forward`; and the user
    has no hooks on a module that takes or returns what passes between the two.
    """
    convolution, norm = modules[pair.convolution], modules[pair.norm]
    if not all(is_at(root, path, one) for path, one in ((pair.convolution, convolution), (pair.norm, norm))):
        return False
    if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return False
    values = [one for module in (convolution, norm) for one in tensors(module) if one.is_floating_point()]
    plain = all(type(one) in (Tensor, nn.Parameter) and one.dtype in EXACT_DTYPES for one in values)
    alike = len({(one.dtype, one.device) for one in values}) == 1
    patched = is_patched(convolution) or is_patched(norm)
    watched = any(has_hooks(modules[path]) for path in paths_between(pair) if path in modules)
    return "weight" in convolution._parameters and plain and alike and not patched and not watched


def is_at(root: nn.Module, path: str, module: nn.Module) -> bool:
    try:
        return root.get_submodule(path) is module
    except AttributeError:
        return False


def paths_between(pair: ConvNormPair) -> Collection[str]:
    """Return the paths of the modules that take or return what passes between the two, or may."""
    return {*pair.between, *(path_and_parents(pair.convolution) ^ path_and_parents(pair.norm))}


def path_and_parents(path: str) -> set[str]:
    """Return the path and those of the modules that it lies in, the network itself left out."""
    names = path.split(".")
    return {".".join(names[:count]) for count in range(1, len(names) + 1)}


def is_patched(module: nn.Module) -> bool:
    """Return whether somebody has put another forward pass in the module's own place."""
    return any(name in vars(module) for name in ("forward", "_conv_forward"))


def has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(bool, (*own, of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks)))


def fold(convolution: nn.Module, norm: nn.Module) -> FoldedWeights | None:
    """Return what does the work of both, None where a number of it is not finite.

    The weight (out, in, kh, kw) lies in memory with the channels last. Where a class of its own may leave out a bias
    that it had not, the normalisation adds it.
    """
    own: dict[str, Any] = dict(convolution._parameters)
    scale = to_float64(norm.weight, 1) / (to_float64(norm.running_var) + cast(float, norm.eps)).sqrt()
    shift = (to_float64(own.get("bias"), 0) - to_float64(norm.running_mean)) * scale + to_float64(norm.bias, 0)
    if not bool(torch.isfinite(scale).all() & torch.isfinite(shift).all()):
        return None
    old: Tensor = own["weight"].detach()
    weight = torch.empty_like(old, memory_format=torch.channels_last).copy_(old).mul_(scale.to(old).view(-1, 1, 1, 1))
    weights, shift = {"weight": nn.Parameter(weight, requires_grad=False)}, shift.to(old)
    if own.get("bias") is None and type(convolution) is not nn.Conv2d:
        return FoldedWeights(weights, lambda input: input.add_(shift.view(-1, 1, 1)))  # which nobody else holds
    return FoldedWeights({**weights, "bias": nn.Parameter(shift, requires_grad=False)}, as_it_is)


def to_float64(tensor: Any, otherwise: float = 0.0) -> Tensor:
    """Return a tensor in float64 on the CPU (not every device has float64), a number where there is none."""
    return torch.tensor(otherwise, dtype=torch.float64) if tensor is None else tensor.detach().cpu().double()
