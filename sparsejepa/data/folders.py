"""Folders of image files: class folders, unlabelled images, or a table of labels; and masks."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsejepa.data.decode import EXTENSIONS, shown
from sparsejepa.data.factors import chosen, factor_target
from sparsejepa.data.masks import read_masks
from sparsejepa.data.readers import Files, Names, walk
from sparsejepa.data.sources import (
    TEST_NAMES,
    TRAIN_NAMES,
    Listing,
    category_names,
    choose_splits,
    in_test,
    index_target,
)
from sparsejepa.data.store import ImageSet, Target
from sparsejepa.data.tables import (
    LabelTable,
    find_table,
    match,
    other_tables,
    read_table,
    table_files,
)
from sparsejepa.errors import UserError

_NEITHER = "not a folder; give the folder that holds the images"
_NO_FOLDER = {
    **dict.fromkeys((".csv", ".tsv"), "a table of labels; give its folder, with the images"),
    ".parquet": "a parquet file; give its folder",
    **{f".{kind}": f"a {kind} file; unpack it first" for kind in ("zip", "7z", "rar", "gz")},
}
"""What a path that is no folder is, by its ending, and what to do."""


class _Found(NamedTuple):
    """The image files below a folder, ordered by path."""

    files: Files
    classes: list[str]
    """Folders that hold images, relative to the folder; "" is the folder itself."""
    labels: np.ndarray
    """[N] int64: which of those folders each image is in."""


def scan(folder: Path) -> _Found:
    """List the image files below `folder`. Raises UserError if a folder cannot be read."""
    numbers: dict[bytes, int] = {}
    labels = array("q")

    def labelled() -> Iterator[bytes]:
        for name in walk(folder):
            labels.append(numbers.setdefault(name.rpartition(b"/")[0], len(numbers)))
            yield name

    with _readable(folder):
        names = Names.of(labelled())
    classes = [os.fsdecode(name) for name in numbers]
    return _Found(Files(folder, names), classes, np.frombuffer(labels, np.int64))


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


def read_folder(root: Path, name: str, factors: Sequence[str] = ()) -> dict[str, Listing]:
    """List a folder of images; with `factors`, those columns are the targets.

    Either factors.csv (or .parquet) beside images/ or the images (first column the file, other
    columns labels, `split` train or test), or train/ and test/ (also val/, valid/, validation/), or
    one folder that is then split; inside, class folders, possibly nested, or images without labels.
    A sole folder is no class: there, any one table that names the images is read like factors.csv.
    Beside images/ there may be masks/ with files of the same names: grey or palette values are
    objects.

    Raises UserError: no such folder, no images in it, a table that cannot be read, or a factor that
    is not there or unusable.
    """
    if not root.exists():
        raise UserError(f"{root}: no such folder")
    if not root.is_dir():
        raise UserError(f"{root}: {_NO_FOLDER.get(root.suffix.lower(), _NEITHER)}")
    table = find_table(root)
    if table is not None:
        base = root if _are_beside(root) else root / "images"
        return _read_factors(root, read_table(table), scan(base).files, name, factors)
    images = root / "images" if (root / "images").is_dir() and (root / "masks").is_dir() else root
    folders = split_folders(images)
    found, rows, unusable = {}, {}, {}
    for split, folder in folders.items():
        found[split] = scan(folder)
        if not len(found[split].files):
            raise UserError(f"{folder}: no images in it ({', '.join(EXTENSIONS)})")
        rows[split], unusable[split] = _classify(found[split])
    labels = _labels(root, found, rows)
    if labels is not None:
        table, base = labels
        return _read_factors(root, table, scan(base).files, name, factors)
    about = f"{folders['test'].name}/" if "test" in folders else ""
    if "test" not in found:
        whole, kept = found["train"], rows["train"]
        test = in_test((whole.files.name(row) for row in kept.tolist()), whole.labels[kept])
        found["test"], unusable["test"] = whole, ()
        rows = {"train": kept[~test], "test": kept[test]}
    used = {
        found[split].classes[i]
        for split in found
        for i in np.unique(found[split].labels[rows[split]])
    }
    names = sorted(used - {""})
    if len(names) == 1:  # says nothing about an image
        names = []
    about = about or f"a fifth{' of each class' if names else ''}, by a hash of the name"
    listings = {}
    for split in ("train", "test"):
        targets = _class_targets(found[split], rows[split], names)
        if factors:
            targets = {key: targets[key] for key in chosen(factors, list(targets), str(root))}
        folder = folders.get(split, folders["train"])
        listings[split] = Listing(
            name,
            split,
            str(folder),
            found[split].files,
            rows[split],
            targets,
            unusable[split],
            _masks_beside(folder, root) if images != root else None,
            about,
        )
    return listings


def _masks_beside(folder: Path, root: Path) -> Callable[[ImageSet], np.ndarray | None]:
    """Return the reader of the masks of `folder`, which is ROOT/images or lies in it."""
    return partial(read_masks, folder, root / "masks" / folder.relative_to(root / "images"))


def _classify(found: _Found) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    """Where images lie both at the top and in class folders, keep the more numerous kind.

    Returns the rows of those, and (file, reason) of the others.
    """
    at_top = np.array([not name for name in found.classes])[found.labels]
    keep_top = at_top.sum() > len(at_top) / 2
    reason = (
        "lies in a folder beside unlabelled images"
        if keep_top
        else ("lies beside the class folders")
    )
    others = np.flatnonzero(at_top != keep_top).tolist()
    unusable = tuple((shown(found.files.name(row)), reason) for row in others)
    return np.flatnonzero(at_top == keep_top), unusable


def _class_targets(found: _Found, rows: np.ndarray, names: list[str]) -> dict[str, Target]:
    """The class of each image, and for nested class folders the outermost folder as well."""
    if not names:
        return {}
    outer = sorted({name.partition("/")[0] for name in names})
    targets = {"class": _by_folder(found, rows, names, lambda folder: folder)}
    if 1 < len(outer) < len(names):
        targets["superclass"] = _by_folder(found, rows, outer, lambda f: f.partition("/")[0])
    return targets


def _by_folder(
    found: _Found, rows: np.ndarray, names: list[str], label: Callable[[str], str]
) -> Target:
    position = {name: i for i, name in enumerate(names)}
    values = np.array([position.get(label(folder), 0) for folder in found.classes], np.int64)
    return Target(values[found.labels[rows]], tuple(names))


def _are_beside(root: Path) -> bool:
    """Whether there is no images/, but images at the top of the folder or below it."""
    return not (root / "images").is_dir() and next(walk(root), None) is not None


def _labels(
    root: Path, found: dict[str, _Found], rows: dict[str, np.ndarray]
) -> tuple[LabelTable, Path] | None:
    """Return the one table that labels images without classes, and the folder that it speaks of.

    None if images have classes. Tables that are there and cannot serve are named in a warning.
    """
    parts = {
        (split, part.classes[i])
        for split, part in found.items()
        for i in np.unique(part.labels[rows[split]])
    }
    if len({folder for _, folder in parts} - {""}) > 1:
        return None
    folder = found["train"].files.folder
    base = folder / next(inner for split, inner in parts if split == "train")
    paths = table_files(dict.fromkeys((_holder(root), folder, base)))
    if not paths:  # the usual case; there may be millions of names
        return None
    files = scan(base).files
    tables, others = other_tables(paths, {files.name(row) for row in range(len(files))})
    if len(tables) == len(found) == 1:
        return tables[0], base
    reason = "the labels of one split only" if len(found) > 1 else "not the only one"
    others += [f"{table.path.name} ({reason})" for table in tables]
    if others:
        remedy = "; put one table and its images into a folder of their own" * bool(tables)
        _warn(f"{root}: tables not used: {', '.join(others)}{remedy}")
    return None


@functools.lru_cache(256)
def _warn(message: str) -> None:
    """Warn once, although a data set is listed for every split."""
    warnings.warn(message, stacklevel=3)


def _holder(root: Path) -> Path:
    """Return the folder within folders that hold nothing else."""
    with _readable(root):
        entries = [path for path in root.iterdir() if not path.name.startswith(".")]
    single = len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink()
    return _holder(entries[0]) if single else root


def _read_factors(
    root: Path, table: LabelTable, reader: Files, name: str, factors: Sequence[str]
) -> dict[str, Listing]:
    """List the images that a table names; those of the reader that it does not are left out."""
    path, columns = table.path, table.columns
    files = {reader.name(row): row for row in range(len(reader))}
    where = f"{reader.folder.name}/"
    listed = match(table.names, files)
    there = [row for row, file in enumerate(listed) if file in files]
    if not there:
        example = f" ('{shown(listed[0])}' is not '{shown(min(files))}')" if files else ""
        raise UserError(f"{path}: its first column names no image in {where}{example}")
    unusable = tuple((shown(f), f"no such file in {where}") for f in listed if f not in files)
    unlisted = sorted(set(files) - set(listed))
    unusable += tuple((shown(f), f"no row in {path.name}") for f in unlisted)
    listed = [listed[row] for row in there]
    columns = {key: [column[row] for row in there] for key, column in columns.items()}
    splits = columns.pop("split", None)
    names = {key: category_names(column) for key, column in columns.items()}
    targets = {key: index_target(columns[key], names[key]) for key in columns if names[key]}
    about = f"column split of {path.name}"
    if splits is None:
        about = "a fifth, by a hash of the name"
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
    rows = np.array([files[file] for file in listed], np.int64)
    images = root / "images"
    masks = _masks_beside(images, root) if reader.folder == images else None
    listings = {}
    for split, mask in (("train", ~test), ("test", test)):
        own = {key: target.take(mask) for key, target in targets.items()}
        left_out = unusable if split == "train" else ()
        listings[split] = Listing(
            name, split, str(root), reader, rows[mask], own, left_out, masks, about
        )
    return listings


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a line of thousands of characters helps nobody
            raise UserError(
                f"{folder}: {error.strerror}: some folder in it lies too deep"
            ) from None
        where = shown(os.fsdecode(error.filename or folder))
        raise UserError(f"{where}: {error.strerror or error}") from None
