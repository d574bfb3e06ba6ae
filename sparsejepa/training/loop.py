"""The training loop: `_train` reads from top to bottom, the rest prepares it or tidies up."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sparsejepa.config import Config, load_toml, preset
from sparsejepa.data.store import DeviceImages, ImageSet
from sparsejepa.environment import environment, resolve_device
from sparsejepa.errors import UserError, flag
from sparsejepa.files import partial_files, read_json, write_text
from sparsejepa.interop import Encoder, load, save_encoder, save_groups
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.rng import generator
from sparsejepa.training.build import (
    arm_name,
    build_augment,
    build_model,
    default_run_dir,
    describe_parameters,
    load_images,
    total_steps,
)
from sparsejepa.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from sparsejepa.training.monitor import (
    METRICS,
    Alarms,
    MetricsLog,
    OnlineEvaluation,
    first_bad,
    group_state,
)
from sparsejepa.training.schedule import Schedule
from sparsejepa.training.step import TERMS, TrainStep

# Settings that may differ between a run and its resumption: they change no weight, rounding aside.
_FREE_ON_RESUME = {
    "data_root", "device", "threads", "compile", "checkpoint_every", "preset",
    "keep_checkpoints", "workers", "parallel", "checkpoint_activations",
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
    SIGTERM write a checkpoint and raise KeyboardInterrupt.

    Raises UserError for settings or data that cannot work and when a loss is not finite.
    """
    if isinstance(data, Config):
        config = data.replace(**settings)
    else:
        config = preset(settings.pop("preset", "best")).replace(data=data, **settings)
    config.check()
    run_dir = Path(out) if out is not None else default_run_dir(config)
    done = open_run(run_dir, config, resume)
    if done is not None:
        return done
    device = torch.device(resolve_device(config.run.device))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    image_set = load_images(config)
    total = total_steps(config, len(image_set))
    model = build_model(config, image_set.img_size, total).to(device)
    run_dir.mkdir(parents=True, exist_ok=True)
    for partial in partial_files(run_dir):
        partial.unlink(missing_ok=True)
    write_text(run_dir / "config.toml", tomli_w.dumps(config.to_dict()))
    write_text(run_dir / "environment.json", json.dumps(environment(code_of(run_dir)), indent=1))
    with _stop_on_signal() as stop:
        summary = _train(run_dir, config, image_set, model, total, stop, console)
    return Run(run_dir, config, summary)


