"""Data sets of the Hugging Face hub: parquet files, from a local copy or fetched.

Layout: CONFIG/SPLIT-00000-of-00001.parquet, or data/SPLIT-..., or the files at the top. Which
columns hold images and labels is written in each file's schema.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsejepa.data.cache import Source
from sparsejepa.data.decode import Item
from sparsejepa.data.factors import arrow_columns, chosen, factor_target, may_be_factor
from sparsejepa.data.sources import (
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

    local = None
    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        found = Path(hub.snapshot_download(repo, repo_type="dataset", local_files_only=True))
        splits = choose_splits(local_shards(found, config))
        local = found
        if "test" in splits:
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
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if local is not None:
        warnings.warn(f"hub:{repo}: only one split is in the hub's cache ({reason})", stacklevel=2)
        return local
    raise UserError(
        f"hub:{repo}: not in the data root and not to be had from the hub ({reason}); either put a "
        f"copy of its parquet files into DIR/{repo} and set --data-root DIR (or SPARSEJEPA_DATA), "
        "or run once with access to huggingface.co"
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
    shards = local_shards(folder, config)
    paths = {
        split: [folder / file for file in shards[theirs]]
        for split, theirs in choose_splits(shards).items()
    }
    stamp = {
        split: [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in own]
        for split, own in paths.items()
    }
    sources = {}
    for split in ("train", "test"):
        table = partial(_table, paths, split, str(folder), factors)
        own = [stamp, *factors] if factors else stamp
        sources[split] = make_source(name, split, own, str(folder), table)
    return sources


def _table(
    paths: dict[str, list[Path]], split: str, origin: str, factors: Sequence[str] = ()
) -> Table:
    """Find image and label columns, and set up the reading of one split's rows."""
    import pyarrow.parquet as pq

    own = split if split in paths else "train"
    with _damage(origin):
        schema = pq.read_schema(paths["train"][0])
        features = _features(schema)
        image, labels = _image_column(schema, features), _label_columns(schema, features)
        values = {part: _read(shards, list(labels)) for part, shards in paths.items()}
        count = sum(pq.read_metadata(shard).num_rows for shard in paths[own])
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
    keep = np.ones(count, bool)
    if "test" not in paths:
        primary = next(iter(targets.values()), None)
        test = in_test(
            [*map(str, range(count))], primary.values.tolist() if primary else [0] * count
        )
        keep = test if split == "test" else ~test
        targets = {key: target.take(keep) for key, target in targets.items()}
    if factors:  # after the division, which must not depend on them
        targets = _factor_targets(paths, keep, split, factors, labels, origin)
    return Table(_items(paths[own], image, keep, origin), targets)


def _factor_targets(
    paths: dict[str, list[Path]],
    keep: np.ndarray,
    split: str,
    factors: Sequence[str],
    classes: dict[str, tuple[str, ...]],
    origin: str,
) -> dict[str, Target]:
    """Make targets of the factors, for the rows `keep` [N] bool if one part serves both splits."""
    import pyarrow.parquet as pq

    with _damage(origin):
        names = [f.name for f in pq.read_schema(paths["train"][0]) if may_be_factor(f.type)]
        tables = [_read(shards, names) for shards in paths.values()]
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


def _read(shards: list[Path], columns: list[str]) -> Any:
    """Read columns of some parquet files as one table; those that a file lacks are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.ParquetFile(shard).read(columns) for shard in shards]
    return pa.concat_tables(tables, promote_options="permissive")


def _items(shards: list[Path], column: str, keep: np.ndarray, origin: str) -> Iterator[Item]:
    import pyarrow.parquet as pq

    position = 0
    for shard in shards:
        with _damage(origin):
            for batch in pq.ParquetFile(shard).iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if keep[position]:
                        data = value.get("bytes") if isinstance(value, dict) else value
                        yield f"{shard.name} row {position}", data
                    position += 1


@contextlib.contextmanager
def _damage(origin: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{origin}: damaged parquet file ({reason}); fetch it again") from None


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
