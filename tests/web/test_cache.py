"""What was read of late is kept, within bounds, and read again in time."""

from __future__ import annotations

import threading

import pytest

from phosphene.web import cache as shelf
from phosphene.web.cache import SizedCache


def test_it_reads_once_until_the_time_is_over_and_then_with_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(shelf, "monotonic", lambda: now[0])
    kept, given = SizedCache[str](10, seconds=3), list[str | None]()

    def read(before: str | None) -> tuple[str, int]:
        given.append(before)
        return f"value {len(given)}", 1

    assert [kept.get("a", read), kept.get("a", read)] == ["value 1", "value 1"]
    now[0] = 102.9
    assert kept.get("a", read) == "value 1"
    now[0] = 103.0
    assert kept.get("a", read) == "value 2"
    assert given == [None, "value 1"]


def test_what_was_asked_for_longest_ago_goes_first_and_one_thing_always_stays() -> None:
    kept = SizedCache[str](10)
    for key in "abc":
        kept.get(key, lambda _: ("", 4))
    assert list(kept.entries) == ["b", "c"]
    kept.get("b", lambda _: ("", 4))
    kept.get("d", lambda _: ("", 4))
    assert list(kept.entries) == ["b", "d"]
    kept.get("large", lambda _: ("", 99))
    assert list(kept.entries) == ["large"]


def test_a_failed_reading_keeps_nothing() -> None:
    kept = SizedCache[str](10)
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda _: (str(1 / 0), 1))
    assert kept.get("a", lambda before: (str(before), 1)) == "None"


def test_threads_share_one() -> None:
    kept, wrong = SizedCache[int](50), list[int]()

    def use(start: int) -> None:
        for number in range(2000):
            key = (start + number) % 90
            if kept.get(key, lambda _, key=key: (key, 1)) != key:  # type: ignore[misc]
                wrong.append(key)

    threads = [threading.Thread(target=use, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(kept.entries) == 50
