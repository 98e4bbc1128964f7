"""Ranges of channels as people type them: `0:64`, `3,7,11`, `all`."""

import re

from phosphene.errors import ChannelNotFound, InvalidRequest

SINGLE = re.compile(r"\d{1,9}", re.ASCII)
RANGE = re.compile(r"(\d{0,9}):(\d{0,9})(?::([1-9]\d{0,8})?)?", re.ASCII)


def parse_channels(text: str, count: int) -> list[int]:
    """Return the channels, each once, that `0:64`, `3,7,11`, `0:8,20` or `all` mean for a layer with `count` of them.

    A range is as in Python: `0:64:2` takes every second channel, and a bound may be left out.

    Raises:
        InvalidRequest: the text is none of these, or chooses nothing.
        ChannelNotFound: the layer has no such channel.
    """
    chosen: list[int] = []
    for piece in text.split(","):
        single, bounds = SINGLE.fullmatch(piece.strip()), RANGE.fullmatch(piece.strip().replace("all", "::"))
        if single:
            start, stop, step = int(single[0]), int(single[0]) + 1, 1
        elif bounds:
            start, stop, step = int(bounds[1] or 0), int(bounds[2] or count), int(bounds[3] or 1)
        else:
            raise InvalidRequest(f"channels are given as 0:64, 3,7,11 or all, not {text!r}")
        if max(start + 1, stop) > count:
            raise ChannelNotFound(f"there is no channel {max(start, stop - 1)}: the layer has 0 to {count - 1}")
        chosen += range(start, stop, step)
    if not chosen:
        raise InvalidRequest(f"the channels {text!r} choose nothing")
    return list(dict.fromkeys(chosen))
