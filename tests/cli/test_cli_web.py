"""The commands `serve` and `export`: what they print, refuse and need."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from starlette.testclient import TestClient

from cli_runner import Run, command_line
from phosphene.cli import web
from phosphene.storage.store import open_store
from phosphene.training.history import History
from phosphene.web import server
from phosphene.web.server import listening


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command line in a folder that holds an empty store."""
    open_store(tmp_path / "store", create=True)
    return command_line(monkeypatch, capsys, tmp_path, "")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[TestClient]:
    """Have `serve` hand its application over instead of running it."""
    clients: list[TestClient] = []

    def serve(app: Any, at: socket.socket, ready: Callable[[], None]) -> None:
        clients.append(TestClient(app, f"http://127.0.0.1:{at.getsockname()[1]}"))
        ready()

    monkeypatch.setattr(server, "serve", serve)
    return clients


def test_serve_says_where_the_page_is(run: Run, served: list[TestClient]) -> None:
    ran = run("serve", "store", "--port", 0)
    assert ran.code == 0
    assert ran.out.startswith("http://127.0.0.1:")
    assert ran.out.endswith("/\n")
    assert ran.err == ""
    assert served[0].get("/healthz").json() == {"status": "ok"}
    assert served[0].get("/").status_code == 200
    assert served[0].get("/", headers={"Host": "evil.example"}).status_code == 421


def test_serve_warns_where_others_can_see_the_page(run: Run, served: list[TestClient]) -> None:
    ran = run("serve", "store", "--port", 0, "--host", "0.0.0.0", "--quiet")
    assert ran.code == 0
    assert ran.out.startswith("http://127.0.0.1:")
    assert "anyone on the network can see the store and use this machine; --token TEXT lets only those in" in ran.err
    assert served[0].get("/healthz", headers={"Host": "192.168.0.7"}).status_code == 200
    assert served[0].get("/healthz", headers={"Host": socket.gethostname()}).status_code == 200
    assert served[0].get("/healthz", headers={"Host": "evil.example"}).status_code == 421


def test_serve_with_a_token_shows_nothing_without(run: Run, served: list[TestClient]) -> None:
    ran = run("serve", "store", "--port", 0, "--token", "a b&c")
    assert ran.out.endswith("/?token=a%20b%26c\n")
    assert served[0].get("/index.html").status_code == 403
    assert served[0].get(ran.out.strip()).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "nowhere"), "nowhere cannot be read: No such file or directory"),
        (("serve", "empty"), "empty holds no store and no record of a training"),
        (("serve", "store", "--port", "70000"), "a port is a number from 0 to 65535, not 70000"),
        (("serve", "store", "--port", "web"), "Invalid value for '--port'"),
        (("serve", "store", "--port", "0", "--token", " "), "the token is empty"),
        (("serve", "store", "--port", "0", "--device", "cuda:99"), "the device 'cuda:99' cannot be used"),
        (("serve", "store", "--port", "0", "--labels", "x"), "--labels is for the network that --model names"),
        (("serve", "store", "--port", "0", "--input-size", "9"), "--input-size is for the network that --model names"),
        (("serve", "store", "--port", "0", "--model", "no/such"), "no/such"),
        (("serve", "store", "--host", "192.0.2.1"), "nothing can listen at 192.0.2.1"),
        (("serve", "damaged"), "store.json is damaged"),
        (("serve", "newer"), "has format 99"),
        (("export", "nowhere", "--out", "site"), "nowhere cannot be read: No such file or directory"),
        (("export", "empty", "--out", "site"), "empty holds no store and no record of a training"),
        (("export", "store", "--out", "file.txt"), "file.txt is a file, so no folder can be made there"),
        (("export", "store", "--out", "file.txt/site"), "site cannot be written"),
        (("export", "store", "--out", "full"), "full"),
        (("export", "store"), "--out"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run: Run, arguments: tuple[str, ...], message: str) -> None:
    for name, content in (("empty", None), ("damaged", "{"), ("newer", json.dumps({"format": 99}))):
        Path(name).mkdir()
        if content:
            Path(name, "store.json").write_text(content)
    Path("file.txt").write_text("mine")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    ran = run(*arguments)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""
    assert not Path("site").exists()
    assert [path.name for path in Path("full").iterdir()] == ["mine.txt"]


