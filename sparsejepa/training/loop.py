"""A run from its first to its last step: `train` prepares it, `_train` is the loop.

Several processes all run it, on their own rows of each batch; they see the same numbers and so
decide alike. The main one prints and writes.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console
from torch import Tensor

from sparsejepa import version
from sparsejepa.config import Config, check_pattern
from sparsejepa.data.images import Batches, Images
from sparsejepa.distributed import (
    Agreement,
    World,
    joined,
    launch_name,
    mean_of,
    on_main,
)
from sparsejepa.encoders.encoder import (
    Encoder,
)
from sparsejepa.encoders.load import load
from sparsejepa.environment import environment, resolve_device
from sparsejepa.errors import Interrupted, UserError
from sparsejepa.files import partial_files, read_json, run_lock, write_text
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.rng import generator
from sparsejepa.training.build import (
    arm_name,
    build_augment,
    build_model,
    default_run_dir,
    describe_parameters,
    prepare,
    total_steps,
)
from sparsejepa.training.checkpoint import START, Checkpoints, open_run, read_config
from sparsejepa.training.finish import SKIPPED, finish, list_skipped, summary_of
from sparsejepa.training.monitor import (
    METRICS,
    MetricsLog,
    OnlineEvaluation,
    ProgressLine,
    Watch,
    check_trackers,
    group_state,
    trackers,
)
from sparsejepa.training.parallel import whole_encoder
from sparsejepa.training.schedule import Schedule
from sparsejepa.training.step import TERMS, TrainStep


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, settings and last numbers."""

    path: Path
    config: Config
    summary: dict[str, Any]

    def encoder(self, device: str = "cpu") -> Encoder:
        """Load the frozen EMA encoder."""
        return load(self.path, device)


