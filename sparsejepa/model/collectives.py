"""What the processes of a job exchange within a forward pass, with the gradients that belong to it.

Gradients of parameters are averaged over the processes afterwards. With L the mean of the
processes' losses, the average of what each computes by the chain rule is then the gradient of L, as
if one process had seen all rows. One process alone exchanges nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def alone() -> bool:
    """Return whether this process is the only one of its job."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def gather(x: Tensor) -> Tensor:
    """Return the rows of x [n, ...] of all processes, [k n, ...] in the order of ranks.

    n is the same everywhere. The gradient of the rows is summed over the processes.
    """
    return x if alone() else _gather(x)


def local(x: Tensor) -> Tensor:
    """Return this process's part of a parameter that is shared out, any other as it is."""
    # A DTensor; its module is slow to import, so it is not asked for by type.
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = len(x)
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank() * ctx.rows :][: ctx.rows]


# Compilers leave this call alone: a graph ends before and begins after it.
_gather: Any = torch.compiler.disable(_Gather.apply)
