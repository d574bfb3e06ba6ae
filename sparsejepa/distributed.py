"""The processes of one job: who this one is, how they meet, and what they tell each other.

Started by torchrun or SLURM, several processes train one model: each step's images, masks and
draws are those of the global batch, of which every process takes its rows. Imports torch only when
it is used: the command line reads this module before anything heavy.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sparsejepa.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# The first process of a machine may decode a whole data set while the others wait for it. With gloo
# a process that dies is noticed at once, by its closed connections. NCCL's peers wait for it inside
# a kernel until their launcher ends them: torchrun does so, srun with --kill-on-bad-exit=1.
_TIMEOUT = timedelta(hours=12)
_PATIENCE = 3.0
"""Seconds in which an error that all processes have comes up in all of them."""


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
        """Return what torchrun, or else a SLURM step of several tasks, says of this process.

        Raises UserError for a variable that is not a number.
        """

        def number(name: str, default: int) -> int:
            value = variables.get(name, str(default))
            if not value.isdecimal():
                raise UserError(f"{name} is '{value}' and not a number; unset it or use torchrun")
            return int(value)

        if "RANK" in variables and "WORLD_SIZE" in variables:
            return cls(
                number("RANK", 0),
                number("WORLD_SIZE", 1),
                number("LOCAL_RANK", 0),
                number("LOCAL_WORLD_SIZE", 1),
                number("TORCHELASTIC_RESTART_COUNT", 0),
            )
        tasks = number("SLURM_STEP_NUM_TASKS", 1)
        if "SLURM_STEP_ID" in variables and tasks > 1:
            # "4(x2),3": the largest number of tasks on one machine.
            per_node = re.findall(r"(?:^|,)(\d+)", variables.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            local_size = max(map(int, per_node), default=1)
            return cls(number("SLURM_PROCID", 0), tasks, number("SLURM_LOCALID", 0), local_size)
        return cls()

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
        if count == 1:  # the launcher shows each process its own
            return "cuda:0"
        if self.local_rank >= count:
            raise UserError(
                f"{self.local_size} processes on a machine with {count} GPUs; start at most "
                f"{count} (--nproc-per-node {count})"
            )
        return f"cuda:{self.local_rank}"


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
        return self._piece(batch, self.part * self.size + self.rank, self.count)

    def part_rows(self, batch: int) -> slice:
        """Return the rows of all processes in this part."""
        return self._piece(batch, self.part, self.parts)

    @staticmethod
    def _piece(batch: int, index: int, count: int) -> slice:
        each, rest = divmod(batch, count)
        if rest:
            raise ValueError(f"a batch of {batch} rows does not divide into {count} pieces")
        return slice(index * each, (index + 1) * each)


def current() -> World:
    """Return this process among those that are `joined` now."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World.from_environment()


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
    name = f"attempt-{world.restarts}/job-{next(_joins)}"
    store = dist.PrefixStore(name, _meeting_place(world))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=_TIMEOUT,
    )
    leave = _abort if on_gpu else dist.destroy_process_group
    try:
        yield
        leave = dist.destroy_process_group
    except Exception as error:
        raise _settled(error, world, store) from None
    finally:
        leave()


def _abort() -> None:
    """Drop the connections: NCCL's polite end would wait for exchanges that nobody takes part in.

    Of torch's experimental interface; without it the group is left as it is, for the process's end.
    """
    getattr(_engine().distributed_c10d, "_abort_process_group", lambda: None)()


_joins = itertools.count()


def _engine() -> Any:
    """Return torch.distributed, of which type checkers do not see all public names."""
    import torch.distributed

    return torch.distributed


@functools.cache
def _meeting_place(world: World) -> Any:
    """Return the store at which the processes find each other; the same for every job of theirs."""
    dist = _engine()
    if "RANK" in os.environ:
        return next(dist.rendezvous("env://", world.rank, world.size))[0]
    host, port = slurm_address(os.environ)
    return dist.TCPStore(host, port, world.size, world.main, timedelta(minutes=5))


def slurm_address(variables: Mapping[str, str]) -> tuple[str, int]:
    """Return host and port where the tasks of a SLURM step meet: its first machine.

    MASTER_ADDR and MASTER_PORT go first. Otherwise the port is a hash of job and step, below those
    that the system gives to outgoing connections.
    """
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    # "gpu[03-05,9],other": the prefix and the first number of the first entry.
    first = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)
    host = "".join(part or "" for part in first.groups()) if first else ""
    host = host or variables.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    step = f"{variables.get('SLURM_JOB_ID')}.{variables.get('SLURM_STEP_ID')}"
    digest = hashlib.blake2b(step.encode(), digest_size=8).digest()
    port = 10_000 + int.from_bytes(digest) % 20_000
    return variables.get("MASTER_ADDR", host), int(variables.get("MASTER_PORT", port))


def launch_name(variables: Mapping[str, str] = os.environ) -> str:
    """Return what torchrun calls this job in all its attempts and no other; "" without torchrun.

    That is its run id. Where nobody gave one it is "none" for every job, and the folder of this
    job's logs, which has a random name, is taken instead.
    """
    name = variables.get("TORCHELASTIC_RUN_ID", "")
    if name != "none":
        return name
    folder, attempt, _ = variables.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")
    return folder.rpartition("/")[2] if attempt else ""


