"""Rendering as a user sees it: batches, sizes, interruptions, and a network left as it was."""

from __future__ import annotations

import dataclasses
import gc
import resource
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.rendering.recipes import RECIPES, Recipe, choice

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
QUICK = Recipe("quick", "", (16,), 2, choice("pixels", low=0.3, high=0.7), choice("rms", rate=2.0))


@pytest.fixture
def model(small_net: nn.Sequential) -> ph.Model:
    return ph.load(small_net, input_size=32)


def seeded(*modules: nn.Module) -> nn.Sequential:
    """Return the modules in a row with weights of seed 0, float64."""
    net = nn.Sequential(*modules).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3)
    return net


# --- nothing is left behind


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("address", ["4", ""])
def test_a_module_is_left_as_it_was(
    small_net: nn.Sequential, untouched: Untouched, training: bool, address: str
) -> None:
    small_net.train(training)
    small_net[4].weight.requires_grad_(False)
    small_net[0].weight.grad = torch.ones_like(small_net[0].weight)  # type: ignore[arg-type]
    model = ph.load(small_net, input_size=32)
    objective = ph.channel("4", range(3)) if address else ph.logit(range(3))

    def fail(frame: ph.Frame) -> None:
        if frame.step == 1:
            raise ZeroDivisionError

    def interrupt(frame: ph.Frame) -> None:
        if frame.step == 1:
            raise KeyboardInterrupt

    with untouched(small_net):
        ph.render(model, objective, QUICK, size=32)
    with untouched(small_net), pytest.raises(ZeroDivisionError):
        ph.render(model, objective, QUICK, size=32, watch=fail)
    with untouched(small_net), pytest.raises(ph.errors.Interrupted):
        ph.render(model, objective, QUICK, size=32, watch=interrupt)
    with untouched(small_net), pytest.raises(ph.errors.ChannelNotFound):
        ph.render(model, ph.channel("4", 8), QUICK)


# --- memory


def test_rendering_leaves_no_tensor_for_the_garbage_collector(model: ph.Model) -> None:
    def count() -> int:
        return sum(issubclass(type(tracked), Tensor) for tracked in gc.get_objects())

    ph.render(model, ph.channel("4", 0), "fast", size=16, steps=2)
    gc.collect()
    gc.disable()
    try:
        before = count()
        ph.render(model, ph.channel("4", 0), "fast", size=16, steps=2)
        assert count() == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_renders(model: ph.Model) -> None:
    def render() -> None:
        ph.render(model, ph.channel("4", range(2)), "fast", size=16, steps=2)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for _ in range(50):
        render()
    tracemalloc.start()
    try:
        gc.collect()
        before, resident_before = tracemalloc.get_traced_memory()[0], resident()
        for _ in range(1000):
            render()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200_000  # bytes of Python objects, 200 a call; measured: 60,000 in all, most of it in the first 200
    assert resident() - resident_before < 16 * 2**20  # measured: 0.5 MiB


# --- sizes and networks


def test_the_default_size_is_at_most_twice_the_networks_input(model: ph.Model, small_net: nn.Sequential) -> None:
    pictures = ph.render(model, ph.channel("4", 0), "rms", steps=1)
    assert pictures.images.shape[-2:] == (64, 64)  # the recipe says 150, the network's input is 32
    assert pictures.spec["size"] == [64, 64]
    large = ph.load(small_net, input_size=200)
    assert ph.render(large, ph.channel("4", 0), "rms", steps=1).images.shape[-1] == 150
    assert ph.render(model, ph.channel("4", 0), "rms", size=90, steps=1).images.shape[-1] == 90


@pytest.fixture
def rigid_net() -> nn.Sequential:
    """Return a network of one input size: a Linear layer right after the flattening."""
    return seeded(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * 64, 5)
    )


def test_a_network_of_one_size_gets_pictures_of_that_size(rigid_net: nn.Sequential) -> None:
    model = ph.load(rigid_net)
    assert model.input_size == (32, 32)  # found by trying
    pictures = ph.render(model, ph.logit(range(2)), "fast", steps=2)
    assert pictures.images.shape == (2, 3, 32, 32)
    # every scale of a schedule becomes steps at that size
    scaled = ph.render(model, ph.logit(0), "multi-scale", steps=1)
    assert scaled.images.shape[-2:] == (32, 32)
    assert len(scaled.history) == 12
    # before the Linear layer there is no such limit
    assert ph.render(model, ph.channel("0", 0), "fast", steps=1).images.shape[-2:] == (64, 64)


def test_a_network_of_one_oblong_size_gets_oblong_pictures() -> None:
    net = seeded(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * 4 * 10, 5))
    model = ph.load(net, input_size=(16, 40))
    pictures = ph.render(model, ph.logit(3), "fast", steps=2)
    assert pictures.images.shape == (1, 1, 16, 40)
    assert pictures.spec["size"] == [16, 40]


