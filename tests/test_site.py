"""The documentation site: strict build, links, no outside requests, the browser."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import sparsejepa

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a built page refers to and what can be referred to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value for key, value in attrs if value}
        self.ids |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif "src" in found:
            self.fetched.add(found["src"])
        elif tag == "link" and found.get("rel") != "canonical" and "href" in found:
            self.fetched.add(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. It is strict: a warning of any kind ends the build."""
    pytest.importorskip("mkdocstrings", reason="builds the site: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, text=True, capture_output=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = (path for path in site.rglob("*.html") if path.name != "404.html")
    return {path: Page(path.read_text(encoding="utf-8")) for path in found}


@pytest.mark.slow
def test_every_page_of_docs_is_built(site: Path, pages: dict[Path, Page]) -> None:
    wanted = (ROOT / "docs").rglob("*.md")
    assert {site / path.relative_to(ROOT / "docs").with_suffix(".html") for path in wanted} == set(
        pages
    )
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
def test_no_link_is_broken(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = target in pages
            if not target.exists() or (parts.fragment and known and (
                unquote(parts.fragment) not in pages[target].ids | {"__search", "__toc"}
            )):  # fmt: skip
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


@pytest.mark.slow
def test_pages_ask_nothing_of_other_hosts(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        outside = [link for link in page.fetched if re.match(r"(?!data:)(\w+:)?//", link)]
        assert not outside, path.name


def test_all_that_is_public_is_in_the_reference() -> None:
    named = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.M)
    assert {f"{module}.{name}" for name, module in sparsejepa._EXPORTS.items()} == set(named)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on the loopback: the search is not there on pages from the disk."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the system's or playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api")
    system = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_api.sync_playwright() as playwright:
        if not (system or Path(playwright.chromium.executable_path).exists()):
            pytest.skip("no Chromium: python -m playwright install chromium")
        browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1440])
def test_pages_fit_the_screen_and_the_search_finds(
    browser: Any, address: str, pages: dict[Path, Page], width: int
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    tab.on("console", lambda m: m.type == "error" and problems.append(m.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: r.url.startswith((address, "data:")) or problems.append(r.url))
    for name in ("index", "method", "results", "api"):
        tab.goto(f"{address}{name}.html")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        broken = "[...document.images].filter((i) => i.complete && !i.naturalWidth).length"
        tab.wait_for_load_state("load")
        assert tab.evaluate(broken) == 0, name
    tab.goto(f"{address}index.html")
    if width > 1000:
        tab.locator(".md-search__input").press_sequentially("proximal")
        tab.wait_for_selector(".md-search-result__item a")
    tab.close()
    assert problems == []
