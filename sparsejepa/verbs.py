"""The verbs of the command line: each a dataclass (its flags and help) and a function.

A function takes the parsed dataclass and the console for people, and returns what ``--json``
prints. It imports what it needs when it runs; nothing heavy is imported with this module.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from sparsejepa.config import (
    PRESETS,
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
from sparsejepa.distributed import World, current, first_here
from sparsejepa.errors import TooFewImages, UserError, flag
from sparsejepa.explain.options import Options

if TYPE_CHECKING:
    from rich.console import Console

    from sparsejepa.data.images import Images
    from sparsejepa.encoders.encoder import Encoder
    from sparsejepa.training.loop import Run

T = TypeVar("T")
DATA = "a name (sparsejepa data list), hub:OWNER/NAME, a folder of images or tar shards"


@dataclass(frozen=True)
class Verb:
    """What every verb understands."""

    resumes: ClassVar[tuple[str, ...] | None] = None
    """Words to add to an interrupted command so that it goes on; None if it starts anew."""

    json: FlagCreatePairsOff[bool] = False
    """End standard output with one JSON object of everything found."""


@dataclass(frozen=True)
class Reading:
    """How images are read."""

    img_size: tuple[int, ...] = ()
    """Size that images are decoded to, one number or height and width. If not given that of the
    run's training for its own data, otherwise the images' own, or the encoder's if they have
    several."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    data_root: Path | None = None
    """Folder with local copies, in the hub's own layout or as official files; SPARSEJEPA_DATA if
    not given."""


# pretrain


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
    if (Path(config.data) / "config.toml").exists():
        raise UserError(
            f"{config.data}: a run directory in place of images; to go on with it: --resume "
            f"--out {config.data}"
        )
    from sparsejepa.data.catalog import load_images
    from sparsejepa.training.build import default_run_dir
    from sparsejepa.training.loop import plan, train

    run_dir = args.out or default_run_dir(config)
    if args.dry_run:
        if (size := World.from_environment().size) > 1:
            raise UserError(f"--dry-run: for one process and {size} were started")
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
    console.print(f"next: {again}", soft_wrap=True)
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
    console.print(
        f"batch size {batch} in place of {config.optim.batch_size}: there are only {count} "
        "training images"
    )
    return work(config.replace(batch_size=batch))


# sweep and demo


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
    slurm: tuple[str, ...] = ()
    """Make each run a job of a SLURM cluster, --jobs at a time, with these KEY=VALUE of sbatch,
    such as time=240 partition=gpu gpus-per-node=1."""
    groups: _SweptGroups = field(default_factory=_SweptGroups)  # type: ignore[assignment]
    """The group-sparse map; --lam and --density are lists here."""


def sweep(args: Sweep, console: Console) -> dict[str, Any]:
    """Run the sweep."""
    config = args.settings(args.data)
    from sparsejepa.study.results import Probes
    from sparsejepa.study.sweep import run_sweep

    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(config.data).name)
    out = args.out or Path("runs") / f"sweep-{name}"
    options: dict[str, Any] = {
        "lams": args.lam,
        "densities": args.density,
        "seeds": args.seeds,
        "out": out,
        "probes": Probes(
            tuple(split_names(args.data_eval)) or (config.data,), limit=args.probe_limit
        ),
        "jobs": args.jobs,
        "slurm": args.slurm,
        "console": console,
        "command": _command(),
    }
    found = _with_batch_that_fits(config, lambda c: run_sweep(c, **options), console)
    found.show(console)
    return found.to_dict()


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


# probe


