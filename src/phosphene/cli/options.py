"""The options that commands share, and the model that they name."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from phosphene.cli.output import to_stderr
from phosphene.errors import InvalidRequest, LayerNotFound
from phosphene.network.layers import Layer
from phosphene.network.loading import load, torch_device
from phosphene.network.model import Model
from phosphene.rendering.recipes import RECIPES

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="builtin/NAME, torchvision/NAME, timm/NAME, keras/NAME, a saved Keras model, or package.module:callable",
    ),
]
LayerArgument = Annotated[
    str, typer.Argument(metavar="LAYER", help="a path that `phosphene layers` prints, or n for the n-th convolution")
]
Weights = Annotated[str | None, typer.Option(metavar="none|PATH", help="weights file, or none for random ones")]
Numbers = Annotated[str | None, typer.Option(metavar="A[,B,C]", help="one, or one per channel, for images in 0..1")]
InputSize = Annotated[
    str | None, typer.Option(metavar="PX|HxW", help="side, or height x width, of the network's input")
]
ChannelsIn = Annotated[int | None, typer.Option(metavar="N", help="channels of the network's images")]
Labels = Annotated[Path | None, typer.Option(metavar="FILE", help="class names, one per line")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="where to compute")]
Trust = Annotated[bool, typer.Option("--trust", help="let a saved Keras model run the code that it carries")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress and no remarks")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
RecipeName = Annotated[str, typer.Option(metavar="NAME", help=f"one of: {', '.join(RECIPES)}")]
Size = Annotated[int | None, typer.Option(metavar="PX", help="side of the pictures")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="steps at each scale")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="seed of starts and transforms")]
BatchSize = Annotated[str, typer.Option(metavar="auto|N", help="pictures at once")]
Facets = Annotated[int, typer.Option(metavar="N", help="different pictures of each filter, kept apart")]
Precision = Annotated[str, typer.Option(metavar="fp32|bf16|auto", help="number format of the network's forward pass")]

MODEL_OPTIONS: dict[str, tuple[Any, Any]] = {
    "weights": (Weights, None),
    "mean": (Numbers, None),
    "std": (Numbers, None),
    "input_size": (InputSize, None),
    "channels_in": (ChannelsIn, None),
    "labels": (Labels, None),
    "device": (Device, "auto"),
    "trust": (Trust, False),
}
OpenModel = Callable[[], Model]


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the argument MODEL and the options that go with it.

    The command's first parameter is `open_model`, which loads the model when called and prints the notes on it. The
    other parameters, of which `quiet` is one, come after MODEL on the command line.
    """
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(name, keyword, annotation=annotation, default=default)
        for name, (annotation, default) in MODEL_OPTIONS.items()
    ]
    first = inspect.Parameter("model", keyword, annotation=ModelArgument)

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in ("model", *MODEL_OPTIONS)}
        command(lambda: load_from_options(options, arguments["quiet"]), **arguments)

    signature = inspect.Signature([first, *(parameter.replace(kind=keyword) for parameter in parameters), *shared])
    wrapped: Any = run
    wrapped.__signature__ = signature
    wrapped.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return run


def load_from_options(options: dict[str, Any], quiet: bool) -> Model:
    """Return the model that the options name, and print the notes on how it was loaded."""
    model = load(
        **{
            **options,
            "mean": numbers(options["mean"], "mean"),
            "std": numbers(options["std"], "std"),
            "input_size": height_and_width(options["input_size"]),
            "device": torch_device(options["device"]),
        }
    )
    if not quiet:
        for note in model.notes:
            to_stderr(f"{model.name}: {note}")
    return model


def numbers(text: str | None, name: str) -> list[float] | None:
    """Return "0.5,0.4,0.3" as numbers."""
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(f"--{name} is one number or several, such as 0.5,0.4,0.3, not {text!r}") from error


def height_and_width(text: str | None) -> tuple[int, int] | None:
    """Return "96" or "96x128" as height and width."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InvalidRequest(f"--input-size is a side in pixels or height and width, such as 96x128, not {text!r}")
    return int(sides[0]), int(sides[-1])


def batch_size(text: str) -> int | str:
    """Return a batch size as `render` takes it."""
    return int(text) if text.isdigit() else text


def address(text: str) -> str | int:
    """Return the address of a typed layer: digits alone mean the n-th convolution."""
    return int(text) if text.isdigit() else text


def chosen_layer(model: Model, text: str, quiet: bool) -> Layer:
    """Return the layer that was typed, and print which one a number means."""
    matching = model.layers().matching(text) if any(sign in text for sign in "*?[") else ()
    if matching and text not in matching[0].spellings:
        matches = ", ".join(layer.path for layer in matching[:8])
        raise LayerNotFound(f"this command draws a single layer, and {text!r} stands for several: {matches}")
    layer = model.find(address(text))
    if text.isdigit() and not quiet:
        to_stderr(f"convolution {text} is {layer.path}")
    return layer
