"""The page, end to end in a real browser: what a visitor does, and what there is to see then.

What can be browsed is tried twice, from a server and from plain files.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from browser import (
    CHELSEA,
    FILTERS,
    LAYERS,
    SIDE,
    Served,
    check_access,
    chromium,
    drop,
    exported,
    look,
    place,
    served,
    visiting,
)
from phosphene.atlases.verdicts import Verdict
from phosphene.web.store_reader import StoreReader, stores_and_records_at

__all__ = ["chromium", "exported", "place", "served"]
NETWORK = "builtin/efficientnet-lite0"


@pytest.fixture(scope="module")
def reader(place: Path) -> StoreReader:
    """Return what the store says, which the page is to show."""
    return StoreReader(stores_and_records_at(place)[0])


def atlas_at(base: str, reader: StoreReader) -> str:
    """Return the address of the atlas."""
    return f"{base}atlas/{reader.atlases()[0].atlas_id}/"


def verdicts(reader: StoreReader, path: str) -> list[Verdict]:
    return reader.verdicts(reader.atlases()[0].atlas_id, path)


def shown_filters(page: Page) -> list[int]:
    """Return the filters that a layer view shows, in their order."""
    links = page.locator("#grid li:not([hidden]) a")
    return [int(link[1:]) for link in links.evaluate_all("links => links.map((one) => one.id)")]


def tab_to(page: Page, what: Callable[[Locator], bool]) -> None:
    """Press the tab key until something is reached."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if what(page.locator(":focus")):
            return
    raise AssertionError("the tab key does not lead there")


