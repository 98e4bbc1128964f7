"""The commands of the page: `serve` shows a store or a training in a browser, `export` writes it as plain files."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
from phosphene.cli.output import progress, report, to_stderr, to_stdout
from phosphene.errors import ExtraMissing, InvalidRequest
from phosphene.network.loading import torch_device
from phosphene.storage.atomic import check_writable
from phosphene.training.history import History
from phosphene.web.store_reader import StoreReader, stores_and_records_at
from phosphene.web.urls import layer_slug
from phosphene.web.views.training import TrainingView

PARTS = ("jinja2", "starlette", "uvicorn")  # what the extra brings, and what these need in turn is theirs to say
Shown = Annotated[
    str, typer.Argument(metavar="PLACE", help="a store, the folder of a recorded training, or a folder of these")
]


def serve(
    place: Shown,
    host: Annotated[
        str, typer.Option(metavar="NAME|ADDRESS", help="where to listen; by default for this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 has one chosen")] = 8000,
    token: Annotated[str | None, typer.Option(metavar="TEXT", help="what a browser has to show")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the network, where it does not load by the atlas' word alone")
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
    """Show an atlas or a training in a browser, and there your own photos, and filters while they are rendered."""
    options = {"weights": weights, "mean": mean, "std": std, "input_size": input_size, "channels_in": channels_in}
    asked = {"model": model, **options, "labels": labels, "device": device, "trust": trust}
    check(asked, token)
    network = (lambda: load_from_options(asked, quiet)) if model else None
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
    with requires_web_extra():
        from phosphene.web import server, site
        from phosphene.web.live import render_queue as studio
        from phosphene.web.live import routes as live
    found = stores_and_records_at(place)
    with closing(server.listening(host, port)) as at:
        gallery = StoreReader(found.stores)
        networks = studio.RenderQueue(gallery, str(torch_device(device)), network() if network else None)
        shown = server.application(
            site.Site(gallery, trainings(found.histories), True, found.damaged),
            live.live_routes(networks),
            names_of(host, at),
            token,
            networks.close,
        )
        warn(at, token)
        server.serve(shown, at, lambda: ready(address_of(host, at, token)))


def tell_and_open(address: str) -> None:
    """Print where the page is, and open it where somebody sits at a terminal."""
    to_stdout(address)
    if sys.stdout.isatty():
        typer.launch(address)


def check(asked: dict[str, Any], token: str | None) -> None:
    """Refuse options that do not go together, and an empty token."""
    changed = [name for name, (_, default) in MODEL_OPTIONS.items() if asked[name] != default and name != "device"]
    if changed and asked["model"] is None:
        option = changed[0].replace("_", "-")
        raise InvalidRequest(f"--{option} is for the network that --model names; add that, or leave --{option} out")
    if token is not None and not token.strip():
        raise InvalidRequest("the token is empty; give --token some text, or leave it out")
    torch_device(asked["device"])


@contextmanager
def requires_web_extra() -> Iterator[None]:
    """Say how to install what the page needs, where that is not there."""
    try:
        yield
    except ImportError as error:
        part = (error.name or "").partition(".")[0]
        if part not in PARTS:
            raise
        raise ExtraMissing(
            f"the page needs {part}, which is not installed; install it with: pip install 'phosphene[web]'"
        ) from error


def need_the_extra() -> None:
    """Find out before the work whether the page can be shown afterwards."""
    with requires_web_extra():
        import phosphene.web.server  # noqa: F401


def trainings(histories: Sequence[History]) -> list[TrainingView]:
    """Return training runs with the names that they have in addresses: of several folders of one name the second ~2."""
    found: dict[str, TrainingView] = {}
    for history in histories:
        name = plain = layer_slug(history.folder.absolute().name)
        number = 1
        while name in found:
            number += 1
            name = f"{plain}~{number}"
        found[name] = TrainingView(history, name)
    return list(found.values())


def bound_to(at: socket.socket) -> IPv4Address | IPv6Address:
    """Return the address that a socket listens at."""
    return ip_address(at.getsockname()[0].partition("%")[0])


def is_loopback(at: socket.socket) -> bool:
    """Return whether a socket can be reached from this machine alone."""
    return bound_to(at).is_loopback


def names_of(host: str, at: socket.socket) -> list[str] | None:
    """Return the names under which a server may be called, None for those of this machine alone; see `guard.Guard`."""
    return None if is_loopback(at) else [host, socket.gethostname(), f"{socket.gethostname()}.local"]


def warn(at: socket.socket, token: str | None) -> None:
    """Say who else can see the page; `--quiet` does not silence it."""
    if is_loopback(at):
        return
    who = "anyone on the network can see the store and use this machine; --token TEXT lets only those in who have it"
    if token is not None:
        who = "whoever on the network has the token can see the store and use this machine; the token goes unencrypted"
    to_stderr(f"the page is not for this machine alone: {who}")
    if bound_to(at).is_unspecified:
        to_stderr(f"other machines reach it at http://{socket.gethostname()}:{at.getsockname()[1]}/")


def address_of(host: str, at: socket.socket, token: str | None) -> str:
    """Return the address that opens the page on this machine."""
    bound = bound_to(at)
    name = ("[::1]" if bound.version == 6 else "127.0.0.1") if bound.is_unspecified else host
    shown = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return f"http://{shown}:{at.getsockname()[1]}/" + (f"?token={quote(token, safe='')}" if token else "")


def export(
    place: Shown,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="a folder of its own, new or of an earlier export")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write an atlas or a training as plain files, for any web host or to be opened without one."""
    check_writable(out, folder=True)
    with requires_web_extra():
        from phosphene.web import export as exporting
        from phosphene.web import site
    found = stores_and_records_at(place)
    pages = site.Site(StoreReader(found.stores), trainings(found.histories), damaged=found.damaged)
    with progress("export", "files", quiet) as advance:
        count = exporting.export(pages, out, lambda _, total: advance(1, total))
    report([out / "index.html"], as_json, {"written": count})
