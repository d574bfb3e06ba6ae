"""One training step: the same object in the loop, in --dry-run and in bench/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Literal

import torch
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.augment import Augment
from sparsejepa.distributed import Share, World
from sparsejepa.environment import has_bf16
from sparsejepa.errors import UserError
from sparsejepa.model.jepa import Losses, SparseJEPA
from sparsejepa.rng import derive_seed, generator
from sparsejepa.training.build import build_optimizer
from sparsejepa.training.parallel import backward, clip_gradients, spread
from sparsejepa.training.schedule import Schedule

CLIP = 1.0
"""Largest norm of the network's gradient."""

TERMS = [*(field.name for field in fields(Losses)), "grad_norm"]
"""What a step returns, in order."""


class TrainStep:
    """From uint8 images to moved weights, without waiting for the device anywhere.

    Args:
        config: the settings of the run.
        model: on its device, or on the CPU if it goes to `device`.
        augment: what is done to the images.
        total: steps of the run, which its schedules need.
        say: gets the one line that says that compilation did not work.
        world: the processes that take the step together.
        device: where the model goes; where it is if not given.

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
        world: World = World(),  # noqa: B008  (it is frozen)
        device: torch.device | None = None,
    ) -> None:
        self.model, self.augment = model, augment
        self.device = device or next(model.parameters()).device
        wanted = config.optim.precision
        if wanted == "fp64":
            model.double()
        self._dtype = next(model.parameters()).dtype
        for part in (model.context_encoder, model.predictor):
            if hasattr(part, "blocks"):
                part.recompute = config.run.checkpoint_activations  # type: ignore[assignment]
        self._network = spread(model, config.run.parallel, world.size, self.device)
        self._world, self._parts = world, config.optim.accumulate
        self.optimizer = build_optimizer(config, model)
        self.schedule = Schedule(config, total)
        bf16 = wanted == "bf16" or (wanted == "auto" and has_bf16(str(self.device)))
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self._seed = config.run.seed
        self._trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._say = say
        self._compile: Literal["no", "untried", "works"] = "untried" if config.run.compile else "no"

    def __call__(self, pixels: Tensor, step: int) -> Tensor:
        """Take the step on images [n, H, W, 3] uint8; return the values of `TERMS`, fp32.

        The images are this process's rows of the global batch, its parts one after the other (see
        `rows`); the losses are those of its rows, the means of the parts.
        """
        losses = []
        for part, images in enumerate(pixels.chunk(self._parts)):
            share = Share(self._world.rank, self._world.size, part, self._parts)
            drawn = generator(self._seed, step, "augment", self.device)
            x = self.augment(images, drawn, share).to(self._dtype)
            with backward(self._network, last=part == self._parts - 1):
                losses.append(self._backward(x, step, share).stacked())
        norm = clip_gradients(self._trained, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step(step)
        terms = losses[0] if self._parts == 1 else torch.stack(losses).mean(0)
        return torch.cat([terms, norm.detach().float()[None]])

    @property
    def precision(self) -> str:
        """What networks compute in: bf16 (matrix products), fp32 or fp64."""
        if self.autocast._enabled:
            return "bf16"
        return "fp64" if self._dtype == torch.float64 else "fp32"

    def rows(self, index: Tensor) -> Tensor:
        """Return this process's rows of a global batch, in the order in which a step takes them."""
        if self._world.size == 1:
            return index
        rank, size, parts = self._world.rank, self._world.size, self._parts
        shares = [Share(rank, size, part, parts) for part in range(parts)]
        return torch.cat([index[share.rows(len(index))] for share in shares])

    def _backward(self, x: Tensor, step: int, share: Share) -> Losses:
        """Return the losses of images [n, 3, h, w]; their gradients are in the parameters."""
        sampler, batch = self.model.sampler, len(x) * share.count
        masks = self.model.draw_masks(batch, step, share, self.device)

        def run() -> Losses:
            # Layers draw (stochastic depth) from torch's own generator: key it on the step too.
            torch.manual_seed(derive_seed(self._seed, step, "layers"))
            with self.autocast:
                losses = self._network(x, step=step, masks=masks, share=share)
            (losses.total / self._parts if self._parts > 1 else losses.total).backward()
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
        from torch._dynamo.exc import TorchDynamoException

        try:
            self.model.losses = torch.compile(self.model.losses)
            losses = run()
            self._compile = "works"
            return losses
        except Exception as error:  # whatever compilers fail with; a true fault fails again below
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self._world.size > 1:  # the others may be within the step and cannot begin it anew
                if not isinstance(error, TorchDynamoException):
                    raise
                raise UserError(f"--compile: not possible here ({reason}); leave it out") from None
            self._say(f"--compile: not possible here, going on without it ({reason})")
        self._compile = "no"
        self.model.__dict__.pop("losses", None)  # the attribute that hides the method
        self.model.zero_grad()  # of W as well, which the optimiser does not hold
        return run()
