"""The training loop: `_train` reads from top to bottom, the rest prepares it or tidies up.

Several processes all run it, on their own rows of each batch; they see the same numbers and so
decide alike. The main one prints and writes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from rich.console import Console
from torch import Tensor

from sparsejepa import version
from sparsejepa.checks import check_pattern
from sparsejepa.config import Config, load_toml, preset
from sparsejepa.data.store import DeviceImages, ImageSet
from sparsejepa.data.stream import ImageStream, StreamImages, block_order, open_images
from sparsejepa.distributed import (
    Agreement,
    World,
    first_here,
    gather_texts,
    joined,
    launch_name,
    mean_of,
    on_main,
)
from sparsejepa.environment import environment, resolve_device
from sparsejepa.errors import Interrupted, UserError, flag
from sparsejepa.files import partial_files, read_json, write_text
from sparsejepa.interop import Encoder, load, save_encoder, save_groups
from sparsejepa.interop.module import measure_rms, measure_seen
from sparsejepa.lock import LOCK, run_lock
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.rng import generator
from sparsejepa.training.build import (
    arm_name,
    build_augment,
    build_model,
    build_sampler,
    default_run_dir,
    load_images,
    total_steps,
)
from sparsejepa.training.checkpoint import Checkpoints, train_version
from sparsejepa.training.guard import Guard
from sparsejepa.training.loggers import Loggers, check_loggers
from sparsejepa.training.monitor import (
    Alarms,
    MetricsLog,
    OnlineEvaluation,
    ProgressLine,
    choose_images,
    group_state,
)
from sparsejepa.training.parallel import whole_encoder
from sparsejepa.training.pictures import Pictures
from sparsejepa.training.schedule import Schedule
from sparsejepa.training.start import FROM_START, START, find_start, license_of
from sparsejepa.training.step import TERMS, TrainStep

MEASURED = 2048
"""Training images over which what the groups see and their units are measured, at most."""
SKIPPED = "skipped.txt"
"""File and reason, a line each, of images that could not be read while training."""

# Settings that may differ between a run and its resumption: they change no weight, rounding aside.
_FREE_ON_RESUME = {
    "data_root", "device", "threads", "compile", "checkpoint_every", "preset",
    "keep_checkpoints", "workers", "parallel", "checkpoint_activations", "max_unreadable", "log",
}  # fmt: skip


# Of a finished run's summary.json, what is shown of it.
_SUMMARY = {
    "arm": str, "steps": int, "seconds": (int, float), "images_per_second": (int, float),
    "final": dict, "alarms": list,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, settings and last numbers."""

    path: Path
    config: Config
    summary: dict[str, Any]

    def encoder(self, device: str = "cpu") -> Encoder:
        """Load the frozen EMA encoder."""
        return load(self.path, device)


