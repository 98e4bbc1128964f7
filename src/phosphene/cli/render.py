"""The commands that render: `filters`, `accentuate` and `dream`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from phosphene.cli.options import (
    AsJson,
    BatchSize,
    Facets,
    LayerArgument,
    OpenModel,
    Precision,
    Quiet,
    RecipeName,
    Seed,
    Size,
    Steps,
    batch_size,
    chosen_layer,
    numbers,
    takes_model,
)
from phosphene.cli.output import check_target, report, to_stderr
from phosphene.errors import InvalidRequest, LayerRefused, Unfinished
from phosphene.images.encode import png
from phosphene.images.photo import read
from phosphene.network.channel_ranges import parse_channels
from phosphene.network.layers import Layer, file_prefix
from phosphene.network.model import Model
from phosphene.rendering.accentuation import accentuate as render_accentuated
from phosphene.rendering.accentuation import checked_amounts
from phosphene.rendering.accentuation import dream as render_dream
from phosphene.rendering.objectives import Objective, channel, logit, neuron
from phosphene.rendering.objectives import layer as whole_layer
from phosphene.rendering.recipes import DEFAULT, find_recipe
from phosphene.rendering.render import render
from phosphene.rendering.result import Rendered
from phosphene.storage.atomic import write_file

Photo = Annotated[Path, typer.Argument(metavar="PHOTO", help="the photo to start from")]
OBJECTIVES = ("channel", "neuron", "logit", "layer")


@takes_model
def filters(
    open_model: OpenModel,
    layer: LayerArgument,
    channels: Annotated[
        str | None, typer.Option(metavar="0:64|3,7,11|all", help="which filters; by default the first 64")
    ] = None,
    recipe: RecipeName = DEFAULT,
    size: Size = None,
    steps: Steps = None,
    seed: Seed = None,
    objective: Annotated[str, typer.Option(metavar="|".join(OBJECTIVES), help="what to excite")] = "channel",
    facets: Facets = 1,
    opposite: Annotated[bool, typer.Option("--opposite", help="draw what suppresses the filter most")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH.png|DIR", help="a sheet, or a folder for one file per filter")
    ] = None,
    film: Annotated[Path | None, typer.Option(metavar="PATH.gif", help="also show how the pictures form")] = None,
    precision: Precision = "auto",
    batch: BatchSize = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the picture that each filter of a layer answers to."""
    find_recipe(recipe).with_settings(size, steps, seed)
    handle = open_model()
    target_layer = chosen_layer(handle, layer, quiet)
    score = objective_for(target_layer, objective, channels)
    target = out or Path(f"{file_prefix([target_layer.path])}{'_opposite' if opposite else ''}.png")
    check_target(target, ".png")
    if film:
        check_target(film, ".gif", folders=False)
    settings = dict[str, Any](size=size, steps=steps, seed=seed, batch=batch_size(batch), precision=precision)
    settings |= {"facets": facets, "opposite": opposite, "film": 24 if film else 0}
    with keeping_finished(target, film, as_json):
        rendered = render(handle, score, recipe, **settings, progress=not quiet)
    report(write(rendered, target, film), as_json, facts(rendered))
    if not quiet:
        warn_of_dead(rendered, handle, target_layer)


@contextmanager
def keeping_finished(target: Path, film: Path | None, as_json: bool) -> Iterator[None]:
    """Write the pictures that are finished if rendering stops or fails on the way, and end with exit code 1."""
    try:
        yield
    except Unfinished as stopped:
        if isinstance(stopped.finished, Rendered):
            report(write(stopped.finished, target, film), as_json, facts(stopped.finished))
        to_stderr(str(stopped))
        raise typer.Exit(1) from stopped


