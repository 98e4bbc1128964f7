"""The commands that look at a photo: `activations` and `cam`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from phosphene.cli.options import AsJson, OpenModel, Quiet, address, takes_model
from phosphene.cli.output import check_target, report, to_stderr, to_stdout
from phosphene.errors import InvalidRequest, PhotoRefused
from phosphene.images.photo import SUFFIXES, read
from phosphene.inspection.activations import activations as read_activations
from phosphene.inspection.attribution_methods import CAMS, INPUT_METHODS
from phosphene.inspection.explain import Explainer, explaining
from phosphene.inspection.heatmap import Heatmap
from phosphene.inspection.overlay import STYLES
from phosphene.network.model import Model
from phosphene.progress import progress_bar
from phosphene.storage.atomic import check_writable, write_manifest

BATCH = 8  # photos of a folder that go through the network at once

Photo = Annotated[Path, typer.Argument(metavar="PHOTO", help="a JPEG, PNG, WebP, GIF, TIFF or BMP")]


@takes_model
def activations(
    open_model: OpenModel,
    photo: Photo,
    layers: Annotated[str, typer.Option(metavar="GLOB", help="which layers, such as 'block3*'")] = "*",
    channel: Annotated[int | None, typer.Option(metavar="N", help="one channel of each, drawn large")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the pictures go")] = Path("activations"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw what every channel of a network's layers makes of a photo, and a summary of all layers."""
    check_writable(out, folder=True)
    model = open_model()
    maps = read_activations(model, read(photo, model.channels_in), layers)
    report(
        maps.save(out, channel, progress=not quiet), as_json, {**maps.spec, "layers": maps.rows()} if as_json else {}
    )


@takes_model
def cam(
    open_model: OpenModel,
    photo: Annotated[Path, typer.Argument(metavar="PHOTO|DIR", help="a photo, or a folder of photos")],
    layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="where to look; by default the last layer with a map")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME|INDEX", help="the class; by default the most probable")
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="|".join([*CAMS, *INPUT_METHODS]))] = "gradcam",
    style: Annotated[str, typer.Option(metavar="|".join(STYLES), help="how the heat is drawn")] = STYLES[0],
    out: Annotated[Path | None, typer.Option(metavar="PATH.png|DIR", help="a folder for a folder of photos")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show where on a photo the evidence for a class lies."""
    if style not in STYLES:
        raise InvalidRequest(f"there is no style {style!r}; choose one of: {', '.join(STYLES)}")
    target_class = int(target) if target is not None and target.isdigit() else target
    destination = out or Path("cam" if photo.is_dir() else "cam.png")
    if photo.is_dir():
        if destination.suffix and not destination.is_dir():
            raise InvalidRequest(f"{photo} is a folder, so its heat maps go into one; {destination} looks like a file")
        check_writable(destination, folder=True)
    else:
        check_target(destination, ".png", folders=False)
    files = photos_in(photo) if photo.is_dir() else []
    model = open_model()
    image = None if files else read(photo, model.channels_in)
    single = not quiet and image is not None  # a folder has a bar of its own
    with explaining(model, None if layer is None else address(layer), method, progress=single) as explainer:
        if not quiet:
            to_stderr(f"{method} at {explainer.spec['layer']}")
        if image is None:
            explain_folder(explainer, files, destination, target_class, style, quiet, as_json)
            return
        heat = explainer(image, target_class)
        if not quiet:
            print_classes(heat)
        report([heat.save(destination, image, style)], as_json, heat.metadata())


def print_classes(heat: Heatmap) -> None:
    """Print the most probable classes, whether the map is empty, and the limits of its method."""
    for guess in heat.top:
        to_stderr(f"{guess.probability:6.1%}  {guess.name}")
    if heat.is_empty:
        to_stderr(heat.empty_message())
    if heat.caution:
        to_stderr(f"{heat.method}: {heat.caution}")


def photos_in(folder: Path) -> list[Path]:
    """Return the files of a folder whose names end like those of photos.

    Raises:
        PhotoRefused: there is none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise PhotoRefused(f"there is no photo in {folder}; photos are {', '.join(SUFFIXES)}")
    return files


def explain_folder(
    explainer: Explainer, files: list[Path], out: Path, target: int | str | None, style: str, quiet: bool, as_json: bool
) -> None:
    """Write the heat map of every photo, and `manifest.json` last; unreadable photos are reported and skipped.

    Raises:
        Exit: with code 1, if a photo could not be read.
    """
    names, refused = output_names(files), dict[str, str]()
    done: list[dict[str, Any]] = []
    try:
        with progress_bar(explainer.spec["method"], "photos", not quiet) as bar:
            bar.total = len(files)
            for start in range(0, len(files), BATCH):
                batch = files[start : start + BATCH]
                photos = dict(readable(explainer.model, batch, refused))
                heatmaps = explainer.explain_batch(list(photos.values()), target) if photos else []
                for (path, image), heat in zip(photos.items(), heatmaps, strict=True):
                    written = heat.save(out / names[path], image, style)
                    done.append({"photo": path.name, "file": written.name, **heat.metadata()})
                    if not as_json:
                        to_stdout(written)
                bar.done += len(batch)
    finally:
        manifest = write_manifest(out / "manifest.json", {"photos": done, "refused": refused})
    report([out / row["file"] for row in done] * as_json + [manifest], as_json, {"photos": done, "refused": refused})
    if refused:
        to_stderr(f"{len(refused)} of {len(files)} photos could not be read")
        raise typer.Exit(1)


def readable(model: Model, paths: Sequence[Path], refused: dict[str, str]) -> Iterator[tuple[Path, Any]]:
    """Yield each photo that can be read, with its path; note and print why the others cannot."""
    for path in paths:
        try:
            yield path, read(path, model.channels_in)
        except PhotoRefused as error:
            refused[path.name] = str(error)
            to_stderr(str(error))


def output_names(files: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each photo's heat map: `cat.png`, or `cat.jpg.png` where two photos would share it."""
    stems = [path.stem for path in files]
    return {path: f"{path.stem if stems.count(path.stem) == 1 else path.name}.png" for path in files}
