"""Folders of image files: class folders, unlabelled images, or a table of labels; and masks.

What is found is a `Listing` for each split: which images, where they lie, and their labels. A
listing is streamed, or decoded into the cache. Data that has no test split gets one: a fifth of the
images of each class, chosen by a hash of the file's name, so that the choice is the same on every
machine and hardly moves when files are added.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from sparsejepa.data.images import (
    EXTENSIONS,
    Decoded,
    ImageSet,
    Item,
    Source,
    Target,
    decode,
    fit,
    formats,
    shown,
)
from sparsejepa.errors import UserError, nearest

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
MAX_CATEGORIES = 1000
"""A column of a table with more distinct values than this is no target."""
MAX_LEVELS = 50
"""A factor of numbers with more distinct values than this is cut into bins."""
BINS = 20
"""As in the measures of disentanglement (Locatello et al. 2019)."""


class Reader(ABC):
    """Images by row; it holds arrays, not an object per image, so that millions cost little."""

    def __init__(self, names: Iterable[bytes]) -> None:
        self.names = np.array([*names], np.bytes_)
        """[N] relative to the folder."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        """Return the image's name; undecodable bytes become surrogates."""
        return os.fsdecode(self.names[row])

    def key(self, row: int) -> str:
        """Return the text whose hash says whether an image is for training or for test."""
        return self.name(row)

    @abstractmethod
    def source(self, row: int) -> str | bytes:
        """Return the image's path or its encoded bytes, empty if there are none."""

    def item(self, row: int) -> Item:
        """Return the image's name and source; None if that cannot be read."""
        try:
            return self.name(row), self.source(row)
        except OSError:
            return self.name(row), None

    def parts(self) -> list[bytes]:
        """Return what identifies the list of images, for a digest."""
        ends = np.cumsum(np.strings.str_len(self.names), dtype=np.int64)
        return [b"".join(self.names.tolist()), ends.tobytes()]

    @abstractmethod
    def paths(self, rows: np.ndarray) -> Iterable[str]:
        """Return the files that hold some images."""


class Files(Reader):
    """Image files below a folder, and perhaps masks of the same names below another."""

    def __init__(self, folder: Path, names: Iterable[bytes], masks: Path | None) -> None:
        super().__init__(names)
        self.folder, self.masks = folder, masks

    def source(self, row: int) -> str:
        return os.path.join(self.folder, self.name(row))

    def paths(self, rows: np.ndarray) -> Iterable[str]:
        return map(self.source, rows.tolist())


