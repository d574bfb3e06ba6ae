"""What is known of a split before it is decoded, and what all kinds of data decide in the same way.

Data is found as ``{"train": Listing, "test": Listing}``, which can be streamed or, as a `Source`,
decoded into the cache. Data that has no test split gets one: a fifth of the images of each class,
chosen by a hash of the file's name, so that the choice is the same on every machine and hardly
moves when files are added.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sparsejepa.data.cache import Source
from sparsejepa.data.decode import Block, Item, decode
from sparsejepa.data.readers import Files, Members, Reader, source_of
from sparsejepa.data.store import ImageSet, Target
from sparsejepa.errors import UserError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
MAX_CATEGORIES = 1000
"""A column of a table with more distinct values than this is no target."""


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

    def check(self) -> Listing:
        """Return self. Raises UserError if there are no images."""
        if not len(self.rows):
            raise UserError(f"{self.origin}: no images for the {self.split} split; add some")
        return self


class Table(NamedTuple):
    """The images of one split and their labels, before anything is decoded."""

    items: Iterable[Item]
    targets: dict[str, Target]
    unusable: tuple[tuple[str, str], ...] = ()
    """(file, reason) of what is left out before decoding."""


def make_source(
    name: str,
    split: str,
    stamp: Any,
    origin: str,
    table: Callable[[], Table],
    masks: Callable[[ImageSet], np.ndarray | None] | None = None,
    unusable: int = 0,
) -> Source:
    """Build a source whose `table` is asked for only when there is something to decode.

    `stamp` is any JSON value that changes when the files do; `origin` names the data in errors;
    `unusable` says how many of its entries the table leaves out.
    """

    def read(
        img_size: tuple[int, int] | None, upscale: bool
    ) -> tuple[Iterator[Block], dict[str, Target]]:
        items, targets, unusable = table()
        blocks = decode(items, img_size, upscale=upscale, origin=origin)
        return _with_unusable(blocks, list(unusable)), targets

    digest = hashlib.blake2b(json.dumps([origin, stamp]).encode(), digest_size=16).hexdigest()
    return Source(name, split, digest, read, masks, origin, unusable)


def as_source(listing: Listing) -> Source:
    """Return the source that decodes all of a listing's files; its stamp has their size and age."""
    reader = listing.reader

    def table() -> Table:
        rows = listing.check().rows.tolist()
        items = ((reader.name(row), source_of(reader, row)) for row in rows)
        return Table(items, listing.targets, listing.unusable)

    digest = hashlib.blake2b(digest_size=16)  # the JSON of a million names would be a large stamp
    for part in (*reader.parts(), listing.rows.tobytes()):
        digest.update(part)
    if isinstance(reader, Files):
        for row in listing.rows.tolist():
            digest.update(_age(reader.source(row)))
    elif isinstance(reader, Members):
        for shard in reader.shards:
            digest.update(_age(shard))
    for key, target in listing.targets.items():
        digest.update(json.dumps([key, target.names, target.note]).encode())
        digest.update(target.values.tobytes())
    stamp = [digest.hexdigest(), listing.unusable]
    return make_source(
        listing.name,
        listing.split,
        stamp,
        listing.origin,
        table,
        listing.masks,
        len(listing.unusable),
    )


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


def in_test(names: Iterable[str], labels: np.ndarray | Sequence[Any]) -> np.ndarray:
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
        _, classes = np.unique(np.asarray(labels), return_inverse=True)
        order = np.lexsort((hashes, classes))  # by class, by hash within
        for members in np.split(order, np.cumsum(np.bincount(classes))[:-1]):
            count = max(1, round(len(members) / 5)) if len(members) > 1 else 0
            test[members[:count]] = True
    return test


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


def _with_unusable(blocks: Iterator[Block], unusable: list[tuple[str, str]]) -> Iterator[Block]:
    if unusable:
        yield Block([], [], [], unusable)
    yield from blocks


def _age(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:  # decoding reports it
        return b"\n"
    return f"/{status.st_size}/{status.st_mtime_ns}\n".encode()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
