"""The verbs of the command line, each a dataclass: its fields are its flags, its text is its help.

Called with the console for people, it does its work and returns what ``--json`` prints. It imports
what it needs when it runs; nothing heavy is imported with this module.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from sparsejepa.config import PRESETS, Config, GroupConfig, MaskConfig, preset
from sparsejepa.distributed import World, current, first_here
from sparsejepa.errors import TooFewImages, UserError, flag
from sparsejepa.explain.options import Options

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
DATA = "a name (sparsejepa data list), hub:OWNER/NAME, a folder of images or tar shards"


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What every verb understands."""

    resumes: ClassVar[tuple[str, ...] | None] = None
    """Words to add to an interrupted command so that it goes on; None if it starts anew."""

    json: FlagCreatePairsOff[bool] = False
    """End standard output with one JSON object of everything found."""

    def __call__(self, console: Console) -> dict[str, Any]:
        raise NotImplementedError


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

    def keywords(self) -> dict[str, Any]:
        """Return what functions that read images take."""
        Config().replace(img_size=self.img_size).check()
        size = (self.img_size[0], self.img_size[-1]) if self.img_size else None
        return {"img_size": size, "upscale": self.upscale, "data_root": self.data_root}


@dataclass(frozen=True)
class Settings(Config, Verb):
    """All settings of a pretraining run as flags."""

    data: Positional[str | None] = None  # type: ignore[assignment]
    """Images: a name (sparsejepa data list), hub:OWNER/NAME, a folder or tar shards."""
    preset: str = "best"
    """Named settings to start from, see sparsejepa info; the defaults shown are those of best."""
    config: Path | None = None
    """TOML file of settings to start from, such as a run's config.toml; flags win over it."""

    @classmethod
    def of(cls, config: Config, data: str | None = None) -> Self:
        """Return the flags that describe `config`."""
        values: dict[str, Any] = vars(config) | {"data": data}
        if cls is Sweep:
            values["groups"] = _SweptGroups(**vars(config.groups))
        return cls(**values)

    def settings(self) -> Config:
        """Return the checked `Config` that the flags describe. Raises UserError without data."""
        if not self.data:
            raise UserError(f"which images? Name them after the verb: {DATA}")
        sections: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(Config)
        }
        sections["groups"] = GroupConfig(**vars(self.groups))
        config = Config(**sections)
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

    out: Path | None = None
    """Run directory; runs/DATA-ARM-sSEED if not given."""
    resume: FlagCreatePairsOff[bool] = False
    """Go on with the run in --out, with its own settings."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Only say what would be done, and how long it would take; nothing is written."""

    def __call__(self, console: Console) -> dict[str, Any]:
        if self.resume and not self.data:
            where = f"in {self.out}" if self.out else "to be found"
            raise UserError(f"--resume: there is no run {where}; name its folder with --out")
        config = self.settings()
        if (Path(config.data) / "config.toml").exists():
            raise UserError(
                f"{config.data}: a run directory in place of images; to go on with it: --resume "
                f"--out {config.data}"
            )
        from sparsejepa.data.catalog import load_images
        from sparsejepa.training.build import default_run_dir
        from sparsejepa.training.loop import plan, train

        run_dir = self.out or default_run_dir(config)
        if self.dry_run:
            if (size := World.from_environment().size) > 1:
                raise UserError(f"--dry-run: for one process and {size} were started; start one")
            found = _with_batch_that_fits(config, partial(plan, images=load_images), console)
            found["would_write"] = str(run_dir)
            show_facts(console, found, "dry run: nothing was written")
            return found
        if self.resume and not (run_dir / "config.toml").exists():
            console.print(f"--resume: no run in {run_dir} yet, a new one starts")
        go = partial(train, images=load_images, out=run_dir, resume=self.resume, console=console)
        run = _with_batch_that_fits(config, go, console)
        last = run.summary["final"]
        facts = {x: run.summary[x] for x in ("arm", "steps", "seconds", "images_per_second")}
        # Of the last numbers those that say something without a manual.
        telling = ("loss", "knn", "rankme", "density", "groups_per_latent", "dead_groups")
        facts |= {name: last[name] for name in telling if last.get(name) is not None}
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
    asked = batch = config.optim.batch_size
    try:
        return work(config)
    except TooFewImages as error:
        if asked != preset(config.preset).optim.batch_size or error.count < 2:
            raise
        count = error.count
    while batch > count:
        batch //= 2
    console.print(f"batch size {batch} in place of {asked}: there are only {count} training images")
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

    def __call__(self, console: Console) -> dict[str, Any]:
        config = self.settings()
        from sparsejepa.study.results import Probes
        from sparsejepa.study.sweep import run_sweep

        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(config.data).name)
        out = self.out or Path("runs") / f"sweep-{name}"
        go = partial(
            run_sweep,
            lams=self.lam,
            densities=self.density,
            seeds=self.seeds,
            out=out,
            probes=Probes(tuple(_split(self.data_eval or config.data)), limit=self.probe_limit),
            jobs=self.jobs,
            slurm=self.slurm,
            console=console,
            command=_command(),
        )
        found = _with_batch_that_fits(config, go, console)
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

    def __call__(self, console: Console) -> dict[str, Any]:
        from sparsejepa.study.sweep import run_demo

        found = run_demo(self.out, jobs=self.jobs, quick=self.quick, console=console)
        found.show(console)
        return found.to_dict()


