"""Links are relative, and text is escaped."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from phosphene.web.templating import link, render_template


def test_links_are_relative_wherever_the_process_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert link("index.html", "index.html") == "index.html"
    assert link("static/page.css", "atlas/1/a~2Fb/7.html") == "../../../static/page.css"
    assert link("atlas/1/a~2Fb/8.html?x=1#y", "atlas/1/a~2Fb/7.html") == "8.html?x=1#y"
    assert link("runs/a b/index.html", "index.html") == "runs/a%20b/index.html"


def test_text_is_escaped_and_links_start_at_the_page() -> None:
    text = render_template("error.html", "a/b/error.html", live=True, title="<b>", sentence="1 < 2 & 3").decode()
    assert "<h1>&lt;b&gt;</h1>\n<p>1 &lt; 2 &amp; 3</p>" in text
    assert '<a href="../../index.html">To the first page</a>' in text
    assert '<script src="../../static/live.js" type="module"></script>' in text
    assert "live.js" not in render_template("error.html", "error.html", live=False, title="", sentence="").decode()


def test_a_variable_that_a_template_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'sentence' is undefined"):
        render_template("error.html", "error.html", live=False, title="")
