"""What stands between the markers in README.md: the study in short, from results/ alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layouts import SPARSE, TASKS, Report, best, floor_text, queued, render, scale
from plots import FIGURES, shown
from rules import VERDICTS
from search import read_search, replay, text
from study import Block, Study


def readme_block(study: Study, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return what stands between the markers in README.md."""
    parts = [
        "Every number here and in [docs/results.md](docs/results.md) is made by "
        "`python recipes/tables.py` from `results/`, whose lines name command, commit, hardware, "
        "settings and seed. Accuracy in percent, mean ± standard deviation over seeds; differences "
        "paired by seed with the 95 % t interval [ ] and the bootstrap interval ( ). "
        "In rows of version 1 the zeros are those of W's random start: their sparse arms are arms "
        "of random connections."
    ]
    for block in study.blocks(1):
        if block.config.data == "cifar100" and SPARSE in block.planned:
            parts.append(render([pair(block) if block.all_rows else queued(block)]))
            if not block.gpu and "results-lambda.png" in shown(study):
                text = FIGURES["results-lambda.png"][3]
                parts.append(
                    f"![{text}](docs/images/results-lambda.png)\n*{text}, small runs: table 3 of "
                    "docs/results.md names their recipes.*"
                )
    parts += [study.left_out, verdicts(counts), found_text(study), explained_text(study)]
    parts += [folder_text(study), speed_text(study)]
    return "\n\n".join(part for part in parts if part)


def pair(block: Block) -> Report:
    """Return table 1 in small: the three arms on the tasks that were run, and the floors."""
    tasks = [measure for measure, _ in TASKS if measure.asked(block.about)]
    header = ["task", "dense", "lam=0", SPARSE, f"{SPARSE} minus lam=0", "*untrained*", "*pixels*"]
    rows = []
    for task in tasks:
        cells = [block.cell(arm, task) for arm in ("dense", "lam=0", SPARSE)]
        floors = [floor_text(task, block.floor(task, w), w) for w in ("untrained", "pixels")]
        rows.append([task.title, *cells, block.versus(SPARSE, "lam=0", task), *floors])
    seeds = [block.done(arm) for arm in ("dense", "lam=0", SPARSE)]
    rows.append(["*seeds done / planned*", *seeds, "", "", ""])
    return Report(scale(block), header, rows, [best(block), block.apart])


def verdicts(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the number of verdicts by scale."""
    lines = [
        [where, *(f"{found.get(name, 0)}" for name in VERDICTS)] for where, found in counts.items()
    ]
    above = (
        "The paper's claims, judged by rule from these numbers ([docs/claims.md](docs/claims.md)): "
        "*small* is the scale of two CPU cores, *full* that of a GPU, *any* the theory."
    )
    return render([Report(above, ["scale", *VERDICTS], lines)])


def found_text(study: Study) -> str:
    """Return the best settings that each search has found so far."""
    lines = []
    for name, rows in study.trials.items():
        found = replay(rows, read_search(study.root / "recipes" / f"{Path(name).stem}.toml"))
        best_settings = "; ".join(f"{arm}: {text(best)}" for arm, best in found.winners.items())
        state = f", {len(found.todo)} trials come next" if found.todo else ""
        lines.append(
            f"**The search** `{Path(name).stem}` ({len(rows)} trials{state}): {best_settings}."
        )
    return "\n\n".join(lines)


def folder_text(study: Study) -> str:
    """Return what the run on a folder of traffic signs gave, from results/gtsrb32-nano.jsonl."""
    row = next((row for row in study.rows if row["recipe"] == "gtsrb32-nano"), None)
    if row is None:
        return ""
    parts = [
        f"{p['data']} {100 * p['accuracy']:.1f} % (untrained {100 * p['untrained']:.1f}, "
        f"pixels {100 * p['pixels']:.1f})"
        for p in row["probes"]
    ]
    count = row["probes"][0]["n_train"]
    return (
        f"**A folder of PNG files** (traffic signs, {count:,} images of "
        f"{row['probes'][0]['n_classes']} classes, {row['arm']}, {row['steps']:,} steps, one "
        f"seed), probed on {' and '.join(parts)}."
    )


def explained_text(study: Study) -> str:
    """Return what explained scenes say about groups and objects, from results/explain.jsonl."""
    for page in study.explain:
        if page["run"] == "runs/scenes/lam=0.03-s0":
            values = {m["name"]: m["values"] for m in page["measures"]}
            ari = {name: value["value"] for name, value in values["FG-ARI"].items()}
            same = [values[f"same group, {n} object{s}"]["this run"]["value"]
                    for n, s in (("one", ""), ("two", "s"))]  # fmt: skip
            return (
                "**Do groups follow objects?** On built-in scenes (`concept` groups, lam=0.03, one "
                f"seed): FG-ARI {ari['this run']:.2f}, against {ari['untrained']:.2f} for an "
                f"untrained encoder, {ari['k-means']:.2f} for k-means, {ari['places']:.2f} for "
                f"blind blocks of places and {ari['ceiling']:.2f} for perfect patches. Pairs of "
                f"patches within an object share a group in {same[0]:.2f} of cases, pairs across "
                f"objects in {same[1]:.2f}. Why, and remedies: [docs/explain.md](docs/explain.md)."
            )
    return ""


def speed_text(study: Study) -> str:
    """Return the speed of the training step, from results/bench.jsonl."""
    steps = next((s for s in study.bench if s["name"] == "steps"), None)
    if steps is None:
        return ""
    rows = {row["name"]: row for row in steps["rows"]}
    rate = {name: f"{row.get('images_per_second') or 0:.0f}" for name, row in rows.items()}
    ours, about = rows["ours, dense, bf16"], steps["environment"]
    shape, product = steps["settings"], ours["share"]
    model = f"ViT-{shape['encoder'].capitalize()}/{shape['patch_size']}"
    parts = [
        f"**The training step** ({model}, batch {shape['batch']}, {about['threads']} threads, "
        f"{about['cpu']}, commit {about['commit']}): a plain reference step does "
        f"{rate['reference, fp32']} images/s in fp32 and {rate['reference, bf16']} under bf16 "
        f"autocast; ours {rate['ours, dense, bf16']} dense and {rate['ours, region groups, bf16']} "
        f"with region groups, KL and prox ({ours['x_reference_fp32']:.2f} and "
        f"{ours['x_reference_bf16']:.2f} times the reference; {product:.2f} of the product rate of "
        "its own shapes)."
    ]
    if peers := next((s for s in study.bench if s["name"] == "peers"), None):
        speed = {row["name"]: row.get("images_per_second") for row in peers["rows"]}
        more = [100 * speed[f"ours, compiled, {p}"] / speed[f"ours, {p}"] - 100 for p in PRECISIONS]
        parts.append(f"`--compile` adds {more[0]:.0f} % in fp32 and {more[1]:.0f} % in bf16.")
    return " ".join(parts)


PRECISIONS = ("fp32", "bf16")
