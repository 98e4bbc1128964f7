"""What an atlas writes beside its jobs: strips and kernels, and what becomes of a store that was made without them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene.atlases import entries
from phosphene.atlases.entries import SavedPicture, kernels_of, layer_verdicts, saved_pictures, strip_of
from phosphene.atlases.job_film import JobFilm
from phosphene.atlases.render_job import SCORES_FILE, render_job
from phosphene.atlases.report import report
from phosphene.atlases.run import run
from phosphene.atlases.verdicts import Verdict
from phosphene.images.encode import METADATA
from phosphene.network.loading import load
from phosphene.storage.store import Store, open_store
from tiny_atlas import InProcessRunner, contents, tiny, tiny_atlas, tiny_model


def entries_of(store: Store) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return digest and manifest of each layer's entry, by path."""
    manifests = {digest: store.manifest("layers", digest) for digest in store.done("layers")}
    return {manifest["layer"]["path"]: (digest, manifest) for digest, manifest in manifests.items()}


def weight_colour(share: float) -> list[int]:
    """Return the colour of a weight that is such a share of its filter's largest: orange above 0, blue below."""
    end = (179, 88, 6) if share > 0 else (33, 102, 172)
    return [round(255 + abs(share) * (level - 255)) for level in end]


def test_kernels_png_holds_every_weight_of_the_filters_that_are_drawn(tmp_path: Path) -> None:
    net = tiny()
    run(tiny_atlas(load(net, input_size=24), channels=[1, 4, 5]), tmp_path, InProcessRunner())
    store = open_store(tmp_path)
    for path, colours in ((".0", "rgb"), (".2", "signed")):
        digest, manifest = entries_of(store)[path]
        weights = cast(Tensor, net[int(path[1:])].weight).detach().double()
        about = manifest["kernels"]
        with Image.open(io.BytesIO(store.get("layers", digest, "kernels.png", manifest))) as image:
            metadata = json.loads(image.text[METADATA])  # type: ignore[attr-defined]
            pixels = np.asarray(image.convert("RGB")).tolist()
        assert (about["file"], about["tile"], about["colours"]) == ("kernels.png", [3, 3], colours)
        assert (metadata["layer"], metadata["channels"]) == (path, [1, 4, 5])
        columns = 1 if colours == "rgb" else 6
        assert (about["columns"], about["of"]) == (columns, weights.shape[1])
        assert (len(pixels), len(pixels[0])) == (3 * 3, columns * 3)
        for row, number in enumerate((1, 4, 5)):
            largest = max(abs(float(weight)) for weight in weights[number].flatten())
            norms = [sum(float(weight) ** 2 for weight in kernel.flatten()) for kernel in weights[number]]
            order = sorted(range(len(norms)), key=lambda channel: -norms[channel])
            assert about["scale"][row] == largest
            for down in range(3):
                for right in range(3):
                    shares = [float(weights[number, channel, down, right]) / largest for channel in range(len(norms))]
                    line = pixels[row * 3 + down]
                    if colours == "rgb":
                        assert about["inputs"][row] == [0, 1, 2]
                        assert line[right] == [round((share + 1) / 2 * 255) for share in shares]
                    else:
                        assert about["inputs"][row] == order
                        drawn = [line[column * 3 + right] for column in range(6)]
                        assert drawn == [weight_colour(shares[channel]) for channel in order]


def test_a_layer_without_kernels_has_none_in_its_entry(tmp_path: Path) -> None:
    run(tiny_atlas(tiny_model(), layers=".1"), tmp_path, InProcessRunner())
    ((digest, manifest),) = entries_of(open_store(tmp_path)).values()
    assert "kernels" not in manifest
    assert {*manifest["files"]} == {"sheet.webp", "strip.webp"}
    assert {path.name for path in (tmp_path / "layers" / digest).iterdir()} == {*manifest["files"], "manifest.json"}


def test_kernels_that_filters_share_or_that_are_not_sound_are_not_shown() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 6, 3, groups=6))
    model = load(shared, input_size=24)
    assert kernels_of(model, model.find(".1"), range(6)) is None
    depthwise = kernels_of(model, model.find(".2"), range(6))
    assert depthwise is not None
    assert (depthwise.facts["columns"], depthwise.facts["of"], depthwise.facts["tile"]) == (1, 1, [3, 3])
    with torch.no_grad():
        cast(Tensor, shared[2].weight)[0, 0, 0, 0] = torch.nan
    assert kernels_of(model, model.find(".2"), range(6)) is None


# --- strips -----------------------------------------------------------------------------------------------------------


def grey_pictures(count: int) -> list[SavedPicture]:
    """Return pictures of filters 100, 101 …, the k-th all of level 8 · k."""
    return [
        SavedPicture(Image.new("RGB", (64, 64), (8 * number,) * 3), "", {"channel": 100 + number})
        for number in range(count)
    ]


def judged_as(*names: str) -> list[Verdict]:
    return [Verdict(100 + number, "", name, 0, 1, 1, 1, 1, 1) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["vivid", "dead", "weak", "vivid", "unstable"], [0, 3]),
        (["weak", "dead", "weak"], [0, 1, 2]),
        ([], list(range(5))),  # not judged
        (["dead", "vivid"] * 13, [1, 3, 5, 7, 9, 11, 15, 17, 19, 21, 23, 25]),
    ],
)
def test_a_strip_shows_vivid_filters(names: list[str], expected: list[int]) -> None:
    made = strip_of(grey_pictures(len(names) or 5), judged_as(*names))
    assert made.facts["channels"] == [100 + number for number in expected]
    pixels = np.asarray(Image.open(io.BytesIO(made.content)).convert("L")).astype(int)
    assert np.abs(pixels[32, 32::64] - 8 * np.array(expected)).max() <= 3


