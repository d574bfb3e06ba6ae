"""Where the images of a listing lie, and how one of them is fetched: what a worker process needs.

A reader knows its images by row. It holds arrays, not an object per image, so that millions cost
tens of bytes each and processes can share them. Loads neither torch nor pyarrow.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from sparsejepa.data.decode import EXTENSIONS
from sparsejepa.errors import UserError


class Reader(Protocol):
    """Images by row."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Return the image's name, relative to the folder; undecodable bytes become surrogates."""
        ...

    def source(self, row: int) -> str | bytes | None:
        """Return the image's path or its encoded bytes; None if there is no image.

        Raises OSError when it cannot be read.
        """
        ...

    def block(self, rows: np.ndarray) -> np.ndarray | None:
        """Return which stretch each of `rows` [n] belongs to: [n] ascending where rows are.

        The images of a stretch are fetched together; None if every image is fetched on its own.
        """
        ...

    def parts(self) -> list[bytes]:
        """Return what identifies the list of images, for a digest."""
        ...


def source_of(reader: Reader, row: int) -> str | bytes | None:
    """Return an image's path or bytes; None also if they cannot be read."""
    try:
        return reader.source(row)
    except OSError:
        return None


class Names:
    """Many texts in one array of bytes."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends
        """uint8 [bytes], and where each text ends in it, int64 [N]."""

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        """Pack names."""
        blob, ends = bytearray(), array("q")
        for name in names:
            blob += name
            ends.append(len(blob))
        return cls(np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> bytes:
        start = self.ends[row - 1] if row else 0
        return self.blob[start : self.ends[row]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[row] for row in range(len(self)))


class Files:
    """Image files below a folder."""

    def __init__(self, folder: Path, names: Names) -> None:
        self.folder, self.names = folder, names
        self._before = os.path.join(os.fsencode(folder), b"")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return os.fsdecode(self.names[row])

    def source(self, row: int) -> str:
        return os.fsdecode(self._before + self.names[row])

    def block(self, rows: np.ndarray) -> None:
        return None

    def parts(self) -> list[bytes]:
        return [self.names.blob.tobytes(), self.names.ends.tobytes()]


class Members:
    """Images inside uncompressed tar files, read where they lie."""

    _OPEN = 64  # tar files that are kept open

    def __init__(
        self, shards: Sequence[str], names: Names, shard: np.ndarray, place: np.ndarray
    ) -> None:
        self.shards, self.names = tuple(shards), names
        self.shard, self.place = shard, place
        """Which of the shards [N], and offset and length there [N, 2] int64."""
        self._files: dict[int, IO[bytes]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _files={}, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return os.fsdecode(self.names[row])

    def source(self, row: int) -> bytes:
        offset, length = self.place[row].tolist()
        # Held while it is read: another thread may put it out, and what nobody holds is closed.
        file = self._file(int(self.shard[row]))
        if hasattr(os, "pread"):
            return os.pread(file.fileno(), length, offset)
        with self._lock:  # Windows: threads share the place in the file
            file.seek(offset)
            return file.read(length)

    def block(self, rows: np.ndarray) -> None:
        return None

    def parts(self) -> list[bytes]:
        arrays = (self.names.blob, self.names.ends, self.shard, self.place)
        return [array.tobytes() for array in arrays]

    def _file(self, shard: int) -> IO[bytes]:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = open(self.shards[shard], "rb", buffering=0)  # noqa: SIM115
                if len(self._files) >= self._OPEN:
                    del self._files[next(iter(self._files))]
                self._files[shard] = file
            return file


REMOTE = "hf://"
"""What an address of a file on the hub begins with, as its client writes it."""


def open_parquet(shard: str) -> Any:
    """Open a parquet file (a context manager) by its path or its address on the hub."""
    import pyarrow.parquet as pq

    if not shard.startswith(REMOTE):
        return pq.ParquetFile(shard)
    from huggingface_hub import HfFileSystem

    return pq.ParquetFile(HfFileSystem().open(shard.removeprefix(REMOTE), "rb"))


MEMORY = 2**30
"""Bytes of row groups that all readers of a stream keep, beside the newest of each."""


class Rows:
    """Images in a column of parquet files, of which a row group is read at once."""

    def __init__(self, shards: Sequence[str], column: str, groups: Sequence[Sequence[int]]) -> None:
        """`groups` has the rows of each row group of each shard."""
        self.shards, self.column = tuple(shards), column
        self._of = [(s, g) for s, own in enumerate(groups) for g in range(len(own))]
        self._ends = np.cumsum([rows for own in groups for rows in own], dtype=np.int64)
        self.memory = MEMORY
        """Bytes of row groups that stay in memory beside the newest."""
        self._read: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_read", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _read={}, _lock=threading.Lock())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, row: int) -> str:
        shard, _ = self._of[int(self.block(np.array([row]))[0])]
        return f"{self.shards[shard].rpartition('/')[2]} row {row}"

    def source(self, row: int) -> bytes | None:
        group = int(self.block(np.array([row]))[0])
        start = int(self._ends[group - 1]) if group else 0
        value = self._group(group)[row - start].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def block(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, rows, side="right")

    def parts(self) -> list[bytes]:
        names = "\n".join(map(os.path.basename, self.shards))
        return [os.fsencode(names), self._ends.tobytes()]

    def group_bytes(self) -> int:
        """Return the size in memory of the largest row group that is there now."""
        with self._lock:
            return max((column.nbytes for column in self._read.values()), default=0)

    def _group(self, group: int) -> Any:
        with self._lock:
            column = self._read.pop(group, None)
            if column is None:
                column = self._fetch(*self._of[group])
            while sum(c.nbytes for c in self._read.values()) > self.memory:
                del self._read[next(iter(self._read))]
            self._read[group] = column  # the newest is last
            return column

    def _fetch(self, shard: int, group: int) -> Any:
        """Read the images of a row group; over a network in three attempts."""
        import pyarrow as pa

        path, attempt = self.shards[shard], 0
        while True:
            try:
                with open_parquet(path) as file:
                    return file.read_row_group(group, [self.column]).column(0)
            except pa.ArrowException as error:  # the file is damaged: so are all its images
                raise OSError(first_line(error)) from None
            except Exception as error:  # the client has changed its network library, and may again
                if not path.startswith(REMOTE):
                    raise OSError(first_line(error)) from None
                attempt += 1
                if attempt == 3:
                    raise UserError(
                        f"{path}: not to be had from the hub ({first_line(error)}); look after the "
                        "network, then --resume"
                    ) from None
                time.sleep(attempt)


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def walk(folder: Path) -> Iterator[bytes]:
    """Yield the image files below `folder` as paths relative to it, ordered by their bytes.

    Hidden files and folders are passed over, links are followed, loops of links are cut; so are
    pipes and devices. A folder's names are in memory while it is walked.
    """
    root = os.fsencode(folder)
    levels = [(b"", _identity(root), _entries(root))]
    while levels:
        prefix, _, entries = levels[-1]
        if not entries:
            levels.pop()
            continue
        name = entries.pop()
        if not name.endswith(b"/"):
            yield prefix + name
            continue
        path = os.path.join(root, prefix + name)
        identity = _identity(path)
        if all(identity != above for _, above, _ in levels):
            levels.append((prefix + name, identity, _entries(path)))


_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)


def _entries(folder: bytes) -> list[bytes]:
    """Image files and, with a slash behind them, folders; the last in order first."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            try:  # of a plain file or folder the listing itself says what it is
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself: decoding reports it
                is_folder, is_file = False, True
            if is_folder:
                found.append(entry.name + b"/")
            elif entry.name.lower().endswith(_ENDINGS) and (
                is_file or not os.path.exists(entry.path)  # a dangling link is reported too
            ):
                found.append(entry.name)
    found.sort(reverse=True)
    return found


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
