"""Statistics over photos of the channels of a network, for each layer and as one result.

evidence/<digest>/statistics.safetensors     a layer's tensors as `<layer>/mean` and so on; see `PhotoStatistics`
evidence/<digest>/evidence.json              the request, the names of the strongest photos, what could not be read
evidence/<digest>/crops_<layer>_<page>.webp  the strongest photos, where each channel answers; see `crops`
evidence/<digest>/photos_<page>.webp         the strongest photos whole; older stores have none
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from phosphene.errors import LayerNotFound, nearest
from phosphene.evidence.photo_pass import Partial, PhotoPass
from phosphene.storage.store import Store, digest_of

SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # of the photos; the quantiles of the means that are kept
STATISTICS, ABOUT = "statistics.safetensors", "evidence.json"


@dataclass(frozen=True, eq=False)
class PhotoStatistics:
    """What photos do to the channels of one layer.

    A channel's MEAN is over its map: what `channel` scores, one number per photo. Its PEAK is the map's highest value.
    A photo for which the map holds NaN or infinity is left out, and counted as broken.

    Attributes:
        count, broken: (c,) int64, photos counted and left out.
        mean, std, minimum, maximum: (c,) float64, of the means; std over n. NaN if no photo counts.
        quantiles: (c, 7) float64, of the means at `SHARES`, within `quantile_sketch.RELATIVE` or `.ABSOLUTE`.
        peaks: (c, k) float64, of the strongest photos, highest first; -inf if there are fewer than k.
        photos: (c, k) int64, their numbers, -1 if there are fewer; of equal peaks the lower number comes first.
        positions: (c, k, 2) int64, row and column of the peak in the map.
    """

    count: Tensor
    broken: Tensor
    mean: Tensor
    std: Tensor
    minimum: Tensor
    maximum: Tensor
    quantiles: Tensor
    peaks: Tensor
    photos: Tensor
    positions: Tensor


COLUMNS = tuple(column.name for column in fields(PhotoStatistics))


@dataclass(frozen=True, eq=False)
class Evidence(Mapping[str, PhotoStatistics]):
    """What photos do to the layers of a network: a mapping from a layer's path to its `PhotoStatistics`.

    Attributes:
        statistics: by path, in the order of the request.
        about: in JSON terms: `spec`, the request; `seen` and `lost`, photos that went through the network and photos
            that could not be read, the first of them in `refused`; `names` of the strongest, by number; `sheets`, the
            files by path; `tile`, the side of a tile in pixels; `rows`, the channels of a sheet; `thumbnails`, see
            `crops.thumbnails`, which older stores lack.
        sheets: the files with the crops and thumbnails; none if they were left out.
    """

    statistics: Mapping[str, PhotoStatistics]
    about: Mapping[str, Any]
    sheets: Mapping[str, bytes]

    def __getitem__(self, path: str) -> PhotoStatistics:
        if path not in self.statistics:
            raise LayerNotFound(f"there is no evidence on {path!r}; the nearest layers are: {nearest(path, self)}")
        return self.statistics[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def __repr__(self) -> str:
        return f"Evidence({self.about['seen']:,} photos, {len(self)} layers of {self.about['spec']['model']})"

    @property
    def digest(self) -> str:
        """The name of this result in a store."""
        return digest_of(self.about["spec"])

    def files(self) -> dict[str, bytes]:
        """Return all of it as files, by name."""
        tensors = {f"{path}/{name}": getattr(self[path], name).contiguous() for path in self for name in COLUMNS}
        about = (json.dumps(self.about, indent=1, sort_keys=True) + "\n").encode()
        return {STATISTICS: safetensors.torch.save(tensors), ABOUT: about, **self.sheets}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Evidence:
        """Return the result that `files` wrote; the sheets may be left out."""
        about, tensors = json.loads(files[ABOUT]), safetensors.torch.load(files[STATISTICS])
        statistics = {
            path: PhotoStatistics(*(tensors[f"{path}/{name}"] for name in COLUMNS)) for path in about["spec"]["layers"]
        }
        return cls(statistics, about, {name: files[name] for name in files if name not in (ABOUT, STATISTICS)})


def load_evidence(store: Store, digest: str, sheets: bool = True) -> Evidence:
    """Return a result from a store; the sheets are much of it, and may be left out.

    Raises:
        EntryNotFound: the store has no such entry. StoreRefused: it is damaged.
    """
    manifest = store.manifest("evidence", digest)
    names = [name for name in manifest["files"] if sheets or name in (ABOUT, STATISTICS)]
    return Evidence.from_files({name: store.get("evidence", digest, name, manifest) for name in names})


def layer_statistics(photo_pass: PhotoPass, partial: Partial) -> Iterator[PhotoStatistics]:
    """Yield the statistics of each layer of a pass."""
    sketch, top = partial.sketch, partial.top_photos
    unseen = sketch.counted == 0
    moments = (sketch.mean, sketch.deviation, sketch.lowest, sketch.highest)
    columns = (
        sketch.counted,
        sketch.broken,
        *(moment.masked_fill(unseen, torch.nan) for moment in moments),
        torch.stack([sketch.quantile(share) for share in SHARES], 1),
        top.peaks,
        top.photos,
        top.positions,
    )
    for pieces in zip(*(torch.split(column, photo_pass.channels) for column in columns), strict=True):
        yield PhotoStatistics(*(piece.clone() for piece in pieces))
