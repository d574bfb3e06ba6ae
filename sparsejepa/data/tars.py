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
    Part,
    Reader,
    choose_splits,
    make_listings,
)
from sparsejepa.data.images import EXTENSIONS, shown
from sparsejepa.errors import UserError

_MOST_SHARDS = 100_000  # of a pattern
_LARGEST_LABEL = 2**20  # bytes of a member that holds labels


class Members(Reader):
    """Encoded images inside larger files, such as uncompressed tar files, read where they lie."""

    _OPEN = 64  # files that are kept open

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
        return os.pread(file.fileno(), length, offset)

    def parts(self) -> list[bytes]:
        return [*super().parts(), self.shard.tobytes(), self.place.tobytes()]

    def paths(self, rows: np.ndarray) -> Iterable[str]:
        return self.shards


def is_tars(name: str) -> bool:
    """Whether a name is that of a tar file, or a pattern of some: train-{000..012}.tar."""
    return name.lower().endswith(".tar")


def list_tars(path: str | Path, name: str, factors: Sequence[str] = ()) -> dict[str, Listing]:
    """List a tar file, a pattern of tar files, or a folder of them.

    In a folder, shards whose names begin with train, test, val, valid or validation, or that lie in
    folders of those names, are that split; otherwise all are one split, which is then divided.
    Targets are KEY.cls as `class` and the fields of KEY.json that call themselves a label or a
    class; with `factors` whatever fields they name, KEY.txt is `text`.

    Raises UserError: no such file, a damaged one, no images; an unusable factor.
    """
    path = str(path)
    parts = {split: _index(shards, bool(factors)) for split, shards in _splits(path).items()}
    for split, part in parts.items():
        if not len(part.reader):
            raise UserError(f"{path}: no images in the shards of the {split} split")
    keys = sorted(parts["train"].columns, key=lambda key: key != "class")
    labels = [key for key in keys if re.search(r"label|class|cls", key)]
    about = "shards by their names"
    return make_listings(name, path, parts, factors, labels=labels, about=about)


def _index(shards: Sequence[str], everything: bool) -> Part:
    """Pass over the shards; without `everything` only fields that may be labels are kept."""
    columns: dict[str, list[str | None]] = {}
    names, places, numbers = list[bytes](), list[tuple[int, int]](), list[int]()
    unusable = []
    for number, shard in enumerate(shards):
        stem = os.fsencode(Path(shard).stem)
        try:
            with open(shard, "rb") as file:
                for key, members in _samples(shard):
                    ending = next((e for e in EXTENSIONS if e[1:] in members), None)
                    if ending is None:
                        where = shown(os.fsdecode(stem + b"/" + key))
                        unusable.append((where, "no image with it"))
                        continue
                    for field, value in _fields(file, members, everything):
                        column = columns.setdefault(field, [])
                        column += [None] * (len(names) - len(column))
                        column[len(names) :] = [sys.intern(value)]
                    names.append(stem + b"/" + key + ending.encode())
                    places.append(members[ending[1:]])
                    numbers.append(number)
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            reason = shown(str(error).split("\n")[0])
            raise UserError(f"{shown(shard)}: damaged tar file ({reason}); copy it again") from None
    for column in columns.values():
        column += [None] * (len(names) - len(column))
    place = np.array(places, np.int64).reshape(-1, 2)
    reader = Members(shards, names, np.array(numbers, np.int32), place)
    return Part(reader, np.arange(len(names)), columns, tuple(unusable))


def _fields(
    file: IO[bytes], members: dict[str, tuple[int, int]], everything: bool
) -> Iterator[tuple[str, str]]:
    """Yield name and text of a sample's fields; lists in JSON become numbered ones."""
    for ending in ("cls", "json", *["txt"] * everything):
        offset, length = members.get(ending, (0, 0))
        if not 0 < length <= _LARGEST_LABEL:
            continue
        file.seek(offset)
        text = file.read(length).decode("utf-8", "replace").strip()
        if ending != "json":
            yield {"cls": "class", "txt": "text"}[ending], text
            continue
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            continue
        for key, value in content.items() if isinstance(content, dict) else ():
            if everything or re.search(r"label|class|cls", key):
                numbered = isinstance(value, list)
                for i, entry in enumerate(value if numbered else [value]):
                    if isinstance(entry, str | int | float):
                        yield f"{key}_{i}" if numbered else key, str(entry)


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


def _splits(path: str) -> dict[str, list[str]]:
    """Return the shards of each split."""
    if not os.path.isdir(path):
        return {"train": [_checked(shard) for shard in _expand(path)]}
    folder, parts = Path(path), dict[str, list[str]]()
    for shard in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if is_tars(shard.name) and not shard.name.startswith("."):
            in_folder = shard.parent != folder and shard.parent.name.lower()
            name = in_folder or re.split(r"[^a-z]", shard.name.lower())[0]
            known = name if name in TRAIN_NAMES + TEST_NAMES else ""
            parts.setdefault(known, []).append(_checked(str(shard)))
    if not parts:
        raise UserError(f"{path}: no tar files in it")
    named = [name for name in parts if name]
    own = choose_splits(named) if named else {"train": ""}
    return {split: parts[name] for split, name in own.items()}


def _checked(shard: str) -> str:
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
