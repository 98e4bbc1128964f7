"""Watching the tensor operations of a forward pass: what any observer of them needs."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperationObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode whose subclasses define `__torch_dispatch__`, which every tensor operation passes through while active."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have PyTorch leave `__torch_dispatch__` as it is: its wrapper imports the compiler, which takes seconds."""
        return False


def operation_name(operation: Any) -> str:
    """Return the name of an operation without its namespace and overload, such as `relu_`."""
    return str(operation._schema.name.split("::")[-1])


def storage_address(tensor: Tensor) -> int:
    """Return where the memory of a tensor starts, which its views share."""
    return tensor.untyped_storage().data_ptr()


def flat_tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat_tensors(value)
