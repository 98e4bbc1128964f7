"""The record of a training: a folder with one entry an epoch, each of them whole or not there.

runs/a/manifest.json                 what is recorded, of which network
runs/a/epochs/000003/kernels.safetensors, gradients.safetensors, filters/*.png
runs/a/epochs/000003/manifest.json   written last: without it the epoch does not count
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from torch import Tensor

from phosphene.errors import InvalidRequest, LayerNotFound, ModelNotFound, WeightsRefused, nearest
from phosphene.images.display import Picture
from phosphene.inspection.kernels import Kernels
from phosphene.rendering.result import Rendered
from phosphene.storage.atomic import check_writable, write_file, write_manifest
from phosphene.training.gradient_statistics import BIAS, Gradient

KIND = "training"
MANIFEST = "manifest.json"
KERNELS, GRADIENTS, FILTERS = "kernels.safetensors", "gradients.safetensors", "filters"


@dataclass(frozen=True, eq=False)
class EpochRecord:
    """What is recorded of one epoch.

    Attributes:
        metrics: numbers by name, such as the loss.
        kernels: of each recorded layer, (out, in, kh, kw).
        gradients: of each trainable weight that had one.
        weight_norms: the L2 norm of each trainable weight at the epoch's end.
        facts: how the gradients were taken: `kind`, `read`, `batches`; empty where none were.
        filters: pictures of filters as they are now, None where none were asked for.
        notes: what the user should know, such as gradients that are not finite.
    """

    epoch: int
    metrics: Mapping[str, float]
    kernels: Mapping[str, Kernels]
    gradients: Mapping[str, Gradient]
    weight_norms: Mapping[str, float]
    facts: Mapping[str, Any]
    filters: Rendered | None = None
    notes: tuple[str, ...] = ()

    def manifest(self) -> dict[str, Any]:
        """Return all of it but the arrays and pictures, in JSON terms."""
        weights = {name: statistics(one, self.weight_norms[name]) for name, one in self.gradients.items()}
        return {
            "epoch": self.epoch,
            "metrics": {name: json_number(one) for name, one in self.metrics.items()},
            "gradients": {**self.facts, "weights": weights} if self.facts else None,
            "filters": self.filters.spec if self.filters else None,
            "notes": list(self.notes),
        }


def statistics(gradient: Gradient, weight_norm: float) -> dict[str, Any]:
    """Return what is known of a gradient beside its array, in JSON terms; the histogram by power of two."""
    counts = {histogram_name(number): int(count) for number, count in enumerate(gradient.histogram) if count}
    return {
        "mean_abs": json_number(gradient.mean_abs),
        "norm": json_number(gradient.norm),
        "weight_norm": json_number(weight_norm),
        "size": gradient.mean.numel(),
        "batches": gradient.batches,
        "nonfinite": gradient.nonfinite,
        "first_nonfinite": gradient.first_nonfinite,
        "histogram": counts,
    }


def histogram_name(number: int) -> str:
    """Return which entries a bin counts: "-12" for 2^-12 <= |g| < 2^-11, "zero" also for less than 2^-126."""
    return {0: "zero", 255: "nonfinite"}.get(number, str(number - BIAS))


def json_number(number: float) -> float | str:
    """Return a number as JSON can hold it: what is not finite as "NaN", "Infinity" or "-Infinity"."""
    return number if math.isfinite(number) else json.dumps(number)


def from_json_number(value: Any) -> Any:
    """Return what was read with the numbers that `spelled` wrote as text."""
    if isinstance(value, dict):
        return {name: from_json_number(one) for name, one in value.items()}
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


@dataclass(frozen=True)
class History:
    """The record of a training.

    Attributes:
        folder: where it lies.
        facts: what is recorded, of which network, in JSON terms.
    """

    folder: Path
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"History({len(self.epochs)} epochs of {self.facts['model']} in {self.folder})"

    @property
    def epochs(self) -> list[int]:
        """The numbers of the finished epochs, as they lie on the disk now."""
        found = (self.folder / "epochs").glob(f"*/{MANIFEST}")
        return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())

    def __contains__(self, epoch: int) -> bool:
        """Return whether an epoch is recorded."""
        return (self.place(epoch) / MANIFEST).exists()

    @property
    def layers(self) -> list[str]:
        """The layers whose kernels are recorded."""
        return [one["path"] for one in self.facts["layers"]]

    @property
    def weights(self) -> list[str]:
        """The names of the trainable weights, in the network's order."""
        return [one["name"] for one in self.facts["weights"] if one["trained"]]

    def chosen(self, epoch: int | None) -> int:
        """Return the epoch asked for, by default the last.

        Raises:
            InvalidRequest: it is not recorded; the message says which are.
        """
        if epoch is not None and epoch in self:
            return epoch
        known = self.epochs
        if not known:
            raise InvalidRequest(f"{self.folder} holds no finished epoch yet; let the training go on for one")
        if epoch is not None:
            raise InvalidRequest(f"{self.folder} holds no epoch {epoch}; it has {listed(known)}")
        return known[-1]

    def place(self, epoch: int) -> Path:
        """Return the folder of an epoch, recorded or not."""
        return self.folder / "epochs" / f"{epoch:06d}"

    def entry(self, epoch: int | None = None) -> dict[str, Any]:
        """Return what is recorded of an epoch beside arrays and pictures."""
        path = self.place(self.chosen(epoch)) / MANIFEST
        with refusing_damage(path):
            return {name: from_json_number(one) for name, one in json.loads(path.read_text(encoding="utf-8")).items()}

    def metrics(self, epoch: int | None = None) -> dict[str, float]:
        """Return an epoch's metrics."""
        return dict(self.entry(epoch)["metrics"])

    def find(self, layer: str | int) -> str:
        """Return the path of a recorded layer: as it stands there, or of the n-th that is recorded.

        Raises:
            LayerNotFound: the kernels of no such layer are recorded.
        """
        names = self.layers
        if isinstance(layer, int) or layer.isdigit():
            if int(layer) < len(names):
                return names[int(layer)]
        elif layer in names:
            return layer
        raise LayerNotFound(f"no kernels of {layer!r} are recorded; the nearest are: {nearest(str(layer), names)}")

    def kernels(self, layer: str | int, epoch: int | None = None) -> Kernels:
        """Return the kernels of a layer after an epoch, by default the last.

        Raises:
            LayerNotFound, InvalidRequest: there is no such layer, or epoch.
        """
        path, number = self.find(layer), self.chosen(epoch)
        with (
            refusing_damage(self.place(number) / KERNELS),
            safetensors.safe_open(self.place(number) / KERNELS, "pt") as file,
        ):
            return kernels_of(path, file.get_tensor(path), self.facts, number)

    def gradients(self, epoch: int | None = None) -> dict[str, Tensor]:
        """Return an epoch's gradient of every trainable weight, in the network's order; {} where none are recorded."""
        path = self.place(self.chosen(epoch)) / GRADIENTS
        with refusing_damage(path):
            found = safetensors.torch.load_file(path) if path.exists() else {}
        return {one["name"]: found[one["name"]] for one in self.facts["weights"] if one["name"] in found}

    def record(self) -> list[list[Tensor]]:
        """Return the gradients of all epochs, epochs × tensors (R2.2a)."""
        return [list(self.gradients(epoch).values()) for epoch in self.epochs]

    def filters(self, epoch: int | None = None) -> dict[str, Picture]:
        """Return the pictures of filters after an epoch, by name, such as `filter_0`; {} where none are recorded."""
        folder = self.place(self.chosen(epoch)) / FILTERS
        if not (folder / MANIFEST).exists():
            return {}
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["pictures"]
        return {one["picture"]: opened(folder / one["file"]) for one in listed}

    def write(self, entry: EpochRecord) -> int:
        """Write an epoch's entry, its manifest last, and return its size in bytes.

        Raises:
            OutputRefused: it cannot be written; what was begun is taken away.
        """
        place = self.place(entry.epoch)
        shutil.rmtree(place, ignore_errors=True)  # what a training that was killed had begun
        try:
            if not (self.folder / MANIFEST).exists():  # somebody has deleted the record
                write_manifest(self.folder / MANIFEST, self.facts)
            kernels = {path: one.weights for path, one in entry.kernels.items()}
            write_file(place / KERNELS, safetensors.torch.save(kernels))
            if entry.gradients:
                arrays = {name: one.mean.contiguous() for name, one in entry.gradients.items()}
                write_file(place / GRADIENTS, safetensors.torch.save(arrays))
            if entry.filters:
                entry.filters.save(place / FILTERS)
            write_manifest(place / MANIFEST, entry.manifest())
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return size_of(place)

    def set_aside(self, epoch: int) -> Path | None:
        """Move the entries from an epoch on to `replaced/N`, and return that folder; None where there are none."""
        old = [one for one in self.epochs if one >= epoch]
        if not old:
            return None
        aside = self.folder / "replaced"
        number = sum(1 for _ in aside.glob("*"))
        target = aside / str(number)
        target.mkdir(parents=True)
        for one in old:
            self.place(one).rename(target / self.place(one).name)
        return target


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Refuse a file of an epoch that turns out to be damaged.

    Raises:
        WeightsRefused: the message says which.
    """
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsRefused(
            f"{path} is damaged ({error}); put it back from a copy, or delete {path.parent} to leave this epoch out"
        ) from error


def kernels_of(path: str, weights: Tensor, facts: Mapping[str, Any], epoch: int) -> Kernels:
    """Return kernels (out, in, kh, kw) as they are shown: of which layer of which network, after which epoch."""
    first = facts["layers"][0]["path"] == path
    spec = {
        "model": facts["model"],
        "layer": path,
        "kind": next(one["kind"] for one in facts["layers"] if one["path"] == path),
        "shape": list(weights.shape),
        "colours": "rgb" if first and weights.shape[1] == 3 else None,
        "epoch": epoch,
        "versions": facts["versions"],
    }
    return Kernels(weights, spec)


def open_history(folder: str | Path) -> History:
    """Return the record of a training.

    Raises:
        ModelNotFound: the folder holds none.
        WeightsRefused: its manifest is damaged.
    """
    where = Path(folder)
    if not is_history(where):
        raise ModelNotFound(f"{where} holds no record of a training; give the folder that a Recorder wrote to")
    return History(where, read_facts(where))


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what a run's manifest says."""
    try:
        facts: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsRefused(f"{folder / MANIFEST} is damaged: {error}; put it back from a copy") from error
    return facts


