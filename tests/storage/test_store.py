"""A store holds complete entries only, and says in a sentence what is damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dropping_server
from dropping_server import contents, filled, reference, refusal
from phosphene.errors import EntryNotFound, InvalidRequest, OutputRefused, StoreRefused
from phosphene.storage import filesystem
from phosphene.storage.filesystem import LocalFolder
from phosphene.storage.store import Store, digest_of, open_store


@pytest.fixture(autouse=True)
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(filesystem, "WAITS", (0.0, 0.0, 0.0))
    dropping_server.reset()
    yield
    dropping_server.reset()


@pytest.fixture(params=["folder", "file://", "memory://", "dropping://", "bucket://"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind: str = request.param
    return {"folder": str(tmp_path / "atlas"), "file://": f"file://{tmp_path}/atlas"}.get(kind, f"{kind}host/atlas")


def test_an_entry_is_read_as_it_was_written(url: str) -> None:
    store = open_store(url, create=True)
    assert store.done("jobs") == set()
    assert not store.has("jobs", "ab")
    manifest = {"scores": [1.0, 0.1, 1e-300], "dead": None, "name": "ü\udcff", "by_number": {10: "a", 9: "b"}}
    store.put("jobs", "ab", {"a.png": b"\x00\xff", "b": b""}, manifest)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in (("a.png", b"\x00\xff"), ("b", b""))}
    files = {"a.png": {"bytes": 2, "sha256": hashes["a.png"]}, "b": {"bytes": 0, "sha256": hashes["b"]}}
    expected = {**manifest, "by_number": {"10": "a", "9": "b"}, "files": files}
    for reader in (store, open_store(url), pickle.loads(pickle.dumps(store))):
        assert reader.manifest("jobs", "ab") == expected
        assert reader.get("jobs", "ab", "a.png") == reader.read("jobs/ab/a.png") == b"\x00\xff"
        assert reader.get("jobs", "ab", "b") == b""
        assert reader.done("jobs") == {"ab"}
        assert reader.done("layers") == set()
        assert [reader.has(*entry) for entry in (("jobs", "ab"), ("jobs", "a"), ("layers", "ab"))] == [
            True,
            False,
            False,
        ]
    assert sorted(contents(store)) == ["jobs/ab/a.png", "jobs/ab/b", "jobs/ab/manifest.json", "store.json"]
    assert json.loads(contents(store)["store.json"]) == {"format": 1}


def test_a_manifest_at_hand_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = open_store(tmp_path, create=True), list[str]()
    store.put("jobs", "ab", {"a": b"1", "b": b"22"}, {})
    manifest = store.manifest("jobs", "ab")
    original = LocalFolder.read

    def recorded(self: LocalFolder, name: str) -> bytes:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(LocalFolder, "read", recorded)
    assert [store.get("jobs", "ab", name, manifest) for name in "ab"] == [b"1", b"22"]
    assert read == ["jobs/ab/a", "jobs/ab/b"]
    read.clear()
    assert store.get("jobs", "ab", "a") == b"1"
    assert read == ["jobs/ab/manifest.json", "jobs/ab/a"]


def test_a_manifest_at_hand_that_is_out_of_date_is_read_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, create=True)
    store.put("jobs", "ab", {"a": b"1", "b": b"2"}, {})
    old = store.manifest("jobs", "ab")
    store.put("jobs", "ab", {"a": b"11", "c": b"3"}, {})
    assert store.get("jobs", "ab", "a", old) == b"11"
    assert store.get("jobs", "ab", "c", old) == b"3"
    with pytest.raises(EntryNotFound, match=r"jobs/ab/b is not in its entry, which holds a, c$"):
        store.get("jobs", "ab", "b", old)
    store.write("jobs/ab/a", b"1x")
    with pytest.raises(StoreRefused, match=r"jobs/ab/a is damaged: its bytes have changed"):
        store.get("jobs", "ab", "a", old)


def test_an_entry_without_its_manifest_is_not_done_and_put_removes_all_other_files(url: str) -> None:
    store = open_store(url, create=True)
    store.fail("jobs", "ab", "out of memory")
    store.fail("jobs", "cd", "no such layer")
    for name in ("a.png", "partial.safetensors"):
        store.write(f"jobs/ab/{name}", b"half")
    store.filesystem.write("jobs/ab/.a.png.77.part", b"ha")
    assert store.done("jobs") == set()
    assert not store.has("jobs", "ab")
    assert store.failures("jobs") == {"ab": "out of memory", "cd": "no such layer"}
    with pytest.raises(EntryNotFound, match=r"atlas/jobs/ab/manifest.json is not there; run the atlas"):
        store.get("jobs", "ab", "a.png")
    store.put("jobs", "ab", {"a.png": b"whole"}, {})
    store.fail("jobs", "ab", "failed in a slower driver")
    assert store.failures("jobs") == {"cd": "no such layer"}
    assert sorted(contents(store)) == [
        "jobs/ab/a.png",
        "jobs/ab/manifest.json",
        "jobs/cd/error.json",
        "store.json",
    ]
    store.write("jobs/ab/error.json", store.read("jobs/cd/error.json"))  # in the same instant
    assert store.failures("jobs") == {"cd": "no such layer"}
    with pytest.raises(EntryNotFound, match=r"jobs/ab/b.png is not in its entry, which holds a.png$"):
        store.get("jobs", "ab", "b.png")


def test_every_place_holds_the_same_bytes_and_a_second_put_replaces(url: str, tmp_path: Path) -> None:
    store = open_store(url, create=True)
    expected = reference(tmp_path)
    store.put("jobs", "00ab", {"other.png": b"of before"}, {"layer": "conv0"})
    assert filled(store) == expected
    assert filled(open_store(url, create=True)) == expected


def test_until_a_replacement_is_complete_there_is_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, create=True)
    filled(store)
    finished = []
    write = LocalFolder.write

    def recorded(self: LocalFolder, name: str, content: bytes) -> None:
        finished.append(store.has("jobs", "00ab"))
        write(self, name, content)

    monkeypatch.setattr(LocalFolder, "write", recorded)
    store.put("jobs", "00ab", {"a.png": b"1"}, {})
    store.put("jobs", "00ab", {"a.png": b"1"}, {})
    assert finished == [False, False, True, True]  # the same once more takes nothing away


def test_a_partial_result_stays_until_the_manifest_is_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url, create=True)
    store.write("evidence/ab/partial.safetensors", b"hours of work")
    write = type(store.filesystem).write

    def failing(self: Any, name: str, content: bytes) -> None:
        if name.endswith("manifest.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(type(store.filesystem), "write", failing)
        with pytest.raises(OutputRefused, match="No space left on device"):
            store.put("evidence", "ab", {"statistics.safetensors": b"1"}, {})
    assert store.read("evidence/ab/partial.safetensors") == b"hours of work"
    store.put("evidence", "ab", {"statistics.safetensors": b"1"}, {})
    assert not store.filesystem.has("evidence/ab/partial.safetensors")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "jobs/../../a", "jobs//a", "jobs/./a", "a/", ".a"])
def test_names_stay_inside_the_store(url: str, name: str) -> None:
    store = open_store(url, create=True)
    before = contents(store)
    for attempt in (
        lambda: store.read(name),
        lambda: store.write(name, b""),
        lambda: store.put("jobs", "ab", {"a": b"", name: b""}, {}),
        lambda: store.has("jobs", name),
    ):
        with pytest.raises(InvalidRequest, match="is no name for a file in a store; use letters, digits and"):
            attempt()
    assert contents(store) == before


def test_an_entry_has_no_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'a/b.png' is no name for a file"):
        open_store(tmp_path, create=True).put("jobs", "ab", {"a/b.png": b""}, {})


@pytest.mark.parametrize("name", ["a\\b", "C:a", "a\0b", "a\nb", "a*"])
def test_names_that_not_every_disk_takes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no name for a file"):
        open_store(tmp_path, create=True).write(f"jobs/{name}", b"")


def test_kinds_are_those_of_the_layout(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^a store has no 'job'; it has jobs, layers, evidence, atlases$"):
        open_store(tmp_path, create=True).done("job")


# Damage


def json_of(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_every_single_flipped_bit_and_every_truncation_is_found() -> None:
    store = open_store("memory://atlas", create=True)
    files = {"a.png": b"\x89PNG", "b.png": b""}
    store.put("jobs", "ab", files, {"scores": [1.5, -2.0], "dead": False})
    intact = (b"\x89PNG", store.manifest("jobs", "ab"))
    for name in ("a.png", "manifest.json"):
        content = contents(store)[f"jobs/ab/{name}"]
        flipped = [bytearray(content) for _ in range(8 * len(content))]
        for bit, copy in enumerate(flipped):
            copy[bit // 8] ^= 1 << bit % 8
        for changed in [*map(bytes, flipped), *(content[:end] for end in range(len(content))), content + b"\0"]:
            store.filesystem.write(f"jobs/ab/{name}", changed)
            message = refusal(lambda: (store.get("jobs", "ab", "a.png"), store.manifest("jobs", "ab")), intact)
            harmless = json_of(changed) == json_of(content) is not None  # white space, or the newline at the end
            assert harmless or f"atlas/jobs/ab/{name} is damaged: it" in message
            assert harmless or message.endswith("atlas/jobs/ab and run the same command again")
        store.filesystem.write(f"jobs/ab/{name}", content)
    store.filesystem.remove("jobs/ab/a.png")
    with pytest.raises(StoreRefused, match=r"jobs/ab/a.png is damaged: it is gone; delete .*jobs/ab and run the same"):
        store.get("jobs", "ab", "a.png")
    store.put("jobs", "ab", files, {"scores": [1.5, -2.0], "dead": False})
    assert store.get("jobs", "ab", "a.png") == b"\x89PNG"


def test_the_message_says_how_much_of_a_file_is_there(tmp_path: Path) -> None:
    store = open_store(tmp_path, create=True)
    filled(store)
    picture = tmp_path / "jobs/00ab/filter_0.png"
    picture.write_bytes(picture.read_bytes()[:400])
    with pytest.raises(StoreRefused) as caught:
        store.get("jobs", "00ab", "filter_0.png")
    assert str(caught.value) == (
        f"{picture} is damaged: it has 400 bytes of 1000; delete {picture.parent} and run the same command again"
    )


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": "new"}', b'{"form": 1}', b"\xff"])
def test_a_damaged_store_file_is_one_sentence(url: str, content: bytes) -> None:
    open_store(url, create=True).write("store.json", content)
    with pytest.raises(StoreRefused, match=r'atlas/store.json is damaged; put \{"format": 1\} into it$'):
        open_store(url)


def test_a_newer_format_is_refused_and_left_alone(url: str) -> None:
    open_store(url, create=True).write("store.json", b'{"format": 2, "new": "thing"}')
    for create in (False, True):
        with pytest.raises(
            StoreRefused, match="atlas has format 2, and this phosphene knows formats up to 1; update it"
        ):
            open_store(url, create=create)
    assert Store(url).read("store.json") == b'{"format": 2, "new": "thing"}'


def test_what_is_no_store_is_refused_and_left_alone(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreRefused, match=r"atlas is no store; give the one that an atlas was written to$"):
        open_store(url)
    Store(url).write("holidays/photo.jpg", b"1")
    for create, message in ((False, "is no store"), (True, "holds other files; give the store a folder of its own$")):
        with pytest.raises(StoreRefused, match=message):
            open_store(url, create=create)
    assert list(contents(Store(url))) == ["holidays/photo.jpg"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreRefused, match=r"file cannot be read: Not a directory; mend that, or give another place$"):
        open_store(tmp_path / "file")


def test_a_store_that_was_killed_while_it_began_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / ".store.json.77.part").write_bytes(b'{"for')
    assert open_store(tmp_path, create=True).done("jobs") == set()
    assert (tmp_path / "store.json").exists()


def test_a_relative_folder_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("atlas", create=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert filled(store) == reference(tmp_path / "c")
    assert (tmp_path / "atlas/jobs/00ab/manifest.json").exists()
    with pytest.raises(EntryNotFound, match=r"^atlas/jobs/x/manifest.json is not there"):
        store.manifest("jobs", "x")


# Identity


def test_a_digest_is_that_of_canonical_json() -> None:
    spec = {"b": [1, 0.5, None, True], "a": {"y": "ü", "x": 1e-7}}
    text = '{"a":{"x":1e-07,"y":"\\u00fc"},"b":[1,0.5,null,true]}'
    assert digest_of(spec) == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert digest_of({"a": {"x": 1e-7, "y": "ü"}, "b": (1, 0.5, None, True)}) == digest_of(spec)
    assert digest_of({"seed": 1}) != digest_of({"seed": "1"}) != digest_of({"seed": 2})
    assert digest_of({"a": {10: "a", 9: "b"}}) == digest_of({"a": {"9": "b", "10": "a"}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"1", object()])
def test_what_json_does_not_hold_has_no_digest_and_is_not_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="give numbers, text and lists of them"):
        digest_of({"score": value})
    store = open_store(tmp_path, create=True)
    with pytest.raises(InvalidRequest, match="give numbers, text and lists of them"):
        store.put("jobs", "ab", {"a": b"1"}, {"score": value})
    assert sorted(contents(store)) == ["store.json"]
