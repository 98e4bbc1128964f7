"""Observing operations: names, storages and nested tensors."""

from __future__ import annotations

from typing import Any

import torch

from phosphene.network.operation_observer import OperationObserver, flat_tensors, operation_name, storage_address


class Names(OperationObserver):  # type: ignore[no-untyped-call]
    """Notes the names of the operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operation_name(func))
        return func(*args, **(kwargs or {}))


def test_every_operation_is_seen_by_its_plain_name() -> None:
    with Names() as observer:
        torch.ones(2).add(1).relu_()
    assert observer.names == ["ones", "add", "relu_"]


def test_views_share_a_storage_and_copies_do_not() -> None:
    tensor = torch.arange(6)
    assert storage_address(tensor[3:]) == storage_address(tensor.view(2, 3).T) == storage_address(tensor)
    assert storage_address(tensor.clone()) != storage_address(tensor)


def test_tensors_are_found_in_nested_lists_and_tuples_in_order() -> None:
    first, second, third = torch.zeros(3, 1)
    assert [
        tensor is expected
        for tensor, expected in zip(
            flat_tensors([first, 2, (None, [second]), "text", [[third]]]), (first, second, third), strict=True
        )
    ] == [True] * 3
