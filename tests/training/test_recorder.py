"""The Recorder on PyTorch: gradients and kernels as plain loops give them, and a training that does not notice."""

from __future__ import annotations

import collections
import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phosphene import errors
from phosphene.network.loading import load
from phosphene.storage import atomic as files
from phosphene.training.history import open_history
from phosphene.training.recorder import Recorder

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Return a network as R2.3's in small: 16 trainable tensors, with dropout, seed 0, float64, training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [
            layer
            for into, out in ((3, 4), (4, 6), (6, 4))
            for layer in (
                nn.Conv2d(into, out, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(out),
            )
        ]
        head = [nn.Flatten(), nn.Dropout(0.25), nn.Linear(4 * 4 * 4, 5), nn.ReLU(), nn.Linear(5, 3)]
        return nn.Sequential(*blocks, *head).double().train()


def samples(count: int = 20, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (count,), generator=generator)


def backward(net: nn.Module, data: Batch) -> None:
    loss: Any = F.cross_entropy(net(data[0]), data[1])
    loss.backward()


def pieces(data: Batch, size: int = 8) -> list[Batch]:
    images, classes = data
    return [(images[start : start + size], classes[start : start + size]) for start in range(0, len(images), size)]


def train(
    net: nn.Module, recorder: Recorder | None, epochs: int = 2, after: Callable[[], None] = lambda: None, first: int = 0
) -> None:
    """Train by Adam on three batches an epoch; `after` is called after each backward pass."""
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for epoch in range(first, first + epochs):
        for images, classes in pieces(samples()):
            optimizer.zero_grad()
            loss: Any = F.cross_entropy(net(images), classes)
            loss.backward()
            after()
            if recorder:
                recorder.after_backward()
            optimizer.step()
        if recorder:
            recorder.end_epoch(epoch, loss=float(loss.detach()))


# --- gradients --------------------------------------------------------------------------------------------------------


def test_running_gradients_are_the_mean_of_the_batches(tmp_path: Path) -> None:
    net = network()
    seen: list[list[Tensor]] = []
    with Recorder(net, tmp_path) as recorder:
        train(net, recorder, after=lambda: seen.append([one.grad.clone() for one in net.parameters()]))  # type: ignore[union-attr]
    history = open_history(tmp_path)
    assert history.epochs == [0, 1]
    assert [len(one) for one in history.record()] == [16, 16]
    for epoch, batches in ((0, seen[:3]), (1, seen[3:])):
        known = history.entry(epoch)["gradients"]
        assert (known["kind"], known["read"], known["batches"]) == ("running", "before clipping", 3)
        for number, (name, found) in enumerate(history.gradients(epoch).items()):
            assert name == list(dict(net.named_parameters()))[number]
            mean = sum(one[number] for one in batches) / 3
            torch.testing.assert_close(found, mean, rtol=0, atol=1e-15)
            told = known["weights"][name]
            assert math.isclose(told["norm"], sum(float(one[number].norm()) for one in batches) / 3, rel_tol=1e-12)
            assert math.isclose(told["mean_abs"], sum(float(one[number].abs().mean()) for one in batches) / 3)
            assert sum(told["histogram"].values()) == 3 * found.numel()