def test_the_entry_of_the_atlas_repeats_the_strips(tmp_path: Path) -> None:
    summary = run(tiny_atlas(tiny_model(), channels=range(6)), tmp_path, InProcessRunner())
    store = open_store(tmp_path)
    assert summary.atlas is not None
    rows = store.manifest("atlases", summary.atlas)["layers"]
    layers = entries_of(store)
    assert [row["strip"] for row in rows] == [layers[row["path"]][1]["strip"] for row in rows]
    for row in rows:
        verdicts = {entry["channel"]: entry["verdict"] for entry in layers[row["path"]][1]["verdicts"]}
        vivid = [channel for channel, verdict in verdicts.items() if verdict == "vivid"]
        assert row["strip"]["channels"] == (vivid or list(range(6)))
        content = store.get("layers", row["digest"], row["strip"]["file"])
        assert Image.open(io.BytesIO(content)).size == (16 * row["strip"]["columns"], 16)


def test_a_filter_with_facets_and_an_opposite_stays_one_filter(tmp_path: Path) -> None:
    plan = tiny_atlas(tiny_model(), layers=".0", facets=2, opposite=True)
    summary = run(plan, tmp_path / "new", InProcessRunner())
    plain = run(tiny_atlas(tiny_model(), layers=".0"), tmp_path / "plain", InProcessRunner())
    assert summary.verdicts == plain.verdicts
    entry, plain_entry = (entries_of(open_store(tmp_path / name))[".0"][1] for name in ("new", "plain"))
    for name in ("verdicts", "sheets", "strip", "kernels", "thresholds"):
        assert entry[name] == plain_entry[name], name
    jobs = {job.digest: job for job in plan.jobs}
    for number, row in enumerate(entry["pictures"]):
        assert [facet["file"] for facet in row["facets"]] == [f"filter_{number}_facet_1.png"]
        assert (row["opposite"]["file"], row["opposite"]["channel"]) == (f"filter_{number}_opposite.png", number)
        assert (jobs[row["job"]].opposite, jobs[row["opposite"]["job"]].opposite) == (False, True)
        assert row["opposite"]["score"] < row["score"]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_job_s_manifest_is_read_once_for_all_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_atlas(tiny_model())
    run(plan, tmp_path, InProcessRunner())
    store, read = open_store(tmp_path), list[str]()
    plain = Store.manifest

    def noted(self: Store, kind: str, digest: str) -> dict[str, Any]:
        read.append(digest)
        return plain(self, kind, digest)

    monkeypatch.setattr(Store, "manifest", noted)
    pictures = list(saved_pictures(store, plan.jobs[0]))
    assert read == [plan.jobs[0].digest]
    for picture, channel in zip(pictures, range(4), strict=True):
        with Image.open(tmp_path / f"jobs/{plan.jobs[0].digest}/filter_{channel}.png") as image:
            assert np.array_equal(np.asarray(picture.image), np.asarray(image))


# --- older stores -----------------------------------------------------------------------------------------------------


def test_an_older_store_gets_new_entries_and_renders_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_atlas(tiny_model())
    with monkeypatch.context() as patch:
        patch.setattr(entries, "ENTRY_VERSION", 1)
        patch.setattr(JobFilm, "sheet", lambda *_: None)
        old = run(plan, tmp_path / "s", InProcessRunner())
    before = contents(tmp_path / "s")
    assert not any(name.endswith("film.webp") for name in before)
    again = InProcessRunner()
    new = run(plan, tmp_path / "s", again)
    assert (again.done, new.rendered, new.verdicts) == ([], 0, old.verdicts)
    assert new.atlas not in (old.atlas, None)
    after = contents(tmp_path / "s")
    assert before.items() <= after.items()  # what is there stays
    run(plan, tmp_path / "whole", InProcessRunner())
    fresh = contents(tmp_path / "whole")
    added = {name for name in after if name not in before}
    assert {name: after[name] for name in added} == {
        name: content for name, content in fresh.items() if name.startswith(("layers/", "atlases/"))
    }
    html, table = report(open_store(tmp_path / "s"), new.atlas)
    assert (html, table) == report(open_store(tmp_path / "whole"))


def test_jobs_of_earlier_versions_have_no_plain_pictures(tmp_path: Path) -> None:
    plan = tiny_atlas(tiny_model())
    store = open_store(tmp_path, create=True)
    for job in plan.jobs:
        files, manifest = render_job(plan.model, job)
        figures = safetensors.torch.load(files[SCORES_FILE])
        figures["plain"].fill_(True)
        kept = {name: tensor for name, tensor in figures.items() if name != "plain" or job.channels[0]}
        store.put("jobs", job.digest, {**files, SCORES_FILE: safetensors.torch.save(kept)}, manifest)
    layer = plan.layers[0]
    judged, remark = layer_verdicts(store, plan, layer, {job.digest for job in plan.jobs}, None)
    assert remark is None
    assert [verdict.channel for verdict in judged if verdict.verdict == "plain"] == [4, 5]  # of the second job