def on_main(world: World, work: Callable[[], Any]) -> Any:
    """Return on every process what `work` returns on the main one, or raise its UserError."""
    if world.size == 1:
        return work()
    message: dict[str, Any] = {}
    if world.main:
        try:
            message = {"value": work()}
        except UserError as error:
            message = {"error": str(error)}
    told = [message]
    _engine().broadcast_object_list(told, 0)
    message = told[0]
    if "error" in message:
        raise UserError(message["error"])
    return message["value"]


def first_here(world: World, work: Callable[[], Any]) -> Any:
    """Return what `work` returns, on each machine after its first process has done it.

    So that one process fills a cache and the others find it filled. Raises on every process the
    UserError of the first one that has one.
    """
    if world.size == 1:
        return work()
    value, said = None, ""
    for turn in (world.local_rank == 0, world.local_rank != 0):
        try:
            value = work() if turn else value
        except UserError as error:
            said = str(error)
        found = [text for text in gather_texts(said) if text]
        if found:
            raise UserError(found[0])
    return value


def own_rows(rows: np.ndarray, world: World) -> np.ndarray:
    """Return a process's part of `rows` [n], one part after the other and all of equal length.

    The last parts are filled up from the first rows; `gather_rows` leaves that out again.
    """
    each = -(-len(rows) // world.size)
    filled = rows.take(range(world.rank * each, (world.rank + 1) * each), mode="wrap")
    return rows if world.size == 1 else filled


def gather_rows(x: Tensor, total: int) -> Tensor:
    """Return the rows of all processes one after the other, the first `total` of them, on the CPU.

    x: [n, ...], equal n on all processes. Without gradients.
    """
    import torch
    import torch.distributed as dist

    x = x.detach().cpu().contiguous()
    world = current()
    if world.size > 1:
        rows = [torch.empty_like(x) for _ in range(world.size)]
        dist.all_gather(rows, x)
        x = torch.cat(rows)
    return x[:total]


def mean_of(x: Tensor) -> Tensor:
    """Return the mean of x over the processes, in place. Without gradients."""
    import torch.distributed as dist

    if current().size > 1:
        dist.all_reduce(x)
        x /= current().size
    return x


def gather_texts(text: str) -> list[str]:
    """Return the texts of all processes in the order of ranks."""
    world = current()
    texts = [text] * world.size
    if world.size > 1:
        _engine().all_gather_object(texts, text)
    return texts


def alone() -> bool:
    """Return whether this process is the only one that is connected."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def gather(x: Tensor) -> Tensor:
    """Return the rows of x [n, ...] of all processes, [k n, ...] in the order of ranks.

    n is the same everywhere. The gradient of the rows is summed over the processes. Gradients of
    parameters are averaged over them afterwards: with L the mean of the processes' losses, what
    comes out is then the gradient of L, as if one process had seen all rows.
    """
    return x if alone() else _gathering()(x)


def local(x: Tensor) -> Tensor:
    """Return this process's part of a parameter that is shared out, any other as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[attr-defined]


@functools.cache
def _gathering() -> Callable[[Tensor], Tensor]:
    """Return `gather` for several processes, which compilers leave alone."""
    import torch
    import torch.distributed as dist

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


class Agreement:
    """The largest number that any process tells, such as a signal's, known to all at the same step.

    What is asked at one step is answered at the next: the exchange goes on beside the step, over
    the CPU, so that nothing waits for it or for a device. A single process knows at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._group: Any = None
        self._work: Any = None
        self._flag: Tensor | None = None
        if world.size > 1:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def __call__(self, wish: int) -> int:
        """Tell the others this process's number; return the largest of the step before."""
        if self._world.size == 1:
            return wish
        import torch
        import torch.distributed as dist

        before = self.close()
        self._flag = torch.tensor([wish])
        self._work = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return before

    def close(self) -> int:
        """Wait for the last exchange and return its answer, 0 if there was none."""
        if self._work is None or self._flag is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._flag.item())


def speaks_for(world: World, error: BaseException) -> str | None:
    """Return what to put before a message about `error`; None if another process says it."""
    owner = getattr(error, "process", None)
    if (0 if owner is None else owner) != world.rank:
        return None
    return "" if owner is None else f"process {world.rank} of {world.size}: "


def _settled(error: Exception, world: World, store: Any) -> Exception:
    """Return `error`, marked with the `process` that tells of it unless all have the same."""
    said = "" if _is_lost_connection(error) else f"{type(error).__name__}: {error}"
    found: dict[int, str] = {world.rank: said}
    until = time.monotonic() + _PATIENCE
    with contextlib.suppress(Exception):  # the store may be gone together with its process
        store.set(f"failed-{world.rank}", said)
        while len(found) < world.size and time.monotonic() < until:
            for rank in set(range(world.size)) - found.keys():
                if store.check([f"failed-{rank}"]):
                    found[rank] = store.get(f"failed-{rank}").decode()
            time.sleep(0.05)
    causes = [rank for rank in sorted(found) if found[rank]]
    if said:
        if len(found) < world.size or set(found.values()) != {said}:
            error.process = world.rank  # type: ignore[attr-defined]
        return error
    if not causes:
        return UserError("another process of this job ended without a word (was it killed?)")
    lost = UserError(f"process {causes[0]} of {world.size}: {found[causes[0]]}")
    lost.process = causes[0]  # type: ignore[attr-defined]
    return lost


def _is_lost_connection(error: Exception) -> bool:
    import torch.distributed as dist

    words = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL")
    network = isinstance(error, dist.DistError) or type(error) is RuntimeError
    return network and any(word in str(error) for word in words)
