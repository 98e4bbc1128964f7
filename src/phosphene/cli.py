"""The command line, the only place that prints: paths and JSON to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from phosphene.ascent import Frame
from phosphene.demo import FILTERS, LAYERS, demonstrate
from phosphene.errors import Interrupted, InvalidRequest, LayerNotFound, LayerRefused, PhospheneError
from phosphene.figure import png
from phosphene.layers import Layer
from phosphene.loaders import load, torch_device
from phosphene.model import Model, parse_channels
from phosphene.objectives import Objective, channel, logit, neuron
from phosphene.objectives import layer as whole_layer
from phosphene.photo import read
from phosphene.recipes import DEFAULT, RECIPES, find_recipe
from phosphene.render import dream as render_dream
from phosphene.render import render
from phosphene.rendered import Rendered, file_prefix
from phosphene.store import check_writable, write_file
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
OBJECTIVES = ("channel", "neuron", "logit", "layer")

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="builtin/NAME, torchvision/NAME, timm/NAME or package.module:callable"),
]
LayerArgument = Annotated[
    str, typer.Argument(metavar="LAYER", help="a path that `phosphene layers` prints, or n for the n-th convolution")
]
Weights = Annotated[str | None, typer.Option(metavar="none|PATH", help="weights file, or none for random ones")]
Numbers = Annotated[str | None, typer.Option(metavar="A[,B,C]", help="a number a channel, for images in 0..1")]
InputSize = Annotated[int | None, typer.Option(metavar="PX", help="side of the network's own input")]
ChannelsIn = Annotated[int | None, typer.Option(metavar="N", help="channels of the network's images")]
Labels = Annotated[Path | None, typer.Option(metavar="FILE", help="class names, one a line")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="where to compute")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress and no remarks")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
RecipeName = Annotated[str, typer.Option(metavar="NAME", help=f"one of: {', '.join(RECIPES)}")]
Size = Annotated[int | None, typer.Option(metavar="PX", help="side of the pictures")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="steps at each scale")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="seed of starts and transforms")]
BatchSize = Annotated[str, typer.Option(metavar="auto|N", help="pictures at once")]
Precision = Annotated[str, typer.Option(metavar="fp32|bf16|auto", help="number format of the network's forward pass")]


def say(text: str) -> None:
    """Print a remark to stderr."""
    print(f"phosphene: {text}", file=sys.stderr)


def numbers(text: str | None, name: str) -> list[float] | None:
    """Return "0.5,0.4,0.3" as numbers."""
    try:
        return None if text is None else [float(one) for one in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(f"--{name} is one number or one a channel, such as 0.5,0.4,0.3, not {text!r}") from error


def batch_size(text: str) -> int | str:
    """Return a batch size as `render` takes it."""
    return int(text) if text.isdigit() else text


def address(text: str) -> str | int:
    """Return what a typed layer means: digits alone are the n-th convolution."""
    return int(text) if text.isdigit() else text


def chosen_layer(model: Model, text: str, quiet: bool) -> Layer:
    """Return the layer that was typed, saying what a number resolved to."""
    if any(sign in text for sign in "*?["):
        matches = ", ".join(one.path for one in model.layers().matching(text)[:8])
        raise LayerNotFound(f"one layer is drawn at a time, and {text!r} stands for several: {matches}")
    found = model.find(address(text))
    if text.isdigit() and not quiet:
        say(f"convolution {text} is {found.path}")
    return found


@contextmanager
def progress(pictures: int, quiet: bool) -> Iterator[Callable[[Frame], None]]:
    """Show a bar with the time left on stderr, if that is a terminal, and yield what each `Frame` is to be given to."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(f"{pictures} pictures", total=None)

        def watch(frame: Frame) -> None:
            if frame.step < frame.steps:
                bar.update(task, total=pictures * frame.steps, advance=len(frame.items))

        yield watch


