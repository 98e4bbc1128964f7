"""Objectives: values by hand, the laws of their arithmetic, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerRefused
from phosphene.rendering.objectives import Objective

# two pictures, three channels of 2 × 2
MAP = torch.tensor(
    [
        [[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 8.0]], [[-1.0, -1.0], [-1.0, -1.0]]],
        [[[5.0, 5.0], [5.0, 5.0]], [[1.0, 3.0], [5.0, 7.0]], [[2.0, 4.0], [6.0, 8.0]]],
    ],
    dtype=torch.float64,
)
VECTOR = torch.tensor([[0.5, 1.5, -2.0], [3.0, 4.0, 5.0]], dtype=torch.float64)
IMAGE = torch.tensor([[[[0.0, 1.0, 0.5], [0.25, 0.5, 1.0]]], [[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]]], dtype=torch.float64)
ACTS: dict[str | int, Tensor] = {"map": MAP, "vector": VECTOR, "": VECTOR, 3: MAP * 10}


def scores(objective: Objective, items: list[int] | None = None) -> list[float]:
    """Return the scores of the two rows above as the given items of an objective, by default its first two."""
    chosen = torch.tensor(items if items is not None else [0, 1 % objective.n])
    row_scores: list[float] = objective.score(ACTS, IMAGE, chosen).tolist()
    return row_scores


def test_values_by_hand() -> None:
    assert scores(ph.channel("map", [0, 1])) == [2.5, 4.0]
    assert scores(ph.channel("map", [0, 1]), [1, 0]) == [2.0, 5.0]  # each row follows its item's channel
    assert scores(ph.channel(3, 2)) == [-10.0, 50.0]
    assert scores(ph.neuron("map", [0, 2])) == [4.0, 8.0]  # the centre of 2 × 2 is row 1, column 1
    assert scores(ph.neuron("map", [0, 2], (0, 1))) == [2.0, 4.0]
    assert scores(ph.neuron("map", [0, 2], (0, 0))) == [1.0, 2.0]
    assert scores(ph.direction("map", [3.0, 4.0, 0.0])) == pytest.approx([(3 * 2.5 + 4 * 2) / 5, (3 * 5 + 4 * 4) / 5])
    assert scores(ph.direction("map", torch.tensor([[0, 0, 7], [0, -2, 0]]))) == [-1.0, -4.0]  # length does not count
    assert scores(ph.logit([1, 2])) == [1.5, 5.0]
    assert scores(ph.logit(0, "vector")) == [0.5, 3.0]
    assert scores(ph.layer("map")) == pytest.approx([(30 + 64 + 4) / 12, (100 + 84 + 120) / 12])
    assert scores(ph.layer("vector")) == pytest.approx([6.5 / 3, 50 / 3])


def test_regularisers_by_hand() -> None:
    # down: |.25| + |-.5| + |.5| of 3; right: |1| + |-.5| + |.25| + |.5| of 4
    assert scores(ph.total_variation()) == pytest.approx([1.25 / 3 + 2.25 / 4, 0.0])
    assert scores(ph.l1()) == pytest.approx([(0.5 + 0.5 + 0 + 0.25 + 0 + 0.5) / 6, 0.0])
    assert scores(ph.l2()) == pytest.approx([(0.25 + 0.25 + 0 + 0.0625 + 0 + 0.25) / 6, 0.0])


LAWS: dict[str, tuple[Objective, Objective]] = {
    "a - b is a + (-1) b": (ph.channel("map", [0, 1]) - ph.l2(), ph.channel("map", [0, 1]) + (-1) * ph.l2()),
    "2 (a + b) is 2 a + 2 b": (
        2 * (ph.channel("map", [0, 1]) + ph.logit([2, 0])),
        ph.channel("map", [0, 1]) * 2 + ph.logit([2, 0]) * 2,
    ),
    "a + b is b + a": (ph.channel("map", [0, 1]) + ph.l1(), ph.l1() + ph.channel("map", [0, 1])),
    "-(a - b) is b - a": (-(ph.layer("map") - ph.l1()), ph.l1() - ph.layer("map")),
    "(a + b) + c is a + (b + c)": (
        (ph.channel("map", [0, 1]) + ph.neuron("map", 2)) + ph.l2(),
        ph.channel("map", [0, 1]) + (ph.neuron("map", 2) + ph.l2()),
    ),
    "3 - a is -(a - 3)": (3 - ph.channel("map", [0, 1]), -(ph.channel("map", [0, 1]) - 3)),
    "sum() adds": (sum([ph.logit([0, 1]), ph.l2()], ph.l1()), ph.logit([0, 1]) + ph.l2() + ph.l1()),
}


@pytest.mark.parametrize("law", LAWS)
def test_arithmetic_means_what_arithmetic_means(law: str) -> None:
    left, right = LAWS[law]
    assert left.n == right.n
    for items in ([0, 1 % left.n], [1 % left.n, 0]):
        assert scores(left, items) == pytest.approx(scores(right, items), rel=1e-12)


def test_a_number_shifts_and_a_factor_scales() -> None:
    assert scores(ph.channel("map", [0, 1]) + 3) == [5.5, 7.0]
    assert scores(3 + ph.channel("map", [0, 1])) == [5.5, 7.0]
    assert scores(ph.channel("map", [0, 1]) - 3) == [-0.5, 1.0]
    assert scores(ph.channel("map", [0, 1]) * 0.5) == [1.25, 2.0]
    assert scores(0.5 * -ph.channel("map", [0, 1])) == [-1.25, -2.0]


def test_an_objective_of_one_picture_fits_any_number() -> None:
    mixed = ph.channel("map", range(3)) + 10 * ph.channel(3, 1)
    assert (mixed.n, mixed.layers, mixed.names) == (3, ("map", 3), ("filter_0", "filter_1", "filter_2"))
    assert scores(mixed, [2, 1]) == [-1.0 + 200.0, 4.0 + 400.0]
    backwards = 10 * ph.channel(3, 1) + ph.channel("map", range(3))
    assert backwards.names == mixed.names
    assert scores(backwards, [2, 1]) == [199.0, 404.0]


def test_names_are_of_what_the_pictures_show() -> None:
    assert (ph.total_variation() + ph.channel("map", 2)).names == ("filter_2",)
    assert (ph.l2() - ph.logit([3, 1])).names == ("class_3", "class_1")
    assert ph.direction("map", torch.eye(3)).names == ("direction_0", "direction_1", "direction_2")
    assert ph.layer("map").names == ("layer",)


def test_each_row_depends_on_itself_alone() -> None:
    mixture = ph.channel("map", [0, 1]) + ph.layer("map") - ph.total_variation() + ph.direction("map", [1.0, 2.0, 3.0])
    both = mixture.score(ACTS, IMAGE, torch.tensor([0, 1]))
    for row in range(2):
        acts = {address: act[row : row + 1] for address, act in ACTS.items()}
        assert mixture.score(acts, IMAGE[row : row + 1], torch.tensor([row])).item() == both[row].item()


@pytest.mark.parametrize(
    ("objective", "spec"),
    [
        (lambda: ph.channel("map", range(2)), {"objective": "channel", "layer": "map", "channels": [0, 1]}),
        (
            lambda: ph.neuron(3, 1, (0, 1)),
            {"objective": "neuron", "layer": 3, "channels": [1], "position": [0, 1]},
        ),
        (lambda: ph.neuron(3, 1), {"objective": "neuron", "layer": 3, "channels": [1], "position": None}),
        (
            lambda: ph.direction("map", torch.tensor([0.0, 2.0])),
            {"objective": "direction", "layer": "map", "vectors": [[0.0, 2.0]]},
        ),
        (lambda: ph.logit(np.array([4])), {"objective": "logit", "layer": "", "classes": [4]}),
        (lambda: -ph.l1() + 1, {"sum": [{"times": -1.0, "of": {"objective": "l1"}}, 1.0]}),
        (
            lambda: ph.layer("map") + ph.l2() * np.float64(0.5),
            {"sum": [{"objective": "layer", "layer": "map"}, {"times": 0.5, "of": {"objective": "l2"}}]},
        ),
    ],
)
def test_the_spec_says_in_json_what_it_is(objective: Callable[[], Objective], spec: dict[str, object]) -> None:
    assert json.loads(json.dumps(objective().spec)) == spec


def test_whole_numbers_of_numpy_and_torch_are_channels() -> None:
    expected = ph.channel("map", [2, 0]).spec
    assert ph.channel("map", np.array([2, 0])).spec == expected
    assert ph.channel("map", torch.tensor([2, 0])).spec == expected
    assert ph.channel("map", (number for number in (2, 0))).spec == expected


@pytest.mark.parametrize("wrong", [[], -1, [0, -2], True, [True], 1.0, [0.5], "3", None, [[0]], np.array([0.5])])
@pytest.mark.parametrize("make", [ph.logit, lambda chosen: ph.channel("map", chosen)])
def test_what_is_no_index_is_refused_at_once(make: Callable[[object], Objective], wrong: object) -> None:
    with pytest.raises(InvalidRequest, match=r"is a whole number of at least 0, not|was chosen; give at least one"):
        make(wrong)


def anything(value: Any) -> Any:
    """Return a value that mypy knows nothing of."""
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ph.channel("map", [0, 1]) + ph.logit([0, 1, 2]), "for 2 pictures cannot be added to one for 3"),
        (lambda: anything(ph.channel("map", 0)) * ph.l2(), "multiplied by a number, not by another objective"),
        (lambda: anything(ph.channel("map", 0)) * "2", "multiplied by a number, not '2'"),
        (lambda: anything(ph.channel("map", 0)) * float("nan"), "multiplied by a number, not nan"),
        (lambda: anything(ph.channel("map", 0)) + "2", "another objective or a number, not '2'"),
        (lambda: ph.direction("map", [0.0, 0.0]), "no row is all zero"),
        (lambda: ph.direction("map", [1.0, float("nan")]), "finite numbers"),
        (lambda: ph.direction("map", torch.ones(2, 3, 3)), r"a vector \(c,\) or a table \(n, c\)"),
        (lambda: ph.neuron("map", 0, (1, 2, 3)), r"\(row, column\), not \(1, 2, 3\)"),  # type: ignore[arg-type]
        (lambda: ph.neuron("map", 0, (-1, 0)), "a row or column is a whole number of at least 0, not -1"),
    ],
)
def test_wrong_requests_are_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (ph.channel("map", [0, 3]), ChannelNotFound, "'map' has 3 channels, 0 to 2; there is no 3"),
        (ph.neuron("map", 64), ChannelNotFound, "'map' has 3 channels, 0 to 2; there is no 64"),
        (ph.logit(3), ChannelNotFound, "the network has 3 classes, 0 to 2; there is no 3"),
        (ph.channel("vector", 0), LayerRefused, r"'vector' returns \(3,\) numbers a picture, not a map of channels"),
        (ph.neuron("vector", 0), LayerRefused, "not a map of channels"),
        (ph.direction("vector", [1.0, 1.0, 1.0]), LayerRefused, "not a map of channels"),
        (ph.logit(0, "map"), LayerRefused, r"'map' returns \(3, 2, 2\) a picture, not one number a class"),
        (ph.neuron("map", 0, (2, 0)), InvalidRequest, "'map' has a map of 2×2; there is no position 2, 0"),
        (ph.direction("map", [1.0, 1.0]), InvalidRequest, "'map' has 3 channels, the direction has 2"),
    ],
)
def test_what_does_not_fit_the_layer_is_refused(objective: Objective, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scores(objective)


@pytest.mark.parametrize(
    "objective",
    [
        ph.channel("4", [1, 6]),
        ph.neuron("4", [1, 6], (2, 3)),
        ph.direction("4", torch.randn(2, 8, generator=torch.Generator().manual_seed(1))),
        ph.layer("4") - 0.2 * ph.total_variation() + ph.l1() - ph.l2(),
    ],
    ids=lambda objective: "+".join(map(str, objective.layers)),
)
def test_gradients_agree_with_finite_differences(small_net: nn.Sequential, objective: Objective) -> None:
    image = torch.rand(2, 3, 10, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    items = torch.tensor([0, 1 % objective.n])

    def total(image: Tensor) -> Tensor:
        return objective.score({"4": small_net[:5](image)}, image, items).sum()

    assert torch.autograd.gradcheck(total, image.requires_grad_(), eps=1e-7, atol=1e-5)


def test_every_objective_goes_by_the_name_in_its_spec() -> None:
    at_a_layer = (ph.channel("4", 0), ph.neuron("4", 0), ph.direction("4", [1.0]), ph.logit(0), ph.layer("4"))
    objectives = (*at_a_layer, ph.total_variation(), ph.l1(), ph.l2())
    names = ["channel", "neuron", "direction", "logit", "layer", "total_variation", "l1", "l2"]
    assert [objective.spec["objective"] for objective in objectives] == names
