"""A run from its first to its last step: `train` prepares it, `_train` is the loop.

Several processes all run it, on their own rows of each batch; they see the same numbers and so
decide alike. The main one prints and writes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console

import sparsejepa
from sparsejepa.config import Config, check_pattern
from sparsejepa.data.images import Batches, Images
from sparsejepa.distributed import World, everywhere, joined, largest_of, mean_of, on_main
from sparsejepa.encoders.encoder import (
    Encoder,
    group_rms,
    measure_seen,
    save_encoder,
    save_groups,
)
from sparsejepa.encoders.load import load
from sparsejepa.environment import environment, resolve_device
from sparsejepa.errors import Interrupted, UserError
from sparsejepa.files import partial_files, run_lock, write_text
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.rng import generator
from sparsejepa.training.build import (
    Start,
    arm_name,
    build_augment,
    build_model,
    build_sampler,
    default_run_dir,
    describe_parameters,
    prepare,
    total_steps,
)
from sparsejepa.training.checkpoint import Checkpoints, open_run, read_config
from sparsejepa.training.monitor import (
    MetricsLog,
    OnlineEvaluation,
    ProgressLine,
    Watch,
    check_trackers,
    choose_images,
    group_state,
    trackers,
)
from sparsejepa.training.parallel import whole_encoder
from sparsejepa.training.schedule import Schedule
from sparsejepa.training.step import TERMS, TrainStep

MEASURED = 2048
"""Training images over which what the groups see and their units are measured, at most."""


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

    Called by every process that torchrun started, the processes train one model together; when
    torchrun starts them anew, they go on with the run that is there.

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
    resume = resume or world.restarts > 0
    with joined(world, device), contextlib.ExitStack() as held:
        summary = on_main(world, lambda: open_run(run_dir, config, resume))
        if summary is not None:
            return Run(run_dir, read_config(run_dir), summary)
        check_pattern(config)
        start, own, image_set = prepare(config, images, world)
        model = build_model(own, image_set.img_size, total_steps(own, len(image_set)), start)
        stop = held.enter_context(_stop_on_signal())

        def take() -> dict[str, Any] | None:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(run_lock(run_dir))
            # Another job may have begun or finished here while the images were loaded.
            return open_run(run_dir, config, resume)

        summary = on_main(world, take)
        if summary is None:
            place = torch.device(device)
            job = _Job(run_dir, own, world, start, image_set, model, place, stop, console)
            summary = _train(job)
        return Run(run_dir, read_config(run_dir), summary)


@dataclass(frozen=True)
class _Job:
    """What a run begins with; `config` has the sizes of the encoder that it starts from."""

    run_dir: Path
    config: Config
    world: World
    start: Start | None
    image_set: Images
    model: SparseJEPA
    device: torch.device
    stop: list[int]
    console: Console | None


def _train(job: _Job) -> dict[str, Any]:
    """Train a new model, or go on from the newest checkpoint; return the run's summary."""
    config, world, model, count = job.config, job.world, job.model, len(job.image_set)
    batch, total = config.optim.batch_size, total_steps(config, count)
    every, eval_every = max(1, min(10, total // 100)), max(1, total // 10)
    save_every = config.run.checkpoint_every or max(1, total // 20)
    report = ProgressLine(job.console if world.main else None, arm_name(config))
    augment = build_augment(config, job.image_set)
    train_step = TrainStep(config, model, augment, total, report.say, world, job.device)
    checkpoints = Checkpoints(job.run_dir, world=world, say=report.say)
    state = _begin(job, train_step, checkpoints, report)
    first = state["step"]
    images = job.image_set.open(job.device, config.run.workers)
    evaluate = OnlineEvaluation(job.image_set, images, world=world)
    order = EpochOrder(count, batch, config.run.seed, images.index_device)
    own_rows = (train_step.rows(order(step)) for step in range(first, total))
    pending = torch.zeros(every, len(TERMS), device=job.device)
    with (
        trackers(config.run.log if world.main else (), job.run_dir, config, first) as shows,
        MetricsLog(job.run_dir, first, write=world.main, show=shows) as log,
        report.between(first, total, batch),
        contextlib.closing(images),
    ):
        watch = Watch(["loss", *TERMS[1:]], config.penalised, log.rows)
        since, counted = time.perf_counter(), first
        for step, pixels in zip(range(first, total), images.batches(own_rows), strict=True):
            row, done = step % every, step + 1
            pending[row] = train_step(pixels, step)
            saving = done == total or done % save_every == 0 or (world.size == 1 and bool(job.stop))
            if not saving and row < every - 1:
                continue
            # Read once: a signal from here on waits for a next time.
            stopping = largest_of(job.stop[0] if job.stop else 0)
            values = mean_of(pending[: row + 1]).tolist()  # the only wait for the device
            _check_losses(job, watch, step - row, values, state["step"])
            elapsed = time.perf_counter() - since
            state["seconds"] += elapsed
            numbers = _metrics(model, train_step.schedule, step, values[-1])
            numbers["epoch"] = batch * done / count
            numbers["images_per_second"] = batch * (done - counted) / max(elapsed, 1e-9)
            log.write(numbers)
            report.update(done, numbers)
            if done == total or done % eval_every == 0:
                log.write({"step": step, **evaluate(model.target_encoder, train_step.autocast)})
            for alarm in watch.alarms(log.last, done / total):
                log.write({"step": step, "alarm": alarm})
                report.say(f"alarm, step {step}: {alarm}")
            if saving or stopping:
                state |= {"step": done, "train_version": sparsejepa.TRAIN_VERSION}
                checkpoints.save(model, train_step.optimizer, state)
            if stopping and done < total:
                raise Interrupted(stopping)
            since, counted = time.perf_counter(), done
        return _finish(job, total, state["seconds"], images, log, report)


def _begin(
    job: _Job, train_step: TrainStep, checkpoints: Checkpoints, report: ProgressLine
) -> dict[str, Any]:
    """Restore the newest checkpoint, if there is one; return how far the run is.

    Raises UserError if it was trained on other images or began with another encoder.
    """
    config, run_dir, model = job.config, job.run_dir, job.model.train()
    began = {"images": job.image_set.fingerprint, "init": job.start and job.start.fingerprint}
    state = {"step": 0, "seconds": 0.0, **began}
    state |= checkpoints.restore(model, train_step.optimizer) or {}
    named = {"images": f"{config.data}: the images or labels are"}
    named["init"] = f"--init {config.model.init}: the encoder is"
    for name, what in named.items():
        if state[name] != began[name]:
            raise UserError(
                f"{what} not what {run_dir} began with; bring it back or name a new folder with "
                "--out"
            )
    if job.world.main:
        for partial in partial_files(run_dir):
            partial.unlink(missing_ok=True)
        write_text(run_dir / "environment.json", json.dumps(environment(), indent=1))
        write_text(run_dir / "config.toml", tomli_w.dumps(config.to_dict()))
    if state["step"] == 0 and model.groups is not None:
        smallest = float(model.groups.block_norms().detach().min())
        report.say(train_step.schedule.too_weak(smallest))
    return state


def _check_losses(
    job: _Job, watch: Watch, first: int, values: list[list[float]], saved: int
) -> None:
    """Raise UserError if the steps from `first` on with these `values` end the run.

    W is looked at as well: its gradient is no part of the common norm.
    """
    groups = job.model.groups
    wrong = next(filter(None, map(watch.failed, range(first, first + len(values)), values)), None)
    if wrong is None and groups is not None and not groups.W.isfinite().all():
        wrong = f"'W' is not finite at step {first + len(values) - 1}"
    if wrong:
        last = f"the last good checkpoint is that of step {saved}"
        raise UserError(
            f"{job.run_dir}: {wrong}; start anew with a lower --lr or --beta, or a higher --ema "
            f"({last if saved else 'there is no checkpoint yet'})"
        )


def _metrics(
    model: SparseJEPA, schedule: Schedule, step: int, values: list[float]
) -> dict[str, Any]:
    """Return the row of metrics.jsonl for the last of the pending steps."""
    row: dict[str, Any] = {"step": step, "loss": values[0]}
    row |= dict(zip(TERMS[1:], values[1:], strict=True))
    row |= {"lr": schedule.lr(step), "ema": schedule.ema(step)}
    if model.groups is not None:
        steered = model.controller if step < schedule.penalised_steps else None
        row["lam"] = schedule.lam(step) if steered is None else float(steered.lam)
    return row | group_state(model.groups)


def _finish(
    job: _Job, total: int, seconds: float, images: Batches, log: MetricsLog, report: ProgressLine
) -> dict[str, Any]:
    """Write the encoder, the groups and, last of all, summary.json; return what that says."""
    config, groups, run_dir = job.config, job.model.groups, job.run_dir
    w_norms = torch.empty(0) if groups is None else groups.block_norms()
    count = total * config.optim.batch_size
    about: dict[str, Any] = {"arm": arm_name(config), "seed": config.run.seed, "data": config.data}
    summary = about | {
        "steps": total,
        "images": count,
        "train_version": sparsejepa.TRAIN_VERSION,
        "seconds": seconds,
        "images_per_second": count / max(seconds, 1e-9),
        "final": log.last,
        "alarms": log.alarms,
        "w_nonzero": int((w_norms > 0).sum()),
        "w_total": w_norms.numel(),
        "skipped": _list_skipped(job, images, report),
    }
    encoder = whole_encoder(job.model.target_encoder, job.world.main)
    if encoder is not None:
        if job.start is not None and job.start.license:
            about["license"] = job.start.license
        mean, std = job.image_set.mean, job.image_set.std
        save_encoder(run_dir, encoder, mean=mean, std=std, extra=about)
        if groups is not None:
            frozen = Encoder(encoder.float(), name=run_dir.name, mean=mean, std=std)
            _save_groups(job, images, frozen.to(groups.W.device), groups)
        write_text(run_dir / "summary.json", json.dumps(summary, indent=1))
    # Nobody leaves before everything is written.
    return on_main(job.world, lambda: summary)


def _save_groups(job: _Job, images: Batches, encoder: Encoder, groups: GroupMap) -> None:
    """Write the groups with statistics of the encoder that is kept, over training images."""
    index = torch.from_numpy(choose_images(job.image_set, MEASURED))
    groups = copy.deepcopy(groups).eval()  # the model's keep the context encoder's statistics
    looks = index.repeat(MEASURED // len(index))  # of few images, under several masks each
    sampler = build_sampler(job.config, encoder.grid_size)
    mean, cov = measure_seen(encoder, groups.kind, images.batches(looks.split(64)), sampler)
    assert groups.norm.running_mean is not None and groups.norm.running_var is not None
    groups.norm.running_mean.copy_(mean)
    groups.norm.running_var.copy_(cov.diagonal())
    mean, cov = measure_seen(encoder, groups.kind, images.batches(index.split(64)))
    seen = torch.stack([mean, cov.diagonal()]).float()
    save_groups(job.run_dir, groups, group_rms(groups, cov), seen)


def _list_skipped(job: _Job, images: Batches, report: ProgressLine) -> int:
    """Add the images that could not be read while training to skipped.txt; return their number.

    All processes' and, after a resume, those of earlier parts of the run.
    """
    lines = [f"{name}\t{reason}" for name, reason in images.skipped]
    found = {line for part in everywhere(job.world, lambda: lines) for line in part}
    path = job.run_dir / "skipped.txt"
    if path.exists():
        found |= set(path.read_text(encoding="utf-8").splitlines())
    if found and job.world.main:
        write_text(path, "".join(f"{line}\n" for line in sorted(found)))
        report.say(f"{len(found)} images could not be read: {path}")
    return len(found)


def check_shares(config: Config, world: World) -> None:
    """Raise UserError unless the batch divides into equal shares for processes and parts."""
    batch, parts = config.optim.batch_size, config.optim.accumulate
    shares = world.size * parts
    if batch % shares:
        raise UserError(
            f"--batch-size {batch}: {world.size} processes and --accumulate {parts} need a "
            f"multiple of {shares}; use {max(1, round(batch / shares)) * shares}"
        )


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
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> torch.Tensor:
        """Return the indices [B] of the images of `step`."""
        epoch, position = divmod(step, self._num_images // self._batch)
        if epoch != self._epoch:
            drawn = generator(self._seed, epoch, "order")
            order = torch.randperm(self._num_images, generator=drawn)
            self._epoch, self._order = epoch, order.to(self._device, non_blocking=True)
        return self._order[position * self._batch : (position + 1) * self._batch]


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
    order = EpochOrder(len(image_set), batch, config.run.seed, opened.index_device)
    times = []
    with contextlib.closing(opened):
        for step in range(timed_steps + 1):
            began = time.perf_counter()
            train_step(opened.take(order(0)), step).tolist()  # waits for the device
            times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[timed_steps // 2]  # the first step warms up
    found = {
        "arm": arm_name(config),
        "data": config.data,
        "train_images": len(image_set),
        "img_size": list(image_set.img_size),
        "patches": model.sampler.grid_size[0] * model.sampler.grid_size[1],
        "merged_targets": sorted(set((model.sampler.union or {}).values())),
        "steps": total,
        "epochs": total * batch / len(image_set),
        "images_seen": total * batch,
        "parameters": describe_parameters(model),
        "precision": train_step.precision,
        "device": str(device),
        "images_per_second": batch / seconds,
        "minutes": total * seconds / 60,
        "would_write": str(default_run_dir(config)),
    }
    if device.type == "cuda":
        found["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found
