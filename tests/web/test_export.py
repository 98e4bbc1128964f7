"""The export: the whole site as files, into a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_terminal import counts
from page_store import FIRST, filled
from phosphene.errors import InvalidRequest, OutputRefused, StoreRefused
from phosphene.progress import Bar
from phosphene.storage.atomic import write_file
from phosphene.storage.store import open_store
from phosphene.web import export as module
from phosphene.web.export import MARKER, export
from phosphene.web.site import Content, Site
from phosphene.web.store_reader import StoreReader
from tiny_atlas import contents


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(StoreReader([filled(tmp_path_factory.mktemp("export"), layers=FIRST)]), [])


def test_all_of_the_site_is_written_and_the_index_last(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bars: list[Bar]
) -> None:
    written: list[str] = []

    def write(path: Path, content: bytes) -> Path:
        written.append(str(path.relative_to(tmp_path / "out")))
        return write_file(path, content)

    monkeypatch.setattr(module, "write_file", write)
    paths = list(site.paths())
    count = export(site, tmp_path / "out")
    assert count == len(paths)
    # all but the index
    assert counts(bars) == [("export", "files", count - 1, count - 1)]
    assert (written[0], written[-1]) == (MARKER, "index.html")
    files = contents(tmp_path / "out")
    assert files.pop(MARKER).startswith(b"The files here were written by `phosphene export`")
    assert files == {path: site.get(path).body for path in paths}


def test_it_may_be_written_over_and_beside_hidden_files(site: Site, tmp_path: Path) -> None:
    (tmp_path / ".nojekyll").touch()
    export(site, tmp_path)
    before = contents(tmp_path)
    (tmp_path / "index.html").unlink()  # as if it had been cut off
    export(site, tmp_path)
    assert contents(tmp_path) == before


def test_what_the_earlier_export_had_and_this_one_has_not_is_taken_away(site: Site, tmp_path: Path) -> None:
    out, more = tmp_path / "out", filled(tmp_path)
    export(Site(StoreReader([more]), []), out)
    mine, far = out / "atlas/notes.txt", tmp_path / "far"
    mine.write_text("mine")
    far.mkdir()
    (far / "7.html").write_text("mine")
    (out / MARKER).write_text((out / MARKER).read_text() + "../far/7.html\natlas/../../far/7.html\nruns/far/7.html\n")
    (out / "runs").mkdir()
    (out / "runs/far").symlink_to(far)
    export(site, out)
    (out / "runs/far").unlink()
    (out / "runs").rmdir()
    assert mine.read_text() == (far / "7.html").read_text() == "mine"
    mine.unlink()
    files = contents(out)
    export(site, tmp_path / "new")
    assert files == contents(tmp_path / "new")
    folders = {path.relative_to(out) for path in out.rglob("*") if path.is_dir()}
    assert folders == {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*") if path.is_dir()}


def test_an_export_that_was_cut_off_is_tidied_by_the_next(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = Site(StoreReader([filled(tmp_path)]), [])
    damaged = Site(whole.reader, [])
    last = [path for path in whole.paths() if path.endswith(".html")][-2]

    def get(path: str) -> Content:
        if path == last:
            raise StoreRefused("damaged")
        return whole.get(path)

    monkeypatch.setattr(damaged, "get", get)
    with pytest.raises(StoreRefused):
        export(damaged, out)
    export(site, out)
    assert set(contents(out)) == {MARKER, *site.paths()}


def test_a_folder_with_other_things_is_refused_before_anything_is_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(InvalidRequest, match=r"holds other files, such as index\.html; give the export a folder"):
        export(site, tmp_path)
    assert contents(tmp_path) == {"index.html": b"mine"}
    export(site, tmp_path / "out")
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(InvalidRequest, match=r"such as thesis\.tex"):
        export(site, tmp_path / "out")


def test_a_file_is_no_folder(site: Site, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputRefused, match="is a file, so no folder can be made there"):
        export(site, tmp_path / "out")


def test_damage_leaves_no_index(tmp_path: Path) -> None:
    store = filled(tmp_path, layers=FIRST, names=())
    for file in Path(store.url).glob("jobs/*/filter_3.png"):
        file.write_bytes(b"x")
    with pytest.raises(StoreRefused, match=r"filter_3\.png is damaged"):
        export(Site(StoreReader([open_store(store.url)]), []), tmp_path / "out")
    assert not (tmp_path / "out/index.html").exists()
