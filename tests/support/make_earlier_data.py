"""Write the small atlas and the two records of `tests/data/earlier`: `python make_earlier_data.py FOLDER`.

The version of phosphene that is installed writes them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import phosphene as ph
from earlier_networks import flowers, images_of, small

PHOTOS, STORE, RECORD, KERAS = "photos", "store", "record", "keras-record"


def photos(folder: Path) -> Path:
    folder.mkdir()
    for number, pixels in enumerate((images_of(4, 16) * 255).round().byte().permute(0, 2, 3, 1)):
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def atlas(folder: Path) -> None:
    """An atlas of both convolutions, two jobs each, with photos."""
    model = ph.load("earlier_networks:small", input_size=16)
    plan = ph.atlas(model, recipe="fast", size=16, steps=4, per_job=4, precision="fp32")
    ph.run(plan, store=str(folder / STORE), photos=str(folder / PHOTOS), runner=ph.LocalRunner(workers=0))


def record(folder: Path) -> None:
    """Two epochs of a PyTorch training with gradients and filters."""
    network = small().train()
    images = images_of(6, 16)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    with ph.Recorder(network, folder / RECORD, filters="1:0:2") as recorder:
        for epoch in range(2):
            optimizer.zero_grad()
            loss: Any = F.mse_loss(network(images), torch.zeros(6, 6, 16, 16))
            loss.backward()
            recorder.after_backward()
            optimizer.step()
            recorder.end_epoch(epoch, loss=float(loss.detach()))


def keras_record(folder: Path) -> None:
    """Two epochs of a Keras training with gradients."""
    from phosphene.record_keras import KerasRecorder

    network = flowers()
    images = images_of(6, 12).permute(0, 2, 3, 1).numpy()
    classes = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    recorder = KerasRecorder(folder / KERAS)
    network.fit(images, classes, epochs=2, batch_size=3, verbose=0, callbacks=[recorder])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    photos(out / PHOTOS)
    atlas(out)
    record(out)
    keras_record(out)
