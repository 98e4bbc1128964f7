"""A store that pages are made of: all filters of two convolutions, with photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from phosphene.atlases.run import run
from phosphene.storage.store import Store, open_store
from tiny_atlas import Here, tiny_atlas, tiny_model

FIRST, SECOND = ".0", ".2"  # 6 and 8 filters, fields of 3 and 5 px
NAMES = ("a.png", "b.png", "c.png", "d.png")


def photos(folder: Path, names: Sequence[str]) -> Path:
    """Write a few photos of 16 px, which is the size of the pictures, noise each."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (len(names), 16, 16, 3), dtype=np.uint8)
    for name, one in zip(names, noise, strict=True):
        Image.fromarray(one).save(folder / name)
    return folder


def filled(folder: Path, *failing: str, names: Sequence[str] = NAMES, **options: object) -> Store:
    """Return a store with a finished atlas, of photos with these names; jobs given by digest fail."""
    store = open_store(folder / "store", create=True)
    plan = tiny_atlas(tiny_model(), **options)
    run(plan, store, Here(*failing), photos(folder / "photos", names) if names else None)
    return store