@dataclass(frozen=True)
class Probe(Verb):
    """Probe frozen encoders on labelled data, beside the untrained and the raw-pixel floor."""

    runs: Positional[tuple[str, ...]] = ()
    """Run directories or timm:NAME."""
    data: str = ""
    """Data sets with labels, separated by commas."""
    protocol: str = "logistic"
    """logistic or knn, each also on a share of the labels (logistic:10%); several separated by
    commas."""
    targets: str = ""
    """Only these targets of the data, separated by commas; all of them if not given."""
    limit: int | None = None
    """Use at most this many training images."""
    pool: Literal["mean", "concat4"] = "mean"
    """mean: average of the last layer's patch tokens; concat4: of each of the last four layers."""
    seed: int = 0
    """Seed of the images that --limit takes, of the validation part and of the untrained floor."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    images: Reading = field(default_factory=Reading)


def probe(args: Probe, console: Console) -> dict[str, Any]:
    """Probe, and print one row per run, data set, target and protocol."""
    check_counts(args, "limit")
    if not args.runs:
        raise UserError("which run? Name run directories or timm:NAME after the verb")
    if not args.data:
        raise UserError(f"--data is needed: labelled images, {DATA}")
    from sparsejepa.data.catalog import cache_folder
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.probe import evaluate

    rows = evaluate(
        args.runs,
        split_names(args.data),
        protocols=split_names(args.protocol),
        targets=split_names(args.targets) or None,
        pool=args.pool,
        limit=args.limit,
        img_size=image_size(args.images.img_size),
        upscale=args.images.upscale,
        seed=args.seed,
        data_root=args.images.data_root,
        cache_dir=cache_folder(None) / "floors",
        device=resolve_device(args.device),
        progress=console.print,
    )
    table = [
        {
            "encoder": row.encoder,
            "data": row.data,
            "target": row.target,
            "protocol": row.protocol,
            "accuracy %": _percent(row.accuracy, row.interval),
            "untrained": _percent(row.untrained, row.untrained_interval),
            "pixels": _percent(row.pixels, row.pixels_interval),
            "chance": _percent(row.chance),
        }
        for row in rows
    ]
    show_rows(console, table)
    console.print("Brackets: 95 % interval over the test images; it says nothing of other seeds.")
    return {"probes": [row.to_dict() for row in rows]}


def _percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    """Return a share (0 to 1) in percent, with its interval if there is one."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else text


# explain and compare


@dataclass(frozen=True)
class Explain(Options, Verb):
    """Measure what a frozen encoder and its groups have learned, and show it on one page.

    Writes report.html and metrics.json into the run directory. A dense run and a public encoder
    have no groups: they are fitted to the frozen tokens, and the page says so.
    """

    run: Positional[str | None] = None
    """Run directory or timm:NAME."""
    data: str = ""
    """Images: a name (sparsejepa data list), hub:OWNER/NAME or a folder; labels, factors.csv and
    masks/ are used where there are any."""


def explain(args: Explain, console: Console) -> dict[str, Any]:
    """Explain, and print the verdict and the measures."""
    args.check()
    run = check_encoder(args.run)
    if not args.data:
        raise UserError(f"--data is needed: {DATA}")
    from sparsejepa.encoders.encoder import FITTED
    from sparsejepa.explain.run import METRICS, REPORT, run_explain, run_folder

    found = run_explain(run, args.data, options=args, command=_command(), say=console.print)
    out = args.out or run_folder(run)
    _show_measures(console, found["measures"])
    console.print(found["verdict"])
    for remark in found["remarks"]:
        console.print(f"- {remark}")
    if found["groups"]["post_hoc"]:
        console.print(f"The fitted groups, for --groups of embed and export: {out / FITTED}")
    console.print(f"The page: {out / REPORT}; the numbers: {out / METRICS}")
    return found


def _show_measures(console: Console, measures: list[dict[str, Any]]) -> None:
    """Print one table per section, a row a measure and a column per encoder or floor."""
    from sparsejepa.explain.compare import estimate_text

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
    found = compare_runs(first, second, out=args.out, command=_command())
    console.print(found["verdict"])
    _show_measures(console, found["measures"])
    show_facts(console, found["groups"], f"The page: {found['out']}")
    return found


# embed and export


