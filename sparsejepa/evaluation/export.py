"""Features as a file for other tools: Parquet, NumPy or safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from sparsejepa.distributed import current, on_main
from sparsejepa.errors import UserError
from sparsejepa.evaluation.features import Features
from sparsejepa.files import atomic_path


def check_path(path: Path) -> None:
    """Raise UserError unless features can be written to `path`: a known ending, a folder."""
    if path.suffix not in WRITERS:
        raise UserError(f"--out {path}: the name must end in {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}; make it first")


def write_features(path: Path, features: Features, files: Sequence[str] = ()) -> None:
    """Write features to `path`, whole or not at all, in the format of its ending.

    `files` says where each image comes from, if images are files. Of several processes the main one
    writes. Raises UserError as `check_path`.
    """
    check_path(path)

    def write() -> None:
        with atomic_path(path) as beside:
            WRITERS[path.suffix](beside, features, files)

    on_main(current(), write)


def _write_parquet(path: Path, found: Features, files: Sequence[str]) -> None:
    """Columns: file (of a folder), one per target (the class names), features [D']."""
    columns: dict[str, Any] = {"file": pa.array(files)} if files else {}
    for name, target in found.targets.items():
        columns[name] = pa.DictionaryArray.from_arrays(target.values, list(target.names))
    flat = pa.array(found.x.ravel())
    columns["features"] = pa.FixedSizeListArray.from_arrays(flat, found.x.shape[1])
    pq.write_table(pa.table(columns), path)


def _write_npz(path: Path, found: Features, files: Sequence[str]) -> None:
    """Arrays: x [n, D'], files, target.NAME [n] and names.NAME for each target.

    They are members of an archive, so slashes in a target's name become "_".
    """
    arrays: dict[str, Any] = {"x": found.x, "files": np.array(files, dtype=str)}
    for given, target in found.targets.items():
        name = given.replace("/", "_").replace("\\", "_")
        arrays |= {f"target.{name}": target.values, f"names.{name}": np.array(target.names)}
    with path.open("wb") as file:  # given a name, numpy would add .npz to it
        np.savez(file, **arrays)


def _write_safetensors(path: Path, found: Features, files: Sequence[str]) -> None:
    """Tensors: x [n, D'], target.NAME [n]; files and class names are JSON metadata."""
    tensors = {f"target.{name}": target.values for name, target in found.targets.items()}
    names = {name: target.names for name, target in found.targets.items()}
    metadata = {"files": json.dumps(files), "names": json.dumps(names)}
    save_file({"x": found.x, **tensors}, path, metadata)


WRITERS: dict[str, Callable[[Path, Features, Sequence[str]], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
