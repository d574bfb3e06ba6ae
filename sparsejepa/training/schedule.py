"""Learning rates, EMA rate, lambda and density as pure functions of the step.

Steps count from 0; a run has `total` of them. Nothing here has state, so a resumed run needs none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsejepa.config import Config
from sparsejepa.model.groups import TRAVEL, Phase, mean_momentum, ramp, strength

LR_FINAL = 1e-6
"""Learning rate at the end of the cosine."""

EMA_REFERENCE, _EMA_REFERENCE_STEPS = (0.992, 0.9999), 29_000
"""EMA rates at the start and the end of a run of so many steps (300 epochs of 50,000 at 512)."""


def warmup_cosine(step: int, total: int, peak: float, final: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the run, then half a cosine to `final`."""
    rise = round(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, total: int, start: float, final: float) -> float:
    """From `start` at step 0 to `final` at the last step."""
    return start + (final - start) * step / max(1, total - 1)


def scaled_ema(decay: float, total: int) -> float:
    """Carry an EMA rate of the reference length over to `total` steps.

    1 - decay grows as the run shrinks, up to 0.1, so that the start is forgotten at the same share.
    """
    return 1 - min(0.1, (1 - decay) * _EMA_REFERENCE_STEPS / total)


@dataclass(frozen=True)
class Schedule:
    """All schedules of one run. `total`: optimiser steps."""

    config: Config
    total: int

    def lr(self, step: int) -> float:
        """Learning rate of AdamW."""
        optim = self.config.optim
        return warmup_cosine(step, self.total, optim.lr, LR_FINAL, optim.warmup)

    def ema(self, step: int) -> float:
        """EMA rate of the target encoder after this step (I-JEPA: linear)."""
        optim = self.config.optim
        start, final = (scaled_ema(decay, self.total) for decay in EMA_REFERENCE)
        start = start if optim.ema is None else optim.ema
        final = final if optim.ema_final is None else optim.ema_final
        return linear(step, self.total, start, final)

    @property
    def penalised_steps(self) -> int:
        """Steps before the debias part, in which lambda acts."""
        return max(1, self.total - round(self.config.groups.debias * self.total))

    def phase(self, step: int) -> Phase:
        """What W is under at this step, see `GroupMap.steered_step`.

        A density is reached exactly where the debias part begins, or at the last step; while
        debiasing the zero pattern is frozen and lambda is 0.
        """
        if not self.config.penalised:
            return "penalised"
        steered = self.config.groups.density is not None
        if steered and step == min(self.penalised_steps, self.total - 1):
            return "freeze"
        return "frozen" if step >= self.penalised_steps else "penalised"

    def w_rate(self, step: int) -> float:
        """How far W goes at this step under the average pull; the sum is `TRAVEL`.

        Constant, and falling to 0 from the step on at which the pattern is frozen.
        """
        rest = self.total - self.penalised_steps
        share = min(1.0, (self.total - step - 0.5) / rest) if rest else 1.0
        return TRAVEL * share / (self.penalised_steps + rest / 2)

    def w_momentum(self, step: int) -> float:
        """Momentum of W's gradient, see `mean_momentum`."""
        return mean_momentum(step, self.total)

    def lam(self, step: int) -> float:
        """Group-lasso penalty when it is fixed, see `ramp`; 0 where the pattern is frozen."""
        acts = self.config.penalised and step < self.penalised_steps
        return self.config.groups.lam * ramp(step / self.penalised_steps) if acts else 0.0

    def too_weak(self, smallest: float) -> str:
        """Return a line if the fixed penalty by itself takes less than `smallest`, the smallest
        norm of a block, off a block over the whole run; "" otherwise."""
        lam = self.config.groups.lam
        shrinks = math.fsum(
            self.w_rate(step) * strength(self.lam(step)) for step in range(self.total)
        )
        if not self.config.penalised or self.config.groups.density or shrinks >= smallest:
            return ""
        said = f"--lam {lam:g} hardly acts in this run: "
        if not shrinks:
            return said + "it is over before the penalty begins; use more --steps or less --debias"
        enough = 1.2 * lam * (smallest / shrinks) ** 4
        return said + (
            f"by itself it takes {shrinks:.2g} off a column by the end, and the smallest starts at "
            f"{smallest:.2g}; use {enough:.1g} or more"
        )

    def wanted_density(self, step: int) -> float:
        """Density wanted at this step: from 1 to the final value as the penalty grows."""
        final = 1.0 if self.config.groups.density is None else self.config.groups.density
        last = step >= min(self.penalised_steps, self.total - 1)
        return final if last else 1 + (final - 1) * ramp(step / self.penalised_steps)
