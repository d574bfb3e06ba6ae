"""Processes that decode images into memory shared with the one that trains.

They are started as programs of their own, not forked: nothing of CUDA or of the trainer's threads
is in them, they load no torch, and they end with the trainer however it ends. Rows to decode and
pixels go through one ring of shared memory; a pipe carries only which part of it is next.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparsejepa.data.decode import check_same_size, read_image, shown
from sparsejepa.data.readers import Reader, Rows
from sparsejepa.errors import UserError

_TASK = struct.Struct("=ii")  # slot of the ring, number of images
_ALIGN = 64


@dataclass(frozen=True)
class Decoder:
    """How an image of a reader becomes pixels; what differs between two streams of one reader."""

    reader: Reader
    origin: str
    """Names the data in errors."""
    img_size: tuple[int, int]
    first: str | None
    """The image whose own size that is; None if others are resized to it."""
    upscale: bool

    def read(self, row: int) -> np.ndarray | str:
        """Return the image [H, W, 3] uint8, or the reason why there is none.

        Raises UserError for an image of another size, or too small.
        """
        try:
            source = self.reader.source(row)
        except OSError as error:
            return shown(error.strerror or str(error))
        name = self.reader.name(row) if isinstance(source, bytes) else ""
        size = self.img_size if self.first is None else None
        image = read_image(name, source, size, self.upscale)
        if self.first is not None and not isinstance(image, str):
            want = (*self.img_size, 3)
            if image.shape != want:
                this = self.reader.name(row), image.shape
                check_same_size((self.first, want), this, self.origin)
        return image


class Shared:
    """An object whose arrays lie in memory that other processes can map."""

    def __init__(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self.head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        self.places: list[tuple[int, int]] = []
        end = 0
        for part in parts:
            self.places.append((end, part.nbytes))
            end += -(-part.nbytes // _ALIGN) * _ALIGN
        self.file = _memory(end)
        with mmap.mmap(self.file.fileno(), max(1, end)) as memory:
            for (start, size), part in zip(self.places, parts, strict=True):
                memory[start : start + size] = part
        self.value = _mapped(self.file.fileno(), self.head, self.places)
        """The object again, with those arrays."""


class Crew:
    """Some worker processes and their ring of `slots` x `capacity` images."""

    def __init__(self, decoder: Shared, workers: int, slots: int, capacity: int, own: bool) -> None:
        """Start the workers. With `own`, each task is for a certain worker, else for any."""
        self._shape = (capacity, *decoder.value.img_size, 3)
        self._ring = _memory(slots * _slot_bytes(self._shape))
        self._memory = mmap.mmap(self._ring.fileno(), slots * _slot_bytes(self._shape))
        self._rows, self._pixels = _slots(self._memory, slots, self._shape)
        order = pickle.dumps((decoder.head, decoder.places, slots, self._shape, workers))
        self._tasks: list[int] = []
        self._select = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._close = weakref.finalize(self, _end, self._processes, self._tasks, self._select)
        queues = [os.pipe() for _ in range(workers if own else 1)]
        self._tasks += [write for _, write in queues]
        for number in range(workers):
            replies, answer = os.pipe()
            fds = (decoder.file.fileno(), self._ring.fileno(), queues[number % len(queues)][0])
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, (*fds, answer))],
                pass_fds=(*fds, answer),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries' remarks on damaged files
                env=worker_environment(),
                process_group=0,  # Ctrl-C is the trainer's to answer
            )
            os.close(answer)
            self._processes.append(process)
            self._select.register(replies, selectors.EVENT_READ, (process, bytearray()))
            with (
                contextlib.suppress(BrokenPipeError),
                process.stdin or open(os.devnull, "wb") as to,
            ):
                to.write(order)  # one that is dead already is found when it is waited for
        for read, _ in queues:
            os.close(read)

    def submit(self, slot: int, rows: Sequence[int] | np.ndarray, worker: int) -> None:
        """Have images decoded into a slot of the ring."""
        self._rows[slot, : len(rows)] = rows
        task = _TASK.pack(slot, len(rows))
        with contextlib.suppress(BrokenPipeError):  # `wait` says which worker is gone, and why
            os.write(self._tasks[worker % len(self._tasks)], task)

    def wait(self) -> list[tuple[int, list[tuple[int, str]]]]:
        """Wait for slots to be done: each with (position, reason) of its unreadable images.

        Raises UserError if a worker died, or met an image that is the user's to mend.
        """
        done = []
        while not done:
            for key, _ in self._select.select():
                process, buffer = key.data
                received = os.read(key.fd, 2**16)
                if not received:
                    raise UserError(_obituary(process))
                buffer += received
                *lines, rest = bytes(buffer).split(b"\n")
                buffer[:] = rest
                for line in lines:
                    reply = json.loads(line)
                    if "error" in reply:
                        raise UserError(reply["error"])
                    done.append((reply["slot"], [(k, reason) for k, reason in reply["failed"]]))
        return done

    def pixels(self, slot: int) -> np.ndarray:
        """Return the images [capacity, H, W, 3] of a slot; they change when it is used again."""
        return self._pixels[slot]

    def close(self) -> None:
        """End the workers."""
        self._close()


def _end(
    processes: list[subprocess.Popen[bytes]], tasks: list[int], select: selectors.BaseSelector
) -> None:
    for task in tasks:
        os.close(task)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for key in list(select.get_map().values()):
        os.close(key.fd)
    select.close()


def _obituary(process: subprocess.Popen[bytes]) -> str:
    status = process.wait()
    if status >= 0:
        return f"a process that decodes images ended with status {status}; try --workers 0"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
        if name == "SIGKILL":
            return (
                "a process that decodes images was killed (SIGKILL), perhaps for want of memory; "
                "use fewer --workers, or a smaller --batch-size, and --resume"
            )
        return (
            f"a process that decodes images died of {name}; --workers 0 decodes without such "
            "processes; then --resume"
        )
    return f"a process that decodes images died of signal {-status}; try --workers 0"


def _memory(size: int) -> IO[bytes]:
    """Memory as a file; unlike that in /dev/shm it has no limit of its own."""
    linux = hasattr(os, "memfd_create")
    file: IO[bytes] = (
        os.fdopen(os.memfd_create("sparsejepa"), "w+b", buffering=0)
        if linux
        else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    )
    file.truncate(max(1, size))
    return file


def _mapped(descriptor: int, head: bytes, places: list[tuple[int, int]]) -> Any:
    memory = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    return pickle.loads(head, buffers=[memory[start : start + size] for start, size in places])


def _slot_bytes(shape: tuple[int, ...]) -> int:
    capacity = shape[0]
    return -(-(8 * capacity + int(np.prod(shape))) // _ALIGN) * _ALIGN


def _slots(memory: mmap.mmap, slots: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows [slots, capacity] int64 and pixels [slots, capacity, H, W, 3] uint8 of the ring."""
    step, capacity = _slot_bytes(shape), shape[0]
    rows = np.ndarray((slots, capacity), np.int64, memory, strides=(step, 8))
    inner = np.ndarray(shape, np.uint8, memory).strides
    pixels = np.ndarray((slots, *shape), np.uint8, memory, 8 * capacity, (step, *inner))
    return rows, pixels


