"""The networks of atlases: each is loaded when it is first needed, and used by one thread only."""

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
from phosphene.web.cache import SizedCache
from phosphene.web.shell_commands import serve_command
from phosphene.web.views.filter import SAVED

REFERENCE = re.compile(r"(builtin|torchvision|timm|keras)/[\w.-]+", re.ASCII)
IMPORTED = re.compile(r"[\w.]+:[\w.]+")  # package.module:callable
MAX_MODELS = 3  # that a thread keeps
LOAD_LOCK = threading.Lock()


class Identity(NamedTuple):
    """What tells networks apart: the fingerprint of the weights, and the input size (h, w)."""

    fingerprint: str
    input_size: tuple[int, int] | None

    @classmethod
    def of(cls, model: Model) -> Identity:
        """Return the identity of a network."""
        return cls(model.fingerprint, model.input_size)

    @classmethod
    def of_atlas(cls, atlas: Mapping[str, Any]) -> Identity:
        """Return the identity of an atlas' network; stores written by earlier versions do not record the size."""
        size = atlas.get("input_size")
        return cls(atlas["fingerprint"], size and tuple(size))

    def matches(self, atlas: Mapping[str, Any]) -> bool:
        """Return whether an atlas was made with this network, as far as its store records that."""
        fingerprint, input_size = Identity.of_atlas(atlas)
        return self.fingerprint == fingerprint and input_size in (None, self.input_size)


class ModelThread:
    """A thread, and the networks that only this thread uses; those used last are kept."""

    def __init__(self, name: str, open_model: Callable[[Mapping[str, Any]], Model]) -> None:
        self.thread = ThreadPoolExecutor(1, f"phosphene-{name}")
        self.open_model = open_model
        self.models: SizedCache[Model] = SizedCache(MAX_MODELS)

    def model(self, atlas: Mapping[str, Any]) -> Model:
        """Return the network of an atlas; call it in the thread only."""
        key = atlas["model"], Identity.of_atlas(atlas)
        return self.models.get(key, lambda _: (self.open_model(atlas), 1))

    def close(self) -> None:
        """Let the thread finish its current work, and begin nothing more."""
        self.thread.shutdown(wait=False, cancel_futures=True)


def open_model(atlas: Mapping[str, Any], device: str, server_model: Model | None) -> Model:
    """Return the network that an atlas was made with: the server's own, or what its reference loads.

    Raises:
        ModelRefused: neither is the network of the atlas.
        ModelNotFound, ExtraMissing, WeightsRefused: the network cannot be loaded.
    """
    identity = Identity.of(server_model) if server_model else None
    if server_model and identity and identity.matches(atlas):
        return server_model
    reason = refusal(atlas, identity)
    if reason:
        raise ModelRefused(reason)
    with LOAD_LOCK:
        model = load(atlas["model"], device=device)
    if not Identity.of(model).matches(atlas):
        raise ModelRefused(
            f"{model.name} has other weights or another input size here than this atlas was made with; start the "
            "server with --model and those"
        )
    return model


def refusal(atlas: Mapping[str, Any], server_model: Identity | None) -> str | None:
    """Return why the network of an atlas cannot be opened here, as far as that is known before it is loaded.

    A store from elsewhere must not choose what code runs here or which files are read: only a library's network with
    its standard options is loaded by name alone.
    """
    name, loading = atlas["model"], atlas.get("options", {})
    library = REFERENCE.fullmatch(name)
    if (library and not loading) or (server_model and server_model.matches(atlas)):
        return None
    imported, saved = IMPORTED.fullmatch(name), name.lower().endswith(SAVED)
    loadable = library or imported or saved
    if imported:
        where = ", where that network can be imported"
    elif not loadable:
        where = ", where MODEL is the network of this atlas"
    else:
        where = ", where that file is" if saved or loading.get("weights", "none") != "none" else ""
    start = serve_command(name if loadable else "MODEL", loading)
    mismatch = f"The network that this server was started with is not {name} as this atlas was made with it. "
    return f"{mismatch if server_model else ''}To look at photos and to render, start the server with: {start}{where}."


def independent_copy(model: Model) -> Model | None:
    """Return a copy of a network that shares no module with it, None if the network cannot be copied."""
    if model.ref:
        return load(model.ref, device=model.prototype_tensor.device)
    try:
        copied = copy.deepcopy(model)
    except Exception:  # a user's own network may raise anything
        return None
    inside = {id(module) for module in copied.module.modules()}
    return copied if all(id(module) in inside for module in copied.modules.values()) else None
