"""Paths of layers can be read again, and tiles lie row by row."""

from __future__ import annotations

import pytest

from phosphene.web.urls import (
    SpriteTile,
    evidence_href,
    file_href,
    filter_href,
    layer_href,
    layer_path,
    layer_slug,
    network_href,
    row_of_tiles,
    tile_of,
)


def test_a_tile_is_counted_row_by_row() -> None:
    assert tile_of("f", (10, 6), 4, 11, 6) == SpriteTile("f", 20, 6, 10, 6, (40, 18))


@pytest.mark.parametrize("path", ["base/conv1", ".0", "a~b", "ü/日本", "<script>", "..", "a b.c-d_e", "%2F", ""])
def test_slugs_can_be_read_again(path: str) -> None:
    slug = layer_slug(path)
    assert layer_path(slug) == path
    assert not slug.startswith(".")
    assert not set(slug) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-~")


def test_slugs_are_plain_and_never_hidden() -> None:
    for path in ("conv1", "base/conv1", ".body", "a b", "~2F", "größe", "100%", "a.b-c_d", "..", "x?y#z"):
        assert layer_path(layer_slug(path)) == path
        assert all(letter.isascii() and (letter.isalnum() or letter in "._-~") for letter in layer_slug(path))
        assert not layer_slug(path).startswith(".")
    assert layer_slug("größe/1") == "gr~C3~B6~C3~9Fe~2F1"


def test_a_row_of_tiles_is_that_row_of_the_sheet() -> None:
    row = row_of_tiles("f", (10, 6), 4, 3, 1)
    assert row == [SpriteTile("f", x, 6, 10, 6, (40, 18)) for x in (0, 10, 20, 30)]
    assert row == [tile_of("f", (10, 6), 4, 12, index) for index in range(4, 8)]


def test_the_paths_of_an_atlas() -> None:
    assert network_href("1a2b") == "atlas/1a2b/index.html"
    assert layer_href("1a2b", "a/b") == "atlas/1a2b/a~2Fb/index.html"
    assert filter_href("1a2b", ".0", 7) == "atlas/1a2b/~2E0/7.html"
    assert file_href("1a2b", ".0", "sheet.webp") == "atlas/1a2b/~2E0/sheet.webp"
    assert evidence_href("0123456789abcdef", "crops_0_0.webp") == "evidence/0123456789ab/crops_0_0.webp"
