"""The processes of one job: who this one is, how they meet, and what they tell each other.

Started by torchrun, several processes train one model: each step's images, masks and draws are
those of the global batch, of which every process takes its rows. Imports torch only when it is
used: the command line reads this module before anything heavy.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from sparsejepa.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")
# The first process of a machine may decode a whole data set while the others wait for it. With gloo
# a process that dies is noticed at once; NCCL's peers wait until torchrun ends them.
_TIMEOUT = timedelta(hours=12)
_PATIENCE = timedelta(seconds=3)
"""Within which an error that all processes have comes up in all of them."""


@dataclass(frozen=True)
class World:
    """This process among those of its job; by default the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    restarts: int = 0
    """How often torchrun has started the job's processes anew."""

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes what is written once."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> World:
        """Return what torchrun says of this process.

        Raises UserError for a variable that is not a number.
        """
        if "RANK" not in variables or "WORLD_SIZE" not in variables:
            return cls()
        numbers = []
        for name in (
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"
        ):  # fmt: skip
            value = variables.get(name, "1" if name.endswith("SIZE") else "0")
            if not value.isdecimal():
                raise UserError(f"{name} is '{value}' and not a number; unset it or use torchrun")
            numbers.append(int(value))
        return cls(*numbers)

    def place(self, device: str) -> str:
        """Return the device of this process: on GPUs each process of a machine has its own.

        Raises UserError if there are fewer GPUs than processes, or one is named for all.
        """
        if self.size == 1 or device == "cpu":
            return device
        if ":" in device:
            raise UserError(f"--device {device}: for one process; several take --device cuda")
        import torch

        count = torch.cuda.device_count()
        if count == 0:
            raise UserError(f"--device {device}: no GPU on this machine; use --device cpu")
        if count > 1 and self.local_rank >= count:
            raise UserError(
                f"{self.local_size} processes on a machine with {count} GPUs; start at most "
                f"{count} (--nproc-per-node {count})"
            )
        # A launcher may show each process a single GPU, its own.
        return f"cuda:{self.local_rank if count > 1 else 0}"


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch a process takes in one of the parts of a step.

    A batch is cut into `parts`, each of them into one piece per process, all in order.
    """

    rank: int = 0
    size: int = 1
    part: int = 0
    parts: int = 1

    @property
    def count(self) -> int:
        """Into how many pieces the global batch is cut."""
        return self.size * self.parts

    def rows(self, batch: int) -> slice:
        """Return this process's rows in this part, of a global batch."""
        return _piece(batch, self.part * self.size + self.rank, self.count)

    def part_rows(self, batch: int) -> slice:
        """Return the rows of all processes in this part."""
        return _piece(batch, self.part, self.parts)