def worker_environment() -> dict[str, str]:
    """The workers' environment: this package can be imported, and one thread is enough.

    The C library keeps the memory of one image for the next instead of giving it back to the system
    each time: a tenth of the time of decoding a photograph.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**28)}
    return {**kept, **os.environ, **single, "PYTHONPATH": path}


def _work(shared: int, ring: int, tasks: int, answer: int) -> None:
    """Decode until there is nothing more to read from `tasks`. All four are file descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = pickle.load(sys.stdin.buffer)  # from the process that started us
    head, places, slots, shape, workers = order
    decoder: Decoder = _mapped(shared, head, places)
    if isinstance(decoder.reader, Rows):
        decoder.reader.memory //= workers
    rows, pixels = _slots(mmap.mmap(ring, slots * _slot_bytes(shape)), slots, shape)
    while len(task := os.read(tasks, _TASK.size)) == _TASK.size:
        slot, count = _TASK.unpack(task)
        reply: dict[str, Any] = {"slot": slot, "failed": []}
        try:
            for k in range(count):
                image = decoder.read(int(rows[slot, k]))
                if isinstance(image, str):
                    reply["failed"].append((k, image))
                else:
                    pixels[slot, k] = image
        except UserError as error:
            reply = {"error": str(error)}
        os.write(answer, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
    with contextlib.suppress(BrokenPipeError):  # the trainer is gone
        _work(*map(int, sys.argv[1:]))
