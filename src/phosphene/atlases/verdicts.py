"""Verdicts: what the picture of a filter is worth, each with the figures that it rests on.

A picture is judged as it is saved, 8 bits a channel, by the network as it is. With a(picture) the mean of a channel
over its map,

    excitation  (a(picture) - mean over photos of a) / (maximum over photos of a - mean over photos of a)
    stability   the mean of a - b over slightly moved pictures, over a - b of the picture where it is
    agreement   of two pictures of one filter from two seeds, the smaller a - b over the larger, at least 0
    retrieval   the rank of the picture among all pictures of its layer, sorted by a of its channel
    own         the rank of its channel among all channels, sorted by (a - mean over photos) / deviation over photos

where b is the mean over photos of a, or without photos what a grey picture gives. At an excitation of 1 the picture is
as strong as the strongest photo; 1 is also the best rank.

A figure is None where it cannot be had: excitation and own without photos, or where these excite the channel all
alike; agreement without a second seed; stability of a picture that excites its channel no more than b, agreement where
neither of the two does. A verdict rests on the figures that there are: without photos on stability, retrieval and
agreement. A picture is dead if the render says so, or if it does to its channel just what a grey picture does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from phosphene.errors import ChannelNotFound, InvalidRequest, LayerRefused
from phosphene.network.layers import Layer
from phosphene.network.memory import channels_last_on_cpu
from phosphene.network.model import Model
from phosphene.rendering.transforms import RandomDraws, resample

Move = Callable[[Tensor], Tensor]

VIVID, WEAK, UNSTABLE, DEAD = VERDICTS = ("vivid", "weak", "unstable", "dead")
MOVES = 8
AT_ONCE = 8  # pictures; always as many, for in other company a picture rounds otherwise
ROUNDING = 1e-6  # relative to the numbers compared; differences below it are float32's
DIGITS = 5  # of figures: further ones differ from machine to machine


@dataclass(frozen=True)
class Thresholds:
    """What makes a picture weak or unstable, chosen by looking at trained and at random filters.

    Attributes:
        excitation: weak below.
        outdone: weak where a larger share of the layer's pictures does better in retrieval, or of its channels in own.
        stability, agreement: unstable below.
    """

    excitation: float = 0.75
    outdone: float = 0.5
    stability: float = 0.6
    agreement: float = 0.5


THRESHOLDS = Thresholds()


class LayerStatistics(Protocol):
    """What photos do to the channels of a layer, (c,) each, by the channel's mean over the map."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def std(self) -> Tensor: ...
    @property
    def maximum(self) -> Tensor: ...


@dataclass(frozen=True)
class Verdict:
    """The verdict on one picture, and its figures as in the module's text; `score` is a(picture)."""

    channel: int
    picture: str
    verdict: str
    score: float
    excitation: float | None
    stability: float | None
    retrieval: int | None
    own: int | None
    agreement: float | None


class Measured(NamedTuple):
    """What a layer's channels make of n pictures, as means over the map, float64 on the CPU.

    Attributes:
        plain: (n, c) of every channel for each picture where it is.
        moved: (n,) of each picture's own channel, as the mean over its moves.
        second: (n,) of the same channels for the pictures from another seed, None without them.
        grey: (c,) for a picture that is grey throughout.
    """

    plain: Tensor
    moved: Tensor
    second: Tensor | None
    grey: Tensor


def judge(
    model: Model,
    layer: str | int,
    pictures: Tensor,
    channels: Sequence[int],
    dead: Tensor | None = None,
    statistics: LayerStatistics | None = None,
    seconds: Tensor | None = None,
) -> tuple[Verdict, ...]:
    """Return the verdicts on pictures of a layer's filters.

    The network sees each picture once where it is and `MOVES` times moved; no more than `AT_ONCE` pictures are held as
    floating images at once.

    Args:
        pictures: (n, c, h, w) uint8, as saved; `seconds`: those of the same filters from another seed.
        channels: which filter each of them shows.
        dead: (n,) of the render: which pictures never left their starting score, or have no contrast.
        statistics: of photos at this layer, seen at the size of the pictures; for every channel of the layer.

    Raises:
        LayerNotFound: there is no such layer.
        LayerRefused: it returns no maps, or a picture makes its channel NaN or infinite.
        ChannelNotFound, InvalidRequest: the other arguments do not fit the layer or each other.
    """
    shown = torch.tensor(list(channels), dtype=torch.long)
    lifeless = torch.zeros(len(shown), dtype=torch.bool) if dead is None else dead.cpu()
    check(model.find(layer), pictures, shown, lifeless, statistics, seconds)
    measured = measure(model, layer, pictures, seconds, shown)
    need_finite(layer, shown, measured)
    return verdicts(measured, shown, lifeless, statistics)


