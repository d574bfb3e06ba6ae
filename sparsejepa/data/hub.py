"""Data sets of the Hugging Face hub: parquet files, from a local copy, fetched, or streamed.

Layout: CONFIG/SPLIT-00000-of-00001.parquet, or data/SPLIT-..., or the files at the top. Which
columns hold images and labels is written in each file's schema.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejepa.data.cache import Source
from sparsejepa.data.decode import Item
from sparsejepa.data.factors import arrow_columns, chosen, factor_target, may_be_factor
from sparsejepa.data.readers import REMOTE, Rows, first_line, open_parquet
from sparsejepa.data.sources import (
    Listing,
    Table,
    category_names,
    choose_splits,
    in_test,
    index_target,
    make_source,
)
from sparsejepa.data.store import Target
from sparsejepa.errors import UserError, nearest

TIMEOUT = 10
"""Seconds to wait for the hub's answer."""


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

    local, splits = _in_cache(repo, config)
    if local is not None and "test" in splits:
        return local
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
        if local is None:
            raise _not_to_be_had(repo, error) from None
        reason = first_line(error)
        warnings.warn(f"hub:{repo}: only one split is in the hub's cache ({reason})", stacklevel=2)
        return local


def _in_cache(repo: str, config: str | None) -> tuple[Path | None, dict[str, str]]:
    """Return the hub's own copy of a data set and the splits that are in it."""
    import huggingface_hub as hub

    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        found = Path(hub.snapshot_download(repo, repo_type="dataset", local_files_only=True))
        return found, choose_splits(local_shards(found, config))
    return None, {}


def _remote_shards(repo: str, config: str | None) -> dict[str, list[str]]:
    """Return the addresses of the parquet files of each split, of the newest revision."""
    import huggingface_hub as hub

    try:
        info = hub.HfApi().dataset_info(repo, timeout=TIMEOUT)
        shards = choose_shards([f.rfilename for f in info.siblings or ()], config, f"hub:{repo}")
    except UserError:
        raise
    except Exception as error:
        raise _not_to_be_had(repo, error) from None
    place = f"{REMOTE}datasets/{repo}@{info.sha}"
    return {split: [f"{place}/{file}" for file in files] for split, files in shards.items()}


def _not_to_be_had(repo: str, error: Exception) -> UserError:
    return UserError(
        f"hub:{repo}: not in the data root and not to be had from the hub ({first_line(error)}); "
        f"either put a copy of its parquet files into DIR/{repo} and set --data-root DIR (or "
        "SPARSEJEPA_DATA), or run once with access to huggingface.co"
    )


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


def read_hub(
    folder: Path, name: str, config: str | None = None, factors: Sequence[str] = ()
) -> dict[str, Source]:
    """Read a local copy of a hub data set; with `factors`, those columns are the targets.

    Raises UserError when the copy is not complete, and on decoding when a factor is unusable.
    """
    paths = _of_splits(local_shards(folder, config), f"{folder}/")
    files = {split: [Path(path) for path in own] for split, own in paths.items()}
    stamp = {
        split: [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in own]
        for split, own in files.items()
    }
    sources = {}
    for split in ("train", "test"):
        table = partial(_table, paths, split, str(folder), factors)
        own = [stamp, *factors] if factors else stamp
        sources[split] = make_source(name, split, own, str(folder), table)
    return sources


def list_hub(
    folder: Path | None, repo: str, name: str, config: str | None, factors: Sequence[str] = ()
) -> dict[str, Listing]:
    """List a data set of the hub for streaming, from `folder` or else over the network.

    Only footers and labels are read here, and the images by row group when they are needed.
    Raises UserError as `read_hub`, and when the hub cannot be reached.
    """
    if folder is None:
        folder, splits = _in_cache(repo, config)
        folder = folder if "test" in splits else None
    if folder is None:
        origin, paths = f"hub:{repo}", _of_splits(_remote_shards(repo, config))
    else:
        origin, paths = str(folder), _of_splits(local_shards(folder, config), f"{folder}/")
    listings = {}
    for split in ("train", "test"):
        found = _inspect(paths, split, origin, factors)
        reader = Rows(found.shards, found.image, found.groups)
        rows = np.flatnonzero(found.keep)
        listings[split] = Listing(name, split, origin, reader, rows, found.targets)
    return listings


class _Split(NamedTuple):
    """What the footers and the labels say about one split."""

    shards: list[str]
    image: str
    """The column of images."""
    groups: list[list[int]]
    """Rows of each row group of each shard."""
    keep: np.ndarray
    """[N] bool: which rows are of this split; others where one split serves both."""
    targets: dict[str, Target]