def train(
    config: Config,
    images: Images | Callable[[Config], Images],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Pretrain on images, or on what a function of the settings loads; return the finished run.

    The run is written to `out`; with `resume` it goes on from the newest checkpoint there, if there
    is one. Ctrl-C and SIGTERM write a checkpoint and raise Interrupted, a KeyboardInterrupt.

    Called by every process that torchrun or SLURM started, the processes train one model together;
    when torchrun starts them anew, they go on where they were.

    Raises UserError for settings or data that cannot work and when a loss is not finite or
    explodes.
    """
    check_trackers(config.check().run.log)
    world = World.from_environment()
    check_shares(config, world)
    run_dir = Path(out) if out is not None else default_run_dir(config)
    device = world.place(resolve_device(config.run.device))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with joined(world, device):

        def look() -> dict[str, Any] | None:
            # What an attempt before this one began is gone on with, an older run is not.
            about = run_dir / "environment.json"
            anew = world.restarts > 0 and about.exists()
            anew = anew and read_json(about).get("launch") == launch_name()
            return open_run(run_dir, config, resume or anew)

        summary = on_main(world, look)
        if summary is None:
            check_pattern(config)
            start, own, image_set = prepare(config, images, run_dir, world)
            model = build_model(own, image_set.img_size, total_steps(own, len(image_set)), start)
            on_main(world, lambda: run_dir.mkdir(parents=True, exist_ok=True))
            with contextlib.ExitStack() as held, _stop_on_signal() as stop:
                on_main(world, lambda: held.enter_context(run_lock(run_dir)))
                # Another job may have begun or finished here while the images were loaded.
                summary = on_main(world, look)
                if summary is None:
                    if start is not None:
                        on_main(world, lambda: start.write(run_dir))
                    place = torch.device(device)
                    summary = _train(run_dir, own, world, image_set, model, place, stop, console)
    return Run(run_dir, read_config(run_dir), summary)


def _train(
    run_dir: Path,
    config: Config,
    world: World,
    image_set: Images,
    model: SparseJEPA,
    device: torch.device,
    stop: list[int],
    console: Console | None,
) -> dict[str, Any]:
    """Train a new model, or go on from the newest checkpoint; return the run's summary."""
    batch, total = config.optim.batch_size, total_steps(config, len(image_set))
    every, eval_every = max(1, min(10, total // 100)), max(1, total // 10)
    save_every = config.run.checkpoint_every or max(1, total // 20)
    report = ProgressLine(console if world.main else None, arm_name(config))
    augment = build_augment(config, image_set)
    train_step = TrainStep(config, model, augment, total, report.say, world, device)
    images = image_set.open(device, config.run.workers)
    order = epoch_order(config, image_set, images)
    evaluate = OnlineEvaluation(image_set, images, world=world)
    checkpoints = Checkpoints(run_dir, world=world, say=report.say)
    state = {"step": 0, "seconds": 0.0, "images": image_set.fingerprint}
    state |= checkpoints.restore(model, train_step.optimizer) or {}
    if state["images"] != image_set.fingerprint:
        raise UserError(
            f"{config.data}: the images or labels are not those that {run_dir} began with; "
            "bring them back or name a new folder with --out"
        )
    if world.main:
        _begin(run_dir, config)
    start = state["step"]
    if start == 0 and model.groups is not None:
        weak = train_step.schedule.too_weak(float(model.groups.block_norms().detach().min()))
        if weak:
            report.say(weak)
    pending = torch.zeros(every, len(TERMS), device=device)
    own_rows = (train_step.rows(order(step)) for step in range(start, total))
    model.train()

    with (
        trackers(config.run.log if world.main else (), run_dir, config, start) as shows,
        MetricsLog(run_dir, start, write=world.main, show=shows) as log,
        report.between(start, total, batch),
        contextlib.closing(images),
        contextlib.closing(Agreement(world)) as agreed,
    ):
        watch = Watch(["loss", *TERMS[1:]], config.penalised, log.rows)
        since, counted = time.perf_counter(), start
        for step, pixels in zip(range(start, total), images.batches(own_rows), strict=True):
            row, done = step % every, step + 1
            pending[row] = train_step(pixels, step)
            # Read once: a signal from here on waits for a next step.
            stopping = agreed(stop[0] if stop else 0)
            saving = done == total or done % save_every == 0 or stopping > 0
            if not saving and row < every - 1:
                continue
            values = mean_of(pending[: row + 1]).tolist()  # the only wait for the device
            _check_losses(run_dir, watch, model.groups, step - row, values, state["step"])
            elapsed = time.perf_counter() - since
            state["seconds"] += elapsed
            numbers = _metrics(model, train_step.schedule, step, values[-1])
            rate = batch * (done - counted) / max(elapsed, 1e-9)
            numbers |= {"epoch": batch * done / len(image_set), "images_per_second": rate}
            log.write(numbers)
            report.update(done, numbers)
            if done == total or done % eval_every == 0:
                numbers = {"step": step, **evaluate(model.target_encoder, train_step.autocast)}
                log.write(numbers)
            for alarm in watch.alarms({**log.last, **numbers}, done / total):
                log.write({"step": step, "alarm": alarm})
                report.say(f"alarm, step {step}: {alarm}")
            if saving:
                state |= {"step": done, "train_version": version.TRAIN_VERSION}
                checkpoints.save(model, train_step.optimizer, state)
            if stopping and done < total:
                raise Interrupted(stopping)
            since, counted = time.perf_counter(), done
        skipped = list_skipped(run_dir, images, world)
        if skipped:
            report.say(f"{skipped} images could not be read: {run_dir / SKIPPED}")
        encoder = whole_encoder(model.target_encoder, world.main)
        summary = summary_of(config, model, total, state["seconds"], log) | {"skipped": skipped}
        if encoder is not None:
            finish(run_dir, config, image_set, images, encoder, model.groups, summary)
    # Nobody leaves before everything is written.
    return on_main(world, lambda: summary)


def _check_losses(
    run_dir: Path,
    watch: Watch,
    groups: GroupMap | None,
    first: int,
    values: list[list[float]],
    saved: int,
) -> None:
    """Raise UserError if the steps from `first` on with these `values` end the run.

    W is looked at as well: its gradient is no part of the common norm.
    """
    wrong = next(filter(None, map(watch.failed, range(first, first + len(values)), values)), None)
    if wrong is None and groups is not None and not groups.W.isfinite().all():
        wrong = f"'W' is not finite at step {first + len(values) - 1}"
    if wrong:
        last = f"the last good checkpoint is that of step {saved}"
        raise UserError(
            f"{run_dir}: {wrong}; start anew with a lower --lr or --beta, or a higher --ema "
            f"({last if saved else 'there is no checkpoint yet'})"
        )


def _begin(run_dir: Path, config: Config) -> None:
    """Write what a run directory says of its run before the first step."""
    for partial in partial_files(run_dir):
        partial.unlink(missing_ok=True)
    about = environment()
    if launch_name():
        about["launch"] = launch_name()
    # The settings last: a folder that has them holds a run, and one that is started anew looks up
    # in the environment whether that run is its own.
    write_text(run_dir / "environment.json", json.dumps(about, indent=1))
    write_text(run_dir / "config.toml", tomli_w.dumps(config.to_dict()))


def _metrics(
    model: SparseJEPA, schedule: Schedule, step: int, values: list[float]
) -> dict[str, Any]:
    """Return the row of metrics.jsonl for the last of the pending steps."""
    row: dict[str, Any] = {"step": step, "loss": values[0]}
    row |= dict(zip(TERMS[1:], values[1:], strict=True))
    row |= {"lr": schedule.lr(step), "ema": schedule.ema(step)}
    if model.groups is not None:
        steered = model.controller is not None and step < schedule.penalised_steps
        row["lam"] = float(model.controller.lam) if steered else schedule.lam(step)  # type: ignore[union-attr]
    return row | group_state(model.groups)


def check_shares(config: Config, world: World) -> None:
    """Raise UserError unless the batch divides into equal shares for processes and parts."""
    batch, parts = config.optim.batch_size, config.optim.accumulate
    shares = world.size * parts
    if batch % shares:
        raise UserError(
            f"--batch-size {batch}: {world.size} processes and --accumulate {parts} need a "
            f"multiple of {shares}; use {max(1, round(batch / shares)) * shares}"
        )


def epoch_order(config: Config, image_set: Images, images: Batches) -> EpochOrder:
    """Return the order in which a run sees its images."""
    count, batch, seed = len(image_set), config.optim.batch_size, config.run.seed
    return EpochOrder(count, batch, seed, images.index_device)


class EpochOrder:
    """Which images a step sees: a new permutation each epoch, keyed on (seed, epoch).

    It lies on `device`, so that on a GPU no step but an epoch's first sends anything there.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._num_images, self._batch, self._seed = num_images, batch_size, seed
        self._device = device
        self._per_epoch = num_images // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> torch.Tensor:
        """Return the indices [B] of the images of `step`."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self._permutation(epoch).to(self._device, non_blocking=True)
        return self._order[position * self._batch : (position + 1) * self._batch]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self._num_images, generator=generator(self._seed, epoch, "order"))


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop reads; a second one ends at once."""
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught:
            raise Interrupted(number)
        caught.append(number)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: the caller's handlers stay
            previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def plan(
    config: Config, images: Images | Callable[[Config], Images], *, timed_steps: int = 3
) -> dict[str, Any]:
    """Return what a run as `train` would do, after timing a few steps of it."""
    check_shares(config.check(), World())
    check_pattern(config)
    device = torch.device(resolve_device(config.run.device))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    start, config, image_set = prepare(config, images)
    total, batch = total_steps(config, len(image_set)), config.optim.batch_size
    model = build_model(config, image_set.img_size, total, start).to(device)
    opened = image_set.open(device, config.run.workers)
    train_step = TrainStep(config, model, build_augment(config, image_set), total)
    order = epoch_order(config, image_set, opened)
    times = []
    with contextlib.closing(opened):
        for step in range(timed_steps + 1):
            began = time.perf_counter()
            train_step(opened.take(order(0)), step).tolist()  # waits for the device
            times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[timed_steps // 2]  # the first step warms up
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else _peak_rss_mb()
    sampler = model.sampler
    return {
        "arm": arm_name(config),
        "data": config.data,
        "train_images": len(image_set),
        "img_size": list(image_set.img_size),
        "patches": sampler.grid_size[0] * sampler.grid_size[1],
        "steps": total,
        "epochs": total * batch / len(image_set),
        "images_seen": total * batch,
        "parameters": describe_parameters(model),
        "target_blocks": config.masks.num_targets,
        "target_shapes": [list(shape) for shape in sampler.target_shapes],
        "context_counts": list(sampler.context_counts),
        "merged_targets": sorted(set((sampler.union or {}).values())),
        "precision": train_step.precision,
        "device": str(device),
        "images_per_second": batch / seconds,
        "minutes": total * seconds / 60,
        "peak_memory_mb": peak,
        "would_write": str(default_run_dir(config)),
        "files": ["config.toml", "environment.json", *([START] if start else []), METRICS,
                  "checkpoints", "encoder.safetensors", "config.json",
                  *(["groups.safetensors"] if model.groups else []), "summary.json"],
    }  # fmt: skip


def _peak_rss_mb() -> float:
    """Return the process's peak memory so far in MiB (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
