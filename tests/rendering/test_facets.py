"""Facets and opposites: the diversity term against plain loops, batches, names, and what stays the network's own."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.rendering.batches import RenderedBatch
from phosphene.rendering.facets import DIVERSITY, kept_apart, likeness, with_facets
from phosphene.rendering.objectives import MapOf
from phosphene.rendering.recipes import RECIPES, Recipe, choice

QUICK = Recipe("quick", "", (16,), 3, choice("pixels", low=0.3, high=0.7), choice("rms", rate=2.0))


@pytest.fixture
def model(small_net: nn.Sequential) -> ph.Model:
    return ph.load(small_net, input_size=32)


def plain_cosine(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine of the Gram matrices of two maps (c, h, w), entry by entry."""
    (c, h, w), grams = left.shape, []
    for act in (left, right):
        rows = [
            [sum(act[a, y, x] * act[b, y, x] for y in range(h) for x in range(w)) for b in range(c)] for a in range(c)
        ]
        grams.append(torch.stack([torch.stack(row) for row in rows]))  # type: ignore[arg-type]
    cosine: Tensor = (grams[0] * grams[1]).sum() / (grams[0] ** 2).sum().sqrt() / (grams[1] ** 2).sum().sqrt()
    return cosine


def plain_likeness(act: Tensor, facets: int) -> Tensor:
    """Return what `likeness` returns, facet by facet, with gradients to the later facet of each pair."""
    rows = []
    for row in range(len(act)):
        earlier = range(row - row % facets, row)
        cosines = [plain_cosine(act[row], act[index].detach()) for index in earlier]
        rows.append(torch.stack(cosines).mean() if cosines else 0 * act[row].sum())
    return torch.stack(rows)


# --- the diversity term


@pytest.mark.parametrize("shape", [(6, 3, 2, 3), (6, 5, 2, 1)], ids=["fewer channels", "more channels"])
def test_the_diversity_term_and_its_gradient_are_those_of_a_plain_loop(shape: tuple[int, ...]) -> None:
    act = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    expected = plain_likeness(act, 3)
    alike = likeness(act, 3)
    torch.testing.assert_close(alike, expected, rtol=1e-12, atol=1e-14)
    assert alike[0] == alike[3] == 0
    ours, plain = (torch.autograd.grad(terms.sum(), act)[0] for terms in (alike, expected))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


def test_vectors_are_maps_of_one_position() -> None:
    vectors = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert likeness(vectors, 2)[1].item() == pytest.approx(0.36)  # cos² of the angle between them
    assert torch.equal(likeness(vectors, 2), likeness(vectors[..., None, None], 2))


def test_a_map_of_zeros_gives_no_push_and_no_nan() -> None:
    act = torch.zeros(2, 3, 2, 2, requires_grad=True)
    ascended = kept_apart(act.flatten(1).sum(1), {MapOf("layer"): act}, 2)
    assert torch.equal(torch.autograd.grad(ascended.sum(), act)[0], torch.ones(2, 3, 2, 2))