def _of_splits(shards: dict[str, list[str]], before: str = "") -> dict[str, list[str]]:
    chosen = choose_splits(shards).items()
    return {split: [before + file for file in shards[theirs]] for split, theirs in chosen}


def _table(
    paths: dict[str, list[str]], split: str, origin: str, factors: Sequence[str] = ()
) -> Table:
    """Set up the reading of one split's rows."""
    found = _inspect(paths, split, origin, factors)
    return Table(_items(found.shards, found.image, found.keep, origin), found.targets)


def _inspect(
    paths: dict[str, list[str]], split: str, origin: str, factors: Sequence[str] = ()
) -> _Split:
    """Find image and label columns, and which rows are of a split."""
    own = split if split in paths else "train"
    with _damage(origin), open_parquet(paths["train"][0]) as first:
        schema = first.schema_arrow
        features = _features(schema)
        image, labels = _image_column(schema, features), _label_columns(schema, features)
        read = {part: _read(shards, list(labels)) for part, shards in paths.items()}
    values, groups = {part: table for part, (table, _) in read.items()}, read[own][1]
    if image is None:
        raise UserError(f"{origin}: no column holds images; there are {', '.join(schema.names)}")
    targets = {}
    for label, names in labels.items():
        if label not in values[own].column_names:  # a test split without labels
            continue
        column = values[own][label].to_pylist()
        if names and all(v is not None and 0 <= v < len(names) for v in column):
            targets[label] = Target(np.array(column, np.int64), names)
        elif not names:  # the same classes for all splits
            labelled = [part[label] for part in values.values() if label in part.column_names]
            found = category_names(v for part in labelled for v in part.to_pylist())
            if found:
                targets[label] = index_target(column, found)
    keep = np.ones(sum(map(sum, groups)), bool)
    if "test" not in paths:
        primary = next(iter(targets.values()), None)
        labels_of = primary.values if primary else np.zeros(len(keep), np.int64)
        test = in_test(map(str, range(len(keep))), labels_of)
        keep = test if split == "test" else ~test
        targets = {key: target.take(keep) for key, target in targets.items()}
    if factors:  # after the division, which must not depend on them
        targets = _factor_targets(paths, keep, split, factors, labels, origin)
    return _Split(paths[own], image, groups, keep, targets)


def _factor_targets(
    paths: dict[str, list[str]],
    keep: np.ndarray,
    split: str,
    factors: Sequence[str],
    classes: dict[str, tuple[str, ...]],
    origin: str,
) -> dict[str, Target]:
    """Make targets of the factors, for the rows `keep` [N] bool if one part serves both splits."""
    with _damage(origin):
        with open_parquet(paths["train"][0]) as first:
            names = [f.name for f in first.schema_arrow if may_be_factor(f.type)]
        tables = [_read(shards, names)[0] for shards in paths.values()]
    parts = [arrow_columns(table) for table in tables]
    shared = [name for name in parts[0] if name in parts[-1]]
    if len(parts) == 2:
        keep = np.repeat([split == "train", split == "test"], [table.num_rows for table in tables])
    train = keep if split == "train" else ~keep
    targets = {}
    for name in chosen(factors, shared, origin):
        values = [value for part in parts for value in part[name]]
        target = factor_target(name, values, train, origin, classes.get(name, ()))
        targets[name] = target.take(keep)
    return targets


def _read(shards: list[str], columns: list[str]) -> tuple[Any, list[list[int]]]:
    """Read columns of some parquet files as one table; those that a file lacks are left out.

    Returns the rows of each file's row groups as well.
    """
    import pyarrow as pa

    def read(shard: str) -> tuple[Any, list[int]]:
        with open_parquet(shard) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            return file.read(columns), groups

    with ThreadPoolExecutor(8) as pool:  # over a network each file takes some round trips
        found = list(pool.map(read, shards))
    tables = [table for table, _ in found]
    return pa.concat_tables(tables, promote_options="permissive"), [groups for _, groups in found]


def _items(shards: list[str], column: str, keep: np.ndarray, origin: str) -> Iterator[Item]:
    position = 0
    for shard in shards:
        with _damage(origin), open_parquet(shard) as file:
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if keep[position]:
                        data = value.get("bytes") if isinstance(value, dict) else value
                        yield f"{Path(shard).name} row {position}", data
                    position += 1


@contextlib.contextmanager
def _damage(origin: str) -> Iterator[None]:
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