@dataclass(frozen=True)
class Embed(Verb):
    """Write the features of images to a file, with file names, labels and group activations."""

    resumes = ()

    run: Positional[str | None] = None
    """Run directory, timm:NAME, hub:OWNER/NAME, or a file or folder of weights."""
    data: str = ""
    """Images: a name (sparsejepa data list), hub:OWNER/NAME, a folder or tar shards."""
    out: Path = Path("features.parquet")
    """File to write: .parquet or .npz."""
    split: Literal["train", "test"] = "train"
    """Which part of the data."""
    pool: Literal["mean", "concat4"] = "mean"
    """mean: average of the last layer's patch tokens; concat4: of each of the last four layers."""
    groups: str = "auto"
    """auto: activations of the encoder's own groups, if it has any; none; or a folder with groups,
    such as explain writes for an encoder without."""
    stream: FlagCreatePairsOff[bool] = False
    """Decode images while they are needed instead of keeping them decoded on disk; tar shards are
    always streamed."""
    limit: int | None = None
    """Only this many images, at random."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    images: Reading = field(default_factory=Reading)


def embed(args: Embed, console: Console) -> dict[str, Any]:
    """Embed a data set and write one row per image."""
    check_counts(args, "limit")
    run = check_encoder(args.run)
    if not args.data:
        raise UserError(f"--data is needed: {DATA}")
    from sparsejepa.encoders.load import load
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.features import check_path, embed_to, find_groups, say_enlarged

    check_path(args.out)
    encoder = load(run, resolve_device(args.device))
    activations = find_groups(run, args.groups, encoder)
    images = first_here(current(), lambda: _open(args, encoder, console.print)).subset(args.limit)
    say_enlarged(encoder, images.img_size, args.data, console.print)
    start = time.perf_counter()
    found = embed_to(args.out, encoder, images, pool=args.pool, groups=activations)
    facts = {
        "out": args.out,
        "encoder": encoder.name,
        "license": encoder.license,
        "data": args.data,
        "split": args.split,
        **found,
        "targets": list(images.targets),
        "seconds": time.perf_counter() - start,
    }
    show_facts(console, facts, f"wrote {args.out}")
    if args.split == "train" and Path(args.data).expanduser().exists():
        console.print("images of the test split are not in it: --split test")
    return facts


def _open(args: Embed, encoder: Encoder, say: Callable[[str], None]) -> Images:
    """Open the images at the size that the flags, the run or the encoder give."""
    from sparsejepa.data.catalog import load_dataset, only_streamed, stream_dataset
    from sparsejepa.evaluation.features import read_fitting

    open_dataset = stream_dataset if args.stream or only_streamed(args.data) else load_dataset

    def read(size: tuple[int, int] | None, upscale: bool) -> Images:
        return open_dataset(
            args.data,
            args.split,
            img_size=size,
            data_root=args.images.data_root,
            upscale=upscale,
        )

    return read_fitting(
        read,
        args.data,
        [args.run or ""],
        lambda: [encoder.img_size],
        img_size=image_size(args.images.img_size),
        upscale=args.images.upscale,
        say=say,
    )


FORMATS = ("timm", "transformers", "hub", "onnx")


@dataclass(frozen=True)
class Export(Verb):
    """Write an encoder and its groups for another program, and check what was written there."""

    run: Positional[str | None] = None
    """Run directory, timm:NAME, hub:OWNER/NAME, a folder or a file of weights."""
    to: str = ""
    """timm: timm.create_model; transformers: IJepaModel; hub: sparsejepa.load; onnx:
    onnxruntime."""
    out: Path | None = None
    """Folder to write."""
    groups: Path | None = None
    """Folder with the groups.safetensors to take, such as that of explain; the run's own if not
    given."""


def export(args: Export, console: Console) -> dict[str, Any]:
    """Export, and print the lines of Python that use the result."""
    run = check_encoder(args.run)
    if args.to not in FORMATS:
        raise UserError(f"--to {args.to}: name one of {', '.join(FORMATS)}")
    if args.out is None:
        raise UserError("--out is needed: the folder to write")
    from sparsejepa.encoders import export as exports
    from sparsejepa.encoders.load import load

    source = exports.Export(run, load(run), args.groups)
    found = exports.write_export(source, args.to, args.out)
    groups = source.groups
    facts = {
        "written": args.out,
        "files": ", ".join(found["files"]),
        "groups": "none" if groups is None else f"{len(groups.W)} of kind {groups.kind}",
        "largest difference": f"{found['difference']:.1e}",
        "license": source.encoder.license,
    }
    show_facts(console, facts, f"{args.run}: exported to {args.to}")
    console.print(f"\n{found['use']}", soft_wrap=True)
    if args.to == "hub":
        again = shlex.join(["hf", "upload", "OWNER/NAME", str(args.out)])
        console.print(f"to put it on the hub: {again}", soft_wrap=True)
    kind = None if groups is None else groups.kind
    return {"out": args.out, "to": args.to, "groups": kind, **found}


# masks, data, info


@dataclass(frozen=True)
class Masks(Verb):
    """Look at the masks that a grid and the mask flags give, or audit their coverage."""

    action: Positional[Literal["preview", "audit"]] = "preview"
    """preview: a picture of some; audit: every patch's share against exact enumeration."""
    img_size: tuple[int, ...] = (32,)
    """Image size in pixels, one number or height and width."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    predictor_pass: Literal["blocks", "union"] = "blocks"
    """As in pretrain: union merges the target blocks."""
    batch_size: int = 256
    """Images per step of the audit."""
    batches: int = 200
    """Steps of the audit."""
    count: int = 16
    """Masks in the preview."""
    seed: int = 0
    """Seed of the masks."""
    out: Path | None = None
    """Picture of the preview; masks-preview.png if not given."""


def masks(args: Masks, console: Console) -> dict[str, Any]:
    """Draw some masks, or print how often each patch is used and how often it should be."""
    check_counts(args, "batch_size", "batches", "count")
    if args.out and args.action == "audit":
        raise UserError(f"--out {args.out}: an audit has no picture; leave it out")
    config = Config(masks=args.masks).replace(
        img_size=args.img_size, patch_size=args.patch_size, predictor_pass=args.predictor_pass
    )
    size = image_size(args.img_size) or (32, 32)
    config.check().check_image(size)
    from sparsejepa.model.audit import audit
    from sparsejepa.study.page import mask_preview_figure, save_png
    from sparsejepa.training.build import build_sampler

    grid = (size[0] // args.patch_size, size[1] // args.patch_size)
    sampler = build_sampler(config, grid)
    found: dict[str, Any] = {
        "grid_size": list(grid),
        "target_shapes": [list(shape) for shape in sampler.target_shapes],
        "context_counts": list(sampler.context_counts),
    }
    if args.action == "audit":
        result = audit(sampler, batch_size=args.batch_size, batches=args.batches, seed=args.seed)
        found |= result.summary()
    else:
        found["out"] = args.out or Path("masks-preview.png")
        save_png(mask_preview_figure(sampler, args.count, args.seed), found["out"])
    show_facts(console, found, f"masks {args.action}")
    return found


@dataclass(frozen=True)
class Data(Verb):
    """List the data sets, fetch some into the cache, or check what they hold."""

    action: Positional[Literal["list", "get", "check"]] = "list"
    """list: every name and where it lies; get: fetch and decode; check: say what it holds."""
    names: Positional[tuple[str, ...]] = ()
    """Names, hub:OWNER/NAME or folders, for get and check."""
    images: Reading = field(default_factory=Reading)


def data(args: Data, console: Console) -> dict[str, Any]:
    """List, fetch or check data sets."""
    from sparsejepa.data.catalog import describe, list_datasets

    if args.action == "list":
        rows = [dataclasses.asdict(row) for row in list_datasets(args.images.data_root)]
        show_rows(console, rows)
        return {"datasets": rows}
    if not args.names:
        raise UserError(f"data {args.action}: which one? Give {DATA}")
    size, found = image_size(args.images.img_size), []
    for name in args.names:
        about = describe(
            name,
            img_size=size,
            data_root=args.images.data_root,
            upscale=args.images.upscale,
        )
        found.append(about)
        facts = {k: v for k, v in about.items() if k != "splits"}
        show_facts(console, facts, name)
        for split, values in about["splits"].items():
            skipped = [f"skipped {file}: {reason}" for file, reason in values["skipped"]]
            classes = {
                key: _first([f"{label} {count}" for label, count in counts.items()], ", ")
                for key, counts in values["classes"].items()
            }
            shown = values | {"classes": classes, "skipped": len(skipped)}
            show_facts(console, shown, f"{name}: {split}")
            if skipped:
                console.print(_first(skipped, "\n"), markup=False)
    return {"datasets": found}


def _first(texts: list[str], between: str, most: int = 10) -> str:
    """Join the first few texts, and say how many more there are."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return between.join([*texts[:most], *more])


