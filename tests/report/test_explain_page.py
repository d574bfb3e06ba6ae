"""The page of an explained model: what it says, what it must not do, and that it works."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsejepa.data.scenes import COLOURS, Scenes
from sparsejepa.evaluation.estimate import Estimate, undefined
from sparsejepa.report.explain import (
    ExplainPage,
    GroupView,
    MeasureRow,
    curve_pictures,
    palette,
    sort_map,
    write_explain_page,
)
from sparsejepa.report.figures import group_map_figure
from sparsejepa.report.page import Picture

HOSTILE = '</title></script><script>alert(1)</script>" onload="x & {{ 7 * 7 }} <!--'
GRID, SIDE = (8, 8), 64
COLUMNS = ("lam=0.03", "dense", "untrained", "PCA", "k-means")


def make_activations(images: np.ndarray, groups: int, rng: np.random.Generator) -> np.ndarray:
    """Return activations [m, N, G] of groups that each answer to a colour; the last is dead."""
    m = len(images)
    patches = images.reshape(m, GRID[0], SIDE // GRID[0], GRID[1], SIDE // GRID[1], 3)
    mean = patches.mean((2, 4)).reshape(m, -1, 3)
    wanted = np.vstack([list(COLOURS.values()), rng.uniform(30, 220, (groups, 3))])[:groups]
    distance = np.linalg.norm(mean[:, :, None] - wanted, axis=3)
    values = np.exp(-((distance / 70) ** 2)) + 0.08 * rng.random(distance.shape)
    values /= np.sqrt((values**2).mean((0, 1)))
    values[..., -1] = 0
    return values


def make_view(g: int, activations: np.ndarray, norms: np.ndarray, names: list[str]) -> GroupView:
    a = activations[..., g]
    order = np.argsort(-norms[g])
    strongest = np.argsort(-a.max(1))
    latents = [(int(j), float(norms[g, j])) for j in order[:8] if norms[g, j] > 0]
    view = GroupView(
        index=g,
        name=("red things", "", "wheels")[g] if g < 3 else "",
        dead=not a.any(),
        duplicate_of=3 if g == 4 else None,
        on=float((a > 1).mean()),
        latents=latents,
        num_latents=int((norms[g] > 0).sum()),
        labels=[],
        neighbours=[],
        top_patches=[],
        top_images=[],
        retrieved=[],
        silence=None,
        cell=(),
        monosemanticity=None,
        matched=None,
    )
    if view.dead:
        return view
    images = strongest.tolist()
    return replace(
        view,
        labels=[
            ("colour", names[g % 8], 0.91, 0.56),
            ("shape", "star", 0.62, 0.55),
            ("count", "three", 0.5, 0.55),
        ],
        neighbours=[((g + 1) % 15, 0.41), ((g + 5) % 15, 0.2)],
        top_patches=[(i, int(a[i].argmax()), float(a[i].max())) for i in images[:12]],
        top_images=a.mean(1).argsort()[::-1][:6].tolist(),
        retrieved=[(images[k], images[k + 1 : k + 6]) for k in (0, 7)],
        silence={
            "drop": Estimate(0.031, 0.02, 0.044),
            "chance": 0.004,
            "classes": [("red", 0.12), ("orange", 0.04)],
            "images": images[:6],
        },
        monosemanticity=0.2 + 0.02 * g,
        matched=0.8,
    )


def make_measures() -> list[MeasureRow]:
    rng = np.random.default_rng(1)

    def row(
        section: str, name: str, unit: str, about: str, top: float, skip: str = ""
    ) -> MeasureRow:
        values = {}
        for k, column in enumerate(COLUMNS):
            value = top * (1 - 0.17 * k + 0.05 * rng.random())
            values[column] = Estimate(value, value - 0.06 * top, value + 0.05 * top)
        if skip:
            values[skip] = undefined("k-means has no latents, so there is nothing to disentangle")
        values["PCA"] = Estimate(values["PCA"].value, note="no interval: fitted once")
        return MeasureRow(section, name, about, unit, values)

    return [
        row("Multi-information", "total correlation of latents", "nats",
            "Gaussian copula, exact bias subtracted (METHOD 7); down is better", 31.2, "k-means"),
        row("Multi-information", "total correlation of groups", "nats",
            "between the groups' pooled vectors; down is better", 4.1, "k-means"),
        row("Multi-information", "RankMe", "dimensions",
            "effective rank (Garrido et al. 2023)", 84),
        row("Disentanglement", "MIG, groups", "",
            "Chen et al. 2018; up is better", 0.11, "k-means"),
        row("Disentanglement", "DCI disentanglement, groups", "",
            "Eastwood and Williams 2018, random forest; up is better", 0.34, "k-means"),
        row("Disentanglement", "explicitness", "AUC", "Ridgeway and Mozer 2018", 0.87, "k-means"),
        row("Objects", "FG-ARI", "", "foreground pixels only; up is better", 0.42),
        row("Objects", "mBO", "", "mean best overlap (Pont-Tuset et al. 2017); up is better", 0.37),
        MeasureRow("Objects", "group lift against chance", "",
                   "below zero: worse than chance", {"lam=0.03": Estimate(-0.02, -0.05, 0.01)}),
    ]  # fmt: skip


def make_rows(steps: int = 40) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, x in enumerate(np.linspace(0, 1, steps).tolist()):
        falling = {"loss": 0.5 - 0.2 * x, "prediction": 0.4 - 0.2 * x, "penalty": 170 - 140 * x}
        w = {"density": 1 - 0.89 * x**0.5, "groups_per_latent": 16 - 14.2 * x**0.5}
        rows.append({"step": 30 * i, **falling, **w, "balance": 0.0, "lam": 0.03 * x})
        if i % 5 == 4:
            rows.append({"step": 30 * i, "rankme": 40 + 45 * x**0.5, "knn": 0.1 + 0.1 * x})
    return [*rows, {"step": 1170, "alarm": "one group: nearly all latents feed a single group"}]


def make_page(groups: int = 16, latents: int = 192, count: int = 60) -> ExplainPage:
    rng = np.random.default_rng(0)
    scenes = Scenes(0).render(np.arange(count), SIDE)
    activations = make_activations(scenes.images, groups, rng)
    norms = rng.random((groups, latents)) * (rng.random((groups, latents)) < 0.05)
    norms[rng.integers(0, groups - 1, latents), np.arange(latents)] += 1
    norms[-1] = 0
    norms /= np.maximum(np.linalg.norm(norms, axis=0), 1e-9)
    names = list(COLOURS)
    return ExplainPage(
        title="What lam=0.03-s0 learned on scenes",
        subtitle="tiny encoder, 64 x 64 pixels, 16 concept groups, 1,200 steps",
        verdict="Groups follow colour: 9 of 15 go with one colour beyond chance. They do not "
        "follow objects better than k-means on the same tokens (FG-ARI 0.42 against 0.41).",
        remarks=["One group is dead.", "Intervals: 95 %, bootstrap over 2,000 test images."],
        columns=COLUMNS,
        measures=make_measures(),
        block_norms=norms,
        images=scenes.images,
        image_labels=[f"scene {i}, {n} objects" for i, n in enumerate(scenes.count)],
        activations=activations,
        grid=GRID,
        explorer=list(range(36)),
        groups=[make_view(g, activations, norms, names) for g in range(groups)],
        curves=make_rows(),
        pictures=[Picture("map", group_map_figure(norms), "A figure.", "A heat map.")],
        command="sparsejepa explain runs/lam=0.03-s0 --data scenes",
        environment={"sparsejepa": "0.1", "commit": "75a3fbb"},
        settings="[groups]\nkind = 'concept'\n",
        names_file="runs/lam=0.03-s0/groups.json",
        floors=("untrained", "PCA", "k-means"),
    )


class Reader(HTMLParser):
    """Collects tags, attributes, scripts and the text that is not in them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def write(tmp_path: Path, page: ExplainPage) -> tuple[Reader, dict[str, Any]]:
    """Return the written page, parsed, and the data of its script."""
    path = write_explain_page(tmp_path / "new" / "report.html", page)
    reader = Reader(path.read_text(encoding="utf-8"))
    return reader, json.loads(reader.scripts[0])


