"""The page is one file, escapes what it shows, and asks nothing of the network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sparsejepa.model.masks import MaskSampler
from sparsejepa.study.page import (
    INK,
    Page,
    Table,
    accuracy_figure,
    inline_svg,
    mask_preview_figure,
    save_png,
    sweep_pictures,
    write_page,
)
from sparsejepa.study.verdict import Summary, summarise, table, verdict

HOSTILE = '</title><script>alert(1)</script>" onload="x & {{ 7 * 7 }}'


def make_summary(arm: str = "lam=0.01", data: str = "cifar100") -> Summary:
    rows = []
    for name in ("dense", "lam=0", arm):
        dense = name == "dense"
        groups = {"groups": "none" if dense else "region", "lam": 0.0 if dense else float(name[4:])}
        structure = {"groups_per_latent": 8.0, "density": 0.5, "nonzero_elements": 4608}
        for seed in range(3):
            accuracies = {"fine": 0.4 + 0.01 * seed, "coarse": 0.2}
            probes = [
                {"data": data, "target": target, "protocol": "logistic", "n_test": 1000,
                 "accuracy": accuracy, "untrained": 0.2, "pixels": 0.12}
                for target, accuracy in accuracies.items()
            ]  # fmt: skip
            about = {"arm": name, "seed": seed, "settings": {"groups": groups}, "probes": probes}
            rows.append(about | (structure if not dense else {}))
    return summarise(rows)


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), list[tuple[str, str]](), ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_it_must_obeys_no_name_and_asks_nothing_of_the_network(
    tmp_path: Path,
) -> None:
    summary = make_summary(data=f"folder/{HOSTILE}")
    found, title = verdict(summary), HOSTILE
    made = Page(
        title=title, subtitle=title, verdict=found.text, remarks=[*found.remarks, title],
        tables=[Table(title, *table(summary), title)], pictures=sweep_pictures(summary),
        command=title, environment={"commit": title}, settings=title,
    )  # fmt: skip
    html = write_page(tmp_path / "new" / "report.html", made).read_text(encoding="utf-8")
    page = Reader(html)
    assert HOSTILE in page.text and "49" not in page.text.partition("Figures")[0]
    assert found.text in page.text and "raw-pixel floor" in page.text
    assert "uninformative" in page.text  # coarse equals its floor
    alts = [v for n, v in page.attributes if n == "aria-label" and "percent" in v]
    assert any("untrained encoder 20.0" in a and "raw pixels 12.0" in a for a in alts)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed"})
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in {"srcset", "action", "background"}
        if name.rpartition(":")[2] in {"href", "src"}:
            assert value.startswith("#"), value
    # Names of XML vocabularies are no requests; nothing else may look like an address.
    assert set(re.findall(r"https?://([\w.]+)", html)) <= {"www.w3.org"}
    ids = [value for name, value in page.attributes if name == "id"]
    used = [v[1:] for n, v in page.attributes if n.endswith("href")]
    used += re.findall(r"url\(#([\w-]+)\)", html)
    assert len(ids) == len(set(ids)) and used and set(used) <= set(ids)


def test_figures_take_the_pages_ink_and_are_reproducible() -> None:
    summary = make_summary()
    first = inline_svg(accuracy_figure(summary, "cifar100: fine"), "a")
    again = inline_svg(accuracy_figure(summary, "cifar100: fine"), "a")
    assert first == again
    assert INK not in first and "currentColor" in first
    assert "<metadata>" not in first and "<!DOCTYPE" not in first
    assert " width=" not in first[: first.index(">")]


def test_uninformative_is_written_on_the_picture() -> None:
    summary = make_summary()
    assert summary.uninformative == {"cifar100: coarse"}
    written = [
        {text.get_text() for ax in accuracy_figure(summary, name).axes for text in ax.texts}
        for name in summary.measures
    ]
    assert written == [set(), {"uninformative"}]


def test_accuracy_figure_draws_the_numbers(tmp_path: Path) -> None:
    figure = accuracy_figure(make_summary(), "cifar100: fine")
    ax = figure.axes[0]
    dots = [np.asarray(line.get_xydata())[0] for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots, [(0, 41), (1, 41), (2, 41)])
    levels = [np.asarray(line.get_xydata())[0, 1] for line in ax.lines]
    assert {41, 20, 12} <= {round(float(y), 6) for y in levels}
    names = [tick.get_text() for tick in ax.get_xticklabels()]
    assert names == ["dense", "lam=0\n50 % of W", "lam=0.01\n50 % of W"]
    assert save_png(figure, tmp_path / "a" / "b.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("merge", [False, True])
def test_mask_pictures_show_context_and_targets(merge: bool) -> None:
    sampler = MaskSampler((4, 8), num_targets=2, merge=merge)
    shown = mask_preview_figure(sampler, count=3, seed=2).axes[0]
    context, targets = (part[0].numpy() for part in sampler.sample(1, seed=2, step=0))
    filled = shown.images[0].get_array()
    assert filled is not None
    assert np.flatnonzero(np.asarray(filled)).tolist() == sorted(context.tolist())
    assert len(shown.patches) == (targets.shape[1] if merge else 2)


def test_a_figure_of_one_seed_and_no_floor() -> None:
    groups = {"groups": "region", "lam": 0.1}
    probe = {"data": "d", "target": "t", "protocol": "knn", "accuracy": 0.5, "n_test": 10}
    rows = [{"arm": "lam=0.1", "seed": 0, "settings": {"groups": groups}, "probes": [probe]}]
    summary = summarise(rows)
    (picture,) = sweep_pictures(summary)
    assert picture.name == "accuracy-d-t-knn" and "lam=0.1 50.0." in picture.alt