def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Wait for something that the browser does not show."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def walk_by_mouse(page: Page, base: str, reader: StoreReader) -> None:
    """Go from the index to a filter and back again."""
    path, atlas = LAYERS[0], atlas_at(base, reader)
    page.goto(f"{base}index.html")
    page.get_by_role("link", name=NETWORK).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(NETWORK)
    assert page.url == f"{atlas}index.html"
    expect(page.locator("ol.layers h3")).to_have_text(list(LAYERS))
    page.get_by_role("link", name=path, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(path)
    assert shown_filters(page) == list(range(FILTERS))
    page.locator("#f3").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Filter 3 of {path}")
    assert page.url == f"{atlas}{path}/3.html"
    page.get_by_role("link", name="filter 4").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Filter 4 of {path}")
    for heading in (f"Filter 3 of {path}", path, NETWORK):
        page.go_back()
        expect(page.get_by_role("heading", level=1)).to_have_text(heading)


def see_filter(page: Page, base: str, reader: StoreReader) -> None:
    """See all there is of a filter, by its address alone."""
    page.goto(f"{atlas_at(base, reader)}{LAYERS[1]}/5.html")
    verdict = verdicts(reader, LAYERS[1])[5]
    picture = page.locator(".portrait img")
    expect(picture).to_be_visible()
    until(lambda: picture.evaluate("one => one.complete && one.naturalWidth") == SIDE)
    expect(page.get_by_role("heading", name="Verdict")).to_contain_text(verdict.verdict)
    assert verdict.excitation is not None
    expect(page.locator(".figures")).to_contain_text(f"{verdict.excitation:.3g}")
    moments = page.locator(".film .tile")
    assert moments.count() >= 5
    expect(moments.last).to_have_attribute("aria-label", "after 16 steps")
    photos = page.locator(".photos > li")
    assert photos.count() == 9
    assert page.locator(".photos rect.frame").count() == 9
    expect(photos.first).to_contain_text(re.compile(r"part \d+\.png"))
    assert page.locator(".kernels .tile").count() == 12
    expect(page.locator("pre.command").first).to_contain_text(f"phosphene filters {NETWORK} {LAYERS[1]} --channels 5")


def most_excited(verdict: Verdict) -> float:
    """Sort the strongest first, what has no such figure last."""
    return math.inf if verdict.excitation is None else -verdict.excitation


def sort_and_filter(page: Page, base: str, reader: StoreReader) -> None:
    """Sort and filter a layer; what is chosen stands in the address, and goes with the back button."""
    path = LAYERS[0]
    layer, judged = f"{atlas_at(base, reader)}{path}/index.html", verdicts(reader, path)
    by_excitation = [verdict.channel for verdict in sorted(judged, key=most_excited)]
    by_score = [verdict.channel for verdict in sorted(judged, key=lambda verdict: -verdict.score)]
    vivid = {verdict.channel for verdict in judged if verdict.verdict == "vivid"}
    assert by_excitation != by_score != list(range(FILTERS))
    assert 0 < len(vivid) < FILTERS
    page.goto(layer)
    page.get_by_label("Sort by").select_option("excitation")
    assert shown_filters(page) == by_excitation
    page.get_by_role("checkbox", name="vivid").uncheck()
    assert shown_filters(page) == [channel for channel in by_excitation if channel not in vivid]
    expect(page.locator("#shown")).to_have_text(f"{FILTERS - len(vivid)} of {FILTERS}")
    address = page.url
    assert "sort=excitation" in address and "verdict=" in address  # noqa: PT018
    page.get_by_label("Sort by").select_option("score")
    assert shown_filters(page) == [channel for channel in by_score if channel not in vivid]
    page.go_back()
    assert shown_filters(page) == [channel for channel in by_excitation if channel not in vivid]
    page.go_back()
    assert shown_filters(page) == by_excitation
    page.goto(address)  # as if somebody had been sent it
    assert shown_filters(page) == [channel for channel in by_excitation if channel not in vivid]
    middle = judged[by_excitation[5]].excitation
    page.goto(f"{layer}?sort=excitation&least={middle}")
    assert shown_filters(page) == by_excitation[:6]
    page.get_by_label("the other way round").check()
    assert shown_filters(page) == by_excitation[:6][::-1]
    page.goto(f"{layer}?turned=1")
    assert shown_filters(page) == list(range(FILTERS))[::-1]


def leaf_through(page: Page, base: str, reader: StoreReader) -> None:
    """Go from filter to filter in the order of the grid, and back to it; from elsewhere by number."""
    path = LAYERS[0]
    layer, judged = f"{atlas_at(base, reader)}{path}/index.html", verdicts(reader, path)
    chosen = [verdict.channel for verdict in sorted(judged, key=most_excited) if verdict.verdict != "vivid"]
    assert len(chosen) > 2
    assert chosen != sorted(chosen)
    page.goto(layer)
    page.get_by_label("Sort by").select_option("excitation")
    page.get_by_role("checkbox", name="vivid").uncheck()
    page.locator(f"#f{chosen[1]}").click()
    around = page.locator("#around")
    expect(around.locator("a")).to_have_text(
        [re.compile(rf"filter {chosen[0]}$"), f"2 of {len(chosen)} in the grid", re.compile(rf"^filter {chosen[2]} ")]
    )
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Filter {chosen[2]} of {path}")
    around.get_by_role("link", name="in the grid").click()
    expect(page.locator(":focus")).to_have_id(f"f{chosen[2]}")  # the script has arranged the grid by then
    assert shown_filters(page) == chosen
    page.locator(f"#f{chosen[0]}").click()
    expect(around.locator("[rel=prev]")).to_have_count(0)
    page.goto(layer)
    page.locator("#f1").click()
    expect(around.locator("a")).to_have_text([re.compile("filter 0$"), re.compile("^filter 2 ")])


def walk_by_keyboard(page: Page, base: str, reader: StoreReader) -> None:
    """Go from the index to a filter, and on from there, by keys alone."""
    page.goto(f"{base}index.html")
    tab_to(page, lambda element: element.inner_text() == NETWORK)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(NETWORK)
    tab_to(page, lambda element: element.inner_text() == LAYERS[0])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(LAYERS[0])
    tab_to(page, lambda element: element.get_attribute("id") == "f0")
    across = page.locator("#grid").evaluate("one => getComputedStyle(one).gridTemplateColumns.split(' ').length")
    moves = {"ArrowRight": 1, "End": FILTERS - 1, "Home": 0, "ArrowDown": min(across, FILTERS - 1)}
    for key, reached in moves.items():
        if key == "ArrowDown" and across >= FILTERS:
            continue
        page.keyboard.press(key)
        expect(page.locator(":focus")).to_have_id(f"f{reached}")
    at = int((page.locator(":focus").get_attribute("id") or "")[1:])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Filter {at} of {LAYERS[0]}")
    page.wait_for_load_state("domcontentloaded")  # the script that knows the keys has run then
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Filter {at + 1} of {LAYERS[0]}")
    page.wait_for_load_state("domcontentloaded")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Filter {at} of {LAYERS[0]}")


def see_training(page: Page, base: str, reader: StoreReader) -> None:
    """Go through the epochs of a training run by slider, list, address, back button, and by itself."""
    page.goto(f"{base}index.html")
    page.get_by_role("link", name="flowers").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Training run flowers")
    expect(page.get_by_text("Vanishing: the gradient of conv1.weight")).to_be_visible()
    kernels, slider = page.locator("[data-shows=kernels] img"), page.get_by_label("Epoch", exact=True)
    expect(kernels).to_have_attribute("src", re.compile("conv2/kernels_3.png$"))
    expect(page.locator("[data-metric]")).to_have_text(["0.7", "0.5"])
    slider.focus()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    expect(kernels).to_have_attribute("src", re.compile("conv2/kernels_1.png$"))
    expect(page.locator("[data-shows=filters] img")).to_have_attribute("src", re.compile("conv2/filters_1.png$"))
    expect(page.locator("[data-metric]")).to_have_text(["0.3", "1"])
    assert page.url.endswith("?layer=conv2&epoch=1")
    page.get_by_label("Layer").select_option("conv1")
    expect(page.locator("[data-shows=filters]")).to_be_hidden()
    expect(page.locator(".sizes tr:visible th[scope=row]")).to_have_text(["conv1.weight", "conv1.bias"])
    expect(page.get_by_role("row", name="conv1.weight").get_by_role("cell")).to_have_text(["0.5", "0.5", "0.167", "0"])
    page.go_back()
    expect(page.get_by_label("Layer")).to_have_value("conv2")
    expect(slider).to_have_value("1")
    page.go_back()  # both steps of the slider were one
    expect(slider).to_have_value("3")
    page.goto(f"{base}runs/flowers/index.html?layer=conv1&epoch=0")
    expect(kernels).to_have_attribute("src", re.compile("conv1/kernels_0.png$"))
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.get_by_role("button", name="Play")).to_be_visible()  # at the end
    expect(kernels).to_have_attribute("src", re.compile("conv1/kernels_3.png$"))
    assert page.url.endswith("?layer=conv1&epoch=3")


