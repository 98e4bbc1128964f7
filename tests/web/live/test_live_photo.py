"""What a visitor's photo comes to: the same as `explain` and `activations` say, and excitations by plain loops."""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene.atlases.run import run
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerNotFound, LayerRefused, PhotoRefused
from phosphene.images import encode
from phosphene.inspection.activations import activations
from phosphene.inspection.attribution_methods import CAUTIONS
from phosphene.inspection.explain import explain
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.storage.store import open_store
from phosphene.web.live import photo as visitor
from phosphene.web.live.photo import (
    activation_sheet,
    explanation,
    layer_choices,
    ratio_to_pictures,
    read_photo,
    top_filters,
    top_of_layer,
    webp_bytes,
)
from phosphene.web.store_reader import StoreReader
from tiny_atlas import InProcessRunner, tiny_atlas, tiny_model

LABELS = ("ant", "bee", "cat", "dog", "elk", "fox")
Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def classifier() -> nn.Sequential:
    """Return two convolutions and a classifier of six classes, of which the last has no weights, seed 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        parts = {
            "conv1": nn.Conv2d(3, 6, 3, padding=1),
            "relu1": nn.ReLU(),
            "pool": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(6, 10, 3, padding=1),
            "relu2": nn.ReLU(),
            "mean": nn.AdaptiveAvgPool2d(1),
            "flat": nn.Flatten(),
            "last": nn.Linear(10, 6),
        }
        net = nn.Sequential(OrderedDict(parts))
        last = net[-1]
        assert isinstance(last, nn.Linear)
        last.weight[5] = 0
    return net.eval()


def classifying() -> Model:
    return load(classifier(), input_size=24, labels=LABELS)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def photo(seed: int = 0) -> Tensor:
    return torch.from_numpy(np.array(picture(seed=seed))).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module", params=["with photos", "without"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """An atlas of both convolutions, pictures of 16 px, whereas the network's own size is 24."""
    folder = tmp_path_factory.mktemp("store")
    photos = [picture(seed=seed) for seed in range(1, 9)] if request.param == "with photos" else None
    run(tiny_atlas(classifying()), folder, InProcessRunner(), photos=photos)
    return StoreReader([open_store(folder)])


def of(uri: str) -> bytes:
    head, _, text = uri.partition(",")
    assert head == "data:image/webp;base64"
    return base64.b64decode(text)


@pytest.mark.parametrize(
    ("method", "layer", "target"), [("gradcam", None, None), ("hirescam", "conv1", "elk"), ("eigencam", "conv2", "1")]
)
def test_classes_and_map_are_those_of_explain(
    method: str, layer: str | None, target: str | None, untouched: Untouched
) -> None:
    model = classifying()
    with untouched(model.module):
        result = explanation(model, photo(), method, layer, target)
    heat = explain(model, photo(), target, layer=layer, method=method)
    assert result["classes"] == [asdict(score) for score in heat.top]
    assert [row["name"] for row in result["classes"]] == [LABELS[score.index] for score in heat.top]
    assert result["target"] == asdict(heat.target)
    assert (result["method"], result["layer"], result["map"]) == (method, heat.layer, list(heat.map.shape))
    assert result["strongest"] == float(heat.evidence.max())
    assert result["caption"] == heat.caption()
    assert result["caution"] == CAUTIONS.get(method, "")
    assert of(result["picture"]) == encode.webp(heat.overlay(photo(), legend=False), 80)


def test_a_method_that_looks_at_the_image_takes_no_layer(shown_bars: list[str]) -> None:
    result = explanation(classifying(), photo(), "gradient", "conv2", "cat")
    assert (result["layer"], result["map"]) == ("input", [24, 24])
    assert result["target"]["name"] == "cat"
    assert shown_bars == []  # in the terminal of the server


def test_a_silent_map_says_so() -> None:
    result = explanation(classifying(), photo(), "gradcam", "conv2", "fox")
    assert result["note"] == "nothing speaks for fox at conv2"
    assert result["strongest"] == 0