@dataclass(frozen=True, eq=False)
class Listing(Source):
    """One split of images that lie somewhere; nothing is decoded yet."""

    reader: Reader = field(kw_only=True)
    rows: np.ndarray = field(kw_only=True)
    """[N] int64: which of the reader's images."""

    def items(self, rows: np.ndarray | None = None) -> Iterator[Item]:
        """Yield name and source of all images, or of some rows of the reader.

        Raises UserError if the listing is empty.
        """
        if not len(self.rows):
            raise UserError(f"{self.origin}: no images for the {self.split} split; add some")
        yield from map(self.reader.item, (self.rows if rows is None else rows).tolist())

    def digest(self, *more: bytes) -> str:
        """Return a digest of the list of images and of their labels."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*self.reader.parts(), self.rows.tobytes(), *more):
            digest.update(part)
        for key, target in self.targets.items():
            digest.update(json.dumps([key, target.names]).encode() + target.values.tobytes())
        return digest.hexdigest()

    def stamp(self) -> str:
        """Return a digest of the listing and of the size and age of its files."""
        ages = hashlib.blake2b(digest_size=16)
        for path in self.reader.paths(self.rows):
            with contextlib.suppress(OSError):  # decoding reports it
                status = os.stat(path)
                ages.update(f"/{status.st_size}/{status.st_mtime_ns}".encode())
            ages.update(b"\n")
        return self.digest(ages.digest(), self.origin.encode())

    def read(self, img_size: tuple[int, int] | None, upscale: bool) -> Iterator[Decoded]:
        """Yield the decoded images, in order."""
        return decode(self.items(), img_size, upscale=upscale, origin=self.origin)

    def masks(self, images: ImageSet) -> np.ndarray | None:
        """Return the object masks that lie beside the images, if there are any."""
        masks = getattr(self.reader, "masks", None)
        return None if masks is None else read_masks(self.reader.folder, masks, images)  # type: ignore[attr-defined]


# --- Splits and targets, whatever the images lie in -----------------------------------------------


@dataclass(frozen=True)
class Part:
    """The images of one split, or of both, with a value per image in each column of labels."""

    reader: Reader
    rows: np.ndarray
    columns: Mapping[str, Sequence[Any]]
    unusable: tuple[tuple[str, str], ...] = ()

    def take(self, index: np.ndarray) -> Part:
        """Return the images at some positions."""
        columns = {key: [c[i] for i in index.tolist()] for key, c in self.columns.items()}
        return replace(self, rows=self.rows[index], columns=columns)


def make_listings(
    name: str,
    origin: str,
    parts: dict[str, Part],
    factors: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    classes: Mapping[str, tuple[str, ...]] | None = None,
    about: str = "",
) -> dict[str, Listing]:
    """List train and test; a sole part is divided, a fifth of each class for test.

    Arguments:
        name, origin: of the data, the latter for errors.
        parts: of train and test, or only of train.
        factors: columns that become the targets, in this order, instead of `labels`.
        labels: columns that become targets where every image has a value; all by default.
        classes: of columns that are known to be labels, by column.
        about: where the test split comes from.

    Raises UserError for a factor that is not there or unusable.
    """
    classes = classes or {}
    labels = list(parts["train"].columns) if labels is None else labels
    targets = _targets(parts, labels, classes, "")
    if "test" not in parts:
        whole, primary = parts["train"], next(iter(targets["train"].values()), None)
        values = np.zeros(len(whole.rows), np.int64) if primary is None else primary.values
        test = in_test(map(whole.reader.key, whole.rows.tolist()), values)
        index = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
        parts = {split: whole.take(index[split]) for split in index}
        parts["test"] = replace(parts["test"], unusable=())
        own = targets["train"].items()
        targets = {split: {key: t.take(index[split]) for key, t in own} for split in index}
        about = "a fifth of each class, by a hash of the name"
    if factors:  # after the division, which must not depend on them
        known = [key for key in parts["train"].columns if key in parts["test"].columns]
        targets = _targets(parts, chosen(factors, known, origin), classes, origin)
    listings = {}
    for split, part in parts.items():
        plain = (targets[split], origin, part.unusable, about)
        listings[split] = Listing(name, split, *plain, reader=part.reader, rows=part.rows)
    return listings


def _targets(
    parts: dict[str, Part],
    columns: Iterable[str],
    classes: Mapping[str, tuple[str, ...]],
    origin: str,
) -> dict[str, dict[str, Target]]:
    """Make targets of columns, with the same classes in both splits and bins by train's numbers.

    Without `origin` nobody has asked for them: a column is passed over that no split has whole, of
    one value, of values that never repeat (names of images), or of too many; and splits that have
    gaps in it.
    """
    targets: dict[str, dict[str, Target]] = {split: {} for split in parts}
    for key in columns:
        found = {split: part.columns.get(key, [None]) for split, part in parts.items()}
        if not origin:
            found = {split: column for split, column in found.items() if None not in column}
        values = [value for column in found.values() for value in column]
        train = np.arange(len(values)) < len(found.get("train", ()))
        try:
            target = factor_target(key, values, train, origin, classes.get(key, ()))
        except UserError:
            if origin:
                raise
            target = _indexed(values, classes[key]) if key in classes else None
        names = target and key not in classes and len(target.names) == len(values)
        if target is None or (not origin and (target.note or names)):
            continue
        for split, column in found.items():
            targets[split][key] = target.take(np.arange(len(column)))
            target = target.take(np.arange(len(column), len(target.values)))
    return targets


def choose_splits(present: Iterable[str]) -> dict[str, str]:
    """Return which of the splits, in whatever case, serve as train and test; or only as train."""
    present = list(present)
    known = {name.lower(): name for name in present}
    train = next((known[name] for name in TRAIN_NAMES if name in known), None)
    test = next((known[name] for name in TEST_NAMES if name in known), None)
    if train and test:
        return {"train": train, "test": test}
    return {"train": train or test or present[0]}


def in_test(names: Iterable[str], labels: np.ndarray) -> np.ndarray:
    """Choose a fifth of the images of each class for the test split: [N] bool.

    A class of two or more has at least one image on either side.
    """
    first_bytes = (
        int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        for name in names
    )
    hashes = np.frombuffer(array("Q", first_bytes), np.uint64)
    test = np.zeros(len(hashes), bool)
    if len(hashes):
        _, classes = np.unique(labels, return_inverse=True)
        order = np.lexsort((hashes, classes))  # by class, by hash within
        for members in np.split(order, np.cumsum(np.bincount(classes))[:-1]):
            count = max(1, round(len(members) / 5)) if len(members) > 1 else 0
            test[members[:count]] = True
    return test


def chosen(factors: Sequence[str], columns: Sequence[str], origin: str) -> list[str]:
    """Return the columns that the factors name, in the order asked for.

    A factor that is no column stands for its numbered ones: pose for pose_0, pose_1 and so on.
    Raises UserError if it has none of those either.
    """
    found: dict[str, None] = {}
    for factor in factors:
        numbered = re.compile(re.escape(factor) + r"_\d+")
        names = [factor] if factor in columns else list(filter(numbered.fullmatch, columns))
        if not names:
            raise UserError(
                f"{origin}: no factor '{factor}'{nearest(factor, columns)}; "
                f"there are {', '.join(columns) or 'none'}"
            )
        found |= dict.fromkeys(names)
    return list(found)


def factor_target(
    name: str,
    values: Sequence[Any],
    train: np.ndarray,
    origin: str,
    classes: tuple[str, ...] = (),
) -> Target:
    """Make a target of a column [N] of numbers, truth values or text that was asked for by name.

    Numbers are ordered as numbers, text as text or as the `classes` that the data names. More than
    `MAX_LEVELS` different numbers are cut into `BINS` bins of equal count, and the target's note
    says so; the cuts are quantiles of the training rows, `train` [N] bool.

    Raises UserError: missing values, NaN, one value only, or text that never repeats.
    """
    where = f"{origin}: factor '{name}'"
    texts = ["" if value is None else str(value).strip() for value in values]
    distinct = sorted(set(texts))
    numbers = {text: _number(text) for text in distinct}
    words = [text for text in distinct if text and text.lower().lstrip("+-") != "nan"]
    numeric = not classes and not any(math.isnan(numbers[word]) for word in words)
    missing = [not text or (numeric and not math.isfinite(numbers[text])) for text in texts]
    if any(missing):
        raise UserError(
            f"{where} has no value in {sum(missing)} of {len(texts)} rows; fill them in, or leave "
            "it out"
        )
    if numeric:  # 0.0 and -0.0, 1 and 1.0 are one value each
        same = {numbers[text]: text for text in distinct}
        texts, distinct = [same[numbers[text]] for text in texts], [same[n] for n in sorted(same)]
    if len(distinct) < 2:
        raise UserError(f"{where} has one value only ({''.join(distinct)}); leave it out")
    if numeric and len(distinct) > MAX_LEVELS:
        return _binned(np.array([numbers[text] for text in texts]), train, where)
    names = not numeric and len(distinct) == len(texts)
    if not classes and (names or len(distinct) > MAX_CATEGORIES):
        raise UserError(
            f"{where} has {len(distinct)} different texts in {len(texts)} rows, too many to be "
            "categories; leave it out"
        )
    return _indexed(texts, classes or tuple(distinct))


def _indexed(values: Iterable[str], names: tuple[str, ...]) -> Target:
    position = {name: i for i, name in enumerate(names)}
    return Target(np.array([position[value] for value in values], np.int64), names)


def _binned(values: np.ndarray, train: np.ndarray, where: str) -> Target:
    """Cut values [N] at the training rows' quantiles; no bin is empty there."""
    known = values[train] if train.any() else values
    cuts = np.unique(np.quantile(known, np.arange(1, BINS) / BINS, method="higher"))
    cuts = cuts[cuts > known.min()]
    if not len(cuts):
        raise UserError(f"{where} has one value in nearly all rows ({known.min():g}); leave it out")
    bounds = [f"{bound:.6g}" for bound in (values.min(), *cuts, values.max())]
    names = tuple(f"{low} to {high}" for low, high in pairwise(bounds))
    note = f"{len(np.unique(values))} different numbers, cut into {len(names)} bins of equal count"
    return Target(np.searchsorted(cuts, values, side="right").astype(np.int64), names, note)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# --- Folders --------------------------------------------------------------------------------------


