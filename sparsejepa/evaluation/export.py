"""Features as a file for other tools: Parquet, NumPy or safetensors, written block by block."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsejepa.data.decode import shown
from sparsejepa.data.store import Target
from sparsejepa.errors import UserError
from sparsejepa.files import atomic_path

COLUMNS = ("file", "features", "groups")
"""Of a Parquet file; a target of such a name becomes ``target.NAME``."""
_NAMES = 4096  # names that are held at once
_LARGEST_HEADER = 100_000_000  # bytes; readers of safetensors refuse more


@dataclass(frozen=True)
class Table:
    """One row per image, in blocks that are read when they are asked for."""

    widths: dict[str, int]
    """Columns of each array: ``x``, the features, and ``groups``, where there are any."""
    index: np.ndarray
    """[n] int64: which of the data's images the rows are."""
    targets: dict[str, Target]
    """Of the rows."""
    files: Sequence[str]
    """Where each of the data's images comes from; empty if images are not files."""
    blocks: Callable[[], Iterator[dict[str, np.ndarray]]]
    """Gives, each time anew, the blocks of rows: float32 [m, width] by array."""

    def names(self, start: int, stop: int) -> list[str]:
        """Return the files of some rows, as text that can be written."""
        index: list[int] = self.index[start:stop].tolist()
        return [_text(self.files[i]) for i in index] if self.files else []

    def all_names(self) -> Iterator[list[str]]:
        """Yield the files of all rows, some at a time; nothing if images are not files."""
        if self.files:
            for start in range(0, len(self.index), _NAMES):
                yield self.names(start, start + _NAMES)


def check_path(path: Path, files: Sequence[str] = ()) -> None:
    """Raise UserError unless features of images called `files` can be written to `path`."""
    if path.suffix not in WRITERS:
        raise UserError(f"--out {path}: the name must end in {', '.join(WRITERS)}")
    if path.suffix == ".safetensors" and sum(len(name) + 6 for name in files) > _LARGEST_HEADER:
        raise UserError(
            f"--out {path}: {len(files)} file names are more than this format holds; use .parquet"
        )


def write_table(path: Path, table: Table) -> None:
    """Write a table to `path`, whole or not at all, in the format of its ending."""
    with atomic_path(path) as beside:
        WRITERS[path.suffix](beside, table)


def _write_parquet(path: Path, table: Table) -> None:
    """Columns: file (of files), one per target (class names), features [D'], groups [G]."""
    writer, start = None, 0
    try:
        for block in table.blocks():
            stop = start + len(block["x"])
            columns: dict[str, Any] = {}
            if table.files:
                columns["file"] = pa.array(table.names(start, stop), pa.string())
            for name, target in table.targets.items():
                while name in COLUMNS or name in columns:
                    name = f"target.{name}"
                values = pa.array(target.values[start:stop], pa.int64())
                columns[name] = pa.DictionaryArray.from_arrays(values, list(target.names))
            for name, width in table.widths.items():
                flat = pa.array(block[name].ravel())
                column = pa.FixedSizeListArray.from_arrays(flat, width)
                columns["features" if name == "x" else name] = column
            rows = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, rows.schema)
            writer.write_table(rows)
            start = stop
    finally:
        if writer is not None:
            writer.close()


def _write_npz(path: Path, table: Table) -> None:
    """Arrays: x [n, D'], groups [n, G], files, target.NAME [n] and names.NAME for each target.

    They are members of an archive, so slashes in a target's name become "_".
    """
    n = len(table.index)
    with zipfile.ZipFile(path, "w") as archive:

        def member(name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
            blocks = iter(blocks)
            first = next(blocks)
            header = {
                "descr": np.lib.format.dtype_to_descr(first.dtype),
                "fortran_order": False,
                "shape": shape,
            }
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for block in chain([first], blocks):
                    file.write(block.tobytes())

        for name, width in table.widths.items():
            member(name, (n, width), (block[name] for block in table.blocks()))
        longest = max((len(name) for names in table.all_names() for name in names), default=1)
        kind = f"<U{max(1, longest)}"
        names = (np.array(names, kind) for names in table.all_names())
        member("files", (n if table.files else 0,), chain(names, [np.array([], kind)]))
        for given, target in table.targets.items():
            name = given.replace("/", "_").replace("\\", "_")
            classes = np.array(target.names)
            member(f"target.{name}", (n,), [target.values])
            member(f"names.{name}", classes.shape, [classes])


def _write_safetensors(path: Path, table: Table) -> None:
    """Tensors: x [n, D'], groups [n, G], target.NAME [n]; files and class names are JSON metadata.

    The layout of the format is written out here, as its library wants all tensors in memory.
    """
    n, header, end = len(table.index), dict[str, Any](), 0
    # Those of 8 bytes an entry first, so that all begin at multiples of their own.
    shapes = {f"target.{name}": ("I64", 8, [n]) for name in table.targets}
    shapes |= {name: ("F32", 4, [n, width]) for name, width in table.widths.items()}
    for name, (kind, size, shape) in shapes.items():
        begin, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    files = [name for names in table.all_names() for name in names]
    classes = {name: target.names for name, target in table.targets.items()}
    header["__metadata__"] = {"files": json.dumps(files), "names": json.dumps(classes)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise UserError(f"{path.name}: too many names for this format; use .parquet")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for target in table.targets.values():
            file.write(target.values.astype("<i8").tobytes())
        for name in table.widths:
            for block in table.blocks():
                file.write(block[name].astype("<f4").tobytes())


def _text(name: str) -> str:
    """Return a file's name as text; bytes in it that are none are written out."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return shown(name)
    return name


WRITERS: dict[str, Callable[[Path, Table], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