def unpack(text: str, kind: str = "u1") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture(scope="module")
def page() -> ExplainPage:
    return make_page()


@pytest.fixture(scope="module")
def path(page: ExplainPage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_explain_page(tmp_path_factory.mktemp("page") / "report.html", page)


def test_the_page_asks_nothing_of_the_network(path: Path) -> None:
    html = path.read_text(encoding="utf-8")
    reader = Reader(html)
    assert {"link", "iframe", "object", "embed", "form", "img"}.isdisjoint(reader.tags)
    for name, value in reader.attributes:
        assert name not in {"src", "srcset", "action", "background", "poster"}
        if name.rpartition(":")[2] == "href":
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]
    assert set(re.findall(r"https?://[\w./]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    policy = next(v for n, v in reader.attributes if n == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_references_inside_the_page_resolve_and_ids_are_unique(path: Path) -> None:
    reader = Reader(path.read_text(encoding="utf-8"))
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [v[1:] for n, v in reader.attributes if n.endswith("href") and v[0] == "#"]
    used += [v for n, v in reader.attributes if n in {"aria-labelledby", "aria-describedby"}]
    assert used and set(used) <= set(ids)


def test_hostile_texts_are_shown_and_not_obeyed(tmp_path: Path, page: ExplainPage) -> None:
    estimate = {HOSTILE: Estimate(1.0, 0.5, 1.5, HOSTILE)}
    group = replace(
        page.groups[0],
        name=HOSTILE,
        labels=[(HOSTILE, HOSTILE, 0.9, 0.5)],
        silence={
            "drop": undefined(HOSTILE),
            "chance": None,
            "classes": [(HOSTILE, 0.1)],
            "images": [],
        },
    )
    hostile = replace(
        page,
        **dict.fromkeys(("title", "subtitle", "verdict", "command", "settings"), HOSTILE),
        names_file=HOSTILE,
        label_measure=HOSTILE,
        remarks=[HOSTILE],
        columns=[HOSTILE],
        measures=[MeasureRow(HOSTILE, HOSTILE, HOSTILE, HOSTILE, estimate)],
        image_labels=[HOSTILE] * len(page.images),
        groups=[group, *page.groups[1:]],
        curves=[{"step": 0, "loss": 1.0}, {"step": 1, "alarm": HOSTILE}],
        environment={HOSTILE: HOSTILE},
    )
    reader, data = write(tmp_path, hostile)
    assert len(reader.scripts) == 2 and reader.tags.count("script") == 2
    assert data["names"][0] == HOSTILE and set(data["labels"].values()) == {HOSTILE}
    assert reader.text.count(HOSTILE) > 15 and "49" not in reader.text.partition("Measures")[0]
    assert all(not name.startswith("on") for name, _ in reader.attributes)


def test_numbers_intervals_and_reasons_are_in_the_text(path: Path) -> None:
    text = " ".join(Reader(path.read_text(encoding="utf-8")).text.split())
    assert "−0.020 −0.050 to 0.010" in text.replace("\n", " ")
    assert "not defined: k-means has no latents" in text
    assert "Accuracy falls by 3.1 points [2.0, 4.4]; a random subspace of equal rank: 0.4" in text
    assert "0.91 chance 0.56" in text and "one group: nearly all latents" in text


def test_the_script_gets_what_the_arrays_say(tmp_path: Path, page: ExplainPage) -> None:
    activations = page.activations.copy()
    activations[0, 0, :3] = 7.0, 9.0, 8.0  # all beyond the 8-bit scale
    activations[0, 1] = 0
    _, data = write(tmp_path, replace(page, activations=activations))
    shape = (len(page.explorer), 64, len(page.groups))
    owner = unpack(data["owner"]).reshape(shape[:2])
    assert owner[0, 0] == 1 and owner[0, 1] == 255
    assert (owner.ravel()[2:] == activations[:36].argmax(2).ravel()[2:]).all()
    levels = unpack(data["levels"]).reshape(shape) * data["scale"]
    np.testing.assert_allclose(levels, activations[:36].clip(0, 5), atol=0.5 * data["scale"] + 1e-9)
    norms = unpack(data["map"]["norms"], "<u2").reshape(page.block_norms.shape)
    np.testing.assert_array_equal(norms > 0, page.block_norms > 0)
    np.testing.assert_allclose(norms / 65535 * data["map"]["largest"], page.block_norms, atol=2e-5)
    i = page.groups[2].top_images[0]
    np.testing.assert_allclose(
        unpack(data["heat"][f"{i},2"]) * data["scale"], activations[i, :, 2].clip(0, 5), atol=0.011
    )
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["images"]["0"]))))
    assert first.shape == (64, 64, 3)
    assert np.abs(first.astype(int) - page.images[0]).mean() < 6


