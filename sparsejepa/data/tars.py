"""Tar shards in the convention of webdataset, read at random positions.

A sample is a run of members with one key, the name up to the first dot of its last part: KEY.jpg,
KEY.cls, KEY.json, KEY.txt. A shard is passed over once, header by header, to learn where the images
lie; nothing is unpacked, and no name from a shard ever becomes a path.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparsejepa.data.folders import (
    TEST_NAMES,
    TRAIN_NAMES,
    Listing,
    Named,
    category_names,
    choose_splits,
    chosen,
    divide,
    factor_target,
    index_target,
)
from sparsejepa.data.images import EXTENSIONS, Target, shown
from sparsejepa.errors import UserError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_SHARDS = 100_000  # of a pattern
_LARGEST_LABEL = 2**20  # bytes of a member that holds labels


class Members(Named):
    """Images inside uncompressed tar files, read where they lie."""

    _OPEN = 64  # tar files that are kept open

    def __init__(
        self, shards: Sequence[str], names: Iterable[bytes], shard: np.ndarray, place: np.ndarray
    ) -> None:
        super().__init__(names)
        self.shards, self.shard, self.place = tuple(shards), shard, place
        """Which of the shards [N], and offset and length there [N, 2] int64."""
        self._files: dict[int, IO[bytes]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _files={}, _lock=threading.Lock())

    def source(self, row: int) -> bytes:
        offset, length = self.place[row].tolist()
        shard = int(self.shard[row])
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = open(self.shards[shard], "rb", buffering=0)  # noqa: SIM115
                if len(self._files) >= self._OPEN:  # closed once no thread reads it any more
                    del self._files[next(iter(self._files))]
                self._files[shard] = file
            if not hasattr(os, "pread"):  # Windows: threads share the place in the file
                file.seek(offset)
                return file.read(length)
        return os.pread(file.fileno(), length, offset)

    def parts(self) -> list[bytes]:
        return [*super().parts(), self.shard.tobytes(), self.place.tobytes()]

    def paths(self, rows: np.ndarray) -> Iterable[str]:
        return self.shards


def is_tars(name: str) -> bool:
    """Whether a name is that of a tar file, or a pattern of some: train-{000..012}.tar."""
    return name.lower().endswith((".tar", *_COMPRESSED))


def list_tars(path: str, name: str, factors: Sequence[str] = ()) -> dict[str, Listing]:
    """List a tar file, a pattern of tar files, or a folder of them.

    In a folder, shards whose names begin with train, test, val, valid or validation, or that lie in
    folders of those names, are that split; otherwise all are one split, which is then divided.
    Targets are KEY.cls as `class` and the fields of KEY.json that call themselves a label or a
    class; with `factors` whatever fields they name, KEY.txt is `text`.

    Raises UserError: no such file, a compressed or damaged one, no images; an unusable factor.
    """
    splits = _splits(path)
    found = {split: _Index(shards, bool(factors)) for split, shards in splits.items()}
    for split, index in found.items():
        if not len(index.reader):
            raise UserError(f"{path}: no images in the shards of the {split} split")
    rows = {split: np.arange(len(index.reader)) for split, index in found.items()}
    about, targets = "shards by their names", _targets(found)
    if "test" not in found:
        reader, about = found["train"].reader, "a fifth, by a hash of the name"
        test = divide([reader.name(row) for row in range(len(reader))], targets["train"])
        rows = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    if factors:  # after the division, which must not depend on them
        targets = _factor_targets(found, factors, rows["train"], path)
    listings = {}
    for split in ("train", "test"):
        part = split if split in found else "train"
        own = {key: target.take(rows[split]) for key, target in targets[part].items()}
        unusable = tuple(found[part].unusable) if part == split else ()
        reader = found[part].reader
        listings[split] = Listing(
            name, split, path, reader, rows[split], own, unusable, about=about
        )
    return listings


class _Index:
    """What the shards of one split hold."""

    def __init__(self, shards: Sequence[str], everything: bool) -> None:
        """Pass over the shards; without `everything` only fields that may be labels are kept."""
        self.columns: dict[str, list[str | None]] = {}
        """A text for each image, None where it has none."""
        self.unusable: list[tuple[str, str]] = []
        self._everything = everything
        names, places, numbers = list[bytes](), list[tuple[int, int]](), list[int]()
        for number, shard in enumerate(shards):
            stem = os.fsencode(Path(shard).stem)
            try:
                with open(shard, "rb") as file:
                    for key, members in _samples(shard):
                        ending = next((e for e in EXTENSIONS if e[1:] in members), None)
                        if ending is None:
                            where = shown(os.fsdecode(stem + b"/" + key))
                            self.unusable.append((where, "no image with it"))
                            continue
                        for field, (offset, length) in members.items():
                            known = ("cls", "json", *["txt"] * everything)
                            if field in known and length <= _LARGEST_LABEL:
                                file.seek(offset)
                                self._label(len(names), field, file.read(length))
                        names.append(stem + b"/" + key + ending.encode())
                        places.append(members[ending[1:]])
                        numbers.append(number)
            except (OSError, tarfile.TarError, EOFError, ValueError) as error:
                reason = shown(str(error).split("\n")[0])
                raise UserError(
                    f"{shown(shard)}: damaged tar file ({reason}); copy it again"
                ) from None
        for column in self.columns.values():
            column += [None] * (len(names) - len(column))
        place = np.array(places, np.int64).reshape(-1, 2)
        self.reader = Members(shards, names, np.array(numbers, np.int32), place)

    def _label(self, row: int, field: str, content: bytes) -> None:
        text = content.decode("utf-8", "replace").strip()
        fields = {"cls": "class", "txt": "text"}
        values = {fields[field]: text} if field in fields else _json_fields(text)
        for key, value in values.items():
            if field != "json" or self._everything or re.search(r"label|class|cls", key):
                column = self.columns.setdefault(key, [])
                column += [None] * (row - len(column))
                column.append(sys.intern(value))


def _samples(shard: str) -> Iterator[tuple[bytes, dict[str, tuple[int, int]]]]:
    """Yield the key of each sample and where its members lie: (offset, length) by ending."""
    with tarfile.open(shard, "r:") as tar:
        key, members = b"", dict[str, tuple[int, int]]()
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every member
            folder, slash, last = info.name.rpartition("/")
            stem, _, ending = last.partition(".")
            if not info.isreg() or info.sparse or not stem:
                continue
            own = os.fsencode(folder + slash + stem)
            if own != key:
                if members:
                    yield key, members
                key, members = own, {}
            members.setdefault(ending.lower(), (info.offset_data, info.size))
        if members:
            yield key, members
    with open(shard, "rb") as file:  # tarfile takes a damaged header, or a cut, for the end
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut short or no header at byte {tar.offset}")


def _json_fields(text: str) -> dict[str, str]:
    """Return the plain values of a JSON object as texts; lists of them as numbered fields."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    found = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        entries = {f"{key}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {}
        for name, entry in (entries or {key: value}).items():
            if isinstance(entry, str | int | float):
                found[name] = str(entry)
    return found