def check(
    layer: Layer, pictures: Tensor, shown: Tensor, dead: Tensor, photos: LayerStatistics | None, seconds: Tensor | None
) -> None:
    """Refuse what cannot be judged; see `judge`."""
    if not layer.is_map:
        raise LayerRefused(f"{layer.path} is a {layer.kind} and returns no map of channels; judge pictures of filters")
    if pictures.dtype != torch.uint8 or pictures.dim() != 4 or not len(pictures):
        raise InvalidRequest(
            f"pictures are judged as saved, uint8 (n, c, height, width), n at least 1, not "
            f"{tuple(pictures.shape)} of {pictures.dtype}"
        )
    if shown.shape != pictures.shape[:1] or dead.shape != pictures.shape[:1]:
        raise InvalidRequest(
            f"each of the {len(pictures)} pictures shows one filter, dead or not; "
            f"{len(shown)} filters and {len(dead)} signs of death are given"
        )
    if seconds is not None and (seconds.shape != pictures.shape or seconds.dtype != torch.uint8):
        raise InvalidRequest(
            f"the pictures from another seed are {tuple(seconds.shape)} of {seconds.dtype}, "
            f"those to compare with {tuple(pictures.shape)} of {pictures.dtype}"
        )
    count = layer.channels or 0
    unknown = shown[(shown < 0) | (shown >= count)].tolist()
    if unknown:
        raise ChannelNotFound(f"there is no channel {unknown[0]} in {layer.path}: it has 0 to {count - 1}")
    if photos is not None and photos.mean.shape != (count,):
        raise InvalidRequest(
            f"the statistics of the photos are {tuple(photos.mean.shape)}, but {layer.path} has {count} channels; "
            "take them from the same network and layer"
        )


def need_finite(layer: str | int, shown: Tensor, measured: Measured) -> None:
    """Refuse pictures that make their own channel NaN or infinite.

    Raises:
        LayerRefused: the message names the first.
    """
    numbers = [of_own(measured.plain, shown), measured.moved]
    if measured.second is not None:
        numbers.append(measured.second)
    wrong = ~torch.stack(numbers).isfinite().all(0)
    if bool(wrong.any()):
        raise LayerRefused(
            f"the picture of filter {int(shown[wrong][0])} makes {layer!r} NaN or infinite: the network "
            "overflows on it; render it by another recipe"
        )


def measure(model: Model, layer: str | int, pictures: Tensor, seconds: Tensor | None, shown: Tensor) -> Measured:
    """Run all pictures through the network, where they are and moved."""
    with model.reading([layer]) as read, torch.no_grad():

        def means(images: Tensor) -> Tensor:
            act = read(channels_last_on_cpu(images))[layer]
            return act.mean((-2, -1), dtype=torch.promote_types(act.dtype, torch.float32)).double().cpu()

        def every(some: Tensor, change: Move = torch.clone) -> Iterator[Tensor]:
            return (means(change(few.to(model.like) / 255)) for few in torch.split(some, AT_ONCE))

        def own(some: Tensor, change: Move = torch.clone) -> Tensor:
            pairs = zip(every(some, change), torch.split(shown, AT_ONCE), strict=True)
            return torch.cat([of_own(*pair) for pair in pairs])

        return Measured(
            plain=torch.cat(list(every(pictures))),
            moved=torch.stack([own(pictures, move) for move in moves()]).mean(0),
            second=None if seconds is None else own(seconds),
            grey=means(model.grey((pictures.shape[-2], pictures.shape[-1])))[0],
        )


def of_own(every: Tensor, shown: Tensor) -> Tensor:
    """Return (n,) what picture k does to the channel that it shows, `shown[k]`, from (n, c)."""
    return every.gather(1, shown[:, None])[:, 0]


def moves() -> list[Move]:
    """Return the small moves that a picture must bear, always the same: up to ±4 px, ±5° and × 0.95–1.05 each."""
    draws = RandomDraws(range(MOVES))
    drawn = (draws.uniform(-4, 4, (2,)), draws.uniform(-5, 5), draws.uniform(0.95, 1.05))

    def move(images: Tensor, index: int) -> Tensor:
        shift, degrees, scale = (one[index].expand(len(images), *one.shape[1:]) for one in drawn)
        return resample(images, shift, degrees, scale)

    return [partial(move, index=index) for index in range(MOVES)]


