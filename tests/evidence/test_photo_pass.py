"""A pass of photos: its result does not depend on how it is split, nor its memory on how many photos there are."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phosphene.evidence.collect import evidence, plan_photo_pass
from phosphene.evidence.photo_pass import MAX_CHUNKS, LoadedPhoto, merge
from phosphene.images.photo import Fit
from random_photos import (
    GeneratedPhotos,
    activations_one_by_one,
    assert_equal_but_for_rounding,
    check_by_hand,
    random_photos,
    single_photo_partials,
    small_chunks,
    small_model,
)

SUPPORT = str(Path(__file__).parents[1] / "support")
Guard = Callable[[nn.Module], AbstractContextManager[None]]


def test_photos_are_fitted_as_the_network_wants_them_at_any_size() -> None:
    model = small_model(nn.Sequential(nn.Conv2d(3, 2, 1)), 8, fit=Fit(resize=10, interpolation="bicubic"))
    photo = random_photos(1, 40)
    half_size = plan_photo_pass(model, photo, [0], 4)
    # at half the size the short side is 5 px, and the middle 4 px of these are shown
    assert half_size.fit == Fit(resize=5, interpolation="bicubic")
    loaded = half_size.load(0)
    assert isinstance(loaded, LoadedPhoto)
    resized = torch.nn.functional.interpolate(photo, (5, 5), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(loaded.image, resized[..., :4, :4])
    full_size = plan_photo_pass(model, photo, [0]).load(0)
    assert isinstance(full_size, LoadedPhoto)
    assert torch.equal(full_size.image, model.fitted(photo)[0])


class ConvolutionTwice(nn.Module):
    """One convolution that runs twice, its first result overwritten in between; the second is channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        first: Tensor = self.convolution(image)
        second: Tensor = self.convolution(first.relu_().contiguous(memory_format=torch.channels_last))
        return second


def test_a_layer_that_runs_twice_and_is_overwritten(untouched: Guard) -> None:
    net, photos = ConvolutionTwice().double(), random_photos(14)
    model = small_model(net)
    with untouched(net):
        result = evidence(model, photos, "*", top=3)
    assert list(result) == ["convolution@0", "convolution@1"]
    for path, statistics in result.items():
        check_by_hand(statistics, activations_one_by_one(model, photos, path), photos, 3)


@pytest.mark.parametrize("seed", range(6))
def test_any_split_and_order_of_merging_gives_the_same(seed: int) -> None:
    singles, order = single_photo_partials(seed), random.Random(seed)
    whole = reduce(merge, singles)
    for _ in range(5):
        remaining = list(singles)
        order.shuffle(remaining)
        while len(remaining) > 1:  # any two, next to each other or not
            first, second = (remaining.pop(order.randrange(len(remaining))) for _ in range(2))
            remaining.append(merge(first, second))
        assert_equal_but_for_rounding(whole, remaining[0])


def test_batches_and_chunks_depend_on_the_request_alone(small_net: nn.Sequential) -> None:
    photo_pass = plan_photo_pass(small_model(small_net), GeneratedPhotos(1300), [0])
    chunks = [photo_pass.chunk(index) for index in range(photo_pass.chunk_count)]
    assert chunks == [range(512), range(512, 1024), range(1024, 1300)]
    assert photo_pass.batch_size == 32
    # the largest map is 6 channels of 512×512 px in 8 bytes: 12.6 MB, of which four fit 64 MiB
    assert plan_photo_pass(small_model(small_net), random_photos(1), [0], 512).batch_size == 4
    many = plan_photo_pass(small_model(small_net), GeneratedPhotos(10**9), [0])
    assert many.chunk_count <= MAX_CHUNKS
    assert sum(len(many.chunk(index)) for index in range(many.chunk_count)) == 10**9


@small_chunks()
def test_the_network_is_left_as_it_was_when_stopped(small_net: nn.Sequential, untouched: Guard) -> None:
    def stop(more: int, total: int) -> None:
        if more:
            raise KeyboardInterrupt

    small_net.train()
    with untouched(small_net), pytest.raises(KeyboardInterrupt) as caught:
        evidence(small_model(small_net), random_photos(9), [0], watch=stop)
    assert caught.tb  # which holds on to all that was under way


def most_tensor_bytes(count: int) -> int:
    """Return the most bytes of tensors that exist while a number of photos pass through a network."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    photo_pass = plan_photo_pass(small_model(net), GeneratedPhotos(count), [0])
    totals = []
    gc.freeze()  # so that `get_objects` returns only what is made from here on

    def measure(more: int) -> None:
        storages = [tensor.untyped_storage() for tensor in gc.get_objects() if type(tensor) is Tensor]
        totals.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))

    try:
        reduce(merge, photo_pass.partials(range(photo_pass.chunk_count), measure))
    finally:
        gc.unfreeze()
    return max(totals)


@small_chunks()
def test_tensors_do_not_grow_with_the_number_of_photos() -> None:
    assert most_tensor_bytes(24) == most_tensor_bytes(96) > 0


MEASURE_MEMORY = """
import resource, sys, torch
sys.path.insert(0, {support!r})
from random_photos import GeneratedPhotos, small_model
from phosphene.evidence.collect import evidence
torch.set_num_threads(1)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 32, 3))
evidence(small_model(net, 16), GeneratedPhotos({count}, 16), "*")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_is_flat_from_1_000_to_20_000_photos() -> None:
    def peak(count: int) -> int:
        """Return the most memory that a process held, in MiB."""
        code = MEASURE_MEMORY.format(support=SUPPORT, count=count)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(process.stdout)

    assert abs(peak(20_000) - peak(1_000)) <= 16
