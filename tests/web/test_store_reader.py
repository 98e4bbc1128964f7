"""What the page reads of stores: found by the beginning of a digest, kept for a while, within the store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fake_training_record import record_of
from page_store import FIRST, SECOND, filled
from phosphene.errors import EntryNotFound, InvalidRequest, StoreRefused, WeightsRefused
from phosphene.storage.store import Store, open_store
from phosphene.web.store_reader import StoreReader, stores_and_records_at


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return filled(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.url, tmp_path / "copy"))


def atlas_of(reader: StoreReader) -> str:
    return reader.atlases()[0].atlas_id


def test_an_atlas_and_its_layers_are_what_the_store_says(store: Store) -> None:
    reader = StoreReader([store])
    (digest,) = store.done("atlases")
    ((atlas_id, manifest),) = reader.atlases()
    assert atlas_id == digest[:12]
    assert manifest == reader.atlas(atlas_id) == store.manifest("atlases", digest)
    assert reader.store_of(atlas_id) is store
    row = manifest["layers"][1]
    assert reader.row(atlas_id, SECOND) == row
    assert reader.layer(atlas_id, SECOND) == store.manifest("layers", row["digest"])
    assert reader.photos(atlas_id) == 4


def test_a_filter_comes_with_its_verdict_and_its_job(store: Store) -> None:
    reader = StoreReader([store])
    atlas_id = atlas_of(reader)
    for n in range(8):
        saved = reader.filter(atlas_id, SECOND, n)
        assert saved.verdict == reader.verdicts(atlas_id, SECOND)[n]
        assert saved.verdict.channel == saved.picture["channel"] == n
        assert saved.job["channels"] == ([0, 1, 2, 3] if n < 4 else [4, 5, 6, 7])
        content = reader.job_file(atlas_id, SECOND, n, f"filter_{n}.png")
        assert content == store.read(f"jobs/{saved.picture['job']}/filter_{n}.png")


def test_evidence_has_the_statistics_and_none_of_the_crops(store: Store) -> None:
    reader = StoreReader([store])
    evidence = reader.evidence(atlas_of(reader))
    assert evidence is not None
    assert list(evidence) == [FIRST, SECOND]
    assert evidence.sheets == {}
    assert reader.evidence(atlas_of(reader)) is evidence
    name = evidence.about["sheets"][FIRST][0]
    assert reader.evidence_file(evidence.digest[:12], name) == store.read(f"evidence/{evidence.digest}/{name}")


def test_without_photos_there_is_no_evidence(tmp_path: Path) -> None:
    reader = StoreReader([filled(tmp_path, names=(), layers=FIRST)])
    assert reader.evidence(atlas_of(reader)) is None
    assert reader.photos(atlas_of(reader)) is None


def test_what_there_is_not_is_said_in_a_sentence(store: Store) -> None:
    reader = StoreReader([store])
    atlas_id = atlas_of(reader)
    for message, read in (
        ("there is no atlas 'abc' here; there are: " + atlas_id, lambda: reader.atlas("abc")),
        ("no layer 'conv'; the nearest are: .0, .2", lambda: reader.layer(atlas_id, "conv")),
        ("no picture of filter 9 of .2; it has 8", lambda: reader.filter(atlas_id, SECOND, 9)),
        ("manifest.json is not in its entry", lambda: reader.file(atlas_id, SECOND, "manifest.json")),
        ("no atlas here rests on evidence 'abc'", lambda: reader.evidence_file("abc", "crops_0_0.webp")),
    ):
        with pytest.raises(EntryNotFound, match=message.replace("[", r"\[")):
            read()


def test_a_store_that_grows_shows_it_after_a_while(store: Store, tmp_path: Path) -> None:
    growing = open_store(tmp_path / "growing", create=True)
    reader, slow = StoreReader([growing], seconds=0), StoreReader([growing], seconds=60)
    assert reader.atlases() == slow.atlases() == []
    shutil.copytree(store.url, growing.url, dirs_exist_ok=True)
    assert len(reader.atlases()) == 1
    assert slow.atlases() == []


def test_jobs_that_belong_to_no_atlas_are_counted(store: Store, copy: Path) -> None:
    assert StoreReader([store]).unfinished() == 0
    jobs = sorted((copy / "jobs").iterdir())
    shutil.copytree(jobs[0], copy / "jobs" / ("0" * 32))
    grown = StoreReader([open_store(copy)], seconds=0)
    assert grown.unfinished() == 1
    shutil.rmtree(copy / "atlases")
    assert grown.unfinished() == StoreReader([store, open_store(copy)]).unfinished() == len(jobs) + 1
    assert StoreReader([]).unfinished() == 0


def test_channels_are_known_from_any_atlas_of_the_same_weights(store: Store) -> None:
    reader = StoreReader([store])
    atlas_id = atlas_of(reader)
    assert [reader.channels(atlas_id, path) for path in (FIRST, SECOND, "elsewhere")] == [6, 8, None]


def test_a_manifest_that_is_replaced_is_read_again_and_another_is_not_parsed_again(copy: Path) -> None:
    reader = StoreReader([open_store(copy)], seconds=0)
    atlas_id = atlas_of(reader)
    before, mark = reader.layer(atlas_id, FIRST), reader.etag(atlas_id, FIRST)
    assert reader.layer(atlas_id, FIRST) is before
    digest = reader.row(atlas_id, FIRST)["digest"]
    facts = {name: value for name, value in before.items() if name not in ("files", "check")}
    files = {name: reader.file(atlas_id, FIRST, name) for name in before["files"]}
    reader.stores[0].put("layers", digest, files, {**facts, "remark": "changed"})
    assert reader.layer(atlas_id, FIRST)["remark"] == "changed"
    assert reader.etag(atlas_id, FIRST)[0] == mark[0] == reader.etag(atlas_id)[0]
    assert reader.etag(atlas_id, FIRST)[1] != mark[1]


def test_what_is_damaged_is_said_and_not_shown(copy: Path) -> None:
    reader = StoreReader([open_store(copy)], seconds=0)
    atlas_id = atlas_of(reader)
    sheet = copy / "layers" / reader.row(atlas_id, FIRST)["digest"] / "sheet.webp"
    sheet.write_bytes(b"x" + sheet.read_bytes()[1:])
    with pytest.raises(StoreRefused, match=r"sheet\.webp is damaged: its bytes have changed; delete"):
        reader.file(atlas_id, FIRST, "sheet.webp")
    manifest = sheet.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace("224", "225").replace("24", "25"))
    with pytest.raises(StoreRefused, match="is damaged: its bytes have changed"):
        reader.layer(atlas_id, FIRST)


def test_the_first_of_two_stores_with_one_atlas_shows_it(store: Store, copy: Path) -> None:
    reader = StoreReader([store, open_store(copy)])
    assert len(reader.atlases()) == 1
    assert reader.store_of(atlas_of(reader)) == store


def test_a_place_is_a_store_a_training_or_a_folder_of_them(store: Store, tmp_path: Path) -> None:
    kernels = {"conv": [torch.zeros(2, 3, 3, 3)]}
    folder = tmp_path / "both"
    (folder / "empty").mkdir(parents=True)
    record_of(folder / "run", kernels)
    shutil.copytree(store.url, folder / "an atlas")
    assert stores_and_records_at(store.url)[0] == [store]
    both = stores_and_records_at(folder)
    assert [store.url for store in both.stores] == [str(folder / "an atlas")]
    assert [history.folder for history in both.histories] == [folder / "run"]
    alone = stores_and_records_at(folder / "run")
    assert (alone.stores, [history.folder for history in alone.histories], alone.damaged) == ([], [folder / "run"], [])


def test_what_cannot_be_read_leaves_the_rest_and_is_told(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.url, tmp_path / "an atlas")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer/store.json").write_text(json.dumps({"format": 99}))
    record_of(tmp_path / "run", {"conv": [torch.zeros(2, 3, 3, 3)]})
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(manifest.read_text()[:-9])
    readable = stores_and_records_at(tmp_path)
    assert ([store.url for store in readable.stores], readable.histories) == ([str(tmp_path / "an atlas")], [])
    newer, cut = readable.damaged
    assert "has format 99" in newer
    assert "manifest.json is damaged" in cut
    with pytest.raises(WeightsRefused, match="is damaged"):
        stores_and_records_at(tmp_path / "run")


def test_another_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no store and no record of a training"):
        stores_and_records_at(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be read: No such file or directory; give a store"):
        stores_and_records_at(tmp_path / "nowhere")
    (tmp_path / "store.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreRefused, match="has format 99"):
        stores_and_records_at(tmp_path)
