"""A PyTorch network for a recorder: frozen, shared, replaced and compiled layers, the gradient of the total loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from phosphene.training.history import open_history
from phosphene.training.recorder import Recorder
from small_training import backward, network, samples, train


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
            for image, label in zip(*data, strict=True):
                total = total + F.cross_entropy(net(image[None]), label[None])
            expected.append(list(torch.autograd.grad(total / 21, list(net.parameters()))))
            net.train()
    record = open_history(tmp_path).record()
    assert [len(gradients) for gradients in record] == [16] * 4
    for gradients, expected_gradients in zip(record, expected, strict=True):
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


def test_frozen_and_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
            self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
            self.second.weight = self.first.weight
            self.frozen = nn.Conv2d(3, 3, 1).double().requires_grad_(False)
            self.unused = nn.Linear(2, 2).double()

        def forward(self, image: Tensor) -> Tensor:
            value: Tensor = self.second(self.frozen(self.first(image))).square().mean()
            return value

    net = Tied()
    with Recorder(net, tmp_path) as recorder:
        loss: Any = net(samples(4)[0])
        expected = torch.autograd.grad(loss, net.first.weight, retain_graph=True)[0]
        loss.backward()
        recorder.after_backward()
        recorder.end_epoch(0)
    history = open_history(tmp_path)
    assert history.weights == ["first.weight", "unused.weight", "unused.bias"]
    assert list(history.gradients()) == ["first.weight"]
    torch.testing.assert_close(history.gradients()["first.weight"], expected, rtol=0, atol=1e-15)
    assert history.layers == ["first", "second", "frozen"]
    net.frozen.requires_grad_(True)  # trained from now on: still the same network
    recorder = Recorder(net, tmp_path)
    torch.autograd.backward(net(samples(4)[0]))
    recorder.after_backward()
    recorder.end_epoch(1)
    assert list(open_history(tmp_path).gradients()) == ["first.weight", "frozen.weight", "frozen.bias"]
    assert "frozen.bias" in open_history(tmp_path).weights
    assert history.kernels("second").weights.equal(history.kernels("first").weights)


@pytest.mark.slow
def test_a_compiled_network(tmp_path: Path) -> None:
    net = network()
    compiled: Any = torch.compile(net)
    with Recorder(compiled, tmp_path, filters=".0:0:2", recipe="max-step") as recorder:
        backward(compiled, samples(8))
        expected = [weight.grad.clone() for weight in net.parameters() if weight.grad is not None]
        recorder.after_backward()
        recorder.end_epoch(0)
    for gradient, expected_gradient in zip(open_history(tmp_path).gradients().values(), expected, strict=True):
        assert gradient.equal(expected_gradient)


def test_a_layer_that_replaced_another_is_recorded(tmp_path: Path) -> None:
    net = network()
    recorder = Recorder(net, tmp_path, gradients=None)
    net[4] = nn.Conv2d(4, 6, 3, padding=1).double()
    recorder.end_epoch(0)
    assert open_history(tmp_path).kernels(".4").weights.equal(net.state_dict()["4.weight"])
