"""`compare`: two explained runs on one page, and which of their groups are the same."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from sparsejepa.errors import UserError
from sparsejepa.explain.columns import REFERENCES, RUN, SHUFFLED, short_name
from sparsejepa.explain.concepts import match_groups
from sparsejepa.explain.run import ACTIVATIONS, METRICS, without_none
from sparsejepa.explain.subject import read_names
from sparsejepa.files import load_tensors, read_json
from sparsejepa.study.figures import group_map_figure, matching_figure
from sparsejepa.study.page import Page, Picture, Table, write_page
from sparsejepa.terminal import estimate_text


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
    sides = [_Side(folder) for folder in (first, second)]
    a, b = sides
    if a.metrics["fingerprint"] != b.metrics["fingerprint"]:
        raise UserError(
            f"{second}: read on other test images ({b.metrics['data']}, "
            f"{b.metrics['images']['test']}) than {first} ({a.metrics['data']}, "
            f"{a.metrics['images']['test']}); explain both with the same --data and --test-limit"
        )
    names = [a.name, b.name if b.name != a.name else f"{b.name} (2)"]
    rows, apart = _measures(sides, names)
    same_patches = a.activations.shape[:2] == b.activations.shape[:2]
    x, y = (
        (s.activations if same_patches else s.activations.mean(1, keepdims=True)) for s in sides
    )
    matched = match_groups(_flat(x), _flat(y), block=x.shape[1])
    groups = {
        "groups": [len(a.norms), len(b.norms)],
        "matched pairs": len(matched.pairs),
        "mean correlation": float(np.mean(matched.correlations)),
        "chance": matched.chance,
        "chance, 95 % below": matched.chance_high,
    }
    clear = ", ".join(apart[:4]) + (f" and {len(apart) - 4} more" if len(apart) > 4 else "")
    verdict = (
        (f"The runs are clearly apart on {clear}. " if apart else
         "No measure sets the runs clearly apart. ")
        + f"Their {len(matched.pairs)} matched groups correlate {groups['mean correlation']:.2f} "
        f"on average, with other images {matched.chance:.2f} (95 % below "
        f"{matched.chance_high:.2f})."
    )  # fmt: skip
    name = f"compare-{second.resolve().name}.html"
    out = first / name if out is None else out / name if out.is_dir() else out
    about = a.metrics["environment"]
    write_page(
        out,
        Page(
            title=f"{names[0]} and {names[1]}",
            subtitle=f"Two runs read on {a.metrics['data']}, "
            f"{a.metrics['images']['test']:,} test images.",
            verdict=verdict,
            remarks=[
                "Clearly apart: the 95 % intervals over test images do not meet. They say nothing "
                "of other seeds, and among many measures some differ by chance."
            ],
            tables=[*_tables(rows, names), _matches(matched, sides, names)],
            pictures=_pictures(matched, sides, names),
            command=command or shlex.join(["sparsejepa", "compare", str(first), str(second)]),
            environment={
                "commit": about["commit"] or "not a source checkout",
                "first": a.metrics["command"],
                "second": b.metrics["command"],
            },
            settings=tomli_w.dumps(
                {n: without_none(s.metrics["options"]) for n, s in zip(names, sides, strict=True)}
            ),
        ),
    )
    return {"out": str(out), "verdict": verdict, "measures": rows, "groups": groups}


class _Side:
    """What `run_explain` left in a folder."""

    def __init__(self, folder: Path) -> None:
        if not (folder / METRICS).is_file() or not (folder / ACTIVATIONS).is_file():
            raise UserError(
                f"{folder}: no report here ({METRICS} is missing); run sparsejepa explain first"
            )
        self.folder = folder
        self.metrics = read_json(folder / METRICS)
        tensors, _ = load_tensors(folder / ACTIVATIONS)
        if not _whole(self.metrics, tensors):
            raise UserError(f"{folder}: a damaged report; run sparsejepa explain again")
        self.activations = tensors["activations"].float().numpy()  # [n, N, G]
        self.norms = tensors["block_norms"].float().numpy()
        self.name = short_name(self.metrics["run"])
        self.names = read_names(folder, len(self.norms))

    def label(self, group: int) -> str:
        """Return a group's number, with its name if it has one."""
        return f"{group} {self.names[group]}" if group in self.names else str(group)


