"""How many pictures are rendered at once: as many as fit the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import phosphene as ph
from phosphene.network import memory
from phosphene.network.memory import free_memory
from phosphene.rendering.engine.batch_size import bytes_of_maps, chosen_batch

CPU = torch.device("cpu")


@pytest.fixture
def model() -> ph.Model:
    # maps of 4 × 8 × 8 and 2 × 4 × 4, and ReLU's 4 × 8 × 8
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2, stride=2))
    return ph.load(net, input_size=8)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_the_maps_by_hand(model: ph.Model) -> None:
    first, last = 4 * 64, 4 * 64 + 4 * 64 + 2 * 16
    assert bytes_of_maps(model, [".0"], (8, 8)) == 4 * (first + 3 * 64)
    assert bytes_of_maps(model, [".2", ".0"], (8, 8)) == 4 * (last + 3 * 64)
    assert bytes_of_maps(model, [], (16, 8)) == 4 * 2 * (last + 3 * 64)  # the network's output: all of it


def test_a_few_on_a_cpu_and_no_more_than_the_memory_holds(model: ph.Model, system: Path) -> None:
    each = 3 * bytes_of_maps(model, [".2"], (8, 8))
    for pictures, expected in ((100, 8), (5, 4), (0.1, 1)):  # of what is free, four fifths
        system.joinpath("meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {int(each * pictures / 1024 + 1)} kB\n")
        assert chosen_batch(model, "auto", [".2"], (8, 8)) == expected
    assert chosen_batch(model, 500, [".2"], (8, 8)) == 500


def test_the_limit_of_a_group_of_processes_counts(system: Path) -> None:
    system.joinpath("meminfo").write_text("MemAvailable: 1000 kB\n")
    assert free_memory(CPU) == 1_024_000
    system.joinpath("memory.max").write_text("max\n")
    system.joinpath("memory.current").write_text("100\n")
    assert free_memory(CPU) == 1_024_000
    system.joinpath("memory.max").write_text("4000\n")
    assert free_memory(CPU) == 3900
    system.joinpath("meminfo").write_text("something else\n")
    assert free_memory(CPU) is None


def test_a_result_says_how_many_went_at_once(model: ph.Model) -> None:
    options: dict[str, Any] = {"size": 8, "steps": 1}
    assert ph.render(model, ph.channel(".2", [0, 1]), "fast", **options).spec["batch"] == 8
    assert ph.render(model, ph.channel(".2", [0, 1]), "fast", batch=1, **options).spec["batch"] == 1


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "many"])
def test_what_is_no_number_is_refused(model: ph.Model, wrong: Any) -> None:
    with pytest.raises(ph.errors.InvalidRequest, match="batch, unless 'auto', is a whole number of at least 1"):
        chosen_batch(model, wrong, [".2"], (8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
def test_a_gpu_says_what_is_free() -> None:
    free = free_memory(torch.device("cuda"))
    assert free is not None
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    after = free_memory(torch.device("cuda"))
    assert after is not None
    assert free - after >= held.nbytes // 2
