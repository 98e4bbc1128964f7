"""A cache of what was read recently, bounded by a total size and, if asked for, by the age of each entry."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class CacheEntry(NamedTuple, Generic[T]):
    """A cached value, its size, and the time at which it expires."""

    value: T
    size: int
    expires: float


class SizedCache(Generic[T]):
    """Values that were read recently, by key. Threads may share one.

    Attributes:
        max_size: the largest sum of sizes; the entry used longest ago goes first, and the newest always stays.
        seconds: after which a value is read again.
    """

    def __init__(self, max_size: int, seconds: float = math.inf) -> None:
        self.max_size, self.seconds = max_size, seconds
        self.entries: OrderedDict[Hashable, CacheEntry[T]] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Hashable, read: Callable[[T | None], tuple[T, int]]) -> T:
        """Return the cached value, or else what `read` returns with its size; `read` is given the expired value."""
        with self.lock:
            before = self.entries.get(key)
            if before and monotonic() < before.expires:
                self.entries.move_to_end(key)
                return before.value
        value, size = read(before.value if before else None)  # two threads may read at once, which only costs time
        with self.lock:
            self.entries[key] = CacheEntry(value, size, monotonic() + self.seconds)
            self.entries.move_to_end(key)
            total = sum(entry.size for entry in self.entries.values())
            while total > self.max_size and len(self.entries) > 1:
                total -= self.entries.popitem(last=False)[1].size
        return value
