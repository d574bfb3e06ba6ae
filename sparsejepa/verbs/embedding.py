"""The verb embed: features of images as a file for other tools."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional

from sparsejepa.errors import UserError
from sparsejepa.terminal import show_facts
from sparsejepa.verbs.base import DATA, Verb, check_counts, image_size

if TYPE_CHECKING:
    from rich.console import Console

    from sparsejepa.data.images import Images
    from sparsejepa.encoders.encoder import Encoder


@dataclass(frozen=True)
class Embed(Verb):
    """Write the features of images to a file, with file names, labels and group activations."""

    run: Positional[str | None] = None
    """Run directory, timm:NAME, hub:OWNER/NAME, or a file or folder of weights."""
    data: str = ""
    """Images: a name (sparsejepa data list), hub:OWNER/NAME, a folder or tar shards."""
    out: Path = Path("features.parquet")
    """File to write: .parquet or .npz."""
    split: Literal["train", "test"] = "train"
    """Which part of the data."""
    pool: Literal["mean", "concat4"] = "mean"
    """mean: average of the last layer's patch tokens; concat4: of each of the last four layers."""
    groups: str = "auto"
    """auto: activations of the encoder's own groups, if it has any; none; or a folder with groups,
    such as explain writes for an encoder without."""
    stream: FlagCreatePairsOff[bool] = False
    """Decode images while they are needed instead of keeping them decoded on disk; tar shards are
    always streamed."""
    limit: int | None = None
    """Only this many images, at random."""
    img_size: tuple[int, ...] = ()
    """Size that images are decoded to, one number or height and width. If not given that of the
    run's training for its own data, otherwise the images' own, or the encoder's if they have
    several."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    max_unreadable: float = 0.5
    """Largest share of images that may be left out because they cannot be read."""
    data_root: Path | None = None
    """Folder with local copies, in the hub's own layout or as official files; SPARSEJEPA_DATA if
    not given."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def embed(args: Embed, console: Console) -> dict[str, Any]:
    """Embed a data set and write one row per image."""
    check_counts(args, "limit")
    if not args.run:
        raise UserError("which encoder? Name a run directory or timm:NAME after the verb")
    if not args.data:
        raise UserError(f"--data is needed: {DATA}")
    if not 0 <= args.max_unreadable <= 1:
        raise UserError(f"--max-unreadable {args.max_unreadable}: a share, 0 to 1")
    from sparsejepa.distributed import current, first_here
    from sparsejepa.encoders.load import load
    from sparsejepa.environment import resolve_device
    from sparsejepa.evaluation.features import check_path, embed_to, find_groups, say_enlarged

    check_path(args.out)
    encoder = load(args.run, resolve_device(args.device))
    activations = find_groups(args.run, args.groups, encoder)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    images = first_here(current(), lambda: _open(args, encoder, say)).subset(args.limit)
    say_enlarged(encoder, images.img_size, args.data, say)
    start = time.perf_counter()
    found = embed_to(args.out, encoder, images, pool=args.pool, groups=activations)
    facts = {
        "out": args.out,
        "encoder": encoder.name,
        "license": encoder.license,
        "data": args.data,
        "split": args.split,
        **found,
        "targets": list(images.targets),
        "seconds": time.perf_counter() - start,
    }
    show_facts(console, facts, f"wrote {args.out}")
    if args.split == "train" and (hidden := _hidden(args)):
        say(f"{hidden} images of the test split are not in it: --split test")
    return facts


def _hidden(args: Embed) -> int:
    """Return how many images of a folder of one's own are the test split."""
    from sparsejepa.data.catalog import find_listings

    if not Path(args.data).expanduser().exists():  # a name: its splits are no surprise
        return 0
    try:
        return len(find_listings(args.data, args.data_root)["test"].rows)
    except UserError:  # no test images, or a folder that is not listed image by image
        return 0


def _open(args: Embed, encoder: Encoder, say: Callable[[str], None]) -> Images:
    from sparsejepa.data.catalog import load_dataset, only_streamed, stream_dataset
    from sparsejepa.evaluation.features import read_fitting

    open_dataset = stream_dataset if args.stream or only_streamed(args.data) else load_dataset

    def read(size: tuple[int, int] | None, upscale: bool) -> Images:
        return open_dataset(
            args.data,
            args.split,
            img_size=size,
            data_root=args.data_root,
            upscale=upscale,
            max_unreadable=args.max_unreadable,
        )

    return read_fitting(
        read,
        args.data,
        [args.run or ""],
        lambda: [encoder.img_size],
        img_size=image_size(args.img_size),
        upscale=args.upscale,
        say=say,
    )
