"""Photos by number: whatever holds one gives the same pixels as the file itself."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
    place = tmp_path / "photos"
    (place / "inner.png").mkdir(parents=True)
    for name, grey in (("b.png", 10), ("c.PNG", 20), ("a.png", 30)):
        Image.new("RGB", (2, 2), (grey, grey, grey)).save(place / name, "PNG")
    (place / "notes.txt").write_text("no photo")
    (place / ".hidden.png").write_bytes(png())
    return place


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
        assert torch.equal(photos.of(1)[index], read(tmp_path / name, 1))
        inside = open_photos([(tmp_path / name).read_bytes()])
        assert torch.equal(inside[0], read(tmp_path / name))
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


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Return a Parquet file of seven photos, of greys 0 to 6, in row groups of three."""
    rows = [{"bytes": png(np.full((2, 2, 3), grey, np.uint8)), "path": None} for grey in range(7)]
    pq.write_table(pa.table({"label": list(range(7)), "image": rows}), tmp_path / "x.parquet", row_group_size=3)
    return tmp_path / "x.parquet"


def test_parquet_rows_are_photos_in_any_order(parquet: Path) -> None:
    photos = open_photos(parquet)
    assert len(photos) == 7
    order = [6, 0, 3, 2, 5, 1, 4]
    assert [round(float(photos[index].mean() * 255)) for index in order] == order
    sent = pickle.loads(pickle.dumps(photos))  # with a row group in memory, which stays here
    assert round(float(sent[5].mean() * 255)) == 5


def test_a_folder_of_parquet_files_is_one_after_the_other(parquet: Path) -> None:
    binary = {"photo": [png(np.full((2, 2, 3), 99, np.uint8))]}
    parquet.rename(parquet.parent / "a.parquet")
    pq.write_table(pa.table({"image": binary["photo"]}), parquet.parent / "b.parquet")
    photos = open_photos(parquet.parent)
    assert len(photos) == 8
    assert [round(float(photos[index].mean() * 255)) for index in (7, 6)] == [99, 6]
    pq.write_table(pa.table(binary), parquet.parent / "only.parquet")
    assert len(open_photos(parquet.parent / "only.parquet")) == 1  # the one column of bytes, whatever its name


def test_parquet_structures_may_name_files(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (40, 40, 40)).save(tmp_path / "inside.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": "inside.png"}], kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    assert round(float(open_photos(tmp_path / "x.parquet")[0].mean() * 255)) == 40


def test_a_callable_returns_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef greys():\n    return torch.full((4, 3, 2, 2), 0.25)\n\n"
        "def broken():\n    raise OSError('gone')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    photos = open_photos("mine:greys")
    assert (len(photos), float(photos[3].mean())) == (4, 0.25)
    with pytest.raises(errors.PhotoRefused, match=r"mine:broken\(\) failed: OSError\('gone'\)"):
        open_photos("mine:broken")
    with pytest.raises(errors.PhotoRefused, match="mine:nothing cannot be imported"):
        open_photos("mine:nothing")


class Failing:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Image.Image:
        if index == 1:
            raise RuntimeError("the disk is gone")
        return Image.new("RGB", (2, 2))


def no_photo(tmp_path: Path) -> Iterator[tuple[Any, type[Exception], str]]:
    """Yield what is no source of photos, the error, and what its message says."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.jpg").write_bytes(png())
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    refused = errors.PhotoRefused
    yield tmp_path / "nowhere", refused, "there is no .*nowhere; photos come from a folder"
    yield tmp_path / "empty", refused, r"there is no photo in .*empty; photos are \.jpg"
    yield tmp_path / "one.jpg", refused, "one.jpg is one file; photos come from a folder"
    yield tmp_path / "broken.parquet", refused, "is no Parquet file that can be read"
    yield tmp_path / "two.parquet", refused, r"has no column of photos \(a, b\); call the one with their bytes 'image'"
    yield tmp_path / "none.parquet", refused, "there is no photo in .*none.parquet: it is empty"
    yield [], refused, "there is no photo in the list: it is empty"
    yield 7, errors.InvalidRequest, "by number, not from int; give a folder"
    yield {"train": [1]}, errors.InvalidRequest, "not from dict"


def test_what_is_no_source_of_photos_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for source, error, message in no_photo(tmp_path):
        with pytest.raises(error, match=message) as caught:
            open_photos(source)
        assert "\n" not in str(caught.value)


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


def test_what_a_dataset_raises_is_said() -> None:
    with pytest.raises(errors.PhotoRefused, match=r"photo 1 of the dataset cannot be read: RuntimeError\('the disk"):
        open_photos(Failing())[1]


def test_photos_are_known_again_by_their_spec(folder: Path, parquet: Path) -> None:
    first = open_photos(folder).spec
    assert first == open_photos(str(folder)).spec
    assert (first["kind"], first["count"]) == ("files", 3)
    copy = folder.parent / "copy"
    folder.rename(copy)
    assert open_photos(copy).spec == first  # wherever they lie
    Image.new("RGB", (9, 9)).save(copy / "b.png")
    assert open_photos(copy).spec != first
    rows = open_photos(parquet).spec
    table = pq.read_table(parquet)
    pq.write_table(table.slice(1), parquet, row_group_size=3)
    assert open_photos(parquet).spec != rows
    tensors = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert open_photos(tensors).spec == open_photos(tensors.clone()).spec
    assert open_photos(tensors).spec != open_photos(tensors.flip(0)).spec
    assert open_photos(Failing()).spec["count"] == 2  # which one of two cannot be read


def test_each_keeps_the_order_and_reads_no_further_than_asked(folder: Path) -> None:
    photos = open_photos(folder)
    assert list(photos.each([2, 0, 1] * 50, lambda index: index)) == [2, 0, 1] * 50
    taken = photos.each(range(10**9), lambda index: index)  # far more than can be made ahead
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    taken.close()  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        list(photos.each([1, 0], lambda index: 1 // index))


def test_a_dataset_is_read_in_the_thread_that_asks() -> None:
    import threading

    seen = []

    class Minding:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            seen.append(threading.current_thread())
            return torch.zeros(3, 2, 2)

    photos: PhotoDataset = open_photos(Minding())
    list(photos.each(range(3), lambda index: photos[index]))
    assert set(seen) == {threading.current_thread()}
