"""The verbs that train: demo, pretrain, sweep."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from sparsejepa.config import (
    Config,
    DataConfig,
    EncoderConfig,
    GroupConfig,
    LossConfig,
    MaskConfig,
    OptimConfig,
    RunConfig,
    preset,
)
from sparsejepa.distributed import World
from sparsejepa.errors import TooFewImages, UserError, flag
from sparsejepa.terminal import show_facts
from sparsejepa.verbs.base import DATA, Verb, split_names

if TYPE_CHECKING:
    from rich.console import Console

    from sparsejepa.study.cluster import Cluster
    from sparsejepa.training.loop import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Settings(Verb):
    """All settings of a pretraining run as flags."""

    preset: str = "best"
    """Named settings to start from, see sparsejepa info; the defaults shown are those of best."""
    config: Path | None = None
    """TOML file of settings to start from, such as a run's config.toml; flags win over it."""
    images: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    groups: GroupConfig = field(default_factory=GroupConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def of(cls, config: Config, data: str | None = None) -> Self:
        """Return the flags that describe `config`."""
        names = {f.name for f in dataclasses.fields(cls)} - {"data"}
        same = {name: value for name, value in vars(config).items() if name in names}
        if cls is Sweep:
            same["groups"] = _SweptGroups(**vars(config.groups))
        return cls(data=data, **same)  # type: ignore[call-arg]

    def settings(self, data: str | None) -> Config:
        """Return the checked `Config` that the flags describe. Raises UserError without data."""
        if not data:
            raise UserError(f"which images? Name them after the verb: {DATA}")
        sections = {f.name: getattr(self, f.name) for f in dataclasses.fields(Config)[1:]}
        sections["groups"] = GroupConfig(**vars(self.groups))
        config = Config(data=data, **sections)
        # A sweep has a list of densities: what needs one is checked with the first.
        levels = getattr(self, "density", ())
        (config.replace(density=levels[0]) if levels else config).check()
        return config


@dataclass(frozen=True)
class Demo(Verb):
    """The main job on the built-in scenes: dense against sparse, a table and a page.

    Takes minutes on two CPU cores and needs no network.
    """

    resumes = ()

    out: Path = Path("runs/demo")
    """Folder for the runs and the page."""
    jobs: int | None = None
    """Runs at a time; one per CPU core, four at most, if not given."""
    quick: FlagCreatePairsOff[bool] = False
    """Only show that everything works: too short to learn anything."""


def demo(args: Demo, console: Console) -> dict[str, Any]:
    """Run the demo."""
    from sparsejepa.study.sweep import run_demo

    found = run_demo(args.out, jobs=args.jobs, quick=args.quick, console=console)
    found.show(console)
    return found.to_dict()


@dataclass(frozen=True)
class Pretrain(Settings):
    """Pretrain an encoder without labels; --groups none is the dense JEPA.

    Writes a run directory. With --resume it goes on from the newest checkpoint there.
    """

    resumes = ("--resume",)

    data: Positional[str | None] = None
    """Images: a name (sparsejepa data list), hub:OWNER/NAME, a folder or tar shards."""
    out: Path | None = None
    """Run directory; runs/DATA-ARM-sSEED if not given."""
    resume: FlagCreatePairsOff[bool] = False
    """Go on with the run in --out, with its own settings."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Only say what would be done: time, memory, mask counts, files."""


# Of a run's last numbers, those that say something without a manual.
_TELLING = ("loss", "knn", "rankme", "density", "groups_per_latent", "dead_groups")


def pretrain(args: Pretrain, console: Console) -> dict[str, Any]:
    """Pretrain, or plan to."""
    if args.resume and not args.data:
        where = f"in {args.out}" if args.out else "to be found"
        raise UserError(f"--resume: there is no run {where}; name its folder with --out")
    config = args.settings(args.data)
    from sparsejepa.data.catalog import load_images
    from sparsejepa.training.build import default_run_dir
    from sparsejepa.training.loop import plan, train

    run_dir = args.out or default_run_dir(config)
    if args.dry_run:
        if (size := World.from_environment().size) > 1:
            raise UserError(
                f"--dry-run: for one process and {size} were started; start it without torchrun or "
                "srun"
            )

        found = _with_batch_that_fits(config, lambda c: plan(c, load_images), console)
        found["would_write"] = str(run_dir)
        show_facts(console, found, "dry run: nothing was written")
        return found
    if args.resume and not (run_dir / "config.toml").exists():
        console.print(f"--resume: no run in {run_dir} yet, a new one starts")

    def go(config: Config) -> Run:
        return train(config, load_images, out=run_dir, resume=args.resume, console=console)

    run = _with_batch_that_fits(config, go, console)
    last = run.summary["final"]
    facts = {name: run.summary[name] for name in ("arm", "steps", "seconds", "images_per_second")}
    facts |= {name: last[name] for name in _TELLING if last.get(name) is not None}
    show_facts(console, facts | {"alarms": run.summary["alarms"]}, f"finished: {run.path}")
    # Only images with labels can be probed, and only these have an accuracy while training.
    verb = "explain" if last.get("knn") is None else "probe"
    again = shlex.join(["sparsejepa", verb, str(run.path), "--data", config.data])
    console.print(f"next: {again}", markup=False, soft_wrap=True)
    return {"run": run.path, "summary": run.summary, "config": run.config.to_dict()}


def _with_batch_that_fits(config: Config, work: Callable[[Config], T], console: Console) -> T:
    """Return what `work` makes of the settings, with a smaller batch if there are few images.

    Only the preset's own batch size is halved until it fits; one that was asked for is refused.
    """
    batch = config.optim.batch_size
    try:
        return work(config)
    except TooFewImages as error:
        if batch != preset(config.preset).optim.batch_size or error.count < 2:
            raise
        count = error.count
    while batch > count:
        batch //= 2
    console.print(f"batch size {batch}: there are only {count} training images")
    return work(config.replace(batch_size=batch))


@dataclass(frozen=True)
class _SweptGroups(GroupConfig):
    """The group-sparse map; --lam and --density are lists here."""

    lam: Annotated[float, tyro.conf.Fixed, tyro.conf.Suppress] = 0.01
    density: Annotated[float | None, tyro.conf.Fixed, tyro.conf.Suppress] = None


@dataclass(frozen=True)
class Sweep(Settings):
    """Compare lambdas with paired seeds; dense and lambda = 0 are always among the arms.

    Finished runs are not repeated: the same command again goes on where it was interrupted.
    """

    resumes = ()

    data: Positional[str | None] = None
    """Images: a name (sparsejepa data list), hub:OWNER/NAME, a folder or tar shards."""
    lam: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1)
    """Group-lasso penalties, one arm each."""
    density: tuple[float, ...] = ()
    """Wanted densities, one arm each."""
    seeds: int = 3
    """Runs per arm; the seeds are --seed, --seed + 1, ..."""
    jobs: int | None = None
    """Runs at a time; one per CPU core, four at most, if not given."""
    data_eval: str = ""
    """Labelled data to probe on, separated by commas; DATA itself if not given."""
    probe_limit: int | None = None
    """Labelled training images per probe, a random subset; all of them if not given."""
    out: Path | None = None
    """Folder of the sweep; runs/sweep-DATA if not given."""
    cluster: Literal["none", "slurm"] = "none"
    """slurm: each run is a job of the cluster, --jobs at a time. The jobs go on when this command
    ends, and the same command again collects them."""
    slurm_partition: str | None = None
    """Partition of the jobs; the cluster's default if not given."""
    slurm_time: int = 24 * 60
    """Minutes after which a job saves and is queued again."""
    slurm_gpus: int = 0
    """GPUs of a job, 0 or 1."""
    slurm_cpus: int | None = None
    """CPU cores of a job; the cluster's default if not given."""
    slurm_more: tuple[str, ...] = ()
    """Anything else that sbatch takes, as KEY=VALUE, such as account=vision mem=16G."""
    groups: _SweptGroups = field(default_factory=_SweptGroups)  # type: ignore[assignment]
    """The group-sparse map; --lam and --density are lists here."""


