"""The two-choice task against plain loops and numbers by hand."""

import itertools
import math

import pytest
import torch

from phosphene.evidence.two_choice import Choices, Style, choices, share_right, style


def test_of_a_thousand_photos_every_second_of_the_strongest_forty_explains() -> None:
    activations = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    ranking = sorted(range(1000), key=lambda photo: -float(activations[photo]))
    chosen = choices(activations)
    assert chosen.explaining.tolist() == ranking[0:40:2]
    assert chosen.strong.tolist() == ranking[1:40:2]
    weak = [ranking.index(photo) for photo in chosen.weak.tolist()]
    assert (len(weak), weak[0], weak[-1]) == (100, 300, 999)
    assert {after - before for before, after in itertools.pairwise(weak)} == {7, 8}


def test_few_photos_still_give_one_of_each() -> None:
    chosen = choices(torch.tensor([0.1, 0.9, 0.5, 0.2]))
    assert (chosen.explaining.tolist(), chosen.strong.tolist()) == ([1], [2])
    assert chosen.weak.tolist() == [2]  # of four, rank 1: a task for more photos than that


def test_the_style_is_the_mean_and_the_deviation_over_space() -> None:
    act = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [2.0, 2.0]]]])
    (features,) = style([act]).layers
    assert features.tolist()[0] == pytest.approx([4, 2, math.sqrt((9 + 1 + 1 + 9) / 3), 0])


def test_similarity_is_the_sum_of_cosines_of_standardised_features() -> None:
    generator = torch.Generator().manual_seed(5)
    photos = Style((torch.randn(9, 4, generator=generator), 10 + torch.randn(9, 6, generator=generator)))
    pictures = Style((torch.randn(2, 4, generator=generator), 10 + torch.randn(2, 6, generator=generator)))
    similarity = pictures.standardised(photos) @ photos.standardised(photos).T
    for row in range(2):
        for column in range(9):
            total = 0.0
            for features, reference in zip(pictures.layers, photos.layers, strict=True):
                mean, deviation = reference.mean(0), reference.std(0)
                a, b = (features[row] - mean) / deviation, (reference[column] - mean) / deviation
                total += float(a @ b / (a.norm() * b.norm()))
            assert float(similarity[row, column]) == pytest.approx(total, abs=1e-5)


def test_the_share_of_right_choices_counts_pairs_and_halves_ties() -> None:
    photos = torch.tensor([[3.0], [1.0], [2.0], [1.0], [0.0]])
    chosen = Choices(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([2, 3, 4]))
    # 3 beats 2, 1 and 0; 1 loses to 2, ties with 1 and beats 0
    assert share_right(torch.tensor([[1.0]]), photos, chosen) == (3 + 0 + 0.5 + 1) / 6
    assert share_right(torch.tensor([[-1.0]]), photos, chosen) == pytest.approx(1 - 4.5 / 6)


def test_several_pictures_explain_by_their_mean_similarity() -> None:
    photos = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])
    chosen = Choices(torch.tensor([0]), torch.tensor([2]), torch.tensor([0, 1]))
    # similarities to (1, 0) and (0, 1) are on average .5, .5 and .7; to (1, 0) alone 1, 0 and .7
    assert share_right(torch.eye(2), photos, chosen) == 1.0
    assert share_right(torch.eye(2)[:1], photos, chosen) == 0.5
