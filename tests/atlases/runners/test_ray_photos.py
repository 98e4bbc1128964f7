"""Photos on a Ray cluster: the order of results, and which errors reach the user."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch

from phosphene import errors
from phosphene.atlases.runners import ray_photos
from phosphene.atlases.runners.pool import pickle_model
from phosphene.atlases.runners.ray_photos import PhotoActor, RayPhotoRunner, errors_only, in_order, reason_of
from phosphene.evidence.collect import unpack_partial
from phosphene.evidence.photo_dataset import open_photos
from phosphene.evidence.photo_pass import PhotoPass
from phosphene.network.model import Model
from tiny_atlas import tiny_model


def pass_over(model: Model, count: int) -> PhotoPass:
    """Return a pass over a few photos of noise."""
    generator = torch.Generator().manual_seed(0)
    photos = [torch.rand(3, 24, 24, generator=generator) for _ in range(count)]
    return PhotoPass(model, open_photos(photos, 3), (model.find(".0"), model.find(".2")), (24, 24), 2)


def test_results_in_any_order_are_yielded_in_that_of_the_chunks() -> None:
    partials: list[Any] = [object() for _ in range(6)]
    coming = ((number, partials[number]) for number in (4, 2, 3, 5))
    assert list(in_order(coming, range(2, 6))) == partials[2:]
    early = in_order(iter([(1, partials[1]), (0, partials[0])]), range(3))
    assert [next(early), next(early)] == partials[:2]


def test_an_actor_returns_what_the_pass_itself_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(ray_photos, "keep_freed_memory", lambda: kept.append(True))
    model = tiny_model()
    photo_pass = pass_over(model, 5)
    content = (pickle_model(model), (photo_pass.photos, photo_pass.layers, photo_pass.size, photo_pass.top))
    store = type("Store", (), {"get": staticmethod(lambda reference: content)})
    monkeypatch.setitem(sys.modules, "ray", store())
    actor = PhotoActor(["a reference"], "cpu")
    assert kept == [True]
    answer = actor({"chunk": [0]})
    assert answer["chunk"] == [0]
    (expected,) = photo_pass.partials([0])
    partial = unpack_partial(answer["partial"][0])[1]
    assert (partial.seen, partial.lost) == (expected.seen, expected.lost) == (5, 0)
    assert torch.equal(partial.top_photos.photos, expected.top_photos.photos)


def test_without_chunks_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    photo_pass = pass_over(tiny_model(), 1)
    assert list(RayPhotoRunner()(photo_pass, [], print)) == []
    with pytest.raises(errors.ExtraMissing, match=r"pip install 'phosphene\[ray\]'"):
        list(RayPhotoRunner()(photo_pass, [0], print))
    with pytest.raises(errors.InvalidRequest, match="workers is a whole number of at least 1, not 0"):
        RayPhotoRunner(workers=0)


def test_the_first_cause_of_an_error_is_named() -> None:
    inner = ValueError("no such photo\nwith a traceback")
    outer = RuntimeError("a task failed")
    outer.__cause__ = inner
    assert reason_of(outer) == reason_of(inner) == "no such photo"
    task = RuntimeError("a task failed")
    task.cause = outer  # type: ignore[attr-defined]
    assert reason_of(task) == "no such photo"


def test_a_logger_reports_nothing_below_errors_for_a_while() -> None:
    logger = logging.getLogger("phosphene.test")
    logger.setLevel(logging.INFO)
    with errors_only("phosphene.test"):
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert logger.level == logging.INFO
