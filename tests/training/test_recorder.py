"""The Recorder on PyTorch: gradients and kernels as plain loops give them, and a training that does not notice."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phosphene import errors
from phosphene.training.history import open_history
from phosphene.training.recorder import Recorder
from small_training import backward, network, pieces, samples, train


def test_running_gradients_are_the_mean_of_the_batches(tmp_path: Path) -> None:
    net = network()
    passes: list[list[Tensor]] = []
    weights: Any = list(net.parameters())
    with Recorder(net, tmp_path) as recorder:
        train(net, recorder, after=lambda: passes.append([weight.grad.clone() for weight in weights]))
    history = open_history(tmp_path)
    assert history.epochs == [0, 1]
    assert [len(gradients) for gradients in history.record()] == [16, 16]
    for epoch, batches in ((0, passes[:3]), (1, passes[3:])):
        facts = history.entry(epoch)["gradients"]
        assert (facts["kind"], facts["read"], facts["batches"]) == ("running", "before clipping", 3)
        for number, (name, gradient) in enumerate(history.gradients(epoch).items()):
            assert name == list(dict(net.named_parameters()))[number]
            of_weight = [batch[number] for batch in batches]
            torch.testing.assert_close(gradient, sum(of_weight) / 3, rtol=0, atol=1e-15)
            recorded = facts["weights"][name]
            norms = [float(batch_gradient.norm()) for batch_gradient in of_weight]
            assert math.isclose(recorded["norm"], sum(norms) / 3, rel_tol=1e-12)
            magnitudes = [float(batch_gradient.abs().mean()) for batch_gradient in of_weight]
            assert math.isclose(recorded["mean_abs"], sum(magnitudes) / 3)
            assert sum(recorded["histogram"].values()) == 3 * gradient.numel()


@pytest.mark.parametrize("once", [True, False], ids=["once a step", "after every pass"])
def test_with_accumulation(tmp_path: Path, once: bool) -> None:
    net = network().eval()  # batch statistics would differ
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with Recorder(net, tmp_path) as recorder:
        separate = []
        for images, classes in pieces(samples(16), 4):
            separate.append(torch.autograd.grad(F.cross_entropy(net(images), classes), list(net.parameters())))
        for number, (images, classes) in enumerate(pieces(samples(16), 4)):
            backward(net, (images, classes))
            if not once or number == 3:
                recorder.after_backward()
        optimizer.step()
        recorder.end_epoch(0)
    history = open_history(tmp_path)
    count = 1 if once else 4
    assert history.entry()["gradients"]["batches"] == count
    for number, gradient in enumerate(history.gradients().values()):
        mean = sum(batch[number] for batch in separate) / count
        torch.testing.assert_close(gradient, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clipped", [True, False])
def test_before_and_after_clipping(tmp_path: Path, clipped: bool) -> None:
    net = network()
    backward(net, samples(8))
    weights: Any = list(net.parameters())
    whole = math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights))
    with Recorder(net, tmp_path) as recorder:
        if clipped:
            nn.utils.clip_grad_norm_(net.parameters(), whole / 2)
        recorder.after_backward(clipped=clipped)
        recorder.end_epoch(0)
    history = open_history(tmp_path)
    assert history.entry()["gradients"]["read"] == ("after clipping" if clipped else "before clipping")
    recorded = math.sqrt(sum(float(gradient.square().sum()) for gradient in history.gradients().values()))
    assert math.isclose(recorded, whole / (2 if clipped else 1), rel_tol=1e-5)


def test_gradients_before_and_after_clipping_in_one_epoch(tmp_path: Path) -> None:
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
            recorder.after_backward(scaler=scaler)  # which knows whether it has been divided out again
            scaler.step(optimizer)
            scaler.update()
            recorder.end_epoch(0)
        for recorded, expected in zip(open_history(tmp_path / folder).gradients().values(), plain, strict=True):
            torch.testing.assert_close(recorded, expected, rtol=1e-6, atol=1e-9)


def test_kernels_and_metrics_are_those_of_the_epoch_s_end(tmp_path: Path) -> None:
    net = network()
    weights = []
    with Recorder(net, tmp_path, layers=".4", gradients=None) as recorder:
        for epoch in range(3):
            train(net, None, epochs=1)
            weights.append(net.state_dict()["4.weight"].clone())
            recorder.end_epoch(epoch, loss=torch.tensor(epoch / 2), accuracy=math.nan)
    history = open_history(tmp_path)
    assert history.layers == [".4"]
    for epoch in range(3):
        kernels = history.kernels(".4", epoch)
        assert kernels.weights.equal(weights[epoch])
        assert kernels.spec["epoch"] == epoch
        assert history.metrics(epoch)["loss"] == epoch / 2
        assert math.isnan(history.metrics(epoch)["accuracy"])
    assert history.gradients() == {}
    assert history.entry()["gradients"] is None
    assert repr(history) == f"History(3 epochs of Sequential in {tmp_path})"


def test_every_second_epoch(tmp_path: Path) -> None:
    net = network()
    gradients: list[Tensor] = []
    bias: Any = net.get_parameter("0.bias")
    with Recorder(net, tmp_path, every=cast(int, np.int64(2))) as recorder:
        train(net, recorder, epochs=4, after=lambda: gradients.append(torch.clone(bias.grad)))
    history = open_history(tmp_path)
    assert history.epochs == [0, 2]
    torch.testing.assert_close(history.gradients(2)["0.bias"], torch.stack(gradients[6:9]).mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("gradients", ["running", "epoch", None])
def test_the_training_is_bit_identical_with_and_without(tmp_path: Path, gradients: str | None) -> None:
    plain, watched = network(), network()
    train(plain, None)
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    more: dict[str, Any] = {"data": loader, "loss": F.cross_entropy} if gradients == "epoch" else {}
    with Recorder(watched, tmp_path, gradients=gradients, filters=".4:0:2", recipe="fast", **more) as recorder:
        train(watched, recorder)
    random = torch.get_rng_state()
    for (name, expected), value in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    for plain_weight, watched_weight in zip(plain.parameters(), watched.parameters(), strict=True):
        assert plain_weight.grad is not None
        assert watched_weight.grad is not None
        assert torch.equal(plain_weight.grad, watched_weight.grad)
    assert [module.training for module in plain.modules()] == [module.training for module in watched.modules()]
    train(network(), None)
    assert torch.equal(random, torch.get_rng_state())


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
        ({"layers": ["0"]}, "layers is of type str, not"),
        ({"cap": "1GB"}, "cap is of type int, not '1GB'"),
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
        (iter([samples(2)]), F.cross_entropy, "can be iterated once an epoch"),
        ([samples(2)[0]], F.cross_entropy, r"a batch for gradients='epoch' is \(inputs, targets\)"),
        (samples(2), None, "needs loss="),
        (
            samples(2),
            partial(F.cross_entropy, reduction="none"),
            r"one number that depends on the weights; it returned .*2",
        ),
        ([], F.cross_entropy, "held no sample"),
        ((samples(2)[0][:, :1], samples(2)[1]), F.cross_entropy, "does not take a batch of the data .* channels"),
    ):
        with pytest.raises(errors.InvalidRequest, match=sentence):
            Recorder(net, tmp_path / "b", gradients="epoch", data=data, loss=loss)