def walk(folder: bytes) -> Iterator[bytes]:
    """Yield the image files below `folder` as paths relative to it, ordered by their bytes.

    Hidden files and folders are passed over, links are followed, loops of links are cut. Raises
    OSError if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for top, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        here = os.path.realpath(top) + b"/"
        places = {name: os.path.realpath(os.path.join(top, name)) + b"/" for name in folders}
        folders[:] = [n for n in folders if not (n.startswith(b".") or here.startswith(places[n]))]
        for name in files:
            if not name.startswith(b".") and os.fsdecode(name).lower().endswith(EXTENSIONS):
                found.append(os.path.relpath(os.path.join(top, name), folder))
    return iter(sorted(found))


def scan(folder: Path, masks: Path | None = None) -> Files:
    """List the image files below `folder`. Raises UserError if a folder cannot be read."""
    with _readable(folder):
        return Files(folder, walk(os.fsencode(folder)), masks)


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
    tables = (root / "factors.csv", root / "labels.csv")
    return next((path for path in tables if path.is_file()), None)


def read_folder(root: Path, name: str, factors: Sequence[str] = ()) -> dict[str, Listing]:
    """List a folder of images; with `factors`, those columns are the targets.

    Either factors.csv or labels.csv beside images/ or the images (first column the file, other
    columns labels, `split` train or test), or train/ and test/ (also val/, valid/, validation/), or
    one folder that is then split; inside, class folders, possibly nested, or images without labels.
    A sole folder is no class. Beside images/ there may be masks/ with files of the same names: grey
    or palette values are objects.

    Raises UserError: no such folder, no images in it, a table that cannot be read, or a factor that
    is not there or unusable.
    """
    if not root.is_dir():
        problem = "not a folder; give the folder that holds the images, unpacked"
        raise UserError(f"{root}: {problem if root.exists() else 'no such folder'}")
    inner, masks = root / "images", root / "masks"
    table = find_table(root)
    if table is not None:
        reader = scan(inner, masks) if inner.is_dir() else scan(root)
        return _read_table(table, reader, name, factors)
    images = inner if inner.is_dir() and masks.is_dir() else root
    folders = split_folders(images)
    parts, used = {}, set[str]()
    for split, folder in folders.items():
        beside = masks / folder.relative_to(images) if images != root else None
        reader = scan(folder, beside)
        if not len(reader):
            raise UserError(f"{folder}: no images in it ({', '.join(EXTENSIONS)})")
        parts[split] = _by_folder(reader)
        used.update(filter(None, parts[split].columns["class"]))
    outer = {folder.partition("/")[0] for folder in used}
    classes: dict[str, tuple[str, ...]] = {}
    if len(used) > 1:  # a sole one says nothing
        classes["class"] = tuple(sorted(used))
    if 1 < len(outer) < len(used):
        classes["superclass"] = tuple(sorted(outer))
    for split, part in parts.items():
        parts[split] = replace(part, columns={key: part.columns[key] for key in classes})
    about = f"{folders['test'].name}/" if "test" in folders else ""
    return make_listings(name, str(root), parts, factors, classes=classes, about=about)


def _by_folder(reader: Files) -> Part:
    """Return the images with their folders as `class`, None at the top, and the outermost ones.

    Where images lie both at the top and in folders, the more numerous kind is kept.
    """
    names = list(map(reader.name, range(len(reader))))
    folders = list(map(os.path.dirname, names))
    at_top = np.array([not folder for folder in folders])
    keep_top = at_top.sum() > len(at_top) / 2
    reason = "lies in a folder beside unlabelled images" if keep_top else ""
    reason = reason or "lies beside the class folders"
    unusable = tuple((shown(names[i]), reason) for i in np.flatnonzero(at_top != keep_top))
    rows = np.flatnonzero(at_top == keep_top)
    own = [folders[i] or None for i in rows]
    outer = [folder and folder.partition("/")[0] for folder in own]
    return Part(reader, rows, {"class": own, "superclass": outer}, unusable)


def _read_table(path: Path, reader: Files, name: str, factors: Sequence[str]) -> dict[str, Listing]:
    """List the images that the table `path` names; others are left out."""
    listed, columns = _read_csv(path)
    files = {reader.name(row): row for row in range(len(reader))}
    if not any(file in files for file in listed):  # names without endings
        stems = {os.path.splitext(file)[0]: file for file in files}
        listed = [stems.get(file, file) for file in listed]
    there = np.flatnonzero([file in files for file in listed])
    where = f"{reader.folder.name}/"
    if not len(there):
        example = f" ('{shown(listed[0])}' is not '{shown(min(files))}')" if files else ""
        raise UserError(f"{path}: its first column names no image in {where}{example}")
    unusable = tuple((shown(f), f"no such file in {where}") for f in listed if f not in files)
    unlisted = sorted(set(files) - set(listed))
    unusable += tuple((shown(f), f"no row in {path.name}") for f in unlisted)
    splits = columns.pop("split", None)
    rows = np.array([files.get(file, -1) for file in listed], np.int64)
    whole = Part(reader, rows, columns, unusable).take(there)
    parts = {"train": whole}
    if splits is not None:
        for split in splits:
            if split.lower() not in TRAIN_NAMES + TEST_NAMES:
                raise UserError(f"{path}: split '{split}' is neither train nor test")
        test = np.array([splits[row].lower() in TEST_NAMES for row in there])
        rest = replace(whole, unusable=()).take(np.flatnonzero(test))
        parts = {"train": whole.take(np.flatnonzero(~test)), "test": rest}
    return make_listings(name, str(path), parts, factors, about=f"column split of {path.name}")


def _read_csv(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the first column, which names files, and the others by name."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            mark = next((mark for mark in ",;\t" if mark in header), ",")
            file.seek(0)
            first, *rows = [row for row in csv.reader(file, delimiter=mark) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); save it as UTF-8") from None
    if not rows:
        raise UserError(f"{path}: no rows; the first column names files in images/")
    for number, row in enumerate(rows, 2):
        if len(row) != len(first):
            raise UserError(f"{path}: row {number} has {len(row)} cells instead of {len(first)}")
    files, *columns = map(list, zip(*rows, strict=True))
    return files, dict(zip(first[1:], columns, strict=True))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = shown(os.fsdecode(error.filename or folder))
        raise UserError(f"{where}: {error.strerror or error}") from None


# --- Object masks ---------------------------------------------------------------------------------


def read_masks(images: Path, masks: Path, image_set: ImageSet) -> np.ndarray | None:
    """Return the masks [N, H, W] of an image set that was read from the folder `images`.

    Grey and palette values are the labels, 0 is the background. A mask has the size of its image's
    file and is cropped and resized like it, to the nearest pixel. An image
    without a readable mask gets an empty one, with a warning; if all are empty, the result is None.
    uint8 if that holds the labels, else uint16.

    Raises UserError: a mask of another size than its image, in colour, or with labels over 65,535.
    """
    found = sorted(path for path in masks.rglob("*") if path.suffix.lower() in EXTENSIONS)
    by_name = {path.relative_to(masks).with_suffix("").as_posix(): path for path in found}
    result = np.zeros((len(image_set), *image_set.img_size), np.uint16)
    missing = []

    def read(position: int) -> None:
        file = image_set.files[position]
        path = by_name.get(os.path.splitext(file)[0])
        mask = _read_mask(images / file, path, image_set.img_size) if path else None
        if mask is None:
            missing.append(position)
        else:
            result[position] = mask

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        list(pool.map(read, range(len(image_set))))
    if not result.any():
        return None
    if missing:
        warnings.warn(
            f"{masks}: no readable mask for {len(missing)} of {len(image_set)} images of the "
            f"{image_set.split} split, the first is {image_set.files[min(missing)]}; they count as "
            "background",
            stacklevel=2,
        )
    return result.astype(np.uint8) if result.max() < 256 else result


def _read_mask(path: Path, mask_path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """Return one mask [H, W], None if it cannot be read."""
    try:
        with Image.open(mask_path, formats=formats()) as mask:
            mask.load()
            labels = np.asarray(mask)
        with Image.open(path, formats=formats()) as image:
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                width, height = height, width
    except Exception:  # on damaged files Pillow's readers raise almost anything
        return None
    if labels.ndim != 2 or mask.mode == "F" or not 0 <= labels.min() <= labels.max() <= 65_535:
        raise UserError(
            f"{mask_path}: a mask is a grey or palette image whose values, 0 to 65535, are labels; "
            f"this one is {mask.mode}; convert it"
        )
    if labels.shape != (height, width):
        raise UserError(
            f"{mask_path}: {labels.shape[0]}x{labels.shape[1]} pixels, but its image has "
            f"{height}x{width}; make it the same size"
        )
    if labels.shape == size:
        return labels
    whole = Image.fromarray(labels.astype(np.int32))  # 32 bits: a mode that can be resized
    return np.asarray(fit(whole, size, Image.Resampling.NEAREST))