def _targets(found: dict[str, _Index]) -> dict[str, dict[str, Target]]:
    """Make targets of the fields that look like labels, with the same classes in all splits."""
    targets: dict[str, dict[str, Target]] = {split: {} for split in found}
    for key in sorted(found["train"].columns, key=lambda key: key != "class"):
        columns = {split: i.columns[key] for split, i in found.items() if _whole(i, key)}
        names = category_names(text for column in columns.values() for text in column)
        for split, column in columns.items() if names else ():
            targets[split][key] = index_target(column, names)
    return targets


def _whole(index: _Index, key: str) -> bool:
    """Whether every sample has this field."""
    return None not in index.columns.get(key, [None])


def _factor_targets(
    found: dict[str, _Index], factors: Sequence[str], train: np.ndarray, origin: str
) -> dict[str, dict[str, Target]]:
    """Make targets of the factors; `train` are the rows of the first part that are for training."""
    first, *others = found.values()
    shared = [key for key in first.columns if all(key in i.columns for i in others)]
    targets: dict[str, dict[str, Target]] = {split: {} for split in found}
    for key in chosen(factors, shared, origin):
        values = [text for index in found.values() for text in index.columns[key]]
        whole = factor_target(key, values, np.isin(np.arange(len(values)), train), origin)
        start = 0
        for split, index in found.items():
            rows = np.arange(start, start := start + len(index.reader))
            targets[split][key] = whole.take(rows)
    return targets


def _splits(path: str) -> dict[str, list[str]]:
    """Return the shards of each split."""
    if not os.path.isdir(path):
        return {"train": [_checked(shard) for shard in _expand(path)]}
    parts = _shards(Path(path))
    if not parts:
        raise UserError(f"{path}: no tar files in it")
    named = [name for name in parts if name]
    own = choose_splits(named) if named else {"train": ""}
    return {split: [_checked(shard) for shard in parts[name]] for split, name in own.items()}


def _shards(folder: Path) -> dict[str, list[str]]:
    """Return the shards in a folder by the name of their split, "" where they have none."""
    parts: dict[str, list[str]] = {}
    for shard in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if is_tars(shard.name) and not shard.name.startswith("."):
            in_folder = shard.parent != folder and shard.parent.name.lower()
            name = in_folder or re.split(r"[^a-z]", shard.name.lower())[0]
            known = name if name in TRAIN_NAMES + TEST_NAMES else ""
            parts.setdefault(known, []).append(str(shard))
    return parts


def _checked(shard: str) -> str:
    if shard.lower().endswith(_COMPRESSED):
        raise UserError(
            f"{shown(shard)}: compressed, so that it cannot be read at random positions; unpack it "
            "to a plain .tar (images are compressed already)"
        )
    if not os.path.isfile(shard):
        raise UserError(f"{shown(shard)}: no such file")
    return shard


def _expand(pattern: str) -> list[str]:
    """Return the names that a pattern with {000..012} or {a,b} stands for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds is None:
        choices = match[1].split(",")
    else:
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last < first + _MOST_SHARDS:
            raise UserError(f"{pattern}: {{{match[1]}}} must count upwards, to few enough files")
        choices = [f"{i:0{len(bounds[1])}d}" for i in range(first, last + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + choice + rest for choice in choices for rest in _expand(tail)]
