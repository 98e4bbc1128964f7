"""No entry is corrupt, whatever happens to the disk, the connection and the writers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import dropping_server
from dropping_server import ENTRIES, DroppingServer, contents, drop, filled, reference, refusal
from phosphene.errors import ExtraMissing, InvalidRequest, OutputRefused, StoreRefused
from phosphene.storage import filesystem
from phosphene.storage.filesystem import FileSystem
from phosphene.storage.store import Store, open_store

fork = multiprocessing.get_context("fork")
DIGESTS = [f"{number:02d}" for number in range(40)]


@pytest.fixture(autouse=True)
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(filesystem, "WAITS", (0.0, 0.0, 0.0))
    dropping_server.reset()
    yield
    dropping_server.reset()


# Connections that drop


@pytest.mark.parametrize("scheme", ["dropping", "bucket"])
@pytest.mark.parametrize("how", ["before", "during", "after"])
def test_a_connection_that_drops_once_is_not_noticed(
    scheme: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference(tmp_path)
    counts: dict[str, int] = {}

    def every_second(action: str) -> str | None:
        counts[action] = counts.get(action, 0) + 1
        return how if counts[action] % 2 else None

    drop(every_second)
    store = open_store(f"{scheme}://host/atlas", create=True)
    filled(store)
    assert store.done("jobs") == set(ENTRIES)
    assert {name: store.get("jobs", "00ab", name) for name in ENTRIES["00ab"]} == ENTRIES["00ab"]
    parts = {name for name in contents(store) if name.endswith(".part")}  # a dropped removal may leave some,
    assert {name: content for name, content in contents(store).items() if name not in parts} == expected
    drop(lambda action: None)
    assert {name for name in filled(store) if name.startswith("jobs")} == set(expected) - {"store.json"}  # until a put


@pytest.mark.parametrize("scheme", ["dropping", "bucket"])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_drops_no_entry_is_corrupt_and_resuming_completes_the_store(
    scheme: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference(tmp_path)
    store = open_store(f"{scheme}://host/atlas", create=True)
    chance = random.Random(seed)

    def often(action: str) -> str | None:
        return chance.choice(["before", "during", "after"]) if chance.random() < 0.6 else None

    refused = 0
    for _ in range(2):
        drop(often)
        for digest, files in ENTRIES.items():
            message = refusal(partial(store.put, "jobs", digest, files, {"layer": "conv1"}))
            start = rf"{scheme}://host/atlas/jobs/{digest} cannot be written: .*(dropped|bytes arrived).*; mend that,.*"
            assert not message or re.fullmatch(f"{start} run the same command again: what is finished is kept", message)
            refused += bool(message)
        drop(lambda action: None)
        for digest in store.done("jobs"):
            assert {name: store.get("jobs", digest, name) for name in ENTRIES[digest]} == ENTRIES[digest]
    assert refused
    filled(store)
    assert contents(store) == expected


def once(action: str, fault: str | Exception) -> Callable[[str], str | Exception | None]:
    """Return a fault of the first such action."""
    faults = [fault]
    return lambda current: faults.pop() if faults and current == action else None


@pytest.mark.parametrize("fault", [once("put", "silently"), once("move", FileNotFoundError("the unfinished file"))])
def test_a_file_that_arrived_in_half_or_was_swept_away_by_another_writer_is_sent_again(
    fault: Callable[[str], str | Exception | None],
) -> None:
    store = open_store("dropping://host/atlas", create=True)
    DroppingServer.actions.clear()
    drop(fault)
    store.write("jobs/ab/a.png", b"1234")
    assert contents(store) == {"store.json": store.read("store.json"), "jobs/ab/a.png": b"1234"}
    assert DroppingServer.actions.count("put") == 2


def test_a_write_that_is_given_up_leaves_the_old_file_and_nothing_else() -> None:
    store = open_store("dropping://host/atlas", create=True)
    store.write("jobs/ab/a.png", b"old")
    drop(lambda action: "before" if action == "move" else None)
    with pytest.raises(OutputRefused, match="dropped before"):
        store.write("jobs/ab/a.png", b"new")
    assert contents(store) == {"store.json": store.read("store.json"), "jobs/ab/a.png": b"old"}


def test_a_listing_that_drops_is_no_empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("dropping", "bucket"):
        store = open_store(f"{scheme}://host/atlas", create=True)
        filled(store)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", lambda *_, **__: fail(ConnectionResetError("dropped")))
        patch.setattr(MemoryFileSystem, "find", lambda *_, **__: fail(ConnectionResetError("dropped")))
        for scheme in ("dropping", "bucket"):
            store = Store(f"{scheme}://host/atlas")
            for listing in (partial(store.done, "jobs"), partial(store.has, "jobs", "00ab")):
                with pytest.raises(StoreRefused, match="atlas/jobs cannot be read: dropped; mend that"):
                    listing()


def fail(error: Exception) -> None:
    raise error


def always(error: Exception, _: str) -> Exception:
    return error


def test_an_error_that_no_retry_helps_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("bucket://host/atlas", create=True)
    for error, reason in (
        (PermissionError(errno.EACCES, "Access Denied"), "Access Denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ):
        drop(partial(always, error))
        DroppingServer.actions.clear()
        with pytest.raises(OutputRefused, match=f"atlas/jobs/a cannot be written: {reason}; mend that"):
            store.write("jobs/a", b"1")
        assert DroppingServer.actions == ["put"]
    drop(lambda action: "before")
    DroppingServer.actions.clear()
    with pytest.raises(OutputRefused, match="dropped before"):
        store.write("jobs/a", b"1")
    assert DroppingServer.actions == ["put"] * 4
    drop(lambda action: "before" if action == "put" else None)
    with pytest.raises(OutputRefused, match=r"^bucket://host/other cannot be written: dropped before; mend that"):
        open_store("bucket://host/other", create=True)


# Disks that are full or take nothing


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_keeps_what_is_finished_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    store = open_store(small_disk / "atlas", create=True)
    entries = {f"{number:02d}": {"a.png": bytes([number]) * 20_000, "b.png": b"1"} for number in range(9)}
    with pytest.raises(OutputRefused) as caught:
        filled(store, entries)
    finished = store.done("jobs")
    failed = f"{len(finished):02d}"
    assert str(caught.value) == (
        f"{small_disk}/atlas/jobs/{failed} cannot be written: No space left on device; mend that, or give another "
        "place, and run the same command again: what is finished is kept"
    )
    assert finished == {f"{number:02d}" for number in range(len(finished))}
    assert 2 <= len(finished) <= 6
    for digest in finished:
        assert store.get("jobs", digest, "a.png") == entries[digest]["a.png"]
    assert not any(name.endswith(".part") for name in contents(store))
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    filled(store, entries)
    assert store.done("jobs") == set(entries)
    assert contents(store) == filled(open_store(small_disk / "other", create=True), entries)


def test_a_disk_that_became_read_only_is_read_but_not_written(small_disk: Path) -> None:
    filled(open_store(small_disk / "atlas", create=True))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = open_store(small_disk / "atlas")
    assert store.get("jobs", "00ab", "filter_1.png") == ENTRIES["00ab"]["filter_1.png"]
    for attempt in (
        lambda: store.put("jobs", "99ab", {}, {}),
        lambda: store.put("jobs", "00ab", {}, {}),
        lambda: store.fail("jobs", "99ab", "why"),
        lambda: open_store(small_disk / "atlas", create=True),
        lambda: open_store(small_disk / "new", create=True),
    ):
        with pytest.raises(OutputRefused, match="cannot be written: Read-only file system; mend that, or give another"):
            attempt()
    assert contents(store) == filled(open_store(f"memory://{small_disk}", create=True))


# Credentials and packages


@pytest.mark.parametrize("user", ["anna:p%40ss@", "anna:p@ss@", "AKIA7:p/a:ss@", "token-77@"])
def test_no_message_shows_credentials(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["p%40ss", "p@ss", "p/a:ss", "77", "anna", "AKIA7"]
    url = f"dropping://{user}host/atlas"
    store = Store(url)
    password = user.partition(":")[2].rstrip("@")
    fault = ConnectionError(f"no answer from {url}/jobs for the password {password} {unquote(password)}")
    drop(lambda action: fault)
    for attempt in (
        lambda: open_store(url),
        lambda: store.write("jobs/a", b""),
        lambda: store.read("jobs/a"),
        lambda: store.failures("jobs"),
        lambda: open_store(url.replace("dropping", "s3")),
        lambda: open_store(url.replace("dropping", "unheard")),
        lambda: open_store(f"simplecache::{url}"),
        lambda: open_store(f"{url}?signature=p@ss"),
    ):
        with pytest.raises((StoreRefused, OutputRefused, InvalidRequest, ExtraMissing)) as caught:
            attempt()
        text = "".join(traceback.format_exception(caught.value, limit=0)) + repr(store)
        assert "://host/atlas" in str(caught.value)
        assert not [word for word in words if word in text], text
    assert repr(store) == "Store(dropping://host/atlas)"


def test_a_url_whose_package_is_not_installed_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, package in {"s3": "s3fs", "gs": "gcsfs", "sftp": "paramiko", "smb": "smbprotocol"}.items():
        missing = {"smb": "smbclient"}.get(scheme, package)
        monkeypatch.setitem(__import__("sys").modules, missing, None)  # importing it now fails
        with pytest.raises(ExtraMissing) as caught:
            open_store(f"{scheme}://bucket/atlas")
        assert str(caught.value) == (
            f"{scheme}://bucket/atlas needs a package that is not installed; install it with: pip install {package}"
        )


def test_what_is_no_url_and_no_folder_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"^unheard://x is no place for a store: Protocol not known: unheard; give"
    ):
        open_store("unheard://x")
    with pytest.raises(InvalidRequest, match="an empty name is no place for a store"):
        open_store("")


# Several writers, and writers that are killed


def files_of_writer(number: int, length: int = 6) -> dict[str, bytes]:
    """Return the files that a writer puts into an entry."""
    return {f"filter_{index}.png": bytes([number]) * (1000 + number) for index in range(length)}


def put_entries(folder: Path, number: int, start: Any) -> None:
    store = Store(str(folder))
    for digest in DIGESTS:
        start.wait()
        store.put("jobs", digest, files_of_writer(number, 2 + number), {"by": number})


@pytest.mark.parametrize("numbers", [(1, 1), (1, 2, 3)])
def test_writers_of_the_same_entry_at_once_do_no_damage(
    tmp_path: Path, numbers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: time.sleep(0.0005))  # a busy disk would take longer
    store = open_store(tmp_path, create=True)
    start = fork.Barrier(len(numbers))
    writers = [fork.Process(target=put_entries, args=(tmp_path, number, start), daemon=True) for number in numbers]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for digest in store.done("jobs") if len(set(numbers)) == 1 else ():  # the same bytes: never any damage
            assert store.get("jobs", digest, "filter_0.png") == files_of_writer(1)["filter_0.png"]
    assert [writer.exitcode for writer in writers] == [0] * len(numbers)
    for digest in DIGESTS:
        manifest = store.manifest("jobs", digest)
        expected = files_of_writer(manifest["by"], 2 + manifest["by"])
        assert {name: store.get("jobs", digest, name) for name in manifest["files"]} == expected
        assert set(os.listdir(tmp_path / "jobs" / digest)) == {*expected, "manifest.json"}


def take_lock(files: FileSystem) -> None:
    with files.lock("jobs/ab"):
        pass


def test_a_process_begun_while_an_entry_is_written_keeps_nobody_waiting(tmp_path: Path) -> None:
    files = open_store(tmp_path, create=True).filesystem
    with files.lock("jobs/ab"):
        child = fork.Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        waiting = fork.Process(target=take_lock, args=(files,), daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.exitcode is None
    later = fork.Process(target=take_lock, args=(files,), daemon=True)
    later.start()
    for process in (waiting, later):
        process.join(20)
        assert process.exitcode == 0
    child.kill()
    child.join()


def fill_store(folder: Path) -> None:
    filled(Store(str(folder)))
    os._exit(0)


def test_a_writer_killed_at_any_moment_leaves_whole_entries_and_its_work_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: time.sleep(0.0005))
    expected = reference(tmp_path)
    start = time.perf_counter()
    filled(open_store(tmp_path / "measured", create=True))
    duration = time.perf_counter() - start
    chance, unfinished = random.Random(0), 0
    for attempt in range(20):
        store = open_store(tmp_path / f"{attempt}", create=True)
        driver = fork.Process(target=fill_store, args=(tmp_path / f"{attempt}",))
        driver.start()
        while not (tmp_path / f"{attempt}/jobs").exists() and driver.is_alive():
            pass
        time.sleep(chance.uniform(0, duration))
        driver.kill()
        driver.join()
        finished = store.done("jobs")
        unfinished += finished != set(ENTRIES)
        for digest in finished:
            assert {name: store.get("jobs", digest, name) for name in ENTRIES[digest]} == ENTRIES[digest]
            assert not any(name.endswith(".part") for name in contents(store) if name.startswith(f"jobs/{digest}"))
        filled(store, {digest: files for digest, files in ENTRIES.items() if digest not in finished})
        assert contents(store) == expected
    assert unfinished >= 5


def test_a_writer_whose_unfinished_file_was_swept_away_writes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, create=True)
    fsync = os.fsync
    swept: list[Path] = []

    def sweep_once(handle: int) -> None:
        fsync(handle)
        for part in () if swept else list(tmp_path.rglob("*.part")):
            part.unlink()
            swept.append(part)

    monkeypatch.setattr(os, "fsync", sweep_once)
    store.write("jobs/ab/a.png", b"1")
    assert len(swept) == 1
    assert store.read("jobs/ab/a.png") == b"1"
