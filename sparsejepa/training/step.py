"""One training step: the same object in the loop, in --dry-run and in the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Literal

import torch
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.augment import Augment
from sparsejepa.environment import has_bf16
from sparsejepa.model.jepa import Losses, SparseJEPA
from sparsejepa.rng import derive_seed, generator
from sparsejepa.training.build import build_optimizer
from sparsejepa.training.schedule import Schedule

TERMS = [*(field.name for field in fields(Losses)), "grad_norm"]
"""What a step returns, in order."""


class TrainStep:
    """From uint8 images to moved weights, without waiting for the device anywhere.

    Args:
        config: the settings of the run.
        model: on its device.
        augment: what is done to the images.
        total: steps of the run, which its schedules need.
        say: gets the one line that says that compilation did not work.

    Attributes:
        model, optimizer: what a checkpoint holds.
        autocast: the context in which networks run: bf16 if asked for or, with ``auto``, where the
            hardware has it.
    """

    def __init__(
        self,
        config: Config,
        model: SparseJEPA,
        augment: Augment,
        total: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.augment = model, augment
        self.optimizer = build_optimizer(config, model)
        self.schedule = Schedule(config, total)
        self.device = next(model.parameters()).device
        wanted = config.optim.precision
        bf16 = wanted == "bf16" or (wanted == "auto" and has_bf16(str(self.device)))
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self._seed, self._clip = config.run.seed, config.optim.clip or float("inf")
        self._trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._say = say
        self._compile: Literal["no", "untried", "works"] = "untried" if config.run.compile else "no"

    def __call__(self, pixels: Tensor, step: int) -> Tensor:
        """Take the step on images [B, H, W, 3] uint8; return the values of `TERMS`, fp32."""
        x = self.augment(pixels, generator(self._seed, step, "augment", self.device))
        losses = self._backward(x, step)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step(step)
        return torch.cat([losses.stacked(), norm.detach().float()[None]])

    def _backward(self, x: Tensor, step: int) -> Losses:
        """Return the losses of images [B, 3, h, w]; their gradients are in the parameters."""
        sampler = self.model.sampler
        masks = sampler.sample(len(x), seed=self._seed, step=step, device=self.device)

        def run() -> Losses:
            # Layers draw (stochastic depth) from torch's own generator: key it on the step too.
            torch.manual_seed(derive_seed(self._seed, step, "layers"))
            with self.autocast:
                losses = self.model(x, step=step, masks=masks)
            losses.total.backward()
            return losses

        if self._compile == "no":
            return run()
        # Two sizes change from step to step. Said beforehand, one compilation serves all of them.
        if len(sampler.context_counts) > 1:
            torch._dynamo.mark_dynamic(masks.context, 1)
        if len(sampler.target_shapes) > 1:
            torch._dynamo.mark_dynamic(masks.targets, 2)
        if self._compile == "works":
            return run()
        try:
            self.model.losses = torch.compile(self.model.losses)
            losses = run()
            self._compile = "works"
            return losses
        except Exception as error:  # whatever compilers fail with; a true fault fails again below
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"--compile: not possible here, going on without it ({reason})")
        self._compile = "no"
        self.model.__dict__.pop("losses", None)  # the attribute that hides the method
        self.optimizer.zero_grad()
        return run()