@dataclass(frozen=True)
class Info(Verb):
    """Versions, hardware and presets; settings and last numbers of a run; architecture, licence and
    groups of an encoder."""

    run: Positional[str | None] = None
    """Run directory, timm:NAME, hub:OWNER/NAME, or a folder or file of weights."""


def info(args: Info, console: Console) -> dict[str, Any]:
    """Describe the installation, a run or an encoder."""
    if args.run is None:
        return _installation(console)
    folder = Path(args.run)
    if not (folder / "config.toml").exists():
        return _show_encoder(args.run, console)
    from sparsejepa.files import read_json
    from sparsejepa.study.results import read_rows
    from sparsejepa.training.loop import read_config

    config, last = read_config(folder), dict[str, Any]()
    finished = (folder / "summary.json").exists()
    try:
        for row in read_rows(folder / "metrics.jsonl"):
            last |= dict(row)
        if finished:
            last = dict(read_json(folder / "summary.json")["final"])
    except UserError:
        raise
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{folder}: its numbers are damaged; copy or train the run again") from None
    found = {"run": folder, "finished": finished, "config": config.to_dict(), "last": last}
    show_facts(console, config.flat(), f"{folder}: settings")
    state = "finished" if finished else "not finished; continue with --resume"
    show_facts(console, last, f"{folder}: {state}")
    return found | (_show_encoder(args.run, console) if finished else {})


