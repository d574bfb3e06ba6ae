"""The page that shows what a model has learned: measures, W, images, groups. One HTML file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsejepa.explain.concepts import Gallery
from sparsejepa.explain.measures import Row
from sparsejepa.explain.readout import REFERENCES, RUN
from sparsejepa.files import write_text
from sparsejepa.study import render, resource

PACKAGE = "sparsejepa.explain"


@dataclass(frozen=True)
class ExplainPage:
    """What the page shows, top to bottom. Every text is escaped; settings is TOML.

    Letters: m images, N patches, G groups, D latents.
    """

    title: str
    subtitle: str
    verdict: str
    remarks: Sequence[str]
    rows: Sequence[Row]
    block_norms: np.ndarray
    """||W_gj|| [G, D]; zeros are exact."""
    images: Mapping[int, np.ndarray]
    """uint8 [h, w, 3], all of one size, by the number that the gallery has for them."""
    image_labels: Mapping[int, str]
    grid: tuple[int, int]
    """Rows and columns of patches; rows * columns = N."""
    gallery: Gallery
    """Its activations are in the order of `images`; one value an image is shown in the cell."""
    command: str
    about: Mapping[str, Any]
    settings: str


SIDES = 192, 96
"""Longest side, in pixels, at which an image of the explorer and any other is kept."""
FULL_SCALE = 5.0
"""Activation, in units of the group's rms, at which the 8-bit scale of the page ends."""


