"""What a run says about itself: metrics.jsonl, trackers, the online evaluation, what stops it.

metrics.jsonl is the record; TensorBoard and Weights & Biases show its numbers elsewhere. How good
embeddings are is measured by RankMe, spread and k-NN, in torch alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.augment import normalize
from sparsejepa.data.images import Batches, Images
from sparsejepa.distributed import World, gather_rows, own_rows
from sparsejepa.errors import UserError
from sparsejepa.files import write_text
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.vit import ViT

METRICS = "metrics.jsonl"
_FACTOR = 1000.0
_SUMS = {"loss", "total", "grad_norm"}
"""Only not finite is a failure here: weights scale the total, single batches the gradient."""
TEMPERATURE = 0.07
"""Of the votes of k nearest neighbours, as in DINO (Caron et al. 2021)."""
_BLOCK = 2**23  # similarities at a time
Show = Callable[[Mapping[str, Any]], None]


class MetricsLog:
    """metrics.jsonl, one JSON object a line; a resumed run drops the lines from `step` on.

    Of several processes, which all see the same numbers, one has `write` and keeps the file; `show`
    gets each new row as well. Raises UserError where the disk does not take it.

    Attributes:
        rows: those of earlier parts of the run, oldest first.
        last: the newest value of each number.
        alarms: those of the whole run.
    """

    def __init__(
        self, run_dir: Path, step: int, *, write: bool = True, show: Sequence[Show] = ()
    ) -> None:
        self.path, self._show = run_dir / METRICS, show
        self.rows: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self.alarms: list[str] = []
        if step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # the line that a kill cut short
                    self.rows.append(json.loads(line))
            self.rows = [row for row in self.rows if row["step"] < step]
        for row in self.rows:
            self._remember(row)
        self._file = None
        if write:
            with self._to_disk():
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
                self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # every row was flushed when it was written
                self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers that are not finite become null, as JSON knows none."""
        clean = {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in row.items()}
        self._remember(clean)
        if self._file:
            with self._to_disk():
                self._file.write(json.dumps(clean) + "\n")
                self._file.flush()
            for show in self._show:
                show(clean)

    @contextlib.contextmanager
    def _to_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror or error}; make room or mend the disk, then go on "
                "with --resume"
            ) from None

    def _remember(self, row: Mapping[str, Any]) -> None:
        if "alarm" in row:
            self.alarms.append(row["alarm"])
        else:
            self.last.update(row)


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError, naming the extra, for a tracker whose package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        # A folder of that name, such as wandb leaves in a working directory, is no package.
        if found is None or found.origin is None:
            raise UserError(
                f"--log {name}: not installed; pip install 'sparsejepa[{name}]', or leave it out"
            )


@contextlib.contextmanager
def trackers(
    names: Iterable[str], run_dir: Path, config: Config, step: int
) -> Iterator[list[Show]]:
    """Open TensorBoard and Weights & Biases for the numbers of a run's rows from `step` on.

    TensorBoard's files lie in RUN_DIR/tensorboard; a resumed run makes its readers drop what was
    shown from `step` on. wandb goes on with its run if that did not end, and reads its own
    variables (WANDB_MODE, WANDB_PROJECT). Raises UserError for a tracker that does not start.
    """
    with contextlib.ExitStack() as stack:
        shows: list[Show] = []
        for name in dict.fromkeys(names):
            try:
                shows.append({"tensorboard": _tensorboard, "wandb": _wandb}[name](
                    run_dir, config, step, stack
                ))  # fmt: skip
            except Exception as error:  # no login, no network, a full disk
                what = " ".join(str(error).split())[:300] or type(error).__name__
                raise UserError(f"--log {name}: {what}; mend that or leave it out") from None
        yield shows


def _tensorboard(run_dir: Path, config: Config, step: int, stack: contextlib.ExitStack) -> Show:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard", purge_step=step)
    stack.callback(writer.close)

    def show(row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["step"])

    return show


def _wandb(run_dir: Path, config: Config, step: int, stack: contextlib.ExitStack) -> Show:
    import wandb

    folder = run_dir.resolve()
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "sparsejepa"),
        dir=str(run_dir),
        name=folder.name,
        group=folder.parent.name,
        config=config.to_dict(),
        resume="auto",
        settings=wandb.Settings(silent=True, console="off", init_timeout=30),
    )
    stack.push(lambda kind, *_: run.finish(exit_code=int(bool(kind))))
    return lambda row: run.log(_numbers(row), step=row["step"])


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