def _cluster(args: Sweep, out: Path) -> Cluster | None:
    """Return what jobs get, None if runs are no jobs. Raises UserError for flags without use."""
    fields = [f for f in dataclasses.fields(args) if f.name.startswith("slurm_")]
    given = {f.name: getattr(args, f.name) for f in fields}
    if args.cluster == "none":
        for f in fields:
            if given[f.name] != f.default:
                raise UserError(f"{flag(f.name)} {given[f.name]}: only with --cluster slurm")
        return None
    from sparsejepa.study.cluster import Cluster

    flags = {name.removeprefix("slurm_"): value for name, value in given.items()}
    return Cluster(out / "jobs", minutes=flags.pop("time"), **flags).check()


def sweep(args: Sweep, console: Console) -> dict[str, Any]:
    """Run the sweep."""
    config = args.settings(args.data)
    from sparsejepa.study.sweep import run_sweep
    from sparsejepa.study.tasks import Probes

    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(config.data).name)
    out = args.out or Path("runs") / f"sweep-{name}"
    found = run_sweep(
        config,
        lams=args.lam,
        densities=args.density,
        seeds=args.seeds,
        out=out,
        probes=Probes(tuple(split_names(args.data_eval)) or (config.data,), limit=args.probe_limit),
        jobs=args.jobs,
        cluster=_cluster(args, out),
        console=console,
        command=shlex.join(["sparsejepa", *sys.argv[1:]]),
    )
    found.show(console)
    return found.to_dict()
