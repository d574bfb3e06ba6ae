"""What a run says about itself: metrics.jsonl, the online evaluation and the alarms."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sparsejepa.data.augment import normalize
from sparsejepa.data.store import DeviceImages, ImageSet
from sparsejepa.data.stream import ImageStream, StreamImages
from sparsejepa.distributed import World, gather_rows, own_rows
from sparsejepa.errors import UserError
from sparsejepa.evaluation.information import rankme, std_per_dimension
from sparsejepa.evaluation.probe import knn_accuracy
from sparsejepa.evaluation.sparsity import summary
from sparsejepa.files import write_text
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap
from sparsejepa.training.loggers import merge

METRICS = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl, one JSON object a line. Lines at or after `step` are dropped on a resume.

    So are lines that this program cannot have written. Of several processes, which all see the same
    numbers, one has `write` and keeps the file. Raises UserError where the disk does not take it.
    """

    def __init__(self, run_dir: Path, step: int, *, write: bool = True) -> None:
        self.path = run_dir / METRICS
        self.last: dict[str, Any] = {}
        self.alarms: list[str] = []
        self.kept: list[dict[str, Any]] = []
        """The rows of earlier parts of the run, oldest first."""
        self.newest: dict[str, Any] = {}
        """The rows of the newest step as one."""
        if step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # the line that a kill cut short
                    continue
                if _is_row(row) and row["step"] < step:
                    self.kept.append(row)
                    self._remember(row)
        self._file = None
        if write:
            with self._to_disk():
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.kept))
                self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # what went wrong first counts
                raise

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null, as JSON knows none."""
        clean = {k: _finite(v) for k, v in row.items()}
        self._remember(clean)
        if self._file:
            with self._to_disk():
                self._file.write(json.dumps(clean) + "\n")
                self._file.flush()

    def close(self) -> None:
        if self._file:
            with self._to_disk():
                self._file.close()

    @contextlib.contextmanager
    def _to_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror or error}; make room or mend the disk, then go on "
                "with --resume"
            ) from None

    def _remember(self, row: dict[str, Any]) -> None:
        if row["step"] != self.newest.get("step"):
            self.newest = {}
        merge(self.newest, row)
        if "alarm" in row:
            self.alarms.append(row["alarm"])
        else:
            self.last.update(row)


class OnlineEvaluation:
    """k-NN accuracy, RankMe and per-dimension spread of the target encoder on training images.

    A fixed random part of *train* serves as bank and queries, so no test image is looked at while
    training. Without labels only RankMe and the spread are reported. Each process of `world` embeds
    its share of the images; all get the same numbers. Images that are fetched in stretches are
    those of a few, and read in order.
    """

    def __init__(
        self,
        image_set: ImageSet | ImageStream,
        images: DeviceImages | StreamImages,
        count: int = 2048,
        world: World = World(),  # noqa: B008  (it is frozen)
    ) -> None:
        rng, self._mixed = np.random.default_rng(0), None
        order = choose_images(image_set, count, rng)
        if isinstance(image_set, ImageStream) and image_set.blocks is not None:
            self._mixed = torch.from_numpy(rng.permutation(len(order)))
        self._index, self._count = torch.from_numpy(own_rows(order, world)), len(order)
        self._images, self._mean, self._std = images, image_set.mean, image_set.std
        target = next(iter(image_set.targets.values()), None)
        self._labels = None if target is None else torch.from_numpy(target.values[order])

    @torch.no_grad()
    def __call__(self, encoder: ViT, autocast: torch.autocast) -> dict[str, float]:
        features = []
        for images in self._images.batches(self._index.split(256)):
            pixels = normalize(images, self._mean, self._std)
            with autocast:
                tokens = encoder(pixels.to(encoder.pos_embed.dtype))
                features.append(tokens.float().mean(1).cpu())
        x = gather_rows(torch.cat(features), self._count)
        spread = std_per_dimension(x)
        row = {
            "rankme": float(rankme(x)),
            "std_mean": float(spread.mean()),
            "std_min": float(spread.min()),
        }
        if self._labels is not None:
            cut = 3 * len(x) // 4
            y = self._labels
            if self._mixed is not None:  # in order, bank and queries would have different classes
                x, y = x[self._mixed], y[self._mixed]
            row["knn"] = float(knn_accuracy(x[:cut], y[:cut], x[cut:], y[cut:]))
        return row


def choose_images(
    image_set: ImageSet | ImageStream, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose about `count` images at random; of images fetched in stretches, in order and of few.

    Returns their indices.
    """
    blocks = image_set.blocks if isinstance(image_set, ImageStream) else None
    if blocks is None:
        return rng.permutation(len(image_set))[:count]
    return _of_few(blocks, count, rng)


