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

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsejepa.evaluation.stats import Estimate
from sparsejepa.files import write_text
from sparsejepa.study.figures import SPARSE, STYLE, points
from sparsejepa.study.page import Picture, drawn, render, resource


@dataclass(frozen=True)
class MeasureRow:
    """One measure of a section's table; `values` maps a column's name to its estimate."""

    section: str
    name: str
    about: str
    """One line: what it is, where it comes from, whether up or down is better."""
    unit: str
    values: Mapping[str, Estimate]
    """A column that is missing has no such measure, and no line."""


@dataclass(frozen=True)
class GroupView:
    """What the gallery shows of one group."""

    index: int
    name: str
    """As given by a person, else ""."""
    dead: bool
    duplicate_of: int | None
    on: float
    """Share of patches at which it is above its root mean square."""
    latents: Sequence[tuple[int, float]]
    """(latent, ||W_gj||), strongest first; `num_latents` counts all that are not zero."""
    num_latents: int
    labels: Sequence[tuple[str, str, float, float]]
    """(target, label, value, chance level), strongest first."""
    neighbours: Sequence[tuple[int, float]]
    """(group, correlation), nearest first."""
    top_patches: Sequence[tuple[int, int, float]]
    """(image, patch, activation over rms), strongest first; images are indices of the page's."""
    top_images: Sequence[int]
    retrieved: Sequence[tuple[int, Sequence[int]]]
    """(query image, its nearest images under this group alone)."""
    silence: Mapping[str, Any] | None
    """drop: Estimate and chance: float | None, both shares of 1; classes: [(label, drop)], largest
    first; images: [image], most changed first. None: not measured."""
    cell: Sequence[int]
    """The patches that a region group predicts, else empty."""
    monosemanticity: float | None
    matched: float | None
    """Stability over seeds: correlation with the best match in another run."""


@dataclass(frozen=True)
class ExplainPage:
    """What the page shows, top to bottom. Every text is escaped; settings is TOML.

    Letters: m images, N patches, G groups, D latents.
    """

    title: str
    subtitle: str
    verdict: str
    remarks: Sequence[str]
    columns: Sequence[str]
    """Of the tables of measures; the first is the model that the page is about."""
    measures: Sequence[MeasureRow]
    block_norms: np.ndarray
    """||W_gj|| [G, D]; zeros are exact."""
    images: np.ndarray
    """uint8 [m, h, w, 3], those of the explorer and of the gallery."""
    image_labels: Sequence[str]
    activations: np.ndarray
    """||W^(g) z|| over the group's rms [m, N, G]; [m, 1, G] for region groups, which have one value
    an image: it is shown in the group's cell."""
    grid: tuple[int, int]
    """Rows and columns of patches; rows * columns = N."""
    explorer: Sequence[int]
    """Which images the explorer offers; 24 to 60 are enough to see a pattern."""
    groups: Sequence[GroupView]
    """Of groups 0 to G-1, in this order."""
    curves: Sequence[Mapping[str, Any]]
    """The rows of metrics.jsonl; empty if there are none."""
    pictures: Sequence[Picture]
    command: str
    environment: Mapping[str, Any]
    settings: str
    names_file: str
    """Where a person's names for groups are kept; the page says so beside the download."""
    floors: Sequence[str] = ()
    """Columns that are floors or baselines; set apart from models."""
    label_measure: str = "AUC"
    """What the value of a group's labels is."""


EXPLORER_SIDE, GALLERY_SIDE = 192, 96
"""Longest side, in pixels, at which an image of the explorer and one of the gallery is kept."""
FULL_SCALE = 5.0
"""Activation, in units of the group's rms, at which the 8-bit scale of the page ends."""
CURVES = {
    "loss": "loss",
    "prediction": "prediction term",
    "group": "group term",
    "kl": "KL term",
    "kl_marginal": "KL, marginal part",
    "kl_correlation": "KL, correlation part",
    "penalty": "group lasso penalty",
    "knn": "k-NN accuracy, part of train",
    "rankme": "RankMe (effective rank)",
    "std_min": "smallest spread of a latent",
    "density": "density of W",
    "groups_per_latent": "groups per latent",
    "dead_groups": "dead groups",
    "lam": "lambda",
}
"""Columns of metrics.jsonl that are drawn, with what they are called."""


