"""The shell commands that the page offers: words that a shell reads back as they were."""

from __future__ import annotations

import shlex

from phosphene.web.shell_commands import filters_command, loading_words, serve_command

LOADING = {"input_size": [64, 96], "weights": "my weights.pt", "std": [0.5], "channels_in": 1, "trust": True}


def test_the_options_of_loading_come_in_one_order_and_trust_is_left_out() -> None:
    expected = ["--weights", "my weights.pt", "--std", "0.5", "--input-size", "64x96", "--channels-in", "1"]
    assert loading_words(LOADING) == expected
    assert loading_words({}) == []


def test_a_shell_reads_the_words_of_a_command_back() -> None:
    text = filters_command("my nets/a.keras", {"mean": [0.1, 0.2]}, "a b", {"channels": 5, "size": None, "out": "it's"})
    assert text == """phosphene filters 'my nets/a.keras' 'a b' --mean 0.1,0.2 --channels 5 --out 'it'"'"'s'"""
    given = ["my nets/a.keras", "a b", "--mean", "0.1,0.2", "--channels", "5", "--out", "it's"]
    assert shlex.split(text) == ["phosphene", "filters", *given]


def test_a_server_is_started_with_the_network_of_an_atlas() -> None:
    assert serve_command("torchvision/vgg11", {"weights": "none"}) == (
        "phosphene serve PLACE --model torchvision/vgg11 --weights none"
    )
