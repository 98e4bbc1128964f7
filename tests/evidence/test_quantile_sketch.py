"""The quantile sketch is as near to the exact quantiles as it says, over many orders of magnitude."""

from __future__ import annotations

import pytest
import torch

from phosphene.evidence.quantile_sketch import ABSOLUTE, RELATIVE, add_values, empty_sketch, merge_sketches
from phosphene.evidence.statistics import SHARES


def test_quantiles_are_as_near_as_stated_over_twelve_orders_of_magnitude() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3000, 4, generator=generator, dtype=torch.float64) * torch.tensor([1e-6, 1, 1e6, 1e-30])
    values = torch.cat([values, values.abs() ** 3, torch.zeros(3000, 1), values[:, :1] + 40], 1)
    sketch = empty_sketch(values.shape[1])
    for batch in torch.split(values, 70):
        sketch = add_values(sketch, batch, torch.ones_like(batch, dtype=torch.bool))
    assert int(sketch.bins.sum()) == values.numel()
    for share in (0, *SHARES, 1):
        exact = values.sort(0).values[round(share * 2999)]
        allowed = torch.maximum(RELATIVE * exact.abs(), ABSOLUTE * values.abs().amax(0))
        assert bool(((sketch.quantile(share) - exact).abs() <= allowed + 1e-40).all())
    assert pytest.approx(0.0108, abs=1e-4) == RELATIVE
    assert pytest.approx(0.0039, abs=1e-4) == ABSOLUTE
    merged = merge_sketches(empty_sketch(len(values[0])), sketch)
    assert torch.equal(merged.bins, sketch.bins)


def test_moments_of_two_batches_by_hand() -> None:
    # 1, 2, 6 of mean 3, without the broken third; then 7, which takes the mean to 4 and the squares to 9 + 4 + 4 + 9
    finite = torch.tensor([[True], [True], [False], [True]])
    sketch = add_values(empty_sketch(1), torch.tensor([[1.0], [2.0], [torch.nan], [6.0]]).double(), finite)
    sketch = add_values(sketch, torch.tensor([[7.0]]).double(), torch.tensor([[True]]))
    assert (sketch.counted.tolist(), sketch.broken.tolist()) == ([4], [1])
    moments = (sketch.mean, sketch.squares, sketch.lowest, sketch.highest)
    assert [float(moment) for moment in moments] == pytest.approx([4, 26, 1, 7], rel=1e-12)
    assert float(sketch.deviation) == pytest.approx(6.5**0.5, rel=1e-12)
