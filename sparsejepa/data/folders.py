"""Folders of image files: class folders, unlabelled images, or a table of labels; and masks."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejepa.data.cache import Source
from sparsejepa.data.decode import EXTENSIONS
from sparsejepa.data.factors import arrow_columns, chosen, factor_target
from sparsejepa.data.masks import read_masks
from sparsejepa.data.sources import (
    TEST_NAMES,
    TRAIN_NAMES,
    Table,
    category_names,
    choose_splits,
    in_test,
    index_target,
    make_source,
)
from sparsejepa.data.store import ImageSet, Target
from sparsejepa.errors import UserError


class ImageFile(NamedTuple):
    """An image file, its path relative to the folder that was scanned, and size and age."""

    path: Path
    relative: str
    stamp: tuple[int, int]

    @property
    def label(self) -> str:
        """The class folder, which may be nested; "" for a file at the top."""
        return self.relative.rpartition("/")[0]


def scan(folder: Path) -> list[ImageFile]:
    """List the image files below `folder`, ordered by path.

    Hidden files and folders are passed over, links are followed, loops of links are cut.
    """
    found: list[ImageFile] = []

    def visit(directory: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        status = directory.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    visit(Path(entry.path), f"{prefix}{entry.name}/", (*above, here))
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.append(ImageFile(Path(entry.path), prefix + entry.name, _age(entry)))

    with _readable(folder):
        visit(folder, "", ())
    return sorted(found, key=lambda file: file.relative)


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; the whole folder as train if it has no train/ inside.

    A folder that holds one folder and nothing else, as unpacked archives do, is seen through.
    """
    holder = root
    while True:
        with _readable(holder):
            entries = [path for path in holder.iterdir() if not path.name.startswith(".")]
            present = [path.name for path in entries if path.is_dir()]
        if not {name.lower() for name in present}.isdisjoint(TRAIN_NAMES):
            return {split: holder / folder for split, folder in choose_splits(present).items()}
        if len(entries) != 1 or not present or entries[0].is_symlink():
            return {"train": root}
        holder = entries[0]


def find_table(root: Path) -> Path | None:
    """Return the table of labels at the top of a folder, if there is one."""
    tables = (root / "factors.csv", root / "factors.parquet")
    return next((path for path in tables if path.is_file()), None)


def read_folder(root: Path, name: str, factors: Sequence[str] = ()) -> dict[str, Source]:
    """Read a folder of images; with `factors`, those columns are the targets.

    Either factors.csv (or .parquet) beside images/ (first column the file, other columns labels,
    `split` train or test), or train/ and test/ (also val/, valid/, validation/), or one folder that
    is then split; inside, class folders, possibly nested, or images without labels. Beside images/
    there may be masks/ with files of the same names: grey or palette values are objects.

    Raises UserError: no such folder, no images in it, a table that cannot be read, or a factor that
    is not there or unusable.
    """
    if not root.exists():
        raise UserError(f"{root}: no such folder")
    if not root.is_dir():
        raise UserError(f"{root}: not a folder; give the folder that holds the images")
    table = find_table(root)
    if table is not None:
        return _read_factors(root, table, name, factors)
    images = root / "images" if (root / "images").is_dir() and (root / "masks").is_dir() else root
    folders = split_folders(images)
    parts = {}
    for split, folder in folders.items():
        files = scan(folder)
        if not files:
            raise UserError(f"{folder}: no images in it ({', '.join(EXTENSIONS)})")
        parts[split] = _classify(files)
    if "test" not in parts:
        files, unusable = parts["train"]
        test_part = in_test([f.relative for f in files], [f.label for f in files])
        parts = {
            "train": ([f for f, t in zip(files, test_part, strict=True) if not t], unusable),
            "test": ([f for f, t in zip(files, test_part, strict=True) if t], ()),
        }
    classes = {split: [f.label for f in files] for split, (files, _) in parts.items()}
    names = sorted({label for labels in classes.values() for label in labels if label})
    sources = {}
    for split, (files, unusable) in parts.items():
        targets = _class_targets(classes[split], names)
        if factors:
            targets = {key: targets[key] for key in chosen(factors, list(targets), str(root))}
        folder = folders.get(split, folders["train"])
        masks = _masks_beside(folder, root) if images != root else None
        sources[split] = _file_source(name, split, files, targets, unusable, str(folder), masks)
    return sources


