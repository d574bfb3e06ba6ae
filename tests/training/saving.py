"""A small model, and what the tests of checkpoints do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsejepa.training.checkpoint import Checkpoints

Tensors = dict[str, torch.Tensor]
SHARD = "shard-00001-model-00001-of-00001.safetensors"


class Net(nn.Module):
    """What a model may hold: 0-d, int64, float64 and frozen tensors, an idle one, and W."""

    def __init__(self, seed: int, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(width, 7), nn.Linear(7, 3, bias=False).double()
        self.narrow, self.idle = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)
        self.W = nn.Parameter(torch.randn(3, 2, 5))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("rate", torch.tensor(0.1 + seed, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).double()) * self.narrow


def optimizer_of(net: Net, one_group_each: bool = False) -> torch.optim.AdamW:
    trained = [p for p in net.parameters() if p.requires_grad and p is not net.W]
    groups = [[p] for p in trained] if one_group_each else [trained[::2], trained[1::2]]
    return torch.optim.AdamW([{"params": group} for group in groups], lr=0.1, fused=True)


def train(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(4, net.first.in_features, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        net.W.mul_(0.9)
        net.count += 1  # type: ignore[operator]


def tensors_of(net: Net, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return copies of all that must survive, whole also where it is sharded."""
    names = {p: name for name, p in net.named_parameters()}
    found = dict(net.state_dict())
    for p, state in optimizer.state.items():
        found |= {f"{names[p]}/{key}": t for key, t in state.items()}  # type: ignore[index]
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()  # type: ignore
        for name, t in found.items()
    }


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def restored(run: Path, said: list[str] | None = None) -> tuple[dict[str, Any] | None, Tensors]:
    """Restore into a model that was never trained."""
    net = Net(99)
    optimizer = optimizer_of(net, one_group_each=True)
    lines = [] if said is None else said
    progress = Checkpoints(run, say=lines.append).restore(net, optimizer)
    return progress, tensors_of(net, optimizer)


def write(run: Path, steps: tuple[int, ...], keep: int = 3) -> dict[int, Tensors]:
    """Save after each of `steps`; return what was saved."""
    net = Net(0)
    optimizer, kept = optimizer_of(net), {}
    checkpoints = Checkpoints(run, keep=keep)
    for step in steps:
        train(net, optimizer, step)
        checkpoints.save(net, optimizer, {"step": step, "seconds": step / 3, "images": "ä"})
        kept[step] = tensors_of(net, optimizer)
    return kept


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())
