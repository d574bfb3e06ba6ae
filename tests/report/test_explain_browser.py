"""The page of an explained model in a real browser: it works, and asks nothing of anywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsejepa.report.explain import ExplainPage, sort_map, write_explain_page
from sparsejepa.study.page import Page, Table, write_page


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
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda m: problems.append(f"{m.type}: {m.text}"))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    local = ("file:", "data:", "blob:")
    tab.on("request", lambda r: r.url.startswith(local) or problems.append(r.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("document.querySelector('#stage').width > 100")
    yield tab
    context.close()
    assert problems == []


def pixels(tab: Any, selector: str) -> str:
    """Return the pixels of a canvas, after what was asked for has been drawn."""
    tab.wait_for_timeout(150)
    return tab.locator(selector).first.evaluate("canvas => canvas.toDataURL()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1440])
def test_it_fits_every_screen(browser: Any, path: Path, width: int, scheme: str) -> None:
    with opened(browser, path, width, scheme) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        tab.wait_for_timeout(300)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        beyond = """[...document.querySelectorAll('main *')].filter((e) =>
            e.getBoundingClientRect().right > innerWidth + 1 &&
            !e.closest('nav, .map-scroll, pre, .hidden, svg, .tip')).map((e) => e.outerHTML)"""
        assert tab.evaluate(beyond) == []
        empty = """[...document.querySelectorAll('.group canvas')].filter((c) =>
            !c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean)).length"""
        assert tab.evaluate(empty) == 0
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
        assert dark == (scheme == "dark")


def test_pointing_at_a_group_lights_it_up_in_all_images(browser: Any, path: Path) -> None:
    with opened(browser, path) as tab:
        stage, other = "#stage", ".thumbs button:nth-child(5) canvas"
        before = pixels(tab, stage), pixels(tab, other)
        tab.hover("#chips [data-group='3']")
        after = pixels(tab, stage), pixels(tab, other)
        assert before[0] != after[0] and before[1] != after[1]
        tab.mouse.move(5, 5)
        assert (pixels(tab, stage), pixels(tab, other)) == before
        tab.click("#chips [data-group='3']")
        tab.mouse.move(5, 5)
        tab.locator("#chips [data-group='3']").blur()
        assert (pixels(tab, stage), pixels(tab, other)) == after
        tab.wait_for_selector("#chips [data-group='3'][aria-pressed=true]")
        tab.check("input[value=heat]")
        assert pixels(tab, stage) != after[0]
        tab.keyboard.press("Escape")
        tab.check("input[value=owner]")
        assert pixels(tab, stage) == before[0]
        tab.locator("#strength").fill("0")
        assert pixels(tab, stage) != before[0]


def test_images_and_patches_by_keyboard(browser: Any, path: Path, page: ExplainPage) -> None:
    with opened(browser, path) as tab:
        tab.locator(".thumbs button").first.focus()
        tab.keyboard.press("ArrowRight")
        chosen = ".thumbs [aria-selected=true]"
        assert tab.get_attribute(chosen, "data-place") == "1"
        assert page.image_labels[1] in tab.inner_text("#image-text")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("ArrowUp")
        tab.keyboard.press("End")
        assert tab.get_attribute(chosen, "data-place") == "35"
        tab.keyboard.press("ArrowRight")
        assert tab.get_attribute(chosen, "data-place") == "35"
        tab.click(".thumbs button:nth-child(4)")
        assert tab.get_attribute(chosen, "data-place") == "3"
        tab.focus("#stage")
        for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowRight"):
            tab.keyboard.press(key)
        owner = int(page.activations[3, 17].argmax())
        text = tab.inner_text("#stage-readout")
        assert text.startswith("Row 3, column 2: ") and f"group {owner} " in text
        tab.keyboard.press("Enter")
        tab.wait_for_selector(f"#chips [data-group='{owner}'][aria-pressed=true]")
        counted = tab.inner_text(f"#chips [data-group='{owner}'] small")
        assert int(counted) == (page.activations[3].argmax(1) == owner).sum()


def test_the_map_reads_its_values(browser: Any, path: Path, page: ExplainPage) -> None:
    rows, columns = sort_map(page.block_norms)
    with opened(browser, path) as tab:
        tab.hover("#w", position={"x": 2, "y": 5})
        value = page.block_norms[rows[0], columns[0]]
        name = page.groups[rows[0]].name
        group = f"group {rows[0]} ({name})" if name else f"group {rows[0]}"
        assert tab.inner_text("#w-readout").startswith(
            f"Latent {columns[0]}, {group}: {value:.3f}."
        )
        tab.focus("#w")
        for _ in range(15):
            tab.keyboard.press("ArrowDown")
        assert f"group {rows[15]}: exactly zero" in tab.inner_text("#w-readout")


def test_a_name_is_shown_everywhere_and_downloaded(browser: Any, path: Path) -> None:
    with opened(browser, path, 400) as tab:
        tab.fill("[data-rename='3']", ' <b>"green"</b> ')
        assert tab.inner_text("#chips [data-group='3'] [data-name]") == '<b>"green"</b>'
        tab.fill("[data-rename='0']", "")
        with tab.expect_download() as download:
            tab.click("#download")
        assert download.value.suggested_filename == "groups.json"
        names = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        assert names == {"names": {"2": "wheels", "3": '<b>"green"</b>'}}


def test_a_card_shows_its_group_in_the_images(browser: Any, path: Path) -> None:
    with opened(browser, path) as tab:
        tab.click("[data-show='9']")
        tab.wait_for_selector("#chips [data-group='9'][aria-pressed=true]")
        box = tab.locator("#explorer").bounding_box()
        assert 0 <= box["y"] < 300


def test_a_reason_appears_on_focus(browser: Any, path: Path) -> None:
    with opened(browser, path, 400) as tab:
        note = tab.locator(".note", has_text="not defined: k-means").first
        tip = note.locator("xpath=following-sibling::*[1]")
        assert not tip.is_visible()
        note.focus()
        assert tip.is_visible() and "no latents" in tip.inner_text()
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400


def test_hostile_texts_run_nothing(browser: Any, tmp_path: Path, page: ExplainPage) -> None:
    tag = (
        "</title></script></style><img src=x onerror=alert(1)><script>alert(2)</script>"
        "\" onfocus=alert(3) ' <!-- --> \u2028 javascript:alert(4)"
    )
    texts = dict.fromkeys(
        ("title", "subtitle", "verdict", "command", "settings", "names_file"), tag
    )
    hostile = replace(
        page,
        **texts,
        remarks=[tag],
        image_labels=[tag] * len(page.images),
        environment={tag: tag},
        groups=[replace(page.groups[0], name=tag), *page.groups[1:]],
    )
    explained = write_explain_page(tmp_path / "explain.html", hostile)
    plain = write_page(
        tmp_path / "sweep.html",
        Page(tag, tag, tag, [tag], [Table(tag, [tag], [[tag]], tag)], page.pictures, tag,
             {tag: tag}, tag),
    )  # fmt: skip
    with opened(browser, explained) as tab:
        tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
        tab.locator("#chips .chip").first.click()
        tab.wait_for_timeout(200)
        assert tab.locator("img").count() == 0 and tab.locator("script").count() == 2
    tab = browser.new_page()
    problems: list[str] = []
    tab.on("dialog", lambda dialog: problems.append(dialog.message))
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(r.url))
    tab.goto(plain.as_uri())
    tab.wait_for_timeout(200)
    assert problems == [] and tab.locator("img, script").count() == 0
    assert tab.locator("h1").inner_text().startswith("</title></script>")
    # What the page's policy is for: were a script to come in after all, it would not run.
    tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'document.title = 1'}))"
    )
    assert tab.title() != "1" and any("Content Security Policy" in text for text in problems)
    tab.close()
