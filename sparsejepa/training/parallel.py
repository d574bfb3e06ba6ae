"""A model on several processes: whole on each (DDP), or shared out among them (FSDP2).

torch's own engines do it; FSDP's is slow to import, so only its use imports it. Under FSDP the
group map stays whole on each process, since the proximal step on W couples its groups; its
gradients are averaged here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsejepa.distributed import local
from sparsejepa.encoders.encoder import vit_arguments
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.vit import ViT


def spread(
    model: SparseJEPA, kind: Literal["ddp", "fsdp"], size: int, device: torch.device
) -> nn.Module:
    """Put the model on `device` and return what to call in its place on one of `size` processes.

    With fsdp the parameters of `model` itself become shares (DTensor) of the whole ones, all but
    the group map's. All processes must hold equal weights.
    """
    if size == 1:
        there = next(model.parameters()).device == device
        return model if there else model.to(device)
    if kind == "ddp":
        with warnings.catch_warnings():
            # Later versions of torch have another name for `broadcast_buffers`, earlier ones not.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model.to(device), broadcast_buffers=False, gradient_as_bucket_view=True
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Said of every output that is a view; nothing here writes into one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (size,))
    whole: set[nn.Parameter] = set()
    if model.groups is not None:
        whole = set(model.groups.to(device).parameters())
    # Block by block, so that never more than one of them is whole on a GPU.
    for part in (model.context_encoder, model.target_encoder, model.predictor):
        for block in getattr(part, "blocks", ()):
            fully_shard(block, mesh=mesh)
        if part is not None:
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return model


@contextlib.contextmanager
def backward(network: nn.Module, *, last: bool) -> Iterator[None]:
    """Average the gradients of the backward pass within if it is the `last` of a step.

    Those of the parts before stay where they are and add up.
    """
    if isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
        return
    if _is_shared_out(network):
        network.set_requires_gradient_sync(last)  # type: ignore[operator]
    yield
    if _is_shared_out(network) and last:
        _average([p.grad for p in network.parameters() if _whole(p) and p.grad is not None])


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients down to a common norm of `limit`; return the norm that they had.

    As torch's `clip_grad_norm_`, also where some parameters are shared out and others whole.
    """
    if all(map(_whole, parameters)):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    shared = [local(p.grad) for p in parameters if not _whole(p) and p.grad is not None]
    whole = [p.grad for p in parameters if _whole(p) and p.grad is not None]
    square = _square(shared)
    dist.all_reduce(square)
    if whole:
        square = square + _square(whole)
    norm = square.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*shared, *whole):
        gradient *= scale
    return norm


def whole_encoder(encoder: ViT, main: bool) -> ViT | None:
    """Return a copy of a shared out encoder on the CPU of the main process, None elsewhere.

    An encoder that is whole is returned itself. Collective; one parameter at a time is put together
    on the other processes.
    """
    if not _is_shared_out(encoder):
        return encoder if main else None
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        full = tensor.full_tensor()
        if main:
            tensors[name] = full.cpu()
    if not main:
        return None
    with torch.device("meta"):
        copy = ViT(**vit_arguments(encoder))
    copy.load_state_dict(tensors, assign=True)
    return copy


def _is_shared_out(network: nn.Module) -> bool:
    return hasattr(network, "set_requires_gradient_sync")  # an FSDPModule


def _whole(parameter: Tensor) -> bool:
    return local(parameter) is parameter


def _square(gradients: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


def _average(gradients: Sequence[Tensor]) -> None:
    """Replace each process's gradients by their mean over the processes, in one exchange."""
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