def pretrain(
    data: str | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Pretrain on a data set and return the finished run.

    `data` names the images (see ``sparsejepa data list``) or is a whole `Config`; `settings` are
    the flat names of `Config` (``lam=0.01, epochs=20, preset="nano"``). The run is written to
    `out`; with `resume` it goes on from the newest checkpoint there, if there is one. Ctrl-C and
    SIGTERM write a checkpoint and raise Interrupted, a KeyboardInterrupt.

    Called by every process that torchrun or SLURM started, the processes train one model together;
    when torchrun starts them anew, they go on where they were.

    Raises UserError for settings or data that cannot work and when a loss is not finite or
    explodes.
    """
    if isinstance(data, Config):
        config = data.replace(**settings)
    else:
        config = preset(settings.pop("preset", "best")).replace(data=data, **settings)
    config.check()
    check_loggers(config.run.log)
    world = World.from_environment()
    check_shares(config, world)
    run_dir = Path(out) if out is not None else default_run_dir(config)
    device = world.place(resolve_device(config.run.device))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with joined(world, device):

        def look() -> dict[str, Any] | None:
            # What an attempt before this one began is gone on with, an older run is not.
            anew = world.restarts > 0 and _about(run_dir).get("launch") == launch_name()
            return open_run(run_dir, config, resume or anew)

        summary = on_main(world, look)
        if summary is None:
            check_pattern(config)
            start = first_here(world, lambda: find_start(config, run_dir))
            config = start.settings(config) if start else config
            images = first_here(world, lambda: load_images(config, start))
            model = build_model(config, images.img_size, total_steps(config, len(images)), start)
            on_main(world, lambda: run_dir.mkdir(parents=True, exist_ok=True))
            with run_lock(run_dir, world), _stop_on_signal() as stop:
                # Another job may have begun or finished here while the images were loaded.
                summary = on_main(world, look)
                if summary is None:
                    if start is not None:
                        on_main(world, lambda: start.write(run_dir))
                    place = torch.device(device)
                    summary = _train(run_dir, config, world, images, model, place, stop, console)
    return Run(run_dir, read_config(run_dir), summary)


def _train(
    run_dir: Path,
    config: Config,
    world: World,
    image_set: ImageSet | ImageStream,
    model: SparseJEPA,
    device: torch.device,
    stop: list[int],
    console: Console | None,
) -> dict[str, Any]:
    batch, total = config.optim.batch_size, total_steps(config, len(image_set))
    report = ProgressLine(console if world.main else None, arm_name(config))
    augment = build_augment(config, image_set)
    train_step = TrainStep(config, model, augment, total, report.say, world, device)
    images = open_images(image_set, device, config.run.workers)
    blocks = image_set.blocks if isinstance(image_set, ImageStream) else None
    order = EpochOrder(len(image_set), batch, config.run.seed, images.index_device, blocks)
    evaluate = OnlineEvaluation(image_set, images, world=world)
    eval_every = config.run.eval_every or max(1, total // 10)
    save_every = config.run.checkpoint_every or max(1, total // 20)

    if world.main:
        _begin(run_dir, config)
    checkpoints = Checkpoints(
        run_dir, keep=config.run.keep_checkpoints, world=world, say=report.say
    )
    progress = checkpoints.restore(model, train_step.optimizer)
    start, seconds, saved = 0, 0.0, "there is no checkpoint yet"
    if progress is not None:
        start, seconds = progress["step"], progress["seconds"]
        saved = f"the last good checkpoint is that of step {start}"
        if progress.get("images", image_set.fingerprint) != image_set.fingerprint:
            raise UserError(
                f"{config.data}: the images or labels are not those that {run_dir} began with; "
                "bring them back or name a new folder with --out"
            )
    log = MetricsLog(run_dir, start, write=world.main)
    guard, alarms = Guard(["loss", *TERMS[1:]]), Alarms(config.penalised, log.alarms)
    for row in log.kept:
        guard.observe(row)
        alarms.observe(row)
    loggers = Loggers(config.run.log if world.main else (), run_dir, config, log.kept, report.say)
    pictures = Pictures(image_set, images, config.run.seed, world) if config.run.log else None
    pending = torch.zeros(config.run.log_every, len(TERMS), device=device)
    if model.groups is not None and start == 0:
        weak = train_step.schedule.too_weak(float(model.groups.block_norms().detach().min()))
        if weak:
            report.say(weak)
    agreed = Agreement(world)
    model.train()

    with (
        report.between(start, total, batch),
        log,
        loggers,
        contextlib.closing(images),
        contextlib.closing(agreed),
    ):
        since, counted = time.perf_counter(), start
        own_rows = (train_step.rows(order(step)) for step in range(start, total))
        for step, pixels in zip(range(start, total), images.batches(own_rows), strict=True):
            row = step % config.run.log_every
            pending[row] = train_step(pixels, step)
            done, last = step + 1, step + 1 == total
            # Read once: a signal from here on waits for a next step.
            stopping = agreed(stop[0] if stop else 0)
            saving = last or done % save_every == 0 or stopping > 0
            # The only point that waits for the device.
            if saving or row == config.run.log_every - 1:
                values = mean_of(pending[: row + 1]).tolist()
                wrong = map(guard.check, range(step - row, done), values)
                wrong = next(filter(None, wrong), None) or _w_wrong(model.groups, step)
                if wrong:
                    raise UserError(
                        f"{run_dir}: {wrong}; start anew with a lower --lr or --beta, or a "
                        f"higher --ema ({saved})"
                    )
                elapsed = time.perf_counter() - since
                numbers = _metrics(model, train_step.schedule, step, values[-1])
                rate = batch * (done - counted) / max(elapsed, 1e-9)
                numbers |= {"epoch": batch * done / len(image_set), "images_per_second": rate}
                drawn: dict[str, np.ndarray] = {}
                seconds, since, counted = seconds + elapsed, time.perf_counter(), done
                guard.observe(numbers)
                log.write(numbers)
                report.update(done, numbers)
                if last or done % eval_every == 0:
                    numbers = {"step": step, **evaluate(model.target_encoder, train_step.autocast)}
                    log.write(numbers)
                    if pictures is not None:
                        drawn = pictures(model, train_step.autocast, step)
                    since = time.perf_counter()
                for alarm in alarms.check({**log.last, **numbers}, done / total):
                    log.write({"step": step, "alarm": alarm})
                    report.say(f"alarm, step {step}: {alarm}")
                loggers.show({**log.newest, **drawn})
                if saving:
                    progress = {"step": done, "seconds": seconds, "images": image_set.fingerprint}
                    progress["train_version"] = version.TRAIN_VERSION
                    checkpoints.save(model, train_step.optimizer, progress)
                    saved = f"the last good checkpoint is that of step {done}"
                    since = time.perf_counter()
                if stopping and not last:
                    raise Interrupted(stopping)
        skipped = _list_skipped(run_dir, images, world)
        if skipped:
            report.say(f"{skipped} images could not be read: {run_dir / SKIPPED}")
        encoder = whole_encoder(model.target_encoder, world.main)
        summary = _summary(config, model, total, seconds, log) | {"skipped": skipped}
        if encoder is not None:
            _finish(run_dir, config, image_set, images, encoder, model.groups, summary)
    # Nobody leaves before everything is written.
    return on_main(world, lambda: summary)


def _w_wrong(groups: GroupMap | None, step: int) -> str | None:
    """Return what is wrong with W, whose gradient is no part of the common norm."""
    whole = groups is None or bool(groups.W.isfinite().all())
    return None if whole else f"'W' is not finite at step {step}"


def _begin(run_dir: Path, config: Config) -> None:
    """Write what a run directory says of its run before the first step."""
    for partial in partial_files(run_dir):
        partial.unlink(missing_ok=True)
    about = environment()
    if launch_name():
        about["launch"] = launch_name()
    write_text(run_dir / "config.toml", tomli_w.dumps(config.to_dict()))
    write_text(run_dir / "environment.json", json.dumps(about, indent=1))


def _metrics(
    model: SparseJEPA, schedule: Schedule, step: int, values: list[float]
) -> dict[str, Any]:
    """Return the row of metrics.jsonl for the last of the pending steps."""
    row: dict[str, Any] = {"step": step, "loss": values[0]}
    row |= dict(zip(TERMS[1:], values[1:], strict=True))
    row |= {"lr": schedule.lr(step), "ema": schedule.ema(step)}
    if model.groups is not None:
        steered = model.controller is not None and not schedule.frozen(step)
        row["lam"] = float(model.controller.lam) if steered else schedule.lam(step)  # type: ignore[union-attr]
    return row | group_state(model.groups)


def _summary(
    config: Config, model: SparseJEPA, total: int, seconds: float, log: MetricsLog
) -> dict[str, Any]:
    w_norms = None if model.groups is None else model.groups.block_norms()
    count = total * config.optim.batch_size
    return {
        "arm": arm_name(config),
        "seed": config.run.seed,
        "data": config.data,
        "steps": total,
        "images": count,
        "train_version": version.TRAIN_VERSION,
        "seconds": seconds,
        "images_per_second": count / max(seconds, 1e-9),
        "final": log.last,
        "alarms": log.alarms,
        "w_nonzero": 0 if w_norms is None else int((w_norms > 0).sum()),
        "w_total": 0 if w_norms is None else w_norms.numel(),
    }


def _finish(
    run_dir: Path,
    config: Config,
    image_set: ImageSet | ImageStream,
    images: DeviceImages | StreamImages,
    encoder: ViT,
    groups: GroupMap | None,
    summary: dict[str, Any],
) -> None:
    """Write the encoder, the groups with statistics of it and, last of all, summary.json."""
    about: dict[str, Any] = {"data": config.data, "arm": arm_name(config), "seed": config.run.seed}
    if license := license_of(run_dir, config):
        about["license"] = license
    save_encoder(
        run_dir,
        encoder,
        mean=image_set.mean,
        std=image_set.std,
        extra=about,
    )
    if groups is not None:
        index = torch.from_numpy(choose_images(image_set, MEASURED, np.random.default_rng(0)))
        mean, std = image_set.mean, image_set.std
        frozen = Encoder(encoder.float(), name=run_dir.name, mean=mean, std=std)
        frozen.to(groups.W.device)
        groups = copy.deepcopy(groups).eval()  # the model's keep the context encoder's statistics
        looks = index.repeat(MEASURED // len(index))  # of few images, under several masks each
        sampler = build_sampler(config, frozen.grid_size)
        context = measure_seen(frozen, groups.kind, images.batches(looks.split(64)), sampler)
        assert groups.norm.running_mean is not None and groups.norm.running_var is not None
        groups.norm.running_mean.copy_(context[0])
        groups.norm.running_var.copy_(context[1])
        seen = measure_seen(frozen, groups.kind, images.batches(index.split(64)))
        rms = measure_rms(frozen, groups, images.batches(index.split(64)), seen)
        save_groups(run_dir, groups, rms, seen)
    write_text(run_dir / "summary.json", json.dumps(summary, indent=1))


def _list_skipped(run_dir: Path, images: DeviceImages | StreamImages, world: World) -> int:
    """Add the images that could not be read while training to `SKIPPED`; return how many it lists.

    All processes' and, after a resume, those of earlier parts of the run.
    """
    lines = [f"{name}\t{reason}" for name, reason in images.skipped]
    found = {line for text in gather_texts("\n".join(lines)) for line in text.splitlines()}
    path = run_dir / SKIPPED
    if path.exists():
        found |= set(path.read_text(encoding="utf-8").splitlines())
    if found and world.main:
        write_text(path, "".join(f"{line}\n" for line in sorted(found)))
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


def open_run(run_dir: Path, config: Config, resume: bool) -> dict[str, Any] | None:
    """Check the run directory against the settings; return the summary if the run is finished."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--out {run_dir} is a file; name a folder")
    if not (run_dir / "config.toml").exists():
        own = {run_dir / LOCK, run_dir / START, *partial_files(run_dir)}
        if run_dir.is_dir() and set(run_dir.iterdir()) - own:
            raise UserError(f"--out {run_dir} holds other files and no run; name a new folder")
        return None
    if not resume:
        raise UserError(
            f"--out {run_dir} already holds a run; continue it with --resume or name a new folder"
        )
    begun = train_version(run_dir)
    if begun not in (None, version.TRAIN_VERSION):
        raise UserError(
            f"{run_dir}: the run there computes train version {begun}, this release "
            f"{version.TRAIN_VERSION}; name a new folder with --out, or finish it with the release "
            "that began it"
        )
    stored = read_config(run_dir).flat()
    free = _FREE_ON_RESUME | (FROM_START if config.model.init else set())
    for name, value in config.flat().items():
        if name not in free and stored[name] != value:
            raise UserError(
                f"{flag(name)} {value}: the run in {run_dir} has {stored[name]}; resume with the "
                "same settings or name a new folder with --out"
            )
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path)
    for name, kind in _SUMMARY.items():
        if not isinstance(summary, dict) or not isinstance(summary.get(name), kind):
            raise UserError(
                f"{path}: damaged, '{name}' is missing or of another kind; remove it and start "
                "again with --resume"
            )
    return summary


def _about(run_dir: Path) -> dict[str, Any]:
    """Return a run's environment.json, nothing if there is none or it is no object."""
    path = run_dir / "environment.json"
    found = read_json(path) if path.exists() else None
    return found if isinstance(found, dict) else {}


def read_config(run_dir: Path) -> Config:
    """Return the settings of a run. Raises UserError if `run_dir` is not one."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    if not (run_dir / "config.toml").exists():
        raise UserError(f"{run_dir}: not a run directory (it has no config.toml)")
    return Config.from_dict(load_toml(run_dir / "config.toml"), str(run_dir / "config.toml"))


class EpochOrder:
    """Which images a step sees: a new permutation each epoch, keyed on (seed, epoch).

    It lies on `device`, so that on a GPU no step but an epoch's first sends anything there. Images
    that are read in `blocks` of these lengths stay near each other (`block_order`).
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        blocks: np.ndarray | None = None,
    ) -> None:
        self._num_images, self._batch, self._seed = num_images, batch_size, seed
        self._device, self._blocks = device, blocks
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
        if self._blocks is None:
            return torch.randperm(self._num_images, generator=generator(self._seed, epoch, "order"))
        return torch.as_tensor(block_order(self._blocks, self._seed, epoch))


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
