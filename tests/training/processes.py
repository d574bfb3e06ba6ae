"""What each process of the tests of distributed training runs: `python processes.py JOB FOLDER`.

A job writes what it found to FOLDER, one file per process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsejepa.config import Config, preset
from sparsejepa.data.augment import Augment
from sparsejepa.distributed import World, gather, joined
from sparsejepa.errors import UserError
from sparsejepa.study import pretrain
from sparsejepa.training.build import build_model
from sparsejepa.training.step import TrainStep

SIDE, BATCH, STEPS = 16, 8, 20
SMALL: dict[str, Any] = {
    "encoder": "nano", "patch_size": 4, "batch_size": BATCH, "steps": STEPS, "predictor_dim": 16,
    "predictor_depth": 1, "num_groups": 4, "precision": "fp64", "lr": 1e-3, "lam": 0.012,
    "drop_path": 0.2, "device": "cpu", "threads": 1,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "parts": {"accumulate": 2},
    "fsdp-parts": {"accumulate": 2, "parallel": "fsdp", "checkpoint_activations": True},
    "control": {"pattern": "random", "density": 0.5, "predictor": "groups"},
    "control-parts": {
        "pattern": "random", "density": 0.5, "predictor": "groups", "groups": "concept",
        "accumulate": 2, "parallel": "fsdp", "checkpoint_activations": True,
    },
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "density": {"density": 0.5, "groups": "concept"},
    "posterior": {"kl": "posterior", "groups": "feature"},
    "dense": {"groups": "none", "predictor": "mlp", "parallel": "fsdp"},
    "plain": {"w_form": "plain", "predictor_pass": "union", "loss": "l2", "accumulate": 2},
}  # fmt: skip


def config_of(**settings: Any) -> Config:
    return preset("nano").replace(**{**SMALL, **settings})


def steps(world: World, **settings: Any) -> dict[str, Tensor]:
    """Train for 20 steps on random images; return all parameters and buffers, whole."""
    config = config_of(**settings)
    model = build_model(config, (SIDE, SIDE), STEPS).train()
    augment = Augment((SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3)
    step = TrainStep(config, model, augment, STEPS, world=world)
    for number in range(STEPS):
        seeded = torch.Generator().manual_seed(number)
        shape = (BATCH, SIDE, SIDE, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded)
        step(step.rows(pixels), number)
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def average(x: Tensor) -> Tensor:
    """The mean of x over the processes."""
    return gather(x[None]).mean(0)


def exchanged(x: Tensor, scale: Tensor, rows: slice) -> tuple[Tensor, nn.Linear]:
    """Return a loss that is nonlinear in statistics of the whole batch, and the layer below it.

    x: [n, 3]; `rows` are this process's.
    """
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    y = layer(x[rows])
    every = gather(y)
    own = (y * scale[rows]).square().mean()
    return (every.std(0) * every[0]).sum() + average(y.mean(0)).exp().sum() + own, layer


def check_collectives(world: World) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=seeded).double()
    scale = torch.randn(6, 1, generator=seeded).double()
    each = 6 // world.size
    rows = slice(world.rank * each, (world.rank + 1) * each)
    loss, layer = exchanged(x, scale, rows)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    return {"gradients": average(gradients), "loss": average(loss.detach())}


def failing(folder: Path, number: int, settings: dict[str, Any]) -> None:
    """Train; a process of rank 1 meets an error of its own at a step."""
    original, how = TrainStep.__call__, settings.pop("how", None)

    def call(self: TrainStep, pixels: Tensor, step: int) -> Tensor:
        if step == number and World.from_environment().rank == 1:
            if how == "kill":
                if World.from_environment().restarts == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise UserError("something is wrong with this process")
        return original(self, pixels, step)

    TrainStep.__call__ = call  # type: ignore[method-assign]
    pretrain(Config.from_dict(settings), out=folder / "run")


def main() -> None:
    job, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    world = World.from_environment()
    if job == "fail":
        failing(folder, int(sys.argv[3]), json.loads(sys.argv[4]))
        return
    with joined(world):
        for name in job.split(","):
            if name == "collectives":
                found = check_collectives(world)
            else:
                found = steps(world, **{**VARIANTS, **MORE}[name])
            torch.save(found, folder / f"{name}.{world.rank}")


if __name__ == "__main__":
    main()
