"""Photos by number: a photo has the same pixels in whatever form a dataset returns it."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from phosphene import errors
from phosphene.evidence.photo_dataset import PhotoDataset, open_photos
from phosphene.images.photo import read

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3  # (h, w, c)


def expected(channels: int = 3) -> Tensor:
    """Return what `PIXELS` are as a photo, worked out without the package."""
    if channels == 1:
        pixels = np.asarray(Image.fromarray(PIXELS).convert("L"), dtype=np.float32)[None] / 255
    else:
        pixels = PIXELS.transpose(2, 0, 1).astype(np.float32) / 255
    return torch.from_numpy(pixels)[None]


def png(pixels: Any = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with three photos, of greys 10, 20 and 30, the last of them first by name, and other things."""
    folder = tmp_path / "photos"
    (folder / "inner.png").mkdir(parents=True)
    for name, grey in (("b.png", 10), ("c.PNG", 20), ("a.png", 30)):
        Image.new("RGB", (2, 2), (grey, grey, grey)).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden.png").write_bytes(png())
    return folder


def test_a_folder_gives_its_photos_in_the_order_of_their_names(folder: Path) -> None:
    photos = open_photos(str(folder))
    assert [photos.name(index) for index in range(len(photos))] == ["a.png", "b.png", "c.PNG"]
    assert [round(float(photos[index].mean() * 255)) for index in range(3)] == [30, 10, 20]
    assert torch.equal(photos[1], read(folder / "b.png"))
    with pytest.raises(IndexError):
        photos[3]


@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray(PIXELS),
        (Image.fromarray(PIXELS), 7),
        {"image": Image.fromarray(PIXELS), "label": 7},
        {"img": {"bytes": png(), "path": None}},
        {"bytes": png(), "path": "gone.png"},
        png(),
        PIXELS,
        (torch.from_numpy(PIXELS).permute(2, 0, 1), 7),
        torch.from_numpy(PIXELS.astype(np.float64) / 255).permute(2, 0, 1),
    ],
    ids=["PIL", "torchvision", "HuggingFace", "img", "struct", "bytes", "array", "uint8 tensor", "float64 tensor"],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_whatever_a_dataset_returns_gives_the_same_pixels(item: Any, channels: int) -> None:
    photo = open_photos([item], channels)[0]
    assert photo.dtype == torch.float32
    # where the channels are numbers, grey is not rounded to bytes; Pillow truncates
    torch.testing.assert_close(photo, expected(channels), rtol=0, atol=0 if channels == 3 else 1.01 / 255)


def test_paths_in_a_dataset_are_read(folder: Path) -> None:
    photos = open_photos([(str(folder / "c.PNG"), 0), (folder / "a.png", 1)])
    assert [round(float(photos[index].mean() * 255)) for index in range(2)] == [20, 30]
    assert open_photos([folder / "c.PNG", folder / "a.png"]).name(0) == "c.PNG"


def test_grey_cmyk_and_16_bit_files_are_as_photo_read_gives_them(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(PIXELS).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((3, 3), 25700, dtype=np.uint16)).save(tmp_path / "deep.png")
    photos = open_photos(tmp_path)
    for index, name in enumerate(("cmyk.jpg", "deep.png", "grey.png")):
        assert torch.equal(photos[index], read(tmp_path / name))
        assert torch.equal(photos.with_channels(1)[index], read(tmp_path / name, 1))
        from_bytes = open_photos([(tmp_path / name).read_bytes()])
        assert torch.equal(from_bytes[0], read(tmp_path / name))
    assert torch.allclose(photos[1], torch.tensor(25700 / 65535))


def test_tensors_may_have_any_number_of_channels() -> None:
    tensors = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(open_photos(tensors, 5)[1], tensors[1:])
    grey = torch.rand(1, 3, 4)
    assert torch.equal(open_photos([grey])[0], grey.expand(3, -1, -1)[None])
    with pytest.raises(errors.PhotoRefused, match="photo 0 has 5 channels; this network sees 3"):
        open_photos(tensors)[0]
    with pytest.raises(errors.PhotoRefused, match="this network sees 5: give a dataset of tensors"):
        open_photos([Image.new("RGB", (2, 2))], 5)[0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.full((3, 2, 2), 2.5), "photo 0 has numbers from 2.5 to 2.5; .* leave out the normalisation"),
        (torch.full((3, 2, 2), torch.nan), "photo 0 has numbers from nan to nan"),
        (torch.zeros(3, 2, 2, dtype=torch.long), r"photo 0 is \(3, 2, 2\) of torch.int64; a photo is"),
        (torch.zeros(7), r"photo 0 is \(7,\) of torch.float32"),
        (torch.zeros(3, 0, 2), r"photo 0 is \(3, 0, 2\)"),
        ({"picture": 1, "label": 2}, "under 'image' of a dataset's row, which has picture, label"),
        (b"no image", r"photo 0 is no image that can be read \(8 bytes\)"),
        (png()[:45], "photo 0 cannot be read, it may be damaged"),
        (object(), "photo 0 is no photo but object"),
    ],
    ids=["normalised", "NaN", "long", "vector", "empty", "row", "bytes", "cut short", "object"],
)
def test_a_row_that_is_no_photo_is_refused(item: Any, message: str) -> None:
    with pytest.raises(errors.PhotoRefused, match=message):
        open_photos([item])[0]


def test_map_in_order_keeps_the_order_and_reads_no_further_than_necessary(folder: Path) -> None:
    photos = open_photos(folder)
    assert list(photos.map_in_order([2, 0, 1] * 50, lambda index: index)) == [2, 0, 1] * 50
    numbers = photos.map_in_order(range(10**9), lambda index: index)  # far more than can be read ahead
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    numbers.close()  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        list(photos.map_in_order([1, 0], lambda index: 1 // index))


def test_a_dataset_is_read_in_the_calling_thread() -> None:
    threads = []

    class ThreadRecorder:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            threads.append(threading.current_thread())
            return torch.zeros(3, 2, 2)

    photos: PhotoDataset = open_photos(ThreadRecorder())
    list(photos.map_in_order(range(3), lambda index: photos[index]))
    assert set(threads) == {threading.current_thread()}