BROWSING = (walk_by_mouse, see_filter, sort_and_filter, leaf_through, walk_by_keyboard, see_training)
Visit = Callable[[Page, str, StoreReader], None]


@pytest.mark.parametrize("visit", BROWSING, ids=lambda visit: visit.__name__)
def test_a_visit(visit: Visit, chromium: Browser, served: Served, reader: StoreReader) -> None:
    with visiting(chromium, served.base) as page:
        visit(page, served.base, reader)


@pytest.mark.parametrize("visit", BROWSING, ids=lambda visit: visit.__name__)
def test_a_visit_to_plain_files(visit: Visit, chromium: Browser, exported: str, reader: StoreReader) -> None:
    with visiting(chromium, exported) as page:
        visit(page, exported, reader)


def test_a_visit_without_scripts(chromium: Browser, exported: str, reader: StoreReader) -> None:
    with visiting(chromium, exported, script=False) as page:
        walk_by_mouse(page, exported, reader)
        see_filter(page, exported, reader)
        page.goto(f"{exported}runs/flowers/index.html")
        expect(page.get_by_label("Epoch", exact=True)).to_be_hidden()  # it would do nothing
        page.get_by_text("Every picture, as links").click()
        links = page.locator("details[open] a")
        assert links.count() == 2 + 4 + 8  # two film strips, filters of one layer and kernels of two after four epochs
        links.last.click()
        assert page.url.endswith("runs/flowers/conv2/kernels_3.png")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("document.body.append(Object.assign(new Image(), { src: 'nothing.png' }))", "404 .*nothing.png"),
        ("document.body.append(Object.assign(new Image(), { src: 'http://localhost:9/' }))", "Content Security Policy"),
        ("document.body.setAttribute('onclick', 'alert()')", "Content Security Policy"),
        ("setTimeout(() => { throw new Error('oh') })", "oh"),
        ("document.body.append(document.createElement('iframe'), document.createElement('img'))", "image-alt"),
        ("location = 'http://localhost:9/'", "asked for http://localhost"),
    ],
)
def test_a_visit_that_something_is_wrong_with_fails(
    broken: str, message: str, chromium: Browser, served: Served
) -> None:
    def visit() -> None:
        with visiting(chromium, served.base) as page:
            page.goto(served.base)
            page.evaluate(broken)
            page.wait_for_timeout(200)
            if message == "image-alt":
                check_access(page)

    with pytest.raises(AssertionError, match=message):
        visit()


