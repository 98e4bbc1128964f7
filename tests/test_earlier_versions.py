"""What an earlier version wrote is opened, reported, served and continued; see `tests/data/earlier/README.md`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import phosphene as ph
from earlier_networks import flowers, images_of, small
from phosphene.atlases.report import report
from phosphene.network.loading.keras import import_keras
from phosphene.storage.store import open_store
from phosphene.version import PICTURES_VERSION
from phosphene.web.site import Site
from phosphene.web.store_reader import StoreReader
from phosphene.web.views.training import TrainingView
from tiny_atlas import contents

DATA = Path(__file__).parent / "data/earlier"
TORCH = "2.15.0+cu132"
CHANNELS = {".0": 8, ".2": 6}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Return a copy of the data that may be written to."""
    return Path(shutil.copytree(DATA, tmp_path / "earlier"))


def plan() -> Any:
    """Return the plan that the store was made by, as if with the torch that it was made with."""
    model = ph.load("earlier_networks:small", input_size=16)
    atlas = ph.atlas(model, recipe="fast", size=16, steps=4, per_job=4, precision="fp32")
    return replace(atlas, jobs=tuple(replace(job, versions=(TORCH, PICTURES_VERSION)) for job in atlas.jobs))


def test_the_store_is_reported() -> None:
    page, table = report(open_store(DATA / "store"))
    rows = table.decode().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        [path, str(channel)] for path, count in CHANNELS.items() for channel in range(count)
    ]
    assert Counter(row.split(",")[3] for row in rows[1:]) == {"vivid": 12, "weak": 2}
    assert rows[1] == ".0,0,filter_0,vivid,-0.47003,15.992,0.88538,1,1,"  # as that version reported it
    assert b"earlier_networks:small" in page


def test_the_store_and_the_record_are_served_whole() -> None:
    reader = StoreReader([open_store(DATA / "store")])
    site = Site(reader, [TrainingView(ph.open_history(DATA / "record"), "record")])
    pages = {path: site.get(path).body for path in site.paths()}
    (name,) = [name for name in pages if name.endswith("~2E2/1.html")]
    assert all(pages.values())
    assert b"weak" in pages[name]
    assert any(path.startswith("runs/record/") for path in pages)


def test_an_atlas_of_this_version_reuses_no_picture_of_the_store_and_leaves_it_as_it_was(earlier: Path) -> None:
    before = contents(earlier / "store")
    summary = ph.run(plan(), earlier / "store", ph.LocalRunner(workers=0), earlier / "photos")
    assert (summary.jobs, summary.done, summary.rendered) == (4, 4, 4)
    after = contents(earlier / "store")
    assert {name: after[name] for name in before} == before
    summary = ph.run(plan(), earlier / "store", ph.LocalRunner(workers=0), earlier / "photos")
    assert (summary.done, summary.rendered) == (4, 0)
    assert contents(earlier / "store") == after


def step(network: torch.nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss: Any = F.mse_loss(network(images), torch.zeros(6, 6, 16, 16))
    loss.backward()


def test_the_record_holds_what_a_plain_loop_computes_and_goes_on(earlier: Path) -> None:
    network, images = small().train(), images_of(6, 16)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    history = ph.open_history(earlier / "record")
    assert history.epochs == [0, 1]
    for epoch in history.epochs:
        step(network, images, optimizer)
        gradients = [weight.grad for weight in network.parameters()]
        torch.testing.assert_close(list(history.gradients(epoch).values()), gradients, atol=1e-6, rtol=1e-4)
        optimizer.step()
        weights = history.kernels(".2", epoch).weights
        torch.testing.assert_close(weights, network.state_dict()["2.weight"], atol=1e-6, rtol=1e-4)
    assert ph.verdicts(history)
    assert ph.strip(history, ".2").size
    with pytest.raises(ph.errors.InvalidRequest, match="was made with other filters"):
        ph.Recorder(network, earlier / "record", filters="1:0:2")
    manifest = json.loads((earlier / "record/manifest.json").read_text())
    recipe = ph.Recipe.from_json(json.dumps(manifest["filters"]["recipe"]))
    with ph.Recorder(network, earlier / "record", filters="1:0:2", recipe=recipe) as recorder:
        step(network, images, optimizer)
        recorder.after_backward()
        recorder.end_epoch(2)
    assert ph.open_history(earlier / "record").epochs == [0, 1, 2]


def test_the_keras_record_goes_on(earlier: Path) -> None:
    import_keras()
    from phosphene.record_keras import KerasRecorder

    history = ph.open_history(earlier / "keras-record")
    assert history.epochs == [0, 1]
    assert history.kernels("conv1", 1).weights.shape == (4, 3, 3, 3)
    images = images_of(6, 12).permute(0, 2, 3, 1).numpy()
    network = flowers()
    recorder = KerasRecorder(earlier / "keras-record")
    classes = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    network.fit(images, classes, epochs=3, initial_epoch=2, batch_size=3, verbose=0, callbacks=[recorder])
    assert ph.open_history(earlier / "keras-record").epochs == [0, 1, 2]
