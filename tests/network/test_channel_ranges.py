"""Ranges of channels: what each text means, and what is refused."""

from __future__ import annotations

import pytest

from phosphene import errors
from phosphene.network.channel_ranges import parse_channels

CHANNELS = {
    "all": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "0:3": [0, 1, 2],
    "7": [7],
    "3,7,1": [3, 7, 1],
    " 3 , 7 ": [3, 7],
    "0:2,5,8:": [0, 1, 5, 8, 9],
    ":2": [0, 1],
    "::4": [0, 4, 8],
    "1:8:3": [1, 4, 7],
    "3,2:5,3": [3, 2, 4],
    "9,all": [9, 0, 1, 2, 3, 4, 5, 6, 7, 8],
    "0:10": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
}


@pytest.mark.parametrize("text", CHANNELS)
def test_channels_are_read(text: str) -> None:
    assert parse_channels(text, 10) == CHANNELS[text]


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "a", "1.5", "-1", "1:-1", "1:2:3:4", "1:2:0", "0x3", "1 2", "²", "9" * 5000]
)
def test_what_is_no_choice_of_channels_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="channels are given as 0:64, 3,7,11 or all, not "):
        parse_channels(text, 10)


@pytest.mark.parametrize("text", ["5:5", "6:2", "0:0"])
def test_a_choice_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"the channels '{text}' choose nothing"):
        parse_channels(text, 10)


@pytest.mark.parametrize(
    ("text", "highest"), [("10", 10), ("0:12", 11), ("3,999999999", 999999999), ("0:999999999", 999999998)]
)
def test_a_channel_that_is_not_there_is_named(text: str, highest: int) -> None:
    with pytest.raises(errors.ChannelNotFound, match=f"there is no channel {highest}: the layer has 0 to 9"):
        parse_channels(text, 10)
