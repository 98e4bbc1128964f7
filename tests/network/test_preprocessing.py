"""Preprocessing: against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from phosphene.network.preprocessing import Preprocessing


def test_preprocessing_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    image = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    ready = Preprocessing((0.25, 0.5, 0.0), (0.5, 0.25, 2.0))(image)
    assert ready.flatten().tolist() == [0.5, -1.0, 0.5]
    assert Preprocessing()(image).equal(image)
    assert Preprocessing((0.5,), (0.5,))(image).flatten().tolist() == [0.0, -0.5, 1.0]


def test_caffe_s_preprocessing_gives_bytes_blue_first_less_the_mean_colour() -> None:
    mean = (123.68 / 255, 116.779 / 255, 103.939 / 255)
    image = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1)
    ready = Preprocessing(mean, (1 / 255,), bgr=True)(image)
    assert ready.flatten().tolist() == pytest.approx([127.5 - 103.939, -116.779, 255 - 123.68], abs=1e-12)


def test_preprocessing_keeps_the_image_s_type_and_lets_the_gradient_through() -> None:
    image = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    ready = Preprocessing((0.5,), (0.25,), bgr=True)(image)
    assert ready.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(ready[:, 0].sum(), image)  # the first channel that the network sees is blue
    assert gradient.sum((0, 2, 3)).tolist() == [0.0, 0.0, 2 * 16 * 4]
