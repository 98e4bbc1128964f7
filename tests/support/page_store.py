"""What pages are made of: a store with all filters of two convolutions and photos, and the record of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fake_training_record import gradient, record_of
from phosphene.atlases.run import run
from phosphene.images.encode import decode_image
from phosphene.storage.store import Store, open_store
from phosphene.training.history import History
from phosphene.web.cache import SizedCache
from phosphene.web.store_reader import Filter, StoreReader
from phosphene.web.urls import SpriteTile
from phosphene.web.views.training import TrainingView
from tiny_atlas import InProcessRunner, tiny_atlas, tiny_model

FIRST, SECOND = ".0", ".2"  # 6 and 8 filters, fields of 3 and 5 px
NAMES = ("a.png", "b.png", "c.png", "d.png")
LAYERS = ("conv1", "deep/conv2")
LOSSES = (2.0, 1.0, 0.5)


def photos(folder: Path, names: Sequence[str]) -> Path:
    """Write a few photos of 16 px, which is the size of the pictures, noise each."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (len(names), 16, 16, 3), dtype=np.uint8)
    for name, pixels in zip(names, noise, strict=True):
        Image.fromarray(pixels).save(folder / name)
    return folder


def filled(folder: Path, *failing: str, names: Sequence[str] = NAMES, **options: object) -> Store:
    """Return a store with a finished atlas, of photos with these names; jobs given by digest fail."""
    store = open_store(folder / "store", create=True)
    plan = tiny_atlas(tiny_model(), **options)
    run(plan, store, InProcessRunner(*failing), photos(folder / "photos", names) if names else None)
    return store


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return StoreReader([filled(tmp_path_factory.mktemp("views"))])


@pytest.fixture(scope="session")
def atlas_id(reader: StoreReader) -> str:
    return reader.atlases()[0].atlas_id


@pytest.fixture(scope="session")
def cut(reader: StoreReader, atlas_id: str) -> Callable[[SpriteTile], np.ndarray]:
    """Return what gives the pixels of a tile, out of the file that it names."""
    read = SizedCache[Image.Image](1000)

    def content(path: str) -> bytes:
        match path.split("/"):
            case ["atlas", _, slug, name]:
                layer = slug.replace("~2E", ".")
                return (
                    reader.job_file(atlas_id, layer, int(name[5:-5]), "film.webp")
                    if name.startswith("film_")
                    else reader.file(atlas_id, layer, name)
                )
            case [_, digest, name]:
                return reader.evidence_file(digest, name)
        raise AssertionError(path)

    def pixels(tile: SpriteTile) -> np.ndarray:
        image = read.get(tile.file, lambda _: (decode_image(content(tile.file)).convert("RGB"), 1))
        assert image.size == tile.whole
        return np.asarray(image.crop((tile.x, tile.y, tile.x + tile.width, tile.y + tile.height)), dtype=float)

    return pixels


def filter_picture(reader: StoreReader, atlas_id: str, path: str, channel: int) -> np.ndarray:
    """Return the picture of a filter, (h, w, 3) float."""
    content = reader.job_file(atlas_id, path, channel, f"filter_{channel}.png")
    return np.asarray(decode_image(content).convert("RGB"), dtype=float)


def nearest_index(image: np.ndarray, candidates: list[np.ndarray]) -> int:
    """Return which of some images of one size is most like an image."""
    return int(np.argmin([np.abs(image - candidate).mean() for candidate in candidates]))


class OlderReader(StoreReader):
    """Reads stores as if they had been written before there were films, strips, kernels and whole photos."""

    def atlas(self, atlas_id: str) -> Any:
        manifest = super().atlas(atlas_id)
        return {**manifest, "layers": [without(row, "strip") for row in manifest["layers"]]}

    def layer(self, atlas_id: str, path: str) -> Any:
        return without(super().layer(atlas_id, path), "kernels")

    def filter(self, atlas_id: str, path: str, channel: int) -> Filter:
        saved = super().filter(atlas_id, path, channel)
        return saved._replace(job=without(saved.job, "film"))

    def evidence(self, atlas_id: str) -> Any:
        evidence = super().evidence(atlas_id)
        assert evidence
        return replace(evidence, about=without(evidence.about, "thumbnails"))


def without(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return all facts but one."""
    return {key: value for key, value in facts.items() if key != name}


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def three_epochs(folder: Path, norms: Sequence[float] = (0.5, 0.25, 0.125)) -> History:
    """Return a record of two layers, gradients of two weights, and two rendered filters of the first layer."""
    kernels = {path: [random_tensor(4, 2, 3, 3, seed=epoch) * (epoch + 1) for epoch in range(3)] for path in LAYERS}
    shapes = {"conv1.weight": (4, 2, 3, 3), "scores.weight": (3, 4)}
    return record_of(
        folder,
        kernels,
        metrics=[{"loss": loss} for loss in LOSSES],
        gradients=[{"conv1.weight": gradient(norm), "scores.weight": gradient(2.0)} for norm in norms],
        shapes=shapes,
        weight_norm=4.0,
        pictures=("conv1", [random_tensor(2, 3, 12, 12, seed=epoch).clamp(0, 1) for epoch in range(3)]),
    )


@pytest.fixture
def training(tmp_path: Path) -> TrainingView:
    return TrainingView(three_epochs(tmp_path / "run"), "a~20b")