def _masks_beside(folder: Path, root: Path) -> Callable[[ImageSet], np.ndarray | None]:
    """Return the reader of the masks of `folder`, which is ROOT/images or lies in it."""
    return partial(read_masks, folder, root / "masks" / folder.relative_to(root / "images"))


def _classify(files: list[ImageFile]) -> tuple[list[ImageFile], tuple[tuple[str, str], ...]]:
    """Where images lie both at the top and in class folders, keep the more numerous kind."""
    top = [file for file in files if not file.label]
    below = [file for file in files if file.label]
    if len(below) >= len(top):
        return below, tuple((f.relative, "lies beside the class folders") for f in top)
    return top, tuple((f.relative, "lies in a folder beside unlabelled images") for f in below)


def _class_targets(labels: list[str], names: list[str]) -> dict[str, Target]:
    """The class of each image, and for nested class folders the outermost folder as well."""
    if not any(labels):
        return {}
    targets = {"class": index_target(labels, names)}
    outer = sorted({name.partition("/")[0] for name in names})
    if 1 < len(outer) < len(names):
        targets["superclass"] = index_target([label.partition("/")[0] for label in labels], outer)
    return targets


def _file_source(
    name: str,
    split: str,
    files: list[ImageFile],
    targets: dict[str, Target],
    unusable: tuple[tuple[str, str], ...],
    origin: str,
    masks: Callable[[ImageSet], np.ndarray | None] | None = None,
) -> Source:
    def table() -> Table:
        if not files:
            raise UserError(f"{origin}: no images for the {split} split; add some")
        return Table([(file.relative, file.path) for file in files], targets, unusable)

    labels = {key: [t.names, t.values.tolist()] for key, t in targets.items()}
    stamp = [[(f.relative, f.stamp) for f in files], labels, unusable]
    return make_source(name, split, stamp, origin, table, masks)


def _read_factors(root: Path, path: Path, name: str, factors: Sequence[str]) -> dict[str, Source]:
    listed, columns = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    files = {file.relative: file for file in scan(root / "images")}
    unusable = tuple((f, "no such file in images/") for f in listed if f not in files)
    unusable += tuple((f, f"no row in {path.name}") for f in sorted(set(files) - set(listed)))
    there = [row for row, file in enumerate(listed) if file in files]
    if not there:
        raise UserError(f"{path}: its first column names no image in images/")
    listed = [listed[row] for row in there]
    columns = {key: [column[row] for row in there] for key, column in columns.items()}
    splits = columns.pop("split", None)
    names = {key: category_names(column) for key, column in columns.items()}
    targets = {key: index_target(columns[key], names[key]) for key in columns if names[key]}
    if splits is None:
        primary = next(iter(targets.values()), None)
        labels = primary.values.tolist() if primary else [0] * len(listed)
        test = in_test(listed, labels)
    else:
        for split in splits:
            if str(split).lower() not in TRAIN_NAMES + TEST_NAMES:
                raise UserError(f"{path}: split '{split}' is neither train nor test")
        test = np.array([str(split).lower() in TEST_NAMES for split in splits])
    if factors:  # after the division, which must not depend on them
        targets = {
            key: factor_target(key, columns[key], ~test, str(path))
            for key in chosen(factors, list(columns), str(path))
        }
    sources = {}
    for split, mask in (("train", ~test), ("test", test)):
        own = {key: target.take(mask) for key, target in targets.items()}
        part = [files[file] for file, inside in zip(listed, mask, strict=True) if inside]
        left_out = unusable if split == "train" else ()
        sources[split] = _file_source(
            name, split, part, own, left_out, str(root), _masks_beside(root / "images", root)
        )
    return sources


def _read_csv(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the names of the first column, which are files, and the other columns by name."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
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
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a table ({reason})") from None
    if not table.num_rows or not table.num_columns:
        raise UserError(f"{path}: no rows; the first column names files in images/")
    files = [str(name) for name in table.column(0).to_pylist()]
    return files, arrow_columns(table.remove_column(0))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


def _age(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a dangling link: decoding reports it
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)