class OnlineEvaluation:
    """k-NN accuracy, RankMe and per-dimension spread of the target encoder on training images.

    A fixed random part of *train* serves as bank and queries, so no test image is looked at while
    training. Without labels only RankMe and the spread are reported. Each process of `world` embeds
    its share of the images; all get the same numbers.
    """

    def __init__(
        self,
        image_set: Images,
        images: Batches,
        count: int = 2048,
        world: World = World(),  # noqa: B008  (it is frozen)
    ) -> None:
        order = choose_images(image_set, count)
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
        spread = x.std(0, correction=0)
        row = {"rankme": rankme(x), "std_mean": float(spread.mean())}
        row["std_min"] = float(spread.min())
        if (y := self._labels) is not None:
            cut = 3 * len(x) // 4
            row["knn"] = knn_accuracy(x[:cut], y[:cut], x[cut:], y[cut:])
        return row


def choose_images(image_set: Images, count: int) -> np.ndarray:
    """Choose `count` images at random, always the same ones. Returns their indices."""
    return np.random.default_rng(0).permutation(len(image_set))[:count]


def rankme(x: Any) -> float:
    """Return the effective rank exp(H(p)) of embeddings x [n, D], p_k = sigma_k / sum sigma.

    RankMe (Garrido et al. 2023, equations 1 and 2): H is the entropy in nats of the normalised
    singular values of the matrix as it is, *not* centred, so that a constant embedding has rank 1.
    Between 1 and min(n, D); 0 for a matrix of zeros, NaN if x holds NaN or infinity. In float64,
    without the paper's guard of 1e-7 for float32.
    """
    matrix = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if not matrix.isfinite().all():
        return float("nan")
    if not matrix.any():
        return 0.0
    matrix = matrix / matrix.abs().max()
    # The smaller Gram matrix has the squared singular values at a fraction of the cost of an SVD.
    gram = matrix.T @ matrix if len(matrix) >= matrix.shape[1] else matrix @ matrix.T
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = sigma / sigma.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [D] of x [n, D]; the latter is 1 for constant features."""
    mean = x.mean(0)
    scale = torch.linalg.vector_norm(x - mean, dim=0) / len(x) ** 0.5
    # What rounding leaves of a constant is not to be blown up to standard deviation 1.
    constant = scale <= 1e2 * torch.finfo(x.dtype).eps * mean.abs()
    return mean, torch.where(constant | (scale == 0), 1.0, scale)


def unit_rows(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Standardise x [n, D] with `mean` and `scale` [D], then give every row length 1."""
    return F.normalize((x - mean) / scale, dim=1)


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: int, num_classes: int) -> Tensor:
    """Return the class [m] that the k nearest of `bank` [n, D] vote for, all rows of length 1.

    A vote weighs exp(cosine / `TEMPERATURE`). labels: [n] int64.
    """
    found = []
    for part in queries.split(max(1, _BLOCK // len(bank))):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = similarity.new_zeros(len(part), num_classes)
        votes.scatter_add_(1, labels[index], (similarity / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def knn_accuracy(
    bank_x: Tensor, bank_y: Tensor, query_x: Tensor, query_y: Tensor, k: int = 20
) -> float:
    """Return the share of queries whose k nearest neighbours vote for their label.

    Features [n, D], labels [n] from 0 on. Never raises on NaN, which gives the accuracy of
    arbitrary neighbours.
    """
    mean, scale = moments(bank_x)
    bank, queries = (unit_rows(x, mean, scale) for x in (bank_x, query_x))
    predicted = vote(bank, bank_y.long(), queries, k, int(bank_y.max()) + 1)
    return float((predicted == query_y).double().mean())


class Watch:
    """Looks out for what ends a run and for the failures that the paper warns of.

    A run ends when a term of its loss is not finite, or explodes: is more than 1,000 times as large
    as 1 and as in any row of metrics so far. (Terms are of order 1. In 378 ordinary runs none came
    to more than 3 times that measure; runs that blew up reached 4,000 to 20,000.)

    All that it knows comes from rows of metrics.jsonl, so that a resumed run is judged as one that
    never stopped.

    Args:
        terms: names of a step's values, in order.
        penalised: whether W is under a penalty.
        rows: of earlier parts of the run.
    """

    def __init__(
        self, terms: Sequence[str], penalised: bool, rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        # A sum is never finite when a term is not, and the term is the cause: sums come last.
        self._order = sorted(range(len(terms)), key=lambda i: terms[i] in _SUMS)
        self._terms, self._penalised = list(terms), penalised
        self._largest: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=50)
        self._first_rank = 0.0
        self._raised = {row["alarm"].split(":")[0] for row in rows if "alarm" in row}
        for row in rows:
            self._observe(row)

    def _observe(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics into the comparisons."""
        for name in set(self._terms) - _SUMS:
            if row.get(name) is not None:
                self._largest[name] = max(self._largest.get(name, 1.0), abs(row[name]))
        if row.get("loss") is not None:
            self._losses.append(row["loss"])
        self._first_rank = self._first_rank or row.get("rankme") or 0.0

    def failed(self, step: int, values: Sequence[float]) -> str | None:
        """Return which of a step's values ends the run, and how; None if none does."""
        for i in self._order:
            if not math.isfinite(values[i]):
                return f"'{self._terms[i]}' is not finite at step {step}"
        for i in self._order:
            largest = self._largest.get(self._terms[i], math.inf)
            if abs(values[i]) > _FACTOR * largest:
                return (
                    f"'{self._terms[i]}' exploded at step {step} "
                    f"({values[i]:.3g}, {largest:.3g} at most before)"
                )
        return None

    def alarms(self, row: Mapping[str, Any], progress: float) -> list[str]:
        """Return the new alarms of a row of metrics, each once a run; then observe it.

        progress: the share of the run that is done.
        """
        row = {name: value for name, value in row.items() if value is not None}
        usual = median(self._losses) if len(self._losses) >= 20 else math.inf
        self._observe(row)
        loss, density = row.get("loss", 0.0), row.get("density", 0.0)
        rank, spread = row.get("rankme", math.inf), row.get("std_mean", math.inf)
        signs = {
            f"unstable: the loss is {loss / usual:.1f} times its recent median; the EMA rate may "
            "not suit the added terms (raise --ema or lower --lr)":
                progress > 0.1 and abs(loss) > 4 * abs(usual),
            # Where no block is zero (a single group, lambda = 0) lambda is not to blame.
            "one group: nearly all latents feed a single group; lambda is too high (lower --lam "
            "or set --density)": row.get("max_usage", 0) > 0.9 and density < 1,
            # On the sphere it is at least 1.
            "no group: most latents feed no group at all; lambda is too high (lower --lam or set "
            "--density)": row.get("groups_per_latent", 1) < 0.5,
            "no sparsity: W ended dense although it was penalised; lambda is too low (raise --lam "
            "or set --density)": self._penalised and progress >= 1 and density > 0.99,
            f"collapse: RankMe {rank:.1f}, mean spread {spread:.1e}; the embeddings lose their "
            "dimensions (raise --beta or --ema, lower --lr)":
                rank < max(1.5, 0.1 * self._first_rank) or spread < 1e-4,
        }  # fmt: skip
        found = [text for text, there in signs.items() if there]
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
        with Progress(text, BarColumn(), TimeRemainingColumn(), console=self._console) as self._bar:
            self._task = self._bar.add_task(self._name, total=total, completed=start)
            yield

    def update(self, done: int, row: dict[str, Any]) -> None:
        """Show a row of metrics after `done` steps."""
        rate = row["images_per_second"]
        text = f"{self._name}  {done}/{self._total}  loss {row['loss']:.3f}  {rate:,.0f} images/s"
        if "groups_per_latent" in row:
            text += f"  {row['groups_per_latent']:.1f} groups per latent"
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif done - self._printed >= self._total / 10 or done == self._total:
            left = (self._total - done) * self._batch / max(rate, 1e-9)
            self.say(f"{text}  {left:.0f} s left")
            self._printed = done

    def say(self, text: str) -> None:
        if self._console and text:
            self._console.print(text, highlight=False)


def group_state(groups: GroupMap | None) -> dict[str, float]:
    """Return density, groups per latent, dead groups and the largest usage share of W."""
    if groups is None:
        return {}
    norms = groups.block_norms().detach()
    fed = (norms > 0).double()
    usage = norms.float().square().sum(1)
    return {
        "density": float(fed.mean()),
        "groups_per_latent": float(fed.sum(0).mean()),
        "dead_groups": int((fed.sum(1) == 0).sum()),
        "max_usage": float(usage.max() / usage.sum().clamp_min(1e-12)),
    }
