"""The page of an explained model: what it says, what it must not do, and that it works."""

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
import pytest
from PIL import Image

from sparsejepa.evaluation.stats import Estimate, undefined
from sparsejepa.report.explain import (
    ExplainPage,
    MeasureRow,
    curve_pictures,
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


def test_curves_are_small_multiples_of_what_was_logged(page: ExplainPage) -> None:
    pictures = {p.name: p for p in curve_pictures(page.curves)}
    assert "balance" not in pictures and {"loss", "knn", "rankme", "density"} <= set(pictures)
    assert pictures["loss"].alt.startswith("loss: 0.5 at step 0, 0.3 at step 1170")
    line = pictures["knn"].figure.axes[0].lines[0]
    assert len(np.asarray(line.get_xydata())) == 8
    assert curve_pictures([]) == []
