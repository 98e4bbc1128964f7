"""The record of a training: a folder with a folder for each epoch, which is written completely or not at all.

runs/a/manifest.json                 what is recorded, of which network
runs/a/epochs/000003/kernels.safetensors, gradients.safetensors, filters/*.png
runs/a/epochs/000003/manifest.json   written last: without it the epoch does not count
"""

import json
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
from phosphene.storage.atomic import check_writable, write_file, write_manifest
from phosphene.training.disk_budget import folder_bytes
from phosphene.training.epoch_record import EpochRecord, from_json_number, recorded_kernels

KIND = "training"
MANIFEST = "manifest.json"
KERNELS, GRADIENTS, FILTERS = "kernels.safetensors", "gradients.safetensors", "filters"


@dataclass(frozen=True)
class History:
    """The record of a training.

    Attributes:
        folder: the folder of the record.
        facts: what is recorded, of which network, as JSON values.
    """

    folder: Path
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"History({len(self.epochs)} epochs of {self.facts['model']} in {self.folder})"

    @property
    def epochs(self) -> list[int]:
        """The numbers of the finished epochs that are on the disk now."""
        names = [path.parent.name for path in (self.folder / "epochs").glob(f"*/{MANIFEST}")]
        return sorted(int(name) for name in names if name.isdigit())

    def __contains__(self, epoch: int) -> bool:
        """Return whether an epoch is recorded."""
        return (self.epoch_folder(epoch) / MANIFEST).exists()

    @property
    def layers(self) -> list[str]:
        """The layers whose kernels are recorded."""
        return [layer["path"] for layer in self.facts["layers"]]

    @property
    def weights(self) -> list[str]:
        """The names of the trainable weights, in the network's order."""
        return [weight["name"] for weight in self.facts["weights"] if weight["trained"]]

    def resolve_epoch(self, epoch: int | None) -> int:
        """Return an epoch, by default the last that is recorded.

        Raises:
            InvalidRequest: it is not recorded; the message says which are.
        """
        if epoch is not None and epoch in self:
            return epoch
        epochs = self.epochs
        if not epochs:
            raise InvalidRequest(f"{self.folder} holds no finished epoch yet; let the training finish one")
        if epoch is not None:
            raise InvalidRequest(f"{self.folder} holds no epoch {epoch}; it has {format_epochs(epochs)}")
        return epochs[-1]

    def epoch_folder(self, epoch: int) -> Path:
        """Return the folder of an epoch, recorded or not."""
        return self.folder / "epochs" / f"{epoch:06d}"

    def entry(self, epoch: int | None = None) -> dict[str, Any]:
        """Return what is recorded of an epoch besides arrays and pictures."""
        path = self.epoch_folder(self.resolve_epoch(epoch)) / MANIFEST
        with refusing_damage(path):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            return {name: from_json_number(value) for name, value in manifest.items()}

    def metrics(self, epoch: int | None = None) -> dict[str, float]:
        """Return an epoch's metrics."""
        return dict(self.entry(epoch)["metrics"])

    def find(self, layer: str | int) -> str:
        """Return the path of a recorded layer, from its path or its index among the recorded layers.

        Raises:
            LayerNotFound: the kernels of no such layer are recorded.
        """
        layers = self.layers
        if isinstance(layer, int) or layer.isdigit():
            if int(layer) < len(layers):
                return layers[int(layer)]
        elif layer in layers:
            return layer
        raise LayerNotFound(f"no kernels of {layer!r} are recorded; the nearest are: {nearest(str(layer), layers)}")

    def kernels(self, layer: str | int, epoch: int | None = None) -> Kernels:
        """Return the kernels of a layer after an epoch, by default the last.

        Raises:
            LayerNotFound, InvalidRequest: there is no such layer, or epoch.
        """
        path, epoch = self.find(layer), self.resolve_epoch(epoch)
        file_path = self.epoch_folder(epoch) / KERNELS
        with refusing_damage(file_path), safetensors.safe_open(file_path, "pt") as file:
            return recorded_kernels(path, file.get_tensor(path), self.facts, epoch)

    def gradients(self, epoch: int | None = None) -> dict[str, Tensor]:
        """Return an epoch's gradient of every trainable weight, in the network's order; {} if none are recorded."""
        path = self.epoch_folder(self.resolve_epoch(epoch)) / GRADIENTS
        with refusing_damage(path):
            arrays = safetensors.torch.load_file(path) if path.exists() else {}
        names = [weight["name"] for weight in self.facts["weights"]]
        return {name: arrays[name] for name in names if name in arrays}

    def record(self) -> list[list[Tensor]]:
        """Return the gradients of all epochs, epochs × tensors (R2.2a)."""
        return [list(self.gradients(epoch).values()) for epoch in self.epochs]

    def filters(self, epoch: int | None = None) -> dict[str, Picture]:
        """Return the pictures of filters after an epoch, by name, such as `filter_0`; {} if none are recorded."""
        folder = self.epoch_folder(self.resolve_epoch(epoch)) / FILTERS
        if not (folder / MANIFEST).exists():
            return {}
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {picture["picture"]: read_picture(folder / picture["file"]) for picture in manifest["pictures"]}

    def write(self, record: EpochRecord) -> int:
        """Write an epoch's record, its manifest last, and return its size in bytes.

        Raises:
            OutputRefused: it cannot be written; what was written of it is deleted.
        """
        folder = self.epoch_folder(record.epoch)
        shutil.rmtree(folder, ignore_errors=True)  # an unfinished epoch of a training that was killed
        try:
            if not (self.folder / MANIFEST).exists():  # somebody has deleted the record
                write_manifest(self.folder / MANIFEST, self.facts)
            kernels = {path: kernels.weights for path, kernels in record.kernels.items()}
            write_file(folder / KERNELS, safetensors.torch.save(kernels))
            if record.gradients:
                arrays = {name: gradient.mean.contiguous() for name, gradient in record.gradients.items()}
                write_file(folder / GRADIENTS, safetensors.torch.save(arrays))
            if record.filters:
                record.filters.save(folder / FILTERS, captions=False)  # which would take ten times the place
            write_manifest(folder / MANIFEST, record.manifest())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder_bytes(folder)

    def set_aside(self, first: int) -> Path | None:
        """Move this epoch and all later ones to `replaced/N`, and return that folder; None if there are none."""
        epochs = [epoch for epoch in self.epochs if epoch >= first]
        if not epochs:
            return None
        replaced = self.folder / "replaced"
        target = replaced / str(sum(1 for _ in replaced.glob("*")))
        target.mkdir(parents=True)
        for epoch in epochs:
            self.epoch_folder(epoch).rename(target / self.epoch_folder(epoch).name)
        return target


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Refuse a file of an epoch that turns out to be damaged."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsRefused(
            f"{path} is damaged ({error}); restore it from a copy, or delete {path.parent} to leave this epoch out"
        ) from error


