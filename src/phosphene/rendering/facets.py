"""Facets: several pictures of one filter that excite it about equally, kept apart by a diversity term.

A filter may answer to several things, of which one picture shows one. Olah et al. 2017 ("Feature Visualization",
section "Diversity") ascend a filter from several starts at once, and subtract how alike the pictures are to the
network: the cosine of the Gram matrices of their activations, which tell which channels answer together, wherever that
may be. Here a facet is pushed away only from those before it. So the first is the picture that the filter has without
facets, and more facets leave the earlier ones as they are.

The activations are those that the forward pass reads last: the layer's output or, if the layer is a convolution of
which one channel is read (`engine/linear_readout.py`), its input. So the other channels need not be computed, and N
facets cost about as much as N pictures.
"""

from dataclasses import replace

import torch
from torch import Tensor

from phosphene.arguments import whole_number
from phosphene.errors import InvalidRequest
from phosphene.rendering.objectives import Acts, MapOf, Objective, ScalarRead

DIVERSITY = 0.2  # at 0.1, facets of VGG19 look alike; at 0.3, they lose a fifth of their score and more
TINY = 1e-18  # whose square has a reciprocal in float32


def with_facets(objective: Objective, facets: int, opposite: bool = False) -> Objective:
    """Return an objective of `facets` pictures for each of another's, in a row: `filter_7`, `filter_7_facet_1`, …

    The names of opposites end in `_opposite`. The scores are those of the given objective.

    Raises:
        InvalidRequest: `facets` is not a whole number of at least 1, or the objective reads no layer.
    """
    whole_number(facets, "facets", 1)
    if facets > 1 and not objective.layers:
        raise InvalidRequest("facets differ in what a layer sees; add an objective that reads one, such as channel(…)")
    names = [f"{name}_opposite" if opposite else name for name in objective.names]
    if facets == 1:
        return replace(objective, names=tuple(names))

    def score(acts: Acts, image: Tensor, items: Tensor) -> Tensor:
        return objective.score(acts, image, items // facets)

    def repeated(read: ScalarRead) -> ScalarRead:
        return read._replace(channels=tuple(channel for channel in read.channels for _ in range(facets)))

    return replace(
        objective,
        n=objective.n * facets,
        score=score,
        names=tuple(f"{name}_facet_{facet}" if facet else name for name in names for facet in range(facets)),
        scalar_reads={address: repeated(read) for address, read in objective.scalar_reads.items()},
    )


def likeness(act: Tensor, facets: int) -> Tensor:
    """Return how like the facets before it each facet is, (b,): the mean cosine of their Gram matrices, 0 for a first.

    `act` (b, c, ...) holds the facets of one filter after the other. Gradients move the later facet of a pair alone.
    With A (c, p) a map, its Gram matrix is A Aᵀ. If there are more channels than positions, products of Gram matrices
    come from smaller ones: <A Aᵀ, B Bᵀ> = |Aᵀ B|².
    """
    maps = act.reshape(-1, facets, act.shape[1], act[0, 0].numel())  # (filters, facets, c, p)
    channels, positions = maps.shape[-2:]
    grams = maps @ maps.mT if channels <= positions else maps.mT @ maps
    if channels <= positions:
        products = torch.einsum("fjab,fkab->fjk", grams, grams.detach())
    else:
        products = torch.einsum("fjcp,fkcq->fjkpq", maps, maps.detach()).square().sum((-2, -1))
    lengths = torch.linalg.vector_norm(grams, dim=(-2, -1)).clamp(min=TINY)
    cosines = products / lengths[:, :, None] / lengths.detach()[:, None]
    earlier = torch.ones(facets, facets, dtype=act.dtype, device=act.device).tril(-1)
    count = torch.arange(facets, dtype=act.dtype, device=act.device).clamp(min=1)
    means: Tensor = (cosines * earlier).sum(-1) / count
    return means.flatten()


def kept_apart(scores: Tensor, acts: Acts, facets: int) -> Tensor:
    """Return scores (b,), less the diversity term: what facets ascend.

    The term is weighted so that its gradient at the maps is `DIVERSITY` times as long as that of the scores: the same
    for every filter and network, whatever their scores count in.
    """
    maps = [act for address, act in acts.items() if isinstance(address, MapOf)]
    dtype = torch.promote_types(scores.dtype, torch.float32)
    alike = torch.stack([likeness(act.to(dtype), facets) for act in maps]).mean(0)
    uphill, apart = (
        torch.stack([gradient.to(dtype).flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        for gradients in (torch.autograd.grad(terms.sum(), maps, retain_graph=True) for terms in (scores, alike))
    )
    weight = DIVERSITY * uphill / torch.where(apart > TINY, apart, torch.inf)  # the first facet is not pushed
    kept: Tensor = scores - (weight * alike).to(scores.dtype)
    return kept
