"""Draw the pictures of docs/method.md: python recipes/pictures.py [--out docs/images]

What they show is computed by the package: the masks are drawn by its sampler, W is moved by its
proximal step. No encoder is trained; the bars of `kinds_figure` alone are made up.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from sparsejepa.config import preset
from sparsejepa.data.scenes import Scenes
from sparsejepa.model.groups import DensityController, GroupMap, partition_cells, prox_sphere
from sparsejepa.model.masks import MaskSampler
from sparsejepa.study.figures import STYLE, save_png
from sparsejepa.training.schedule import Schedule

GRID, SIDE, SEED = (8, 8), 128, 3
COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c")
GREY, DARK = 0.86, "#1f2937"


def sampled(count: int) -> tuple[np.ndarray, Any]:
    """Return scenes [count, SIDE, SIDE, 3] and their masks."""
    images = Scenes().render(np.arange(SEED, SEED + count), SIDE).images
    return images, MaskSampler(GRID).sample(count, seed=SEED, step=0)


def only(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Return an image [S, S, 3] in [0, 1] of which only `patches` are seen, the rest grey."""
    seen = np.isin(np.arange(GRID[0] * GRID[1]), patches).reshape(GRID)
    seen = np.kron(seen, np.ones((SIDE // GRID[0], SIDE // GRID[1])))[..., None]
    return np.where(seen, image / 255, GREY)


def outline(ax: Any, patches: np.ndarray, colour: str, width: float = 2.2) -> None:
    """Draw the edge of a block of patches [K]."""
    step = SIDE / GRID[0]
    rows, cols = np.divmod(patches, GRID[1])
    corner = (cols.min() * step - 0.5, rows.min() * step - 0.5)
    size = ((np.ptp(cols) + 1) * step, (np.ptp(rows) + 1) * step)
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width))


def bare(ax: Any, title: str = "") -> None:
    """Leave only the picture and its title."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, fontsize=9.5, loc="left")


def masks_figure() -> Figure:
    """Six images: what is predicted above, what the context encoder sees below."""
    images, masks = sampled(6)
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.subplots(2, 6)
    for i, image in enumerate(images):
        axes[0, i].imshow(image)
        for colour, block in zip(COLOURS, masks.targets[i].numpy(), strict=True):
            outline(axes[0, i], block, colour)
        axes[1, i].imshow(only(image, masks.context[i].numpy()))
        bare(axes[0, i], "four target blocks" if i == 0 else "")
        bare(axes[1, i], f"context, {masks.context.shape[1]} of 64 patches" if i == 0 else "")
    return figure


def parts_figure() -> Figure:
    """The parts of a step and what goes where."""
    images, masks = sampled(1)
    image, context, targets = images[0], masks.context[0].numpy(), masks.targets[0].numpy()
    figure = Figure(figsize=(10.4, 4.5))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, 104)
    ax.set_ylim(0, 45)
    ax.set_axis_off()

    def picture(x: float, y: float, pixels: np.ndarray, title: str) -> Any:
        inset = ax.inset_axes((x / 104, y / 45, 13 / 104, 13 / 45))
        inset.imshow(pixels)
        bare(inset)
        ax.text(x, y + 13.6, title, fontsize=9, color=DARK)
        return inset

    def box(x: float, y: float, w: float, h: float, text: str, colour: str) -> None:
        ax.add_patch(
            FancyBboxPatch(
                (x, y), w, h, boxstyle="round,pad=0.2,rounding_size=0.9",
                facecolor=colour + "1a", edgecolor=colour, linewidth=1.4,
            )
        )  # fmt: skip
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9, color=DARK)

    def arrow(a: tuple[float, float], b: tuple[float, float], style: str = "-") -> None:
        ax.add_patch(
            FancyArrowPatch(
                a, b, arrowstyle="-|>", mutation_scale=11, color=DARK, linewidth=1.1,
                linestyle=style, shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip

    picture(2, 25, only(image, context), "context patches")
    whole = picture(2, 3, image, "the whole image")
    for colour, block in zip(COLOURS, targets, strict=True):
        outline(whole, block, colour, 1.6)
    box(20, 28.5, 13, 6, "context\nencoder", COLOURS[0])
    box(20, 6.5, 13, 6, "target encoder\n(moving average)", "#4b5563")
    box(44, 35, 13, 6, "predictor", COLOURS[0])
    box(44, 21.5, 13, 6, "z, one number\nper latent", COLOURS[2])
    box(62, 21.5, 13, 6, "W: which latents\nfeed which group", COLOURS[2])
    box(80, 21.5, 13, 6, "a network\nper group", COLOURS[2])
    wanted = picture(79, 3, only(image, np.unique(targets)), "targets: hidden tokens")
    for colour, block in zip(COLOURS, targets, strict=True):
        outline(wanted, block, colour, 1.6)
    arrow((15.4, 31.5), (19.6, 31.5))
    arrow((15.4, 9.5), (19.6, 9.5))
    arrow((33.4, 9.5), (78.4, 9.5))
    arrow((33.4, 32.8), (43.6, 37.6))
    arrow((33.4, 30.2), (43.6, 25.2))
    arrow((57.4, 24.5), (61.6, 24.5))
    arrow((75.4, 24.5), (79.6, 24.5))
    arrow((86.5, 21.1), (86.5, 18.6))
    ax.plot([57.4, 97.5, 97.5], [38, 38, 9.5], color=DARK, linewidth=1.1)
    arrow((97.5, 9.5), (92.4, 9.5))
    arrow((26.5, 28.1), (26.5, 13.1), "--")
    ax.text(27.2, 20.5, "weights follow slowly", fontsize=8, color="#4b5563", va="center")
    ax.text(58.5, 38.8, "prediction loss (I-JEPA)", fontsize=8.5, color=DARK)
    ax.text(68.5, 29, "group loss; penalty on W", fontsize=8.5, color=DARK, ha="center")
    return figure


def kinds_figure() -> Figure:
    """What a group predicts: a cell, a share of every token, or dimensions of its own."""
    cells = partition_cells(GRID, 16).reshape(GRID).numpy()
    rng = np.random.default_rng(0)
    palette = matplotlib.colormaps["tab20"](np.arange(20))[:, :3]
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1, 1.35, 1.35])
    axes[0].imshow(palette[cells % 20])
    for g in range(16):
        rows, cols = np.nonzero(cells == g)
        axes[0].text(
            cols.mean(), rows.mean(), str(g), ha="center", va="center", fontsize=9, color="white"
        )
    bare(axes[0], "region: group g predicts cell g")
    parts = rng.dirichlet(np.full(4, 1.2), 24).T * (0.6 + 0.4 * rng.random(24))
    base = np.zeros(24)
    for g, part in enumerate(parts):
        axes[1].bar(np.arange(24), part, bottom=base, color=palette[2 * g], width=0.9)
        base += part
    bare(axes[1], "concept: the groups' predictions add up")
    axes[1].set_xlabel("dimensions of a hidden token", fontsize=9)
    heights = 0.3 + 0.7 * rng.random(24)
    axes[2].bar(np.arange(24), heights, color=palette[2 * (np.arange(24) // 6)], width=0.9)
    bare(axes[2], "feature: each group has dimensions of its own")
    axes[2].set_xlabel("dimensions of a hidden token", fontsize=9)
    return figure


def prox_figure() -> Figure:
    """A latent that feeds two groups, before and after a step of the penalty."""
    angles = torch.linspace(0, torch.pi / 2, 400)
    v = torch.stack([angles.cos(), angles.sin()])[:, None]  # [G, P, D] with P = 1
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    ax = figure.subplots()
    for t, colour in zip((0.0, 0.2, 0.4, 0.6), (DARK, *COLOURS), strict=False):
        r = prox_sphere(v, t)[1, 0]
        ax.plot(v[1, 0] ** 2, r**2, color=colour, linewidth=1.8, label=f"threshold {t:g}")
    ax.set_xlabel("share of a latent's squared weight in group 2, before")
    ax.set_ylabel("after")
    ax.legend(frameon=False, fontsize=9)
    ax.set_title(
        "The exact proximal step on the sphere: small shares become exactly zero", loc="left",
        fontsize=10.5,
    )  # fmt: skip
    return figure


def w_figure(steps: int = 1500) -> Figure:
    """W on its way when a quarter of its blocks is pulled at, and every batch says so with noise.

    Above: density, penalty, and agreement with the truth over a run; below: W in the end, for four
    fixed lambdas.
    """
    draw = torch.Generator().manual_seed(SEED)
    truth = torch.rand(16, 96, generator=draw).argsort(0) < 4
    goal = torch.randn(16, 6, 96, generator=draw) * truth[:, None]
    goal = goal / goal.square().sum((0, 1)).sqrt()

    def run(**settings: Any) -> tuple[np.ndarray, list[tuple[float, float, float]]]:
        """Return the block norms in the end, and density, lam and Jaccard index over the run."""
        config = preset("nano").replace(steps=steps, **settings)
        schedule, controller, course = Schedule(config, steps), DensityController(steps), []
        torch.manual_seed(SEED)
        groups = GroupMap("region", 96, GRID, num_groups=16, group_dim=6)
        for step in range(steps):
            # Ten times as much noise as signal, in every single batch.
            noise = torch.randn(goal.shape, generator=draw) * 10 * goal.square().mean().sqrt()
            groups.W.grad = groups.W.detach() - goal + noise
            rate, keep, lam = schedule.w_rate(step), None, torch.tensor(schedule.lam(step))
            now = groups.block_norms() > 0
            if schedule.frozen(step):
                fixed = config.groups.density is None or not schedule.freezes(step)
                keep = now if fixed else groups.strongest(config.groups.density or 1.0, rate)
            elif config.groups.density is not None:
                controller.step(now.float().mean(), schedule.wanted_density(step))
                lam = controller.lam
            groups.proximal_step(rate, lam, momentum=schedule.w_momentum(step), keep=keep)
            both = float((now & truth).sum() / (now | truth).sum())
            course.append((float(now.float().mean()), float(lam), both))
        return groups.block_norms().detach().numpy(), course

    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    above, below = halves
    course = np.array(run(density=0.25)[1])
    titles = ("density, steered to 0.25", "lambda", "agreement with the truth (Jaccard)")
    for i, title in enumerate(titles):
        ax = above.add_subplot(1, 3, i + 1)
        ax.plot(np.linspace(0, 1, steps), course[:, i], color=COLOURS[i])
        ax.set_title(title, loc="left", fontsize=9.5)
        ax.set_xlabel("share of the run")
        ax.set_ylim(0, 1.02 if i != 1 else None)
    for i, lam in enumerate((0.0, 0.001, 0.01, 0.1)):
        ax = below.add_subplot(1, 4, 1 + i)
        norms = run(lam=lam)[0]
        order = np.lexsort((truth.numpy()[0], truth.numpy().argmax(0)))
        shown = np.where(norms > 0, norms, np.nan)[:, order]
        ax.imshow(shown, aspect="auto", vmin=0, vmax=1, cmap="viridis_r", interpolation="nearest")
        left, right = (norms > 0).sum(0).mean(), truth.numpy()[norms > 0].mean()
        text = f"lambda {lam:g}: {left:.1f} of 16\ngroups per latent, {right:.0%} true"
        ax.set_title(text, loc="left", fontsize=9.5)
        ax.set_yticks([])
        ax.set_xlabel("latents")
    return figure


FIGURES = {
    "parts": parts_figure,
    "masks": masks_figure,
    "kinds": kinds_figure,
    "prox": prox_figure,
    "w": w_figure,
}


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            save_png(draw(), args.out / f"method-{name}.png")


if __name__ == "__main__":
    main()