def test_the_epoch_s_gradient_is_that_of_the_total_loss(tmp_path: Path) -> None:
    net, data = network(), samples(21)
    loader = DataLoader(TensorDataset(*data), batch_size=8, shuffle=True)
    expected: list[list[Tensor]] = []
    with Recorder(net, tmp_path, gradients="epoch", data=loader, loss=F.cross_entropy) as recorder:
        for epoch in range(4):
            train(net, None, epochs=1)
            recorder.end_epoch(epoch)
            net.eval()
            total = torch.zeros((), dtype=torch.float64)
            for image, one in zip(*data, strict=True):
                total = total + F.cross_entropy(net(image[None]), one[None])
            expected.append(list(torch.autograd.grad(total / 21, list(net.parameters()))))
            net.train()
    record = open_history(tmp_path).record()
    assert [len(one) for one in record] == [16] * 4
    for found, wanted in zip(record, expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("once", [True, False], ids=["once a step", "after every pass"])
def test_with_accumulation(tmp_path: Path, once: bool) -> None:
    net = network().eval()  # batch statistics would differ
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with Recorder(net, tmp_path) as recorder:
        alone = []
        for images, classes in pieces(samples(16), 4):
            alone.append(torch.autograd.grad(F.cross_entropy(net(images), classes), list(net.parameters())))
        for number, (images, classes) in enumerate(pieces(samples(16), 4)):
            backward(net, (images, classes))
            if not once or number == 3:
                recorder.after_backward()
        optimizer.step()
        recorder.end_epoch(0)
    history = open_history(tmp_path)
    count = 1 if once else 4
    assert history.entry()["gradients"]["batches"] == count
    for number, found in enumerate(history.gradients().values()):
        torch.testing.assert_close(found, sum(one[number] for one in alone) / count, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clipped", [True, False])
def test_before_and_after_clipping(tmp_path: Path, clipped: bool) -> None:
    net = network()
    backward(net, samples(8))
    whole = math.sqrt(sum(float(one.grad.square().sum()) for one in net.parameters() if one.grad is not None))
    with Recorder(net, tmp_path) as recorder:
        if clipped:
            nn.utils.clip_grad_norm_(net.parameters(), whole / 2)
        recorder.after_backward(clipped=clipped)
        recorder.end_epoch(0)
    history = open_history(tmp_path)
    assert history.entry()["gradients"]["read"] == ("after clipping" if clipped else "before clipping")
    found = math.sqrt(sum(float(one.square().sum()) for one in history.gradients().values()))
    assert math.isclose(found, whole / (2 if clipped else 1), rel_tol=1e-5)


def test_both_in_one_epoch_are_said(tmp_path: Path) -> None:
    net = network()
    recorder = Recorder(net, tmp_path)
    for clipped in (True, False):
        net.zero_grad()
        backward(net, samples(8))
        recorder.after_backward(clipped=clipped)
    recorder.end_epoch(0)
    assert open_history(tmp_path).entry()["gradients"]["read"] == "before clipping and after clipping"


def test_with_loss_scaling(tmp_path: Path) -> None:
    net = network().float().eval()
    images, classes = samples(8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = torch.autograd.grad(F.cross_entropy(net(images.float()), classes), list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    for folder, unscaled in (("a", True), ("b", False)):
        with Recorder(net, tmp_path / folder) as recorder:
            optimizer.zero_grad()
            loss: Any = scaler.scale(F.cross_entropy(net(images.float()), classes))
            loss.backward()
            if unscaled:
                scaler.unscale_(optimizer)
            recorder.after_backward(scaler=scaler)  # which knows whether it was taken out again
            scaler.step(optimizer)
            scaler.update()
            recorder.end_epoch(0)
        for found, wanted in zip(open_history(tmp_path / folder).gradients().values(), plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_frozen_and_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
            self.two = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
            self.two.weight = self.one.weight
            self.still = nn.Conv2d(3, 3, 1).double().requires_grad_(False)
            self.unused = nn.Linear(2, 2).double()

        def forward(self, image: Tensor) -> Tensor:
            found: Tensor = self.two(self.still(self.one(image))).square().mean()
            return found

    net = Tied()
    with Recorder(net, tmp_path) as recorder:
        loss: Any = net(samples(4)[0])
        expected = torch.autograd.grad(loss, net.one.weight, retain_graph=True)[0]
        loss.backward()
        recorder.after_backward()
        recorder.end_epoch(0)
    history = open_history(tmp_path)
    assert history.weights == ["one.weight", "unused.weight", "unused.bias"]
    assert list(history.gradients()) == ["one.weight"]
    torch.testing.assert_close(history.gradients()["one.weight"], expected, rtol=0, atol=1e-15)
    assert history.layers == ["one", "two", "still"]
    net.still.requires_grad_(True)  # trained from now on: still the same network
    recorder = Recorder(net, tmp_path)
    torch.autograd.backward(net(samples(4)[0]))
    recorder.after_backward()
    recorder.end_epoch(1)
    assert list(open_history(tmp_path).gradients()) == ["one.weight", "still.weight", "still.bias"]
    assert "still.bias" in open_history(tmp_path).weights
    assert history.kernels("two").weights.equal(history.kernels("one").weights)


@pytest.mark.slow
def test_a_compiled_network(tmp_path: Path) -> None:
    net = network()
    compiled: Any = torch.compile(net)
    with Recorder(compiled, tmp_path, filters=".0:0:2", recipe="max-step") as recorder:
        backward(compiled, samples(8))
        expected = [one.grad.clone() for one in net.parameters() if one.grad is not None]
        recorder.after_backward()
        recorder.end_epoch(0)
    for found, wanted in zip(open_history(tmp_path).gradients().values(), expected, strict=True):
        assert found.equal(wanted)


def test_gradients_that_are_not_finite_are_recorded_as_such_and_named(tmp_path: Path) -> None:
    net = network()
    first = next(net.parameters())

    def spoil() -> None:
        assert first.grad is not None
        first.grad[0, 0, 0, 0] = math.nan

    recorder = Recorder(net, tmp_path)
    with pytest.warns(UserWarning, match="NaN or infinite") as told_of:
        train(net, recorder, epochs=1, after=spoil)
    sentence = "epoch 0: the gradient of 0.weight was NaN or infinite in 3 of 3 batches, first in batch 0"
    assert str(told_of[0].message) == sentence
    entry = open_history(tmp_path).entry()
    told = entry["gradients"]["weights"]["0.weight"]
    assert (told["nonfinite"], told["first_nonfinite"], told["batches"]) == (3, 0, 3)
    assert math.isnan(told["norm"])
    assert told["histogram"]["nonfinite"] >= 3
    assert entry["notes"][0] == sentence
    assert math.isnan(open_history(tmp_path).gradients()["0.weight"][0, 0, 0, 0])


# --- kernels, filters, metrics ----------------------------------------------------------------------------------------


def test_kernels_and_metrics_are_those_of_the_epoch_s_end(tmp_path: Path) -> None:
    net = network()
    kept = []
    with Recorder(net, tmp_path, layers=".4", gradients=None) as recorder:
        for epoch in range(3):
            train(net, None, epochs=1)
            kept.append(net.state_dict()["4.weight"].clone())
            recorder.end_epoch(epoch, loss=torch.tensor(epoch / 2), accuracy=math.nan)
    history = open_history(tmp_path)
    assert history.layers == [".4"]
    for epoch in range(3):
        found = history.kernels(".4", epoch)
        assert found.weights.equal(kept[epoch])
        assert found.spec["epoch"] == epoch
        assert history.metrics(epoch)["loss"] == epoch / 2
        assert math.isnan(history.metrics(epoch)["accuracy"])
    assert history.gradients() == {}
    assert history.entry()["gradients"] is None
    assert repr(history) == f"History(3 epochs of Sequential in {tmp_path})"


def test_every_second_epoch(tmp_path: Path) -> None:
    net = network()
    seen: list[Tensor] = []
    bias: Any = net.get_parameter("0.bias")
    with Recorder(net, tmp_path, every=2) as recorder:
        train(net, recorder, epochs=4, after=lambda: seen.append(torch.clone(bias.grad)))
    history = open_history(tmp_path)
    assert history.epochs == [0, 2]
    torch.testing.assert_close(history.gradients(2)["0.bias"], torch.stack(seen[6:9]).mean(0), rtol=0, atol=1e-15)


def test_filters_are_rendered_after_each_epoch_from_one_seed(tmp_path: Path) -> None:
    from phosphene.rendering.objectives import channel
    from phosphene.rendering.recipes import find_recipe
    from phosphene.rendering.render import render

    net = network()
    recipe = find_recipe("fast").at(32, 3)
    with Recorder(net, tmp_path, filters=".4:1,3", recipe=recipe) as recorder:
        train(net, recorder)
        expected = render(load(net), channel(".4", [1, 3]), recipe)
    history = open_history(tmp_path)
    found = history.filters()
    assert list(found) == ["filter_1", "filter_3"]
    for one, other in zip(found.values(), expected.pictures, strict=True):
        assert one.tobytes() == other.tobytes()
    assert history.filters(0)["filter_1"].tobytes() != found["filter_1"].tobytes()
    assert history.facts["filters"]["channels"] == [1, 3]


def test_filters_that_cannot_be_rendered_do_not_stop_the_training(tmp_path: Path, monkeypatch: Any) -> None:
    net = network()
    recorder = Recorder(net, tmp_path, gradients=None, filters=".4:0", recipe="max-step")
    monkeypatch.setattr("phosphene.training.recorder.render", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="filters were not rendered: division by zero"):
        recorder.end_epoch(0)

    def stop(*_: Any) -> None:
        raise errors.Interrupted("stopped")

    monkeypatch.setattr("phosphene.training.recorder.render", stop)
    with pytest.raises(KeyboardInterrupt):
        recorder.end_epoch(1)
    assert open_history(tmp_path).epochs == [0]
    assert open_history(tmp_path).filters() == {}


@pytest.mark.parametrize("gradients", ["running", "epoch", None])
def test_the_training_is_bit_identical_with_and_without(tmp_path: Path, gradients: str | None) -> None:
    plain, watched = network(), network()
    train(plain, None)
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    more: dict[str, Any] = {"data": loader, "loss": F.cross_entropy} if gradients == "epoch" else {}
    with Recorder(watched, tmp_path, gradients=gradients, filters=".4:0:2", recipe="fast", **more) as recorder:
        train(watched, recorder)
    random = torch.get_rng_state()
    for (name, one), other in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert [one.training for one in plain.modules()] == [one.training for one in watched.modules()]
    train(network(), None)
    assert torch.equal(random, torch.get_rng_state())


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_same_run_goes_on_and_what_is_recorded_anew_is_set_aside(tmp_path: Path) -> None:
    net = network()
    with Recorder(net, tmp_path, gradients=None) as recorder:
        for epoch in range(4):
            recorder.end_epoch(epoch, number=epoch)
    with Recorder(net, tmp_path, gradients=None) as recorder:
        recorder.end_epoch(4, number=4)
        assert open_history(tmp_path).epochs == [0, 1, 2, 3, 4]
    with Recorder(net, tmp_path, gradients=None) as recorder:
        with pytest.warns(UserWarning, match="epoch 2 was recorded before; it and what came after it is now in"):
            recorder.end_epoch(2, number=20)
        recorder.end_epoch(3, number=30)
    history = open_history(tmp_path)
    assert [history.metrics(one)["number"] for one in history.epochs] == [0, 1, 20, 30]
    old = sorted((tmp_path / "replaced/0").iterdir())
    assert [json.loads((one / "manifest.json").read_text())["metrics"]["number"] for one in old] == [2, 3, 4]


def test_another_s_folder_is_refused(tmp_path: Path) -> None:
    net = network()
    Recorder(net, tmp_path)
    other = network()
    other[4] = nn.Conv2d(4, 6, 5, padding=2).double()
    with pytest.raises(errors.InvalidRequest, match=r"another network's: it has 4.weight \[6, 4, 3, 3\] float64 where"):
        Recorder(other, tmp_path)
    with pytest.raises(errors.InvalidRequest, match="one with gradients='running', not None"):
        Recorder(net, tmp_path, gradients=None)
    (tmp_path / "x").mkdir()
    files.write_manifest(tmp_path / "x/manifest.json", {"pictures": []})
    with pytest.raises(errors.InvalidRequest, match="holds other results"):
        Recorder(net, tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputRefused, match="is a file"):
        Recorder(net, tmp_path / "file")
    with pytest.raises(errors.ModelNotFound, match="no record of a training"):
        open_history(tmp_path / "x")


def test_a_full_disk_is_a_warning_and_the_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    recorder = Recorder(net, tmp_path)
    train(net, recorder, epochs=1)
    whole = type(tmp_path).open

    def full(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "gradients" in path.name and "w" in mode:
            raise OSError(28, "No space left on device")
        return whole(path, mode, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", full)
        with pytest.warns(
            UserWarning, match="epoch 1 is not recorded, the training goes on: .*No space left on device"
        ):
            train(net, recorder, epochs=1, first=1)
    assert open_history(tmp_path).epochs == [0]
    assert not (tmp_path / "epochs/000001").exists()
    train(net, recorder, epochs=1, first=2)
    assert open_history(tmp_path).epochs == [0, 2]


def test_an_epoch_without_its_manifest_does_not_count_and_is_written_over(tmp_path: Path) -> None:
    net = network()
    recorder = Recorder(net, tmp_path, gradients=None)
    recorder.end_epoch(0)
    begun = tmp_path / "epochs/000001"
    begun.mkdir()
    (begun / "kernels.safetensors").write_bytes(b"cut sh")
    assert open_history(tmp_path).epochs == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recorder(net, tmp_path, gradients=None).end_epoch(1)
    assert open_history(tmp_path).kernels(".0", 1).weights.equal(net.state_dict()["0.weight"])


def test_a_training_that_is_killed_leaves_all_finished_epochs_readable(tmp_path: Path) -> None:
    code = (
        "import sys, test_recorder as t; net = t.network(); recorder = t.Recorder(net, sys.argv[1])\n"
        "t.train(net, recorder, epochs=10_000)"
    )
    for moment in (0.0, 0.004):
        folder = tmp_path / str(moment)
        child = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parent)
        while not (folder / "epochs/000003/manifest.json").exists():
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(moment)
        child.kill()
        child.wait()
        history = open_history(folder)
        assert history.epochs == list(range(len(history.epochs)))
        assert [len(one) for one in history.record()] == [16] * len(history.epochs)
        assert all(bool(history.kernels(".8", one).weights.isfinite().all()) for one in history.epochs)
        count, net = len(history.epochs), network()
        train(net, Recorder(net, folder), epochs=1, first=count)
        assert history.epochs == list(range(count + 1))


def test_the_cap_is_looked_at_in_advance_and_never_passed(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(
        errors.InvalidRequest, match=r"500 epochs of up to 38\.3 kB are 19\.2 MB, and the cap is 1\.0 MB"
    ):
        Recorder(net, tmp_path / "a", epochs=500, cap=10**6)
    assert not (tmp_path / "a").exists()
    recorder = Recorder(net, tmp_path / "b", gradients=None, cap=20_000)
    recorder.end_epoch(0)
    with pytest.warns(UserWarning, match=r"epoch \d+ is not recorded: .* beyond its cap of 20.0 kB"):
        collections.deque(map(recorder.end_epoch, range(1, 12)), 0)
    history = open_history(tmp_path / "b")
    assert sum(path.stat().st_size for path in history.folder.rglob("*") if path.is_file()) <= 20_000


def test_a_run_with_filters_goes_on_too(tmp_path: Path) -> None:
    net = network()
    for epoch in range(2):
        recorder = Recorder(net, tmp_path, gradients=None, filters="1:0:2", recipe="max-step")
        recorder.film = None  # what is rendered is not looked at here
        recorder.end_epoch(np.int64(epoch))  # type: ignore[arg-type]
    assert open_history(tmp_path).epochs == [0, 1]
    assert open_history(tmp_path).facts["filters"]["layer"] == ".4"
    with pytest.raises(errors.InvalidRequest, match="is one with other filters; choose another folder"):
        Recorder(net, tmp_path, gradients=None, filters="1:0:3", recipe="max-step")


def test_what_two_recorders_or_nobody_left_there_is_not_lost(tmp_path: Path) -> None:
    one, other = (Recorder(network(), tmp_path, gradients=None) for _ in range(2))
    one.end_epoch(0, number=1)
    with pytest.warns(UserWarning, match="epoch 0 was recorded before"):
        other.end_epoch(0, number=2)
    assert open_history(tmp_path).metrics(0) == {"number": 2}
    assert (tmp_path / "replaced/0/000000/manifest.json").exists()
    shutil.rmtree(tmp_path)
    one.end_epoch(1, number=3)
    assert open_history(tmp_path).metrics() == {"number": 3}


def test_a_damaged_epoch_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    recorder = Recorder(network(), tmp_path, gradients=None)
    recorder.end_epoch(0)
    recorder.end_epoch(1)
    history = open_history(tmp_path)
    (history.place(1) / "kernels.safetensors").write_bytes(b"abc")
    with pytest.raises(errors.WeightsRefused, match=r"000001/kernels.safetensors is damaged .* delete .*000001 to"):
        history.kernels(".0")
    (history.place(1) / "manifest.json").write_text("{")
    with pytest.raises(errors.WeightsRefused, match=r"000001/manifest.json is damaged"):
        history.entry()
    assert history.kernels(".0", 0).weights.shape == (4, 3, 3, 3)


def test_a_layer_that_took_another_s_place_is_the_one_recorded(tmp_path: Path) -> None:
    net = network()
    recorder = Recorder(net, tmp_path, gradients=None)
    net[4] = nn.Conv2d(4, 6, 3, padding=1).double()
    recorder.end_epoch(0)
    assert open_history(tmp_path).kernels(".4").weights.equal(net.state_dict()["4.weight"])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_recorded_is_refused_before_the_training(tmp_path: Path) -> None:
    net = network()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"layers": "block9*"}, r"no convolution matches 'block9\*'; there are: .0, .4, .8"),
        ({"gradients": "all"}, "gradients is 'running', 'epoch' or None, not 'all'"),
        ({"gradients": "epoch"}, "gradients='epoch' needs data="),
        ({"every": 0}, "every is a whole number of at least 1, not 0"),
        ({"filters": ".4:0:9"}, "there is no channel 8"),
        ({"filters": "conv9:0:1"}, "conv9"),
        ({"filters": "9:0:1"}, "9"),
        ({"filters": ".16:0:1"}, "has no map of channels to render"),
        ({"recipe": "x"}, "x"),
        ({"layers": ["0"]}, "layers is of the kind str"),
        ({"cap": "1GB"}, "cap is of the kind int, not '1GB'"),
        ({"epochs": -1}, "epochs is a whole number of at least 0, not -1"),
        ({"writer": 3}, "a writer is a SummaryWriter"),
    )
    for wrong, sentence in cases:
        with pytest.raises(errors.PhospheneError, match=sentence):
            Recorder(net, tmp_path / "run", **wrong)
    with pytest.raises(
        errors.InvalidRequest, match=r"a Recorder watches a torch\.nn.Module or a Keras model, not a str"
    ):
        Recorder("net", tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_recorded_on_the_way_says_so(tmp_path: Path) -> None:
    net = network()
    recorder = Recorder(net, tmp_path / "a")
    with pytest.raises(errors.InvalidRequest, match="no backward pass was seen in epoch 0: call recorder"):
        recorder.end_epoch(0)
    with pytest.raises(errors.InvalidRequest, match="no weight has a new gradient"):
        recorder.after_backward()
    backward(net, samples(4))
    recorder.after_backward()
    with pytest.raises(errors.InvalidRequest, match="no weight has a new gradient"):
        recorder.after_backward()
    with pytest.raises(errors.InvalidRequest, match="whole number of at least 0, not -1"):
        recorder.end_epoch(-1)
    with pytest.raises(errors.InvalidRequest, match="a metric is one number, and loss is 'low'"):
        recorder.end_epoch(0, loss="low")  # type: ignore[arg-type]
    for data, loss, sentence in (
        (iter([samples(2)]), F.cross_entropy, "can be gone through once an epoch"),
        ([samples(2)[0]], F.cross_entropy, r"a batch for gradients='epoch' is \(inputs, targets\)"),
        (samples(2), None, "needs loss="),
        (
            samples(2),
            partial(F.cross_entropy, reduction="none"),
            r"one number that the weights decide; it returned .*2",
        ),
        ([], F.cross_entropy, "held no sample"),
        ((samples(2)[0][:, :1], samples(2)[1]), F.cross_entropy, "does not take a batch of the data .* channels"),
    ):
        with pytest.raises(errors.InvalidRequest, match=sentence):
            Recorder(net, tmp_path / "b", gradients="epoch", data=data, loss=loss)


def test_the_record_names_what_it_has(tmp_path: Path) -> None:
    recorder = Recorder(network(), tmp_path, gradients=None)
    history = open_history(tmp_path)
    with pytest.raises(errors.InvalidRequest, match="holds no finished epoch yet"):
        history.kernels(".0")
    recorder.end_epoch(3)
    with pytest.raises(errors.InvalidRequest, match="holds no epoch 2; it has 3"):
        history.kernels(".0", 2)
    with pytest.raises(
        errors.LayerNotFound, match=r"no kernels of 'conv' are recorded; the nearest are: \.0, \.4, \.8"
    ):
        history.kernels("conv")
    assert history.kernels(1).spec["layer"] == ".4"
