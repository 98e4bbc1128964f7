"""Keeping what was read of late: no more than so much of it, and each for so many seconds."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class CacheEntry(NamedTuple, Generic[T]):
    """Something kept: how much it counts, and until when it is taken as it is."""

    value: T
    size: int
    until: float


class SizedCache(Generic[T]):
    """What was read of late, by key. Threads may share one.

    Attributes:
        most: the sum of sizes that is kept; what was asked for longest ago goes first.
        seconds: after which something is read again.
    """

    def __init__(self, most: int, seconds: float = math.inf) -> None:
        self.most, self.seconds = most, seconds
        self.held: OrderedDict[Hashable, CacheEntry[T]] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Hashable, read: Callable[[T | None], tuple[T, int]]) -> T:
        """Return what is kept, or what `read` returns with its size; it is given what was kept before, if anything."""
        with self.lock:
            before = self.held.get(key)
            if before and monotonic() < before.until:
                self.held.move_to_end(key)
                return before.value
        value, size = read(before.value if before else None)  # two threads may both, which costs time alone
        with self.lock:
            self.held[key] = CacheEntry(value, size, monotonic() + self.seconds)
            self.held.move_to_end(key)
            total = sum(one.size for one in self.held.values())
            while total > self.most and len(self.held) > 1:
                total -= self.held.popitem(last=False)[1].size
        return value
