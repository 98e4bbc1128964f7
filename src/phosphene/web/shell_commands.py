"""The shell commands that the page offers for copying."""

import shlex
from collections.abc import Mapping
from typing import Any

LOADING = {"weights": "", "mean": ",", "std": ",", "input_size": "x", "channels_in": ""}  # what joins several numbers


def filters_command(model: str, loading: Mapping[str, Any], layer: str, options: Mapping[str, Any]) -> str:
    """Return the command that renders a filter; options that are None are left out.

    Args:
        model: the network's reference.
        loading: its `Model.options`.
    """
    chosen = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["phosphene", "filters", model, layer, *loading_words(loading), *chosen])


def serve_command(model: str, loading: Mapping[str, Any]) -> str:
    """Return the command that starts a server with a network; the user fills in PLACE."""
    return shlex.join(["phosphene", "serve", "PLACE", "--model", model, *loading_words(loading)])


def loading_words(loading: Mapping[str, Any]) -> list[str]:
    """Return the command-line options that load a network the same way; `--trust` is left for people to decide.

    >>> loading_words({"mean": [0.5, 0.4, 0.3], "input_size": [96, 128]})
    ['--mean', '0.5,0.4,0.3', '--input-size', '96x128']
    """
    words = []
    for name, joint in LOADING.items():
        if name in loading:
            value = loading[name]
            text = joint.join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words