def views(base: str, reader: StoreReader) -> dict[str, str]:
    """Return the address of each view."""
    atlas = atlas_at(base, reader)
    return {
        "index": f"{base}index.html",
        "network": f"{atlas}index.html",
        "layer": f"{atlas}{LAYERS[1]}/index.html",
        "filter": f"{atlas}{LAYERS[1]}/5.html",
        "training": f"{base}runs/flowers/index.html",
    }


def test_every_view_is_for_all(chromium: Browser, served: Served, reader: StoreReader) -> None:
    with visiting(chromium, served.base) as page:
        for name, address in views(served.base, reader).items():
            page.goto(address, wait_until="networkidle")
            look(page, name)


def test_every_view_in_the_dark_on_a_telephone(chromium: Browser, served: Served, reader: StoreReader) -> None:
    with visiting(chromium, served.base, width=390, dark=True) as page:
        atlas = atlas_at(served.base, reader)
        for address in (*views(served.base, reader).values(), f"{atlas}photo.html"):
            page.goto(address)
            check_access(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, address


def test_a_photo_that_is_dropped(chromium: Browser, served: Served, reader: StoreReader) -> None:
    with visiting(chromium, served.base) as page:
        page.goto(f"{atlas_at(served.base, reader)}index.html")
        page.get_by_role("link", name="Show it a photo of yours").click()
        expect(page.locator("#drop")).to_be_visible()  # the script is there that takes the photo
        drop(page, CHELSEA, "#drop")
        classes = page.locator("#classes label")
        expect(classes).to_have_count(5)
        expect(classes.first).to_contain_text("cat")
        heat = page.locator("#heat")
        until(lambda: heat.evaluate("one => one.complete && one.naturalWidth") > 100)
        filters = page.locator("#filters a")
        expect(filters.first).to_be_visible()
        until(lambda: page.locator("#sheet").evaluate("one => one.complete && one.naturalWidth") > 100)
        look(page, "photo")
        expect(page.locator("#layer option").first).to_have_text("the last one with a map (_bn1)")
        for select in ("#layer", "#channels"):  # without being asked for
            expect(page.locator(f"{select} optgroup option").get_by_text("_conv_stem", exact=True)).to_have_count(1)
            listed = page.locator(f"{select} option").all_inner_texts()
            assert len(listed) == len(set(listed))
        assert all(float(text) > 0 for text in page.locator("#filters b").all_inner_texts())
        assert filters.first.locator("span").count() == 2
        expect(filters.first.locator("span").last).to_have_text(re.compile(r"^filter \d+$"))
        for change in (
            lambda: page.locator("#method").select_option("layercam"),
            lambda: page.locator("#layer").select_option(LAYERS[1]),
            lambda: classes.nth(2).click(),
        ):
            before = heat.get_attribute("src") or ""
            change()
            expect(heat).not_to_have_attribute("src", before)
            expect(page.locator("#state")).to_have_text("")
        expect(heat).to_have_attribute("alt", re.compile(re.escape(classes.nth(2).locator("span").inner_text())))
        before = page.locator("#sheet").get_attribute("src") or ""
        page.locator("#channels").select_option(LAYERS[1])
        expect(page.locator("#sheet")).not_to_have_attribute("src", before)
        filters.first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"Filter \d+ of _blocks"))


def test_a_slider_blends_what_excites_a_filter_into_the_photo(
    chromium: Browser, served: Served, reader: StoreReader
) -> None:
    with visiting(chromium, served.base) as page:
        page.goto(f"{atlas_at(served.base, reader)}photo.html")
        page.locator("#cat").click()
        expect(page.locator("#filters a").first).to_be_visible()
        expect(page.locator("#state")).to_have_text("")
        strongest = page.locator("#filters a").first.locator("span").all_inner_texts()
        layer, number = strongest[0], strongest[1].removeprefix("filter ")
        assert (page.locator("#accented").input_value(), page.locator("#filter").input_value()) == (layer, number)
        page.get_by_role("button", name="Draw it in").click()
        after, slider, answer = (page.locator(selector) for selector in ("#after", "#amount", "#answer"))
        expect(page.locator("#blend")).to_be_visible(timeout=30_000)
        until(lambda: after.evaluate("one => one.complete && one.naturalWidth") == 337)
        expect(answer).to_have_text(re.compile(rf"^filter {number} of {layer}: "))
        full, start = responses(answer.inner_text())
        assert full > start
        look(page, "accentuated")
        slider.press("Home")
        expect(after).to_have_css("opacity", "0")
        assert responses(answer.inner_text()) == (start, start)
        for _ in range(30):
            slider.press("ArrowRight")
        expect(after).to_have_css("opacity", "0.3")
        expect(slider).to_have_attribute("aria-valuetext", re.compile(r"^30 percent, response "))
        assert start < responses(answer.inner_text())[0] < full
        page.locator("#filter").fill("")  # all that the layer sees
        page.get_by_role("button", name="Draw it in").click()
        expect(answer).to_have_text(re.compile(rf"^all that {layer} sees: .*, in your photo 1$"), timeout=30_000)
        page.locator("#cat").click()
        expect(page.locator("#blend")).to_be_hidden()  # it was drawn into the photo before


