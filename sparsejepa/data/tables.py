"""Tables that label image files: their first column names the file, the others are labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsejepa.data.decode import shown
from sparsejepa.data.factors import arrow_columns
from sparsejepa.errors import UserError

_ENDINGS = (".csv", ".tsv", ".parquet")


class LabelTable(NamedTuple):
    """A table as it was read."""

    path: Path
    names: list[str]
    """The first column."""
    columns: dict[str, list[Any]]
    """The others."""


def find_table(root: Path) -> Path | None:
    """Return the table of labels at the top of a folder, if there is one."""
    tables = (root / "factors.csv", root / "factors.parquet")
    return next((path for path in tables if path.is_file()), None)


def read_table(path: Path) -> LabelTable:
    """Read a table. Raises UserError if it cannot be read or has no rows."""
    return LabelTable(path, *(_read_parquet if path.suffix == ".parquet" else _read_csv)(path))


def table_files(folders: Iterable[Path]) -> list[Path]:
    """Return what may be a table at the top of some folders."""
    found = []
    for folder in folders:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(_ENDINGS)]
        found += [folder / name for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def other_tables(
    paths: Iterable[Path], files: Collection[str]
) -> tuple[list[LabelTable], list[str]]:
    """Return the tables that label `files`, and what is wrong with the others.

    A table labels them if its first column names half of them, or half of it are names of them,
    each once, and there is another column. A list of names alone is not mentioned.
    """
    tables, others = [], []
    for path in paths:
        try:
            if path.suffix == ".parquet" and not _begins_with_names(path):
                continue  # images, perhaps gigabytes of them
            table = read_table(path)
        except UserError as error:
            others.append(f"{path.name} ({str(error).removeprefix(f'{path}: ')})")
            continue
        if not table.columns:
            continue
        named = [name for name in match(table.names, files) if name in files]
        if 2 * len(named) < min(len(files), len(table.names)) or not named:
            example = f"'{shown(table.names[0][:40])}' is not '{shown(min(files))}'"
            others.append(f"{path.name} (its first column does not name the images: {example})")
        elif len(set(named)) < len(named):
            others.append(f"{path.name} (its first column names images several times)")
        else:
            tables.append(table)
    return tables, others


def _begins_with_names(path: Path) -> bool:
    """Whether the first column of a parquet file holds text or whole numbers; reads no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, ValueError, pa.ArrowException):  # reading the table reports it
        return True
    kind = str(schema.types[0]) if len(schema) else ""
    return kind in ("string", "large_string") or "int" in kind.partition("<")[0]


def match(names: Sequence[str], files: Collection[str]) -> list[str]:
    """Return the names as those of files: names without endings, if none is a file's as it is.

    A name that stands for no file, or for several, stays what it is.
    """
    if any(name in files for name in names):
        return list(names)
    stems: dict[str, str | None] = {}
    for file in files:
        stem = os.path.splitext(file)[0]
        stems[stem] = None if stem in stems else file
    return [stems.get(name) or name for name in names]


def _delimiter(header: str) -> str:
    """Return what parts the cells: the comma, unless the header has only others."""
    return next((mark for mark in ",;\t" if mark in header), ",")


def _read_csv(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the names of the first column, which are files, and the other columns by name."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = _delimiter(file.readline())
            file.seek(0)
            table = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: cannot be read as a table ({error.reason}); save it as UTF-8"
        ) from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from None
    if len(table) < 2 or len(table[0]) < 1:
        raise UserError(f"{path}: no rows; the first column names files in images/")
    header, *rows = table
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(f"{path}: row {number} has {len(row)} cells instead of {len(header)}")
    columns = {key: [row[i] for row in rows] for i, key in enumerate(header) if i}
    return [row[0] for row in rows], columns


def _read_parquet(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """As `_read_csv`; list columns are taken apart."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
        if not table.num_rows or not table.num_columns:
            raise UserError(f"{path}: no rows; the first column names files in images/")
        files = [str(name) for name in table.column(0).to_pylist()]
        return files, arrow_columns(table.remove_column(0))
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as a table ({reason})") from None
