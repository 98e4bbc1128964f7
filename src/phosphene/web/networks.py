"""The networks of atlases, each loaded at first use, in the one thread that uses it."""

from __future__ import annotations

import copy
import re
import shlex
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from phosphene.errors import ModelRefused
from phosphene.loaders import load
from phosphene.model import Model
from phosphene.portrait import SAVED

REFERENCE = re.compile(r"(builtin|torchvision|timm|keras)/[\w.-]+", re.ASCII)
IMPORTED = re.compile(r"[\w.]+:[\w.]+")  # package.module:callable
KEPT = 3  # networks of a thread
LOADING = threading.Lock()


class Bench:
    """A thread, and the networks that only this thread touches; the last ones used are kept."""

    def __init__(self, name: str, open_network: Callable[[Mapping[str, Any]], Model]) -> None:
        self.thread = ThreadPoolExecutor(1, f"phosphene-{name}")
        self.open_network = open_network
        self.models: dict[tuple[str, str], Model] = {}

    def network(self, atlas: Mapping[str, Any]) -> Model:
        """Return the network of an atlas; to be called in the thread."""
        key = atlas["model"], atlas["fingerprint"]
        known = self.models.pop(key) if key in self.models else self.open_network(atlas)
        self.models[key] = known
        while len(self.models) > KEPT:
            del self.models[next(iter(self.models))]
        return known

    def close(self) -> None:
        """Let the thread end with what it does now."""
        self.thread.shutdown(wait=False, cancel_futures=True)


def opened(atlas: Mapping[str, Any], device: str, given: Model | None) -> Model:
    """Return the network that an atlas was made with: the one given, or what its reference loads.

    Raises:
        ModelRefused: it is neither; a store from elsewhere must not choose what code is run here.
        ModelNotFound, ExtraMissing, WeightsRefused: it cannot be loaded.
    """
    name, wanted = atlas["model"], atlas["fingerprint"]
    if given is not None and given.fingerprint == wanted:
        return given
    if not REFERENCE.fullmatch(name):
        if given is not None:
            raise ModelRefused(
                f"this atlas was not made with {given.name} as it was loaded: its weights, --mean or --std are others; "
                "start the server with those that the atlas was made with"
            )
        raise ModelRefused(f"{name} is not loaded by itself; start the server with --model and that network")
    with LOADING:
        model = load(name, device=device)
    if model.fingerprint != wanted:
        raise ModelRefused(
            f"{name} has other weights here ({model.fingerprint}) than this atlas was made with ({wanted}); start the "
            "server with --model and those"
        )
    return model


def refusal(atlas: Mapping[str, Any], given: str | None) -> str | None:
    """Return why the network of an atlas cannot be opened here, as far as that is known before it is loaded.

    Args:
        given: the fingerprint of the network that the server was started with.
    """
    name = atlas["model"]
    if given == atlas["fingerprint"] or REFERENCE.fullmatch(name):
        return None
    imported, saved = IMPORTED.fullmatch(name), name.lower().endswith(SAVED)
    other = f"The network that this server was started with is not {name} as this atlas was made with it. "
    model = shlex.quote(name) if imported or saved else "MODEL"
    where = "where that network can be imported" if imported else "where MODEL is the network of this atlas"
    start = f"phosphene serve PLACE --model {model}, {'where that file is' if saved else where}"
    return f"{other if given else ''}To look at photos and to render, start the server with: {start}."


def second(model: Model) -> Model | None:
    """Return a copy of a network that shares no module with it, None where there is no telling how."""
    if model.ref:
        return load(model.ref, device=model.like.device)
    try:
        copied = copy.deepcopy(model)
    except Exception:  # what a network of somebody's own raises is anything at all
        return None
    inside = {id(one) for one in copied.module.modules()}
    return copied if all(id(one) in inside for one in copied.modules.values()) else None
