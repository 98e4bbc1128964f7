"""Verdicts: how well a picture shows its filter, each with the figures that it rests on.

A picture is judged as it is saved, 8 bits a channel, by the unchanged network. With a(picture) the mean of a channel
over its map,

    excitation  (a(picture) - mean over photos of a) / (maximum over photos of a - mean over photos of a)
    stability   the mean of a - b over slightly moved pictures, over a - b of the unmoved picture
    agreement   of two pictures of one filter from two seeds, the smaller a - b over the larger, at least 0
    retrieval   the rank of the picture among all pictures of its layer, sorted by a of its channel
    own         the rank of its channel among all channels, sorted by (a - mean over photos) / deviation over photos

where b is the mean over photos of a, or without photos the a of a grey picture. At an excitation of 1 the picture is
as strong as the strongest photo; 1 is also the best rank.

A figure is None if it cannot be computed: excitation and own without photos, or if the photos excite the channel all
alike; agreement without a second seed; stability of a picture that excites its channel no more than b, agreement if
neither picture does. A verdict rests on the figures that exist: without photos on stability, retrieval and agreement.
The render says first which pictures are dead and which plain; the others are weak, unstable or vivid by their figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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

VIVID, WEAK, UNSTABLE, DEAD, PLAIN = VERDICTS = ("vivid", "weak", "unstable", "dead", "plain")
MOVES = 8
AT_ONCE = 8  # pictures in a batch; fixed, since rounding depends on the size of the batch
ROUNDING = 1e-6  # relative; smaller differences are rounding errors of float32
DIGITS = 5  # of figures; further digits differ between machines


@dataclass(frozen=True)
class Thresholds:
    """The limits of verdicts, chosen by looking at trained and at random filters.

    Attributes:
        excitation: weak below.
        outdone: weak if a larger share of pictures does better in retrieval, or of channels in own.
        stability, agreement: unstable below.
    """

    excitation: float = 0.75
    outdone: float = 0.5
    stability: float = 0.6
    agreement: float = 0.5


THRESHOLDS = Thresholds()


class LayerStatistics(Protocol):
    """Statistics over photos of the channels of a layer, (c,) each, of the channel's mean over the map."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def std(self) -> Tensor: ...
    @property
    def maximum(self) -> Tensor: ...


@dataclass(frozen=True)
class Verdict:
    """The verdict on one picture, and its figures as in the module's docstring; `score` is a(picture)."""

    channel: int
    picture: str
    verdict: str
    score: float
    excitation: float | None
    stability: float | None
    retrieval: int | None
    own: int | None
    agreement: float | None


class Measurements(NamedTuple):
    """How n pictures excite a layer's channels, as means over the map, float64 on the CPU.

    Attributes:
        plain: (n, c) of every channel for each picture where it is.
        moved: (n,) of the channel that each picture shows, averaged over the picture's moves.
        second_seed: (n,) of the same channels for the pictures from another seed, or None.
        grey: (c,) for a picture that is grey throughout.
    """

    plain: Tensor
    moved: Tensor
    second_seed: Tensor | None
    grey: Tensor


def judge(
    model: Model,
    layer: str | int,
    pictures: Tensor,
    channels: Sequence[int],
    dead: Tensor | None = None,
    photos: LayerStatistics | None = None,
    second_seed: Tensor | None = None,
    plain: Tensor | None = None,
) -> tuple[Verdict, ...]:
    """Return the verdicts on pictures of a layer's filters.

    The network sees each picture once where it is and `MOVES` times moved; at most `AT_ONCE` pictures exist as floats
    at a time.

    Args:
        pictures: (n, c, h, w) uint8, as saved; `second_seed`: pictures of the same filters from another seed.
        channels: the filter that each of them shows.
        dead, plain: (n,) of the render, see `Rendered`; by default no picture is either.
        photos: their statistics at this layer, at the size of the pictures, for every channel of the layer.

    Raises:
        LayerNotFound: there is no such layer.
        LayerRefused: it returns no maps, or a picture makes its channel NaN or infinite.
        ChannelNotFound, InvalidRequest: the other arguments do not fit the layer or each other.
    """
    numbers = torch.tensor(list(channels), dtype=torch.long)
    none = torch.zeros(len(numbers), dtype=torch.bool)
    is_dead, is_plain = (none if marks is None else marks.cpu() for marks in (dead, plain))
    check_pictures(model.find(layer), pictures, numbers, is_dead, is_plain, photos, second_seed)
    measurements = measure(model, layer, pictures, second_seed, numbers)
    check_finite(layer, numbers, measurements)
    return verdicts(measurements, numbers, is_dead, is_plain, photos)


