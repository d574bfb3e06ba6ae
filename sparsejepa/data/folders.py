"""Folders of image files: class folders, unlabelled images, or a table of labels; and masks.

What is found is a `Listing` for each split: which images, where they lie, and their labels. A
listing can be streamed or, as a `Source`, decoded into the cache. Data that has no test split gets
one: a fifth of the images of each class, chosen by a hash of the file's name, so that the choice is
the same on every machine and hardly moves when files are added.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from sparsejepa.data.images import (
    EXTENSIONS,
    Decoded,
    ImageSet,
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

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, row: int) -> str:
        """Return the image's name, relative to the folder; undecodable bytes become surrogates."""

    @abstractmethod
    def source(self, row: int) -> str | bytes | None:
        """Return the image's path or its encoded bytes; None if there is no image.

        Raises OSError when it cannot be read.
        """

    @abstractmethod
    def parts(self) -> list[bytes]:
        """Return what identifies the list of images, for a digest."""

    @abstractmethod
    def paths(self, rows: np.ndarray) -> Iterable[str]:
        """Return the files that hold some images."""

    def block(self, rows: np.ndarray) -> np.ndarray | None:
        """Return which stretch each of `rows` [n] belongs to: [n] ascending where rows are.

        The images of a stretch are fetched together; None if every image is fetched on its own.
        """
        return None


class Named(Reader):
    """Images of which each has a name of its own, and is read on its own."""

    def __init__(self, names: Iterable[bytes]) -> None:
        self.names = np.array([*names], np.bytes_)
        """[N] relative to the folder."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return os.fsdecode(self.names[row])

    def parts(self) -> list[bytes]:
        ends = np.cumsum(np.strings.str_len(self.names), dtype=np.int64)
        return [b"".join(self.names.tolist()), ends.tobytes()]


class Files(Named):
    """Image files below a folder."""

    def __init__(self, folder: Path, names: Iterable[bytes]) -> None:
        super().__init__(names)
        self.folder = folder

    def source(self, row: int) -> str:
        return os.path.join(self.folder, self.name(row))

    def paths(self, rows: np.ndarray) -> Iterable[str]:
        return map(self.source, rows.tolist())


def source_of(reader: Reader, row: int) -> str | bytes | None:
    """Return an image's path or bytes; None also if they cannot be read."""
    try:
        return reader.source(row)
    except OSError:
        return None


@dataclass(frozen=True, eq=False)
class Listing:
    """One split: which images, where they lie, and their labels; nothing is decoded yet."""

    name: str
    split: str
    origin: str
    """Names the data in errors."""
    reader: Reader
    rows: np.ndarray
    """[N] int64: which of the reader's images."""
    targets: dict[str, Target]
    unusable: tuple[tuple[str, str], ...] = ()
    """(file, reason) of what is left out before decoding."""
    masks: Callable[[ImageSet], np.ndarray | None] | None = None
    """The decoded split -> object masks [N, H, W], if any."""
    about: str = ""
    """Where the test split comes from, for people."""

    def items(self, rows: np.ndarray | None = None) -> Iterator[tuple[str, str | bytes | None]]:
        """Yield name and source of all images, or of some rows of the reader.

        Raises UserError if the listing is empty.
        """
        if not len(self.rows):
            raise UserError(f"{self.origin}: no images for the {self.split} split; add some")
        for row in (self.rows if rows is None else rows).tolist():
            yield self.reader.name(row), source_of(self.reader, row)

    def digest(self, *more: bytes) -> str:
        """Return a digest of the list of images and of their labels."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*self.reader.parts(), self.rows.tobytes(), *more):
            digest.update(part)
        for key, target in self.targets.items():
            digest.update(json.dumps([key, target.names]).encode() + target.values.tobytes())
        return digest.hexdigest()


def as_source(listing: Listing) -> Source:
    """Return the source that decodes all of a listing's files; its stamp has their size and age."""

    def read(img_size: tuple[int, int] | None, upscale: bool) -> Iterator[list[Decoded]]:
        return decode(listing.items(), img_size, upscale=upscale, origin=listing.origin)

    ages = hashlib.blake2b(digest_size=16)
    for path in listing.reader.paths(listing.rows):
        with contextlib.suppress(OSError):  # decoding reports it
            status = os.stat(path)
            ages.update(f"/{status.st_size}/{status.st_mtime_ns}".encode())
        ages.update(b"\n")
    return Source(
        listing.name,
        listing.split,
        listing.digest(ages.digest(), listing.origin.encode()),
        read,
        listing.targets,
        listing.masks,
        listing.origin,
        listing.unusable,
    )


