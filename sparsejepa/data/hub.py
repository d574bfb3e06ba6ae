"""Data sets of the Hugging Face hub: parquet files, from a local copy or fetched.

Layout: CONFIG/SPLIT-00000-of-00001.parquet, or data/SPLIT-..., or the files at the top. Which
columns hold images and labels is written in each file's schema.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsejepa.data.folders import (
    Listing,
    Reader,
    category_names,
    choose_splits,
    chosen,
    divide,
    factor_target,
    index_target,
)
from sparsejepa.data.images import Target
from sparsejepa.errors import UserError, nearest

TIMEOUT = 10
"""Seconds to wait for the hub's answer."""
MEMORY = 2**30
"""Bytes of row groups that all readers of a stream keep, beside the newest of each."""


class Rows(Reader):
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
        vars(self).update(state, _read={}, _lock=threading.Lock())

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
        """Return the row group of each row [n], counted through all files."""
        return np.searchsorted(self._ends, rows, side="right")

    def parts(self) -> list[bytes]:
        names = "\n".join(map(os.path.basename, self.shards))
        return [os.fsencode(names), self._ends.tobytes()]

    def paths(self, rows: np.ndarray) -> Iterable[str]:
        return self.shards

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
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.shards[shard]) as file:
                return file.read_row_group(group, [self.column]).column(0)
        except Exception as error:  # pyarrow has errors of many kinds
            raise OSError(first_line(error)) from None


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# --- Finding the files ----------------------------------------------------------------------------


def find_copy(repo: str, root: Path | None) -> Path | None:
    """Return the local copy of a data set below the data root, if there is one.

    ROOT/OWNER/NAME, ROOT/NAME, or the hub's cache: ROOT/datasets--OWNER--NAME/snapshots/REVISION.
    """
    if root is None:
        return None
    owner, name = repo.split("/")
    snapshots = (root / f"datasets--{owner}--{name}" / "snapshots").glob("*")
    newest = sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = (root / owner / name, root / name, *newest)
    return next((path for path in candidates if path.is_dir()), None)


def fetch(repo: str, config: str | None) -> Path:
    """Return the folder of a data set in the hub's own cache; fetch its two splits if need be.

    One attempt with short timeouts; HF_HUB_OFFLINE and HF_ENDPOINT are honoured by the client.
    Raises UserError when the data is neither there nor to be had.
    """
    import huggingface_hub as hub

    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        found = Path(hub.snapshot_download(repo, repo_type="dataset", local_files_only=True))
        if "test" in choose_splits(local_shards(found, config)):
            return found
    try:
        info = hub.HfApi().dataset_info(repo, timeout=TIMEOUT)
        shards = choose_shards([f.rfilename for f in info.siblings or ()], config, f"hub:{repo}")
        wanted = [file for split in choose_splits(shards).values() for file in shards[split]]
        return Path(
            hub.snapshot_download(
                repo, repo_type="dataset", allow_patterns=wanted, etag_timeout=TIMEOUT
            )
        )
    except UserError:
        raise
    except Exception as error:  # the client has changed its network library, and may again
        raise UserError(
            f"hub:{repo}: not in the data root and not to be had from the hub "
            f"({first_line(error)}); either put a copy of its parquet files into DIR/{repo} and "
            "set --data-root DIR (or SPARSEJEPA_DATA), or run once with access to huggingface.co"
        ) from None


