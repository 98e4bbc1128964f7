"""The command `demo`: what filters of trained networks respond to, as a store, and what a network makes of a photo."""

from collections.abc import Generator, Iterator
from contextlib import closing
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from phosphene.atlases.entries import saved_pictures
from phosphene.atlases.plan import Atlas, atlas
from phosphene.atlases.run import AtlasRun, errors_with_summary
from phosphene.atlases.runners.local import LocalRunner
from phosphene.cli.options import AsJson, Device, Quiet
from phosphene.cli.output import report, to_stderr, to_stdout
from phosphene.cli.web import check_web_extra, print_and_open, serve_place
from phosphene.errors import Unfinished
from phosphene.images.display import Picture
from phosphene.images.encode import png
from phosphene.images.photo import read
from phosphene.inspection.activations import activations
from phosphene.inspection.explain import explain
from phosphene.network.layers import Layer
from phosphene.network.loading import load, torch_device
from phosphene.rendering.filter_sheet import SheetPicture, filter_sheet
from phosphene.rendering.recipes import find_recipe
from phosphene.storage.atomic import check_writable, write_file
from phosphene.storage.store import Store, open_store

STORE = "store"  # in the demonstration's folder
COLUMNS = 6
SIZE = 96  # px, at most
PER_JOB = 12  # so that two processes share a layer
ACTIVATION_LAYERS = "block?_relu1"  # after a ReLU, the channels that stay blank can be counted
PHOTO = "chelsea.jpg"


class DemoSheet(NamedTuple):
    """Filters that are drawn: the first `filters` of some layers of a built-in network."""

    model: str
    layers: tuple[str, ...]
    filters: int


# not block1_conv1: before its activation it is linear in the picture, so its mean over the map only answers to a colour
VGG19 = DemoSheet("builtin/vgg19", ("block1_conv2", *(f"block{number}_conv1" for number in (2, 3, 4, 5))), 24)
LITE0_LAYERS = ("_blocks.5._project_conv", "_blocks.10._project_conv", "_conv_head")
LITE0 = DemoSheet("builtin/efficientnet-lite0", LITE0_LAYERS, 24)
SHEETS = (VGG19, LITE0)


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the pictures go")] = Path("phosphene-demo"),
    and_serve: Annotated[bool, typer.Option("--serve", help="then open them in a browser")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw sheets of filters of the built-in trained networks, and what they see in a photo."""
    check_writable(out, folder=True)
    if and_serve:
        check_web_extra()
    paths = []
    with closing(demonstrate(out, torch_device(device), not quiet)) as drawn:
        for path in drawn:
            paths.append(path)
            if not as_json:
                to_stdout(path)
    if as_json:
        report(paths, as_json, {"store": str(out / STORE)})
    elif not quiet:
        names = " and ".join(sheet.model for sheet in SHEETS)
        to_stderr(f"the filters of {names}, and what they see in a photo, are in {out.resolve()}")
    if and_serve:
        serve_place(str(out), print_and_open, device=device)
    elif not quiet:
        to_stderr(f"to browse it: phosphene serve {out}")


def demonstrate(folder: Path, device: str | torch.device = "cpu", progress: bool = True) -> Generator[Path, None, None]:
    """Draw filters of every block of two built-in networks into a store, and what they see in a photo.

    Yields the path of each picture once it is written. Finished jobs in the store are skipped.
    """
    store = open_store(folder / STORE, create=True)
    models = {sheet: load(sheet.model, device=device) for sheet in SHEETS}
    plans = [
        atlas(model, sheet.layers, range(sheet.filters), find_recipe("fast").with_settings(SIZE), per_job=PER_JOB)
        for sheet, model in models.items()
    ]
    for plan in plans:
        for layer, picture in sheets(store, plan, progress):
            name = f"{plan.model.name.removeprefix('builtin/')}_{layer.path}.png"
            yield write_file(folder / name, png(picture, {**plan.model.origin, "layer": layer.path}))
    with as_file(files("phosphene").joinpath("data", PHOTO)) as path:
        photo = read(path)
    yield from activations(models[VGG19], photo, ACTIVATION_LAYERS).save(folder / "activations", progress=progress)
    yield explain(models[LITE0], photo, progress=progress).save(folder / "heat_map.png", photo)


def sheets(store: Store, plan: Atlas, progress: bool) -> Iterator[tuple[Layer, Picture]]:
    """Yield each layer with the sheet of its pictures, see `filter_sheet`, as soon as the layer is finished.

    Raises:
        Unfinished: a picture could not be drawn.
    """
    atlas_run = AtlasRun(plan, store, progress=progress)
    with errors_with_summary(atlas_run):
        for layer in atlas_run.finished_layers(LocalRunner()):
            done = [job for job in plan.jobs_of(layer) if job.digest in atlas_run.done]
            saved = [(picture.image, picture.entry) for job in done for picture in saved_pictures(store, job)]
            pictures = [
                SheetPicture(image, entry["picture"], entry["dead"], entry.get("plain", False))
                for image, entry in saved
            ]
            spec = {"layers": [layer.path], "sees": [layer.field_size], "recipe": plan.recipes[0].as_dict()}
            if pictures:
                yield layer, filter_sheet(pictures, {**spec, "model": plan.model.name}, COLUMNS)
        summary = atlas_run.end()
    for reason in summary.failed.values():
        raise Unfinished(reason, summary)
