"""The verbs that look at runs, data and masks: probe, masks, data, info."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from sparsejepa.config import PRESETS, Config, MaskConfig
from sparsejepa.errors import UserError
from sparsejepa.terminal import percent, show_facts, show_rows
from sparsejepa.verbs.base import DATA, Verb, check_counts, image_size, split_names

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Probe(Verb):
    """Probe frozen encoders on labelled data, beside the untrained and the raw-pixel floor."""

    runs: Positional[tuple[str, ...]] = ()
    """Run directories or timm:NAME."""
    data: str = ""
    """Data sets with labels, separated by commas."""
    protocol: str = "logistic"
    """logistic, ridge, knn or finetune, each also on a share of the labels (logistic:10%); several
    separated by commas."""
    targets: str = ""
    """Only these targets of the data, separated by commas; all of them if not given."""
    limit: int | None = None
    """Use at most this many training images."""
    img_size: tuple[int, ...] = ()
    """Size that images are decoded to, one number or height and width. If not given that of the
    runs' training for their own data, otherwise the images' own, or the encoders' if they have
    several."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    pool: Literal["mean", "concat4"] = "mean"
    """mean: average of the last layer's patch tokens; concat4: of each of the last four layers."""
    seed: int = 0
    """Seed of the images that --limit takes, of the validation part and of the untrained floor."""
    data_root: Path | None = None
    """Folder with local copies, in the hub's own layout or as official files; SPARSEJEPA_DATA if
    not given."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


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
        img_size=image_size(args.img_size),
        upscale=args.upscale,
        seed=args.seed,
        data_root=args.data_root,
        cache_dir=cache_folder(None) / "floors",
        device=resolve_device(args.device),
        progress=lambda line: console.print(line, markup=False),
    )
    table = [
        {
            "encoder": row.encoder,
            "data": row.data,
            "target": row.target,
            "protocol": row.protocol,
            "accuracy %": percent(row.accuracy, row.interval),
            "untrained": percent(row.untrained, row.untrained_interval),
            "pixels": percent(row.pixels, row.pixels_interval),
            "chance": percent(row.chance),
        }
        for row in rows
    ]
    show_rows(console, table)
    console.print("Brackets: 95 % interval over the test images; it says nothing of other seeds.")
    return {"probes": [row.to_dict() for row in rows]}


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
    """Picture to write; masks-ACTION.png if not given."""


def masks(args: Masks, console: Console) -> dict[str, Any]:
    """Write the picture and print the numbers."""
    check_counts(args, "batch_size", "batches", "count")
    config = Config(masks=args.masks).replace(
        img_size=args.img_size, patch_size=args.patch_size, predictor_pass=args.predictor_pass
    )
    size = image_size(args.img_size) or (32, 32)
    config.check().check_image(size)
    from sparsejepa.model.audit import audit
    from sparsejepa.study.figures import mask_audit_figure, mask_preview_figure, save_png
    from sparsejepa.training.build import build_sampler

    grid = (size[0] // args.patch_size, size[1] // args.patch_size)
    sampler = build_sampler(config, grid)
    out = args.out or Path(f"masks-{args.action}.png")
    found: dict[str, Any] = {
        "out": out,
        "grid_size": list(grid),
        "target_shapes": [list(shape) for shape in sampler.target_shapes],
        "context_counts": list(sampler.context_counts),
    }
    if args.action == "audit":
        result = audit(sampler, batch_size=args.batch_size, batches=args.batches, seed=args.seed)
        save_png(mask_audit_figure(result), out)
        found |= result.summary()
    else:
        save_png(mask_preview_figure(sampler, args.count, args.seed), out)
    show_facts(console, found, f"masks {args.action}: {out}")
    return found


@dataclass(frozen=True)
class Data(Verb):
    """List the data sets, fetch some into the cache, or check what they hold."""

    action: Positional[Literal["list", "get", "check"]] = "list"
    """list: every name and where it lies; get: fetch and decode; check: say what it holds."""
    names: Positional[tuple[str, ...]] = ()
    """Names, hub:OWNER/NAME or folders, for get and check."""
    img_size: tuple[int, ...] = ()
    """Image size in pixels, one number or height and width; the data set's own if not given."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    data_root: Path | None = None
    """Folder with local copies, in the hub's own layout or as official files; SPARSEJEPA_DATA if
    not given."""
    stream: bool = False
    """Check what --stream of pretrain would read: the list, a sample and one batch."""


def data(args: Data, console: Console) -> dict[str, Any]:
    """List, fetch or check data sets."""
    from sparsejepa.data.catalog import describe, list_datasets

    if args.action == "list":
        rows = [dataclasses.asdict(row) for row in list_datasets(args.data_root)]
        show_rows(console, rows)
        return {"datasets": rows}
    if not args.names:
        raise UserError(f"data {args.action}: which one? Give {DATA}")
    if args.stream and args.action != "check":
        raise UserError("--stream: only for data check; nothing is fetched beforehand for a stream")
    size, found = image_size(args.img_size), []
    for name in args.names:
        about = describe(
            name,
            img_size=size,
            data_root=args.data_root,
            upscale=args.upscale,
            stream=args.stream,
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
        from sparsejepa.environment import environment

        presets = {
            name: {key: value for key, value in vars(one).items() if key != "settings"}
            for name, one in PRESETS.items()
        }
        found: dict[str, Any] = {"environment": environment(), "presets": presets}
        show_facts(console, found["environment"], "environment")
        show_facts(console, {n: about["about"] for n, about in presets.items()}, "presets")
        return found
    if not (Path(args.run) / "config.toml").exists():
        return _show_encoder(args.run, console)
    from sparsejepa.training.loop import read_config

    folder = Path(args.run)
    config = read_config(folder)
    summary = folder / "summary.json"
    source = summary if summary.exists() else folder / "metrics.jsonl"
    try:
        last = (
            _plain(json.loads(summary.read_text())["final"]) if summary.exists() else _last(source)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{source}: damaged; copy the run again, or train it again") from None
    found = {
        "run": folder,
        "finished": summary.exists(),
        "config": config.to_dict(),
        "last": last,
    }
    show_facts(console, config.flat(), f"{folder}: settings")
    state = "finished" if found["finished"] else "not finished; continue with --resume"
    show_facts(console, found["last"], f"{folder}: {state}")
    if not found["finished"]:
        return found
    try:
        return found | _show_encoder(args.run, console)
    except UserError as error:  # the rest of the run is there all the same
        show_facts(console, {"encoder": str(error)}, f"{folder}: encoder")
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


def _last(path: Path) -> dict[str, Any]:
    """Return the newest value of every number in metrics.jsonl; a torn last line is left out."""
    newest: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        newest |= _plain(row)
    return newest


def _plain(row: Any) -> dict[str, Any]:
    """Return a row of metrics as it is. Raises TypeError if it holds more than numbers and text."""
    if not all(isinstance(value, int | float | str | None) for value in dict(row).values()):
        raise TypeError("values of other kinds")
    return dict(row)