def responses(text: str) -> tuple[float, float]:
    """Return the response at the slider, and that to the photo, as the page tells them."""
    _, _, numbers = text.partition(": ")
    now, _, start = numbers.partition(", in your photo ")
    return float(now), float(start)


def test_a_photo_that_cannot_be_read_leaves_the_one_before(
    chromium: Browser, served: Served, reader: StoreReader, tmp_path: Path
) -> None:
    broken, empty = tmp_path / "bro<b>ken.png", tmp_path / "empty.png"
    broken.write_bytes(b"\x89PNG and nothing more")
    empty.write_bytes(b"")

    def visit() -> None:
        with visiting(chromium, served.base) as page:
            page.goto(f"{atlas_at(served.base, reader)}photo.html")
            state, heat, classes = (page.locator(selector) for selector in ("#state", "#heat", "#classes label"))
            expect(page.locator("#drop")).to_be_visible()  # till then the page does not know whether it takes photos
            page.locator("#file").set_input_files(empty)
            expect(state).to_have_text("The file is empty.")
            page.locator("#file").set_input_files(broken)
            expect(state).to_have_text(re.compile(r"^bro<b>ken.png was not read: the photo is no image .*BMP\.$"))
            expect(page.locator("#seen")).to_be_hidden()
            page.locator("#file").set_input_files(CHELSEA)
            expect(classes.first).to_contain_text("cat")
            expect(state).to_have_text("")
            classes.nth(1).click()
            expect(heat).to_have_attribute("alt", re.compile(re.escape(classes.nth(1).locator("span").inner_text())))
            page.locator("#file").set_input_files(broken)
            expect(state).to_have_text(re.compile("^bro<b>ken.png was not read: .*; this is still the one before.$"))
            expect(classes.nth(1).locator("input")).to_be_checked()
            before = heat.get_attribute("src") or ""
            page.locator("#method").select_option("layercam")
            expect(heat).not_to_have_attribute("src", before)
            expect(state).to_have_text("")
            page.locator("#file").set_input_files(empty)
            expect(state).to_have_text("empty.png was not read: the file is empty; this is still the one before.")

    with pytest.raises(AssertionError, match=r"400 http.*/photo"):  # which is all that is wrong
        visit()


def test_any_filter_of_any_layer(chromium: Browser, served: Served, reader: StoreReader) -> None:
    with visiting(chromium, served.base) as page:
        page.goto(f"{atlas_at(served.base, reader)}index.html")
        form = page.locator("#any")
        layer, state = form.get_by_label("layer"), form.get_by_role("status")
        layer.fill("_fc")
        form.get_by_role("button").click()
        expect(state).to_have_text(
            f"_fc is no layer with a map; phosphene layers {NETWORK} lists all, and phosphene filters {NETWORK} _fc "
            "--objective logit draws classes."
        )
        layer.fill("conv99")
        form.get_by_role("button").click()
        expect(state).to_have_text(
            f"There is no layer conv99; choose one of the list, or phosphene layers {NETWORK} lists all."
        )
        layer.fill("_conv_stem")
        expect(state).to_have_text("Conv2dStaticSamePadding, 32 filters: 0 to 31.")
        form.get_by_label("filter").fill("7")
        form.get_by_role("button").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Filter 7 of _conv_stem")