def local_shards(folder: Path, config: str | None) -> dict[str, list[str]]:
    """Return the parquet files of each split, relative to `folder`. Raises as `choose_shards`."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    return choose_shards(files, config, str(folder))


def choose_shards(files: Iterable[str], config: str | None, origin: str) -> dict[str, list[str]]:
    """Return the parquet files of each split of one configuration of a data set.

    Raises UserError: no parquet files, an unknown or ambiguous configuration, missing shards.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(files):
        *folders, stem = file.removesuffix(".parquet").split("/")
        if not file.endswith(".parquet") or any(part.startswith(".") for part in folders):
            continue
        if stem.isdigit() and folders:  # CONFIG/SPLIT/0000.parquet, as the hub converts data sets
            stem = folders.pop()
        part = re.fullmatch(r"([A-Za-z]\w*?)(-\d+)?(-of-(\d+).*)?", stem)
        if part:
            name = "/".join(folders)
            splits = found.setdefault("" if name == "data" else name, {})
            splits.setdefault(part[1], []).append(file)
    if not found:
        raise UserError(f"{origin}: no parquet files")
    named = sorted(name for name in found if name)
    if config in found:
        chosen = config
    elif len(found) == 1 and (config is None or not named):
        (chosen,) = found
    elif config is not None:
        raise UserError(
            f"{origin}: no configuration '{config}'{nearest(config, named)}; there are "
            f"{', '.join(named)}"
        )
    else:
        chosen = next((name for name in ("", "default") if name in found), None)
        if chosen is None:
            raise UserError(f"{origin}: several configurations; add one of /{', /'.join(named)}")
    for split in choose_splits(found[chosen]).values():
        shards = found[chosen][split]
        total = re.search(r"-of-(\d+)", shards[0])
        if total and len(shards) != int(total[1]):
            raise UserError(
                f"{origin}: {len(shards)} of {int(total[1])} parquet files of the "
                f"{split} split; fetch the rest"
            )
    return found[chosen]


# --- Reading them ---------------------------------------------------------------------------------


def list_hub(
    folder: Path, name: str, config: str | None, factors: Sequence[str] = ()
) -> dict[str, Listing]:
    """List a local copy of a data set of the hub.

    Only footers and labels are read here, and the images by row group when they are needed. With
    `factors` those columns are the targets. Raises UserError when the copy is damaged or not
    complete, or when a factor is unusable.
    """
    import pyarrow.parquet as pq

    origin, found = str(folder), local_shards(folder, config)
    splits = choose_splits(found).items()
    shards = {split: [f"{folder}/{file}" for file in found[theirs]] for split, theirs in splits}
    with _undamaged(origin):
        schema = pq.read_schema(shards["train"][0])
        features = _features(schema)
        image, labels = _image_column(schema, features), _label_columns(schema, features)
        if image is None:
            columns = ", ".join(schema.names)
            raise UserError(f"{origin}: no column holds images; there are {columns}")
        wanted = [f.name for f in schema if _may_be_factor(f.type)] if factors else list(labels)
        tables, groups = {}, {}
        for split, files in shards.items():
            tables[split], groups[split] = _read_columns(files, wanted)
    readers = {split: Rows(files, image, groups[split]) for split, files in shards.items()}
    rows = {split: np.arange(len(reader)) for split, reader in readers.items()}
    targets = _label_targets(tables, labels)
    if "test" not in shards:
        test = divide(list(map(str, rows["train"])), targets["train"])
        readers["test"], targets["test"] = readers["train"], targets["train"]
        rows = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    if factors:  # after the division, which must not depend on them
        targets = _factor_targets(tables, rows["train"], factors, labels, origin)
    return {
        split: Listing(
            name,
            split,
            origin,
            readers[split],
            rows[split],
            {key: target.take(rows[split]) for key, target in targets[split].items()},
        )
        for split in ("train", "test")
    }


def _label_targets(
    tables: dict[str, Any], labels: dict[str, tuple[str, ...]]
) -> dict[str, dict[str, Target]]:
    """Make targets of the label columns; where the hub names no classes, both splits have theirs.

    A split has no target of a column that it lacks, or in which not all of it is labelled.
    """
    targets: dict[str, dict[str, Target]] = {split: {} for split in tables}
    for label, names in labels.items():
        columns = {
            split: table[label].to_pylist()
            for split, table in tables.items()
            if label in table.column_names
        }
        found = () if names else category_names(v for own in columns.values() for v in own)
        for split, column in columns.items():
            if names and all(v is not None and 0 <= v < len(names) for v in column):
                targets[split][label] = Target(np.array(column, np.int64), names)
            elif found:
                targets[split][label] = index_target(column, found)
    return targets