@dataclass(frozen=True, kw_only=True)
class Probe(Verb):
    """Probe frozen encoders on labelled data, beside the untrained and the raw-pixel floor."""

    runs: Positional[tuple[str, ...]]
    """Run directories or timm:NAME."""
    data: str
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
    """auto, cpu, mps, cuda or cuda:N."""
    images: Reading = field(default_factory=Reading)

    def __call__(self, console: Console) -> dict[str, Any]:
        _check_counts(self, "limit")
        if not self.runs:
            raise UserError("which run? Name run directories or timm:NAME after the verb")
        from sparsejepa.data.catalog import cache_folder
        from sparsejepa.environment import resolve_device
        from sparsejepa.evaluation.probe import evaluate

        rows = evaluate(
            self.runs,
            _split(self.data),
            protocols=_split(self.protocol),
            targets=_split(self.targets) or None,
            pool=self.pool,
            limit=self.limit,
            seed=self.seed,
            cache_dir=cache_folder(None) / "floors",
            device=resolve_device(self.device),
            progress=console.print,
            **self.images.keywords(),
        )
        table = [
            {name: getattr(row, name) for name in ("encoder", "data", "target", "protocol")}
            | {
                "accuracy %": _percent(row.accuracy, row.interval),
                "untrained": _percent(row.untrained, row.untrained_interval),
                "pixels": _percent(row.pixels, row.pixels_interval),
                "chance": _percent(row.chance),
            }
            for row in rows
        ]
        show_rows(console, table)
        console.print("Brackets: 95 % interval over the test images, says nothing of other seeds.")
        return {"probes": [row.to_dict() for row in rows]}


@dataclass(frozen=True, kw_only=True)
class Explain(Options, Verb):
    """Measure what a frozen encoder and its groups have learned, and show it on one page.

    Writes report.html and metrics.json into the run directory. A dense run and a public encoder
    have no groups: they are fitted to the frozen tokens, and the page says so.
    """

    run: Positional[str]
    """Run directory or timm:NAME."""
    data: str
    """Images: a name (sparsejepa data list), hub:OWNER/NAME or a folder; labels, factors.csv and
    masks/ are used where there are any."""

    def __call__(self, console: Console) -> dict[str, Any]:
        from sparsejepa.encoders.encoder import FITTED
        from sparsejepa.explain.run import METRICS, REPORT, run_explain, run_folder

        about: Any = {"command": _command(), "say": console.print}
        found = run_explain(self.run, self.data, options=self, **about)
        out = self.out or run_folder(self.run)
        _show_measures(console, found["measures"])
        for line in (found["verdict"], *(f"- {remark}" for remark in found["remarks"])):
            console.print(line)
        if found["groups"]["post_hoc"]:
            console.print(f"The fitted groups, for --groups of embed and export: {out / FITTED}")
        console.print(f"The page: {out / REPORT}; the numbers: {out / METRICS}")
        return found


