"""`compare`: two explained runs on one page, and which of their groups are the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from sparsejepa.errors import UserError
from sparsejepa.explain.concepts import match_groups
from sparsejepa.explain.readout import REFERENCES, RUN, SHUFFLED, short_name
from sparsejepa.explain.run import ACTIVATIONS, METRICS
from sparsejepa.files import load_tensors, read_json
from sparsejepa.study.page import Page, Table, write_page


def compare_runs(
    first: Path, second: Path, *, out: Path | None = None, command: str = ""
) -> dict[str, Any]:
    """Write one page for two folders that `run_explain` wrote; return what it shows.

    Groups are matched by the correlation of their activations over the same patches of the same
    test images (over images where the grids differ), see `match_groups`.

    Raises UserError if a folder has no report, or the two were read on different images.
    """
    if first.resolve() == second.resolve():
        raise UserError(f"{first}: the two runs are the same folder; name two")
    (a, x), (b, y) = _read(first), _read(second)
    if a["fingerprint"] != b["fingerprint"]:
        raise UserError(
            f"{second}: read on other test images ({b['data']}, {b['images']['test']}) than "
            f"{first} ({a['data']}, {a['images']['test']}); explain both with the same --data "
            "and --test-limit"
        )
    names = short_name(a["run"]), short_name(b["run"])
    names = names[0], names[1] + " (2)" * (names[0] == names[1])
    rows, apart = _measures(a, b, names)
    if x.shape[:2] != y.shape[:2]:
        x, y = (activations.mean(1, keepdims=True) for activations in (x, y))
    matched = match_groups(x, y)
    groups = {
        "groups": [x.shape[2], y.shape[2]],
        "matched pairs": len(matched.pairs),
        "mean correlation": float(np.mean(matched.correlations)),
        "chance": matched.chance,
        "chance, 95 % below": matched.chance_high,
    }
    verdict = "No measure sets the runs clearly apart."
    if apart:
        clear = ", ".join(apart[:4]) + f" and {len(apart) - 4} more" * (len(apart) > 4)
        verdict = f"The runs are clearly apart on {clear}."
    verdict += (
        f" Their {len(matched.pairs)} matched groups correlate {groups['mean correlation']:.2f} "
        f"on average, with other images {matched.chance:.2f} (95 % below "
        f"{matched.chance_high:.2f})."
    )
    used = {name for row in rows for name in row["values"]}
    columns = [name for name in (*names, *REFERENCES) if name in used]
    measures = [
        [row["section"], row["name"], *(estimate_text(row["values"].get(c)) for c in columns)]
        for row in rows
    ]
    matches = [
        [*map(str, matched.pairs[i].tolist()), f"{matched.correlations[i]:.2f}"]
        for i in np.argsort(-matched.correlations)
    ]
    page = Page(
        title=f"{names[0]} and {names[1]}",
        subtitle=f"Two runs read on {a['data']}, {a['images']['test']:,} test images.",
        verdict=verdict,
        remarks=[
            "Clearly apart: the 95 % intervals over test images do not meet. They say nothing "
            "of other seeds, and among many measures some differ by chance."
        ],
        tables=[
            Table(
                "Measures",
                ["section", "measure", *columns],
                measures,
                "Floors are those of the first run.",
            ),
            Table(
                "Groups that match",
                [*(f"group of {name}" for name in names), "correlation"],
                matches,
                "One-to-one matching with the largest sum of correlations of activations.",
            ),
        ],
        pictures=[],
        command=command or shlex.join(["sparsejepa", "compare", str(first), str(second)]),
        environment={
            "commit": a["environment"]["commit"] or "not a source checkout",
            "first": a["command"],
            "second": b["command"],
        },
        settings=tomli_w.dumps({names[0]: a["options"], names[1]: b["options"]}),
    )
    name = f"compare-{second.resolve().name}.html"
    out = first / name if out is None else out / name if out.is_dir() else out
    write_page(out, page)
    return {"out": str(out), "verdict": verdict, "measures": rows, "groups": groups}


def _read(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Return the metrics that `run_explain` left in a folder, and activations [n, N, G].

    Raises UserError if there are none.
    """
    if not (folder / METRICS).is_file() or not (folder / ACTIVATIONS).is_file():
        raise UserError(
            f"{folder}: no report here ({METRICS} is missing); run sparsejepa explain first"
        )
    tensors, _ = load_tensors(folder / ACTIVATIONS)
    return read_json(folder / METRICS), tensors["activations"].float().numpy()


def _measures(
    a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows that both runs have, with the floors, and which are clearly apart.

    The floors are the first run's: a twin has the same architecture.
    """
    others = {(row["section"], row["name"]): row["values"] for row in b["measures"]}
    rows, apart = [], []
    for row in a["measures"]:
        p, q = row["values"].get(RUN), others.get((row["section"], row["name"]), {}).get(RUN)
        if p is None or q is None:
            continue
        floors = {name: row["values"][name] for name in REFERENCES if name in row["values"]}
        rows.append({**row, "values": {names[0]: p, names[1]: q, **floors}})
        floor = 0.0 if row["name"].startswith("R²") else floors.get(SHUFFLED, {}).get("high")
        if floor is not None and max(e["value"] or 0.0 for e in (p, q)) <= floor:
            continue  # two values at chance: which is higher says nothing
        if None not in (p["low"], q["low"]) and (p["low"] > q["high"] or q["low"] > p["high"]):
            higher = names[p["low"] <= q["high"]]
            apart.append(f"{row['name']} (higher in {higher})")
    return rows, apart


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """Return an estimate of metrics.json as "0.31 [0.29, 0.33]", or "–" where it is not defined."""
    if estimate is None or estimate["value"] is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:.3g}"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"
