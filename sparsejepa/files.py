"""Files that are whole or not there, and one job at a time in a folder.

A file is written beside its final name, synced and renamed, so a kill or a full disk at any moment
leaves the previous version whole. Text, JSON and safetensors; no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsejepa.errors import UserError

FORMAT = 1
LOCK = ".lock"
"""In a folder at work: who holds it."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write to; on success it becomes `path`, on failure it is removed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A folder from elsewhere may hold a link of this name, which writing would follow.
    beside.unlink(missing_ok=True)
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def partial_files(folder: Path) -> list[Path]:
    """Return what a killed process left beside the files that it was writing in `folder`."""
    return [p for p in folder.glob(".*.tmp") if re.fullmatch(r"\..+\.\d+\.tmp", p.name)]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError naming it when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata as one safetensors file, atomically."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_path(path) as beside:
        save_file(tensors, beside, {"json": json.dumps({"format": FORMAT, **metadata})})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote. Raises UserError for a damaged or foreign file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["json"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint of this program or damaged ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {metadata.get('format')}, this version reads {FORMAT}; "
            "use the version of sparsejepa that wrote it"
        )
    return tensors, metadata


def sync(path: Path) -> int:
    """Make the content of a file durable; return its size in bytes."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def sync_folder(folder: Path) -> None:
    """Make a rename durable where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep `folder`, made if it is not there, for this process while the context lasts.

    The lock lies on the open file, not in its content: the system frees it when the process ends,
    however it ends, and no process that it forks holds it. Where nothing can be locked a warning
    says so. Raises UserError that names the holder's pid and host.
    """
    folder.mkdir(exist_ok=True)
    handle = _take(folder / LOCK)
    try:
        yield
    finally:
        if handle is not None:
            # Removed while it is still locked: whoever has it open sees that it is gone.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)


def _take(path: Path) -> int | None:
    """Return the open, locked file; None where the system or the file system cannot lock."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            if getattr(error, "errno", None) in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{path.parent} is in use by {holder}; wait until it has ended, stop it, or "
                    "name another place with --out"
                ) from None
            warnings.warn(f"{path}: cannot lock ({error}); start no second job", stacklevel=4)
            return None
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            with contextlib.suppress(OSError):  # a full disk: only the message is poorer then
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # the holder before removed it meanwhile
