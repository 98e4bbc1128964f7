"""The command line: its commands, exit codes and error messages."""

import importlib
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from phosphene.cli.output import to_stderr, to_stdout
from phosphene.errors import PhospheneError
from phosphene.version import __version__

COMMANDS = {
    "layers": ("network:layers", "List a network's layers, with sizes and receptive fields."),
    "filters": ("render:filters", "Draw the picture that each filter of a layer answers to."),
    "activations": ("photo:activations", "Draw what each channel of a network makes of a photo."),
    "cam": ("photo:cam", "Show where on a photo the evidence for a class lies."),
    "kernels": ("training:kernels", "Draw the weights of a convolution."),
    "strip": ("training:strip", "Draw a layer of a recorded training, one row per epoch."),
    "gradients": ("training:gradients", "Draw the gradients of a recorded training, and judge them."),
    "accentuate": ("render:accentuate", "Draw what excites a filter in a photo into that photo."),
    "dream": ("render:dream", "Draw more of what a layer sees into a photo (DeepDream)."),
    "atlas": ("atlases:atlas", "Draw every filter of many layers into a store."),
    "serve": ("web:serve", "Show an atlas or a recorded training in a browser."),
    "export": ("web:export", "Write an atlas or a recorded training as plain files."),
    "report": ("atlases:report_page", "Write one page that shows an atlas, and a table."),
    "demo": ("demonstration:demo", "Draw what the built-in trained networks have learned."),
}
STOPPED = 130  # what typer returns after Ctrl-C
# typer exports its parent only so, and not all versions of typer use the same click
UsageError: type[Any] = typer.BadParameter.__bases__[0]


class LazyGroup(TyperGroup):
    """All commands; the file of a command, and with it torch, is imported when that command is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """Return a command with its options, ready to run; memory that tensors free stays with the process from now on."""
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(f"phosphene.cli.{module}"), function)
    importlib.import_module("phosphene.network.memory").keep_freed_memory()
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(command)
    return typer.main.get_command(single)


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        to_stdout(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    help="Phosphene shows what a convolutional network has learned.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command_name, (_, summary) in COMMANDS.items():
    app.command(command_name, help=summary)(lambda: None)


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version and exit")
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
