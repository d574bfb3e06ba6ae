"""The verbs that read what was learned: explain, compare."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional

from sparsejepa.errors import UserError
from sparsejepa.terminal import estimate_text, show_facts, show_rows
from sparsejepa.verbs.base import DATA, Verb, check_counts, image_size, split_names

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Explain(Verb):
    """Measure what a frozen encoder and its groups have learned, and show it on one page.

    Writes report.html and metrics.json into the run directory. A dense run and a public encoder
    have no groups: they are fitted to the frozen tokens, and the page says so.
    """

    run: Positional[str | None] = None
    """Run directory or timm:NAME."""
    data: str = ""
    """Images: a name (sparsejepa data list), hub:OWNER/NAME or a folder; labels, factors.csv and
    masks/ are used where there are any."""
    targets: str = ""
    """Only these labels of the data, separated by commas; all of them if not given."""
    factors: str = ""
    """Columns of the data to take as factors, separated by commas; its own labels if not given."""
    control: str | None = None
    """Another run to set beside this one, such as its dense or lam=0 twin."""
    quick: FlagCreatePairsOff[bool] = False
    """Leave out what is slow: DCI, Kraskov and density-ratio estimates, scores of random patterns,
    a fit for a control without groups, other seeds."""
    name: tuple[str, ...] = ()
    """Names for groups, such as 3=wheels 7="dark edges", kept in groups.json; 3= takes one away."""
    limit: int = 10_000
    """Training images, at most."""
    test_limit: int = 5_000
    """Test images, at most."""
    img_size: tuple[int, ...] = ()
    """Size that images are decoded to, one number or height and width. If not given that of the
    run's training for its own data, otherwise the images' own, or the encoder's if they have
    several."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    num_groups: int = 16
    """Groups to fit where the encoder has none."""
    groups: Literal["feature", "concept"] = "feature"
    """What a fitted group is; feature: it predicts a part of the embedding of its own."""
    density: float = 0.25
    """Share of connections that the fit keeps."""
    fit_steps: int = 600
    """Steps of that fit."""
    seed: int = 0
    """Seed of subsets, floors and fitted groups."""
    out: Path | None = None
    """Folder for the report; the run directory if not given, runs/explain-NAME for timm:NAME."""
    data_root: Path | None = None
    """Folder with local copies, in the hub's own layout or as official files; SPARSEJEPA_DATA if
    not given."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the encoder's matrix products; bf16 only where the hardware has it."""


def explain(args: Explain, console: Console) -> dict[str, Any]:
    """Explain, and print the verdict and the measures."""
    check_counts(args, "limit", "test_limit", "num_groups", "fit_steps")
    if not args.run:
        raise UserError("which encoder? Name a run directory or timm:NAME after the verb")
    if not args.data:
        raise UserError(f"--data is needed: {DATA}")
    if not 0 < args.density <= 1:
        raise UserError(f"--density {args.density:g}: must be above 0 and at most 1")
    names = _names(args.name)
    from sparsejepa.encoders.encoder import FITTED
    from sparsejepa.explain.run import METRICS, REPORT, Options, run_explain
    from sparsejepa.explain.subject import PostHoc, run_folder

    out = args.out or run_folder(args.run)
    found = run_explain(
        args.run,
        args.data,
        options=Options(
            targets=tuple(split_names(args.targets)),
            factors=tuple(split_names(args.factors)),
            control=args.control,
            limit=args.limit,
            test_limit=args.test_limit,
            img_size=image_size(args.img_size),
            upscale=args.upscale,
            quick=args.quick,
            posthoc=PostHoc(args.num_groups, args.groups, args.density, args.fit_steps),
            seed=args.seed,
            data_root=args.data_root,
            device=args.device,
            precision=args.precision,
        ),
        out=out,
        names=names,
        command=shlex.join(["sparsejepa", *sys.argv[1:]]),
        say=lambda text: console.print(text, highlight=False, markup=False),
    )
    show_measures(console, found["measures"])
    console.print(found["verdict"], highlight=False, markup=False)
    for remark in found["remarks"]:
        console.print(f"- {remark}", highlight=False, markup=False)
    if found["groups"]["post_hoc"]:
        console.print(f"The fitted groups, for --groups of embed and export: {out / FITTED}")
    console.print(f"The page: {out / REPORT}; the numbers: {out / METRICS}", highlight=False)
    return found


def _names(words: tuple[str, ...]) -> dict[int, str]:
    """Read --name 3=wheels."""
    names = {}
    for word in words:
        group, equals, name = word.partition("=")
        if not equals or not group.strip().isdecimal():
            raise UserError(f"--name {word}: write GROUP=NAME, such as 3=wheels")
        names[int(group)] = name.strip()
    return names


def show_measures(console: Console, measures: list[dict[str, Any]]) -> None:
    """Print one table per section, a row a measure and a column per encoder or floor."""
    for section in dict.fromkeys(row["section"] for row in measures):
        rows = [row for row in measures if row["section"] == section]
        columns = list(dict.fromkeys(name for row in rows for name in row["values"]))
        console.print(section, style="bold")
        show_rows(
            console,
            [
                {"measure": row["name"]}
                | {name: estimate_text(row["values"].get(name)) for name in columns}
                for row in rows
            ],
        )


@dataclass(frozen=True)
class Compare(Verb):
    """Put two explained runs on one page: measures, maps and which group matches which."""

    runs: Positional[tuple[str, ...]] = ()
    """Two run directories (or folders of a report) that `explain` has read on the same data."""
    out: Path | None = None
    """Page to write; compare-NAME.html beside the first run's report if not given."""


def compare(args: Compare, console: Console) -> dict[str, Any]:
    """Compare two runs."""
    if len(args.runs) != 2:
        raise UserError(f"compare takes two runs, got {len(args.runs)}")
    from sparsejepa.explain.compare import compare_runs

    first, second = (Path(run) for run in args.runs)
    command = shlex.join(["sparsejepa", *sys.argv[1:]])
    found = compare_runs(first, second, out=args.out, command=command)
    console.print(found["verdict"], highlight=False, markup=False)
    show_measures(console, found["measures"])
    show_facts(console, found["groups"], f"The page: {found['out']}")
    return found