def warn_of_dead(rendered: Rendered, model: Model, layer: Layer) -> None:
    """Print which filters are dead, if any, and the layer to try instead; and which only want a flat colour."""
    dead, plain = (
        ", ".join(name for name, marked in zip(rendered.names, marks, strict=True) if marked)
        for marks in (rendered.dead, rendered.plain)
    )
    if dead:
        before = f"{layer.path}#preactivation"
        advice = f"; try {before}, which is scored before the activation" if before in model.modules else ""
        to_stderr(f"dead, crossed out in the grid: {dead}{advice}")
    if plain:
        to_stderr(f"alive, but a flat colour excites them as much as any pattern, marked plain in the grid: {plain}")


def objective_for(layer: Layer, name: str, channels: str | None) -> Objective:
    """Return the objective of a name for a layer.

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
    chosen = parse_channels(channels or f"0:{min(64, count)}", count)
    if name == "logit":
        return logit(chosen, layer.path)
    return (neuron if name == "neuron" else channel)(layer.path, chosen)


def write(rendered: Rendered, target: Path, film: Path | None) -> list[Path]:
    """Write a result where the user wants it and return the paths."""
    if target.suffix.lower() == ".png" and not target.is_dir():
        paths = [write_file(target, png(rendered.grid(), rendered.spec))]
    else:
        paths = rendered.save(target)
    return [*paths, rendered.save_film(film)] if film else paths


def facts(rendered: Rendered) -> dict[str, Any]:
    """Return what `--json` prints about a result."""
    pictures = [rendered.metadata(index) for index in range(len(rendered))]
    keys = ("picture", "score", "dead", "plain")
    return {**rendered.spec, "pictures": [{key: metadata[key] for key in keys} for metadata in pictures]}


@takes_model
def accentuate(
    open_model: OpenModel,
    photo: Photo,
    layer: LayerArgument,
    channel: Annotated[
        int | None, typer.Option(metavar="N", help="a filter; by default all that the layer sees")
    ] = None,
    amount: Annotated[str, typer.Option(metavar="A[,B,C]", help="from 0, the photo itself, to 1")] = "1",
    out: Annotated[Path, typer.Option(metavar="PATH.png", help="the picture to write")] = Path("accentuated.png"),
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="by default accentuate or caricature")] = None,
    size: Size = None,
    steps: Steps = None,
    seed: Seed = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw what excites a filter, or a layer, in a photo into that photo."""
    find_recipe(recipe or "accentuate").with_settings(size, steps, seed)
    amounts = checked_amounts(numbers(amount, "amount") or [])
    check_target(out, ".png", folders=False)
    handle = open_model()
    image, target = read(photo, handle.channels_in), chosen_layer(handle, layer, quiet)
    settings = dict[str, Any](size=size, steps=steps, seed=seed, progress=not quiet)
    rendered = render_accentuated(handle, image, target.path, channel, amounts, recipe, **settings)
    before, after = float(rendered.start_scores[0]), rendered.scores.tolist()
    picture = rendered.grid(len(amounts), captions=False)
    metadata = rendered.metadata(0) if len(amounts) == 1 else rendered.spec
    report([write_file(out, png(picture, metadata))], as_json, {**facts(rendered), "before": before, "after": after})
    if not quiet:
        subject = f"mean of filter {channel}" if channel is not None else "response along that to the photo"
        to_stderr(
            f"{target.path}, {subject}: {before:.4g} before, {', '.join(f'{score:.4g}' for score in after)} after"
        )


@takes_model
def dream(
    open_model: OpenModel,
    photo: Photo,
    layer: LayerArgument,
    out: Annotated[Path, typer.Option(metavar="PATH.png", help="the picture to write")] = Path("dream.png"),
    recipe: RecipeName = "dream",
    size: Size = None,
    steps: Steps = None,
    seed: Seed = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Change a photo so that a layer responds to it more strongly (DeepDream)."""
    find_recipe(recipe).with_settings(size, steps, seed)
    check_target(out, ".png", folders=False)
    handle = open_model()
    image = read(photo, handle.channels_in)
    path = chosen_layer(handle, layer, quiet).path
    rendered = render_dream(handle, image, path, recipe, size=size, steps=steps, seed=seed, progress=not quiet)
    report([write_file(out, png(rendered.pictures[0], rendered.metadata(0)))], as_json, facts(rendered))