def report(paths: list[Path], as_json: bool, facts: dict[str, Any]) -> None:
    """Print what was written: a path a line, or one JSON object."""
    if as_json:
        print(json.dumps({"files": [str(path) for path in paths], **facts}))
    else:
        for path in paths:
            print(path)


def loaded(context: typer.Context) -> Model:
    """Return the model that a command's options name, saying what the user should know about how it was loaded.

    The options are read from the context, because every command that takes a model has the same ones.
    """
    asked = context.params
    model = load(
        asked["model"],
        weights=asked["weights"],
        mean=numbers(asked["mean"], "mean"),
        std=numbers(asked["std"], "std"),
        input_size=asked["input_size"],
        channels_in=asked["channels_in"],
        labels=asked["labels"],
        device=torch_device(asked["device"]),
    )
    if not asked["quiet"]:
        for note in model.notes:
            say(f"{model.name}: {note}")
    return model


@app.command()
def layers(
    context: typer.Context,
    model: ModelArgument,
    weights: Weights = None,
    mean: Numbers = None,
    std: Numbers = None,
    input_size: InputSize = None,
    channels_in: ChannelsIn = None,
    labels: Labels = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List a network's layers: path, kind, channels, map size, receptive field, in-place follower."""
    handle = loaded(context)
    table = handle.layers()
    print(json.dumps({"model": handle.name, "layers": table.to_json()}) if as_json else table)


@app.command()
def filters(
    context: typer.Context,
    model: ModelArgument,
    layer: LayerArgument,
    channels: Annotated[
        str | None, typer.Option(metavar="0:64|3,7,11|all", help="which filters; by default the first 64")
    ] = None,
    recipe: RecipeName = DEFAULT,
    size: Size = None,
    steps: Steps = None,
    seed: Seed = None,
    objective: Annotated[
        str, typer.Option(metavar="|".join(OBJECTIVES), help="what of the layer to excite")
    ] = "channel",
    out: Annotated[
        Path | None, typer.Option(metavar="PATH.png|DIR", help="a sheet, or a folder for one file a filter")
    ] = None,
    film: Annotated[Path | None, typer.Option(metavar="PATH.gif", help="also show how the pictures form")] = None,
    weights: Weights = None,
    mean: Numbers = None,
    std: Numbers = None,
    input_size: InputSize = None,
    channels_in: ChannelsIn = None,
    labels: Labels = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch: BatchSize = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the picture that each filter of a layer answers to."""
    find_recipe(recipe).at(size, steps, seed)
    handle = loaded(context)
    found = chosen_layer(handle, layer, quiet)
    wanted = objective_for(found, objective, channels)
    target = out or Path(f"{file_prefix([found.path])}.png")
    check_target(target, ".png")
    if film:
        check_target(film, ".gif", folders=False)
    with progress(wanted.n, quiet) as watch:
        try:
            rendered = render(
                handle,
                wanted,
                recipe,
                size=size,
                steps=steps,
                seed=seed,
                batch=batch_size(batch),
                precision=precision,
                film=24 if film else 0,
                watch=watch,
            )
        except Interrupted as stopped:
            if isinstance(stopped.finished, Rendered):
                report(written(stopped.finished, target, film), as_json, facts(stopped.finished))
            say(str(stopped))
            raise typer.Exit(1) from stopped
    report(written(rendered, target, film), as_json, facts(rendered))
    if bool(rendered.dead.any()) and not quiet:
        names = ", ".join(name for name, dead in zip(rendered.names, rendered.dead, strict=True) if dead)
        say(f"dead, crossed out in the grid: {names}")


def objective_for(layer: Layer, name: str, channels: str | None) -> Objective:
    """Return the objective that was asked for on a layer.

    Raises:
        InvalidRequest, LayerRefused, ChannelNotFound.
    """
    if name not in OBJECTIVES:
        raise InvalidRequest(f"there is no objective {name!r}; choose one of: {', '.join(OBJECTIVES)}")
    if name == "layer":
        return whole_layer(layer.path)
    if name == "logit" and (layer.is_map or layer.channels is None):
        raise LayerRefused(f"{layer.path} returns maps, not a number a class; use --objective channel")
    if name != "logit" and not layer.is_map:
        raise LayerRefused(
            f"{layer.path} is a {layer.kind} and returns no map of channels; "
            "choose a convolution, or --objective logit for a classifier"
        )
    count = layer.channels or 0
    listed = parse_channels(channels or f"0:{min(64, count)}", count)
    return {"channel": channel, "neuron": neuron, "logit": logit_of}[name](layer.path, listed)


def logit_of(path: str, classes: list[int]) -> Objective:
    """Return the objective `logit` with its arguments in the order of the others."""
    return logit(classes, path)


def check_target(target: Path, suffix: str, folders: bool = True) -> None:
    """Find out before the work whether the result can be written where the user wants it."""
    is_folder = folders and (target.is_dir() or target.suffix == "")
    if not is_folder and target.suffix.lower() != suffix:
        also = " or a folder" if folders else ""
        raise InvalidRequest(f"{target} does not end in {suffix}; give a {suffix} file{also}")
    check_writable(target, folder=is_folder)


def written(rendered: Rendered, target: Path, film: Path | None) -> list[Path]:
    """Write a result where the user wants it and return the paths."""
    if target.suffix.lower() == ".png" and not target.is_dir():
        paths = [write_file(target, png(rendered.grid(), rendered.spec))]
    else:
        paths = rendered.save(target)
    return [*paths, rendered.save_film(film)] if film else paths


def facts(rendered: Rendered) -> dict[str, Any]:
    """Return what `--json` tells about a result."""
    pictures = [rendered.metadata(index) for index in range(len(rendered))]
    shown = ("picture", "score", "dead")
    return {**rendered.spec, "pictures": [{name: one[name] for name in shown} for one in pictures]}


@app.command()
def dream(
    context: typer.Context,
    model: ModelArgument,
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="the photo to start from")],
    layer: LayerArgument,
    out: Annotated[Path, typer.Option(metavar="PATH.png")] = Path("dream.png"),
    recipe: RecipeName = "dream",
    size: Size = None,
    steps: Steps = None,
    seed: Seed = None,
    weights: Weights = None,
    mean: Numbers = None,
    std: Numbers = None,
    input_size: InputSize = None,
    channels_in: ChannelsIn = None,
    labels: Labels = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Change a photo so that a layer sees more of what it saw in it (DeepDream)."""
    find_recipe(recipe).at(size, steps, seed)
    check_target(out, ".png", folders=False)
    handle = loaded(context)
    image = read(photo, handle.channels_in)
    found = chosen_layer(handle, layer, quiet)
    with progress(1, quiet) as watch:
        rendered = render_dream(handle, image, found.path, recipe, size=size, steps=steps, seed=seed, watch=watch)
    report(written(rendered, out, None), as_json, facts(rendered))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the pictures go")] = Path("phosphene-demo"),
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do the main job on the built-in trained network: one sheet of filters for each of its blocks."""
    check_writable(out, folder=True)
    paths = []
    with progress(FILTERS * len(LAYERS), quiet) as watch:
        for path in demonstrate(out, torch_device(device), watch):
            paths.append(path)
            if not as_json:
                print(path, flush=True)
    if as_json:
        report(paths, as_json, {})
    elif not quiet:
        say(f"what {FILTERS} filters of each block of builtin/vgg19 respond to is in {out.resolve()}")


def version(asked: bool) -> None:
    """Print the version and end."""
    if asked:
        print(__version__)
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
    warnings.showwarning = lambda message, *_: say(str(message))
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:
            say("stopped")
            code = 1
    except PhospheneError as error:
        say(str(error))
        code = 2
    except UsageError as error:
        say(f"{error.format_message().rstrip('.')}; see `phosphene --help`")
        code = 2
    except BrokenPipeError:  # the reader of our stdout has gone, as in `phosphene layers MODEL | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