def check_pictures(
    layer: Layer,
    pictures: Tensor,
    channels: Tensor,
    dead: Tensor,
    plain: Tensor,
    photos: LayerStatistics | None,
    second_seed: Tensor | None,
) -> None:
    """Refuse what cannot be judged; see `judge`."""
    if not layer.is_map:
        raise LayerRefused(f"{layer.path} is a {layer.kind} and returns no map of channels; judge pictures of filters")
    if pictures.dtype != torch.uint8 or pictures.dim() != 4 or not len(pictures):
        raise InvalidRequest(
            f"pictures are judged as saved, uint8 (n, c, height, width), n at least 1, not "
            f"{tuple(pictures.shape)} of {pictures.dtype}"
        )
    if any(tensor.shape != pictures.shape[:1] for tensor in (channels, dead, plain)):
        raise InvalidRequest(
            f"each of the {len(pictures)} pictures shows one filter, which may be dead or plain; {len(channels)} "
            f"filters, {len(dead)} values of `dead` and {len(plain)} of `plain` are given"
        )
    if second_seed is not None and (second_seed.shape != pictures.shape or second_seed.dtype != torch.uint8):
        raise InvalidRequest(
            f"the pictures from another seed are {tuple(second_seed.shape)} of {second_seed.dtype}, "
            f"those to compare with {tuple(pictures.shape)} of {pictures.dtype}"
        )
    count = layer.channels or 0
    unknown = channels[(channels < 0) | (channels >= count)].tolist()
    if unknown:
        raise ChannelNotFound(f"there is no channel {unknown[0]} in {layer.path}: it has 0 to {count - 1}")
    if photos is not None and photos.mean.shape != (count,):
        raise InvalidRequest(
            f"the statistics of the photos are {tuple(photos.mean.shape)}, but {layer.path} has {count} channels; "
            "take them from the same network and layer"
        )


def check_finite(layer: str | int, channels: Tensor, measurements: Measurements) -> None:
    """Refuse pictures that make the channel that they show NaN or infinite.

    Raises:
        LayerRefused: the message names the first.
    """
    numbers = [pick_channels(measurements.plain, channels), measurements.moved]
    if measurements.second_seed is not None:
        numbers.append(measurements.second_seed)
    wrong = ~torch.stack(numbers).isfinite().all(0)
    if bool(wrong.any()):
        raise LayerRefused(
            f"the picture of filter {int(channels[wrong][0])} makes {layer!r} NaN or infinite: the network "
            "overflows on it; render it by another recipe"
        )


def measure(
    model: Model, layer: str | int, pictures: Tensor, second_seed: Tensor | None, channels: Tensor
) -> Measurements:
    """Run all pictures through the network, where they are and moved."""
    with model.reading([layer]) as read, torch.no_grad():

        def means(images: Tensor) -> Tensor:
            act = read(channels_last_on_cpu(images))[layer]
            return act.mean((-2, -1), dtype=torch.promote_types(act.dtype, torch.float32)).double().cpu()

        def all_channels(images: Tensor, move: Move = torch.clone) -> Tensor:
            return torch.cat(
                [means(move(batch.to(model.prototype_tensor) / 255)) for batch in torch.split(images, AT_ONCE)]
            )

        def shown_channels(images: Tensor, move: Move = torch.clone) -> Tensor:
            return pick_channels(all_channels(images, move), channels)

        return Measurements(
            plain=all_channels(pictures),
            moved=torch.stack([shown_channels(pictures, move) for move in moves()]).mean(0),
            second_seed=None if second_seed is None else shown_channels(second_seed),
            grey=means(model.grey((pictures.shape[-2], pictures.shape[-1])))[0],
        )


def pick_channels(rows: Tensor, channels: Tensor) -> Tensor:
    """Return (n,): of row k of (n, c), the value of `channels[k]`, the channel that picture k shows."""
    return rows.gather(1, channels[:, None])[:, 0]


def moves() -> list[Move]:
    """Return the small moves for the stability, always the same: up to ±4 px, ±5° and × 0.95–1.05 each."""
    draws = RandomDraws(range(MOVES))
    shifts, angles, scales = draws.uniform(-4, 4, (2,)), draws.uniform(-5, 5), draws.uniform(0.95, 1.05)

    def move(images: Tensor, index: int) -> Tensor:
        shift, degrees, scale = (
            values[index].expand(len(images), *values.shape[1:]) for values in (shifts, angles, scales)
        )
        return resample(images, shift, degrees, scale)

    return [partial(move, index=index) for index in range(MOVES)]


