"""Features of any number of images, part by part: memory stays flat, and what was done is kept.

Each part of the images is computed by one process and becomes a file in a folder beside the result;
when all are there the result is put together from them. So a killed command, given again, goes on
with the first part that is missing, and gives the same values as one that was not killed, also on
another number of processes.

Letters: n images, m of a part, D' features, G groups.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sparsejepa.data.decode import shown
from sparsejepa.data.store import ImageSet
from sparsejepa.data.stream import ImageStream, open_images
from sparsejepa.distributed import current, gather_texts, on_main
from sparsejepa.errors import UserError
from sparsejepa.evaluation.export import Table, write_table
from sparsejepa.evaluation.features import Pool, batch_rows, pooled
from sparsejepa.files import load_tensors, partial_files, read_json, save_tensors, write_text
from sparsejepa.interop import Encoder
from sparsejepa.interop.module import GroupActivations
from sparsejepa.lock import LOCK, run_lock

ABOUT = "about.json"
ROWS = 1024
"""Images of a part."""


@dataclass(frozen=True)
class Embedding:
    """What is to be computed: the features of images, and the activations of groups if given."""

    encoder: Encoder
    images: ImageSet | ImageStream
    pool: Pool = "mean"
    activations: GroupActivations | None = None

    def key(self) -> dict[str, Any]:
        """Return what the parts of this embedding and of no other have in common."""
        digest = hashlib.blake2b(digest_size=16)
        state = {} if self.activations is None else self.activations.state_dict()
        for name, tensor in sorted(state.items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        images = self.images
        return {
            "format": 1,
            "encoder": self.encoder.fingerprint(),
            "groups": self.activations and f"{self.activations.kind} {digest.hexdigest()}",
            "data": images.fingerprint,
            "split": images.split,
            "images": len(images),
            # A stream's fingerprint is that of the list, whatever the images are decoded to.
            "size": list(images.img_size),
            "upscale": isinstance(images, ImageStream) and images.decoder.upscale,
            "pool": self.pool,
            "rows": ROWS,
        }

    @property
    def count(self) -> int:
        """The number of parts."""
        return -(-len(self.images) // ROWS)

    def widths(self) -> dict[str, int]:
        """Return the columns of each array."""
        width = self.encoder.embed_dim * (4 if self.pool == "concat4" else 1)
        groups = {} if self.activations is None else {"groups": len(self.activations.W)}
        return {"x": width, **groups}


def embed_to(
    path: Path, wanted: Embedding, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Write the features of images to `path`; of several processes each computes its parts.

    The parts lie in a folder ``NAME.parts`` beside it until it is written. The folder must be one
    that all processes see.

    Returns numbers of images, features, groups and unreadable images, and the first of these.

    Raises UserError if the encoder gives NaN or infinity, if the folder holds something else, or if
    another command is at work in it.
    """
    world, folder = current(), path.with_name(f"{path.name}.parts")
    on_main(world, lambda: _look(folder))
    with run_lock(folder, world):
        missing = on_main(world, lambda: _prepare(folder, wanted, say))
        if wanted.activations is not None:
            wanted.activations.to(wanted.encoder.device)
        _compute(folder, wanted, missing[world.rank :: world.size])
        gather_texts("")  # the others may not be done
        found = on_main(world, lambda: _finish(path, folder, wanted))
    if world.main:
        with contextlib.suppress(OSError):  # another command may have begun there just now
            folder.rmdir()
    return found


def _look(folder: Path) -> None:
    """Make the folder above. Raises UserError if there is something else in the folder's place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: the folder {folder.parent} cannot be made ({error.strerror}); name another"
        ) from None
    if not folder.exists() or (folder / ABOUT).exists():
        return
    if not folder.is_dir() or set(folder.iterdir()) - {folder / LOCK, *partial_files(folder)}:
        raise UserError(f"{folder}: in the way, parts are to be kept there; move it elsewhere")


def _prepare(folder: Path, wanted: Embedding, say: Callable[[str], None]) -> list[int]:
    """Return which parts are not in the folder yet; those of anything else are removed."""
    key, about = wanted.key(), folder / ABOUT
    if about.exists():
        try:
            same = read_json(about) == key
        except UserError:
            same = False
        if not same:
            say(f"{folder} holds parts of another encoder, other images or settings: begun anew")
            _remove(folder)
    for file in partial_files(folder):
        file.unlink()
    write_text(about, json.dumps(key) + "\n")
    missing = [part for part in range(wanted.count) if not _whole(_file(folder, part))]
    if there := wanted.count - len(missing):
        say(f"{there} of {wanted.count} parts are in {folder} already")
    return missing


def _compute(folder: Path, wanted: Embedding, parts: list[int]) -> None:
    """Compute and keep some parts, one after the other."""
    encoder, source = wanted.encoder, open_images(wanted.images, wanted.encoder.device)
    size = batch_rows(encoder)

    def indices() -> Iterator[torch.Tensor]:
        for part in parts:
            yield from _rows_of(wanted, part).split(size)

    batches = source.batches(indices())
    try:
        for part in parts:
            rows, found = _rows_of(wanted, part), list[dict[str, torch.Tensor]]()
            for _ in rows.split(size):
                x, tokens = pooled(encoder, next(batches), wanted.pool)
                arrays = {"x": x}
                if wanted.activations is not None:
                    arrays["groups"] = wanted.activations(tokens)[0]
                found.append({name: array.cpu() for name, array in arrays.items()})
            # A stream puts another image where one cannot be read; it has no row of its own.
            bad = getattr(source, "unreadable", set())
            kept = torch.tensor([row not in bad for row in rows.tolist()])
            arrays = {name: torch.cat([b[name] for b in found])[kept] for name in wanted.widths()}
            if not all(array.isfinite().all() for array in arrays.values()):
                name = wanted.images.name
                raise UserError(f"{encoder.name}: gives NaN or infinity on {name}; train it again")
            save_tensors(_file(folder, part), {**arrays, "index": rows[kept]}, {})
    finally:
        source.close()


def _finish(path: Path, folder: Path, wanted: Embedding) -> dict[str, Any]:
    """Put the parts together and remove them."""
    images, files = wanted.images, [_file(folder, part) for part in range(wanted.count)]
    index = torch.cat([load_tensors(file)[0]["index"] for file in files]).numpy()

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for file in files:
            tensors = load_tensors(file)[0]
            if len(tensors["index"]):
                yield {name: tensors[name].numpy() for name in wanted.widths()}

    targets = {name: target.take(index) for name, target in images.targets.items()}
    write_table(path, Table(wanted.widths(), index, targets, images.files, blocks))
    dropped: list[int] = np.setdiff1d(np.arange(len(images)), index).tolist()
    skipped = [name for name, _ in images.skipped] + [shown(images.files[i]) for i in dropped]
    _remove(folder)
    widths = wanted.widths()
    return {
        "images": len(index),
        "features": widths["x"],
        "groups": widths.get("groups", 0),
        "skipped": len(set(skipped)),
        **({"first_skipped": skipped[0]} if skipped else {}),
    }


def _rows_of(wanted: Embedding, part: int) -> torch.Tensor:
    return torch.arange(part * ROWS, min((part + 1) * ROWS, len(wanted.images)))


def _file(folder: Path, part: int) -> Path:
    return folder / f"{part:07d}.safetensors"


def _whole(file: Path) -> bool:
    """Whether a part is there and as long as it says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _remove(folder: Path) -> None:
    """Remove the parts, and nothing else; first what says whose they are."""
    (folder / ABOUT).unlink()
    for file in folder.glob("[0-9]" * 7 + ".safetensors"):
        file.unlink()
