"""The commands that look at weights, `kernels`, and at how a training made them, `strip` and `gradients`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from phosphene.cli.options import (
    MODEL_OPTIONS,
    AsJson,
    LayerArgument,
    OpenModel,
    Quiet,
    address,
    chosen_layer,
    takes_model,
)
from phosphene.cli.output import check_target, report, to_stderr, to_stdout
from phosphene.errors import InvalidRequest, WeightsRefused
from phosphene.images import captions
from phosphene.inspection.kernels import STYLES, write_pages
from phosphene.inspection.kernels import kernels as read_kernels
from phosphene.network.layers import file_prefix
from phosphene.training.film_strip import check_film, format_metric, layer_strip, recorded_layer
from phosphene.training.gradient_norms import GradientNorms
from phosphene.training.gradient_plot import curve_facts, save_curves
from phosphene.training.gradient_verdicts import verdicts_of
from phosphene.training.history import History, is_history, open_history

Command = Callable[..., None]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="the folder that a Recorder wrote to")]
RunLayer = Annotated[str, typer.Argument(metavar="LAYER", help="the path of a recorded layer, or n for the n-th")]
Style = Annotated[str, typer.Option(metavar="|".join(STYLES), help="signed: blue, white, red; grey: lowest to highest")]
Epoch = Annotated[int | None, typer.Option(metavar="N", help="of a recorded training; by default its last")]
SheetPath = Annotated[Path | None, typer.Option(metavar="PATH.png", help="the sheet to write")]


def or_of_run(of_run: Command) -> Callable[[Command], Command]:
    """Let a command that takes a model also take the folder of a recorded training, and call `of_run` for that.

    `of_run` has the command's own parameters, with the folder as the first.
    """

    def decorated(of_model: Command) -> Command:
        @functools.wraps(of_model)
        def run(*, model: str, **arguments: Any) -> None:
            if not is_history(model):
                of_model(model=model, **arguments)
                return
            changed = [name for name, (_, default) in MODEL_OPTIONS.items() if arguments.pop(name) != default]
            if changed:
                option = changed[0].replace("_", "-")
                raise InvalidRequest(f"{model} is the record of a training, which --{option} is not for; leave it out")
            of_run(Path(model), **arguments)

        return run

    return decorated


def kernels_of_run(
    run: Path, layer: str, epoch: int | None, style: str, out: Path | None, quiet: bool, as_json: bool
) -> None:
    """Draw the kernels of a layer as they were after an epoch of a training."""
    check_style(style)
    check_sheet(out)
    history = open_history(run)
    chosen = history.resolve_epoch(epoch)
    path = recorded(history, layer, quiet)
    target = out or Path(f"{sheet_name(path)}_epoch_{chosen}.png")
    check_sheet(target)
    weights = history.kernels(path, chosen)
    if not bool(weights.weights.isfinite().all()):
        raise WeightsRefused(
            f"after epoch {chosen} the kernels of {path} hold NaN or infinity; choose an earlier --epoch, and see what "
            f"`phosphene gradients {run}` says"
        )
    metrics = "".join(f" · {name} {format_metric(value)}" for name, value in history.metrics(chosen).items())
    pages = [captions.with_caption(page, f"epoch {chosen}{metrics}") for page in weights.pictures(style)]
    facts = {**weights.spec, "run": str(run), "epoch": chosen, "style": style}
    report(write_pages(pages, target, facts), as_json, facts)


@or_of_run(kernels_of_run)
@takes_model
def kernels(
    open_model: OpenModel,
    layer: LayerArgument,
    epoch: Epoch = None,
    style: Style = "signed",
    out: SheetPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw the weights of a convolution: one row per filter, one column per input channel, one scale for all.

    MODEL may be the folder of a recorded training.
    """
    check_style(style)
    check_sheet(out)
    if epoch is not None:
        raise InvalidRequest("--epoch is for the folder of a recorded training, which MODEL is not; leave it out")
    model = open_model()
    layer_of_model = chosen_layer(model, layer, quiet)
    target = out or Path(f"{sheet_name(layer_of_model.path)}.png")
    check_sheet(target)
    weights = read_kernels(model, layer_of_model.path)
    facts = {**weights.spec, "style": style}
    report(write_pages(weights.pictures(style), target, facts), as_json, facts)


def strip(
    run: Run,
    layer: RunLayer,
    style: Style = "signed",
    out: Annotated[
        Path | None, typer.Option(metavar="PATH.png|.gif|.mp4", help="a strip, or a film with one frame per epoch")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw a layer over a training, one row per epoch: its rendered filters if the run has them, else its kernels."""
    check_style(style)
    check_strip(out)
    history = open_history(run)
    drawing = layer_strip(history, layer, style)
    if layer.isdigit() and not quiet:
        to_stderr(f"layer {layer} of the record is {drawing.layer}")
    target = out or Path(f"{file_prefix([drawing.layer]).replace('layer_', 'strip_', 1)}.png")
    check_strip(target)
    path, facts = drawing.save(target)
    report([path], as_json, facts)


def gradients(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="PATH.png", help="the curves to write")] = Path("gradients.png"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw how large the gradients of every weight were, epoch by epoch, and say what is wrong with them."""
    check_sheet(out)
    norms = GradientNorms.of(open_history(run))
    path = save_curves(norms, out)
    report([path], as_json, {**curve_facts(norms), "weights": norms.rows()})
    if not as_json:
        for sentence in verdicts_of(norms):
            to_stdout(sentence)


def recorded(history: History, layer: str, quiet: bool) -> str:
    """Return the path of a recorded layer, and print which one a number means."""
    path = recorded_layer(history, address(layer))
    if layer.isdigit() and not quiet:
        to_stderr(f"layer {layer} of the record is {path}")
    return path


def sheet_name(path: str) -> str:
    """Return the name of a layer's kernel sheet without its ending."""
    return file_prefix([path]).replace("layer_", "kernels_", 1)


def check_style(style: str) -> None:
    """Refuse the name of a style that does not exist."""
    if style not in STYLES:
        raise InvalidRequest(f"there is no style {style!r}; choose one of: {', '.join(STYLES)}")


def check_sheet(out: Path | None) -> None:
    """Find out before the work whether a PNG can be written."""
    if out is not None:
        check_target(out, ".png", folders=False)


def check_strip(out: Path | None) -> None:
    """Find out before the work whether a strip or a film can be written."""
    if out is None:
        return
    if out.suffix.lower() not in (".png", ".gif", ".mp4"):
        raise InvalidRequest(f"{out} does not end in .png, .gif or .mp4; give a strip or a film one of these")
    check_sheet(out) if out.suffix.lower() == ".png" else check_film(out)
