"""The error tree: each message names the request, the alternatives, and what to do next.

Every error is a `PhospheneError` and also the builtin exception that fits it, so that callers can catch it without
knowing this module. The command line turns a `PhospheneError` into one sentence and exit code 2.
"""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class PhospheneError(Exception):
    """The request could not be carried out."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidRequest(PhospheneError, ValueError):
    """An argument has a value that is not allowed."""


class ModelNotFound(PhospheneError, LookupError):
    """No model has that reference."""


class ModelRefused(PhospheneError, ValueError):
    """The model exists, but Phosphene cannot show it."""


class LayerNotFound(PhospheneError, KeyError):
    """The model has no layer with that address."""


class LayerRefused(PhospheneError, ValueError):
    """The layer exists, but what it returns does not fit the request."""


class ChannelNotFound(PhospheneError, IndexError):
    """The layer has no such channel, or the network no such class."""


class RecipeNotFound(PhospheneError, KeyError):
    """No recipe has that name."""


class SizeRefused(PhospheneError, ValueError):
    """The network does not take a picture of that size."""


class WeightsRefused(PhospheneError, ValueError):
    """A weights file is missing, damaged, of another network, or wants to run code; or weights are not finite."""


class PhotoRefused(PhospheneError, ValueError):
    """The file is not a photo that can be read."""


class OutputRefused(PhospheneError, OSError):
    """The results cannot be written to that file, folder or URL."""


class StoreRefused(PhospheneError, ValueError):
    """The folder or URL is no store, or the store has a newer format, is damaged, or cannot be read."""


class EntryNotFound(PhospheneError, LookupError):
    """The store has no such entry yet, or the entry no such file."""


class ExtraMissing(PhospheneError, ImportError):
    """An optional package is not installed."""


class OutOfMemory(PhospheneError, MemoryError):
    """Not even a single picture fits into the memory."""


class Unfinished(PhospheneError, RuntimeError):
    """The work failed before its end; `finished` holds the results up to then, or None."""

    def __init__(self, message: str, finished: object = None) -> None:
        super().__init__(message)
        self.finished = finished


class Interrupted(Unfinished, KeyboardInterrupt):
    """The user stopped the work; `finished` holds the results up to then, or None."""


def nearest(name: str, names: Iterable[str], count: int = 5) -> str:
    """Return the `count` names most like `name`, joined for an error message; the first ones if none is alike."""
    candidates = list(names)
    matches = difflib.get_close_matches(name, candidates, n=count, cutoff=0.5)
    return ", ".join(matches or candidates[:count])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def require_extra(module: str, extra: str) -> Any:
    """Return an optional module, which an extra of this package installs.

    Raises:
        ExtraMissing: it cannot be imported; the message has the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        problem = "is not installed" if error.name == package else f"cannot be imported ({first_line(error)})"
        advice = f"install it with: pip install 'phosphene[{extra}]'"
        raise ExtraMissing(f"{package} {problem}; {advice}") from error