def test_a_network_without_classes_says_so_and_shows_the_photo() -> None:
    result = explanation(tiny_model(), photo(), "gradcam", None, None)
    assert result["classes"] == []
    assert "names no classes" in result["note"]
    assert of(result["picture"]) == encode.webp(picture(), 80)


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(LayerNotFound):
        explanation(classifying(), photo(), "gradcam", "conv9", None)
    with pytest.raises(LayerRefused, match="no map any more"):
        explanation(classifying(), photo(), "gradcam", "mean", None)
    with pytest.raises(ChannelNotFound, match="no class is called 'gnu'"):
        explanation(classifying(), photo(), "gradcam", None, "gnu")
    with pytest.raises(InvalidRequest, match="there is no method 'guided'"):
        explanation(classifying(), photo(), "guided", None, None)


def test_layers_with_maps_are_listed() -> None:
    listed = {row["path"]: (row["channels"], row["size"]) for row in layer_choices(classifying())["layers"]}
    wide, small = (24, 24), (12, 12)
    assert listed == {
        "conv1": (6, wide),
        "relu1": (6, wide),
        "pool": (6, small),
        "conv2": (10, small),
        "relu2": (10, small),
    }


def test_the_activations_are_those_of_the_library() -> None:
    model = classifying()
    assert activation_sheet(model, photo(), "conv2") == encode.webp(
        activations(model, photo(), ["conv2"]).grid("conv2"), 80
    )


def plain_means(image: Tensor) -> dict[str, list[float]]:
    """Return the mean of every channel of both convolutions for an image (1, 3, h, w), in float64."""
    net = classifier().double()
    with torch.no_grad():
        first = net[0](image.double())
        third = net[1:4](first)
    return {
        path: [float(channel_map.mean()) for channel_map in act[0]]
        for path, act in (("conv1", first), ("conv2", third))
    }


def at_16(image: Tensor) -> Tensor:
    """Return an image (1, 3, 30, 40) as a network of 16 px sees it: 16 high, and of the 21 columns the middle 16."""
    small = torch.nn.functional.interpolate(image, (16, 21), mode="bilinear", antialias=True)
    return small[..., 2:18]


def test_excitations_are_those_of_a_plain_loop(reader: StoreReader, untouched: Untouched) -> None:
    model, atlas_id = classifying(), reader.atlases()[0].atlas_id
    with untouched(model.module):
        result = top_filters(model, photo(), reader, atlas_id)
    assert result["size"] == [16, 16]
    means = plain_means(at_16(photo()))
    evidence = reader.evidence(atlas_id)
    assert result["photos"] == (evidence and 8)
    entries = []
    for path in ("conv1", "conv2"):
        if evidence:
            others = [plain_means(at_16(photo(seed)))[path] for seed in range(1, 9)]
            base = [sum(column) / 8 for column in zip(*others, strict=True)]
            top = [max(column) for column in zip(*others, strict=True)]
        else:
            base = plain_means(torch.full((1, 3, 16, 16), 0.5))[path]
            top = [
                verdict.score
                for verdict in sorted(reader.verdicts(atlas_id, path), key=lambda verdict: verdict.channel)
            ]
        alive = [verdict.channel for verdict in reader.verdicts(atlas_id, path) if verdict.verdict != "dead"]
        alive = [n for n in alive if top[n] > base[n]]  # a picture below grey is no measure
        ratios = {n: (means[path][n] - base[n]) / (top[n] - base[n]) for n in alive}
        alive = [n for n in alive if ratios[n] > 0] or alive
        expected = sorted(alive, key=lambda n: -ratios[n])[:8]
        rows = next(top["filters"] for top in result["layers"] if top["path"] == path)
        assert [row["channel"] for row in rows] == expected
        assert [row["excitation"] for row in rows] == pytest.approx([ratios[n] for n in expected], rel=2e-3, abs=2e-4)
        entries += [(ratios[n], path, n) for n in expected]
    entries = [entry for entry in entries if entry[0] > 0] or entries
    highest = [(path, n) for _, path, n in sorted(entries, reverse=True)]
    assert [(row["layer"], row["channel"]) for row in result["strongest"]] == highest
    first = result["strongest"][0]
    assert first["page"] == f"{first['layer']}/{first['channel']}.html"
    assert first["picture"] == f"{first['layer']}/filter_{first['channel']}.png"


