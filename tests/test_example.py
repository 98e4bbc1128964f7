"""The example: its network and pictures are what it says, and it records and draws a training in both frameworks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from phosphene.inspection.kernels import KernelSheet
from phosphene.training.history import open_history

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
flowers: Any = importlib.import_module("flowers")
example: Any = importlib.import_module("watch_training")


def test_the_networks_have_their_parameters_and_agree(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = example.network_torch().eval()
    torch.manual_seed(0)
    network = example.network_keras()
    assert sum(weight.numel() for weight in net.parameters()) == 20_802
    assert network.count_params() == 20_842
    assert [layer.name for layer in network.layers][4] == "conv2"
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = net(images).softmax(1)
        classes = network(images.permute(0, 2, 3, 1), training=False)
    torch.testing.assert_close(classes.cpu(), expected, rtol=0, atol=1e-5)
    example.check_size(20_842, 20_802)
    assert capsys.readouterr().out == "a network of 20,842 parameters, 20,802 of them trainable\n"
    with pytest.raises(
        SystemExit, match=r"has 20,841 parameters, 20,802 of them trainable, and should have 20,842 and"
    ):
        example.check_size(20_841, 20_802)


def test_the_drawn_pictures_are_the_same_every_time() -> None:
    pictures, classes = flowers.drawn(2, seed=4)
    assert pictures.shape == (34, 224, 224, 3)
    assert torch.equal(classes.bincount(), torch.full((17,), 2))
    again, _ = flowers.drawn(2, seed=4)
    assert torch.equal(pictures, again)
    assert not torch.equal(pictures, flowers.drawn(2, seed=5)[0])
    assert len({picture.numpy().tobytes() for picture in pictures}) == 34
    # other processors may round a level otherwise
    means = pictures[:20:4].float().mean((1, 2))
    torch.testing.assert_close(means, torch.tensor(MEANS), rtol=0, atol=0.2)


def test_the_drawn_kinds_can_be_told_apart_but_not_by_colour_alone() -> None:
    """The nearest mean of 12 x 12 pixels in the middle is right far more often than chance, and far from always."""
    pictures, classes = flowers.drawn(10)
    middles = pictures[:, 52:172, 52:172].float().permute(0, 3, 1, 2)
    small = torch.nn.functional.adaptive_avg_pool2d(middles, 12).flatten(1)
    train, test = torch.arange(170) % 10 < 7, torch.arange(170) % 10 >= 7
    means = torch.stack([small[train & (classes == kind)].mean(0) for kind in range(17)])
    right = (torch.cdist(small[test], means).argmin(1) == classes[test]).float().mean()
    assert 0.25 < float(right) < 0.9


def test_every_fifth_picture_of_a_class_is_for_testing() -> None:
    classes = torch.arange(17).repeat_interleave(80)
    pictures = torch.arange(1360).view(-1, 1, 1, 1) % 80
    train, test = flowers.split(pictures, classes)
    assert (len(train), len(test)) == (1088, 272)
    assert torch.equal(test.classes.bincount(), torch.full((17,), 16))
    assert sorted(set(test.pictures.flatten().tolist())) == list(range(4, 80, 5))
    assert not set(train.pictures.flatten().tolist()) & set(range(4, 80, 5))


def test_photos_are_read_from_both_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowers, "SIDE", 8)
    archive, folders = tmp_path / "archive", tmp_path / "folders"
    (archive / "jpg").mkdir(parents=True)
    for kind in range(17):
        (folders / f"kind{kind:02}").mkdir(parents=True)
        picture = Image.new("RGB", (12, 9), (kind * 15, 255 - kind * 15, 100))
        for number in range(80):
            picture.save(archive / f"jpg/image_{kind * 80 + number + 1:04}.jpg", quality=95)
        for number in range(3):
            picture.save(folders / f"kind{kind:02}/{number}.png")
    for folder, each in ((archive, 80), (folders, 3)):
        pictures, classes = flowers.photos(folder)
        assert torch.equal(classes, torch.arange(17).repeat_interleave(each))
        reds = torch.arange(17).repeat_interleave(each) * 15.0
        torch.testing.assert_close(pictures[..., 0].float().mean((1, 2)), reds, rtol=0, atol=3)
    with pytest.raises(SystemExit, match=r"has photos of 0 classes, and the network is for 17: give the folder"):
        flowers.photos(tmp_path / "nowhere")


def stands(pixels: np.ndarray[Any, Any], levels: np.ndarray[Any, Any], y: int, x: int, factor: int) -> bool:
    """Return whether kernels (out, in, kh, kw) are drawn from a pixel on, a row a filter and a column a channel."""
    step = 3 * factor + 1
    if y + 10 * step > len(pixels) or x + 5 * step > len(pixels[0]):
        return False
    kernels = [
        [pixels[y + out * step :, x + into * step :][: 3 * factor, : 3 * factor] for into in range(5)]
        for out in range(10)
    ]
    wanted = levels.repeat(factor, 2).repeat(factor, 3)
    return bool((np.abs(np.array(kernels) - wanted) <= 1).all())


@pytest.mark.parametrize(("framework", "gradients", "epochs"), [("torch", "running", 2), ("keras", "epoch", 1)])
def test_the_example_records_and_draws_a_training(
    framework: str, gradients: str, epochs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--each", "5", "--epochs", str(epochs), "--out", str(tmp_path)]
    written = example.main(["--framework", framework, "--gradients", gradients, *common])
    folder = tmp_path / f"{framework}-{gradients}"
    names = [*(f"kernels_{one}.png" for one in range(epochs)), "gradients.png", "filters.png", "filters.gif"]
    assert written == [folder / name for name in names]
    printed = capsys.readouterr().out
    assert "68 pictures to train with and 17 to test with" in printed
    assert all(str(path) in printed for path in written)
    history = open_history(folder / "record")
    assert len(history.weights) == 16
    record = history.record()
    assert [len(epoch) for epoch in record] == [16] * epochs
    assert sum(gradient.numel() for gradient in record[0]) == 20_802
    assert all(bool(gradient.isfinite().all()) for epoch in record for gradient in epoch)
    assert history.entry()["gradients"]["kind"] == gradients
    assert {"loss", "accuracy", "val_accuracy"} <= set(history.metrics())
    assert len(history.filters()) == 5
    for epoch in range(epochs):
        kernels = history.kernels("conv2", epoch).weights.double().numpy()
        assert kernels.shape == (10, 5, 3, 3)
        levels = np.round((kernels - kernels.min()) / (kernels.max() - kernels.min()) * 255).astype(int)
        pixels = np.asarray(Image.open(folder / names[epoch]).convert("RGB"))[..., 0].astype(int)
        # the sheet lies below a caption: somewhere in the picture each kernel stands as the plain formula has it,
        # enlarged by a whole factor (matplotlib's grey map is one level darker here and there)
        places = np.argwhere(np.abs(pixels - levels[0, 0, 0, 0]) <= 1)
        factor = KernelSheet.of(torch.from_numpy(kernels)).factor
        assert any(stands(pixels, levels, int(y), int(x), factor) for y, x in places)
    assert Image.open(folder / "filters.gif").n_frames == epochs


MEANS = [
    [103.6, 129.2, 34.6],
    [77.7, 87.7, 69.5],
    [69.1, 85.9, 85.6],
    [80.6, 102.4, 25.5],
    [81.5, 57.2, 42.3],
]  # red, green, blue
