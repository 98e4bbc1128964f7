"""Which number format `auto` means, and when it sets in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import phosphene as ph
from phosphene.rendering.engine.precision import chosen_precision, float32_steps
from phosphene.rendering.recipes import RECIPES


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


def handle(*layers: nn.Module) -> ph.Model:
    return ph.load(nn.Sequential(*layers), input_size=16)


@pytest.mark.usefixtures("capable")
def test_auto_is_bfloat16_for_dense_networks_alone() -> None:
    assert chosen_precision(handle(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "auto") == "bf16"
    assert chosen_precision(handle(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), "auto") == "fp32"
    assert chosen_precision(handle(nn.Conv2d(3, 4, 3).double()), "auto") == "fp32"
    assert chosen_precision(handle(nn.Flatten(), nn.Linear(768, 2)), "auto") == "fp32"


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": False, "cpu_name": "AMD EPYC"}, "fp32"),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16"),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, "fp32"),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "bf16"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_makes_more_products_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool | str], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert chosen_precision(handle(nn.Conv2d(3, 4, 3)), "auto") == precision
    assert chosen_precision(handle(nn.Conv2d(3, 4, 3)), "bf16") == "bf16"


@pytest.mark.usefixtures("capable")
def test_what_was_chosen_is_said_and_not_what_was_asked() -> None:
    model = handle(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert ph.render(model, ph.channel("2", 0), "fast", size=16, steps=2).spec["precision"] == "bf16"
    plain = ph.render(model, ph.channel("2", 0), "fast", size=16, steps=2, precision="fp32")
    assert plain.spec["precision"] == "fp32"


def test_other_words_are_refused() -> None:
    with pytest.raises(ph.errors.InvalidRequest, match="precision is fp32, bf16 or auto, not 'fp16'"):
        chosen_precision(handle(nn.Conv2d(3, 4, 3)), "fp16")


def test_the_first_fifth_is_exact() -> None:
    assert float32_steps(RECIPES["fast"], "fp32") is None
    assert float32_steps(RECIPES["fourier"], "bf16") == 7  # of 32
    assert float32_steps(RECIPES["multi-scale"], "bf16") == 48  # of 12 · 20