def test_serve_refuses_a_port_that_is_taken(run: Run) -> None:
    with closing(listening("127.0.0.1", 0)) as at:
        ran = run("serve", "store", "--port", at.getsockname()[1])
    assert (ran.code, ran.out) == (2, "")
    assert "is taken; give another --port, or --port 0 to pick a free one" in ran.err


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Hide packages, and forget the page's modules, which may have imported them."""
    for name in [module for module in sys.modules if module.startswith(("phosphene.web.", "phosphene.cli.", *missing))]:
        monkeypatch.delitem(sys.modules, name)
        package, _, rest = name.partition("phosphene.")[2].partition(".")
        if package in ("web", "cli") and "." not in rest:
            monkeypatch.delattr(sys.modules[f"phosphene.{package}"], rest)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_without_the_extra_serve_says_its_install_line(run: Run, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    without(monkeypatch, missing)
    ran = run("serve", "store", "--port", 0)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"phosphene: {missing} is not installed; install it with: pip install 'phosphene[web]'\n"


def test_export_needs_no_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "uvicorn", "starlette", "anyio")
    ran = run("export", "store", "--out", "site")
    assert (ran.code, ran.out) == (0, "site/index.html\n")


def test_export_writes_the_first_page_and_says_where(run: Run, shown_bars: list[str]) -> None:
    ran = run("export", "store", "--out", "site")
    assert (ran.code, ran.out) == (0, "site/index.html\n")
    assert Path("site/index.html").read_text().startswith("<!DOCTYPE html>")
    again = run("export", "store", "--out", "other", "--json", "--quiet")
    assert shown_bars == ["export"]  # of the first alone: the second is quiet
    printed = json.loads(again.out)
    assert printed["files"] == ["other/index.html"]
    written = {path.name for path in Path("other").rglob("*") if path.is_file()} - {"made-by-phosphene.txt"}
    assert printed["written"] == len(written)


def test_trainings_in_folders_of_one_name_have_addresses_of_their_own(tmp_path: Path) -> None:
    histories = [History(tmp_path / name, {"model": "net"}) for name in ("a/run 1", "b/run 1", "c/run 1", "other")]
    assert [run.name for run in web.trainings(histories)] == ["run~201", "run~201~2", "run~201~3", "other"]


@pytest.mark.parametrize(
    ("host", "printed"), [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1")]
)
def test_the_address_that_is_printed_opens_the_page(host: str, printed: str) -> None:
    with closing(listening(host, 0)) as at:
        assert web.address_of(host, at, None) == f"http://{printed}:{at.getsockname()[1]}/"
        assert web.is_loopback(at) is (host != "0.0.0.0")


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_address_of_ipv6_is_printed_in_brackets(host: str) -> None:
    with closing(listening(host, 0)) as at:
        assert web.address_of(host, at, "x") == f"http://[::1]:{at.getsockname()[1]}/?token=x"


def test_serve_as_a_process_ends_with_0(tmp_path: Path) -> None:
    open_store(tmp_path / "store", create=True)
    command = [sys.executable, "-m", "phosphene", "serve", str(tmp_path / "store"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as on:
        assert on.stdout is not None
        port = int(on.stdout.readline().strip().strip("/").rpartition(":")[2])
        with urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert answer.read() == b'{"status":"ok"}'
        on.send_signal(signal.SIGINT)
        rest, errors = on.communicate(timeout=30)
    assert (on.returncode, rest, errors) == (0, "", "")