def open_history(folder: str | Path) -> History:
    """Return the record of a training.

    Raises:
        ModelNotFound: the folder holds none.
        WeightsRefused: its manifest is damaged.
    """
    path = Path(folder)
    if not is_history(path):
        raise ModelNotFound(f"{path} holds no record of a training; give the folder that a Recorder wrote to")
    return History(path, read_facts(path))


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a record says."""
    try:
        facts: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsRefused(f"{folder / MANIFEST} is damaged: {error}; restore it from a copy") from error
    return facts


def is_history(path: str | Path) -> bool:
    """Return whether a folder holds the record of a training."""
    manifest = Path(path) / MANIFEST
    try:
        return manifest.is_file() and f'"kind": "{KIND}"' in manifest.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def resume_or_create(folder: Path, facts: Mapping[str, Any]) -> History:
    """Return the record in a folder, a new one or one to be continued; refuse a folder that holds anything else."""
    check_writable(folder, folder=True)
    facts = json.loads(json.dumps(facts))  # as they will be read
    if not is_history(folder):
        if (folder / MANIFEST).exists():
            raise InvalidRequest(f"{folder} holds other results; give the record of a training a folder of its own")
        write_manifest(folder / MANIFEST, {"kind": KIND, **facts})
        return History(folder, {"kind": KIND, **facts})
    recorded = read_facts(folder)
    check_same(folder, recorded, facts)
    pairs = zip(recorded["weights"], facts["weights"], strict=True)
    weights = [{**old, "trained": old["trained"] or new["trained"]} for old, new in pairs]  # some are unfrozen later
    if weights != recorded["weights"]:
        recorded = {**recorded, "weights": weights}
        write_manifest(folder / MANIFEST, recorded)
    return History(folder, recorded)


def check_same(folder: Path, recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to continue the record of another network, or one with other contents."""
    for name in ("weights", "layers"):
        old, new = ([description(tensor) for tensor in source[name]] for source in (recorded, facts))
        if old != new:
            pairs = zip_longest(old, new, fillvalue="no more")
            before, now = next(pair for pair in pairs if pair[0] != pair[1])
            raise InvalidRequest(
                f"the record in {folder} is another network's: it has {before} where this one has {now}; choose "
                "another folder"
            )
    for name in ("gradients", "filters", "every"):
        if recorded[name] != facts[name]:
            difference = "other filters" if name == "filters" else f"{name}={recorded[name]!r}, not {facts[name]!r}"
            raise InvalidRequest(
                f"the record in {folder} was made with {difference}; choose another folder, or keep its settings"
            )


def description(facts: Mapping[str, Any]) -> str:
    """Return a weight or a layer as it is compared and named: with its shape and number format, or its kind."""
    return " ".join(str(facts[key]) for key in ("name", "path", "shape", "dtype", "kind") if key in facts)


def format_epochs(epochs: Sequence[int]) -> str:
    """Return epoch numbers for a message: "0, 1, 2", or the first and last of many."""
    return ", ".join(map(str, epochs)) if len(epochs) < 12 else f"{len(epochs)} from {epochs[0]} to {epochs[-1]}"


def read_picture(path: Path) -> Picture:
    """Return the picture in a file, completely read."""
    with Image.open(path) as image:
        image.load()
        return image