def _piece(batch: int, index: int, count: int) -> slice:
    if batch % count:
        raise ValueError(f"a batch of {batch} rows does not divide into {count} pieces")
    return slice(index * batch // count, (index + 1) * batch // count)


def _engine() -> Any:
    """Return torch.distributed, of which type checkers do not see all public names."""
    import torch.distributed

    return torch.distributed


def alone() -> bool:
    """Return whether this process is the only one that is `joined` now."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def current() -> World:
    """Return this process among those that are `joined` now."""
    return World() if alone() else World.from_environment()


@contextlib.contextmanager
def joined(world: World, device: str = "cpu") -> Iterator[None]:
    """Connect the processes of a job while the context lasts: NCCL between GPUs, gloo otherwise.

    An exception that leaves the context says whose it is (`speaks_for`): if all processes have the
    same one it stays as it is; one that only this process has is marked with its rank, and the
    others, which lose the connection, raise UserError. One process alone has nothing to connect.
    """
    import torch

    dist = _engine()
    if world.size == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    # What an attempt before this one left in torchrun's store must not be met again.
    store = dist.PrefixStore(f"attempt-{world.restarts}/job-{next(_joins)}", _meeting_place(world))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=_TIMEOUT,
    )
    leave = dist.destroy_process_group
    try:
        yield
    except Exception as error:
        if on_gpu:  # NCCL's polite end would wait for exchanges that nobody takes part in
            leave = getattr(dist.distributed_c10d, "_abort_process_group", lambda: None)
        raise _settled(error, world, store) from None
    finally:
        leave()


_joins = itertools.count()


@functools.cache
def _meeting_place(world: World) -> Any:
    """Return the store at which the processes find each other; the same for every job of theirs."""
    return next(_engine().rendezvous("env://", world.rank, world.size))[0]


def everywhere(world: World, work: Callable[[], T]) -> list[T]:
    """Return what `work` returns in each process; if it fails in one, all raise that error."""
    if world.size == 1:
        return [work()]
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    outcomes: list[Any] = [None] * world.size
    _engine().all_gather_object(outcomes, (result, failure))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def on_main(world: World, work: Callable[[], T]) -> T:
    """Return on every process what `work` returns on the main one, or raise its error."""
    return everywhere(world, work if world.main else lambda: None)[0]  # type: ignore[return-value]


def first_here(world: World, work: Callable[[], T]) -> T:
    """Return what `work` returns, on each machine after its first process has done it.

    So that one process fills a cache and the others find it filled. If it fails in one, all raise
    that error.
    """
    held: list[T] = []
    for turn in (world.local_rank == 0, world.local_rank != 0):
        everywhere(world, lambda turn=turn: held.append(work()) if turn else None)
    return held[0]


def own_rows(rows: np.ndarray, world: World) -> np.ndarray:
    """Return a process's part of `rows` [n], one part after the other and all of equal length.

    The last parts are filled up from the first rows; `gather_rows` leaves that out again.
    """
    each = -(-len(rows) // world.size)
    return rows.take(range(world.rank * each, (world.rank + 1) * each), mode="wrap")


def gather_rows(x: Tensor, total: int) -> Tensor:
    """Return the rows of all processes one after the other, the first `total` of them, on the CPU.

    x: [n, ...], equal n on all processes. Without gradients.
    """
    return gather(x.detach().cpu())[:total]


def mean_of(x: Tensor) -> Tensor:
    """Return the mean of x over the processes, in place. Without gradients."""
    if not alone():
        _engine().all_reduce(x)
        x /= _engine().get_world_size()
    return x


def largest_of(number: int) -> int:
    """Return the largest number that any process tells, such as a signal's; over the CPU."""
    if alone():
        return number
    import torch

    told = torch.tensor(number)
    _engine().all_reduce(told, op=_engine().ReduceOp.MAX)
    return int(told)


def gather(x: Tensor) -> Tensor:
    """Return the rows of x [n, ...] of all processes, [k n, ...] in the order of ranks.

    n is the same everywhere. The gradient of the rows is summed over the processes. Gradients of
    parameters are averaged over them afterwards: with L the mean of the processes' losses, what
    comes out is then the gradient of L, as if one process had seen all rows.
    """
    return x if alone() else _gathering()(x)


@functools.cache
def _gathering() -> Callable[[Tensor], Tensor]:
    """Return `gather` for several processes, which compilers leave alone."""
    import torch

    dist = _engine()

    class Gather(torch.autograd.Function):
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

    gathered: Any = torch.compiler.disable(Gather.apply)
    return gathered


def local(x: Tensor) -> Tensor:
    """Return this process's part of a parameter that is shared out, any other as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[attr-defined]


def speaks_for(world: World, error: BaseException) -> str | None:
    """Return what to put before a message about `error`; None if another process says it."""
    owner = getattr(error, "process", None)
    if (0 if owner is None else owner) != world.rank:
        return None
    return "" if owner is None else f"process {world.rank} of {world.size}: "


def _settled(error: Exception, world: World, store: Any) -> Exception:
    """Return `error`, marked with the `process` that tells of it unless all have the same."""
    dist = _engine()
    words = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL")
    network = isinstance(error, dist.DistError) or type(error) is RuntimeError
    lost = network and any(word in str(error) for word in words)
    found = {world.rank: "" if lost else f"{type(error).__name__}: {error}"}
    names = {rank: f"failed-{rank}" for rank in range(world.size)}
    with contextlib.suppress(Exception):  # the store may be gone together with its process
        store.set(names[world.rank], found[world.rank])
        with contextlib.suppress(dist.DistError):  # some process has none to tell
            store.wait(list(names.values()), _PATIENCE)
        for rank, name in names.items():
            if store.check([name]):
                found[rank] = store.get(name).decode()
    causes = [rank for rank in sorted(found) if found[rank]]
    if not causes:
        return UserError("another process of this job ended without a word (was it killed?)")
    if lost:
        error = UserError(f"process {causes[0]} of {world.size}: {found[causes[0]]}")
    if lost or len(causes) < world.size or len(set(found.values())) > 1:
        error.process = causes[0] if lost else world.rank  # type: ignore[attr-defined]
    return error