def test_a_region_group_lights_its_own_cell(tmp_path: Path, page: ExplainPage) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 2, (len(page.images), 1, 16))
    place = np.arange(64).reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4)
    groups = [replace(g, cell=place[g.index].tolist()) for g in page.groups]
    reader, data = write(tmp_path, replace(page, activations=values, groups=groups))
    levels = unpack(data["levels"]).reshape(36, 64, 16) * data["scale"]
    for g, cell in enumerate(place):
        assert (levels[:, np.setdiff1d(range(64), cell), g] == 0).all()
        np.testing.assert_allclose(levels[:, cell, g], values[:36, :, g].repeat(4, 1), atol=0.011)
        assert (unpack(data["owner"]).reshape(36, 64)[:, cell] == g).all()
    assert "Each group predicts a fixed cell" in reader.text and "predicts 4 patches" in reader.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"activations": p.activations[:, :9]}, "activations: need"),
        (lambda p: {"activations": np.full_like(p.activations, np.nan)}, "finite"),
        (lambda p: {"block_norms": p.block_norms[1:]}, "block_norms: need"),
        (lambda p: {"images": p.images / 255}, "uint8"),
        (lambda p: {"image_labels": ["a"]}, "60 images and 1 labels"),
        (lambda p: {"groups": p.groups[::-1]}, "in order"),
        (lambda p: {"explorer": []}, "at least one image"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    change: Any, message: str, tmp_path: Path, page: ExplainPage
) -> None:
    with pytest.raises(ValueError, match=message):
        write_explain_page(tmp_path / "a.html", replace(page, **change(page)))
    assert not (tmp_path / "a.html").exists()