def write_explain_page(path: Path, page: ExplainPage) -> Path:
    """Render `page` to one HTML file, atomically, and return its path."""
    norms = np.asarray(page.block_norms, float)
    script = resource("page.js", PACKAGE)
    html = render(
        "page.html",
        package=PACKAGE,
        page=page,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=as_script(_payload(page)),
        colours=palette(len(norms)),
        sections=_sections(page),
        norms_text=_norms_text(norms),
        order=sort_map(norms)[0],
        number=_number,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


def palette(count: int) -> list[str]:
    """Return `count` CSS colours, all of them dark enough on light and light enough on dark.

    Hues turn by the golden angle, so that the first few are as far apart as can be, and lightness
    by three steps, which tells neighbours in hue apart.
    """
    return [
        f"oklch({(74, 66, 82)[g % 3]}% 0.13 {(250 + 137.508 * g) % 360:.1f})" for g in range(count)
    ]


def sort_map(norms: np.ndarray) -> tuple[list[int], list[int]]:
    """Return an order of the groups and of the latents of ||W_gj|| [G, D] that shows structure.

    Groups: from the heaviest on, always the most alike of those left, dead ones last. Latents: by
    their strongest group in this order, within it by strength.
    """
    length = np.linalg.norm(norms, axis=1)
    unit = norms / np.where(length > 0, length, 1)[:, None]
    alike = unit @ unit.T
    rows = [int(length.argmax())]
    left = [g for g in range(len(norms)) if g != rows[0]]
    while left:
        rows.append(max(left, key=lambda g: (length[g] > 0, alike[rows[-1], g], length[g])))
        left.remove(rows[-1])
    shown = norms[rows]
    used = shown.max(0) > 0
    columns = np.lexsort((-shown.max(0), shown.argmax(0), ~used))
    return rows, columns.tolist()


def _payload(page: ExplainPage) -> dict[str, Any]:
    """Return what the script needs, ready for JSON."""
    cards, explorer = page.gallery.cards, page.gallery.explorer
    place = {image: row for row, image in enumerate(page.images)}
    activations = np.asarray(page.gallery.activations, float)
    patches = page.grid[0] * page.grid[1]
    if activations.shape[1] != patches:  # one value an image: it belongs to the group's cell
        inside = np.zeros((patches, len(cards)))
        for card in cards:
            inside[list(card.cell), card.index] = 1
        activations = activations * inside
    places = [place[i] for i in explorer]
    levels = np.clip(np.rint(activations * (255 / FULL_SCALE)), 0, 255).astype(np.uint8)
    owner = np.where(activations.max(2) > 0, activations.argmax(2), 255).astype(np.uint8)
    norms = np.asarray(page.block_norms, float)
    rows, columns = sort_map(norms)
    # 0 is kept for exact zeros
    levels_w = np.ceil(norms / max(norms.max(), 1e-12) * 65535).astype("<u2")
    return {
        "colours": palette(len(cards)),
        "grid": page.grid,
        "shape": next(iter(page.images.values())).shape[:2],
        "images": {i: _webp(x, SIDES[i not in explorer]) for i, x in page.images.items()},
        "labels": dict(page.image_labels),
        "explorer": list(explorer),
        "owner": _base64(owner[places]),
        "levels": _base64(levels[places]),
        "scale": FULL_SCALE / 255,
        # The cards need single maps only, the explorer those of all groups.
        "heat": {
            f"{i},{card.index}": _base64(levels[place[i], :, card.index])
            for card in cards
            for i in card.top_images
        },
        "map": {
            "rows": rows,
            "columns": columns,
            "largest": float(norms.max()),
            "norms": _base64(levels_w),
        },
    }


def _sections(page: ExplainPage) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows by section, each with a line per column: texts and places on its scale."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in page.rows:
        sections.setdefault(row.section, []).append(_measure(row))
    return list(sections.items())


def _measure(row: Row) -> dict[str, Any]:
    """Return a row with its columns' texts, and their places in percent of a scale with zero."""
    values = {c: row.values[c] for c in (RUN, *REFERENCES) if c in row.values}
    known = [e for e in values.values() if e.value is not None]
    ends = [v for e in known for v in (e.value, e.low, e.high) if v is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    span = (high - low) or 1
    # So many decimals that the narrowest interval shows two digits.
    widths = [e.high - e.low for e in known if e.low is not None and e.high is not None]
    finest = min((w for w in widths if w > 0), default=max(map(abs, ends), default=1) / 10)
    decimals = int(np.clip(1 - np.floor(np.log10(finest or 1)), 0, 5))

    def text(value: float | None) -> str | None:
        return None if value is None else _number(value, decimals)

    def at(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / span, 2)

    lines = [
        {
            "column": column,
            "kind": "own" if column == RUN else "floor",
            "note": e.note,
            "texts": [text(v) for v in (e.value, e.low, e.high)],
            "places": [at(v) for v in (e.value, e.low, e.high)],
        }
        for column, e in values.items()
    ]
    return {"row": row, "lines": lines, "zero": at(0.0)}


def _number(value: float, decimals: int = 2) -> str:
    """Return a number with a true minus sign; what rounds to zero has none."""
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text.replace("-", "\u2212")


def _norms_text(norms: np.ndarray) -> str:
    """Return the map of W in words, for who cannot see it and as its caption."""
    on = norms > 0
    per_latent, per_group = on.sum(0), on.sum(1)
    return (
        f"{norms.shape[0]} groups by {norms.shape[1]} latents: {100 * on.mean():.0f} % of the "
        f"pairs are not exactly zero; a latent feeds {per_latent.mean():.1f} groups on average "
        f"({per_latent.min()} to {per_latent.max()}), a group reads {per_group.mean():.1f} latents "
        f"({per_group.min()} to {per_group.max()})."
    )


def _webp(image: np.ndarray, side: int) -> str:
    """Return an image [h, w, 3] in base64, made smaller if it is larger than `side`."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Small images are shown pixel by pixel, so none may be lost.
    picture.save(buffer, "WEBP", lossless=max(picture.size) <= 48, quality=82, method=4)
    return base64.b64encode(buffer.getvalue()).decode()


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def as_script(data: Any) -> Any:
    """Return JSON that no text of the data can end or leave, as markup for a script element."""
    from markupsafe import Markup

    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
