"""Data sets of the Hugging Face hub: parquet files, from a local copy or fetched.

Layout: CONFIG/SPLIT-00000-of-00001.parquet, or data/SPLIT-..., or the files at the top. Which
columns hold images and labels is written in each file's schema. Parquet is not made for reading one
image here and one there, so the encoded images are copied once into one file of the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsejepa.data.folders import Listing, Part, choose_splits, make_listings
from sparsejepa.data.images import cache_path, filled
from sparsejepa.data.tars import Members
from sparsejepa.errors import UserError, nearest

TIMEOUT = 10
"""Seconds to wait for the hub's answer."""


class Rows(Members):
    """Images of a column of parquet files, copied into one file of the cache.

    Raises UserError when the cache cannot be written or a parquet file is damaged.
    """

    def __init__(self, shards: Sequence[str], column: str, cache: Path, name: str) -> None:
        """`cache` is the folder of the cache, `name` that of the data and split."""
        ages = [(s, os.stat(s).st_size, os.stat(s).st_mtime_ns) for s in shards]
        path = cache_path(cache, name, "encoded", column, ages)
        if not path.exists():
            with filled(path) as folder, (folder / "images").open("wb") as file:
                read = ((i, image) for i, s in enumerate(shards) for image in _images(s, column))
                found = [(i, file.write(image)) for i, image in read]
                np.save(folder / "found.npy", np.array(found, np.int64).reshape(-1, 2))
        shard, length = np.load(path / "found.npy", allow_pickle=False).T
        stems = [os.fsencode(os.path.basename(s)) for s in shards]
        names = (b"%s row %d" % (stems[i], row) for row, i in enumerate(shard.tolist()))
        place = np.stack([np.cumsum(length) - length, length], 1)
        super().__init__([f"{path}/images"], names, np.zeros(len(shard), np.int32), place)

    def key(self, row: int) -> str:
        return str(row)


def _images(shard: str, column: str) -> Iterator[bytes]:
    """Yield the encoded images of a column, empty where there is none."""
    import pyarrow.parquet as pq

    with _undamaged(shard), pq.ParquetFile(shard) as file:
        for batch in file.iter_batches(256, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield (value.get("bytes") if isinstance(value, dict) else value) or b""


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

    What lies there without a test split serves when the hub does not answer. Raises UserError when
    the data is neither there nor to be had.
    """
    import huggingface_hub as hub

    found = None
    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        folder = Path(hub.snapshot_download(repo, repo_type="dataset", local_files_only=True))
        splits, found = choose_splits(local_shards(folder, config)), folder
        if "test" in splits:
            return folder
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
        if found is not None:
            return found
        raise UserError(
            f"hub:{repo}: not in the data root and not to be had from the hub "
            f"({_first_line(error)}); either put a copy of its parquet files into DIR/{repo} and "
            "set --data-root DIR (or SPARSEJEPA_DATA), or run once with access to huggingface.co"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
    usual = [name for name in ("", "default") if name in found]
    if len(found) == 1 and (config is None or not named):
        (config,) = found
    elif config is None and usual:
        config = usual[0]
    if config is None:
        raise UserError(f"{origin}: several configurations; add one of /{', /'.join(named)}")
    if config not in found:
        raise UserError(
            f"{origin}: no configuration '{config}'{nearest(config, named)}; there are "
            f"{', '.join(named)}"
        )
    for split in choose_splits(found[config]).values():
        shards = found[config][split]
        total = re.search(r"-of-(\d+)", shards[0])
        if total and len(shards) != int(total[1]):
            raise UserError(
                f"{origin}: {len(shards)} of {int(total[1])} parquet files of the "
                f"{split} split; fetch the rest"
            )
    return found[config]


# --- Reading them ---------------------------------------------------------------------------------


def list_hub(
    folder: Path, name: str, config: str | None, cache: Path, factors: Sequence[str] = ()
) -> dict[str, Listing]:
    """List a local copy of a data set of the hub, whose images are copied into the `cache` folder.

    With `factors` those columns are the targets. Raises UserError when the copy is damaged or not
    complete, when a factor is unusable, or when the cache cannot be written.
    """
    import pyarrow.parquet as pq

    origin, found = str(folder), local_shards(folder, config)
    splits = choose_splits(found).items()
    shards = {split: [f"{folder}/{file}" for file in found[theirs]] for split, theirs in splits}
    with _undamaged(origin):
        schema = pq.read_schema(shards["train"][0])
    image, classes = _features(schema)
    if image is None:
        columns = ", ".join(schema.names)
        raise UserError(f"{origin}: no column holds images; there are {columns}")
    labels = [*classes]
    labels += [f.name for f in schema if "label" in f.name and f.name not in classes]
    wanted = [f.name for f in schema if _may_be_factor(f.type)] if factors else labels
    parts = {}
    for split, files in shards.items():
        with _undamaged(origin):
            columns = _columns(files, [*dict.fromkeys([*wanted, *labels])])
        for key, names in classes.items():
            known = dict(enumerate(names))
            columns |= {key: [known.get(v) for v in columns[key]]} if key in columns else {}
        reader = Rows(files, image, cache, f"{name}-{split}")
        parts[split] = Part(reader, np.arange(len(reader)), columns)
    return make_listings(name, origin, parts, factors, labels=labels, classes=classes)


def _features(schema: Any) -> tuple[str | None, dict[str, tuple[str, ...]]]:
    """Return the column of images, and those of labels with the names of their classes.

    As the hub writes it into a parquet file's schema; the images are guessed where it does not.
    """
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        features = {}
    own = {k: f for k, f in features.items() if k in schema.names and isinstance(f, dict)}
    named = {k: f["names"] for k, f in own.items() if f.get("_type") == "ClassLabel"}
    images = [k for k, f in own.items() if f.get("_type") == "Image"]
    for field in schema:
        plain = field.name in ("image", "img") and "binary" in str(field.type)
        if plain or str(field.type).startswith("struct<bytes: binary"):
            images.append(field.name)
    return next(iter(images), None), {k: tuple(map(str, names)) for k, names in named.items()}


def _columns(shards: list[str], wanted: list[str]) -> dict[str, list[Any]]:
    """Return columns of some parquet files as lists of values, without those that a file lacks.

    A list column, if all lists have one length, becomes a column per entry: pose_0, pose_1 and on.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for shard in shards:
        with pq.ParquetFile(shard) as file:
            tables.append(file.read(wanted))
    columns: dict[str, list[Any]] = {}
    table = pa.concat_tables(tables, promote_options="permissive")
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not _may_be_factor(column.type):
            continue
        # Of float32, NumPy's own numbers: they write 0.6 where Python's would need more digits.
        rows = column.to_numpy() if pa.types.is_floating(column.type) else column.to_pylist()
        if not hasattr(column.type, "value_type") or pa.types.is_dictionary(column.type):
            columns[name] = [None if value != value else value for value in rows]
        elif len(widths := {len(row or ()) for row in rows}) == 1:
            columns |= {f"{name}_{i}": [row[i] for row in rows] for i in range(widths.pop())}
    return columns


def _may_be_factor(kind: Any) -> bool:
    """Whether a column of this arrow type can be a factor: plain values, or lists of them."""
    kind = str(getattr(kind, "value_type", kind))
    return bool(re.fullmatch(r"u?int\d+|halffloat|float|double|bool|(large_)?string", kind))


@contextlib.contextmanager
def _undamaged(origin: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise UserError(
            f"{origin}: damaged parquet file ({_first_line(error)}); fetch it again"
        ) from None
