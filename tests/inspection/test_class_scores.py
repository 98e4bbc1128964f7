"""Class scores: a class by index or name, and probabilities by hand."""

from __future__ import annotations

import pytest
import torch

from phosphene.errors import ChannelNotFound
from phosphene.inspection.class_scores import class_indices, class_probabilities

LABELS = ("crane", "tabby", "tiger", "tiger cat", "Crane", "great_white shark")


@pytest.mark.parametrize(
    ("target", "index"),
    [("tabby", 1), ("TABBY", 1), ("tiger", 2), ("tiger_cat", 3), ("shark", 5), ("5", 5), (0, 0), (None, 2)],
)
def test_a_class_by_index_or_name(target: int | str | None, index: int) -> None:
    assert class_indices(target, torch.tensor([[0.0, 0, 9, 0, 0, 0]]), LABELS) == [index]


def test_a_class_name_that_is_a_number_is_a_name() -> None:
    assert class_indices("1", torch.zeros(1, 3), ("2", "1", "0")) == [1]
    assert class_indices("2", torch.zeros(1, 3), ("2", "1", "0")) == [0]


@pytest.mark.parametrize(
    ("target", "labels", "message"),
    [
        ("taby", LABELS, "no class is called 'taby'; the nearest are: tabby"),
        ("cat", ("cats", "tomcat"), "'cat' may be any of 2 classes: 0 cats, 1 tomcat"),
        ("crane", LABELS, "'crane' may be any of 2 classes: 0 crane, 4 Crane"),
        ("cat", (), "no class names to find 'cat' among; give an index, 0 to 5"),
        ("", LABELS, "no class is called ''"),
        (6, LABELS, "there is no class 6: the network has 6, 0 to 5"),
        (-1, LABELS, "there is no class -1"),
        (True, LABELS, "there is no class True"),
        ("77", LABELS, "there is no class 77"),
    ],
)
def test_a_class_that_is_none_or_several(target: int | str, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ChannelNotFound, match=message):
        class_indices(target, torch.zeros(1, 6), labels)


def test_probabilities_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0986123]])
    torch.testing.assert_close(class_probabilities(logits, ()), torch.tensor([[0.25, 0.75]]))
    single = torch.tensor([[-1.0986123]])
    torch.testing.assert_close(class_probabilities(single, ()), torch.tensor([[0.25]]))
    torch.testing.assert_close(class_probabilities(single, ("cat", "dog")), torch.tensor([[0.75, 0.25]]))
    already = torch.tensor([[0.1, 0.9]])
    assert class_probabilities(already, ()) is already