def test_the_push_on_a_later_facet_is_a_fixed_share_of_its_scores_gradient() -> None:
    act = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    factors = torch.tensor([1e-3, 5.0, 1.0, 0.1, 2e3, -7.0], dtype=torch.float64)
    scores = factors * act[:, 1].mean((-2, -1))
    uphill, apart = (
        torch.autograd.grad(terms.sum(), act, retain_graph=True)[0] for terms in (scores, likeness(act, 3))
    )
    ascended = kept_apart(scores, {"layer": scores, MapOf("layer"): act}, 3)
    push = torch.autograd.grad(ascended.sum(), act)[0] - uphill
    lengths, along = push.flatten(1).norm(dim=1), (push * apart).flatten(1).sum(1)
    expected = DIVERSITY * uphill.flatten(1).norm(dim=1) * torch.tensor([0, 1, 1, 0, 1, 1])
    torch.testing.assert_close(lengths, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(along, -lengths * apart.flatten(1).norm(dim=1), rtol=1e-10, atol=0)


def test_a_step_of_facets_is_that_of_a_plain_loop(model: ph.Model, small_net: nn.Sequential) -> None:
    frames: list[ph.Frame] = []
    rendered = ph.render(model, ph.channel("4", [2, 5]), QUICK, facets=3, watch=frames.append)
    image = frames[0].image.clone().requires_grad_()
    act = small_net[:4](image)  # what the convolution sees
    scores = small_net[4](act)[range(6), [2, 2, 2, 5, 5, 5]].mean((-2, -1))
    torch.testing.assert_close(frames[0].scores, scores.detach(), rtol=1e-12, atol=0)
    for row in range(6):
        uphill = torch.autograd.grad(scores[row], act, retain_graph=True)[0][row]
        direction = uphill
        if row % 3:
            earlier = range(row - row % 3, row)
            cosines = [plain_cosine(act[row], act[index].detach()) for index in earlier]
            alike = torch.stack(cosines).mean()
            apart = torch.autograd.grad(alike, act, retain_graph=True)[0][row]
            direction = uphill - DIVERSITY * uphill.norm() / apart.norm() * apart
        gradient = torch.autograd.grad(act[row], image, direction, retain_graph=True)[0][row] / 255  # per byte
        expected = image[row] + 2.0 * gradient / (gradient.square().mean().sqrt() + 1e-5) / 255
        torch.testing.assert_close(frames[1].image[row], expected.detach(), rtol=1e-9, atol=0)
    assert rendered.names[3:] == ("filter_5", "filter_5_facet_1", "filter_5_facet_2")


# --- laws


@pytest.mark.parametrize(
    "objective", [ph.channel("4", [0, 5]), ph.neuron("4", [1, 6]), ph.logit([0, 4]), ph.layer("3")]
)
def test_the_first_facet_is_the_picture_and_more_facets_leave_the_others(
    model: ph.Model, objective: ph.Objective
) -> None:
    recipe = RECIPES["fast"].with_settings(size=24, steps=4)
    plain = ph.render(model, objective, recipe)
    two, three = (ph.render(model, objective, recipe, facets=count) for count in (2, 3))
    torch.testing.assert_close(two.images[::2], plain.images, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(three.images[1::3], two.images[1::2], rtol=1e-12, atol=1e-14)
    assert "facets" not in plain.spec
    assert (two.spec["facets"], three.spec["facets"]) == (2, 3)
    assert two.spec["objective"] == plain.spec["objective"]


def test_facets_are_less_alike_than_seeds_and_their_scores_are_the_networks_own(model: ph.Model) -> None:
    recipe = RECIPES["vivid"].with_settings(size=24, steps=16)
    objective = ph.channel("4", [0, 1, 5])
    facets = ph.render(model, objective, recipe, facets=3)
    seeds = [ph.render(model, objective, recipe, seed=seed) for seed in range(3)]
    apart = torch.stack([rendered.images for rendered in seeds], 1).flatten(0, 1)
    with model.reading(["3", "4"]) as read, torch.no_grad():
        distances = [1 - likeness(read(images)["3"], 3).view(3, 3)[:, 1:] for images in (facets.images, apart)]
        assert distances[0].mean() > 5 * distances[1].mean()
        own = read(facets.images)["4"][range(9), [0, 0, 0, 1, 1, 1, 5, 5, 5]].mean((-2, -1))
    torch.testing.assert_close(facets.scores, own, rtol=1e-12, atol=0)


def test_the_opposite_is_the_ascent_of_the_negative_with_the_scores_of_the_objective(model: ph.Model) -> None:
    objective, photo = ph.channel("4", [0, 5]), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    opposite = ph.render(model, objective, QUICK, size=16, photo=photo, opposite=True)
    negative = ph.render(model, -objective, QUICK, size=16, photo=photo)
    assert torch.equal(opposite.images, negative.images)
    assert torch.equal(opposite.scores, -negative.scores)
    assert torch.equal(opposite.history, -negative.history)
    assert bool((opposite.scores < opposite.start_scores).all())
    assert opposite.names == ("filter_0_opposite", "filter_5_opposite")
    assert opposite.spec["opposite"] is True
    assert opposite.spec["objective"] == objective.spec


def test_opposites_have_facets_too(model: ph.Model) -> None:
    both = ph.render(model, ph.channel("4", 5), QUICK, facets=2, opposite=True)
    assert both.names == ("filter_5_opposite", "filter_5_opposite_facet_1")
    assert bool((both.scores < both.start_scores).all())
    assert [both.metadata(index)["channel"] for index in range(2)] == [5, 5]


def test_an_opposite_is_dead_only_if_it_never_left_its_start() -> None:
    convolution = nn.Conv2d(3, 2, 1).double()
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        convolution.bias.copy_(torch.tensor([0.0, -100.0]))  # type: ignore[union-attr]
    model = ph.load(nn.Sequential(convolution, nn.ReLU()), input_size=16)
    after = ph.render(model, ph.channel("1", [0, 1]), QUICK, opposite=True)
    assert after.dead.tolist() == [False, True]  # nothing suppresses a filter that is silent already
    assert ph.render(model, ph.channel("0", [0, 1]), QUICK, opposite=True).dead.tolist() == [False, False]


def test_facets_in_bf16_are_kept_apart_too(small_net: nn.Sequential) -> None:
    model, recipe = ph.load(small_net.float(), input_size=32), RECIPES["vivid"].with_settings(size=24, steps=8)
    plain, facets = (
        ph.render(model, ph.channel("4", [0, 5]), recipe, precision="bf16", facets=count) for count in (1, 2)
    )
    torch.testing.assert_close(facets.images[::2], plain.images, rtol=0, atol=0.02)
    alone = ph.render(model, ph.channel("4", [0, 5]), recipe, precision="bf16", seed=1)
    pairs = torch.stack([plain.images, alone.images], 1).flatten(0, 1)
    with model.reading(["3"]) as read, torch.no_grad():
        distances = [1 - likeness(read(images)["3"], 2)[1::2].mean() for images in (facets.images, pairs)]
    assert distances[0] > 3 * distances[1]


# --- batches


def test_facets_of_a_filter_stay_in_one_batch_when_memory_runs_out(model: ph.Model) -> None:
    batches: list[list[int]] = []

    def narrow(frame: ph.Frame) -> None:
        if frame.step == 0:
            batches.append(frame.items.tolist())
        if len(frame.items) > 4 and frame.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    objective = ph.channel("4", range(5))
    whole = ph.render(model, objective, QUICK, facets=2, batch=100)
    with pytest.warns(UserWarning, match="out of memory with 10 pictures at once; going on with 4"):
        halved = ph.render(model, objective, QUICK, facets=2, batch=11, watch=narrow)
    assert batches == [list(range(10)), [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(halved.images, whole.images)


def test_a_batch_holds_at_least_the_facets_of_one_filter(model: ph.Model) -> None:
    counts: list[int] = []
    objective = ph.channel("4", [1, 2])
    ph.render(model, objective, QUICK, facets=3, batch=2, watch=lambda frame: counts.append(len(frame.items)))
    assert set(counts) == {3}

    def full(frame: ph.Frame) -> None:
        raise MemoryError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ph.errors.OutOfMemory, match="not even the 3 facets of one filter of 16 px fit"):
            ph.render(model, objective, QUICK, facets=3, watch=full)


def test_of_facets_that_are_rendered_again_only_those_that_had_not_moved_are_taken() -> None:
    def batch(start: list[float], end: list[float], level: float) -> RenderedBatch:
        images, scores = torch.full((2, 1, 1, 1), level), torch.tensor(end)
        return RenderedBatch([4, 5], images, torch.tensor(start), scores, scores.clone(), scores[None].clone(), [])

    revived = batch([1.0, 1.0], [3.0, 1.0], 0.0).with_revived(batch([1.0, 1.0], [5.0, 7.0], 0.5))
    assert revived.scores.tolist() == [3.0, 7.0]
    assert revived.images.flatten().tolist() == [0.0, 0.5]
    assert revived.history.tolist() == [[3.0, 7.0]]
    assert revived.revived == (5,)


# --- requests


@pytest.mark.parametrize("facets", [0, -1, 1.5, True, "4"])
def test_a_number_of_facets_is_a_whole_number(model: ph.Model, facets: object) -> None:
    with pytest.raises(ph.errors.InvalidRequest, match="facets is a whole number of at least 1"):
        ph.render(model, ph.channel("4", 0), QUICK, facets=facets)  # type: ignore[arg-type]


def test_facets_need_a_layer() -> None:
    with pytest.raises(ph.errors.InvalidRequest, match="facets differ in what a layer sees"):
        with_facets(ph.l2(), 2)


def test_the_sheet_has_a_row_for_each_filter(model: ph.Model) -> None:
    rendered = ph.render(model, ph.channel("4", [0, 5]), QUICK, facets=3)
    assert rendered.grid(captions=False).size == (3 * 16 + 10, 2 * 16 + 5)
    assert rendered.grid(columns=2, captions=False).size == (2 * 16 + 5, 3 * 16 + 10)
    assert rendered.grid().width > rendered.grid().height
    assert [rendered.metadata(index)["channel"] for index in range(6)] == [0, 0, 0, 5, 5, 5]