def is_history(path: str | Path) -> bool:
    """Return whether a folder holds the record of a training."""
    manifest = Path(path) / MANIFEST
    try:
        return manifest.is_file() and f'"kind": "{KIND}"' in manifest.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def resume_or_create(folder: Path, facts: Mapping[str, Any]) -> History:
    """Return the record in a folder, begun anew or gone on with.

    Raises:
        InvalidRequest: it holds the record of another network, or one that holds other things, or something else.
        OutputRefused: it cannot be written.
    """
    check_writable(folder, folder=True)
    facts = json.loads(json.dumps(facts))  # as it is read again
    if not is_history(folder):
        if (folder / MANIFEST).exists():
            raise InvalidRequest(f"{folder} holds other results; give the record of a training a folder of its own")
        write_manifest(folder / MANIFEST, {"kind": KIND, **facts})
        return History(folder, {"kind": KIND, **facts})
    known = read_facts(folder)
    check_same(folder, known, facts)
    both = zip(known["weights"], facts["weights"], strict=True)
    weights = [{**old, "trained": old["trained"] or new["trained"]} for old, new in both]  # some may be trained later
    if weights != known["weights"]:
        known = {**known, "weights": weights}
        write_manifest(folder / MANIFEST, known)
    return History(folder, known)


def check_same(folder: Path, known: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to go on with a record of something else."""
    for name in ("weights", "layers"):
        there, here = ([shown(one) for one in some[name]] for some in (known, facts))
        if there != here:
            old, new = next(pair for pair in zip_longest(there, here, fillvalue="no more") if pair[0] != pair[1])
            raise InvalidRequest(
                f"the record in {folder} is another network's: it has {old} where this one has {new}; choose another "
                "folder"
            )
    for name in ("gradients", "filters", "every"):
        if known[name] != facts[name]:
            which = "other filters" if name == "filters" else f"{name}={known[name]!r}, not {facts[name]!r}"
            raise InvalidRequest(
                f"the record in {folder} is one with {which}; choose another folder, or go on with the same"
            )


def shown(line: Mapping[str, Any]) -> str:
    """Return a weight or a layer as it is compared and named: with its shape and number format, or its kind."""
    return " ".join(str(line[one]) for one in ("name", "path", "shape", "dtype", "kind") if one in line)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def listed(epochs: Sequence[int]) -> str:
    """Return epoch numbers for a message: "0, 1, 2", or the first and last of many."""
    return ", ".join(map(str, epochs)) if len(epochs) < 12 else f"{len(epochs)} from {epochs[0]} to {epochs[-1]}"


def opened(path: Path) -> Picture:
    """Return a picture that is read whole."""
    with Image.open(path) as image:
        image.load()
        return image
