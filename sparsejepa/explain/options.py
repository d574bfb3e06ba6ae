"""How an encoder is explained: one set of settings, for the command and for every section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsejepa.errors import UserError, flag


@dataclass(frozen=True)
class Options:
    """What is read and how; every field is a flag of the command."""

    factors: str = ""
    """Columns of the data to take as factors, separated by commas; its own labels if not given."""
    quick: bool = False
    """Leave out what is slow: DCI and the scores of random patterns."""
    limit: int = 10_000
    """Training images, at most."""
    test_limit: int = 5_000
    """Test images, at most."""
    img_size: tuple[int, ...] = ()
    """Size that images are decoded to, one number or height and width. If not given that of the
    run's training for its own data, otherwise the images' own, or the encoder's if they have
    several."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    num_groups: int = 16
    """Groups to fit where the encoder has none."""
    groups: Literal["feature", "concept"] = "feature"
    """What a fitted group is; feature: it predicts a part of the embedding of its own."""
    density: float = 0.25
    """Share of connections that the fit keeps."""
    fit_steps: int = 600
    """Steps of that fit."""
    seed: int = 0
    """Seed of subsets, floors and fitted groups."""
    out: Path | None = None
    """Folder for the report; the run directory if not given, runs/explain-NAME for timm:NAME."""
    data_root: Path | None = None
    """Folder with local copies, in the hub's own layout or as official files; SPARSEJEPA_DATA if
    not given."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the encoder's matrix products; bf16 only where the hardware has it."""

    def check(self) -> None:
        """Raise UserError, which names the flag, for a value that cannot be."""
        for name in ("limit", "test_limit", "num_groups", "fit_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must be at least 1")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density:g}: must be above 0 and at most 1")
        if len(self.img_size) > 2 or any(side < 1 for side in self.img_size):
            raise UserError(f"--img-size {self.img_size}: one number, or height and width")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that images are decoded to; None if none were asked for."""
        return (self.img_size[0], self.img_size[-1]) if self.img_size else None

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The names between the commas of `factors`."""
        return tuple(name.strip() for name in self.factors.split(",") if name.strip())