def test_no_layer_is_led_to_that_is_not_known(chromium: Browser, served: Served, reader: StoreReader) -> None:
    def visit() -> None:
        with visiting(chromium, served.base) as page:
            page.route(
                "**/layers.json", lambda route: route.fulfill(status=409, json={"error": "tinynet is not loaded"})
            )
            address = f"{atlas_at(served.base, reader)}index.html"
            page.goto(address)
            page.locator("#any").get_by_label("layer").fill("_conv_stem")
            page.locator("#any").get_by_role("button").click()
            expect(page.locator("#any").get_by_role("status")).to_have_text("tinynet is not loaded.")
            assert page.url == address

    with pytest.raises(AssertionError, match=r"409 http.*/layers.json"):
        visit()


def places_of_live_use(served: Served, reader: StoreReader) -> dict[str, str]:
    """Return the address of each live control, by where on the page it is."""
    atlas = atlas_at(served.base, reader)
    return {
        "#visitor": f"{atlas}photo.html",
        "#any": f"{atlas}index.html",
        "#render form": f"{atlas}{LAYERS[0]}/2.html",
    }


def test_what_cannot_be_opened_is_said_before_anything_is_clicked(
    chromium: Browser, served: Served, reader: StoreReader
) -> None:
    sentence = "start the server with: phosphene serve PLACE --model tinynet:make, where that network can be imported."
    with visiting(chromium, served.base) as page:
        page.route("**/recipes.json", lambda route: route.fulfill(json={**route.fetch().json(), "refused": sentence}))
        for control, address in places_of_live_use(served, reader).items():
            page.goto(address)
            expect(page.get_by_text(sentence)).to_be_visible()
            expect(page.locator(control)).to_be_hidden()
            check_access(page)


def test_live_use_without_scripts(chromium: Browser, served: Served, reader: StoreReader) -> None:
    with visiting(chromium, served.base, script=False) as page:
        for control, address in places_of_live_use(served, reader).items():
            page.goto(address)
            expect(page.locator(control)).to_be_hidden()
            assert re.search("<noscript>.*needs JavaScript", page.content())  # which this browser hides all the same


def begin_render(page: Page, base: str, reader: StoreReader, steps: int) -> None:
    """Ask for a filter that the atlas has no picture of, and count the pictures that come."""
    page.goto(f"{atlas_at(base, reader)}{LAYERS[0]}/20.html")
    expect(page.get_by_text("This filter has no picture in the atlas yet.")).to_be_visible()
    expect(page.get_by_label("size")).to_have_value(str(SIDE))  # the recipes have come
    page.get_by_role("spinbutton", name="steps").fill(str(steps))
    page.locator(".easel img").evaluate(
        "one => { window.pictures = new Set(); new MutationObserver(() => window.pictures.add(one.src))"
        ".observe(one, { attributes: true, attributeFilter: ['src'] }) }"
    )
    page.get_by_role("button", name="Render it now").click()


def updates(page: Page) -> int:
    return int(page.evaluate("window.pictures.size"))


def test_a_filter_that_is_rendered_on_request(chromium: Browser, served: Served, reader: StoreReader) -> None:
    with visiting(chromium, served.base) as page:
        begin_render(page, served.base, reader, 60)
        expect(page.locator("#render .said")).to_contain_text("Done: score", timeout=30_000)
        assert updates(page) >= 5
        expect(page.locator(".count")).to_have_text(re.compile("^Step 60 of 60"))
        until(lambda: page.locator(".easel img").evaluate("one => one.complete && one.naturalWidth") == SIDE)
        expect(page.locator(".outcome code")).to_contain_text(re.compile("--channels 20 .*--precision [a-z0-9]+ "))
        look(page, "rendering")


def test_leaving_the_page_ends_a_render_and_the_next_one_begins(
    chromium: Browser, served: Served, reader: StoreReader
) -> None:
    line = served.queue.tasks
    with visiting(chromium, served.base) as first, visiting(chromium, served.base) as second:
        begin_render(first, served.base, reader, 2048)
        until(lambda: updates(first) >= 5)
        begin_render(second, served.base, reader, 2048)
        expect(second.locator("#render .said")).to_have_text("Waiting: 1 is before you.")
        until(lambda: len(line) == 2)
        running, waiting = line
        assert running.started
        assert not waiting.started
        first.goto(f"{served.base}index.html")
        until(lambda: line == [waiting])
        assert running.gone.is_set()
        until(lambda: updates(second) >= 5)
        second.close()
        until(lambda: line == [])
        assert waiting.gone.is_set()
