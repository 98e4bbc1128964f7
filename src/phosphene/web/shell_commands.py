"""Commands as people type them: those that the page gives to copy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

LOADING = {"weights": "", "mean": ",", "std": ",", "input_size": "x", "channels_in": ""}  # what joins several numbers


def filters_command(model: str, loading: Mapping[str, Any], layer: str, options: Mapping[str, Any]) -> str:
    """Return the command that draws a filter; options that are None are left out.

    Args:
        model: the network's reference.
        loading: its `Model.options`.
    """
    chosen = [part for name, one in options.items() if one is not None for part in (f"--{name}", str(one))]
    return shlex.join(["phosphene", "filters", model, layer, *loading_words(loading), *chosen])


def serve_command(model: str, loading: Mapping[str, Any]) -> str:
    """Return the command that starts a server with a network, the place left open."""
    return shlex.join(["phosphene", "serve", "PLACE", "--model", model, *loading_words(loading)])


def loading_words(loading: Mapping[str, Any]) -> list[str]:
    """Return how a network was loaded as the command line says it; `--trust` is left for people to decide.

    >>> loading_words({"mean": [0.5, 0.4, 0.3], "input_size": [96, 128]})
    ['--mean', '0.5,0.4,0.3', '--input-size', '96x128']
    """
    words = []
    for name, joint in LOADING.items():
        if name in loading:
            one = loading[name]
            words += [f"--{name.replace('_', '-')}", joint.join(map(str, one)) if isinstance(one, list) else str(one)]
    return words
