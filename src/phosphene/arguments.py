"""Checks of arguments that many functions share: each returns the value as a Python number, or refuses it."""

import math
import operator
from collections.abc import Iterable
from numbers import Real
from reprlib import repr as short
from typing import Any

from phosphene.errors import InvalidRequest


def whole_number(value: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """Return a value as an int; whole numbers of numpy and torch are accepted, True and False are not.

    Args:
        name: the beginning of the error message: "workers", "a channel".
        least, most: the bounds, both included.

    Raises:
        InvalidRequest: it is not a whole number, or out of bounds.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidRequest(f"{name} is a whole number {bounds}, not {short(value)}")
    return number


def finite_number(value: Any, sentence: str) -> float:
    """Return a value as a float.

    Args:
        sentence: the beginning of the error message: "an objective is multiplied by a number".

    Raises:
        InvalidRequest: it is not a real number, or it is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidRequest(f"{sentence}, not {value!r}")
    return float(value)


def indices(chosen: int | Iterable[int], noun: str) -> list[int]:
    """Return the chosen indices as a list.

    Args:
        noun: what the error message calls an index: "channel", "class".

    Raises:
        InvalidRequest: none is chosen, or an index is not a whole number of at least 0.
    """
    numbers: list[Any] = list(chosen) if isinstance(chosen, Iterable) else [chosen]
    if not numbers:
        raise InvalidRequest(f"no {noun} was chosen; give at least one")
    return [whole_number(number, f"a {noun}") for number in numbers]