# --- Which images are train and which are test ----------------------------------------------------


def choose_splits(present: Iterable[str]) -> dict[str, str]:
    """Return which of the splits serve as train and test; only train if that is to be divided.

    Train/ and TRAIN/ are train/ as well: taken for classes, they would put test into training.
    """
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


def divide(names: Sequence[str], targets: dict[str, Target]) -> np.ndarray:
    """Choose a fifth of the images of each class of the first target for test: [N] bool."""
    primary = next(iter(targets.values()), None)
    return in_test(names, primary.values if primary else np.zeros(len(names), np.int64))


# --- Columns of labels as targets -----------------------------------------------------------------


def category_names(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the classes of a column, ordered as numbers if all are numbers, else as text.

    Empty if the column is no target: values are missing, there are more than `MAX_CATEGORIES`
    distinct ones, or none repeats (then they are names of images, not labels).
    """
    texts = ["" if value is None or str(value).lower() == "nan" else str(value) for value in values]
    distinct = sorted(set(texts))
    if "" in distinct or len(distinct) > MAX_CATEGORIES or len(distinct) == len(texts):
        return ()
    numbers = [_number(text) for text in distinct]
    if all(map(math.isfinite, numbers)):
        distinct = [text for _, text in sorted(zip(numbers, distinct, strict=True))]
    return tuple(distinct)


def index_target(values: Iterable[Any], names: Sequence[str]) -> Target:
    """Make a target of values that are all among `names`."""
    position = {name: i for i, name in enumerate(names)}
    return Target(np.array([position[str(v)] for v in values], np.int64), tuple(names))


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

    Numbers are ordered as numbers, text as text. More than `MAX_LEVELS` different numbers are cut
    into `BINS` bins of equal count, and the target's note says so; the cuts are quantiles of the
    training rows, `train` [N] bool. Where the data names its `classes`, `values` are indices.

    Raises UserError: missing values, NaN, one value only, or text that never repeats.
    """
    where = f"{origin}: factor '{name}'"
    texts = ["" if value is None else str(value).strip() for value in values]
    if classes:
        known = {str(i): text for i, text in enumerate(classes)}
        texts = [known.get(text, "") for text in texts]
    distinct = sorted(set(texts))
    numbers = {text: _number(text) for text in distinct}
    numeric = not classes and not any(math.isnan(numbers[t]) for t in distinct if _is_word(t))
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
    if classes:
        return Target(np.array(values, np.int64), classes)
    if numeric and len(distinct) > MAX_LEVELS:
        return _binned(np.array([numbers[text] for text in texts]), train, where)
    if len(distinct) > MAX_CATEGORIES or (not numeric and len(distinct) == len(texts)):
        raise UserError(
            f"{where} has {len(distinct)} different texts in {len(texts)} rows, too many to be "
            "categories; leave it out"
        )
    return index_target(texts, distinct)


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


def _is_word(text: str) -> bool:
    return bool(text) and text.lower().lstrip("+-") != "nan"


# --- Folders --------------------------------------------------------------------------------------


def walk(folder: bytes, before: bytes = b"", above: tuple[Any, ...] = ()) -> Iterator[bytes]:
    """Yield the image files below `folder` as paths relative to it, ordered by their bytes.

    Hidden files and folders are passed over, links are followed, loops of links are cut.
    """
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = False
            with contextlib.suppress(OSError):  # a link to itself: decoding reports it
                is_folder = entry.is_dir()
            if not entry.name.startswith(b".") and (is_folder or _is_image(entry.name)):
                names.append(entry.name + b"/" * is_folder)
    for name in sorted(names):
        if name.endswith(b"/"):
            yield from walk(os.path.join(folder, name[:-1]), before + name, (*above, identity))
        else:
            yield before + name


def _is_image(name: bytes) -> bool:
    return os.fsdecode(name).lower().endswith(EXTENSIONS)


@dataclass(frozen=True)
class _Found:
    """The image files below a folder, ordered by path."""

    files: Files
    classes: list[str]
    """Folders that hold images, relative to the folder; "" is the folder itself."""
    labels: np.ndarray
    """[N] int64: which of those folders each image is in."""


def scan(folder: Path) -> _Found:
    """List the image files below `folder`. Raises UserError if a folder cannot be read."""
    with _readable(folder):
        names = list(walk(os.fsencode(folder)))
    numbers: dict[bytes, int] = {}
    labels = [numbers.setdefault(os.path.dirname(name), len(numbers)) for name in names]
    classes = [os.fsdecode(name) for name in numbers]
    return _Found(Files(folder, names), classes, np.array(labels, np.int64))


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
    table = find_table(root)
    if table is not None:
        images = root / "images"
        return _read_table(root, table, images if images.is_dir() else root, name, factors)
    images = root / "images" if (root / "images").is_dir() and (root / "masks").is_dir() else root
    folders = split_folders(images)
    found, rows, unusable = dict[str, _Found](), dict[str, np.ndarray](), dict[str, Any]()
    for split, folder in folders.items():
        found[split] = scan(folder)
        if not len(found[split].files):
            raise UserError(f"{folder}: no images in it ({', '.join(EXTENSIONS)})")
        rows[split], unusable[split] = _classify(found[split])
    if "test" in folders:
        about = f"{folders['test'].name}/"
    else:
        whole, kept = found["train"], rows["train"]
        test = in_test(map(whole.files.name, kept.tolist()), whole.labels[kept])
        found["test"], unusable["test"] = whole, ()
        rows = {"train": kept[~test], "test": kept[test]}
        about = "a fifth of each class, by a hash of the name"
    used = {found[s].classes[i] for s in found for i in np.unique(found[s].labels[rows[s]])}
    names = sorted(used - {""})
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
    reason = "lies in a folder beside unlabelled images" if keep_top else ""
    reason = reason or "lies beside the class folders"
    others = np.flatnonzero(at_top != keep_top).tolist()
    unusable = tuple((shown(found.files.name(row)), reason) for row in others)
    return np.flatnonzero(at_top == keep_top), unusable


def _class_targets(found: _Found, rows: np.ndarray, names: list[str]) -> dict[str, Target]:
    """The class of each image, and for nested class folders the outermost folder as well.

    `names` are the folders of all splits; a sole one says nothing about an image.
    """
    if len(names) < 2:
        return {}

    def by(label: Callable[[str], str], names: list[str]) -> Target:
        position = {name: i for i, name in enumerate(names)}
        values = np.array([position.get(label(folder), 0) for folder in found.classes], np.int64)
        return Target(values[found.labels[rows]], tuple(names))

    outer = sorted({name.partition("/")[0] for name in names})
    targets = {"class": by(str, names)}
    if 1 < len(outer) < len(names):
        targets["superclass"] = by(lambda folder: folder.partition("/")[0], outer)
    return targets


def _read_table(
    root: Path, path: Path, folder: Path, name: str, factors: Sequence[str]
) -> dict[str, Listing]:
    """List the images of `folder` that the table `path` names; others are left out."""
    reader, (listed, columns) = scan(folder).files, _read_csv(path)
    files = {reader.name(row): row for row in range(len(reader))}
    if not any(file in files for file in listed):  # names without endings
        stems = {os.path.splitext(file)[0]: file for file in files}
        listed = [stems.get(file, file) for file in listed]
    there = [row for row, file in enumerate(listed) if file in files]
    where = f"{folder.name}/"
    if not there:
        example = f" ('{shown(listed[0])}' is not '{shown(min(files))}')" if files else ""
        raise UserError(f"{path}: its first column names no image in {where}{example}")
    unusable = tuple((shown(f), f"no such file in {where}") for f in listed if f not in files)
    unlisted = sorted(set(files) - set(listed))
    unusable += tuple((shown(f), f"no row in {path.name}") for f in unlisted)
    rows = np.array([files[listed[row]] for row in there], np.int64)
    columns = {key: [column[row] for row in there] for key, column in columns.items()}
    splits = columns.pop("split", None)
    names = {key: category_names(column) for key, column in columns.items()}
    targets = {key: index_target(columns[key], names[key]) for key in columns if names[key]}
    if splits is None:
        about = "a fifth, by a hash of the name"
        test = divide([reader.name(row) for row in rows.tolist()], targets)
    else:
        about = f"column split of {path.name}"
        for split in splits:
            if split.lower() not in TRAIN_NAMES + TEST_NAMES:
                raise UserError(f"{path}: split '{split}' is neither train nor test")
        test = np.array([split.lower() in TEST_NAMES for split in splits])
    if factors:  # after the division, which must not depend on them
        targets = {
            key: factor_target(key, columns[key], ~test, str(path))
            for key in chosen(factors, list(columns), str(path))
        }
    masks = _masks_beside(folder, root) if folder != root else None
    listings = {}
    for split, part in (("train", ~test), ("test", test)):
        own = {key: target.take(part) for key, target in targets.items()}
        left_out = unusable if split == "train" else ()
        listings[split] = Listing(
            name, split, str(root), reader, rows[part], own, left_out, masks, about
        )
    return listings


def _read_csv(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the first column, which names files, and the others by name."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            mark = next((mark for mark in ",;\t" if mark in header), ",")
            file.seek(0)
            table = [row for row in csv.reader(file, delimiter=mark) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); save it as UTF-8") from None
    if len(table) < 2:
        raise UserError(f"{path}: no rows; the first column names files in images/")
    header, *rows = table
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(f"{path}: row {number} has {len(row)} cells instead of {len(header)}")
    columns = {key: [row[i] for row in rows] for i, key in enumerate(header) if i}
    return [row[0] for row in rows], columns


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a line of thousands of characters helps nobody
            raise UserError(f"{folder}: {error.strerror}: a folder in it lies too deep") from None
        where = shown(os.fsdecode(error.filename or folder))
        raise UserError(f"{where}: {error.strerror or error}") from None


# --- Object masks ---------------------------------------------------------------------------------


def read_masks(images: Path, masks: Path, image_set: ImageSet) -> np.ndarray | None:
    """Return the masks [N, H, W] of an image set that was read from the folder `images`.

    Grey and palette values are the labels, 0 is the background. A mask has the size of its image's
    file and is cropped and resized like it, to the nearest pixel. With several files of one name,
    a PNG comes first. An image without a readable mask gets an empty one, with a warning; without
    any mask, or if all are empty, the result is None. uint8 if that holds the labels, else uint16.

    Raises UserError: a mask of another size than its image, in colour, or with labels over 65,535.
    """
    if not masks.is_dir():
        return None
    found = [path for path in masks.rglob("*") if path.suffix.lower() in EXTENSIONS]
    found.sort(key=lambda path: EXTENSIONS.index(path.suffix.lower()), reverse=True)
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
    if missing:
        warnings.warn(
            f"{masks}: no readable mask for {len(missing)} of {len(image_set)} images of the "
            f"{image_set.split} split, the first is {image_set.files[min(missing)]}; they count as "
            "background",
            stacklevel=2,
        )
    if not result.any():
        return None
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
