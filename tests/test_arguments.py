"""Checks of arguments: numbers of any library are accepted, and a refusal names the argument and its bounds."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from phosphene.arguments import finite_number, indices, whole_number
from phosphene.errors import InvalidRequest


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_a_whole_number_of_any_library_becomes_an_int(value: Any) -> None:
    number = whole_number(value, "workers", 3, 3)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [True, False, 3.0, "3", None, [3], torch.tensor(3.0), float("nan")])
def test_a_value_that_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^workers is a whole number of at least 0, not "):
        whole_number(value, "workers")


def test_a_whole_number_out_of_bounds_is_refused() -> None:
    for number, least, most, message in (
        (0, 1, None, "of at least 1, not 0"),
        (-1, 0, None, "of at least 0, not -1"),
        (9, 2, 8, "from 2 to 8, not 9"),
        (1, 2, 8, "from 2 to 8, not 1"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            whole_number(number, "the size", least, most)
        assert str(caught.value) == f"the size is a whole number {message}"


@pytest.mark.parametrize("value", [0.5, Fraction(1, 2), np.float64(0.5), np.float32(0.5)])
def test_a_finite_number_becomes_a_float(value: Any) -> None:
    number = finite_number(value, "a factor is a number")
    assert (number, type(number)) == (0.5, float)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), True, "0.5", 1j, None])
def test_a_value_that_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        finite_number(value, "a factor is a number")
    assert str(caught.value) == f"a factor is a number, not {value!r}"


def test_indices_are_an_index_or_several() -> None:
    assert indices(7, "channel") == [7]
    assert indices(range(2, 8, 3), "channel") == [2, 5]
    assert indices(np.array([4, 0, 4]), "channel") == [4, 0, 4]
    assert indices(torch.tensor([1, 2]), "channel") == [1, 2]


def test_indices_that_are_none_or_negative_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^no class was chosen; give at least one$"):
        indices([], "class")
    with pytest.raises(InvalidRequest, match=r"^a class is a whole number of at least 0, not -1$"):
        indices([3, -1], "class")
