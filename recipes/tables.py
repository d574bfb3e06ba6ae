"""Write the tables of docs/results.md and docs/claims.md and the results in README.md.

    python recipes/tables.py            # write them
    python recipes/tables.py --check    # write nothing; exit 1 if a page is not what results/ give

What stands between two markers of a page is made from results/ and recipes/queue.toml; the
rest of a page is written by hand. The queue says which runs belong to which table.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claims import VERDICTS, ledger
from search import read_search, replay, show
from study import (
    CIFAR10,
    CIFAR100,
    CORRELATION,
    DCI,
    DEAD,
    FAR,
    GROUPS,
    KEPT,
    NEARER,
    SHARES,
    SPARSE,
    TASKS,
    WRONG,
    Block,
    Measure,
    Study,
    read_study,
)

from sparsejepa.errors import UserError
from sparsejepa.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md", "docs/claims.md")
MARKED = re.compile(r"<!-- (\S+):begin -->.*?<!-- \1:end -->", re.S)


@dataclass(frozen=True)
class Spec:
    """How a table of docs/results.md is laid out; its runs are those that the queue marks.

    An arm is a line and a measure a column, or the other way round `by_task`. The first measure,
    `by_task` each, gets differences to `controls`; "" is the same arm without its additions.
    """

    measures: Sequence[Measure]
    controls: Sequence[str] = ("lam=0", "dense")
    by_task: bool = False


SPECS = {
    1: Spec(list(TASKS), by_task=True),
    2: Spec([CIFAR100, GROUPS]),
    3: Spec([CIFAR100, CORRELATION, DCI, GROUPS, WRONG]),
    5: Spec([CIFAR100]),
    6: Spec([CIFAR100, GROUPS, DEAD, WRONG], controls=("lam=0",)),
    7: Spec([CIFAR10, FAR, NEARER], by_task=True),
    8: Spec(SHARES, by_task=True),
    9: Spec([CIFAR100, GROUPS, DCI], controls=("", "lam=0")),
    10: Spec([CIFAR100, GROUPS], controls=("", "lam=0")),
    11: Spec(KEPT, controls=(), by_task=True),
    12: Spec([CIFAR100, GROUPS], controls=("lam=0", SPARSE)),
}


def layout(spec: Spec, block: Block) -> str:
    """Return a block of runs as a table; measures without any number are left out."""
    arms = list(block.planned)
    more = ["*untrained encoder*", "*raw pixels*", "*paper: JEPA*", "*paper: SparseJEPA*"]
    columns = [["arm", *(f"`{arm}`" for arm in arms), *more]]
    for measure in spec.measures:
        if not any(block.values(arm, measure) for arm in arms):
            continue
        paper = [f"{x:.2f}" for x in TASKS.get(measure, ())] if spec.by_task else []
        floors = [measure.text(block.floor(measure, which)) for which in ("untrained", "pixels")]
        first, cells = len(columns) == 1, [block.cell(arm, measure) for arm in arms]
        columns.append([measure.title, *cells, *floors, *(paper or ["", ""])])
        for c in spec.controls if first or spec.by_task else ():
            cells = [block.versus(arm, c or arm.split("+")[0], measure) for arm in arms]
            columns.append([f"minus {c or 'the plain arm'}", *cells, *[""] * len(more)])
    columns.append(["seeds", *map(block.done, arms), *[""] * len(more)])
    lines = [line for line in zip(*columns, strict=True) if any(line[1:])]
    return render(*zip(*lines, strict=True)) if spec.by_task else render(*lines)


def scale(block: Block) -> str:
    """Return recipe, images, encoder, length and hardware of a block."""
    images, optim, model = block.config.images, block.config.optim, block.config.model
    head = f"**{'GPU' if block.gpu else 'CPU'} scale**, `{block.recipe}`: "
    head += f"{f'{images.limit:,}' if images.limit else 'all'} training images of "
    head += f"{block.config.data}, ViT-{model.encoder.capitalize()}/{model.patch_size}, "
    head += f"{optim.steps:,} steps" if optim.steps else f"{optim.epochs} epochs"
    planned, rows = sum(map(len, block.planned.values())), block.all_rows
    machines = {", ".join(a.get("gpus") or ()) or f"{a['cores']} x {a['cpu']}"
                for a in (row["environment"] for row in rows)}  # fmt: skip
    made = (
        f"done, on {'; '.join(sorted(machines))}" if rows else f"done; planned for {block.hardware}"
    )
    return f"{head}. {len(rows)} of {planned} runs {made}."


def render(*lines: Sequence[str]) -> str:
    """Return a table as Markdown, its header first; numbers stay with their spread in a cell."""
    whole = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in whole)
    return re.sub(r" (?=±)|(?<=±) |(?<=\d,) (?=[+-])", "\N{NO-BREAK SPACE}", table)


def table(study: Study, number: int, arm: str = "") -> str:
    """Return a table: a part for each recipe (that has `arm`); of no runs what is planned."""
    parts = []
    for block in (b for b in study.blocks(number) if arm in ("", *b.planned)):
        parts.append(scale(block))
        if block.all_rows:
            parts += [layout(SPECS[number], block), block.apart]
        else:
            arms = [f"`{arm}` ({block.done(arm)})" for arm in block.planned]
            parts.append(f"Queued: {', '.join(arms)}.")
    return "\n\n".join(filter(None, parts)) or "No runs planned."


def searched(study: Study) -> str:
    """Return what each search tried, in order, what it gave and what was best."""
    parts = []
    for name, rows in study.trials.items():
        state = replay(rows, read_search(study.root / "recipes" / f"{Path(name).stem}.toml"))
        parts += [f"`{name}`, {len(rows)} trials:", "```text\n" + "\n".join(show(state)) + "\n```"]
    return "\n\n".join(parts) or "Queued: no trial of the present versions is in `results/`."


def regions(study: Study) -> dict[str, str]:
    """Return what stands between the markers of the pages, by the marker's name."""
    claims, counts = ledger(study)
    tally = [[name, *(f"{found[v]}" for v in VERDICTS)] for name, found in counts.items()]
    verdicts = render(["scale", *VERDICTS], *tally)
    made = {f"table-{number}": table(study, number) for number in SPECS}
    made["headline"] = table(study, 1, SPARSE)
    return made | {"claims": claims, "verdicts": verdicts, "searches": searched(study),
                   "versions": study.left_out}  # fmt: skip


def pages(study: Study) -> dict[Path, str]:
    """Return every page with its text. Raises UserError for a marker that is not known."""
    made, found = regions(study), {}
    for name in PAGES:
        path = study.root / name

        def fill(match: re.Match[str], path: Path = path) -> str:
            if match[1] not in made:
                raise UserError(f"{path}: unknown marker '{match[1]}'; there are {list(made)}")
            return f"<!-- {match[1]}:begin -->\n\n{made[match[1]]}\n\n<!-- {match[1]}:end -->"

        found[path] = MARKED.sub(fill, path.read_text(encoding="utf-8"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 if --check found a page that differs, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to read and write")
    args = parser.parse_args(argv)
    try:
        for path, text in pages(read_study(args.root)).items():
            if not args.check:
                write_text(path, text)
            elif path.read_text(encoding="utf-8") != text:
                print(f"{path} is not what results/ give; run python recipes/tables.py")
                return 1
    except UserError as error:
        print(f"tables.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