def test_a_size_that_the_user_gave_is_refused_where_the_network_does_not_take_it(
    rigid_net: nn.Sequential, untouched: Untouched
) -> None:
    model = ph.load(rigid_net)
    with untouched(rigid_net), pytest.raises(ph.errors.SizeRefused, match=r"64×64 px .*usual size is 32×32"):
        ph.render(model, ph.logit(0), "fast", size=64)
    with untouched(rigid_net), pytest.raises(ph.errors.SizeRefused, match=r"3×3 px .*usual size is 32×32"):
        ph.render(model, ph.channel("2", 0), "fast", size=3)


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("name", ["max-step", "multi-scale", "fast", "maco"])
def test_networks_of_any_number_of_channels(channels: int, name: str) -> None:
    net = seeded(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
    model = ph.load(net, input_size=32)
    assert model.channels_in == channels
    recipe = RECIPES[name].with_settings(steps=4)
    recipe = dataclasses.replace(recipe, sizes=(26, 32) if len(recipe.sizes) > 1 else (32,))
    pictures = ph.render(model, ph.channel("3", [4, 2]), recipe)
    assert pictures.images.shape == (2, channels, 32, 32)
    means = net(pictures.images).mean((2, 3))
    assert pictures.scores.tolist() == pytest.approx([means[0, 4].item(), means[1, 2].item()], rel=1e-12)
    assert not bool(pictures.dead.any())
    tile = pictures.pictures[0]
    assert (tile.mode, tile.size) == {1: ("L", (32, 32)), 3: ("RGB", (32, 32)), 7: ("L", (96, 96))}[channels]


def test_a_layer_that_runs_twice_is_addressed_by_its_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = seeded(nn.Conv2d(3, 3, 3, padding=1))[0]

        def forward(self, image: Tensor) -> Tensor:
            result: Tensor = self.conv(torch.relu(self.conv(image)))
            return result

    net = Twice()
    model = ph.load(net, input_size=32)
    first, second = (ph.render(model, ph.channel(f"conv@{call}", 1), QUICK) for call in (0, 1))
    assert first.scores.item() == pytest.approx(net.conv(first.images)[0, 1].mean().item(), rel=1e-12)
    assert second.scores.item() == pytest.approx(net(second.images)[0, 1].mean().item(), rel=1e-12)
    with pytest.raises(ph.errors.LayerRefused, match=r"conv@0, conv@1"):
        ph.render(model, ph.channel("conv", 1), QUICK)


def test_only_what_is_needed_runs(model: ph.Model, small_net: nn.Sequential) -> None:
    ran: list[int] = []
    model.layers()
    handles = [
        module.register_forward_hook(lambda *_args, index=index: ran.append(index))
        for index, module in enumerate(small_net)
    ]
    try:
        ph.render(model, ph.channel("2", 0), QUICK)
    finally:
        for handle in handles:
            handle.remove()
    assert set(ran) == {0, 1, 2}


# --- what is refused


def test_a_channel_out_of_range_is_found_before_any_step(model: ph.Model) -> None:
    frames: list[ph.Frame] = []
    with pytest.raises(ph.errors.ChannelNotFound, match="'4' has 8 channels, 0 to 7; there is no 8"):
        ph.render(model, ph.channel("4", range(9)), QUICK, batch=2, watch=frames.append)
    assert frames == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch, unless 'auto', is a whole number of at least 1"),
        ({"batch": True}, "batch, unless 'auto', is a whole number of at least 1"),
        ({"batch": "all"}, "batch, unless 'auto', is a whole number of at least 1"),
        ({"film": -1}, "film is a whole number"),
        ({"precision": "fp64"}, "precision is fp32, bf16 or auto"),
        ({"size": 0}, "at least 1 px"),
        ({"steps": 0}, "steps of at least 1"),
        ({"seed": -1}, "seed and blur are at least 0"),
        ({"photo": torch.zeros(3, 16, 16)}, r"tensor \(1, 3, height, width\)"),
        ({"photo": torch.zeros(1, 1, 16, 16)}, r"tensor \(1, 3, height, width\)"),
        ({"photo": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "torch.uint8"),
    ],
)
def test_wrong_requests_are_refused(model: ph.Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(ph.errors.InvalidRequest, match=message):
        ph.render(model, ph.channel("4", 0), QUICK, **options)  # type: ignore[arg-type]


# --- the same again


def test_the_same_request_twice_writes_the_same_bytes(model: ph.Model, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures = ph.render(model, ph.channel("4", range(3)), "fast", size=16, steps=4, film=2)
        pictures.save(tmp_path / name)
        pictures.save_film(tmp_path / name / "film.gif")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_global_random_state_decides_nothing(model: ph.Model) -> None:
    torch.manual_seed(1)
    pictures = ph.render(model, ph.channel("4", 0), "fast", size=16, steps=3)
    torch.manual_seed(2)
    assert torch.equal(pictures.images, ph.render(model, ph.channel("4", 0), "fast", size=16, steps=3).images)


def test_bf16_steps_in_low_precision_and_scores_as_the_network_is(small_net: nn.Sequential) -> None:
    net = small_net.float()
    model = ph.load(net, input_size=32)
    seen: list[torch.dtype] = []
    handle = net[4].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    low = ph.render(model, ph.channel("4", [0, 1]), QUICK, precision="bf16")
    handle.remove()
    full = ph.render(model, ph.channel("4", [0, 1]), QUICK, precision="fp32")
    assert torch.bfloat16 in seen
    assert low.spec["precision"] == "bf16"
    assert low.images.dtype == torch.float32
    as_it_is = [net[:5](low.images)[k, k].mean().item() for k in range(2)]
    assert low.scores.tolist() == pytest.approx(as_it_is, rel=1e-6)  # bfloat16 would be off by 1e-3
    assert low.start_scores.tolist() == pytest.approx(full.start_scores.tolist(), rel=1e-5)  # the hook costs a shortcut
    assert low.scores.tolist() == pytest.approx(full.scores.tolist(), abs=0.02)
