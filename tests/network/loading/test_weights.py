"""Weights files: read whole or refused in words, and never executed."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phosphene.errors import WeightsRefused
from phosphene.network.loading.weights import load_weights, randomise, read_weights, seeded


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def saved(path: Path, content: Any) -> Path:
    """Save with the writer that fits the name."""
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def assert_loaded(path: Path, state: dict[str, Tensor]) -> None:
    module = net(1)
    load_weights(module, path)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def refusal(path: Path) -> str:
    """Return why a file is refused, having checked that the network kept its own weights."""
    module, before = net(1), net(1).state_dict()
    with pytest.raises(WeightsRefused) as caught:
        load_weights(module, path)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors", "W.PT"])
def test_every_format_gives_back_what_was_saved(tmp_path: Path, name: str) -> None:
    state = net().state_dict()
    assert_loaded(saved(tmp_path / name, dict(state)), state)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_half_precision_is_widened(tmp_path: Path, name: str) -> None:
    state = net().state_dict()
    half = {key: weight.half() if weight.is_floating_point() else weight for key, weight in state.items()}
    assert_loaded(saved(tmp_path / name, half), half)
    assert state["0.weight"].ne(half["0.weight"]).any()  # the rounding shows, so the file was read


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path: Path, prefix: str) -> None:
    state = net().state_dict()
    assert_loaded(saved(tmp_path / "w.pt", {prefix + key: weight for key, weight in state.items()}), state)


def test_a_prefix_that_is_the_network_s_own_stays(tmp_path: Path) -> None:
    inner, outer = nn.Conv2d(1, 1, 1), nn.Module()
    outer.module = nn.Conv2d(1, 1, 1)
    state = {f"module.{key}": weight for key, weight in inner.state_dict().items()}
    load_weights(outer, saved(tmp_path / "w.pt", state))
    assert torch.equal(outer.module.weight, inner.weight)


@pytest.mark.parametrize("key", ["state_dict", "model", "ema"])
def test_a_state_dict_inside_a_checkpoint_is_found(tmp_path: Path, key: str) -> None:
    state = net().state_dict()
    optimizer = torch.optim.Adam(net().parameters()).state_dict()
    assert_loaded(saved(tmp_path / "w.pt", {key: state, "epoch": 3, "optimizer": optimizer}), state)


def test_two_state_dicts_in_a_checkpoint_are_ambiguous(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "w.pt", {"model": net().state_dict(), "ema": net().state_dict()}))
    assert "several state dicts (model, ema)" in message


@pytest.mark.parametrize("content", [3, [1, 2], {"epoch": 3}, {"a": {"b": torch.zeros(1), "c": 1}}])
def test_a_file_without_a_state_dict_says_how_to_save_one(tmp_path: Path, content: object) -> None:
    assert "torch.save(module.state_dict(), path)" in refusal(saved(tmp_path / "w.pt", content))


def test_a_file_from_before_batches_were_counted_loads(tmp_path: Path) -> None:
    state = {key: weight for key, weight in net().state_dict().items() if "num_batches" not in key}
    assert_loaded(saved(tmp_path / "w.pt", state), {**state, "1.num_batches_tracked": torch.tensor(0)})


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_network_that_asks_for_its_format_s_version_loads(tmp_path: Path, name: str) -> None:
    from torchvision.models import mnasnet0_5

    source, module = mnasnet0_5(weights=None), mnasnet0_5(weights=None)
    load_weights(module, saved(tmp_path / name, source.state_dict()))
    assert torch.equal(module.layers[0].weight, source.layers[0].weight)


def test_another_network_is_told_by_the_first_names_that_differ(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    state["2.weight"], state["2.bias"] = torch.zeros(2, 5, 1, 1), torch.zeros(2, dtype=torch.int8)
    state["head.weight"] = state.pop("0.weight")
    assert refusal(saved(tmp_path / "w.pt", state)).endswith(
        "holds the weights of another network: 1 missing (0.weight); 1 unknown (head.weight); 2 of another shape "
        "(2.weight is (2, 5, 1, 1) where (2, 4, 1, 1) is needed, 2.bias is int8 (2,) where (2,) is needed)"
    )


def test_no_more_than_three_names_of_a_kind_are_listed(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "w.safetensors", {"x": torch.zeros(1)}))
    assert "8 missing (0.weight, 0.bias, 1.weight); 1 unknown (x)" in message


def test_a_missing_file_a_folder_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("1,2")
    (tmp_path / "folder.pt").mkdir()
    assert "there is no weights file" in refusal(tmp_path / "none.pt")
    assert "there is no weights file" in refusal(tmp_path / "folder.pt")
    assert "give a .safetensors, .pt or .pth file" in refusal(tmp_path / "w.csv")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "legacy.pt", "w.safetensors", "text.pt", "text.safetensors"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.stem == "legacy":
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)
    elif path.stem == "text":
        path.write_text("hello, this is no weights file at all\n" * 4)
    else:
        saved(path, dict(net().state_dict()))
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[: 1 + len(whole) * tenth // 10])
        # in the old format a cut may fall inside the name of a function, which then looks like a stranger's
        assert "is damaged, cut short or of another format" in refusal(path) or path.stem == "legacy"


class Payload:
    """What, once unpickled, creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.target), "w")


def plain(protocol: int) -> Callable[[Any, Path], object]:
    return lambda content, path: path.write_bytes(pickle.dumps(content, protocol=protocol))


WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "zip": torch.save,
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    **{f"protocol {number}": plain(number) for number in range(6)},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    target, path = tmp_path / "executed", tmp_path / "evil.pt"
    WRITERS[writer]({**net().state_dict(), "payload": Payload(target)}, path)
    assert "is a pickle that wants to run code, which is refused" in refusal(path)
    assert not target.exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


def test_a_whole_module_is_refused_with_the_way_to_save_it(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "net.pt")
    assert "torch.save(module.state_dict(), 'weights.pt')" in refusal(tmp_path / "net.pt")


def test_reading_does_not_advise_to_drop_the_safeguard(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4)[:-3])
    with pytest.raises(WeightsRefused) as caught:
        read_weights(tmp_path / "w.pt")
    assert "weights_only" not in str(caught.value)


def test_seeded_draws_repeat_and_leave_the_global_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    def state() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate()

    before = state()
    with seeded():
        first = draw()
    with seeded():
        assert draw() == first
    with suppress(ZeroDivisionError), seeded():
        draw()
        raise ZeroDivisionError
    assert state() == before


def test_random_weights_repeat_and_differ_from_what_was_there() -> None:
    first, second = net(1), net(2)
    trained = {name: weight.clone() for name, weight in first.state_dict().items()}
    first.state_dict()["1.running_mean"].add_(3)
    randomise(first)
    randomise(second)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(trained["0.weight"], first.state_dict()["0.weight"])
    assert first.state_dict()["1.running_mean"].tolist() == [0, 0, 0, 0]