def _train(
    run_dir: Path,
    config: Config,
    image_set: ImageSet,
    model: SparseJEPA,
    total: int,
    stop: list[int],
    console: Console | None,
) -> dict[str, Any]:
    device = next(model.parameters()).device
    batch = config.optim.batch_size
    images = DeviceImages(image_set, device)
    report = ProgressLine(console, arm_name(config))
    train_step = TrainStep(config, model, build_augment(config, image_set), total, report.say)
    order = EpochOrder(len(image_set), batch, config.run.seed, images.index_device)
    evaluate = OnlineEvaluation(image_set, images)
    eval_every = config.run.eval_every or max(1, total // 10)
    save_every = config.run.checkpoint_every or max(1, total // 20)

    start, seconds = 0, 0.0
    if (run_dir / CHECKPOINT).exists():
        progress = load_checkpoint(run_dir, model, train_step.optimizer)
        start, seconds = progress["step"], progress["seconds"]
        if progress.get("images", image_set.fingerprint) != image_set.fingerprint:
            raise UserError(
                f"{config.data}: the images or labels are not those that {run_dir} began with; "
                "bring them back or name a new folder with --out"
            )
    log = MetricsLog(run_dir, start)
    alarms = Alarms(config.penalised, log.alarms)
    for row in log.kept:
        alarms.observe(row)
    pending = torch.zeros(config.run.log_every, len(TERMS), device=device)
    model.train()

    with report.between(start, total, batch), contextlib.closing(log):
        since, counted = time.perf_counter(), start
        for step in range(start, total):
            row = step % config.run.log_every
            pending[row] = train_step(images.take(order(step)), step)
            done, last = step + 1, step + 1 == total
            stopping = bool(stop)  # read once: a signal from here on waits for the next step
            saving = last or done % save_every == 0 or stopping
            # The only point that waits for the device.
            if saving or row == config.run.log_every - 1:
                values = pending[: row + 1].cpu()
                # The total last: it is never finite when a term is not, and the term is the cause.
                bad = first_bad(values.roll(-1, dims=1), [*TERMS[1:], TERMS[0]])
                if bad:
                    raise UserError(
                        f"{run_dir}: '{bad[1]}' is not finite at step {step - row + bad[0]}; start "
                        "anew with a lower --lr or --beta, or a higher --ema (the last checkpoint "
                        "is untouched)"
                    )
                elapsed = time.perf_counter() - since
                numbers = _metrics(model, train_step.schedule, step, values[-1].tolist())
                rate = batch * (done - counted) / max(elapsed, 1e-9)
                numbers |= {"epoch": batch * done / len(image_set), "images_per_second": rate}
                seconds, since, counted = seconds + elapsed, time.perf_counter(), done
                log.write(numbers)
                report.update(done, numbers)
                if last or done % eval_every == 0:
                    numbers = {"step": step, **evaluate(model.target_encoder, train_step.autocast)}
                    log.write(numbers)
                    since = time.perf_counter()
                for alarm in alarms.check({**log.last, **numbers}, done / total):
                    log.write({"step": step, "alarm": alarm})
                    report.say(f"alarm, step {step}: {alarm}")
                if saving:
                    progress = {"step": done, "seconds": seconds, "images": image_set.fingerprint}
                    save_checkpoint(run_dir, model, train_step.optimizer, progress)
                    since = time.perf_counter()
                if stopping and not last:
                    raise KeyboardInterrupt
        return _finish(run_dir, config, image_set, model, total, seconds, log)


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


def _finish(
    run_dir: Path,
    config: Config,
    image_set: ImageSet,
    model: SparseJEPA,
    total: int,
    seconds: float,
    log: MetricsLog,
) -> dict[str, Any]:
    """Write the encoder, the groups and, last of all, summary.json."""
    save_encoder(
        run_dir,
        model.target_encoder,
        mean=image_set.mean,
        std=image_set.std,
        extra={"data": config.data, "arm": arm_name(config), "seed": config.run.seed},
    )
    if model.groups is not None:
        save_groups(run_dir, model.groups)
    w_norms = None if model.groups is None else model.groups.block_norms()
    count = total * config.optim.batch_size
    summary = {
        "arm": arm_name(config),
        "seed": config.run.seed,
        "data": config.data,
        "steps": total,
        "images": count,
        "seconds": seconds,
        "images_per_second": count / max(seconds, 1e-9),
        "final": log.last,
        "alarms": log.alarms,
        "w_nonzero": 0 if w_norms is None else int((w_norms > 0).sum()),
        "w_total": 0 if w_norms is None else w_norms.numel(),
    }
    write_text(run_dir / "summary.json", json.dumps(summary, indent=1))
    return summary


def open_run(run_dir: Path, config: Config, resume: bool) -> Run | None:
    """Check the run directory against the settings; return the run if it is finished."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--out {run_dir} is a file; name a folder")
    if not (run_dir / "config.toml").exists():
        if run_dir.is_dir() and set(run_dir.iterdir()) - set(partial_files(run_dir)):
            raise UserError(f"--out {run_dir} holds other files and no run; name a new folder")
        return None
    if not resume:
        raise UserError(
            f"--out {run_dir} already holds a run; continue it with --resume or name a new folder"
        )
    stored = read_config(run_dir).flat()
    for name, value in config.flat().items():
        if name not in _FREE_ON_RESUME and stored[name] != value:
            raise UserError(
                f"{flag(name)} {value}: the run in {run_dir} has {stored[name]}; resume with the "
                "same settings or name a new folder with --out"
            )
    if (run_dir / "summary.json").exists():
        return Run(run_dir, config, read_json(run_dir / "summary.json"))
    return None


def code_of(run_dir: Path) -> str:
    """Return the code that a run was trained with so far, as `environment` names it."""
    if not any((run_dir / name).exists() for name in (CHECKPOINT, "summary.json")):
        return ""
    path = run_dir / "environment.json"
    return read_json(path).get("code", "unknown") if path.exists() else "unknown"


def read_config(run_dir: Path) -> Config:
    """Return the settings of a run. Raises UserError if `run_dir` is not one."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    if not (run_dir / "config.toml").exists():
        raise UserError(f"{run_dir}: not a run directory (it has no config.toml)")
    return Config.from_dict(load_toml(run_dir / "config.toml"), str(run_dir / "config.toml"))


class EpochOrder:
    """Which images a step sees: a new permutation each epoch, keyed on (seed, epoch).

    It lies on `device`, so that on a GPU no step but an epoch's first sends anything there.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self._num_images, self._batch, self._seed = num_images, batch_size, seed
        self._device = device
        self._per_epoch = num_images // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> torch.Tensor:
        """Return the indices [B] of the images of `step`."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            keyed = generator(self._seed, epoch, "order")
            self._epoch = epoch
            order = torch.randperm(self._num_images, generator=keyed)
            self._order = order.to(self._device, non_blocking=True)
        return self._order[position * self._batch : (position + 1) * self._batch]


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop reads; a second one ends at once."""
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
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
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
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


def plan(config: Config, *, timed_steps: int = 3) -> dict[str, Any]:
    """Return what a run would do, after timing a few steps of it: the body of --dry-run."""
    config.check()
    device = torch.device(resolve_device(config.run.device))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    image_set = load_images(config)
    total = total_steps(config, len(image_set))
    model = build_model(config, image_set.img_size, total).to(device)
    images, batch = DeviceImages(image_set, device), config.optim.batch_size
    train_step = TrainStep(config, model, build_augment(config, image_set), total)
    order = EpochOrder(len(image_set), batch, config.run.seed, images.index_device)
    times = []
    for step in range(timed_steps + 1):
        began = time.perf_counter()
        train_step(images.take(order(0)), step).tolist()  # waits for the device
        times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[timed_steps // 2]  # the first step warms up
    memory = (
        torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _peak_rss_mb()
    )
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
        "precision": "bf16" if train_step.autocast._enabled else "fp32",
        "device": str(device),
        "images_per_second": batch / seconds,
        "minutes": total * seconds / 60,
        "peak_memory_mb": memory,
        "would_write": str(default_run_dir(config)),
        "files": ["config.toml", "environment.json", METRICS, CHECKPOINT, "encoder.safetensors",
                  "config.json", *(["groups.safetensors"] if model.groups else []), "summary.json"],
    }  # fmt: skip


def _peak_rss_mb() -> float:
    """Return the process's peak memory so far in MiB (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
