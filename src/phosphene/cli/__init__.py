"""The command line: its commands, exit codes and error messages."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from phosphene.cli.atlases import atlas, report_page, watching
from phosphene.cli.demonstration import PARTS, STORE, demonstrate
from phosphene.cli.options import AsJson, Device, OpenModel, Quiet, takes_model
from phosphene.cli.output import report, to_stderr, to_stdout
from phosphene.cli.photo import activations, cam
from phosphene.cli.render import dream, filters
from phosphene.cli.training import gradients, kernels, strip
from phosphene.cli.web import export, need_the_extra, serve, serve_place, tell_and_open
from phosphene.errors import PhospheneError
from phosphene.network.loading import torch_device
from phosphene.storage.atomic import check_writable
from phosphene.version import __version__

app = typer.Typer(
    help="Phosphene shows what a convolutional network has learned.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# typer exports its parent only so, and not all versions of typer use the same click
UsageError: type[Any] = typer.BadParameter.__bases__[0]
STOPPED = 130  # what typer returns after Ctrl-C


@app.command()
@takes_model
def layers(open_model: OpenModel, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List a network's layers: path, kind, channels, map size, receptive field, in-place follower."""
    model = open_model()
    table = model.layers()
    to_stdout(json.dumps({"model": model.name, "layers": table.to_json()}) if as_json else table)


for command in (filters, activations, cam, kernels, strip, gradients, dream, atlas, serve, export):
    app.command()(command)
app.command("report")(report_page)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the pictures go")] = Path("phosphene-demo"),
    and_serve: Annotated[bool, typer.Option("--serve", help="then open them in a browser")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do the main job on the built-in trained networks: sheets of filters, and a photo through a classifier."""
    check_writable(out, folder=True)
    if and_serve:
        need_the_extra()
    paths = []
    with watching(quiet, "demo") as watch:
        for path in demonstrate(out, torch_device(device), watch):
            paths.append(path)
            if not as_json:
                to_stdout(path)
    if as_json:
        report(paths, as_json, {"store": str(out / STORE)})
    elif not quiet:
        names = " and ".join(part.model for part in PARTS)
        to_stderr(f"what filters of {names} respond to, and a photo, is in {out.resolve()}")
    if and_serve:
        serve_place(str(out), tell_and_open, device=device)
    elif not quiet:
        to_stderr(f"to browse it: phosphene serve {out}")


def version(asked: bool) -> None:
    """Print the version and end."""
    if asked:
        to_stdout(__version__)
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Phosphene shows what a convolutional network has learned."""


def main() -> None:
    """Run the command line: exit code 0 done, 2 the request was wrong, 1 something failed on the way."""
    warnings.showwarning = lambda message, *_: to_stderr(str(message))
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:
            to_stderr("stopped")
            code = 1
    except PhospheneError as error:
        to_stderr(str(error))
        code = 2
    except UsageError as error:
        to_stderr(f"{error.format_message().rstrip('.')}; see `phosphene --help`")
        code = 2
    except BrokenPipeError:  # the reader of our stdout has gone, as in `phosphene layers MODEL | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