def test_a_page_of_little_has_no_empty_sections(tmp_path: Path, page: ExplainPage) -> None:
    bare = replace(
        page, remarks=[], measures=[], curves=[], pictures=[], floors=(),
        activations=np.zeros_like(page.activations), block_norms=np.zeros_like(page.block_norms),
    )  # fmt: skip
    reader, data = write(tmp_path, bare)
    assert (unpack(data["owner"]) == 255).all()
    assert not {"measures", "curves", "figures"} & {v for n, v in reader.attributes if n == "id"}


def test_three_hundred_photographs_stay_below_six_megabytes(
    tmp_path: Path, page: ExplainPage
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 56, 56, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    views = [replace(g, top_images=[20 * g.index + k for k in range(20)]) for g in page.groups[:15]]
    large = replace(
        page,
        images=images,
        image_labels=[""] * 300,
        grid=(14, 14),
        activations=rng.random((300, 196, 16)),
        explorer=list(range(48)),
        groups=[*views, page.groups[15]],
    )
    assert write_explain_page(tmp_path / "a.html", large).stat().st_size < 6e6


def test_colours_are_distinct_and_carry_dark_text() -> None:
    colours = palette(64)
    assert len(set(colours)) == 64 and colours[:16] == palette(16) and len(palette(1)) == 1
    rgb = np.array(
        [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in [*colours, "#10151a"]]
    )
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)  # WCAG 2.2
    assert ((luminance[:-1] + 0.05) / (luminance[-1] + 0.05) > 4.5).all()
    apart = np.linalg.norm(rgb[:16, None] - rgb[None, :16], axis=2) + np.eye(16)
    assert apart.min() > 0.15


def test_the_map_is_sorted_into_blocks() -> None:
    rng = np.random.default_rng(0)
    norms = np.kron(np.eye(6), np.ones((1, 5))) * rng.uniform(0.5, 1, (6, 30))
    norms = np.vstack([norms, np.zeros((2, 30))])
    norms[1, :5] = 0.3  # groups 0 and 1 share latents
    mixed, order = norms[rng.permutation(8)], rng.permutation(30)
    rows, columns = sort_map(mixed[:, order])
    shown = mixed[:, order][rows][:, columns]
    assert sorted(rows) == list(range(8)) and sorted(columns) == list(range(30))
    assert (shown[-2:] == 0).all()
    owner = shown.argmax(0)
    assert (np.diff(owner) >= 0).all()
    assert all((np.diff(shown[g, owner == g]) <= 0).all() for g in range(6))
    sharing = [y for y in range(8) if (shown[y] > 0).sum() == 10]
    assert len(sharing) == 1 and 0.3 in (shown[sharing[0]])
    partner = next(y for y in range(6) if y != sharing[0] and (shown[y] * shown[sharing[0]]).any())
    assert abs(partner - sharing[0]) == 1


def test_curves_are_small_multiples_of_what_was_logged() -> None:
    pictures = {p.name: p for p in curve_pictures(make_rows())}
    assert "balance" not in pictures and {"loss", "knn", "rankme", "density"} <= set(pictures)
    assert pictures["loss"].alt.startswith("loss: 0.5 at step 0, 0.3 at step 1170")
    line = pictures["knn"].figure.axes[0].lines[0]
    assert len(np.asarray(line.get_xydata())) == 8
    assert curve_pictures([]) == []


# ---- in a browser -------------------------------------------------------------------------------


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