def _whole(metrics: Any, tensors: dict[str, Any]) -> bool:
    """Return whether the files of a report have what is read of them, which others may send."""
    try:
        activations, norms = tensors["activations"], tensors["block_norms"]
        texts = [metrics[key] for key in ("run", "data", "fingerprint", "command")]
        texts += [row[key] for row in metrics["measures"] for key in ("section", "name")]
        ends = [
            estimate[key]
            for row in metrics["measures"]
            for estimate in row["values"].values()
            for key in ("value", "low", "high")
        ]
        tomli_w.dumps(without_none(metrics["options"]))
        return (
            all(isinstance(text, str) for text in texts)
            and all(end is None or type(end) in (int, float) for end in ends)
            and isinstance(metrics["images"]["test"], int)
            and isinstance(metrics["environment"]["commit"], str | None)
            and (activations.ndim, norms.ndim) == (3, 2)
            and activations.shape[2] == len(norms)
            and bool(activations.numel() and norms.numel())
            and bool(activations.isfinite().all() and norms.isfinite().all())
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def _flat(activations: np.ndarray) -> np.ndarray:
    return activations.reshape(-1, activations.shape[2])


def _measures(
    sides: Sequence[_Side], names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows that both runs have, with the best floor, and which are clearly apart."""
    found = [
        {(row["section"], row["name"]): row for row in side.metrics["measures"]} for side in sides
    ]
    rows, apart = [], []
    for key, row in found[0].items():
        if key not in found[1] or RUN not in row["values"] or RUN not in found[1][key]["values"]:
            continue
        pair = [side[key]["values"][RUN] for side in found]
        values = dict(zip(names, pair, strict=True))
        for floor in REFERENCES:  # the first run's: a twin has the same architecture
            if floor in row["values"]:
                values[floor] = row["values"][floor]
        rows.append({**row, "values": values})
        p, q = pair
        chance = row["values"].get(SHUFFLED, {}).get("high")
        floor = 0.0 if row["name"].startswith("R²") else chance
        if floor is not None and max(e["value"] or 0.0 for e in pair) <= floor:
            continue  # two values at chance: which is higher says nothing
        if None not in (p["low"], q["low"]) and (p["low"] > q["high"] or q["low"] > p["high"]):
            higher = names[0] if p["low"] > q["high"] else names[1]
            apart.append(f"{row['name']} (higher in {higher})")
    return rows, apart


def _tables(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Table]:
    tables = []
    for section in dict.fromkeys(row["section"] for row in rows):
        part = [row for row in rows if row["section"] == section]
        used = {name for row in part for name in row["values"]}
        columns = [name for name in (*names, *REFERENCES) if name in used]
        cells = [
            [row["name"], *(estimate_text(row["values"].get(c)) for c in columns)] for row in part
        ]
        tables.append(
            Table(section, ["measure", *columns], cells, "Floors are those of the first run.")
        )
    return tables


def _matches(matched: Any, sides: Sequence[_Side], names: Sequence[str]) -> Table:
    order = np.argsort(-matched.correlations)
    cells = [
        [
            sides[0].label(int(matched.pairs[i][0])),
            sides[1].label(int(matched.pairs[i][1])),
            f"{matched.correlations[i]:.2f}",
        ]
        for i in order
    ]
    return Table(
        "Groups that match",
        [f"group of {names[0]}", f"group of {names[1]}", "correlation"],
        cells,
        "One-to-one matching with the largest sum of correlations of activations; shuffled images "
        f"reach {matched.chance:.2f}.",
    )


def _pictures(matched: Any, sides: Sequence[_Side], names: Sequence[str]) -> list[Picture]:
    maps = [
        Picture(
            f"group-map-{i}",
            group_map_figure(side.norms),
            f"Which latents feed which group in {name}.",
            f"Heat map of {side.norms.shape[0]} groups by {side.norms.shape[1]} latents of {name}; "
            f"{100 * float((side.norms > 0).mean()):.0f} percent of the cells are not zero.",
        )
        for i, (side, name) in enumerate(zip(sides, names, strict=True))
    ]
    return [
        *maps,
        Picture(
            "matching",
            matching_figure(matched.matrix, matched.pairs, names),
            "Correlation of every group of one run with every group of the other; rings: matched.",
            f"Heat map of correlations between {len(sides[0].norms)} and {len(sides[1].norms)} "
            f"groups; the matched pairs reach {np.mean(matched.correlations):.2f} on average.",
        ),
    ]
