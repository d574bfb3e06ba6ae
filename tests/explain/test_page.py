"""The page of an explained model: what it says, what it must not do, and its script's data."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsejepa.evaluation.stats import Estimate, undefined
from sparsejepa.explain.concepts import Gallery
from sparsejepa.explain.measures import Row
from sparsejepa.explain.page import (
    ExplainPage,
    palette,
    sort_map,
    write_explain_page,
)

HOSTILE = '</title></script><script>alert(1)</script>" onload="x & {{ 7 * 7 }} <!--'


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


def test_the_page_asks_nothing_of_the_network_and_its_references_resolve(path: Path) -> None:
    html = path.read_text(encoding="utf-8")
    reader = Reader(html)
    assert {"link", "iframe", "object", "embed", "form", "img"}.isdisjoint(reader.tags)
    for name, value in reader.attributes:
        assert name not in {"src", "srcset", "action", "background", "poster"}
        assert not name.endswith("href") or value.startswith("#")
    assert not re.findall(r"https?://", html)
    policy = next(v for n, v in reader.attributes if n == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [v[1:] for n, v in reader.attributes if n == "href"]
    used += [v for n, v in reader.attributes if n == "aria-labelledby"]
    assert used and set(used) <= set(ids)


def test_hostile_texts_are_shown_and_not_obeyed(tmp_path: Path, page: ExplainPage) -> None:
    values = {"this run": Estimate(1.0, 0.5, 1.5), "PCA": undefined(HOSTILE)}
    first, *others = page.gallery.cards
    cards = [replace(first, labels=[(HOSTILE, HOSTILE, 0.9, 0.5)]), *others]
    hostile = replace(
        page,
        **dict.fromkeys(("title", "subtitle", "verdict", "command", "settings"), HOSTILE),
        remarks=[HOSTILE],
        rows=[Row(HOSTILE, HOSTILE, HOSTILE, HOSTILE, values)],
        image_labels=dict.fromkeys(page.images, HOSTILE),
        gallery=replace(page.gallery, cards=cards),
        about={HOSTILE: HOSTILE},
    )
    reader, data = write(tmp_path, hostile)
    assert len(reader.scripts) == 2 and reader.tags.count("script") == 2
    assert set(data["labels"].values()) == {HOSTILE}
    assert reader.text.count(HOSTILE) > 12 and "49" not in reader.text.partition("Measures")[0]
    assert all(not name.startswith("on") for name, _ in reader.attributes)


def test_numbers_intervals_and_reasons_are_in_the_text(path: Path) -> None:
    text = " ".join(Reader(path.read_text(encoding="utf-8")).text.split())
    assert "−0.020 −0.050 to 0.010" in text
    assert "k-means – k-means has no latents" in text
    assert "Accuracy falls by 3.1 points [2.0, 4.4]; a random subspace of equal rank: 0.4" in text
    assert "0.91 chance 0.56" in text


def test_the_script_gets_what_the_arrays_say(tmp_path: Path, page: ExplainPage) -> None:
    activations = page.gallery.activations.copy()
    activations[0, 0, :3] = 7.0, 9.0, 8.0  # all beyond the 8-bit scale
    activations[0, 1] = 0
    _, data = write(tmp_path, replace(page, gallery=replace(page.gallery, activations=activations)))
    shape = (len(page.gallery.explorer), 64, len(page.gallery.cards))
    owner = unpack(data["owner"]).reshape(shape[:2])
    assert owner[0, 0] == 1 and owner[0, 1] == 255
    assert (owner.ravel()[2:] == activations[:36].argmax(2).ravel()[2:]).all()
    levels = unpack(data["levels"]).reshape(shape) * data["scale"]
    np.testing.assert_allclose(levels, activations[:36].clip(0, 5), atol=0.5 * data["scale"] + 1e-9)
    norms = unpack(data["map"]["norms"], "<u2").reshape(page.block_norms.shape)
    np.testing.assert_array_equal(norms > 0, page.block_norms > 0)
    np.testing.assert_allclose(norms / 65535 * data["map"]["largest"], page.block_norms, atol=2e-5)
    i = page.gallery.cards[2].top_images[0]
    np.testing.assert_allclose(
        unpack(data["heat"][f"{i},2"]) * data["scale"], activations[i, :, 2].clip(0, 5), atol=0.011
    )
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["images"]["0"]))))
    assert first.shape == (64, 64, 3)
    assert np.abs(first.astype(int) - page.images[0]).mean() < 6


def test_a_region_group_lights_its_own_cell(tmp_path: Path, page: ExplainPage) -> None:
    values = np.random.default_rng(0).uniform(0.5, 2, (len(page.images), 1, 16))
    place = np.arange(64).reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4)
    cards = [replace(c, cell=place[c.index].tolist()) for c in page.gallery.cards]
    gallery = replace(page.gallery, activations=values, cards=cards)
    reader, data = write(tmp_path, replace(page, gallery=gallery))
    levels = unpack(data["levels"]).reshape(36, 64, 16) * data["scale"]
    for g, cell in enumerate(place):
        assert (levels[:, np.setdiff1d(range(64), cell), g] == 0).all()
        np.testing.assert_allclose(levels[:, cell, g], values[:36, :, g].repeat(4, 1), atol=0.011)
        assert (unpack(data["owner"]).reshape(36, 64)[:, cell] == g).all()
    assert "Each group predicts a fixed cell" in reader.text and "predicts 4 patches" in reader.text


def test_three_hundred_photographs_stay_below_six_megabytes(
    tmp_path: Path, page: ExplainPage
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 56, 56, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    cards = page.gallery.cards
    tall = [replace(c, top_images=[20 * c.index + k for k in range(20)]) for c in cards[:15]]
    large = replace(
        page,
        images=dict(enumerate(images)),
        image_labels=dict.fromkeys(range(300), ""),
        grid=(14, 14),
        gallery=Gallery(
            [*tall, cards[15]], list(range(48)), list(range(300)), rng.random((300, 196, 16))
        ),
    )
    assert write_explain_page(tmp_path / "a.html", large).stat().st_size < 6e6


def oklch_to_linear(colour: str) -> np.ndarray:
    """Return the linear sRGB levels of a CSS colour (CSS Color 4, section 10.2)."""
    lightness, chroma, hue = map(float, re.findall(r"[\d.]+", colour))
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    lms = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728],
                    [1, -0.0894841775, -1.2914855480]]) @ (lightness / 100, a, b)  # fmt: skip
    return np.array([[4.0767416621, -3.3077115913, 0.2309699292],
                     [-1.2684380046, 2.6097574011, -0.3413193965],
                     [-0.0041960863, -0.7034186147, 1.7076147010]]) @ lms**3  # fmt: skip


def test_colours_are_distinct_and_carry_dark_text() -> None:
    colours = palette(64)
    assert len(set(colours)) == 64 and colours[:16] == palette(16)
    linear = np.stack([oklch_to_linear(colour) for colour in colours]).clip(0, 1)
    luminance = linear @ (0.2126, 0.7152, 0.0722)  # WCAG 2.2
    assert ((luminance + 0.05) / (0.0071 + 0.05) > 4.5).all()  # against #10151a
    shown = linear[:16] ** (1 / 2.2)
    apart = np.linalg.norm(shown[:, None] - shown[None], axis=2) + np.eye(16)
    assert apart.min() > 0.1


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