def test_a_photo_of_the_evidence_is_as_strong_as_the_evidence_says(reader: StoreReader) -> None:
    atlas_id = reader.atlases()[0].atlas_id
    if reader.evidence(atlas_id) is None:
        pytest.skip("there is no evidence")
    layers = [top_filters(classifying(), photo(seed), reader, atlas_id)["layers"][0]["filters"] for seed in range(1, 9)]
    best = {n: max(row["excitation"] for few in layers for row in few if row["channel"] == n) for n in range(6)}
    assert list(best.values()) == pytest.approx([1.0] * 6, abs=1e-3)  # of each filter one of the photos is strongest


def test_without_photos_the_own_picture_is_one_and_grey_is_nothing(reader: StoreReader) -> None:
    verdicts = reader.verdicts(reader.atlases()[0].atlas_id, "conv1")
    scores = torch.tensor([verdict.score for verdict in sorted(verdicts, key=lambda verdict: verdict.channel)]).double()
    grey = scores - torch.tensor([1.0, 2, 4, 0, -1, 5])  # of the fourth the picture does nothing, of the fifth less
    ratios = ratio_to_pictures(grey + 1, grey, verdicts)
    assert ratios[[0, 1, 2, 5]].tolist() == pytest.approx([1, 0.5, 0.25, 0.2])
    assert ratios[[3, 4]].isnan().all()


def test_dead_filters_and_unknown_ratios_are_left_out(reader: StoreReader) -> None:
    verdicts = reader.verdicts(reader.atlases()[0].atlas_id, "conv1")
    dead = {verdict.channel for verdict in verdicts if verdict.verdict == "dead"}
    ratios = torch.tensor([0.1, torch.nan, 0.3, 0.3, 0.05, 0.2])
    channels = [row["channel"] for row in top_of_layer("base/conv", ratios, verdicts)]
    assert channels == [channel for channel in (2, 3, 5, 0, 4) if channel not in dead]
    assert top_of_layer("base/conv", ratios, verdicts)[0]["page"] == f"base~2Fconv/{channels[0]}.html"


def test_filters_that_are_not_excited_are_left_out_unless_none_is(reader: StoreReader) -> None:
    verdicts = [
        verdict for verdict in reader.verdicts(reader.atlases()[0].atlas_id, "conv1") if verdict.verdict != "dead"
    ]
    numbers = [verdict.channel for verdict in verdicts][:4]
    ratios = torch.full((6,), -1.0)
    ratios[numbers[1]], ratios[numbers[2]] = -0.5, 0.0
    assert len(top_of_layer("conv1", ratios, verdicts)) == len(verdicts)
    assert [row["channel"] for row in top_of_layer("conv1", ratios, verdicts)][:2] == [numbers[2], numbers[1]]
    ratios[numbers[3]] = 0.25
    assert [row["channel"] for row in top_of_layer("conv1", ratios, verdicts)] == [numbers[3]]


def test_what_is_sent_is_small_whatever_the_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = picture(600, 400)
    monkeypatch.setattr(visitor, "MAX_BYTES", 30_000)
    content = webp_bytes(noise)
    assert 10_000 < len(content) <= 30_000
    width, height = encode.decode_image(content).size
    assert width / height == pytest.approx(1.5, abs=0.02)


def test_an_upload_is_held_to_its_limits() -> None:
    tensor = read_photo(png(picture(2048, 1536)), classifying())
    assert tuple(tensor.shape) == (1, 3, 768, 1024)
    assert torch.equal(read_photo(png(picture()), classifying()), photo())
    with pytest.raises(PhotoRefused, match="the photo is no image that can be read"):
        read_photo(b"GIF89a and nothing more", classifying())


def test_the_trained_network_knows_the_cat() -> None:
    model = load("builtin/efficientnet-lite0")
    content = (Path(__file__).parents[3] / "src/phosphene/data/chelsea.jpg").read_bytes()
    result = explanation(model, read_photo(content, model), "gradcam", None, None)
    assert [row["name"] for row in result["classes"][:3]] == ["tiger cat", "Egyptian cat", "tabby"]
    assert result["classes"][0]["probability"] == pytest.approx(0.386, abs=0.01)
    pixels = np.asarray(encode.decode_image(of(result["picture"])).convert("RGB")).astype(int)
    assert pixels.shape == (300, 451, 3)
    # warm where the cat's cheek and eye are, grey where there is nothing of it
    warmth = pixels[..., 0] - pixels[..., 2]
    assert warmth[60:230, 100:350].max() > 150 > 60 > abs(warmth[:40, :90]).max()