def _of_few(blocks: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose `count` images of stretches of lengths `blocks`, ascending: of eight, or of more.

    Fewer images where the stretches are of very different lengths.
    """
    share, starts = -(-count // min(8, len(blocks))), np.cumsum(blocks) - blocks
    chosen, found = [], 0
    for one in rng.permutation(len(blocks)):
        if found < count:
            chosen.append(starts[one] + np.arange(min(int(blocks[one]), share)))
            found += len(chosen[-1])
    return np.sort(np.concatenate(chosen)[:count])


class Alarms:
    """Watches for the failure signatures that the paper warns of; each is raised once."""

    def __init__(self, penalised: bool, raised: list[str]) -> None:
        self._penalised = penalised
        self._raised = {text.split(":")[0] for text in raised}
        self._losses: deque[float] = deque(maxlen=50)
        self._first_rank = 0.0

    def observe(self, row: dict[str, Any]) -> None:
        """Take a metrics row, also one of an earlier part of the run, into the comparisons."""
        if row.get("loss") is not None:
            self._losses.append(row["loss"])
        self._first_rank = self._first_rank or row.get("rankme") or 0.0

    def check(self, row: dict[str, Any], progress: float) -> list[str]:
        """Return the new alarms of a metrics row; `progress` is the share of the run done."""
        found = []
        row = {name: value for name, value in row.items() if value is not None}
        if "loss" in row:
            usual = median(self._losses) if len(self._losses) >= 20 else math.inf
            if progress > 0.1 and abs(row["loss"]) > 4 * abs(usual):
                found.append(
                    f"unstable: the loss is {row['loss'] / usual:.1f} times its recent median; the "
                    "EMA rate may not suit the added terms (raise --ema or lower --lr)"
                )
        # Where no block is zero (a single group, lambda = 0) lambda is not to blame.
        if row.get("max_usage", 0) > 0.9 and row.get("density", 0) < 1:
            found.append(
                "one group: nearly all latents feed a single group; lambda is too high "
                "(lower --lam or set --density)"
            )
        if row.get("groups_per_latent", 1) < 0.5:  # on the sphere it is at least 1
            found.append(
                "no group: most latents feed no group at all; lambda is too high (lower --lam or "
                "set --density)"
            )
        if self._penalised and progress >= 1 and row.get("density", 0) > 0.99:
            found.append(
                "no sparsity: W ended dense although it was penalised; lambda is too low "
                "(raise --lam or set --density)"
            )
        self.observe(row)
        rank, spread = row.get("rankme"), row.get("std_mean")  # not there unless finite
        if rank is None or spread is None:
            pass
        elif rank < max(1.5, 0.1 * self._first_rank) or spread < 1e-4:
            found.append(
                f"collapse: RankMe {rank:.1f}, mean spread {spread:.1e}; the embeddings lose their "
                "dimensions (raise --beta or --ema, lower --lr)"
            )
        new = [text for text in found if text.split(":")[0] not in self._raised]
        self._raised.update(text.split(":")[0] for text in new)
        return new


class ProgressLine:
    """A bar with images/s and time left on a terminal, some plain lines elsewhere."""

    def __init__(self, console: Console | None, name: str) -> None:
        self._console, self._name = console, name
        self._bar: Progress | None = None

    @contextlib.contextmanager
    def between(self, start: int, total: int, batch: int) -> Iterator[None]:
        """Show progress from step `start` to `total` while the context lasts."""
        self._total, self._batch, self._printed = total, batch, start
        if self._console is None or not self._console.is_terminal:
            yield
            return
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console) as self._bar:
            self._task = self._bar.add_task(self._name, total=total, completed=start)
            yield

    def update(self, done: int, row: dict[str, Any]) -> None:
        rate = row["images_per_second"]
        text = f"{self._name}  {done}/{self._total}  loss {row['loss']:.3f}  {rate:,.0f} images/s"
        if "groups_per_latent" in row:
            text += f"  {row['groups_per_latent']:.1f} groups per latent"
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif self._console and (done - self._printed >= self._total / 10 or done == self._total):
            left = (self._total - done) * self._batch / max(rate, 1e-9)
            self._console.print(f"{text}  {left:.0f} s left", highlight=False)
            self._printed = done

    def say(self, text: str) -> None:
        if self._console:
            self._console.print(text, highlight=False)


def group_state(groups: GroupMap | None) -> dict[str, float]:
    """Return density, groups per latent, dead groups and the largest usage share of W."""
    if groups is None:
        return {}
    norms = groups.block_norms().detach()
    numbers = summary(norms)
    usage = norms.float().square().sum(1)
    return {
        "density": float(numbers["density"]),
        "groups_per_latent": float(numbers["groups_per_latent"]),
        "dead_groups": int(numbers["dead_groups"]),
        "max_usage": float(usage.max() / usage.sum().clamp_min(1e-12)),
    }


def _is_row(row: Any) -> bool:
    """Return whether a line is one of those that `MetricsLog` writes: numbers, null, an alarm."""
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    largest = sys.float_info.max
    return all(
        isinstance(value, str)
        if name == "alarm"
        else value is None or (isinstance(value, int | float) and abs(value) <= largest)
        for name, value in row.items()
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