def verdicts(measured: Measured, shown: Tensor, dead: Tensor, photos: LayerStatistics | None) -> tuple[Verdict, ...]:
    """Return the verdicts that follow from what was measured on pictures of the channels `shown` (n,)."""
    score, grey, none = of_own(measured.plain, shown), measured.grey[shown], torch.full((len(shown),), torch.nan)
    mean = measured.grey if photos is None else photos.mean.double().cpu()
    base = torch.where(mean.isnan(), measured.grey, mean)[shown]
    gain = score - base
    retrieval = ranks(measured.plain[:, shown].T)
    own = none if photos is None else own_ranks(measured.plain, shown, photos)
    better = torch.stack([(retrieval - 1) / len(shown), (own - 1) / measured.plain.shape[1]])
    figures = {
        "score": score,
        "excitation": none if photos is None else gain / span(photos)[shown],
        "stability": (measured.moved - base) / torch.where(same(score, base) | (gain < 0), torch.nan, gain),
        "agreement": none if measured.second is None else alike(gain, measured.second - base),
        "retrieval": retrieval,
        "own": own,
    }
    rows = [dict(zip(figures, row, strict=True)) for row in torch.stack(list(figures.values()), 1).tolist()]
    gone, outdone = dead | same(score, grey), better.nan_to_num(0).amax(0)
    return tuple(map(verdict, shown.tolist(), gone.tolist(), outdone.tolist(), rows))


def verdict(channel: int, dead: bool, outdone: float, row: Mapping[str, float]) -> Verdict:
    """Return the verdict on one picture from its figures, NaN where one cannot be had."""
    excitation, stability, agreement = (shortened(row[name]) for name in ("excitation", "stability", "agreement"))
    return Verdict(
        channel=channel,
        picture=f"filter_{channel}",
        verdict=verdict_of(dead, outdone, excitation, stability, agreement),
        score=shortened(row["score"]) or 0.0,
        excitation=excitation,
        stability=stability,
        retrieval=int(row["retrieval"]),
        own=None if math.isnan(row["own"]) else int(row["own"]),
        agreement=agreement,
    )


def verdict_of(
    dead: bool, outdone: float, excitation: float | None, stability: float | None, agreement: float | None
) -> str:
    """Return the first verdict that holds: dead, weak, unstable, vivid; see `Thresholds`."""
    if dead:
        return DEAD
    feeble = excitation is not None and excitation < THRESHOLDS.excitation
    if feeble or stability is None or outdone > THRESHOLDS.outdone:
        return WEAK
    if stability < THRESHOLDS.stability or (agreement is not None and agreement < THRESHOLDS.agreement):
        return UNSTABLE
    return VIVID


def shortened(figure: float) -> float | None:
    """Return a figure with the digits that are alike on every machine, None for NaN."""
    return None if math.isnan(figure) else float(f"{figure:.{DIGITS}g}")


def same(one: Tensor, other: Tensor) -> Tensor:
    """Return where two scores differ by no more than rounding."""
    return (one - other).abs() <= ROUNDING * torch.maximum(one.abs(), other.abs())


def span(photos: LayerStatistics) -> Tensor:
    """Return (c,) how far the strongest photo is above the mean, NaN where all photos excite the channel alike."""
    mean, maximum = photos.mean.double().cpu(), photos.maximum.double().cpu()
    return torch.where(same(mean, maximum), torch.nan, maximum - mean)


def ranks(numbers: Tensor) -> Tensor:
    """Return (n,) the rank that column k has in row k of (n, n), 1 for the largest number; equal ones rank equally."""
    return (numbers > numbers.diagonal()[:, None]).sum(1) + 1.0


def own_ranks(every: Tensor, shown: Tensor, photos: LayerStatistics) -> Tensor:
    """Return (n,) the rank of each picture's channel among all, NaN for one that all photos excite alike."""
    known = ~span(photos).isnan()
    scores = torch.where(known, (every - photos.mean.double().cpu()) / photos.std.double().cpu(), -torch.inf)
    rank = (scores > of_own(scores, shown)[:, None]).sum(1) + 1.0
    return torch.where(known[shown], rank, torch.nan)


def alike(one: Tensor, other: Tensor) -> Tensor:
    """Return (n,) the smaller over the larger of two numbers, 0 where only one is above 0, NaN where none is."""
    larger = torch.maximum(one, other)
    return torch.where(larger > 0, torch.minimum(one, other).clamp(min=0) / larger, torch.nan)
