"""The page of an explained model in a real browser: it works, and asks nothing of anywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsejepa.explain.page import ExplainPage, sort_map, write_explain_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return Chromium: the system's or playwright's own. Continuous integration must have one."""
    required = os.environ.get("CI") or os.environ.get("CI_BROWSER") == "1"
    if required:
        from playwright import sync_api
    else:
        sync_api = pytest.importorskip("playwright.sync_api")
    system = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_api.sync_playwright() as playwright:
        if not (system or Path(playwright.chromium.executable_path).exists()):
            reason = "no Chromium: python -m playwright install chromium"
            if required:
                pytest.fail(reason)
            pytest.skip(reason)
        browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, width: int = 1440, scheme: str = "light") -> Iterator[Any]:
    """Open the page; afterwards fail on any error, console message or outside request."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda m: problems.append(f"{m.type}: {m.text}"))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(r.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("document.querySelector('#stage').width > 100")
    yield tab
    context.close()
    assert problems == []


def pixels(tab: Any, selector: str) -> str:
    """Return the pixels of a canvas, after what was asked for has been drawn."""
    tab.wait_for_timeout(150)
    return tab.locator(selector).first.evaluate("canvas => canvas.toDataURL()")


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1440, "light")])
def test_it_fits_every_screen(browser: Any, path: Path, width: int, scheme: str) -> None:
    with opened(browser, path, width, scheme) as tab:
        tab.wait_for_timeout(300)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        beyond = """[...document.querySelectorAll('main *')].filter((e) =>
            e.getBoundingClientRect().right > innerWidth + 1 &&
            !e.closest('nav, .map-scroll, pre, svg')).map((e) => e.outerHTML)"""
        assert tab.evaluate(beyond) == []
        empty = """[...document.querySelectorAll('.group canvas')].filter((c) =>
            !c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean)).length"""
        assert tab.evaluate(empty) == 0
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
        assert dark == (scheme == "dark")


def test_a_group_lights_up_in_all_images(browser: Any, path: Path) -> None:
    with opened(browser, path) as tab:
        stage, other, chip = "#stage", ".thumbs button:nth-child(5) canvas", "[data-group='3']"
        before = pixels(tab, stage), pixels(tab, other)
        tab.hover(chip)
        after = pixels(tab, stage), pixels(tab, other)
        assert before[0] != after[0] and before[1] != after[1]
        tab.mouse.move(5, 5)
        assert (pixels(tab, stage), pixels(tab, other)) == before
        tab.click(chip)
        tab.mouse.move(5, 5)
        assert (pixels(tab, stage), pixels(tab, other)) == after
        tab.click(chip)
        tab.mouse.move(5, 5)
        assert pixels(tab, stage) == before[0]
        tab.click("[data-show='9']")
        tab.wait_for_selector("[data-group='9'][aria-pressed=true]")
        assert 0 <= tab.locator("#explorer").bounding_box()["y"] < 300


def test_images_patches_and_the_map_read_their_values(
    browser: Any, path: Path, page: ExplainPage
) -> None:
    rows, columns = sort_map(page.block_norms)
    with opened(browser, path) as tab:
        tab.click(".thumbs button:nth-child(4)")
        assert page.image_labels[3] in tab.inner_text("#image-text")
        owner = page.gallery.activations[3].argmax(1)
        box = tab.locator("#stage").bounding_box()
        position = {"x": 1.5 * box["width"] / 8, "y": 2.5 * box["height"] / 8}
        tab.click("#stage", position=position)
        text = tab.inner_text("#stage-readout")
        assert text.startswith(f"Row 3, column 2: group {owner[17]} ")
        tab.wait_for_selector(f"#chips [data-group='{owner[17]}'][aria-pressed=true]")
        counted = tab.inner_text(f"#chips [data-group='{owner[17]}'] small")
        assert int(counted) == (owner == owner[17]).sum()
        tab.hover("#w", position={"x": 2, "y": 5})
        value = page.block_norms[rows[0], columns[0]]
        expected = f"Latent {columns[0]}, group {rows[0]}: {value:.3f}."
        assert tab.inner_text("#w-readout").startswith(expected)


def test_hostile_texts_run_nothing(browser: Any, tmp_path: Path, page: ExplainPage) -> None:
    tag = (
        "</title></script></style><img src=x onerror=alert(1)><script>alert(2)</script>"
        "\" onfocus=alert(3) ' <!-- --> \u2028 javascript:alert(4)"
    )
    hostile = replace(
        page,
        **dict.fromkeys(("title", "subtitle", "verdict", "command", "settings"), tag),
        remarks=[tag],
        image_labels=dict.fromkeys(page.images, tag),
        about={tag: tag},
    )
    with opened(browser, write_explain_page(tmp_path / "explain.html", hostile)) as tab:
        tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
        tab.locator("#chips .chip").first.click()
        tab.wait_for_timeout(200)
        assert tab.locator("img").count() == 0 and tab.locator("script").count() == 2
        assert tab.locator("h1").inner_text().startswith("</title></script>")
