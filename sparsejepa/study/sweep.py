"""The sweep: arms times paired seeds, a table, figures, a page and a verdict.

The paper's first suggested experiment as one command. The dense arm and the lam=0 arm (the group
map without penalty) are always inside: a gain of a sparse arm counts against both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from sparsejepa.config import Config, preset
from sparsejepa.errors import UserError, nearest
from sparsejepa.study.page import Page, Table, save_png, sweep_pictures, write_page
from sparsejepa.study.results import Probes, Task
from sparsejepa.study.runs import run_tasks
from sparsejepa.study.verdict import Summary, Verdict, summarise, table, verdict

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = "results.jsonl"
REPORT = "report.html"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found. `rows`: one dictionary per run that did not fail, as in results.jsonl."""

    out: Path
    rows: list[dict[str, Any]]
    summary: Summary
    verdict: Verdict

    def show(self, console: Console) -> None:
        """Print the table, the floors last, the verdict and where the page lies."""
        header, lines = table(self.summary)
        rich = RichTable(box=SIMPLE_HEAD, padding=(0, 1), caption=caption(self.summary))
        for i, name in enumerate(header):
            rich.add_column(name, justify="right" if i else "left", no_wrap=i == 0, overflow="fold")
        for line in lines:
            rich.add_row(*line, style="dim" if line[0].endswith("floor") else None)
        console.print(rich)
        page = f"The page with figures: {self.out / REPORT}"
        for text in (self.verdict.text, *self.verdict.remarks, page):
            console.print(text, highlight=False, markup=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        header, lines = table(self.summary)
        return {
            "out": str(self.out),
            "report": str(self.out / REPORT),
            "results": str(self.out / RESULTS),
            "verdict": asdict(self.verdict),
            "uninformative": sorted(self.summary.uninformative),
            "table": {"header": header, "rows": lines},
            "runs": self.rows,
        }


def run_sweep(
    config: Config,
    *,
    lams: Sequence[float] = (),
    densities: Sequence[float] = (),
    seeds: int = 3,
    out: Path,
    probes: Probes | None = None,
    jobs: int | None = None,
    slurm: Sequence[str] = (),
    console: Console | None = None,
    command: str = "sparsejepa.run_sweep, called from Python",
    title: str | None = None,
) -> SweepResult:
    """Compare dense, lam=0, the given `lams` and `densities` over paired seeds.

    Args:
        config: all other settings; the seeds are ``config.run.seed`` and the ones after it.
        out: folder for one run directory per arm and seed, results.jsonl, figures and report.html.
        probes: what each run is probed on; every target of the pretraining data if not given.
        jobs, slurm, console: see `runs.run_tasks`.
        command: what repeats this sweep, for rows and page.

    Finished runs are not repeated, others go on from their checkpoints. Runs that failed because a
    loss was not finite are left out, and the verdict's remarks name them. Raises UserError as
    `runs.run_tasks` does, and if all runs failed.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    arms = sweep_arms(config, lams, densities)
    tasks = [
        Task(
            config.replace(**arm_settings(arm), seed=seed),
            out / f"{arm}-s{seed}",
            probes or Probes((config.data,)),
            command,
        )
        for seed in range(config.run.seed, config.run.seed + seeds)
        for arm in arms
    ]
    rows = run_tasks(tasks, out / RESULTS, jobs=jobs, slurm=slurm, console=console)
    failed = [row for row in rows if row.get("failed")]
    rows = [row for row in rows if not row.get("failed")]
    remarks = [f"{row['arm']}, seed {row['seed']}: failed, {row['failed']}." for row in failed]
    if not rows:
        raise UserError(f"{out}: all runs failed; {remarks[0]} Try a lower --lr in a new folder")
    summary = summarise(rows)
    found = verdict(summary)
    result = SweepResult(out, rows, summary, replace(found, remarks=(*found.remarks, *remarks)))
    _write_report(result, arms, title or f"Dense against sparse on {config.data}")
    return result


DEMO_LAM = 0.03
# Few targets and labelled images, so that the probes take seconds.
DEMO_PROBES = Probes(
    ("scenes", "scenes:single"),
    targets={"scenes": ("count",), "scenes:single": ("size", "x")},
    limit=3000,
)


def run_demo(
    out: Path, *, jobs: int | None = None, quick: bool = False, console: Console | None = None
) -> SweepResult:
    """Train dense, lam=0 and one sparse arm on the built-in scenes, probe count and factors.

    Minutes on two CPU cores, no network; `quick` shows in seconds that everything works and learns
    nothing. Otherwise as `run_sweep`.
    """
    few = {"limit": 256, "steps": 4, "batch_size": 32} if quick else {}
    return run_sweep(
        preset("demo").replace(**few),
        lams=(DEMO_LAM,),
        seeds=1,
        out=out,
        probes=replace(DEMO_PROBES, limit=200) if quick else DEMO_PROBES,
        jobs=jobs,
        console=console,
        command="sparsejepa demo" + (" --quick" if quick else ""),
        title="Dense against sparse on the built-in scenes",
    )


def sweep_arms(config: Config, lams: Sequence[float], densities: Sequence[float] = ()) -> list[str]:
    """Return the arms in order: dense, lam=0, rising lambdas, rising densities.

    Raises UserError if the settings have no group map.
    """
    if config.groups.groups == "none":
        raise UserError(
            "--groups none has no lambda to sweep; use region, concept or feature (a dense arm is "
            "always inside)"
        )
    levels = sorted({0.0, *map(float, lams)})
    return [
        "dense",
        *(f"lam={lam:g}" for lam in levels),
        *(f"density={density:g}" for density in sorted({*map(float, densities)})),
    ]


_NOT_AN_ARMS = {"seed", "holdout", "preset", "device", "threads", "data_root"}


def arm_settings(arm: str) -> dict[str, Any]:
    """Return the settings that make an arm, such as ``dense`` or ``density=0.25+beta=0``.

    An arm is dense, lam=NUMBER or density=NUMBER, the inverse of `training.build.arm_name`, and
    may go on with +SETTING=VALUE; several values of a setting have commas between them. Raises
    UserError for a name that is no arm.
    """
    first, *more = arm.split("+")
    kind, _, level = first.partition("=")
    settings: dict[str, Any] = {"lam": 0.0, "density": None, "pattern": "learned"}
    try:
        if first == "dense":
            settings["groups"] = "none"
        elif kind == "lam":
            settings["lam"] = float(level)
        else:
            settings = {"lam": 0.0, {"density": "density"}[kind]: float(level)}
    except (ValueError, KeyError):
        raise UserError(
            f"unknown arm '{arm}'; an arm is dense, lam=NUMBER or density=NUMBER, and may go on "
            "with +SETTING=VALUE"
        ) from None
    defaults = Config().flat()
    for item in more:
        name, equals, text = item.partition("=")
        if name not in defaults or not (equals and text):
            raise UserError(f"arm '{arm}': '{item}' is no SETTING=VALUE{nearest(name, defaults)}")
        if name in _NOT_AN_ARMS:
            raise UserError(f"arm '{arm}': '{name}' is not an arm's to set")
        values = [_value(word) for word in text.split(",")]
        several = len(values) > 1 or isinstance(defaults[name], tuple)
        settings[name] = tuple(values) if several else values[0]
    return settings


def _value(word: str) -> Any:
    """Read a number or true or false as TOML does; anything else is text."""
    try:
        return tomllib.loads(f"v = {word}")["v"]
    except tomllib.TOMLDecodeError:
        return word


def caption(summary: Summary) -> str:
    """Return what the table's figures mean."""
    seeds = max((len(v) for a in summary.arms for v in a.accuracy.values()), default=0)
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    paired = ", paired by seed, with the 95 % t interval" if seeds > 1 else ""
    return f"Accuracy in percent{spread}; differences in points{paired}."


def _write_report(result: SweepResult, arms: Sequence[str], title: str) -> None:
    """Write the figures as PNG and the page."""
    first, summary = result.rows[0], result.summary
    settings, about = first["settings"], first["environment"]
    pictures = sweep_pictures(summary)
    for picture in pictures:
        save_png(picture.figure, result.out / "figures" / f"{picture.name}.png")
    hardware = ", ".join(about["gpus"]) or f"{about['cpu']}, {about['cores']} cores"
    seeds = len({row["seed"] for row in result.rows})
    minutes = sum(row["seconds"] + row["probe_seconds"] for row in result.rows) / 60
    page = Page(
        title=title,
        subtitle=f"{settings['model']['encoder']} encoder, {first['steps']:,} steps of "
        f"{settings['optim']['batch_size']} images, {len(arms)} arms, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, on {hardware}.",
        verdict=result.verdict.text,
        remarks=[
            *result.verdict.remarks,
            "Curves, W and images of a run: sparsejepa explain RUN.",
        ],
        tables=[Table("Results", *table(summary), caption(summary))],
        pictures=pictures,
        command=first["command"],
        environment={
            "commit": about["commit"] or "not a source checkout",
            "versions": ", ".join(f"{x} {about[x]}" for x in ("sparsejepa", "torch", "python")),
            "hardware": hardware,
            "work": f"{minutes:.1f} process minutes for {len(result.rows)} runs and probes",
            "finished": max(row["finished"] for row in result.rows),
        },
        settings=tomli_w.dumps(settings),
    )
    write_page(result.out / REPORT, page)
