"""Sources of photos: folders, Parquet files, callables and datasets, and refusals of what is none."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from phosphene import errors
from phosphene.evidence.photo_dataset import open_photos


def grey_png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Return a Parquet file of seven photos, of greys 0 to 6, in row groups of three."""
    rows = [{"bytes": grey_png(grey), "path": None} for grey in range(7)]
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
    parquet.rename(parquet.parent / "a.parquet")
    pq.write_table(pa.table({"image": [grey_png(99)]}), parquet.parent / "b.parquet")
    photos = open_photos(parquet.parent)
    assert len(photos) == 8
    assert [round(float(photos[index].mean() * 255)) for index in (7, 6)] == [99, 6]
    pq.write_table(pa.table({"photo": [grey_png(99)]}), parquet.parent / "only.parquet")
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


class FailingDataset:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Image.Image:
        if index == 1:
            raise RuntimeError("the disk is gone")
        return Image.new("RGB", (2, 2))


def refused_sources(tmp_path: Path) -> Iterator[tuple[Any, type[Exception], str]]:
    """Yield objects that are no source of photos, with the error and its message."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.jpg").write_bytes(grey_png(0))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    refused = errors.PhotoRefused
    yield tmp_path / "nowhere", refused, "there is no .*nowhere; photos come from a folder"
    yield tmp_path / "empty", refused, r"there is no photo in .*empty; photos are \.jpg"
    yield tmp_path / "one.jpg", refused, "one.jpg is one file; photos come from a folder"
    yield tmp_path / "broken.parquet", refused, "is no Parquet file that can be read"
    yield (
        tmp_path / "two.parquet",
        refused,
        r"has no column of photos \(a, b\); name the column with their bytes",
    )
    yield tmp_path / "none.parquet", refused, "there is no photo in .*none.parquet: it is empty"
    yield [], refused, "there is no photo in the list: it is empty"
    yield 7, errors.InvalidRequest, "by number, not from int; give a folder"
    yield {"train": [1]}, errors.InvalidRequest, "not from dict"


def test_an_object_that_is_no_source_of_photos_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for source, error, message in refused_sources(tmp_path):
        with pytest.raises(error, match=message) as caught:
            open_photos(source)
        assert "\n" not in str(caught.value)


def test_an_error_of_the_dataset_is_quoted() -> None:
    with pytest.raises(errors.PhotoRefused, match=r"photo 1 of the dataset cannot be read: RuntimeError\('the disk"):
        open_photos(FailingDataset())[1]


def test_photos_are_identified_by_their_spec(tmp_path: Path, parquet: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for grey, name in enumerate("abc"):
        (folder / f"{name}.png").write_bytes(grey_png(grey))
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
    assert open_photos(FailingDataset()).spec["count"] == 2  # of which one cannot be read
