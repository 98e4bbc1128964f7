"""The batch normalisations that could be folded into the convolutions before them, as one forward pass shows it.

Folding is right only if nothing else reads what the convolution returned, or uses its weights. A `FoldingObserver`
watches a forward pass and notes which operation made, read and changed which tensor; from that it returns the pairs.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from phosphene.network.operation_observer import OperationObserver, flat_tensors, operation_name, storage_address

# the arguments of an operation that have to be a module's own, and their positions; position 0 is the input
CONVOLUTION = {"weight": 1, "bias": 2}
NORM = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
NORMS = {
    "native_batch_norm": {**NORM, "training": 5, "eps": 7},
    "_native_batch_norm_legit_no_training": {**NORM, "eps": 6},
}
KINDS = {"convolution": CONVOLUTION, **NORMS}
# operations that hand a tensor's value to Python, whose control flow may depend on it
VALUE_READING_OPERATIONS = ("_local_scalar_dense", "equal")


@dataclass(frozen=True)
class ConvNormPair:
    """The paths of a convolution and of the batch normalisation that is the only reader of its output."""

    convolution: str
    norm: str
    between: frozenset[str]  # of all modules that return the tensor between the two, the convolution included

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all modules whose output changes, if only within rounding, once the two are folded."""
        return self.between | {self.norm}


@dataclass(eq=False)
class Operation:
    """One operation of a forward pass, and those of its arguments that may be a module's own."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def uses_weights_of(self, module: nn.Module) -> bool:
        """Return whether it used the module's own weights and settings, unchanged."""
        values = {**vars(module), **module._buffers, **module._parameters}
        return bool(self.arguments) and all(
            value is values.get(name) if value is None or isinstance(value, Tensor) else value == values.get(name)
            for name, value in self.arguments.items()
        )


@dataclass(eq=False)
class TensorStorage:
    """What happened to the memory of a tensor and its views since it was made."""

    owner: nn.Module | None = None  # the first module that returned it, if no other operation had used it by then
    users: list[Operation] = field(default_factory=list)  # that read or wrote it
    paths: list[str] = field(default_factory=list)  # of the modules that returned it


class FoldingObserver(OperationObserver):  # type: ignore[no-untyped-call]
    """While active, notes which operation made each tensor and which used it, even through a view of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, TensorStorage] = {}  # by address; the last tensor there
        self.results: dict[Operation, TensorStorage] = {}  # of convolutions and normalisations
        self.reads_values = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = operation_name(func)
        self.reads_values |= name in VALUE_READING_OPERATIONS
        positions = KINDS.get(name, {})
        operation = Operation(name, {key: args[index] for key, index in positions.items() if index < len(args)})
        used = {storage_address(tensor) for tensor in flat_tensors([*args, *kwargs.values()])}
        for address in used:
            self.storages.setdefault(address, TensorStorage()).users.append(operation)
        for tensor in flat_tensors([output]):
            if storage_address(tensor) not in used:
                self.storages[storage_address(tensor)] = storage = TensorStorage()
                if name in KINDS:
                    self.results.setdefault(operation, storage)  # the first of a normalisation's three results
        return output

    def record_output(self, path: str, module: nn.Module, tensor: Tensor) -> None:
        """Note that a module returned a tensor."""
        storage = self.storages.setdefault(storage_address(tensor), TensorStorage())
        if not storage.users and not storage.paths:
            storage.owner = module
        storage.paths.append(path)

    def pairs(self) -> tuple[ConvNormPair, ...]:
        """Return what can be folded; nothing if the network's control flow may depend on values."""
        pairs = (self.pair(operation, storage) for operation, storage in self.results.items())
        return () if self.reads_values else tuple(pair for pair in pairs if pair)

    def pair(self, convolution: Operation, between: TensorStorage) -> ConvNormPair | None:
        """Return the pair that begins with an operation, None if there is none or it cannot be folded."""
        if convolution.name in NORMS or len(between.users) != 1:
            return None
        norm = between.users[0]
        result = self.results.get(norm)
        if result is None or norm.name not in NORMS or not between.owner or not result.owner:
            return None
        unchanged = convolution.uses_weights_of(between.owner) and norm.uses_weights_of(result.owner)
        if not unchanged or not self.only_user(convolution) or not self.only_user(norm):
            return None
        return ConvNormPair(between.paths[0], result.paths[0], frozenset(between.paths))

    def only_user(self, operation: Operation) -> bool:
        """Return whether no other operation used the weights of this one."""
        return all(
            self.storages[storage_address(value)].users == [operation]
            for value in operation.arguments.values()
            if isinstance(value, Tensor)
        )
