"""What every reader of images hands to the cache, and what all of them decide in the same way.

A reader returns ``{"train": Source, "test": Source}``. Data that has no test split gets one: a
fifth of the images of each class, chosen by a hash of the file's name, so that the choice is the
same on every machine and hardly moves when files are added.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejepa.data.cache import Source
from sparsejepa.data.decode import Block, Item, decode
from sparsejepa.data.store import ImageSet, Target

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
MAX_CATEGORIES = 1000
"""A column of a table with more distinct values than this is no target."""


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
) -> Source:
    """Build a source whose `table` is asked for only when there is something to decode.

    `stamp` is any JSON value that changes when the files do; `origin` names the data in errors.
    """

    def read(
        img_size: tuple[int, int] | None, upscale: bool
    ) -> tuple[Iterator[Block], dict[str, Target]]:
        items, targets, unusable = table()
        blocks = decode(items, img_size, upscale=upscale, origin=origin)
        return _with_unusable(blocks, list(unusable)), targets

    digest = hashlib.blake2b(json.dumps([origin, stamp]).encode(), digest_size=16).hexdigest()
    return Source(name, split, digest, read, masks)


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


def in_test(names: Sequence[str], labels: Sequence[Any]) -> np.ndarray:
    """Choose a fifth of the images of each class for the test split: [N] bool.

    A class of two or more has at least one image on either side.
    """
    hashes = [hashlib.blake2b(name.encode("utf-8", "surrogatepass")).digest() for name in names]
    members: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    test = np.zeros(len(names), bool)
    for indices in members.values():
        count = max(1, round(len(indices) / 5)) if len(indices) > 1 else 0
        test[sorted(indices, key=lambda index: hashes[index])[:count]] = True
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
