"""The tables of docs/scaling.md: predictions worked out anew, and the measurements beside them.

    python recipes/scaling.py            # write the tables into docs/scaling.md
    python recipes/scaling.py --check    # write nothing; exit 1 if the page has other tables
    python recipes/scaling.py --measure  # take steps on this CPU first (minutes, up to 3 GB)

A table stands between <!-- NAME:begin --> and <!-- NAME:end -->; the rest is written by hand.
Measurements are kept in results/scaling.jsonl; what `python -m sparsejepa.benchmarks.scaling` and
`... .loading` write with --json, in results/efficiency.jsonl and results/loading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsejepa.benchmarks.hardware import GPUS
from sparsejepa.benchmarks.predict import (
    CHECKPOINTED,
    IMAGENET,
    LINK_SHARE,
    ROOM,
    Fleet,
    Prediction,
)
from sparsejepa.config import Config, preset
from sparsejepa.errors import UserError
from sparsejepa.files import write_text
from sparsejepa.model.costs import Sizes, costs, parameters, repeated, total
from sparsejepa.model.memory import memory
from sparsejepa.results import read_checked

ROOT = Path(__file__).resolve().parent.parent
PRICE = 3.0
"""Dollars per GPU-hour: an example, not an offer."""
CPU_SHARE = 0.5
"""Share of this CPU's product rate that a step is taken to reach."""
PRESETS = {"vit-b16": "ViT-B/16", "vit-l16": "ViT-L/16", "vit-h14": "ViT-H/14"}


def measured_cases() -> dict[str, Config]:
    """Return the runs whose steps fit here, by name."""
    small = preset("best").replace(img_size=(32,), batch_size=64, precision="bf16", drop_path=0.0)
    large = preset("vit-b16").replace(precision="bf16")
    return {
        "ViT-Nano/4 at 32, batch 64": small.replace(encoder="nano"),
        "ViT-Tiny/4 at 32, batch 64": small,
        "ViT-Tiny/4 at 32, batch 16, fp32": small.replace(batch_size=16, precision="fp32"),
        "ViT-S/16 at 224, batch 16": large.replace(encoder="small", batch_size=16),
        "ViT-B/16 at 224, batch 4": large.replace(batch_size=4),
        "ViT-B/16 at 224, batch 8, blocks computed again": large.replace(
            batch_size=8, checkpoint_activations=True
        ),
    }