def _factor_targets(
    tables: dict[str, Any],
    train: np.ndarray,
    factors: Sequence[str],
    classes: dict[str, tuple[str, ...]],
    origin: str,
) -> dict[str, dict[str, Target]]:
    """Make targets of the factors; `train` are the rows of the first table that are for training.

    Numbers are cut into bins by those. If there is one table, both splits have its targets.
    """
    parts = [arrow_columns(table) for table in tables.values()]
    shared = [name for name in parts[0] if name in parts[-1]]
    ends = np.cumsum([table.num_rows for table in tables.values()])
    targets: dict[str, dict[str, Target]] = {"train": {}, "test": {}}
    for name in chosen(factors, shared, origin):
        values = [value for part in parts for value in part[name]]
        known = np.isin(np.arange(len(values)), train)
        whole = factor_target(name, values, known, origin, classes.get(name, ()))
        targets["train"][name] = whole.take(np.arange(ends[0]))
        targets["test"][name] = whole.take(np.arange(ends[0] if len(ends) == 2 else 0, ends[-1]))
    return targets


def arrow_columns(table: Any) -> dict[str, list[Any]]:
    """Return the columns of a pyarrow table that can be factors, as lists of values.

    Those are numbers, truth values and text; a list column, if all lists have one length, becomes a
    column per entry: pose_0, pose_1 and so on.
    """
    import pyarrow as pa
    from pyarrow.compute import call_function

    columns: dict[str, list[Any]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not _may_be_factor(column.type):
            continue
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not hasattr(column.type, "value_type"):
            columns[name] = _values(column)
        else:
            lengths = call_function("list_value_length", [column]).unique().to_pylist()
            if len(lengths) == 1 and lengths[0]:
                entries = _values(call_function("list_flatten", [column]))
                width = lengths[0]
                columns |= {f"{name}_{i}": entries[i::width] for i in range(width)}
    return columns


def _values(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_floating(column.type):  # NumPy's float32 writes 0.6 where Python's float cannot
        return [None if np.isnan(value) else value for value in column.to_numpy()]
    return column.to_pylist()


def _may_be_factor(kind: Any) -> bool:
    """Whether a column of this arrow type can be a factor: plain values, or lists of them."""
    kind = str(getattr(kind, "value_type", kind))
    return bool(re.fullmatch(r"u?int\d+|halffloat|float|double|bool|(large_)?string", kind))


def _read_columns(shards: list[str], columns: list[str]) -> tuple[Any, list[list[int]]]:
    """Read columns of some parquet files as one table; those that a file lacks are left out.

    Returns the rows of each file's row groups as well.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, groups = [], []
    for shard in shards:
        with pq.ParquetFile(shard) as file:
            tables.append(file.read(columns))
            groups.append([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    return pa.concat_tables(tables, promote_options="permissive"), groups


@contextlib.contextmanager
def _undamaged(origin: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise UserError(
            f"{origin}: damaged parquet file ({first_line(error)}); fetch it again"
        ) from None


def _features(schema: Any) -> dict[str, Any]:
    """The features that the hub writes into a parquet file's schema."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}


def _image_column(schema: Any, features: dict[str, Any]) -> str | None:
    for name, feature in features.items():
        if name in schema.names and isinstance(feature, dict) and feature.get("_type") == "Image":
            return name
    for field in schema:
        if str(field.type).startswith("struct<bytes: binary") or (
            field.name in ("image", "img") and "binary" in str(field.type)
        ):
            return field.name
    return None


def _label_columns(schema: Any, features: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Label columns and the names of their classes; () where the hub gives no names."""
    labels: dict[str, tuple[str, ...]] = {}
    for name, feature in features.items():
        named = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        if named and name in schema.names and feature.get("names"):
            labels[name] = tuple(map(str, feature["names"]))
    for field in schema:
        if "label" in field.name and re.fullmatch(r"u?int\d+|string", str(field.type)):
            labels.setdefault(field.name, ())
    return labels
