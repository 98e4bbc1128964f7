"""Constants on a device: one copy for each device and dtype, usable by autograd."""

from __future__ import annotations

import torch

from phosphene.network.device_constant import DeviceConstant


def test_each_dtype_is_converted_once_and_its_own_is_not_copied() -> None:
    values = torch.tensor([0.1, 0.2], dtype=torch.float64)
    constant = DeviceConstant(values)
    assert constant.to(torch.device("cpu")) is values
    converted = constant.like(torch.zeros(1))
    assert converted.dtype == torch.float32
    assert converted.equal(torch.tensor([0.1, 0.2]))
    assert constant.to(torch.device("cpu"), torch.float32) is converted


def test_a_copy_first_made_in_inference_mode_can_be_differentiated_with_later() -> None:
    constant = DeviceConstant(torch.tensor([3.0]))
    with torch.inference_mode():
        constant.to(torch.device("cpu"), torch.float64)
    factor = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((factor * constant.like(factor)).sum(), factor)
    assert gradient.item() == 3.0