def sizes_at(config: Config, step: int = 1) -> Sizes:
    """Return the sizes of one step of a run: the masks' sizes differ from step to step."""
    from sparsejepa.training.build import build_sampler

    size, patch = config.images.img_size, config.model.patch_size
    grid = (size[0] // patch, size[-1] // patch)
    sampler = build_sampler(config, grid)
    plan = sampler.plan(seed=config.run.seed, step=step)
    targets = (config.masks.num_targets, plan.target[0] * plan.target[1])
    if sampler.union is not None:
        targets = (1, sampler.union[plan])
    return Sizes.of(config, grid, plan.count, *targets)


def measure(name: str, config: Config, rounds: int = 3) -> dict[str, Any]:
    """Take steps of one run on this CPU, beside the products of its layers alone."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from sparsejepa.benchmarks.growth import PeakMemory
    from sparsejepa.benchmarks.products import all_products
    from sparsejepa.benchmarks.timing import interleave
    from sparsejepa.data.augment import Augment
    from sparsejepa.environment import environment
    from sparsejepa.model.costs import products
    from sparsejepa.training.build import build_model
    from sparsejepa.training.step import TrainStep

    size = (config.images.img_size[0], config.images.img_size[-1])
    model = build_model(config, size, 1000).train()
    step = TrainStep(config, model, Augment(size, mean=(0.5,) * 3, std=(0.25,) * 3), 1000)
    pixels = torch.randint(0, 256, (config.optim.batch_size, *size, 3), dtype=torch.uint8)
    step(pixels, 1)  # the optimiser's state comes into being
    moments = [x for state in step.optimizer.state.values() for x in state.values()]
    with PeakMemory() as peak:
        for known in [*model.parameters(), *model.buffers(), *moments]:
            known.view_as(known)  # seen, so counted
        step(pixels, 1)
    autocast = (
        step.autocast
    )  # the counter does not know this CPU's kernels for bf16, nor fused ones
    step.autocast = torch.autocast("cpu", enabled=False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.augment(pixels, torch.Generator().manual_seed(0))
        before = counter.get_total_flops()
        step(pixels, 1)
    step.autocast = autocast
    listed = products(sizes_at(config))
    dtype = "fp32" if config.optim.precision == "fp32" else "bf16"
    alone = all_products(listed, dtype, "cpu")
    times = interleave(
        {"step": lambda _: step(pixels, 1), "products": alone}, rounds=rounds, warmup=1
    )
    around = environment()
    return {
        "name": name,
        "parameters": sum(p.numel() for p in step.model.parameters() if p.requires_grad),
        "gflop": (counter.get_total_flops() - 2 * before) / 1e9,
        "peak_gb": peak.peak / 1e9,
        "seconds": times["step"].median,
        "products_seconds": times["products"].median,
        "products_gflop": sum(p.flops for p in listed) / 1e9,
        "threads": torch.get_num_threads(),
        "cpu": around["cpu"],
        "torch": around["torch"],
    }


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return prediction and measurement side by side."""
    lines, cases = [], measured_cases()
    for row in rows:
        config = cases[row["name"]]
        sizes = sizes_at(config)
        again = CHECKPOINTED if config.run.checkpoint_activations else ()
        parts = costs(sizes)
        flops = total(parts).flops - parts["augmentation"].flops
        flops += repeated(sizes, again)
        need = memory(
            sizes,
            4 if config.optim.precision == "fp32" else 2,
            device="cpu",
            checkpointed=again,
        ).peak
        rate = row["products_gflop"] / row["products_seconds"]
        seconds = flops / 1e9 / (CPU_SHARE * rate)
        lines.append(
            [
                row["name"],
                f"{sum(parameters(sizes).values()):,} / {row['parameters']:,}",
                f"{flops / 1e9:,.2f} / {row['gflop']:,.2f}",
                f"{need / 1e9:.3f} / {row['peak_gb']:.3f} ({need / 1e9 / row['peak_gb'] - 1:+.1%})",
                f"{rate:,.0f}",
                f"{seconds:.2f} / {row['seconds']:.2f} ({seconds / row['seconds'] - 1:+.0%})",
            ]
        )
    header = ["predicted / measured", "parameters", "GFLOP per step", "GB at the peak",
              "products, GFLOP/s", f"seconds at {CPU_SHARE:g} of that"]  # fmt: skip
    return table(header, lines)


def on(name: str, gpus: int, gpu: str = "h100", **changes: Any) -> Prediction:
    """Return the prediction of a preset on some GPUs."""
    return Prediction(preset(name).replace(**changes), Fleet(GPUS[gpu], gpus))


def model_table() -> str:
    """Return parameters and operations of the presets."""
    lines = []
    for name, title in PRESETS.items():
        one = on(name, 1, checkpoint_activations=True)
        flops = {k: v / 1e9 for k, v in one.flops_per_image().items()}
        count = {k: f"{v / 1e6:.2f}" for k, v in one.parameters.items()}
        lines.append(
            [f"{title} (`{name}`)", *count.values(), f"{flops['forward']:.0f}",
             f"{flops['backward']:.0f}", f"{flops['repeated']:.0f}"]
        )  # fmt: skip
    header = ["", "encoder, M", "predictor, M", "group map, M", "W, M", "forward, GFLOP per image",
              "backward", "computed again, if asked"]  # fmt: skip
    return table(header, lines)


def memory_table() -> str:
    """Return the memory of each preset on 8 GPUs, by how it is spread."""
    lines = []
    ways = [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]
    for name, title in PRESETS.items():
        for parts in (1, 2, 4):
            one = on(name, 8, accumulate=parts)
            found = [one.memory(parallel, again).peak / 1e9 for parallel, again in ways]
            lines.append(
                [f"{title}, accumulate {parts}", *(f"{x:.1f}" for x in found)]
            )  # fmt: skip
    header = ["GB per GPU", "ddp", "ddp, computed again", "fsdp", "fsdp, computed again"]
    return table(header, lines)


def gpu_table() -> str:
    """Return what one GPU does, by its kind."""
    lines = []
    for key, chip in GPUS.items():
        cells = [f"{chip.name} (`{key}`)", f"{chip.peak()[1] / 1e12:.0f} {chip.peak()[0]}"]
        cells.append(f"{chip.memory / 1e9:.0f}")
        for name in PRESETS:
            one = on(name, 1, key, batch_size=64, checkpoint_activations=False)
            fits = one.memory().peak < ROOM * chip.memory
            rate = one.data()["images_per_second"]
            cells.append(f"{rate:,.0f}" + ("" if fits else " (does not fit)"))
        lines.append(cells)
    header = [
        "one GPU, batch 64",
        "TFLOP/s, dense",
        "GB",
        *(f"{t}, images/s" for t in PRESETS.values()),
    ]
    return table(header, lines)


def scale_table() -> str:
    """Return ViT-H/14 on more and more H100, at one batch and at one batch per GPU."""
    lines = []
    alone = on("vit-h14", 1, batch_size=256, parallel="ddp", checkpoint_activations=False)
    base = 256 / alone.step().seconds
    for batch, gpus, parallel in (
        (2048, 8, "ddp"), (2048, 8, "fsdp"), (2048, 64, "ddp"), (2048, 64, "fsdp"),
        (2048, 1024, "ddp"), (16384, 64, "ddp"), (16384, 64, "fsdp"), (262144, 1024, "ddp"),
        (262144, 1024, "fsdp"),
    ):  # fmt: skip
        one = on("vit-h14", gpus, batch_size=batch, parallel=parallel, checkpoint_activations=False)
        again = one.memory().peak > ROOM * GPUS["h100"].memory
        if again:
            one = on("vit-h14", gpus, batch_size=batch, parallel=parallel)
        step, data, run = one.step(), one.data(), one.run(IMAGENET, PRICE)
        nvlink = step.sent / (LINK_SHARE * GPUS["h100"].link)
        network = step.sent / (LINK_SHARE * one.fleet.network)
        lines.append(
            [
                f"{gpus} GPUs, batch {batch:,} ({batch // gpus} each), {parallel}"
                + (", computed again" if again else ""),
                f"{1e3 * step.compute:,.0f}",
                f"{step.sent / 1e9:.1f}",
                f"{1e3 * nvlink:.0f}",
                f"{1e3 * network:.0f}" if gpus > 8 else "–",
                f"{1e3 * step.exposed:.0f}",
                f"{1e3 * step.seconds:,.0f}",
                f"{data['images_per_second']:,.0f}",
                f"{data['images_per_second'] / gpus / base:.0%}",
                f"{data['gb_per_second']:.1f}",
                f"{data['decoding_cores']:,.0f}",
                f"{run['hours']:,.1f}",
                f"{run['cost']:,.0f}",
            ]
        )
    header = ["", "compute, ms", "sent per GPU, GB", "at NVLink, ms", "at 400 Gb/s, ms",
              "not hidden, ms", "step, ms", "images/s", "of one GPU's rate", "JPEG, GB/s",
              "cores to decode", "hours, 300 epochs", f"$ at {PRICE:g} per GPU-hour"]  # fmt: skip
    return table(header, lines)


def share_table() -> str:
    """Return how the assumed share of the peak rate moves the result."""
    lines = []
    for name, title in PRESETS.items():
        cells = [f"{title}, {preset(name).optim.epochs} epochs"]
        for share in (0.2, 0.3, 0.45):
            one = Prediction(preset(name), Fleet(GPUS["h100"], 8), share)
            run = one.run(IMAGENET, PRICE)
            rate = one.data()["images_per_second"]
            cells.append(f"{rate:,.0f} / {run['hours']:.0f} / {run['cost']:,.0f}")
        lines.append(cells)
    header = ["images/s / hours / $, on 8 H100", "0.2 of the peak", "0.3", "0.45"]
    return table(header, lines)


def efficiency_table(lines: Sequence[dict[str, Any]]) -> str:
    """Two processes that train one model beside two that train two."""
    header = ["ViT at 32 pixels", "together by", "images per process", "ms alone", "ms together",
              "efficiency (quartiles)", "load before"]  # fmt: skip
    rows = [row for line in lines for row in line["scaling"]]

    def share(row: dict[str, Any]) -> str:
        low, high = row["efficiency_low"], row["efficiency_high"]
        return f"{row['efficiency']:.0%} ({low:.0%} to {high:.0%})"

    return table(
        header,
        [
            [row["case"], row["parallel"], f"{row['batch']}", f"{1000 * row['alone_s']:.0f}",
             f"{1000 * row['together_s']:.0f}",
             share(row), f"{row['load']:.1f}"]
            for row in rows
        ],
    )  # fmt: skip


def loading_table(lines: Sequence[dict[str, Any]]) -> str:
    """Images per second of each contender, and by what factor ours is faster."""
    found = [
        [row["name"], f"{row['images_per_second']:,.0f}",
         f"{row['x_ours_faster']:.2f} ({row['x_ours_faster_low']:.2f} to "
         f"{row['x_ours_faster_high']:.2f})"]
        for line in lines for row in line["loading"]
    ]  # fmt: skip
    return table(["", "images/s", "ours is faster by"], found)


def page(text: str, results: Path) -> str:
    """Return the page with every table made anew, measurements from the folder `results`.

    Raises UserError for missing markers.
    """
    rows = read_checked(results / "scaling.jsonl")
    made = {
        "models": model_table(), "measured": measured_table(rows), "memory": memory_table(),
        "gpus": gpu_table(), "scale": scale_table(), "shares": share_table(),
        "efficiency": efficiency_table(read_checked(results / "efficiency.jsonl")),
        "loading": loading_table(read_checked(results / "loading.jsonl")),
    }  # fmt: skip
    for name, lines in made.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise UserError(f"docs/scaling.md: put {begin} and {end} on lines of their own")
        text = f"{head}{begin}\n\n{lines}\n\n{end}{tail}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 if --check found other tables, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--measure", action="store_true", help="take steps on this CPU first")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to read and write")
    args = parser.parse_args(argv)
    path, results = args.root / "docs" / "scaling.md", args.root / "results"
    try:
        if args.measure:
            rows = []
            for name, config in measured_cases().items():
                rows.append(measure(name, config))
                write_text(
                    results / "scaling.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
                )
        text = path.read_text(encoding="utf-8")
        new = page(text, results)
    except UserError as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        return 2
    if not args.check:
        write_text(path, new)
    elif new != text:
        print(f"{path} has other tables; run python recipes/scaling.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