def write_explain_page(path: Path, page: ExplainPage) -> Path:
    """Render `page` to one HTML file, atomically, and return its path.

    Raises ValueError if the arrays of the page do not fit each other or are not finite.
    """
    activations = _checked(page)
    script = resource("explain.js", __package__)
    html = render(
        "explain.html",
        package=__package__,
        page=page,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_json(_payload(page, activations)),
        colours=palette(len(page.groups)),
        sections=_sections(page),
        norms_text=_norms_text(np.asarray(page.block_norms, float)),
        rows=sort_map(np.asarray(page.block_norms, float))[0],
        label_top=max((v for g in page.groups for _, _, v, _ in g.labels), default=1.0) or 1.0,
        curves=drawn(curve_pictures(page.curves), "c"),
        alarms=[row["alarm"] for row in page.curves if isinstance(row, dict) and "alarm" in row],
        pictures=drawn(page.pictures, "p"),
        number=_number,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


def palette(count: int) -> list[str]:
    """Return `count` colours as #rrggbb, far apart and all dark-on-light and light-on-dark.

    Each is, of the colours of middle lightness and chroma, the farthest in OKLab (Ottosson 2020)
    from those before, so that the first few are as distinct as can be.
    """
    axis = np.linspace(0, 1, 24)
    rgb = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    calm = (lab[:, 0] > 0.62) & (lab[:, 0] < 0.84) & (chroma > 0.07) & (chroma < 0.17)
    rgb, lab = rgb[calm], lab[calm]
    chosen = [int(np.argmin(np.abs(lab - (0.7, -0.05, -0.11)).sum(1)))]  # the accent's blue
    distance = np.full(len(lab), np.inf)
    for _ in range(count - 1):
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    levels = (255 * rgb[chosen[:count]]).round().astype(int)
    return ["#" + "".join(f"{v:02x}" for v in colour) for colour in levels.tolist()]


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


def curve_pictures(rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Return one small figure per column of metrics.jsonl, without those that are always zero."""
    pictures = []
    for key, label in CURVES.items():
        found = points(rows, key)
        if not any(value for _, value in found):
            continue
        x, y = np.array(found, float).T
        thin = np.unique(np.linspace(0, len(x) - 1, min(len(x), 300)).astype(int))
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(3.6, 2.1), layout="constrained")
            ax = figure.add_subplot()
            few = "o" if len(thin) < 25 else ""
            ax.plot(x[thin], y[thin], color=SPARSE, lw=1.8, marker=few, ms=4)
            ax.set(title=label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
            ax.grid(True)
            ax.margins(y=0.1)
        text = (
            f"{label}: {y[0]:.3g} at step {x[0]:.0f}, {y[-1]:.3g} at step {x[-1]:.0f}; between "
            f"{y.min():.3g} and {y.max():.3g}."
        )
        pictures.append(Picture(key, figure, "", text))
    return pictures


def _checked(page: ExplainPage) -> np.ndarray:
    """Return the activations [m, N, G] of a page whose parts fit each other."""
    count, patches = len(page.groups), page.grid[0] * page.grid[1]
    activations = np.asarray(page.activations, float)
    norms = np.asarray(page.block_norms, float)
    if page.images.ndim != 4 or page.images.dtype != np.uint8:
        raise ValueError(f"images: need uint8 [m, h, w, 3], got {page.images.shape}")
    if len(page.image_labels) != len(page.images):
        raise ValueError(f"{len(page.images)} images and {len(page.image_labels)} labels")
    if not len(page.explorer):
        raise ValueError("explorer: need at least one image")
    if not 1 <= count <= 254 or [g.index for g in page.groups] != list(range(count)):
        raise ValueError("groups: need views of groups 0 to G-1 in order, G from 1 to 254")
    if norms.ndim != 2 or len(norms) != count:
        raise ValueError(f"block_norms: need [{count}, D], got {norms.shape}")
    if activations.shape not in {(len(page.images), n, count) for n in (1, patches)}:
        expected = f"[{len(page.images)}, {patches} or 1, {count}]"
        raise ValueError(f"activations: need {expected}, got {activations.shape}")
    if not (np.isfinite(activations).all() and np.isfinite(norms).all()):
        raise ValueError("activations and block_norms must be finite")
    if activations.shape[1] != patches:  # one value an image: it belongs to the group's cell
        inside = np.zeros((patches, count))
        for group in page.groups:
            inside[list(group.cell), group.index] = 1
        activations = activations * inside
    return activations


def _payload(page: ExplainPage, activations: np.ndarray) -> dict[str, Any]:
    """Return what the script needs, ready for JSON."""
    explorer = [int(i) for i in page.explorer]
    levels = np.clip(np.rint(activations * (255 / FULL_SCALE)), 0, 255).astype(np.uint8)
    owner = np.where(activations.max(2) > 0, activations.argmax(2), 255).astype(np.uint8)
    heat = {}  # the gallery needs single maps only, the explorer those of all groups
    used = set(explorer)
    for group in page.groups:
        for i in (*group.top_images, *(query for query, _ in group.retrieved)):
            heat[f"{i},{group.index}"] = _base64(levels[i, :, group.index])
        used |= {i for i, _, _ in group.top_patches} | {*group.top_images}
        used |= {i for query, found in group.retrieved for i in (query, *found)}
        used |= {*(group.silence or {}).get("images", ())}
    norms = np.asarray(page.block_norms, float)
    rows, columns = sort_map(norms)
    # 0 is kept for exact zeros
    levels_w = np.ceil(norms / max(norms.max(), 1e-12) * 65535).astype("<u2")
    return {
        "names": [group.name for group in page.groups],
        "colours": palette(len(page.groups)),
        "grid": [int(n) for n in page.grid],
        "shape": [int(n) for n in page.images.shape[1:3]],
        "images": {
            str(i): _webp(page.images[i], EXPLORER_SIDE if i in explorer else GALLERY_SIDE)
            for i in sorted(int(i) for i in used)
        },
        "labels": {str(i): page.image_labels[i] for i in sorted(used)},
        "explorer": explorer,
        "owner": _base64(owner[explorer]),
        "levels": _base64(levels[explorer]),
        "scale": FULL_SCALE / 255,
        "heat": heat,
        "map": {
            "rows": rows,
            "columns": columns,
            "largest": float(norms.max()),
            "norms": _base64(levels_w),
        },
    }


def _sections(page: ExplainPage) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the measures by section, each with a line per column: text and place on its scale."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in page.measures:
        values = {c: row.values[c] for c in page.columns if c in row.values}
        known = [e for e in values.values() if e.value is not None]
        ends = [v for e in known for v in (e.value, e.low, e.high) if v is not None]
        low, high = (min([0, *ends]), max([0, *ends])) if ends else (0, 1)
        span = (high - low) or 1
        widths = [e.high - e.low for e in known if e.low is not None and e.high is not None]
        finest = min((w for w in widths if w > 0), default=max(map(abs, ends), default=1) / 10)
        decimals = int(np.clip(1 - np.floor(np.log10(finest or 1)), 0, 5))
        lines = [
            {
                "column": column,
                "kind": "own"
                if column == page.columns[0]
                else "floor"
                if column in page.floors
                else "other",
                "note": e.note,
                "value": None if e.value is None else _number(e.value, decimals),
                "interval": None
                if e.low is None or e.high is None
                else [_number(e.low, decimals), _number(e.high, decimals)],
                "at": None if e.value is None else 100 * (e.value - low) / span,
                "from": None if e.low is None else 100 * (e.low - low) / span,
                "to": None if e.high is None else 100 * (e.high - low) / span,
            }
            for column, e in values.items()
        ]
        sections.setdefault(row.section, []).append(
            {"row": row, "lines": lines, "zero": 100 * (0 - low) / span}
        )
    return list(sections.items())


def _number(value: float, decimals: int = 2) -> str:
    """Return a number with a true minus sign; what rounds to zero has none."""
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text.replace("-", "\u2212")


def _norms_text(norms: np.ndarray) -> str:
    """Return the map of W in words, for who cannot see it and as its caption."""
    on = norms > 0
    per_latent, per_group = on.sum(0), on.sum(1)
    parts = [
        f"{norms.shape[0]} groups by {norms.shape[1]} latents: {100 * on.mean():.0f} % of the "
        "pairs are not exactly zero",
        f"a latent feeds {per_latent.mean():.1f} groups on average ({per_latent.min()} to "
        f"{per_latent.max()}), a group reads {per_group.mean():.1f} latents ({per_group.min()} to "
        f"{per_group.max()})",
    ]
    if (per_group == 0).any():
        parts.append(f"groups fed by no latent: {int((per_group == 0).sum())}")
    return "; ".join(parts) + "."


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Return sRGB colours [n, 3] in [0, 1] in OKLab."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


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


def _json(data: Any) -> Any:
    """Return JSON that no text of the data can end or leave, as markup for a script element."""
    from markupsafe import Markup

    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
