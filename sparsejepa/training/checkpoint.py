"""The state of a run as one safetensors file: model, optimiser and progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors, save_tensors

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write model, optimiser and `progress` (step, seconds, ...) to `run_dir`."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": t for name, t in state.items()})
    save_tensors(run_dir / CHECKPOINT, tensors, progress)


def load_checkpoint(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model and optimiser in place and return `progress`."""
    tensors, progress = load_tensors(run_dir / CHECKPOINT)
    weights, state = {}, {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "model":
            weights[rest] = tensor
        else:
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{run_dir / CHECKPOINT}: does not fit this model ({detail})") from None
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progress
