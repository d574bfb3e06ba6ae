"""`compare`: two explained runs on one page, and which of their groups are the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from sparsejepa.errors import UserError
from sparsejepa.explain.concepts import Matching, match_groups
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
    a, b = sides = [_Side(folder) for folder in (first, second)]
    if a.metrics["fingerprint"] != b.metrics["fingerprint"]:
        raise UserError(
            f"{second}: read on other test images ({b.metrics['data']}, "
            f"{b.metrics['images']['test']}) than {first} ({a.metrics['data']}, "
            f"{a.metrics['images']['test']}); explain both with the same --data and --test-limit"
        )
    b.name += " (2)" * (a.name == b.name)
    rows, apart = _measures(a, b)
    same_patches = a.activations.shape[:2] == b.activations.shape[:2]
    x, y = (s.activations if same_patches else s.activations.mean(1, keepdims=True) for s in sides)
    matched = match_groups(x, y)
    groups = {
        "groups": [len(a.norms), len(b.norms)],
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
    name = f"compare-{second.resolve().name}.html"
    out = first / name if out is None else out / name if out.is_dir() else out
    write_page(
        out,
        Page(
            title=f"{a.name} and {b.name}",
            subtitle=f"Two runs read on {a.metrics['data']}, "
            f"{a.metrics['images']['test']:,} test images.",
            verdict=verdict,
            remarks=[
                "Clearly apart: the 95 % intervals over test images do not meet. They say nothing "
                "of other seeds, and among many measures some differ by chance."
            ],
            tables=[_table(rows, (a.name, b.name)), _matches(matched, a, b)],
            pictures=[],
            command=command or shlex.join(["sparsejepa", "compare", str(first), str(second)]),
            environment={
                "commit": a.metrics["environment"]["commit"] or "not a source checkout",
                "first": a.metrics["command"],
                "second": b.metrics["command"],
            },
            settings=tomli_w.dumps({s.name: s.metrics["options"] for s in sides}),
        ),
    )
    return {"out": str(out), "verdict": verdict, "measures": rows, "groups": groups}


class _Side:
    """What `run_explain` left in a folder. Raises UserError if there is nothing, or it is damaged.

    activations: [n, N, G]; norms: [G, D].
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / METRICS).is_file() or not (folder / ACTIVATIONS).is_file():
            raise UserError(
                f"{folder}: no report here ({METRICS} is missing); run sparsejepa explain first"
            )
        self.metrics = read_json(folder / METRICS)
        tensors, _ = load_tensors(folder / ACTIVATIONS)
        try:
            self.activations = tensors["activations"].float().numpy()
            self.norms = tensors["block_norms"].float().numpy()
            self.name = short_name(self.metrics["run"])
            self.rows = {(row["section"], row["name"]): row for row in self.metrics["measures"]}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder}: a damaged report; run sparsejepa explain again") from None


def _measures(a: _Side, b: _Side) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows that both runs have, with the floors, and which are clearly apart.

    The floors are the first run's: a twin has the same architecture.
    """
    rows, apart = [], []
    for key, row in a.rows.items():
        p, q = (side.rows.get(key, {"values": {}})["values"].get(RUN) for side in (a, b))
        if p is None or q is None:
            continue
        floors = {name: row["values"][name] for name in REFERENCES if name in row["values"]}
        rows.append({**row, "values": {a.name: p, b.name: q, **floors}})
        floor = 0.0 if row["name"].startswith("R²") else floors.get(SHUFFLED, {}).get("high")
        if floor is not None and max(e["value"] or 0.0 for e in (p, q)) <= floor:
            continue  # two values at chance: which is higher says nothing
        if None not in (p["low"], q["low"]) and (p["low"] > q["high"] or q["low"] > p["high"]):
            higher = a.name if p["low"] > q["high"] else b.name
            apart.append(f"{row['name']} (higher in {higher})")
    return rows, apart


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    used = {name for row in rows for name in row["values"]}
    columns = [name for name in (*names, *REFERENCES) if name in used]
    cells = [
        [row["section"], row["name"], *(estimate_text(row["values"].get(c)) for c in columns)]
        for row in rows
    ]
    about = "Floors are those of the first run."
    return Table("Measures", ["section", "measure", *columns], cells, about)


def _matches(matched: Matching, a: _Side, b: _Side) -> Table:
    order = np.argsort(-matched.correlations)
    cells = [
        [*(str(group) for group in matched.pairs[i].tolist()), f"{matched.correlations[i]:.2f}"]
        for i in order
    ]
    return Table(
        "Groups that match",
        [f"group of {a.name}", f"group of {b.name}", "correlation"],
        cells,
        "One-to-one matching with the largest sum of correlations of activations; shuffled images "
        f"reach {matched.chance:.2f}.",
    )


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """Return an estimate of metrics.json as "0.31 [0.29, 0.33]", or "–" where it is not defined."""
    if estimate is None or estimate["value"] is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:.3g}"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"
