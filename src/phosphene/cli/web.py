"""The commands of the page: `serve` shows a store or a training in a browser, `export` writes it as plain files."""

import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from phosphene.cli.options import (
    MODEL_OPTIONS,
    AsJson,
    ChannelsIn,
    Device,
    InputSize,
    Labels,
    Numbers,
    OpenModel,
    Quiet,
    Trust,
    Weights,
    load_from_options,
)
from phosphene.cli.output import report, to_stderr, to_stdout
from phosphene.errors import InvalidRequest, require_extra
from phosphene.network.loading import torch_device
from phosphene.storage.atomic import check_writable
from phosphene.training.history import History
from phosphene.web.export import export as export_site
from phosphene.web.live.render_queue import RenderQueue
from phosphene.web.site import Site
from phosphene.web.store_reader import StoreReader, stores_and_records_at
from phosphene.web.urls import layer_slug
from phosphene.web.views.training import TrainingView

PACKAGES = ("starlette", "uvicorn")
Place = Annotated[
    str, typer.Argument(metavar="PLACE", help="a store, the folder of a recorded training, or a folder of these")
]


def serve(
    place: Place,
    host: Annotated[
        str, typer.Option(metavar="NAME|ADDRESS", help="where to listen; by default for this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 picks a free port")] = 8000,
    token: Annotated[str | None, typer.Option(metavar="TEXT", help="a word that each visitor must give")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the network, if it cannot be loaded by the name in the atlas")
    ] = None,
    weights: Weights = None,
    mean: Numbers = None,
    std: Numbers = None,
    input_size: InputSize = None,
    channels_in: ChannelsIn = None,
    labels: Labels = None,
    device: Device = "auto",
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Show an atlas or a training in a browser, with your own photos and live renders of filters."""
    numbers = {"weights": weights, "mean": mean, "std": std, "input_size": input_size, "channels_in": channels_in}
    options = {"model": model, **numbers, "labels": labels, "device": device, "trust": trust}
    check(options, token)
    network = (lambda: load_from_options(options, quiet)) if model else None
    serve_place(place, to_stdout, host, port, token, device, network)


def serve_place(
    place: str,
    ready: Callable[[str], None],
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    device: str = "auto",
    network: OpenModel | None = None,
) -> None:
    """Show a place in a browser until the program is stopped; `ready` is called with the address."""
    check_web_extra()
    from phosphene.web import server
    from phosphene.web.live.routes import live_routes

    contents = stores_and_records_at(place)
    with closing(server.listening(host, port)) as listener:
        reader = StoreReader(contents.stores)
        queue = RenderQueue(reader, str(torch_device(device)), network() if network else None)
        application = server.application(
            Site(reader, trainings(contents.histories), True, contents.damaged),
            live_routes(queue),
            names_of(host, listener),
            token,
            queue.close,
        )
        warn(listener, token)
        server.serve(application, listener, lambda: ready(address_of(host, listener, token)))


def print_and_open(address: str) -> None:
    """Print the address of the page, and open it if stdout is a terminal."""
    to_stdout(address)
    if sys.stdout.isatty():
        typer.launch(address)


def check(options: dict[str, Any], token: str | None) -> None:
    """Refuse options that do not go together, and an empty token."""
    changed = [name for name, (_, default) in MODEL_OPTIONS.items() if options[name] != default and name != "device"]
    if changed and options["model"] is None:
        option = changed[0].replace("_", "-")
        raise InvalidRequest(f"--{option} is for the network that --model names; add that, or leave --{option} out")
    if token is not None and not token.strip():
        raise InvalidRequest("the token is empty; give --token some text, or leave it out")
    torch_device(options["device"])


def check_web_extra() -> None:
    """Refuse to go on without the packages of the server, before the work.

    Raises:
        ExtraMissing: one of them is not installed.
    """
    for package in PACKAGES:
        require_extra(package, "web")


def trainings(histories: Sequence[History]) -> list[TrainingView]:
    """Return training runs under the names in their addresses; if two folders have one name, the second gets ~2."""
    views: dict[str, TrainingView] = {}
    for history in histories:
        name = slug = layer_slug(history.folder.absolute().name)
        number = 1
        while name in views:
            number += 1
            name = f"{slug}~{number}"
        views[name] = TrainingView(history, name)
    return list(views.values())


def bound_to(listener: socket.socket) -> IPv4Address | IPv6Address:
    """Return the address that a socket listens at."""
    return ip_address(listener.getsockname()[0].partition("%")[0])


def is_loopback(listener: socket.socket) -> bool:
    """Return whether a socket can be reached from this machine alone."""
    return bound_to(listener).is_loopback


def names_of(host: str, listener: socket.socket) -> list[str] | None:
    """Return the names that the server answers to, None for this machine's own; see `SecurityMiddleware`."""
    return None if is_loopback(listener) else [host, socket.gethostname(), f"{socket.gethostname()}.local"]


def warn(listener: socket.socket, token: str | None) -> None:
    """Print who else can see the page; `--quiet` does not silence it."""
    if is_loopback(listener):
        return
    who = "anyone on the network can see the store and use this machine; --token TEXT lets only those in who have it"
    if token is not None:
        who = "whoever on the network has the token can see the store and use this machine; the token is sent in clear"
    to_stderr(f"the page is not for this machine alone: {who}")
    if bound_to(listener).is_unspecified:
        to_stderr(f"other machines reach it at http://{socket.gethostname()}:{listener.getsockname()[1]}/")


def address_of(host: str, listener: socket.socket, token: str | None) -> str:
    """Return the address that opens the page on this machine."""
    bound = bound_to(listener)
    name = ("[::1]" if bound.version == 6 else "127.0.0.1") if bound.is_unspecified else host
    bracketed = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return f"http://{bracketed}:{listener.getsockname()[1]}/" + (f"?token={quote(token, safe='')}" if token else "")


def export(
    place: Place,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="a new folder, or that of an earlier export")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write an atlas or a training as plain files that need no server."""
    check_writable(out, folder=True)
    contents = stores_and_records_at(place)
    pages = Site(StoreReader(contents.stores), trainings(contents.histories), damaged=contents.damaged)
    count = export_site(pages, out, progress=not quiet)
    report([out / "index.html"], as_json, {"written": count})