@dataclass(frozen=True, kw_only=True)
class Compare(Verb):
    """Put two explained runs on one page: measures, maps and which group matches which."""

    runs: Positional[tuple[Path, Path]]
    """Two run directories (or folders of a report) that `explain` has read on the same data."""
    out: Path | None = None
    """Page to write; compare-NAME.html beside the first run's report if not given."""

    def __call__(self, console: Console) -> dict[str, Any]:
        from sparsejepa.explain.compare import compare_runs

        found = compare_runs(*self.runs, out=self.out, command=_command())
        console.print(found["verdict"])
        _show_measures(console, found["measures"])
        show_facts(console, found["groups"], f"The page: {found['out']}")
        return found


def _show_measures(console: Console, measures: list[dict[str, Any]]) -> None:
    """Print one table per section, a row a measure and a column per encoder or floor."""
    from sparsejepa.explain.compare import estimate_text

    for section in dict.fromkeys(row["section"] for row in measures):
        rows = [row for row in measures if row["section"] == section]
        columns = dict.fromkeys(name for row in rows for name in row["values"])
        console.print(section, style="bold")
        texts = [{n: estimate_text(row["values"].get(n)) for n in columns} for row in rows]
        named = zip(rows, texts, strict=True)
        show_rows(console, [{"measure": row["name"], **text} for row, text in named])