def _installation(console: Console) -> dict[str, Any]:
    """Show versions, hardware and presets."""
    from sparsejepa.environment import environment

    presets = {name: {"about": one.about, "command": one.command} for name, one in PRESETS.items()}
    found: dict[str, Any] = {"environment": environment(), "presets": presets}
    show_facts(console, found["environment"], "environment")
    show_facts(console, {n: about["about"] for n, about in presets.items()}, "presets")
    return found


def _show_encoder(ref: str, console: Console) -> dict[str, Any]:
    """Show what an encoder is, and its groups."""
    from sparsejepa.encoders.encoder import load_groups
    from sparsejepa.encoders.load import folder_of, load

    encoder, folder = load(ref), folder_of(ref)
    groups = None if folder is None else load_groups(folder, encoder.grid_size)
    found: dict[str, Any] = {
        "encoder": ref,
        **encoder.architecture,
        "parameters": sum(p.numel() for p in encoder.model.parameters()),
        "license": encoder.license,
        "groups": None if groups is None else groups.kind,
    }
    if groups is not None:
        norms = groups.block_norms()
        found |= {
            "num_groups": len(groups.W),
            "density": float((norms > 0).float().mean()),
        }
    show_facts(console, found, f"{ref}: encoder")
    return {"architecture": found}


# What verbs share


def split_names(names: str) -> list[str]:
    """Return the names between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def image_size(numbers: tuple[int, ...]) -> tuple[int, int] | None:
    """Return height and width from what --img-size was given."""
    Config().replace(img_size=numbers).check()
    return (numbers[0], numbers[-1]) if numbers else None


def check_counts(verb: Verb, *names: str) -> None:
    """Raise UserError unless the fields `names` are at least 1 or not given."""
    for name in names:
        value = getattr(verb, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} {value}: must be at least 1")


def check_encoder(ref: str | None) -> str:
    """Return the encoder's name. Raises UserError if there is none."""
    if not ref:
        raise UserError("which encoder? Name a run directory or timm:NAME after the verb")
    return ref


def _command() -> str:
    """Return the command that this process was started by, for pages and results."""
    return shlex.join(["sparsejepa", *sys.argv[1:]])


def show_facts(console: Console, facts: Mapping[str, Any], title: str) -> None:
    """Print names and values in two columns, nested names joined."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        rows = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, item in rows:
            table.add_row(f"{name} {inner}".strip().replace("_", " "), _text(item))
    console.print(title, style="bold")
    console.print(table)


def show_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print dictionaries with the same keys as a table, numbers to the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in rows[0] if rows else ():
        number = isinstance(rows[0][name], int | float)
        table.add_column(name.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)


def _text(value: Any) -> str:
    """Return a value as a cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple) and value:
        return ", ".join("x".join(map(str, v)) if isinstance(v, list) else _text(v) for v in value)
    return "-" if value in (None, "", [], ()) else str(value).replace("\n", "\\n")


VERBS: dict[str, tuple[type[Verb], Callable[[Any, Any], dict[str, Any]]]] = {
    "demo": (Demo, demo),
    "pretrain": (Pretrain, pretrain),
    "probe": (Probe, probe),
    "sweep": (Sweep, sweep),
    "explain": (Explain, explain),
    "compare": (Compare, compare),
    "masks": (Masks, masks),
    "data": (Data, data),
    "embed": (Embed, embed),
    "export": (Export, export),
    "info": (Info, info),
}
