"""The networks of atlases, each loaded at first use, in the one thread that uses it."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from phosphene.errors import ModelRefused
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.web.shell_commands import serve_command
from phosphene.web.views.filter import SAVED

REFERENCE = re.compile(r"(builtin|torchvision|timm|keras)/[\w.-]+", re.ASCII)
IMPORTED = re.compile(r"[\w.]+:[\w.]+")  # package.module:callable
KEPT = 3  # networks of a thread
LOADING = threading.Lock()


class Identity(NamedTuple):
    """What tells networks apart: the fingerprint of the weights, and the (h, w) that the network takes."""

    fingerprint: str
    input_size: tuple[int, int] | None

    @classmethod
    def of(cls, model: Model) -> Identity:
        """Return what tells a network from others."""
        return cls(model.fingerprint, model.input_size)

    def made(self, atlas: Mapping[str, Any]) -> bool:
        """Return whether an atlas was made with this network; a store of before does not tell the size."""
        other = identity_of(atlas)
        return self.fingerprint == other.fingerprint and other.input_size in (None, self.input_size)


def identity_of(atlas: Mapping[str, Any]) -> Identity:
    """Return what an atlas tells of its network."""
    size = atlas.get("input_size")
    return Identity(atlas["fingerprint"], size and tuple(size))


class ModelThread:
    """A thread, and the networks that only this thread touches; the last ones used are kept."""

    def __init__(self, name: str, open_network: Callable[[Mapping[str, Any]], Model]) -> None:
        self.thread = ThreadPoolExecutor(1, f"phosphene-{name}")
        self.open_network = open_network
        self.models: dict[tuple[str, Identity], Model] = {}

    def network(self, atlas: Mapping[str, Any]) -> Model:
        """Return the network of an atlas; to be called in the thread."""
        key = atlas["model"], identity_of(atlas)
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
        ModelRefused: it is neither.
        ModelNotFound, ExtraMissing, WeightsRefused: it cannot be loaded.
    """
    who = Identity.of(given) if given else None
    if given and who and who.made(atlas):
        return given
    reason = refusal(atlas, who)
    if reason:
        raise ModelRefused(reason)
    with LOADING:
        model = load(atlas["model"], device=device)
    if not Identity.of(model).made(atlas):
        raise ModelRefused(
            f"{model.name} has other weights or another input size here than this atlas was made with; start the "
            "server with --model and those"
        )
    return model


def refusal(atlas: Mapping[str, Any], given: Identity | None) -> str | None:
    """Return why the network of an atlas cannot be opened here, as far as that is known before it is loaded.

    A store from elsewhere must not choose what code is run here, nor which files are read: what is loaded by itself is
    a library's network, as it comes.

    Args:
        given: the network that the server was started with.
    """
    name, loading = atlas["model"], atlas.get("options", {})
    library = REFERENCE.fullmatch(name)
    if (library and not loading) or (given and given.made(atlas)):
        return None
    imported, saved = IMPORTED.fullmatch(name), name.lower().endswith(SAVED)
    known = library or imported or saved
    if imported:
        where = ", where that network can be imported"
    elif not known:
        where = ", where MODEL is the network of this atlas"
    else:
        where = ", where that file is" if saved or loading.get("weights", "none") != "none" else ""
    start = serve_command(name if known else "MODEL", loading)
    other = f"The network that this server was started with is not {name} as this atlas was made with it. "
    return f"{other if given else ''}To look at photos and to render, start the server with: {start}{where}."


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