def verdicts(
    measurements: Measurements, channels: Tensor, dead: Tensor, plain: Tensor, photos: LayerStatistics | None
) -> tuple[Verdict, ...]:
    """Return the verdicts that follow from the measurements on pictures of these channels (n,)."""
    means, missing = measurements.plain, torch.full((len(channels),), torch.nan)
    score = pick_channels(means, channels)
    mean = measurements.grey if photos is None else photos.mean.double().cpu()
    base = torch.where(mean.isnan(), measurements.grey, mean)[channels]
    gain = score - base
    picture_rank = picture_ranks(means[:, channels].T)
    channel_rank = missing if photos is None else channel_ranks(means, channels, photos)
    shares_better = torch.stack([(picture_rank - 1) / len(channels), (channel_rank - 1) / means.shape[1]])
    second = measurements.second_seed
    figures = {
        "score": score,
        "excitation": missing if photos is None else gain / photo_range(photos)[channels],
        "stability": (measurements.moved - base)
        / torch.where(within_rounding(score, base) | (gain < 0), torch.nan, gain),
        "agreement": missing if second is None else seed_agreement(gain, second - base),
        "retrieval": picture_rank,
        "own": channel_rank,
    }
    rows = [dict(zip(figures, row, strict=True)) for row in torch.stack(list(figures.values()), 1).tolist()]
    of_render = [DEAD if is_dead else PLAIN if is_plain else "" for is_dead, is_plain in zip(dead, plain, strict=True)]
    share_better = shares_better.nan_to_num(0).amax(0)
    return tuple(map(verdict, channels.tolist(), of_render, share_better.tolist(), rows))


def verdict(channel: int, of_render: str, share_better: float, figures: Mapping[str, float]) -> Verdict:
    """Return the verdict on one picture: the render's, or else that of its figures, in which NaN is a missing one."""
    excitation, stability, agreement = (rounded(figures[name]) for name in ("excitation", "stability", "agreement"))
    return Verdict(
        channel=channel,
        picture=f"filter_{channel}",
        verdict=of_render or verdict_name(share_better, excitation, stability, agreement),
        score=rounded(figures["score"]) or 0.0,
        excitation=excitation,
        stability=stability,
        retrieval=int(figures["retrieval"]),
        own=None if math.isnan(figures["own"]) else int(figures["own"]),
        agreement=agreement,
    )


def verdict_name(
    share_better: float, excitation: float | None, stability: float | None, agreement: float | None
) -> str:
    """Return the first verdict that applies: weak, unstable, vivid; see `Thresholds`."""
    is_weak = excitation is not None and excitation < THRESHOLDS.excitation
    if is_weak or stability is None or share_better > THRESHOLDS.outdone:
        return WEAK
    if stability < THRESHOLDS.stability or (agreement is not None and agreement < THRESHOLDS.agreement):
        return UNSTABLE
    return VIVID


def rounded(figure: float) -> float | None:
    """Return a figure with as many digits as are equal on every machine, None for NaN."""
    return None if math.isnan(figure) else float(f"{figure:.{DIGITS}g}")


def within_rounding(a: Tensor, b: Tensor) -> Tensor:
    """Return where two scores differ by no more than rounding."""
    return (a - b).abs() <= ROUNDING * torch.maximum(a.abs(), b.abs())


def photo_range(photos: LayerStatistics) -> Tensor:
    """Return (c,) how far the strongest photo is above the mean, NaN for a channel that all photos excite alike."""
    mean, maximum = photos.mean.double().cpu(), photos.maximum.double().cpu()
    return torch.where(within_rounding(mean, maximum), torch.nan, maximum - mean)


def picture_ranks(scores: Tensor) -> Tensor:
    """Return (n,) the rank of column k in row k of (n, n), 1 for the largest score; equal scores rank equally."""
    return (scores > scores.diagonal()[:, None]).sum(1) + 1.0


def channel_ranks(plain: Tensor, channels: Tensor, photos: LayerStatistics) -> Tensor:
    """Return (n,) the rank of each picture's channel among all, NaN for a channel that all photos excite alike."""
    has_span = ~photo_range(photos).isnan()
    scores = torch.where(has_span, (plain - photos.mean.double().cpu()) / photos.std.double().cpu(), -torch.inf)
    rank = (scores > pick_channels(scores, channels)[:, None]).sum(1) + 1.0
    return torch.where(has_span[channels], rank, torch.nan)


def seed_agreement(a: Tensor, b: Tensor) -> Tensor:
    """Return (n,) the smaller over the larger of two gains, 0 if only one is above 0, NaN if none is."""
    larger = torch.maximum(a, b)
    return torch.where(larger > 0, torch.minimum(a, b).clamp(min=0) / larger, torch.nan)
