"""Collecting evidence: broken photos are named, what cannot be done is refused, and an interrupted pass goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from fake_terminal import counts
from phosphene import errors
from phosphene.evidence.collect import evidence, pack_partial, plan_photo_pass, unpack_partial
from phosphene.evidence.photo_pass import Partial, empty_partial, merge
from phosphene.evidence.statistics import load_evidence
from phosphene.evidence.top_photos import NO_PHOTO
from phosphene.network.model import Model
from phosphene.progress import Bar
from phosphene.storage.store import open_store
from random_photos import (
    GeneratedPhotos,
    assert_equal_but_for_rounding,
    random_photos,
    single_photo_partials,
    small_chunks,
    small_model,
)

SUPPORT = str(Path(__file__).parents[1] / "support")
Guard = Callable[[nn.Module], AbstractContextManager[None]]


@small_chunks()
def test_photos_that_cannot_be_read_are_left_out_and_named(small_net: nn.Sequential) -> None:
    result = evidence(small_model(small_net), GeneratedPhotos(20, broken=(1, 9, 10)), [0], top=20)
    assert (result.about["seen"], result.about["lost"]) == (17, 3)
    assert [refused["photo"] for refused in result.about["refused"]] == [1, 9, 10]
    assert result.about["refused"][0] == {
        "name": "photo 1",
        "photo": 1,
        "reason": "photo 1 of the dataset cannot be read: OSError('torn')",
    }
    numbers = [photo for photo in range(20) if photo not in (1, 9, 10)]
    assert sorted(result[".0"].photos[0].tolist()) == [NO_PHOTO] * 3 + numbers
    assert result[".0"].count.tolist() == [17] * 6
    with pytest.raises(errors.PhotoRefused, match="of 20 photos none can be read; the first: photo 0 of the dataset"):
        evidence(small_model(small_net), GeneratedPhotos(20, broken=tuple(range(20))), [0])


def test_requests_that_cannot_be_met_are_refused(small_net: nn.Sequential, untouched: Guard) -> None:
    model, photos = small_model(small_net), random_photos(3)
    requests: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (errors.LayerRefused, "layers that return maps, and got .8;", lambda: evidence(model, photos, [0, "8"])),
        (errors.LayerRefused, "and got .7, .8;", lambda: evidence(model, photos, "[78]")),
        (errors.LayerRefused, "and got no layer;", lambda: evidence(model, photos, [])),
        (errors.LayerNotFound, "no layer 'x'", lambda: evidence(model, photos, ["x"])),
        (errors.InvalidRequest, "channel is a whole number of at least 1", lambda: evidence(model, photos, [0], top=0)),
        (errors.InvalidRequest, "size in pixels is a whole number", lambda: evidence(model, photos, [0], size=-1)),
        (errors.InvalidRequest, "pixels is a .* at least 1, not 0", lambda: evidence(model, photos, [0], size=0)),
        (errors.SizeRefused, "does not take a picture of 3×1×1", lambda: evidence(model, photos, [".4"], size=1)),
        (errors.PhotoRefused, "there is no nowhere", lambda: evidence(model, "nowhere", [0])),
    ]
    for error, message, request in requests:
        with untouched(small_net), pytest.raises(error, match=message):
            request()
    with pytest.raises(errors.LayerNotFound, match="there is no evidence on 'y'; the nearest layers are"):
        evidence(model, photos, [0])["y"]


@small_chunks()
def test_the_network_is_left_as_it_was_when_nothing_can_be_written(
    small_net: nn.Sequential, untouched: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, create=True)

    def write(self: object, name: str, content: bytes) -> None:
        raise errors.OutputRefused("the disk is full")

    monkeypatch.setattr(type(store), "write", write)
    with untouched(small_net), pytest.raises(errors.OutputRefused, match="the disk is full") as caught:
        evidence(small_model(small_net), random_photos(30), [0], store=store, save_interval=0)
    assert caught.tb


@small_chunks()
def test_watch_counts_every_photo(small_net: nn.Sequential) -> None:
    calls: list[tuple[int, int]] = []
    photos = GeneratedPhotos(21, broken=(4,))
    evidence(small_model(small_net), photos, [0], watch=lambda more, total: calls.append((more, total)))
    assert calls == [(0, 21), (4, 21), (4, 21), (4, 21), (4, 21), (4, 21), (1, 21)]


@small_chunks()
def test_the_bars_count_every_photo_and_then_those_that_are_shown(small_net: nn.Sequential, bars: list[Bar]) -> None:
    result = evidence(small_model(small_net), GeneratedPhotos(21, broken=(4,)), [0], top=2)
    shown = len(result.about["names"])
    assert 2 <= shown <= 12  # of six channels
    assert counts(bars) == [
        ("evidence", "photos", 21, 21),
        ("crops", "photos", shown, shown),
    ]


def test_a_pass_that_goes_on_begins_where_it_stopped(small_net: nn.Sequential, tmp_path: Path, bars: list[Bar]) -> None:
    store, seen = open_store(tmp_path, create=True), list[int]()

    def stop(more: int, total: int) -> None:
        if bars[0].done >= 16:
            raise KeyboardInterrupt

    def note(more: int, total: int) -> None:
        seen.append(bars[1].done)

    photos, model = random_photos(21), small_model(small_net)
    with small_chunks():
        with pytest.raises(KeyboardInterrupt):
            evidence(model, photos, [0], store=store, watch=stop, save_interval=0)
        evidence(model, photos, [0], store=store, watch=note, save_interval=0)
    assert bars[0].ended
    assert seen[-1] == bars[1].total == 21
    assert seen[0] == 8  # the first chunk was kept


def test_a_partial_result_survives_its_file(small_net: nn.Sequential) -> None:
    photo_pass = plan_photo_pass(small_model(small_net), random_photos(12), [0])
    partial = reduce(merge, photo_pass.partials([0]), empty_partial(6, 9))
    content = pack_partial(partial, 5)
    done, copy = unpack_partial(content)
    assert done == 5
    assert_equal_but_for_rounding(partial, copy)
    keys = (
        "about peaks photos places marks counted broken mean squares lowest highest edge bins"  # of older stores, too
    )
    assert set(safetensors.torch.load(content)) == set(keys.split())


@small_chunks()
def test_a_pass_that_was_stopped_goes_on_from_the_store(small_net: nn.Sequential, tmp_path: Path) -> None:
    model, photos = small_model(small_net), GeneratedPhotos(40, broken=(3, 30))
    expected = evidence(model, photos, [0, 1], top=4).files()
    seen = 0

    def stop(more: int, total: int) -> None:
        nonlocal seen
        seen += more
        if seen > 20:
            raise KeyboardInterrupt

    def note(more: int, total: int) -> None:
        steps.append(more)

    store = open_store(tmp_path / "store", create=True)
    with pytest.raises(KeyboardInterrupt):
        evidence(model, photos, [0, 1], top=4, store=store, watch=stop, save_interval=0)
    assert store.done("evidence") == set()
    photos.requested.clear()
    steps: list[int] = []
    result = evidence(model, photos, [0, 1], top=4, store=store, watch=note, save_interval=0)
    assert result.files() == expected
    assert steps[0] == 16  # two chunks of eight were done, and are not run again
    # after three for the spec
    assert photos.requested[3:29] == list(range(16, 40)) + sorted(photos.requested[27:29])
    folder = tmp_path / "store" / "evidence" / result.digest
    assert {path.name for path in folder.iterdir()} == {*expected, "manifest.json"}  # the partial result is gone
    photos.requested.clear()
    assert evidence(model, photos, [0, 1], top=4, store=store).files() == expected
    assert len(photos.requested) <= 3
    assert load_evidence(store, result.digest, sheets=False).sheets == {}


@small_chunks()
def test_a_partial_result_that_is_damaged_is_begun_anew(small_net: nn.Sequential, tmp_path: Path) -> None:
    model, photos = small_model(small_net), random_photos(20)
    store = open_store(tmp_path, create=True)
    expected = evidence(model, photos, [0])
    for content in (b"", b"rubbish", pack_partial(empty_partial(6, 9), 1)[:-40]):
        store.write(f"evidence/{expected.digest}/partial.safetensors", content)
        assert evidence(model, photos, [0], store=store).files() == expected.files()
        for path in (tmp_path / "evidence" / expected.digest).iterdir():
            path.unlink()


def test_other_weights_photos_or_sizes_are_other_evidence(small_net: nn.Sequential) -> None:
    def digest(model: Model, photos: Tensor, size: int | None = None, top: int = 9) -> str:
        return evidence(model, photos, [0], size=size, top=top).digest

    photos = random_photos(12)
    first = digest(small_model(small_net), photos)
    assert digest(small_model(small_net), photos.clone()) == first
    assert digest(small_model(small_net), photos, cast(int, np.int64(8)), cast(int, np.int64(9))) == first
    changed = [digest(small_model(small_net), photos, 6), digest(small_model(small_net), photos, top=2)]
    changed.append(digest(small_model(small_net), photos[:-1]))
    with torch.no_grad():
        bias = small_net.get_parameter("4.bias")
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0, dtype=torch.float64))
    changed.append(digest(small_model(small_net), photos))
    assert len({first, *changed}) == 5


RESUMED_PASS = """
import sys, torch
sys.path.insert(0, {support!r})
from random_photos import GeneratedPhotos, small_model
from phosphene.evidence import photo_pass
from phosphene.evidence.collect import evidence
from phosphene.storage.store import open_store
torch.set_num_threads(1)
torch.manual_seed(0)
photo_pass.CHUNK = 16
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3))
store = open_store(sys.argv[1], create=True)
print("started", flush=True)
watch = lambda more, total: print(more, flush=True)
evidence(small_model(net, 32), GeneratedPhotos(600, 40), "*", store=store, save_interval=0, watch=watch)
"""


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    code = RESUMED_PASS.format(support=SUPPORT)

    def begin(store: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(store)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with begin(tmp_path / "whole") as process:
        started = process.stdout and process.stdout.readline()
        start = time.monotonic()
        steps = [int(line) for line in process.stdout or ()]
    duration = time.monotonic() - start
    assert started
    assert sum(steps) == 600
    chance, resumed = random.Random(0), []
    for _ in range(6):
        with begin(tmp_path / "killed") as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(chance.uniform(0, duration / 6))  # six of which are less than the whole
            os.kill(process.pid, signal.SIGKILL)
            resumed.append(int(process.stdout.readline() or 0))
    with begin(tmp_path / "killed") as process:
        assert process.stdout
        resumed.append(int(process.stdout.readlines()[1]))
    assert resumed[-1] == max(resumed) > 0  # it went on from the partial result
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(small_net: nn.Sequential, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from phosphene.atlases.runners.ray_photos import RayPhotoRunner

    for number in range(1100):
        torch.manual_seed(number)
        Image.fromarray((torch.rand(9, 9, 3) * 255).byte().numpy()).save(tmp_path / f"{number:04}.png")
    (tmp_path / "0500.png").write_bytes(b"no photo")
    model, runner = small_model(small_net.float()), RayPhotoRunner(workers=2)
    expected = evidence(model, tmp_path, "*", top=3)
    steps: list[int] = []
    result = evidence(model, tmp_path, "*", top=3, runner=runner, watch=lambda more, total: steps.append(more))
    assert result.files() == expected.files()
    assert result.about["lost"] == 1
    assert steps == [0, 512, 512, 76]
    assert not ray.is_initialized()


def test_results_that_come_in_any_order_are_yielded_in_that_of_the_chunks() -> None:
    from phosphene.atlases.runners.ray_photos import in_order

    singles = single_photo_partials(0, 6)

    def unordered() -> Iterator[tuple[int, Partial]]:
        yield from ((number, singles[number]) for number in (4, 2, 3, 5))

    ordered = [id(partial) for partial in in_order(unordered(), range(2, 6))]
    assert ordered == [id(singles[number]) for number in range(2, 6)]