@dataclass(frozen=True, kw_only=True)
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
    batches: int = 200
    """Steps of the audit, of 256 images each."""
    count: int = 16
    """Masks in the preview."""
    seed: int = 0
    """Seed of the masks."""
    out: Path | None = None
    """Picture of the preview; masks-preview.png if not given."""

    def __call__(self, console: Console) -> dict[str, Any]:
        _check_counts(self, "batches", "count")
        if self.out and self.action == "audit":
            raise UserError(f"--out {self.out}: an audit has no picture; leave it out")
        size, patch = self.img_size or (32,), self.patch_size
        config = Config(masks=self.masks).replace(
            img_size=size, patch_size=patch, predictor_pass=self.predictor_pass
        )
        config.check().check_image((size[0], size[-1]))
        from sparsejepa.model.audit import audit
        from sparsejepa.study.page import mask_preview_figure, save_png
        from sparsejepa.training.build import build_sampler

        sampler = build_sampler(config, (size[0] // patch, size[-1] // patch))
        found: dict[str, Any] = {
            "grid_size": list(sampler.grid_size),
            "target_shapes": [list(shape) for shape in sampler.target_shapes],
            "context_counts": list(sampler.context_counts),
        }
        if self.action == "audit":
            result = audit(sampler, batch_size=256, batches=self.batches, seed=self.seed)
            found |= result.summary()
        else:
            found["out"] = self.out or Path("masks-preview.png")
            save_png(mask_preview_figure(sampler, self.count, self.seed), found["out"])
        show_facts(console, found, f"masks {self.action}")
        return found


@dataclass(frozen=True)
class Data(Verb):
    """List the data sets, fetch some into the cache, or check what they hold."""

    action: Positional[Literal["list", "get", "check"]] = "list"
    """list: every name and where it lies; get: fetch and decode; check: say what it holds."""
    names: Positional[tuple[str, ...]] = ()
    """Names, hub:OWNER/NAME or folders, for get and check."""
    images: Reading = field(default_factory=Reading)

    def __call__(self, console: Console) -> dict[str, Any]:
        from sparsejepa.data.catalog import describe, list_datasets

        if self.action == "list":
            rows = [asdict(row) for row in list_datasets(self.images.data_root)]
            show_rows(console, rows)
            return {"datasets": rows}
        if not self.names:
            raise UserError(f"data {self.action}: which one? Give {DATA}")
        found = []
        for name in self.names:
            about = describe(name, **self.images.keywords())
            found.append(about)
            show_facts(console, {k: v for k, v in about.items() if k != "splits"}, name)
            for split, values in about["splits"].items():
                shown = dict(values)
                for key, counts in shown.pop("classes").items():
                    shown[f"classes, {key}"] = _first([f"{k}: {n}" for k, n in counts.items()])
                shown["skipped"] = _first([f"{file} ({why})" for file, why in values["skipped"]])
                show_facts(console, shown, f"{name}: {split}")
        return {"datasets": found}


@dataclass(frozen=True, kw_only=True)
class Embed(Verb):
    """Write the features of images to a file, with file names, labels and group activations."""

    resumes = ()

    run: Positional[str]
    """Run directory, timm:NAME, hub:OWNER/NAME, or a file or folder of weights."""
    data: str
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
    """auto, cpu, mps, cuda or cuda:N."""
    images: Reading = field(default_factory=Reading)

    def __call__(self, console: Console) -> dict[str, Any]:
        _check_counts(self, "limit")
        from sparsejepa.data.catalog import load_dataset, only_streamed, stream_dataset
        from sparsejepa.encoders.load import load
        from sparsejepa.environment import resolve_device
        from sparsejepa.evaluation import features

        features.check_path(self.out)
        encoder = load(self.run, resolve_device(self.device))
        groups = features.find_groups(self.run, self.groups, encoder)
        streamed = self.stream or only_streamed(self.data)
        wanted, open_dataset = self.images.keywords(), stream_dataset if streamed else load_dataset
        root = wanted.pop("data_root")

        def read(size: Any, upscale: bool) -> Any:
            options: Any = {"img_size": size, "upscale": upscale, "data_root": root}
            return open_dataset(self.data, self.split, **options)

        wanted |= {"sizes": lambda: [encoder.img_size], "say": console.print}
        fitting = partial(features.read_fitting, read, self.data, [self.run], **wanted)
        images = first_here(current(), fitting).subset(self.limit)
        features.say_enlarged(encoder, images.img_size, self.data, console.print)
        start = time.perf_counter()
        found = features.embed_to(self.out, encoder, images, pool=self.pool, groups=groups)
        facts = {"out": self.out, "encoder": encoder.name, "license": encoder.license}
        facts |= {"data": self.data, "split": self.split, **found, "targets": list(images.targets)}
        facts["seconds"] = time.perf_counter() - start
        show_facts(console, facts, f"wrote {self.out}")
        if self.split == "train" and Path(self.data).expanduser().exists():
            console.print("images of the test split are not in it: --split test")
        return facts


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Write an encoder and its groups for another program, and check what was written there."""

    run: Positional[str]
    """Run directory, timm:NAME, hub:OWNER/NAME, a folder or a file of weights."""
    to: Literal["timm", "transformers", "hub", "onnx"]
    """timm: timm.create_model; transformers: IJepaModel; hub: sparsejepa.load; onnx:
    onnxruntime."""
    out: Path
    """Folder to write."""
    groups: Path | None = None
    """Folder with the groups.safetensors to take, such as that of explain; the run's own if not
    given."""

    def __call__(self, console: Console) -> dict[str, Any]:
        from sparsejepa.encoders import export
        from sparsejepa.encoders.load import load

        source = export.Export(self.run, load(self.run), self.groups)
        found = export.write_export(source, self.to, self.out)
        kind = None if source.groups is None else source.groups.kind
        facts = {"written": self.out, "files": found["files"], "groups": kind}
        facts["largest difference"] = f"{found['difference']:.1e}"
        facts["license"] = source.encoder.license
        show_facts(console, facts, f"{self.run}: exported to {self.to}")
        console.print(f"\n{found['use']}", soft_wrap=True)
        if self.to == "hub":
            again = shlex.join(["hf", "upload", "OWNER/NAME", str(self.out)])
            console.print(f"to put it on the hub: {again}", soft_wrap=True)
        return {"out": self.out, "to": self.to, "groups": kind, **found}


@dataclass(frozen=True)
class Info(Verb):
    """Show what is installed, or what a run or another encoder is."""

    run: Positional[str | None] = None
    """Run directory, timm:NAME, hub:OWNER/NAME, or a folder or file of weights."""

    def __call__(self, console: Console) -> dict[str, Any]:
        if self.run is None:
            from sparsejepa.environment import environment

            found: dict[str, Any] = {"environment": environment(), "presets": {}}
            for name, one in PRESETS.items():
                found["presets"][name] = {"about": one.about, "command": one.command}
            show_facts(console, found["environment"], "environment")
            show_facts(console, {n: x["about"] for n, x in found["presets"].items()}, "presets")
            return found
        folder = Path(self.run)
        if not (folder / "config.toml").exists():
            return _show_encoder(self.run, console)
        from sparsejepa.encoders.encoder import refusing
        from sparsejepa.files import read_json
        from sparsejepa.study.results import read_rows
        from sparsejepa.training.loop import read_config

        config, last = read_config(folder), dict[str, Any]()
        finished = (folder / "summary.json").exists()
        with refusing(f"{folder}: its numbers are damaged", "copy or train the run again"):
            for row in read_rows(folder / "metrics.jsonl"):
                last |= dict(row)
            if finished:
                last = dict(read_json(folder / "summary.json")["final"])
        unused = "epochs" if config.optim.steps else "steps"
        settings = {name: value for name, value in config.flat().items() if name != unused}
        show_facts(console, settings, f"{folder}: settings")
        state = "finished" if finished else "not finished; continue with --resume"
        show_facts(console, last, f"{folder}: {state}")
        found = {"run": folder, "finished": finished, "config": config.to_dict(), "last": last}
        return found | (_show_encoder(self.run, console) if finished else {})


def _show_encoder(ref: str, console: Console) -> dict[str, Any]:
    """Show architecture and licence of an encoder, and its groups."""
    from sparsejepa.encoders.encoder import load_groups
    from sparsejepa.encoders.load import folder_of, load

    encoder, folder = load(ref), folder_of(ref)
    groups = None if folder is None else load_groups(folder, encoder.grid_size)
    found: dict[str, Any] = {"encoder": ref, **encoder.architecture}
    found["parameters"] = sum(p.numel() for p in encoder.model.parameters())
    found |= {"license": encoder.license, "groups": None if groups is None else groups.kind}
    if groups is not None:
        density = float((groups.block_norms() > 0).float().mean())
        found |= {"num_groups": len(groups.W), "density": density}
    show_facts(console, found, f"{ref}: encoder")
    return {"architecture": found}


def _first(texts: list[str], most: int = 10) -> list[str]:
    """Return the first few texts, and how many more there are."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return [*texts[:most], *more]


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _check_counts(verb: Verb, *names: str) -> None:
    """Raise UserError unless the fields `names` are at least 1 or not given."""
    for name in names:
        value = getattr(verb, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} {value}: must be at least 1")


def _command() -> str:
    """Return the command that this process was started by, for pages and results."""
    return shlex.join(["sparsejepa", *sys.argv[1:]])


def show_facts(console: Console, facts: Mapping[str, Any], title: str) -> None:
    """Print names and values in two columns, nested names joined."""
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        rows += [(f"{name} {key}".strip(), item) for key, item in inner.items()]
    console.print(title, style="bold")
    show_rows(console, [{"": name.replace("_", " "), " ": item} for name, item in rows])


def show_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print dictionaries with the same keys as a table."""
    from rich.table import Table

    names = [name.replace("_", " ") for name in rows[0]] if rows else []
    table = Table(*names, box=None, padding=(0, 2, 0, 0), show_header=any(map(str.strip, names)))
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


def _percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    """Return a share (0 to 1) in percent, with its interval if there is one."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else text


_ALL = (Demo, Pretrain, Probe, Sweep, Explain, Compare, Masks, Data, Embed, Export, Info)
VERBS: dict[str, type[Verb]] = {verb.__name__.lower(): verb for verb in _ALL}
